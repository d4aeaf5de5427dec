"""The guest of the demo and the tests, booted by a real QEMU with the options that matter for it."""

from __future__ import annotations

import asyncio
import json
import lzma
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.demo.guest import MINIMUM_RAM_MIB, Guest, Modules, build_guest, cpio
from kvmsupervisor.cli.demo.packages import GuestError
from tests.support.guest import CACHE

pytestmark = pytest.mark.timeout(400)

LIMIT_S = 150.0
"""A guest boots in 3 s, and in 70 s on a machine that has fifteen times more work than processors."""


@dataclass(slots=True, kw_only=True)
class Machine:
    """A QEMU with the guest in it."""

    process: asyncio.subprocess.Process
    qmp_in: asyncio.StreamReader
    qmp_out: asyncio.StreamWriter
    serial_in: asyncio.StreamReader
    serial_out: asyncio.StreamWriter

    async def line(self, beginning: str, *, limit_s: float = LIMIT_S) -> str:
        """Read the serial console up to a line that begins so."""
        async with asyncio.timeout(limit_s):
            while True:
                raw = await self.serial_in.readline()
                assert raw, f"the console ended before {beginning!r}"
                text = raw.decode(errors="replace").strip()
                if text.startswith(beginning):
                    return text

    def type(self, word: str) -> None:
        """Type a line on the serial console."""
        self.serial_out.write(f"{word}\n".encode())

    def order(self, command: str) -> None:
        """Send a QMP command."""
        self.qmp_out.write(json.dumps({"execute": command}).encode() + b"\n")

    async def event(self, *names: str) -> dict[str, Any]:
        """Read QMP up to one of these events."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                raw = await self.qmp_in.readline()
                assert raw, f"QMP ended before {names}"
                message: dict[str, Any] = json.loads(raw)
                if message.get("event") in names:
                    return message


async def connected(
    process: asyncio.subprocess.Process, path: Path
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a socket of QEMU's: it may not be there yet, or be bound and not yet listen."""
    while True:
        try:
            return await asyncio.open_unix_connection(path)
        except (FileNotFoundError, ConnectionRefusedError):
            assert process.returncode is None
            await asyncio.sleep(0.01)


@asynccontextmanager
async def machine(
    guest: Guest, *, deaf: bool = False, heartbeat_s: float = 1, login: bool = False, options: Sequence[str] = ()
) -> AsyncIterator[Machine]:
    """Boot the guest in a QEMU of its own, with more options if need be; kill it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"),
            *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(MINIMUM_RAM_MIB)),
            *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
            *("-chardev", f"socket,id=serial0,path={folder}/console,server=on,wait=off"),
            *("-serial", "chardev:serial0", "-device", "pvpanic", "-S"),
            *guest.options(tag="trial", deaf=deaf, heartbeat_s=heartbeat_s, login=login),
            *options,
        )
        try:
            async with asyncio.timeout(LIMIT_S), AsyncExitStack() as connecting:
                qmp_in, qmp_out = await connected(process, folder / "qmp")
                connecting.callback(qmp_out.close)
                serial_in, serial_out = await connected(process, folder / "console")
                connecting.callback(serial_out.close)
                # However the test ends: what it leaves open is a failure of the next one.
                connections = connecting.pop_all()
            async with connections:
                found = Machine(
                    process=process, qmp_in=qmp_in, qmp_out=qmp_out, serial_in=serial_in, serial_out=serial_out
                )
                found.order("qmp_capabilities")
                found.order("cont")
                yield found
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
    finally:
        shutil.rmtree(folder)


@pytest.mark.guest
async def test_a_guest_says_hello_beats_reboots_and_obeys_the_power_button(guest: Guest) -> None:
    """HELLO promises that the power button is heard; a reboot from inside leaves QEMU running."""
    async with machine(guest) as vm:
        assert await vm.line("HELLO") == "HELLO from trial"
        assert (await vm.line("HB")).startswith("HB 1 ")
        assert (await vm.line("HB")).startswith("HB 2 ")
        vm.type("reboot")
        reset = await vm.event("RESET", "SHUTDOWN")
        assert (reset["event"], reset["data"]["reason"]) == ("RESET", "guest-reset")
        await vm.line("HELLO from trial")
        assert (await vm.line("HB")).startswith("HB 1 ")
        vm.order("system_powerdown")
        assert await vm.line("power button") == "power button: GOODBYE from trial"
        assert (await vm.event("SHUTDOWN"))["data"]["reason"] == "guest-shutdown"
        assert await vm.process.wait() == 0


@pytest.mark.guest
async def test_a_guest_that_is_told_to_panic_tells_qemu_through_pvpanic(guest: Guest) -> None:
    """`panic` ends QEMU with the reason `guest-panic`, not with a reset."""
    async with machine(guest) as vm:
        await vm.line("HELLO")
        vm.type("panic")
        await vm.event("GUEST_PANICKED")
        assert (await vm.event("SHUTDOWN", "RESET"))["data"]["reason"] == "guest-panic"
        assert await vm.process.wait() == 0


@pytest.mark.guest
async def test_a_deaf_guest_runs_on_after_the_power_button(guest: Guest) -> None:
    """`deaf=1` on the command line: heartbeats go on; `poweroff` still works."""
    async with machine(guest, deaf=True) as vm:
        await vm.line("HB 1")
        vm.order("system_powerdown")
        await vm.event("POWERDOWN")
        await vm.line("HB")
        await vm.line("HB")
        vm.type("nonsense")
        await vm.line("nonsense: no such word")
        vm.type("poweroff")
        assert (await vm.event("SHUTDOWN"))["data"]["reason"] == "guest-shutdown"


@pytest.mark.guest
async def test_a_guest_can_be_told_to_become_deaf_and_to_hang(guest: Guest) -> None:
    """Both words take the power button away without shutting down; a hanging guest says nothing more."""
    async with machine(guest, heartbeat_s=0.1) as vm:
        await vm.line("HELLO")
        vm.type("deaf")
        await vm.line("deaf: ")
        vm.order("system_powerdown")
        await vm.event("POWERDOWN")
        await vm.line("HB")
        vm.type("hang")
        await vm.line("hang: ")
        vm.order("system_powerdown")
        await vm.event("POWERDOWN")
        with pytest.raises(TimeoutError):
            # Ten heartbeats' time.
            await vm.line("", limit_s=1.0)


@pytest.mark.guest
async def test_a_guest_for_people_is_shut_down_from_its_own_shell(guest: Guest) -> None:
    """`login=1`: a prompt again after a logout; PID 1 takes `poweroff` as real ones do, and says goodbye."""
    async with machine(guest, login=True) as vm, asyncio.timeout(LIMIT_S):
        for word in ("exit", "poweroff"):
            await vm.serial_in.readuntil(b"trial login: ")
            vm.type("root")
            await vm.serial_in.readuntil(b"trial:/root# ")
            vm.type(word)
        assert await vm.line("poweroff: ") == "poweroff: GOODBYE from trial"
        assert (await vm.event("SHUTDOWN"))["data"]["reason"] == "guest-shutdown"


def test_what_is_built_is_built_once() -> None:
    """A second build, in this process or another, finds the first one's files and touches nothing."""
    built = build_guest(CACHE)
    before = built.initramfs.stat()
    assert build_guest(CACHE) == built
    assert built.initramfs.stat().st_mtime_ns == before.st_mtime_ns
    assert built.initramfs.stat().st_ino == before.st_ino


