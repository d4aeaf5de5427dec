"""A cluster made of hand-written keys, and the page that looks at it, in virtual time and without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pytest

from kvmsupervisor.adapters.web import Reply, Request, Subscription
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.web.service import GATHER_S, Service
from tests.cli.conftest import World
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd


def at_once(answer: Coroutine[Any, Any, Reply]) -> Reply:
    """The reply of an answer that waits for nothing."""
    try:
        answer.send(None)
    except StopIteration as done:
        found: Reply = done.value
        return found
    answer.close()
    raise AssertionError("the answer waits for something")


@dataclass
class Site:
    """A page and its cluster.

    Attributes:
        world: what etcd holds.
        etcd: the page's own client.
        clock: of the page.
        service: the page.
    """

    world: World
    etcd: FakeEtcd
    clock: FakeClock
    service: Service

    async def pass_by(self, seconds: float = 2 * GATHER_S) -> None:
        """Let time pass: by default until a change is shown."""
        await self.clock.advance(seconds)

    def get(self, path: str, *, host: str = "127.0.0.1", method: str = "GET", **headers: str) -> Reply:
        """Ask for a path, with its query."""
        from urllib.parse import parse_qs  # noqa: PLC0415

        path, _, query = path.partition("?")
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = Request(method=method, path=path, query=parse_qs(query), headers={"host": host, **named})
        return at_once(self.service.routes(request))

    def json(self, path: str) -> Any:
        """The same for JSON."""
        reply = self.get(path)
        assert (reply.status, reply.content_type) == (HTTPStatus.OK, "application/json")
        return json.loads(reply.body)

    def page(self, path: str = "/") -> str:
        """The same for a page."""
        reply = self.get(path)
        assert reply.content_type == "text/html; charset=utf-8"
        return reply.body.decode()

    def view(self, since: str = "") -> Viewer:
        """Open a stream."""
        reply = self.get("/api/v1/stream", last_event_id=since)
        assert reply.feed is not None
        return Viewer(reply)


class Viewer:
    """One who reads the stream as a browser does, and keeps what it is told."""

    def __init__(self, reply: Reply) -> None:
        self.woken = 0
        self.mark = ""
        self.rows: dict[str, Any] = {}
        self.state: Any = None
        self.kinds: list[str] = []
        assert reply.feed is not None
        self.subscription: Subscription = reply.feed.open(self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def read(self) -> list[str]:
        """Take what there is; return the kinds of the events."""
        kinds = []
        while data := self.subscription.take():
            for block in data.decode().split("\n\n")[:-1]:
                fields = dict(line.split(": ", 1) for line in block.splitlines())
                kind = fields.get("event", "beat")
                kinds.append(kind)
                if kind == "beat":
                    continue
                found = json.loads(fields["data"])
                if kind == "state":
                    self.state = found
                    continue
                self.mark = fields["id"]
                if kind == "reset":
                    self.rows = {}
                for row in found["rows"]:
                    self.rows[row["id"]] = row
                for name in found.get("gone", ()):
                    self.rows.pop(name, None)
        self.kinds += kinds
        return kinds


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """The page of a cluster that is empty yet, in step with it."""
    clock = FakeClock()
    world = World(FakeEtcd(clock.now))
    etcd = world.etcd.peer()
    settings = load_settings({"KVM_CONFIG": "/dev/null", "KVM_HOSTNAME": "alpha", "KVM_WEB_LISTEN": "127.0.0.1:0"})
    service = Service(settings, etcd, clock, world.etcd.peer)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    await clock.advance_until(lambda: service.state().in_step, 10)
    made = Site(world, etcd, clock, service)
    yield made
    stop.set()
    await running
