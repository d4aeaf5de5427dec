"""The failpoints that the simulation does not come to (`tests/simulation/points.py: ELSEWHERE`), cut in each way.

Its hosts have no guard, no bridges, no drives, and no file systems that are full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

import pytest

from kvmsupervisor import failpoints
from kvmsupervisor.adapters.etcd import Unavailable
from kvmsupervisor.domain.nics import BRIDGE, TUN, Link
from tests.fakes.clock import settle
from tests.fakes.guard import FakeGuard
from tests.fakes.qemu import FakeQemu
from tests.instance.test_cdrom import has, put_there
from tests.support.host import Host

BR0 = Link(index=3, name="br0", kind=BRIDGE)
TAP = Link(index=7, name="tap7", kind=TUN, master=3)
DISK = {"disk/0": "file:one.raw size=1M"}


class Way(Enum):
    """What happens at the point."""

    KILL = "kill"
    FAIL = "fail"


@dataclass
class Cut:
    """Whoever comes to a point first is held there, or gets an error."""

    name: str
    way: Way
    reached: bool = False

    def __call__(self, name: str) -> Awaitable[None] | None:
        if name != self.name or self.reached:
            return None
        self.reached = True
        return _never() if self.way is Way.KILL else _fail()


async def _never() -> None:
    await asyncio.Event().wait()


async def _fail() -> None:
    await asyncio.sleep(0)
    raise Unavailable("a failpoint")


@pytest.fixture(params=Way, ids=lambda way: way.value)
def cut_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Cut]:
    def arm(name: str) -> Cut:
        made = Cut(name, request.param)
        monkeypatch.setattr(failpoints, "reached", made)
        return made

    return arm


async def go_on(host: Host, cut: Cut) -> None:
    """Come to the point; where that is the supervisor's end, the next one begins."""
    await host.until(lambda: cut.reached)
    if cut.way is Way.KILL:
        await host.die()
        host.begin()
    await host.clock.advance(10.0)


async def test_guard(host: Host, cut_at: Callable[[str], Cut]) -> None:
    """Law 7: whatever comes between QEMU and its guard, its guest does not run before that watches it."""
    host.guard = guard = FakeGuard()
    host.qemus.on_record = lambda qemu: qemu.environment["KVMSUPERVISOR_INCARNATION"] in guard.charges
    cut = cut_at("before GUARD")
    host.wish(extra_flags="-drive file=/srv/1.img")
    host.begin()
    await go_on(host, cut)
    qemu = await host.runs()
    assert host.qemus.all == [qemu]
    assert list(guard.charges) == [qemu.environment["KVMSUPERVISOR_INCARNATION"]]
    assert host.qemus.ran_off_the_record == []


async def test_plug(host: Host, cut_at: Callable[[str], Cut]) -> None:
    """A NIC that is to be plugged in again is, by whoever comes next; the guest goes on."""
    host.wish(mac="52:54:00:00:00:01", bridge="br0")
    host.begin()
    qemu = await host.runs()
    host.links.set(BR0, TAP)
    await settle()
    cut = cut_at("before PLUG")
    host.links.set(BR0, Link(index=7, name="tap7", kind=TUN, master=0))
    await go_on(host, cut)
    assert host.links.plugged[-1] == (7, "br0")
    assert host.qemus.all == [qemu]
    assert host.status.reason == "runs"


async def test_room(host: Host, cut_at: Callable[[str], Cut]) -> None:
    """A guest that a full file system has stopped goes on once there is room, whoever looks."""
    host.wish(**DISK)
    host.begin()
    qemu = await host.runs()
    host.room_bytes = 0
    lacks_room(qemu)
    cut = cut_at("before ROOM")
    await go_on(host, cut)
    assert qemu.run_state == "io-error"
    assert "make room there" in host.status.reason
    host.room_bytes = 1 << 30
    await host.clock.advance(10.0)
    assert (qemu.run_state, host.qemus.all) == ("running", [qemu])


async def test_medium(host: Host, cut_at: Callable[[str], Cut]) -> None:
    """The medium of the key is in the drive in the end, and nothing of the former one is left."""
    put_there(host, "a", "b")
    host.wish(cdrom="file:a.iso")
    host.begin()
    qemu = await host.runs()
    await has(host, qemu, "file:a.iso")
    cut = cut_at("before MEDIUM")
    host.wish(cdrom="file:b.iso")
    await go_on(host, cut)
    await has(host, qemu, "file:b.iso")
    assert host.qemus.all == [qemu]


def lacks_room(qemu: FakeQemu) -> None:
    """Its guest writes, and there is no room."""
    inserted = {"node-name": "disk0", "image": {"virtual-size": 1 << 20}}
    qemu.blocks = [{"device": "", "io-status": "nospace", "inserted": inserted}]
    qemu.run_state = "io-error"
    qemu.event("BLOCK_IO_ERROR", action="stop", nospace=True)
    qemu.event("STOP")
