"""When a guest's agent is asked, and what becomes of its answers: the real loop of an instance, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.machine.agent_watch import ASK_EVERY_S, LEAST_PAUSE_S
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu, FakeQemus
from tests.support.host import Host

BARE = GuestFacts(hostname="web1")
FULL = GuestFacts(hostname="web1", addresses=(GuestAddress(interface="eth0", address="192.0.2.7"),))


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    """A host that shall run one machine."""
    clock = FakeClock()
    qemus = FakeQemus(clock)
    host = Host(FakeEtcd(), clock, qemus)
    host.wish()
    host.begin()
    yield host
    for qemu in qemus.alive:
        qemu.crash()
    await settle()
    await host.close()


async def test_a_guest_without_an_agent_is_never_asked(host: Host) -> None:
    """Law: while the channel is closed nothing is asked, and its status has no agent."""
    qemu = await host.runs()
    await host.clock.advance(3600)
    assert qemu.asked == []
    assert host.status.agent is None
    assert host.instance.agent_seen is None


async def test_an_answer_is_published_when_it_changes_only(host: Host) -> None:
    """Law: asked once a minute; the status key is written when the answer is another, `seen` goes on in memory."""
    qemu = await host.runs()
    qemu.open_agent(FULL)
    await host.told()
    assert host.published is not None
    assert host.published.agent == FULL
    before, seen = host.etcd.revision, host.instance.agent_seen
    await host.clock.advance(600)
    assert len(qemu.asked) == 11
    assert host.etcd.revision == before
    assert seen is not None
    assert host.instance.agent_seen is not None
    assert host.instance.agent_seen > seen

    qemu.agent = BARE
    await host.clock.advance(ASK_EVERY_S + 1)
    assert host.published.agent == BARE
    assert host.etcd.revision == before + 1


async def test_asked_soon_again_until_it_has_an_address(host: Host) -> None:
    """Law: a minute is too long for a person who waits for DHCP; the quick repeats have an end."""
    qemu = await host.runs()
    begun = host.clock.now()
    qemu.open_agent(BARE)
    await host.clock.advance(150)
    assert [round(at - begun) for at in qemu.asked] == [0, 5, 20, 80, 140]


async def test_channels_that_flap_are_not_asked_more_often(host: Host) -> None:
    """Law: a guest cannot make the host work by opening and closing its channel."""
    qemu = await host.runs()
    for _ in range(200):
        qemu.open_agent(FULL)
        await host.clock.advance(0.1)
        qemu.open_agent(FULL, is_open=False)
    assert len(qemu.asked) <= 20 / LEAST_PAUSE_S + 1


async def test_a_closed_channel_keeps_what_was_said(host: Host) -> None:
    """Law: a guest that reboots does not lose its address in `show`; one that ended has none."""
    qemu = await host.runs()
    qemu.open_agent(FULL)
    await host.told()
    qemu.open_agent(FULL, is_open=False)
    asked = len(qemu.asked)
    await host.clock.advance(300)
    assert host.status.agent == FULL
    assert len(qemu.asked) == asked
    host.drop("host")
    await host.until(lambda: host.gone)
    assert host.status.agent is None
    assert host.instance.agent_seen is None


async def test_a_new_qemu_begins_with_nothing(host: Host) -> None:
    """Law: what one QEMU's guest said is not told of the next."""
    qemu = await host.runs()
    qemu.open_agent(FULL)
    await host.told()
    qemu.crash()
    await host.until(lambda: host.running is not None and host.running is not qemu)
    assert host.status.agent is None


async def test_a_silent_agent_delays_nothing(host: Host) -> None:
    """Law: an agent that holds its channel open and never answers keeps no shutdown waiting, nor the supervisor."""
    qemu = await host.runs()
    qemu.open_agent(None)
    await settle()
    assert len(qemu.asked) == 1
    begun = host.clock.now()
    host.put(power="off")
    await host.until(lambda: host.status.phase is Phase.STOPPED)
    assert qemu.presses
    assert host.clock.now() - begun < 1
    assert host.instance.agent_seen is None


@pytest.fixture
async def adopted(host: Host) -> FakeQemu:
    """A machine whose agent was heard, adopted by a second supervisor."""
    qemu = await host.runs()
    qemu.open_agent(FULL)
    await host.told()
    await host.die()
    return qemu


async def test_a_successor_learns_that_the_channel_is_open(host: Host, adopted: FakeQemu) -> None:
    """Law 8: no event tells it to the successor; it asks QEMU once, and then the agent."""
    before = adopted.commands.count("query-chardev")
    asked = len(adopted.asked)
    host.begin()
    await host.until(lambda: host.status.agent == FULL)
    await host.clock.advance(300)
    assert adopted.commands.count("query-chardev") == before + 1
    assert len(adopted.asked) == asked + 6
    assert host.instance.agent_seen is not None


async def test_a_successor_with_a_silent_agent_keeps_what_stands_in_the_key(host: Host, adopted: FakeQemu) -> None:
    """Law: nothing is written while nothing changes, also over a change of supervisors."""
    adopted.agent = None
    written, revision = host.published, host.etcd.revision
    assert written is not None
    # As at a supervisor's start: what is said before everything is known is not written yet.
    host.session.held, host.gather_s = False, 0.05
    host.begin()
    await settle()
    host.session.turn(held=True)
    await host.runs()
    await host.clock.advance(60)
    assert host.status.agent == FULL
    assert host.published == written
    assert host.etcd.revision == revision
    assert host.instance.agent_seen is None


async def test_the_facts_of_another_incarnation_are_not_recalled(host: Host, adopted: FakeQemu) -> None:
    """Law: what stands in the key of another QEMU says nothing of this one."""
    written = host.published
    assert written is not None
    adopted.agent_open = False
    adopted.crash()
    host.begin()
    await host.until(lambda: host.running is not None)
    host.instance.report.recall(written)
    await host.told()
    assert host.status.agent is None
