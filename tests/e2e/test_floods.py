"""A guest that floods its console, or resets itself all the time, hurts nobody: not its host, not its neighbours."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.firmware import assemble

KIB = 1 << 10

FLOOD = """
    mov $0x3f8, %dx
    mov $'0', %al
1:  out %al, %dx
    jmp 1b
"""
"""Writes to the serial port as fast as it is taken, without a look at its state."""

RESET = """
    mov $0xcf9, %dx
    mov $6, %al
    out %al, %dx
    hlt
"""
"""Resets the machine at once, and so for ever."""


@pytest.fixture(scope="session")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`extra_flags` of machines whose firmware does nothing but that."""
    folder = tmp_path_factory.mktemp("firmware")
    made = {}
    for name, code in (("flood", FLOOD), ("reset", RESET)):
        # The processor begins 16 bytes below the end of the firmware.
        text = f".code16\nstart:{code}\n.org 0xfff0\njmp start\n.org 0x10000\n"
        made[name] = f"-bios {assemble(text, folder, name)}"
    return made


def used(folder: Path) -> int:
    """Bytes that an instance's logs take on the disk."""
    return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir() if ".log" in entry.name)


def test_a_console_that_is_flooded_is_bounded(hosts: Hosts, keys: Keys, firmware: dict[str, str], tiny: str) -> None:
    """With and without a supervisor, in bytes; the neighbour's console and the supervisor do not notice."""
    host = hosts(KVM_LOG_MAX_BYTES="64K", KVM_LOG_KEEP="2").start()
    keys.machines(host.name, "flood", ram=16, extra_flags=firmware["flood"])
    keys.machines(host.name, "well", ram=16, extra_flags=tiny)
    qemus = host.wait_running("flood", "well")
    folder = host.run_dir / "flood"
    eventually("two logs to be set aside", (folder / "console.log.2").exists)
    most, seen = 0, set()

    def often() -> bool:
        nonlocal most
        # One may be set aside just now.
        with contextlib.suppress(FileNotFoundError):
            most = max(most, used(folder))
            seen.add((folder / "console.log.1").stat().st_mtime_ns)
        return len(seen) >= 8

    eventually("many logs to be set aside", often)
    assert most <= 4 * 64 * KIB
    assert len(host.events("log.rotated", instance="flood")) <= 2
    assert host._fetch("/healthz")[0] == 200
    assert not (folder / "console.log.3").exists()
    # Nobody is there: nothing grows, and nothing waits.
    host.kill9()
    before = used(folder)
    eventually("the flood to fill what is kept for the next one", lambda: room_of(qemus["flood"].pid) == 0)
    assert used(folder) == before
    assert host.run_state(qemus["flood"]) == "running"
    # Many are kept, so that what was missed is still there when it is looked for.
    host.settings["KVM_LOG_KEEP"] = "100"
    host.start()
    assert host.wait_running("flood", "well") == qemus
    seen.clear()
    eventually("the logs to go on", often)
    texts, owners = logs_in(folder)
    assert any("output is missing here: more than 256 KiB came at once" in text for text in texts)
    assert owners == {os.geteuid()}


def logs_in(folder: Path) -> tuple[list[str], set[int]]:
    """The console's logs, and who owns them."""
    texts, owners = [], set()
    # The newest first: one that is set aside meanwhile is found again under its next number, and none is missed.
    for name in ("console.log", *(f"console.log.{number}" for number in range(1, 101))):
        with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as log:
            texts.append(log.read().decode(errors="replace"))
            owners.add(os.fstat(log.fileno()).st_uid)
    return texts, owners


def room_of(pid: int) -> int:
    """Bytes that a QEMU may still write into what keeps its console's output."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if entry.readlink().name.startswith("memfd:console.log"):
            fields = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split()
            return entry.stat().st_size - int(fields[1])
    raise AssertionError("it has none")


def test_a_guest_that_resets_all_the_time(hosts: Hosts, keys: Keys, firmware: dict[str, str]) -> None:
    """It is counted, and told of at most once a minute."""
    host = hosts().start()
    keys.machines(host.name, "reset", ram=16, extra_flags=firmware["reset"])
    host.wait_running("reset")
    eventually(
        "a thousand resets", lambda: host.metric("instance_resets_total", host=host.name, instance="reset") >= 1000
    )
    assert len(host.events("instance.guest_reset", instance="reset")) <= 2
    assert len(host.log) < 100_000
    assert host._fetch("/healthz")[0] == 200


def test_the_console_of_an_earlier_release_is_cut(hosts: Hosts, keys: Keys, tiny: str) -> None:
    """Its QEMU writes the file by its path, as a user of its own: it is cut by us, not copied, and soon."""
    host: Host = hosts(KVM_LOG_MAX_BYTES="64K").start()
    keys.machines(host.name, "old", ram=16, extra_flags=tiny)
    host.wait_running("old")
    host.stop()
    # As such a QEMU is found: its command line has a path.
    argv = [
        word
        for word in json.loads(host.record("old").read_bytes())["argv"]
        if not word.startswith("fd=") and word != "-add-fd"
    ]
    host.rewrite("old", argv=argv)
    log = host.run_dir / "old" / "console.log"
    log.unlink(missing_ok=True)
    host.start()
    host.wait_running("old")
    with log.open("ab", buffering=0) as file:
        for _ in range(3):
            file.write(b"x" * (100 * KIB))
            eventually("it to be cut", lambda: log.stat().st_size == 0)
        os.truncate(log, 1 << 40)
        eventually("the hole to be cut", lambda: log.stat().st_size == 0)
    assert log.with_name("console.log.1").stat().st_size == 64 * KIB
