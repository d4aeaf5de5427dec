"""What the demo concludes from status keys."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvmsupervisor.cli.demo.keys import all_stopped, hosted, running
from kvmsupervisor.cli.demo.stage import DemoError
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.status import Phase, Status
from tests.fakes.etcd import FakeEtcd

LAYOUT = Layout()
ONE, TWO = InstanceId("one"), InstanceId("two")
LIMIT_S = 10.0


def status(instance: InstanceId, phase: Phase, **more: object) -> Status:
    found = Status(id=instance, host="demo", phase=phase, reason="because", since="2024-01-01T00:00:00Z")
    return replace(found, **more)  # type: ignore[arg-type]


async def put(store: FakeEtcd, found: Status) -> int:
    return await store.put(LAYOUT.status_key(InstanceId(found.id)), found.to_json())


async def test_a_guest_runs_when_its_status_says_so() -> None:
    """Other instances and earlier phases do not count."""
    store = FakeEtcd()
    await put(store, status(TWO, Phase.RUNNING))
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        waiting = group.create_task(running(store, LAYOUT, ONE))
        await put(store, status(ONE, Phase.STARTING))
        await put(store, status(ONE, Phase.RUNNING, pid=7))
        assert (await waiting).pid == 7


@pytest.mark.parametrize("phase", [Phase.INVALID, Phase.BACKOFF, Phase.STOPPED])
async def test_a_guest_that_will_not_run_ends_the_waiting(phase: Phase) -> None:
    """With the reason and all problems."""
    store = FakeEtcd()
    await put(store, status(ONE, phase, problems=("ram: found 'x'",)))
    with pytest.raises(DemoError, match=rf"(?s)the guest is {phase}: because.*ram: found 'x'"):
        async with asyncio.timeout(LIMIT_S):
            await running(store, LAYOUT, ONE)


async def test_all_are_stopped_when_each_says_so_by_the_newest_keys() -> None:
    """Neither a stopped status from before the wish, nor one that is missing, nor a pid, is the end."""
    store = FakeEtcd()
    await put(store, status(ONE, Phase.STOPPED, revision=9))
    await put(store, status(TWO, Phase.STOPPED, revision=4))
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        waiting = group.create_task(all_stopped(store, LAYOUT, [ONE, TWO], 5))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        await put(store, status(TWO, Phase.INVALID, revision=5, pid=8))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        await put(store, status(TWO, Phase.STOPPED, revision=5, last_exit="guest-shutdown"))
        assert (await waiting)[TWO].last_exit == "guest-shutdown"


async def test_only_instances_with_a_host_are_shut_down() -> None:
    store = FakeEtcd()
    for key in ("/kvm/one/host", "/kvm/one/ram", "/kvm/two/ram", "/kvm/../host", "/kvm/two/x/host"):
        await store.put(key, b"demo")
    assert await hosted(store, LAYOUT) == [ONE]
