"""The CD-ROM drive in virtual time: what is put in and when, and what every cut and every refusal leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsupervisor.domain.status import Phase
from kvmsupervisor.machine.cdrom import MOVED_S, RETRY_S
from tests.fakes.qemu import FakeQemu
from tests.support.host import Host


def put_there(host: Host, *names: str) -> Path:
    folder = host.local_disks.folder
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.iso").write_bytes(name.encode())
    return folder


async def has(host: Host, qemu: FakeQemu, medium: str) -> None:
    """Wait until it is in the drive, and nothing of another one is left; the status says so."""
    await host.until(lambda: host.status.cdrom == (medium or "empty") and host.status.pending == ())
    assert qemu.drive.medium == medium
    assert list(qemu.drive.sets.values()) == ([medium] if medium else [])
    assert len(qemu.drive.nodes) == len(qemu.drive.sets)
    assert not qemu.drive.tray_open
    assert host.status.reason == "runs"


async def test_media_follow_their_key(host: Host) -> None:
    """§2: put in at the start, changed, taken out, put in again; each time the guest finds the right one."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    await has(host, qemu, "file:a.iso")
    host.wish(cdrom="file:b.iso")
    await has(host, qemu, "file:b.iso")
    host.drop("cdrom")
    await has(host, qemu, "")
    host.wish(cdrom="file:a.iso")
    await has(host, qemu, "file:a.iso")
    assert qemu.drive.seen == ["file:a.iso", "file:b.iso", "", "file:a.iso"]
    assert len(host.qemus.all) == 1


async def test_a_successor_knows_what_is_in_it(host: Host) -> None:
    """Law 8: the record tells, so that nothing is changed that is right, and what changed meanwhile is."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    host.wish(cdrom="file:b.iso")
    await has(host, qemu, "file:b.iso")
    await host.die()
    host.begin()
    await has(host, qemu, "file:b.iso")
    assert qemu.drive.seen == ["file:a.iso", "file:b.iso"]


@pytest.mark.parametrize(
    "cut",
    ["blockdev-open-tray", "query-fdsets", "add-fd", "blockdev-add", "blockdev-remove-medium", "blockdev-insert-medium",
     "blockdev-close-tray", "blockdev-del", "remove-fd"],
)  # fmt: skip
async def test_a_change_that_is_cut_off_is_gone_on_with(host: Host, cut: str) -> None:
    """Law: wherever QEMU's answer is lost, the next attempt ends with the right medium, and with nothing left over."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    host.qemus.lose_answer_to = cut
    host.wish(cdrom="file:b.iso")
    await host.clock.advance(2 * RETRY_S)
    assert host.qemus.lose_answer_to is None
    await has(host, qemu, "file:b.iso")


async def test_a_locked_tray_is_waited_for(host: Host) -> None:
    """§2: the guest is asked, not forced; the reason says how to force it; its own opening is noticed."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    qemu.drive.locked = True
    host.wish(cdrom="file:b.iso")
    await host.clock.advance(10 * RETRY_S)
    assert "the guest has locked the tray" in host.status.reason
    assert "cdrom='file:b.iso force'`" in host.status.reason
    assert (host.status.cdrom, host.status.pending) == ("file:a.iso", ("cdrom",))
    assert list(qemu.drive.sets.values()) == ["file:a.iso"]
    qemu.drive.locked = False
    qemu.drive.move(is_open=True)
    await host.clock.advance(MOVED_S)
    await has(host, qemu, "file:b.iso")

    qemu.drive.locked = True
    host.wish(cdrom="file:a.iso force")
    await has(host, qemu, "file:a.iso")


async def test_a_change_of_mind_is_heard_at_once(host: Host) -> None:
    """Law: while something waits, the key may be written back: then nothing is pending, and nothing has happened."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    qemu.drive.locked = True
    host.wish(cdrom="file:b.iso")
    await host.until(lambda: "locked" in host.status.reason)
    host.wish(cdrom="file:a.iso")
    await has(host, qemu, "file:a.iso")
    assert qemu.drive.seen == ["file:a.iso"]


async def test_a_guest_that_plays_with_its_tray_costs_little(host: Host) -> None:
    """Law: however often the guest moves its tray, one attempt a second is made, and none where nothing waits."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    before = len(qemu.commands)
    for _ in range(100):
        qemu.drive.move(is_open=True)
        qemu.drive.move(is_open=False)
    await host.clock.advance(1.0)
    assert len(qemu.commands) == before
    qemu.drive.locked = True
    host.wish(cdrom="file:b.iso")
    await host.until(lambda: "locked" in host.status.reason)
    before = qemu.commands.count("blockdev-open-tray")
    for _ in range(100):
        qemu.drive.move(is_open=False)
        await host.clock.advance(0.05)
    assert qemu.commands.count("blockdev-open-tray") - before <= 6


def _gone(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("spoil", "said"), [(_gone, "there is no file"), (_empty, "is empty"), (_linked, "symbolic link")]
)
async def test_a_medium_that_cannot_be_had(host: Host, spoil: Callable[[Path], None], said: str) -> None:
    """§2: what is in the drive stays, the reason names key and file, and it follows once it is there."""
    folder = put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    spoil(folder / "b.iso")
    host.wish(cdrom="file:b.iso")
    await host.until(lambda: "b.iso" in host.status.reason)
    assert said in host.status.reason
    assert host.status.reason.startswith("runs; cdrom: ")
    assert host.status.phase is Phase.RUNNING
    assert qemu.drive.medium == "file:a.iso"
    (folder / "b.iso").unlink(missing_ok=True)
    put_there(host, "b")
    await has(host, qemu, "file:b.iso")


async def test_qemus_refusal_leaves_the_last_medium(host: Host) -> None:
    """Law: what QEMU cannot open is told in its words; what was in the drive is there still."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    qemu.refuses["blockdev-add"] = "no such thing"
    host.wish(cdrom="file:b.iso")
    await host.until(lambda: "no such thing" in host.status.reason)
    assert (qemu.drive.medium, qemu.drive.tray_open) == ("file:a.iso", False)
    del qemu.refuses["blockdev-add"]
    await has(host, qemu, "file:b.iso")


async def test_only_a_first_start_waits_for_its_medium(host: Host) -> None:
    """§2: a machine that has run starts with an empty drive, and gets its medium once it is there."""
    host.wish(cdrom="file:a.iso")
    host.begin()
    await host.clock.advance(30.0)
    assert host.qemus.all == []
    assert host.status.reason.startswith("cdrom: there is no file")
    folder = put_there(host, "a")
    first = await host.runs()
    (folder / "a.iso").unlink()
    first.crash()
    await host.until(lambda: len(host.qemus.all) == 2 and host.status.phase is Phase.RUNNING)
    second = host.qemus.all[-1]
    await host.until(lambda: "there is no file" in host.status.reason)
    assert host.status.cdrom == "empty"
    put_there(host, "a")
    await has(host, second, "file:a.iso")


async def test_a_change_that_is_taken_back_while_its_answer_is_lost(host: Host) -> None:
    """Law: what is in the drive is not known then, so the former medium is put in again, not taken for being there."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    host.qemus.lose_answer_to = "blockdev-close-tray"
    host.wish(cdrom="file:b.iso")
    await host.until(lambda: qemu.drive.medium == "file:b.iso")
    host.wish(cdrom="file:a.iso")
    await has(host, qemu, "file:a.iso")
