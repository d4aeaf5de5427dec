"""What the demo reads in etcd: the statuses of its instances."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.demo.stage import DemoError
from kvmsupervisor.domain.keys import InstanceId, Layout, parse_id
from kvmsupervisor.domain.status import Phase, Status


async def changes_below(store: Store, prefix: str) -> AsyncGenerator[None]:
    """Yield once, and whenever a key below `prefix` has changed since, for ever."""
    revision = (await store.list(prefix)).revision
    yield
    async with store.watch(prefix, revision + 1) as watch:
        async for _ in watch:
            yield


async def read_statuses(store: Store, layout: Layout) -> dict[InstanceId, Status]:
    """Read all status keys."""
    found = {}
    for kv in (await store.list(layout.statuses_prefix)).kvs:
        instance = parse_id(kv.key.decode(errors="replace").removeprefix(layout.statuses_prefix))
        status = Status.from_json(kv.value)
        if instance is not None and status is not None:
            found[instance] = status
    return found


async def follow_statuses(store: Store, layout: Layout) -> AsyncGenerator[dict[InstanceId, Status]]:
    """Yield all statuses, now and after each change, for ever."""
    async with aclosing(changes_below(store, layout.statuses_prefix)) as changes:
        async for _ in changes:
            yield await read_statuses(store, layout)


async def hosted(store: Store, layout: Layout) -> list[InstanceId]:
    """All instances that have a `host` key."""
    found = []
    for kv in (await store.list(layout.wishes_prefix)).kvs:
        name, _, key = kv.key.decode(errors="replace").removeprefix(layout.wishes_prefix).partition("/")
        instance = parse_id(name)
        if key == "host" and instance is not None:
            found.append(instance)
    return found


async def running(store: Store, layout: Layout, instance: InstanceId) -> Status:
    """Wait until an instance runs.

    Raises:
        DemoError: it will not run.
    """
    async with aclosing(follow_statuses(store, layout)) as changes:
        async for statuses in changes:
            status = statuses.get(instance)
            if status is None:
                continue
            if status.phase is Phase.RUNNING:
                return status
            if status.phase in {Phase.INVALID, Phase.BACKOFF, Phase.STOPPED}:
                problems = "".join(f"\n  {problem}" for problem in status.problems)
                raise DemoError(f"the guest is {status.phase.value}: {status.reason}{problems}")
    raise AssertionError("following does not end by itself")


async def all_stopped(
    store: Store, layout: Layout, instances: Sequence[InstanceId], revision: int
) -> dict[InstanceId, Status]:
    """Wait until none of `instances` runs, by keys of `revision` or later; return their last statuses."""
    async with aclosing(follow_statuses(store, layout)) as changes:
        async for statuses in changes:
            last = {instance: statuses[instance] for instance in instances if instance in statuses}
            if len(last) == len(instances) and all(
                status.pid is None and status.phase in {Phase.STOPPED, Phase.INVALID} and status.revision >= revision
                for status in last.values()
            ):
                return last
    raise AssertionError("following does not end by itself")
