"""When own lines of bridge.conf go: a host in virtual time, and a bridge.conf that is only asked."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.nics import BRIDGE, TUN, Link
from kvmsupervisor.instance.bridges import AGAIN_S, GATHER_S, Bridges
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.network import FakeNetwork
from tests.fakes.qemu import FakeQemus
from tests.support.host import Host

KNOWN = ("br0", "br1", "br2")


@pytest.fixture
async def host(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    """A host with a machine on br0 that runs."""

    async def at_once(work: object, *args: object, **options: object) -> object:
        assert callable(work)
        return work(*args, **options)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    clock = FakeClock()
    qemus = FakeQemus(clock)
    made = Host(FakeEtcd(), clock, qemus)
    qemus.network.allow_bridges(KNOWN)
    made.wish(mac="52:54:00:00:00:01", bridge="br0")
    made.begin()
    await made.runs()
    yield made
    await made.close()


@pytest.fixture
def conf(host: Host) -> FakeNetwork:
    return host.qemus.network


@pytest.fixture
async def kept(host: Host) -> AsyncIterator[Bridges]:
    """What keeps the lines, running."""
    made = Bridges(
        network=host.qemus.network,
        me=HostName("a"),
        owner="me",
        bridge_if="br2",
        instances={host.instance.id: host.instance},
        clock=host.clock,
    )
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()


async def heeded(host: Host, kept: Bridges) -> None:
    kept.heed()
    await host.clock.advance(2 * GATHER_S)


async def test_what_an_earlier_supervisor_left_goes_first(host: Host, kept: Bridges, conf: FakeNetwork) -> None:
    """Law: at the start, once all is known, all that nobody wants goes; nothing is touched before."""
    await host.clock.advance(3600.0)
    assert conf.kept == []
    await heeded(host, kept)
    assert (conf.kept, conf.owner) == ([{"br0"}], "me")


async def test_the_file_is_left_alone_while_nobody_wants_less(host: Host, kept: Bridges, conf: FakeNetwork) -> None:
    """Law: other keys, more bridges, a stopped machine: its next start needs the line, and nobody reads the file."""
    await heeded(host, kept)
    host.put(**{"nic/1/mac": "52:54:00:00:00:02", "description": "x"})
    await heeded(host, kept)
    host.put(power="off")
    await host.until(lambda: host.running is None)
    await heeded(host, kept)
    assert conf.kept == [{"br0"}]
    host.drop("nic/1/mac")
    await heeded(host, kept)
    assert conf.kept == [{"br0"}, {"br0"}]


async def test_a_machine_keeps_the_bridge_that_it_runs_on(host: Host, kept: Bridges, conf: FakeNetwork) -> None:
    """Law: where its tap cannot be put into another bridge both are wanted, until the next start."""
    host.links.set(Link(index=1, name="br0", kind=BRIDGE), Link(index=7, name="tap7", kind=TUN, master=1))
    host.links.refuses = OSError(errno.ENODEV, "No such device")
    await heeded(host, kept)
    host.put(bridge="br1")
    await heeded(host, kept)
    assert conf.kept == [{"br0"}]
    host.put(power="off")
    await host.until(lambda: host.running is None)
    await heeded(host, kept)
    assert conf.kept == [{"br0"}, {"br1"}]


async def test_what_cannot_be_written_is_tried_again(host: Host, kept: Bridges, conf: FakeNetwork) -> None:
    """Law: without anybody's doing, and not in a loop."""
    conf.trouble = "the disk is full"
    await heeded(host, kept)
    conf.trouble = None
    await host.clock.advance(AGAIN_S)
    await settle()
    await host.clock.advance(2 * GATHER_S)
    assert conf.kept == [{"br0"}]
