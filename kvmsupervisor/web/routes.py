"""The answers by path. What is shown comes from memory; what waits is who asks, and what they change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path

import structlog

from kvmsupervisor.adapters.web import Reply, Request
from kvmsupervisor.cluster.host_table import facts_of
from kvmsupervisor.cluster.live_overview import LiveOverview
from kvmsupervisor.domain.consoles import ConsoleKind
from kvmsupervisor.domain.keys import ID_RULE, Layout, parse_id
from kvmsupervisor.web import api, frame
from kvmsupervisor.web.api import Api
from kvmsupervisor.web.board import Board
from kvmsupervisor.web.choice import Choice
from kvmsupervisor.web.console_page import PAGES, POLICIES, console_page
from kvmsupervisor.web.create_page import create_page
from kvmsupervisor.web.frame import State
from kvmsupervisor.web.hosts_page import hosts_page
from kvmsupervisor.web.html import join, tag
from kvmsupervisor.web.instance_page import instance_page
from kvmsupervisor.web.list_page import list_page
from kvmsupervisor.web.metrics import Numbers, metrics
from kvmsupervisor.web.people import ANYBODY, People, Person, Refusal, Role, need
from kvmsupervisor.web.same_origin import need_json, need_own_page, need_same_origin
from kvmsupervisor.web.stream import RETRY_MS, VIEWERS, Full, Stream
from kvmsupervisor.web.vendored import vendored

log = structlog.get_logger(__name__)

METHODS = ("GET", "HEAD")

Changing = Callable[[Request, Person], Awaitable[Reply]]
"""Answers a POST: of somebody who is known, and from a page of ours. It looks at their roles itself, by `need`."""

Connect = Callable[[Request, Person, str, ConsoleKind], Awaitable[Reply]]
"""Answers who asks for a console's WebSocket: of the instance of that name, if there is one. It looks at everything but
who asks itself."""

OPEN = "/healthz"
"""The one path of which nobody is asked who they are: whether the loop turns is no secret, and probes have no names."""

INSTANCES = "/instances/"
API_INSTANCES = "/api/v1/instances/"
SCHEMA = "/api/v1/"
STATIC: Mapping[str, str] = {
    "style.css": "text/css; charset=utf-8",
    "acts.js": "text/javascript; charset=utf-8",
    "create.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "list.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "refresh.js": "text/javascript; charset=utf-8",
    "consoles.js": "text/javascript; charset=utf-8",
    "serial.js": "text/javascript; charset=utf-8",
    "display.js": "text/javascript; charset=utf-8",
    "keys.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""The files that pages name, and their types."""

SAFETY_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
"""On every reply, beside those of the server: no page from elsewhere may read or frame what is here."""


