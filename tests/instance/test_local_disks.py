"""Local disks in virtual time: when they are made, who waits for whom, what grows, and what goes on by itself."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import FileDisk
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.qcow2 import virtual_size
from kvmsupervisor.domain.spec import Disk, Spec
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.machine.room import LOOK_EVERY_S
from tests.fakes.qemu import FakeQemu
from tests.fakes.storage import address_of
from tests.support.host import LAYOUT, ONE, Host

G = 1 << 30
DISK = "disk/0"


def folder(host: Host) -> Path:
    return host.local_disks.folder


def block(node: str = "disk0", *, size: int = G, status: str = "ok") -> dict[str, Any]:
    """A disk as `query-block` tells it."""
    return {"io-status": status, "inserted": {"node-name": node, "image": {"virtual-size": size}}}


def stop_for_want_of_room(qemu: FakeQemu, *blocks: dict[str, Any]) -> None:
    """QEMU stops its guest."""
    qemu.blocks = [*blocks] or [block(status="nospace")]
    qemu.run_state = "io-error"
    qemu.event("BLOCK_IO_ERROR", nospace=True, action="stop")
    qemu.event("STOP")


async def test_a_disk_is_made_before_anything_is_taken(host: Host) -> None:
    """With a size it is made, closed to others; QEMU gets a descriptor; the machine is pinned (law 7)."""
    host.wish(**{DISK: "file:a.qcow2 size=1G"})
    host.begin()
    qemu = await host.runs()
    found = folder(host) / "a.qcow2"
    assert virtual_size(found.read_bytes()) == G
    assert found.stat().st_mode & 0o777 == 0o600
    assert folder(host).stat().st_mode & 0o777 == 0o700
    assert not any(str(folder(host)) in word for word in qemu.argv)
    assert host.lock is not None
    assert host.lock.storage is Storage.UNFENCEABLE


async def test_without_a_size_it_is_waited_for(host: Host) -> None:
    """A file that is not there starts nothing and takes nothing; it goes on when somebody puts it there."""
    host.wish(**{DISK: "file:a.raw"})
    host.begin()
    await host.clock.advance(30.0)
    assert (host.lock, host.qemus.all) == (None, [])
    assert f"disk/0: there is no file {folder(host)}/a.raw" in host.status.reason
    (folder(host) / "a.raw").write_bytes(bytes(1 << 20))
    await host.runs()


async def test_a_key_that_goes_away_takes_nothing_with_it(host: Host) -> None:
    """Taking away the key, and the instance, leaves the file."""
    host.wish(**{DISK: "file:a.raw size=1M"})
    host.begin()
    await host.runs()
    host.etcd.erase(*[key for key in host.etcd.data if key.startswith(LAYOUT.wishes_prefix)])
    await host.until(lambda: host.gone, 300.0)
    assert (folder(host) / "a.raw").exists()


async def test_who_has_the_file_is_named(host: Host) -> None:
    """Another machine of this host has it: nothing is started until that has ended."""
    host.wish(**{DISK: "file:a.raw size=1M"})
    other = InstanceId("other")
    host.local_disks.arrived(other, Spec(ram_mib=64, disks=(Disk(4, file=FileDisk("a.raw")),)))
    host.begin()
    await host.clock.advance(10.0)
    assert host.qemus.all == []
    assert "file:a.raw is instance other's (disk/4)" in host.status.reason
    assert ONE in host.status.reason
    host.local_disks.left(other)
    await host.runs()


async def test_a_program_that_has_the_file(host: Host) -> None:
    """A lock on the file itself is what counts, whoever has it."""
    folder(host).mkdir(parents=True)
    path = folder(host) / "a.raw"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    host.wish(**{DISK: "file:a.raw"})
    host.begin()
    await host.clock.advance(10.0)
    assert host.qemus.all == []
    assert "in use by another program" in host.status.reason
    os.close(fd)
    await host.runs()


async def test_a_disk_grows_under_its_machine(host: Host) -> None:
    """At once when the key says so, never less, and nothing is pending for it."""
    host.wish(**{DISK: "file:a.raw size=1M"})
    host.begin()
    qemu = await host.runs()
    qemu.blocks = [block(size=1 << 20)]
    host.put(**{DISK: "file:a.raw size=2M"})
    await host.clock.advance(1.0)
    assert qemu.blocks == [block(size=2 << 20)]
    assert (host.status.pending, host.status.reason) == ((), "runs")
    host.put(**{DISK: "file:a.raw size=1M"})
    await host.clock.advance(1.0)
    assert qemu.blocks == [block(size=2 << 20)]
    assert "size=1M is less than the 2M" in host.status.reason
    assert host.running is qemu
    host.put(**{DISK: "file:b.raw size=4M"})
    await host.clock.advance(1.0)
    assert qemu.blocks == [block(size=2 << 20)]
    assert host.status.pending == (DISK,)


async def test_growth_that_fails_is_told(host: Host) -> None:
    """Its machine runs on with what it has."""
    host.wish(**{DISK: "file:a.raw size=1M"})
    host.begin()
    qemu = await host.runs()
    qemu.blocks = [block(size=1 << 20)]
    qemu.refuses["block_resize"] = "No space left on device"
    host.put(**{DISK: "file:a.raw size=2M"})
    await host.clock.advance(1.0)
    assert "disk/0: it could not be grown to 2M" in host.status.reason
    assert "No space left" in host.status.reason
    assert host.running is qemu


async def test_a_smaller_size_starts_nothing(host: Host) -> None:
    """A size less than what is there is a mistake of the key: it waits, and says so."""
    folder(host).mkdir(parents=True)
    (folder(host) / "a.raw").write_bytes(bytes(2 << 20))
    host.wish(**{DISK: "file:a.raw size=1M"})
    host.begin()
    await host.clock.advance(10.0)
    assert host.qemus.all == []
    assert "write size=2M, or leave size= out" in host.status.reason
    host.put(**{DISK: "file:a.raw size=2M"})
    await host.runs()


async def test_it_grows_before_its_guest_runs(host: Host) -> None:
    """A size that was changed while it was off is there when the guest boots."""
    folder(host).mkdir(parents=True)
    (folder(host) / "a.raw").write_bytes(bytes(1 << 20))
    host.qemus.prepare = lambda qemu: setattr(qemu, "blocks", [block(size=1 << 20)])
    host.wish(**{DISK: "file:a.raw size=3M"})
    host.begin()
    qemu = await host.runs()
    assert qemu.blocks == [block(size=3 << 20)]
    assert qemu.commands.index("block_resize") < qemu.commands.index("cont")


async def test_a_guest_goes_on_when_there_is_room(host: Host) -> None:
    """It waits as long as there is none, says which file system is full, and goes on by itself."""
    host.room_bytes = 1 << 20
    host.wish(**{DISK: "file:a.raw size=1G"})
    host.begin()
    qemu = await host.runs()
    stop_for_want_of_room(qemu)
    await host.clock.advance(LOOK_EVERY_S * 3)
    assert qemu.commands.count("cont") == 1
    assert host.status.phase is Phase.RUNNING
    assert f"disk/0: the file system of {folder(host)} is full (1 MiB left)" in host.status.reason
    await host.die()
    host.begin()
    await host.clock.advance(LOOK_EVERY_S)
    assert "is full" in host.status.reason
    assert qemu.run_state == "io-error"
    host.room_bytes = G
    await host.clock.advance(LOOK_EVERY_S + 1.0)
    assert qemu.run_state == "running"
    assert host.status.reason == "runs"


async def test_only_want_of_room_ends_by_itself(host: Host) -> None:
    """What a person has paused, what failed otherwise, and what lacks room elsewhere, stays as it is."""
    host.wish(**{DISK: "file:a.raw size=1G", "disk/1": "p/i"})
    host.begin()
    qemu = await host.runs()
    for blocks in (
        [block(status="failed")],
        [block(status="nospace"), block("disk1", status="failed")],
        [block("disk1", status="nospace")],
    ):
        stop_for_want_of_room(qemu, *blocks)
        await host.clock.advance(LOOK_EVERY_S * 3)
        assert qemu.run_state == "io-error"
        assert "QMP says io-error" in host.status.reason
    qemu.run_state = "paused"
    qemu.blocks = [block(status="nospace")]
    qemu.event("STOP")
    await host.clock.advance(LOOK_EVERY_S * 3)
    assert qemu.run_state == "paused"
    assert qemu.commands.count("cont") == 1


async def test_a_disk_is_made_once(host: Host) -> None:
    """What it has run with is not new: where the file is missing, no empty one takes its place, not even elsewhere."""
    host.wish(**{DISK: "file:a.raw size=1M"})
    host.begin()
    await host.runs()
    assert host.status.files == {"file:a.raw": "a"}
    host.put(power="off-now")
    await host.until(lambda: host.status.phase is Phase.STOPPED)
    await host.told()
    (folder(host) / "a.raw").unlink()
    await host.die()
    host.begin()
    host.put(power="on")
    await host.clock.advance(10.0)
    assert len(host.qemus.all) == 1
    assert "the machine ran with it on a" in host.status.reason
    assert not (folder(host) / "a.raw").exists()
    host.put(**{DISK: "file:b.raw size=1M"})
    await host.runs()
    assert host.status.files == {"file:b.raw": "a"}


async def test_a_guest_that_is_shut_out_says_so(host: Host) -> None:
    """Law 4: `cont` does not help it, and its lock is its own. A restart does, as its reason says.

    A host with a copy of etcd had taken it over (simulation, seeds 8261 and 8650).
    """
    host.wish(rbd="/rbd/vm")
    host.begin()
    qemu = await host.runs()
    host.fencing.fenced.append(address_of(qemu.pid))
    stop_for_want_of_room(qemu, block(status="failed"))
    await host.until(lambda: "is shut out in Ceph" in host.status.reason, 5.0)
    assert f"{address_of(qemu.pid)} is shut out" in host.status.reason
    assert "`kvmsupervisor restart --now 1` begins it anew" in host.status.reason
    assert not host.status.up
    asked = host.fencing.asked
    await host.clock.advance(600.0)
    assert 9 <= host.fencing.asked - asked <= 11
    assert qemu.alive
    host.put(restart_request="now:1")
    await host.until(lambda: host.running is not None and host.running is not qemu)
    await host.until(lambda: host.status.reason == "runs")


async def test_a_disk_that_fails_is_not_said_to_be_shut_out(host: Host) -> None:
    """Nor while Ceph does not answer: then that is a line in the log."""
    host.wish(rbd="/rbd/vm")
    host.begin()
    qemu = await host.runs()
    stop_for_want_of_room(qemu, block(status="failed"))
    await host.until(lambda: "a disk has failed" in host.status.reason, 5.0)
    host.fencing.away = True
    with capture_logs() as lines:
        await host.clock.advance(120.0)
    assert "shut out" not in host.status.reason
    (line,) = [one for one in lines if one["event"] == "instance.etcd_trouble"][:1]
    assert "does not say whether this QEMU was shut out" in line["reason"]
