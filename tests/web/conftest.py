"""A cluster made of hand-written keys, and the page that looks at it, in virtual time and without sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import pytest

from kvmsupervisor.adapters.web import Peer, Reply, Request, Subscription, TooLarge
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.web.access import EVERYBODY, Access
from kvmsupervisor.web.people import Role
from kvmsupervisor.web.recognition import Known
from kvmsupervisor.web.service import GATHER_S, Service
from tests.cli.conftest import World
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd

OPERATOR, CONSOLE, VIEWER = "o" * 40, "c" * 40, "v" * 40
"""Tokens of somebody of each role."""

ACTS = "/api/v1/acts"

KNOWN = Known(
    tokens={hashlib.sha256(token.encode()).digest(): f"token:{token[0]}" for token in (OPERATOR, CONSOLE, VIEWER)},
    roles={"token:o": Role.OPERATOR, "token:c": Role.CONSOLE},
)


class Sent:
    """A request's body that has come."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, limit: int) -> bytes:
        if len(self._data) > limit:
            raise TooLarge(f"the request has more than {limit} bytes")
        return self._data


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
        writer: the page's client that writes.
    """

    world: World
    etcd: FakeEtcd
    clock: FakeClock
    service: Service
    writer: FakeEtcd

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

    async def post(self, body: object, *, token: str = OPERATOR, path: str = ACTS, **headers: str) -> tuple[int, Any]:
        """Order something as a program does; return the status and what was answered."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        bearer = {"authorization": f"Bearer {token}"} if token else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = Request(
            method="POST",
            path=path,
            headers={"host": "127.0.0.1", "content-type": "application/json", **bearer, **named},
            peer=Peer(address="192.0.2.7"),
            body=Sent(raw),
        )
        reply = await self.service.routes(request)
        return int(reply.status), json.loads(reply.body)

    async def act(self, act: str, *instances: str, **more: object) -> tuple[int, Any]:
        """Do something; return the status, and the result of each."""
        order = {"act": act, **({"instances": instances} if instances else {}), **more}
        status, found = await self.post({name.rstrip("_"): value for name, value in order.items()})
        return status, found.get("results", found)

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

    def view_rows(self, token: str) -> list[Any]:
        """What somebody is shown of all instances."""
        reply = self.get("/api/v1/stream", authorization=f"Bearer {token}")
        viewer = Viewer(reply)
        viewer.read()
        viewer.subscription.close()
        return list(viewer.rows.values())

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
    async with serving(EVERYBODY) as made:
        yield made


@pytest.fixture
async def asking() -> AsyncIterator[Site]:
    """The same, where everybody is asked who they are."""
    async with serving(replace(EVERYBODY, known=KNOWN)) as made:
        yield made


@asynccontextmanager
async def serving(access: Access, wanted: Settings | None = None) -> AsyncIterator[Site]:
    """A page; by default with settings that name no files."""
    clock = FakeClock()
    world = World(FakeEtcd(clock.now))
    etcd = world.etcd.peer()
    plain = load_settings({"KVM_CONFIG": "/dev/null", "KVM_HOSTNAME": "alpha", "KVM_WEB_LISTEN": "127.0.0.1:0"})
    settings = plain if wanted is None else replace(wanted, web_listen=plain.web_listen, hostname=plain.hostname)
    writer = world.etcd.peer()
    service = Service(settings, etcd, clock, lambda: writer, access)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    await clock.advance_until(lambda: service.state().in_step, 10)
    made = Site(world, etcd, clock, service, writer)
    yield made
    stop.set()
    await running