class Routes:
    """Answers requests.

    Args:
        overview: the cluster.
        board: its instances.
        stream: of changes.
        layout: where the keys lie.
        state: tells what is known of etcd.
        names: by which browsers may call this server, in small letters, beside addresses and localhost; `*` for any.
        people: knows who asks.
        changing: answers POST, by path.
        connect: answers requests for a console's WebSocket.
        numbers: further metrics, see `metrics`.

    Attributes:
        transport_security: the value of Strict-Transport-Security; empty for none.
    """

    def __init__(
        self,
        *,
        overview: LiveOverview,
        board: Board,
        stream: Stream,
        layout: Layout,
        state: Callable[[], State],
        names: Collection[str],
        people: People,
        changing: Mapping[str, Changing],
        connect: Connect,
        numbers: Callable[[], Numbers] = Numbers,
    ) -> None:
        self.transport_security = ""
        self._overview = overview
        self._board = board
        self._stream = stream
        self._state = state
        self._names = frozenset(names)
        self._people = people
        self._changing = changing
        self._connect = connect
        self._numbers = numbers
        self._requests: Counter[int] = Counter()
        # The list as it was asked for last: of many who look, most look at the same.
        self._list: tuple[object, bytes] = (None, b"")
        served = Api(overview, board, layout)
        self._images, self._prefix = served.image_names, layout.prefix
        self._api_instance = served.instance
        self._table: Mapping[str, Callable[[Request, Person], Reply]] = {
            "/": self._list_page,
            "/hosts": self._hosts_page,
            "/create": self._create_page,
            "/api": self._api_page,
            "/healthz": lambda _, __: _text(HTTPStatus.OK, "ok"),
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/api/v1/instances": served.instances,
            "/api/v1/hosts": served.hosts,
            "/api/v1/images": served.images,
            "/api/v1/events": served.events,
            "/api/v1/me": served.me,
            "/api/v1/stream": self._streamed,
        }

    async def __call__(self, request: Request) -> Reply:
        """Answer one request."""
        try:
            reply = await self._answer(request)
        except Refusal as refusal:
            refused = refusal.refused
            reply = api.error(refused.status, refused.message, refused.headers)
        self._requests[reply.status] += 1
        security = {"Strict-Transport-Security": self.transport_security} if self.transport_security else {}
        return replace(reply, headers={**SAFETY_HEADERS, **security, **reply.headers})

    async def _answer(self, request: Request) -> Reply:
        if not self._is_called(request.headers.get("host", "")):
            return api.error(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this server is not called by that name; KVM_WEB_NAMES has the names by which browsers may call it",
            )
        if request.path == OPEN and request.method in METHODS:
            return self._shown(request, ANYBODY)
        person = await self._people.of(request)
        if request.method == "POST" and (change := self._changing.get(request.path)) is not None:
            try:
                need_same_origin(request)
                need_json(request)
                return await change(request, person)
            except Refusal as refusal:
                log.warning(
                    "web.refused",
                    who=person.name,
                    address=self._people.address_of(request),
                    path=request.path,
                    why=refusal.refused.message,
                )
                raise
        if (wanted := _console_of(request)) is not None:
            return await self._connect(request, person, *wanted)
        if request.path in self._changing:
            said = "this path takes orders, by POST; /api/v1/openapi.json describes them"
            return api.error(HTTPStatus.METHOD_NOT_ALLOWED, said, {"Allow": "POST"})
        if request.method not in METHODS:
            return api.error(
                HTTPStatus.METHOD_NOT_ALLOWED,
                "this path only shows; /api/v1/acts takes orders, and so do etcd and the kvmsupervisor command",
                {"Allow": ", ".join(METHODS)},
            )
        need_own_page(request)
        return self._shown(request, person)

    def _shown(self, request: Request, person: Person) -> Reply:
        path = request.path
        if (found := self._table.get(path)) is not None:
            return found(request, person)
        if path.startswith(INSTANCES):
            return self._instance_page(path.removeprefix(INSTANCES), person)
        if path.startswith(API_INSTANCES):
            return self._api_instance(path.removeprefix(API_INSTANCES))
        if path.startswith("/static/"):
            return _file(path.removeprefix("/static/"))
        if path.startswith(SCHEMA) and path.endswith(".json"):
            name = path.removeprefix(SCHEMA).removesuffix(".json").removeprefix("schemas/")
            if (schema := api.schema(name)) is not None:
                return schema
        paths = [*self._table, f"{INSTANCES}<id>", f"{API_INSTANCES}<id>"]
        return api.error(HTTPStatus.NOT_FOUND, f"no such path; there are {', '.join(paths)}")

    def _is_called(self, host: str) -> bool:
        """Whether a browser may call this server so.

        A page from elsewhere may have its own name point here, and would then read what is shown (DNS rebinding).
        """
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") <= 1:
            name = name.partition(":")[0]
        name = name.removesuffix(".")
        if not host or name == "localhost" or name.endswith(".localhost") or self._names & {name, "*"}:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True

    def _list_page(self, request: Request, person: Person) -> Reply:
        choice, state = Choice.parse(request.query), self._state()
        key = (choice, state, self._board.mark, person)
        if self._list[0] != key:
            entries = self._board.entries
            html = {entry.row.id: entry.html for entry in entries}
            total = [entry.row for entry in entries]
            rows = choice.choose(total)
            self._list = (
                key,
                list_page(
                    rows,
                    (html[row.id] for row in rows),
                    total=total,
                    choice=choice,
                    state=state,
                    person=person,
                    mark=self._board.mark,
                ),
            )
        return _page(self._list[1])

    def _instance_page(self, name: str, person: Person) -> Reply:
        name, _, part = name.partition("/")
        instance = parse_id(name)
        found = None if instance is None else self._overview.cluster.instances.get(instance)
        if instance is None or found is None:
            why = f"There is no instance {name}." if instance is not None else f"An instance's id is {ID_RULE}."
            return _page(frame.not_found(why, self._state(), person), HTTPStatus.NOT_FOUND)
        if (kind := PAGES.get(part)) is not None:
            return _page(
                console_page(found, self._overview.cluster, kind, self._state(), person), policy=POLICIES[kind]
            )
        if part:
            return _page(frame.not_found("There is no such page.", self._state(), person), HTTPStatus.NOT_FOUND)
        events = self._overview.events_of(instance)
        return _page(instance_page(found, self._overview.cluster, events, self._state(), person))

    def _hosts_page(self, _request: Request, person: Person) -> Reply:
        return _page(hosts_page(facts_of(self._overview.cluster), self._overview.cluster, self._state(), person))

    def _create_page(self, _request: Request, person: Person) -> Reply:
        need(person, Role.OPERATOR)
        facts, images = facts_of(self._overview.cluster), self._images()
        return _page(create_page(facts, images, self._prefix, self._state(), person))

    def _api_page(self, _request: Request, person: Person) -> Reply:
        paths = [*(path for path in self._table if path.startswith("/api/v1")), "/metrics", "/healthz", "/readyz"]
        schemas = [f"/api/v1/{'' if name == 'openapi' else 'schemas/'}{name}.json" for name in api.SCHEMAS]
        main = join(
            (
                tag("h1", "API"),
                tag("p", "The same for programs. ", tag("a", "openapi.json", href=schemas[0]), " describes it."),
                tag("ul", *(tag("li", tag("a", path, href=path)) for path in (*paths, *schemas))),
            )
        )
        title, state = "API – kvmsupervisor", self._state()
        return _page(frame.page(title=title, here="/api", state=state, person=person, main=main, script="refresh.js"))

    def _streamed(self, request: Request, _person: Person) -> Reply:
        # A browser names the last event by itself when it comes again; a script that opens a stream names it here.
        mark = request.headers.get("last-event-id") or request.first("since")
        try:
            feed = self._stream.since(mark)
        except Full:
            said = f"there are {VIEWERS} streams, and no room for one more"
            return api.error(HTTPStatus.SERVICE_UNAVAILABLE, said, {"Retry-After": "10"})
        return Reply(
            status=HTTPStatus.OK,
            body=f"retry: {RETRY_MS}\n\n".encode(),
            content_type="text/event-stream",
            # nginx would keep back what comes slowly.
            headers={"X-Accel-Buffering": "no"},
            feed=feed,
        )

    def _readyz(self, _request: Request, _person: Person) -> Reply:
        state = self._state()
        if state.in_step:
            return _text(HTTPStatus.OK, f"in step with revision {state.revision}")
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, f"not in step: {state.problem}")

    def _metrics(self, _request: Request, _person: Person) -> Reply:
        rows = [entry.row for entry in self._board.entries]
        body = metrics(
            state=self._state(),
            viewers=self._stream.viewers,
            phases=Counter(row.phase for row in rows),
            ranks=Counter(row.rank for row in rows),
            hosts=Counter(fact.state for fact in facts_of(self._overview.cluster)),
            requests=self._requests,
            numbers=self._numbers(),
        )
        return Reply(status=HTTPStatus.OK, body=body.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")


def _file(name: str) -> Reply:
    if name not in STATIC:
        if (found := vendored(name.removeprefix("vendor/"))) is not None and name.startswith("vendor/"):
            return found
        return api.error(HTTPStatus.NOT_FOUND, "no such file")
    body = Path(__file__).with_name("static").joinpath(name).read_bytes()
    return Reply(status=HTTPStatus.OK, body=body, content_type=STATIC[name])


def _console_of(request: Request) -> tuple[str, ConsoleKind] | None:
    """The instance and the console that a request for a WebSocket names; None where it is another request."""
    name, _, kind = request.path.removeprefix(API_INSTANCES).partition("/")
    if request.method == "GET" and request.path.startswith(API_INSTANCES) and kind in tuple(ConsoleKind):
        return name, ConsoleKind(kind)
    return None


def _page(body: bytes, status: HTTPStatus = HTTPStatus.OK, *, policy: str = frame.POLICY) -> Reply:
    return Reply(
        status=status,
        body=body,
        content_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": policy},
    )


def _text(status: HTTPStatus, line: str) -> Reply:
    return Reply(
        status=status,
        body=f"{line}\n".encode(errors="backslashreplace"),
        content_type="text/plain; charset=utf-8",
    )
