"""Placements as one host writes them, beside what it says of that: the writes of drains and of returns.

Each is one transaction. It compares all that the decision was made on, so that neither a person's newer word, nor
another host that decides at the same time, is written over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from kvmsupervisor.adapters.etcd import Compare, Delete, Op, Put, Target
from kvmsupervisor.cluster.hosts import Neighbours
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host_wish import HostProgress
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.placement import RETURN, Placement
from kvmsupervisor.domain.spec import Wish
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.context import InstanceContext

log = structlog.get_logger(__name__)


@frozen(kw_only=True)
class Others:
    """What other hosts say of machines that are on their way because of them.

    Attributes:
        coming: how many to each host.
        unchanged: compares that nobody has said anything else since.
    """

    coming: Mapping[str, int]
    unchanged: tuple[Compare, ...]


class Placing:
    """What one host writes of drains and returns.

    Args:
        context: what all instances of this host share.
        neighbours: the sessions of all hosts.
    """

    def __init__(self, context: InstanceContext, neighbours: Neighbours) -> None:
        self._context = context
        self._neighbours = neighbours
        self._key = context.layout.drain_fact_key(context.me)
        self._said: HostProgress | None = None

    async def recall(self) -> HostProgress | None:
        """What this host, or a supervisor before this one, has said last.

        Raises:
            EtcdError: etcd does not tell.
        """
        found = await self._context.store.get(self._key)
        self._said = None if found is None else HostProgress.from_json(found.value)
        return self._said

    async def others(self) -> Others:
        """What the other hosts say that have a session: it counts until one of them says something else.

        Raises:
            EtcdError: etcd does not tell.
        """
        prefix = self._context.layout.drains_prefix
        coming: dict[str, int] = {}
        unchanged = []
        for kv in (await self._context.store.list(prefix)).kvs:
            key = kv.key.decode(errors="replace")
            told = HostProgress.from_json(kv.value)
            if key == self._key or told is None or not self._neighbours.number_of(HostName(key[len(prefix) :])):
                continue
            unchanged.append(Compare(key, Target.MOD_REVISION, kv.mod_revision))
            for target in told.moving.values():
                coming[str(target)] = coming.get(str(target), 0) + 1
        return Others(coming=coming, unchanged=tuple(unchanged))

    async def place(
        self,
        wish: Wish,
        host: HostName,
        *,
        why: str,
        only_live: bool,
        told: HostProgress,
        still: Sequence[Compare],
    ) -> bool:
        """Place an instance on `host`; whether that was done. Nothing is done where the ground has changed.

        Args:
            wish: its keys.
            host: where it is to run.
            why: one word.
            only_live: whether its guest may not be stopped for it.
            told: what this host says of it from then on.
            still: what else has to be so.

        Raises:
            EtcdError: it was not written, or nobody knows.
        """
        context, layout = self._context, self._context.layout
        number = self._neighbours.number_of(host)
        if not number:
            return False
        placement = Placement(
            host=host, why=why, since=context.clock.wall(), of=wish.host_revision, only_live=only_live
        )
        compared = [
            *self._ground(wish),
            Compare(layout.session_key(host), Target.CREATE_REVISION, number),
            Compare(layout.drain_key(host), Target.MOD_REVISION, 0),
            *still,
        ]
        await point("to be placed")
        puts: list[Op] = [Put(layout.placement_key(wish.instance), placement.to_json()), Put(self._key, told.to_json())]
        done = (await context.store.txn(compared, puts)).succeeded
        await point("placed")
        if done:
            self._said = told
            log.info("instance.placed", instance=wish.instance, on=host, of=wish.host, why=why, only_live=only_live)
        return done

    async def withdraw(self, wish: Wish, holder: HostName, *, why: str, reason: str) -> bool:
        """Have an instance stay on `holder`, where it runs; whether that was done.

        Raises:
            EtcdError: it was not written, or nobody knows.
        """
        context = self._context
        key = context.layout.placement_key(wish.instance)
        stays = Placement(host=holder, why=why, since=context.clock.wall(), of=wish.host_revision)
        op: Op = Delete(key) if wish.host == holder else Put(key, stays.to_json())
        done = (await context.store.txn(self._ground(wish), [op])).succeeded
        if done:
            tell = log.info if why == RETURN else log.warning
            tell("instance.placement_withdrawn", instance=wish.instance, on=wish.runs_on, reason=reason)
        return done

    def _ground(self, wish: Wish) -> list[Compare]:
        """This host's session, and where the instance is to run."""
        layout = self._context.layout
        return [
            self._context.session.compare(),
            Compare(layout.wish_key(wish.instance, "host"), Target.MOD_REVISION, wish.host_revision),
            Compare(layout.placement_key(wish.instance), Target.MOD_REVISION, wish.placed.revision),
        ]

    async def say(self, told: HostProgress | None) -> None:
        """Write how far this host has come, where that differs from what it said last; None: it is in service.

        Raises:
            EtcdError: it was not written, or nobody knows.
        """
        if told == self._said:
            return
        op: Op = Delete(self._key) if told is None else Put(self._key, told.to_json())
        if (await self._context.store.txn([self._context.session.compare()], [op])).succeeded:
            self._said = told

    @property
    def said(self) -> HostProgress | None:
        """What was written last."""
        return self._said


def with_moving(told: HostProgress, instance: InstanceId, host: str) -> HostProgress:
    """What is said once an instance is placed there."""
    refused = {name: why for name, why in told.refused.items() if name != instance}
    return replace(told, moving={**told.moving, instance: host}, refused=refused)
