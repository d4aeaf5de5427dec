"""The chaos guest on a real Ceph: what it writes is judged as clean where it was so, and two writers are found."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.status import Phase
from tests.chaos.conftest import Stage
from tests.chaos.disk import Observer, boottime
from tests.chaos.downtime import downtime
from tests.chaos.guest import ChaosGuest, build, qemu_wrapper
from tests.chaos.records import SECTOR, SLOTS, TABLE_SECTOR, Head, History, Record, check, parse
from tests.support.ceph import Ceph
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.lock_history import check_lock_values, lock_values
from tests.support.rbd_qemu import RbdQemu


class Guest(RbdQemu):
    """A QEMU without a supervisor."""

    def __init__(self, ceph: Ceph, image: RbdDisk, guest: ChaosGuest, owner: str) -> None:
        super().__init__(ceph, image)
        self.owner = owner
        self._guest = guest

    def argv(self, qmp_fd: int) -> list[str]:
        return [*super().argv(qmp_fd), *self._guest.options(self.owner)]


def history_of(*guests: Guest) -> History:
    """As if each had had the lock, in this order, and all had been fenced long before."""
    locks = [
        Lock(
            host=HostName("alpha"),
            boot_id="boot",
            epoch=epoch,
            state=LockState.RUNNING,
            incarnation=guest.owner,
            clients=(f"127.0.0.1:0/{epoch}",),
        )
        for epoch, guest in enumerate(guests, 1)
    ]
    return History(
        locks=locks,
        listed={address: 0.0 for lock in locks for address in lock.clients},
        written={guest.owner: 1.0 for guest in guests},
    )


async def test_without_fencing_there_are_two_writers(ceph: Ceph, chaos_disk: RbdDisk, chaos_guest: ChaosGuest) -> None:
    """Law: the judge can find them: two QEMUs on one image, which `exclusive-lock` lets write in turns."""
    async with (
        Guest(ceph, chaos_disk, chaos_guest, "first") as first,
        Guest(ceph, chaos_disk, chaos_guest, "second") as second,
    ):
        with Observer(ceph, {"1": chaos_disk}) as seen:

            async def until(what: str, look: Callable[[Head], bool]) -> None:
                await asyncio.to_thread(eventually, what, lambda: look(seen.head("1")))

            await first.cont()
            await until("the first one's record", lambda head: head.owners == {"first"})
            assert check(seen.journal("1"), history_of(first, second)) == []
            await second.cont()
            await until("the second one's record", lambda head: "second" in head.owners)
            begin = seen.head("1").sequence
            await until("more of both", lambda head: all(one.sequence > begin + 2 for one in head.slots.values()))
            journal = seen.journal("1")
    found = check(journal, history_of(first, second))
    assert {violation.law for violation in found} <= {"epoch", "chain"}
    assert any("first (epoch 1) wrote after second (epoch 2)" in str(violation) for violation in found), found


async def test_looking_on_without_a_monitor(ceph: Ceph, chaos_disk: RbdDisk, chaos_guest: ChaosGuest) -> None:
    """Law: while the blocklist cannot be read the disk is looked at all the same; new owners are not dated by that."""
    async with Guest(ceph, chaos_disk, chaos_guest, "one") as guest:
        with Observer(ceph, {"1": chaos_disk}) as seen:
            ceph.stop_mon()
            try:
                await guest.cont()
                await asyncio.to_thread(
                    eventually, "its records", lambda: any(look.sequence > 2 for look in seen.samples("1"))
                )
                assert seen.history("1", []).written == {}
            finally:
                ceph.cont_mon()
    assert set(seen.history("1", []).written) == {"one"}


# --- under a supervisor ---------------------------------------------------------------------------------------


def test_a_machine_that_crashes_and_stops(keys: Keys, hosts: Hosts, ceph: Ceph, chaos_stage: Stage) -> None:
    """Laws 3 and 4 as the disk tells of them: a QEMU that was killed is fenced before the next one's guest writes.

    One that was shut down by its power button left nothing to fence. QEMU is another user's, behind the wrapper.
    """
    guest, disk = chaos_stage.guest, chaos_stage.disk
    alpha = hosts("alpha", KVM_QEMU_USER="nobody", **chaos_stage.settings).start()
    with Observer(ceph, {"1": disk}) as seen:

        def until_written_by(number: int) -> None:
            eventually("its records", lambda: len({look.owner for look in seen.samples("1")} - {""}) == number)

        keys.machines("alpha", "1", ram=guest.ram_mib, rbd=disk.name)
        first = alpha.wait_running("1")["1"]
        until_written_by(1)
        assert seen.head("1").owner == first.incarnation
        begin = boottime()
        first.kill()
        until_written_by(2)
        keys.put("1", power="off")
        alpha.wait_for("1", lambda status: status.phase is Phase.STOPPED)
        eventually("the release", lambda: keys.lock("1") is None)
        keys.put("1", power="on")
        until_written_by(3)
        journal = seen.journal("1")
    locks = lock_values(keys, "1")
    check_lock_values(locks)
    assert check(journal, seen.history("1", locks)) == []
    # It was the fence that was judged by, and the release: neither is there by accident.
    (address,) = {client for lock in locks if lock and lock.incarnation == first.incarnation for client in lock.clients}
    assert address in seen.history("1", locks).listed
    unreleased = seen.history("1", [lock for lock in locks if lock is not None])
    assert {violation.law for violation in check(journal, unreleased)} == {"fenced"}
    assert downtime(seen.samples("1"), begin, boottime()).restarts == 2
    assert "CHAOS power button" in (alpha.run_dir / "1" / "console.log").read_text()


# --- alone ----------------------------------------------------------------------------------------------------


@contextmanager
def alone(guest: ChaosGuest, node: dict[str, object], owner: str = "alone") -> Iterator[Path]:
    """A QEMU with this disk, errors of which reach the guest; its console."""
    console = guest.image.with_name("console")
    argv = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,accel=tcg"),
        *("-m", f"{guest.ram_mib}", "-serial", f"file:{console}", *guest.options(owner)),
        *("-blockdev", json.dumps({"node-name": "disk", **node})),
        *("-device", "virtio-blk-pci,drive=disk,bootindex=0,werror=report,rerror=report"),
    ]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as qemu:
        try:
            yield console
        finally:
            qemu.kill()


def until_said(console: Path, words: str) -> None:
    eventually(f"{words!r} on the console", lambda: console.exists() and words in console.read_text())


def file_node(guest: ChaosGuest) -> dict[str, object]:
    return {"driver": "file", "filename": str(guest.image)}


def test_a_guest_with_an_error_writes_no_more(tmp_path: Path) -> None:
    """Law: after one failed write a guest says so and never writes again, though it could."""
    guest = build(tmp_path)
    once = {"event": "none", "iotype": "write", "errno": 5, "once": True}
    with alone(guest, {"driver": "blkdebug", "image": file_node(guest), "inject-error": [once]}) as console:
        until_said(console, "CHAOS I/O error: it writes no more")
    assert parse(guest.image.read_bytes()).records == ()


def test_a_full_log(tmp_path: Path) -> None:
    """Law: a guest whose log is full goes on in another slot, its chain unbroken."""
    guest = build(tmp_path, log_records=4)
    with alone(guest, file_node(guest)):
        eventually("two slots more", lambda: len(parse(guest.image.read_bytes()).records) > 9)
    journal = parse(guest.image.read_bytes())
    assert [record.index for record in journal.records[:9]] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert journal.shared == {}
    assert {violation.law for violation in check(journal, History())} == {"known"}


def test_a_full_table(tmp_path: Path) -> None:
    """Law: where every slot is taken a guest writes over none of them, and says so."""
    guest = build(tmp_path)
    with guest.image.open("r+b") as disk:
        for slot in range(SLOTS):
            disk.seek((TABLE_SECTOR + slot) * SECTOR)
            disk.write(Record(owner=f"{slot}", sequence=1, previous=0, previous_owner="").to_bytes())
    before = guest.image.read_bytes()
    with alone(guest, file_node(guest)) as console:
        until_said(console, "CHAOS every slot of the table is taken")
    assert guest.image.read_bytes() == before


def test_qemu_behind_the_wrapper(tmp_path: Path) -> None:
    """Law: every word reaches QEMU as it was, the owner behind them; without one to tell, it is QEMU itself."""
    shown = tmp_path / "show"
    shown.write_text("#!/bin/sh\nprintf '%s\\n' $$ \"$@\"\n")
    shown.chmod(0o755)
    wrapper = qemu_wrapper(tmp_path, str(shown))
    words = ["", "a b", "*", "$HOME", "-x", "'\""]
    environment = {"PATH": os.environ["PATH"], "KVMSUPERVISOR_INCARNATION": "me"}
    with subprocess.Popen([wrapper, *words], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, *said = process.stdout.read().splitlines()
    assert int(pid) == process.pid
    assert said == [*words, "-fw_cfg", "name=opt/owner,string=me"]
    helped = subprocess.run(
        [qemu_wrapper(tmp_path), "-machine", "help"], env={}, capture_output=True, text=True, timeout=60, check=True
    )
    assert "q35" in helped.stdout
