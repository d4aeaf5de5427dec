"""Acts: wishes that people write through the page, by the code of the command line, and a result for each.

Nothing is done here that `etcdctl` could not do. The answer is the revision of the write: the page shows the wish from
then on, and waits for what the host says of it. An act goes on when its client leaves; each is an event in the log.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import field
from datetime import datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Any

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import Ambiguous, Denied, EtcdError, Store, Unavailable
from kvmsupervisor.adapters.web import Reply, Request, TooLarge, Unreadable
from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.aio import ended
from kvmsupervisor.cluster.acts import foresight, hosts, instances
from kvmsupervisor.cluster.acts.refused import Refused
from kvmsupervisor.cluster.live_overview import LiveOverview
from kvmsupervisor.cluster.overview import absent, read_cluster
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.spec import OFF_NOW, Power
from kvmsupervisor.domain.values import Unfit
from kvmsupervisor.web.api import error, reply
from kvmsupervisor.web.order import Act, Order, parse_order
from kvmsupervisor.web.people import Person, Role, need

log = structlog.get_logger(__name__)

BODY_MOST = 1 << 20
"""Bytes of an order. Arbitrary: user data has at most 64 KiB, a thousand ids have as many."""

ACT_S = 20.0
"""Seconds after which no further instance of an order is begun: a connection lives for 30. Arbitrary within that."""

AT_ONCE = 8
"""Orders that are worked on at one time. Arbitrary: people give one."""

CLOSE_S = 6.0
"""How long the end of the process waits for acts: one request to etcd has 5 s."""


class Outcome(StrEnum):
    """What became of an act."""

    DONE = "done"
    """Written."""
    REFUSED = "refused"
    """Not written: keys, or what is observed, do not allow it, or etcd does not."""
    AWAY = "away"
    """Not written: etcd does not answer."""
    UNKNOWN = "unknown"
    """Sent, and the answer was lost: it may have been written."""
    UNTRIED = "untried"
    """Not begun, because those before it took too long, or etcd is away."""


STATUS = {
    Outcome.DONE: HTTPStatus.OK,
    Outcome.REFUSED: HTTPStatus.CONFLICT,
    Outcome.AWAY: HTTPStatus.SERVICE_UNAVAILABLE,
    Outcome.UNKNOWN: HTTPStatus.SERVICE_UNAVAILABLE,
    Outcome.UNTRIED: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Of a reply: that of the worst outcome, as the command line's exit status is the worst one."""


@frozen(kw_only=True)
class Result:
    """What became of an act, for one instance or host.

    Attributes:
        about: `instance` or `host`.
        name: of it.
        outcome: what became of it.
        revision: of the write; None where nothing was written.
        message: why not, or what it will be; empty when there is nothing to say.
        notes: for the person, one sentence each.
    """

    about: str
    name: str
    outcome: Outcome
    revision: int | None = None
    message: str = ""
    notes: tuple[str, ...] = ()

    def to_object(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            self.about: self.name,
            "result": self.outcome.value,
            "revision": self.revision,
            "message": self.message,
            "notes": list(self.notes),
        }


@frozen(kw_only=True)
class Done:
    """What one act has written.

    Attributes:
        revision: of the write; None where it was only foreseen.
        message: what it will be.
        notes: for the person.
    """

    revision: int | None
    message: str = ""
    notes: tuple[str, ...] = field(default=())