def test_extra_flags_survive_the_shells_way_of_splitting_words() -> None:
    """A path with a blank stays one word, and the kernel's command line is one word too."""
    guest = Guest(kernel=Path("/a b/vmlinuz"), initramfs=Path("/a b/initramfs"))
    assert guest.extra_flags(tag="one", heartbeat_s=0.5, deaf=True) == (
        "-kernel '/a b/vmlinuz' -initrd '/a b/initramfs' -append "
        "'console=ttyS0 quiet panic=-1 cryptomgr.notests hb=0.5 tag=one deaf=1'"
    )
    assert guest.extra_flags(dhcp=True, login=True).endswith(" tag=guest dhcp=1 login=1'")


def test_modules_come_after_those_they_need_and_only_once(tmp_path: Path) -> None:
    """Packed or not, with either spelling of the name; what is built in counts as loaded."""

    def module(depends: str) -> bytes:
        return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"

    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers" / "net-card.ko.xz").write_bytes(lzma.compress(module("failover,ring")))
    (tmp_path / "drivers" / "failover.ko").write_bytes(module("core"))
    (tmp_path / "drivers" / "ring.ko").write_bytes(module(""))
    (tmp_path / "modules.builtin").write_text("kernel/lib/core.ko\n")
    modules = Modules(tmp_path)
    assert [path.name for path in modules.take(["net_card"])] == ["failover.ko", "ring.ko", "net-card.ko.xz"]
    assert list(modules.take(["ring", "core"])) == []
    with pytest.raises(GuestError, match="no module 'absent'"):
        list(modules.take(["absent"]))


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    """`cpio` unpacks the archive: folders before what lies in them, contents and links intact."""
    archive = cpio({"init": b"#!/bin/sh\n", "a/b/odd": b"12345"}, {"a/link": "b/odd"})
    names: list[str] = []
    position = 0
    while names[-1:] != ["TRAILER!!!"]:
        header = archive[position : position + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        name_at = position + 110
        names.append(archive[name_at : name_at + fields[11] - 1].decode())
        data_at = (name_at + fields[11] + 3) // 4 * 4
        if names[-1] == "a/b/odd":
            assert archive[data_at : data_at + fields[6]] == b"12345"
        position = (data_at + fields[6] + 3) // 4 * 4
    assert names.index("a") < names.index("a/b") < names.index("a/b/odd")
    assert {"dev", "proc", "sys", "dev/console", "init", "a/link"} <= set(names)
    assert position == len(archive)
