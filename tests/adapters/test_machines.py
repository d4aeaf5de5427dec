"""Machine types: what a plain name stands for, asked of a real QEMU and of programs that are none."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from kvmsupervisor.adapters import machines
from kvmsupervisor.adapters.machines import MachineTypes

ANSWER = """Supported machines are:
microvm              microvm (i386)
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)
"""


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def answering(tmp_path: Path) -> tuple[str, Path]:
    """A program that answers as QEMU does, and the file in which it notes each time that it was asked."""
    (tmp_path / "answer").write_text(ANSWER)
    asked = tmp_path / "asked"
    return script(tmp_path / "qemu", f'echo "$@" >>{asked}; cat {tmp_path}/answer'), asked


def is_gone(pid: Path) -> bool:
    return not Path(f"/proc/{pid.read_text().strip()}").exists()


async def test_a_real_qemu() -> None:
    """Law: the plain names stand for a version, and a version, or a name that it does not know, for itself."""
    types = MachineTypes("qemu-system-x86_64")
    q35, pc = await types.versioned("q35"), await types.versioned("pc")
    assert re.fullmatch(r"pc-q35-\d+\.\d+", q35)
    assert re.fullmatch(r"pc-i440fx-\d+\.\d+", pc)
    assert await types.versioned(q35) == q35
    assert await types.versioned("no-such-machine") == "no-such-machine"


async def test_asked_once(tmp_path: Path) -> None:
    """Law: however many ask at once, and afterwards, QEMU is asked once."""
    qemu, asked = answering(tmp_path)
    types = MachineTypes(qemu)
    answers = await asyncio.gather(*(types.versioned("q35") for _ in range(5)))
    assert answers == ["pc-q35-7.2"] * 5
    assert [await types.versioned(name) for name in ("pc", "microvm")] == ["pc-i440fx-7.2", "microvm"]
    assert asked.read_text() == "-machine help\n"


async def test_no_such_program(tmp_path: Path) -> None:
    """Law: what cannot be asked leaves the name as it is; it is asked again, once it is there."""
    types = MachineTypes(str(tmp_path / "qemu"))
    assert await types.versioned("q35") == "q35"
    answering(tmp_path)
    assert await types.versioned("q35") == "pc-q35-7.2"


async def test_a_program_that_fails(tmp_path: Path) -> None:
    """Law: a failure is no answer: the name stays as it is, and QEMU is asked again."""
    types = MachineTypes(script(tmp_path / "qemu", "echo no memory >&2; exit 1"))
    assert await types.versioned("q35") == "q35"
    answering(tmp_path)
    assert await types.versioned("q35") == "pc-q35-7.2"


async def test_words_that_are_no_text(tmp_path: Path) -> None:
    """Law: whatever bytes are said, the name stays as it is."""
    types = MachineTypes(script(tmp_path / "qemu", r"printf 'q35 \377 (alias of\n\0(alias of x)\n'"))
    assert await types.versioned("q35") == "q35"


async def test_a_program_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: it is ended after a while, and leaves nothing behind."""
    pid = tmp_path / "pid"
    types = MachineTypes(script(tmp_path / "qemu", f"echo $$ >{pid}; exec sleep 1000"))
    monkeypatch.setattr(machines, "LIMIT_S", 0.5)
    assert await types.versioned("q35") == "q35"
    assert is_gone(pid)


async def test_being_cut_off(tmp_path: Path) -> None:
    """Law: cancelled while it asks, it ends the program, and whoever asks next is answered."""
    pid = tmp_path / "pid"
    types = MachineTypes(script(tmp_path / "qemu", f"echo $$ >{pid}; exec sleep 1000"))
    asking = asyncio.create_task(types.versioned("q35"))
    async with asyncio.timeout(20):
        while not pid.exists() or not pid.read_text().endswith("\n"):  # noqa: ASYNC110  the kernel tells nobody
            await asyncio.sleep(0.005)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert is_gone(pid)
    answering(tmp_path)
    assert await types.versioned("q35") == "pc-q35-7.2"