class Acts:
    """Does what is asked for.

    Args:
        connect: makes the client of etcd that writes; called with the first act.
        layout: where the keys lie.
        overview: the cluster, for what is only foreseen.
        clock: the machine's.
        address_of: where a request comes from.

    Attributes:
        counts: how many acts came to what, by act and outcome.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Store],
        layout: Layout,
        overview: LiveOverview,
        clock: Clock,
        address_of: Callable[[Request], str],
    ) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._connect = connect
        self._layout = layout
        self._overview = overview
        self._clock = clock
        self._address_of = address_of
        self._store: Store | None = None
        self._tasks: set[asyncio.Task[list[Result]]] = set()

    async def __call__(self, request: Request, person: Person) -> Reply:
        """`POST /api/v1/acts`."""
        need(person, Role.OPERATOR)
        try:
            order = parse_order(await request.body.read(BODY_MOST))
        except TooLarge as large:
            return error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(large))
        except (Unreadable, Unfit) as unfit:
            return error(HTTPStatus.BAD_REQUEST, str(unfit))
        if len(self._tasks) >= AT_ONCE:
            return error(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{AT_ONCE} orders are worked on; try again", {"Retry-After": "2"}
            )
        task = asyncio.get_running_loop().create_task(self._all(order, person, self._address_of(request)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # What has begun goes on when the client leaves, and is told of in the log.
        results = await asyncio.shield(task)
        worst = max(results, key=lambda result: list(Outcome).index(result.outcome))
        body = {"act": order.act.value, "results": [result.to_object() for result in results]}
        return reply(body, STATUS[worst.outcome])

    async def _all(self, order: Order, person: Person, address: str) -> list[Result]:
        about = "host" if order.act in {Act.DRAIN, Act.UNDRAIN, Act.CONFIRM} else "instance"
        names = [str(order.host)] if about == "host" else list(order.instances)
        results: list[Result] = []
        until, away = self._clock.now() + ACT_S, False
        for name in names:
            if away or self._clock.now() >= until:
                why = "etcd does not answer" if away else f"those before it took {ACT_S:g} s"
                result = Result(about=about, name=name, outcome=Outcome.UNTRIED, message=f"not begun: {why}")
            else:
                result = await self._one(order, about, name)
                away = result.outcome in {Outcome.AWAY, Outcome.UNKNOWN}
            results.append(result)
            self.counts[order.act, result.outcome] += 1
            if not order.dry_run:
                _audit(order, result, person, address)
        return results

    async def _one(self, order: Order, about: str, name: str) -> Result:
        try:
            if about == "host":
                done = await self._to_host(order, HostName(name))
            else:
                done = await self._to_instance(order, InstanceId(name))
        except Refused as refused:
            return Result(about=about, name=name, outcome=Outcome.REFUSED, message=_shown(str(refused)))
        except Ambiguous:
            said = "etcd did not answer in time: it may or may not have been written; look before you try again"
            return Result(about=about, name=name, outcome=Outcome.UNKNOWN, message=said)
        except Unavailable as away:
            return Result(about=about, name=name, outcome=Outcome.AWAY, message=_shown(f"etcd does not answer: {away}"))
        except Denied as denied:
            said = (
                f"etcd does not allow this: {denied}. The page writes as KVM_WEB_ETCD_USERNAME (or KVM_WEB_ETCD_CERT) "
                "says, else as it reads; that user needs the role operator (config/etcd-roles)"
            )
            return Result(about=about, name=name, outcome=Outcome.REFUSED, message=_shown(said))
        except EtcdError as other:
            return Result(
                about=about, name=name, outcome=Outcome.REFUSED, message=_shown(f"etcd refuses this: {other}")
            )
        return Result(
            about=about,
            name=name,
            outcome=Outcome.DONE,
            revision=done.revision,
            message=_shown(done.message),
            notes=tuple(map(_shown, done.notes)),
        )

    async def _to_instance(self, order: Order, instance: InstanceId) -> Done:
        if order.act is Act.MOVE:
            return await self._move(order, instance)
        store, layout, now = self._writer(), self._layout, self._now()
        match order.act:
            case Act.CREATE:
                written = await instances.create(store, layout, instance, order.keys, force=order.force)
            case Act.SET:
                written = await instances.change(
                    store, layout, instance, order.keys, unset=order.unset, force=order.force
                )
            case Act.START:
                written = await instances.switch(store, layout, instance, Power.ON)
            case Act.STOP:
                written = await instances.switch(store, layout, instance, OFF_NOW if order.now else Power.OFF)
            case Act.RESTART:
                request = instances.new_request(now, at_once=order.now)
                written = await instances.restart(store, layout, instance, request)
            case Act.RESET:
                written = await instances.restart(store, layout, instance, instances.new_request(now, reset=True))
            case Act.DELETE:
                written = await instances.delete(store, layout, instance)
            case _:
                raise AssertionError(f"{order.act} is not about an instance")
        return Done(revision=written.revision, notes=written.notes)

    async def _move(self, order: Order, instance: InstanceId) -> Done:
        assert order.host is not None
        if order.dry_run:
            cluster = self._overview.cluster
            found = cluster.instances.get(instance, absent(instance))
            said = foresight.foresee_unless_refused(found, cluster, order.host, force=order.force).said
            return Done(revision=None, message=said)
        store, layout = self._writer(), self._layout
        foreseen = await foresight.look_ahead(store, layout, instance, order.host, force=order.force)
        written = await instances.change(store, layout, instance, {"host": order.host}, force=order.force)
        return Done(revision=written.revision, message=foreseen.said, notes=written.notes)

    async def _to_host(self, order: Order, host: HostName) -> Done:
        layout = self._layout
        if order.act is Act.DRAIN and order.dry_run:
            cluster = self._overview.cluster
            if not order.force:
                hosts.refuse_absent(cluster, host)
            lines = foresight.told(foresight.foresee_drain(cluster, host, order.mode))
            return Done(revision=None, message="nothing runs there" if not lines else "", notes=tuple(lines))
        store = self._writer()
        if order.act is Act.UNDRAIN:
            served = await hosts.undrain(store, layout, host, order.back)
            return Done(revision=served.revision, message="" if served.drained else f"{host} did not drain")
        cluster = await read_cluster(store, layout)
        if order.act is Act.DRAIN:
            if not order.force:
                hosts.refuse_absent(cluster, host)
            return Done(revision=await hosts.drain(store, layout, host, order.mode))
        hosts.refuse_others(hosts.held_by(cluster, host), host, order.instances)
        return Done(revision=await hosts.confirm(store, layout, host, order.instances))

    def _now(self) -> datetime:
        return datetime.fromisoformat(self._clock.wall())

    def _writer(self) -> Store:
        if self._store is None:
            self._store = self._connect()
        return self._store

    async def close(self) -> None:
        """Let what has begun end, for some seconds, and close the way to etcd."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        if self._tasks:
            await ended(*self._tasks)
        if self._store is not None:
            await self._store.close()


def _shown(text: str) -> str:
    """A text of ours that may repeat what keys hold: its lines stay lines."""
    return "\n".join(visible(line, 2000) for line in text.split("\n")[:100])


def _audit(order: Order, result: Result, person: Person, address: str) -> None:
    """Who did what, and what became of it. Names of keys only: values may be secrets."""
    said: dict[str, Any] = {
        "host": order.host,
        "keys": [*order.keys, *(f"-{name}" for name in order.unset)],
        "force": order.force,
        "now": order.now,
        "instances": list(order.instances) if order.act is Act.CONFIRM else [],
    }
    log.info(
        "web.act",
        who=person.name,
        address=address,
        act=order.act.value,
        **{name: value for name, value in said.items() if value},
        **({"instance": result.name} if result.about == "instance" else {}),
        result=result.outcome.value,
        revision=result.revision,
        # What follows names problems of values, and with that values.
        message=result.message.partition("\n")[0],
    )
