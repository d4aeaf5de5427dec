"""Consoles in the browser: who may have one, how many, and the way to it.

A page asks for a ticket (a POST, as acts are), and opens a WebSocket with it. The WebSocket has passed the same checks
as a POST by then: who asks, from which page, and with which role. Each console is told in the log: by whom, of what,
from where, and its end.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from http import HTTPStatus
from typing import Any

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.web import Reply, Request, TooLarge, Unreadable
from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.live_overview import LiveOverview
from kvmsupervisor.cluster.overview import shown
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.consoles import ConsoleKind, ConsoleRequest, Unfit, decoded, plain
from kvmsupervisor.domain.keys import HostName, InstanceId, parse_id
from kvmsupervisor.web.api import error, reply
from kvmsupervisor.web.other_hosts import FOR, page_of
from kvmsupervisor.web.people import Person, Refusal, Role, need
from kvmsupervisor.web.people_file import CERT
from kvmsupervisor.web.same_origin import need_same_origin
from kvmsupervisor.web.tickets import Purpose, Tickets, TooMany

log = structlog.get_logger(__name__)

BODY_MOST = 1024
"""Bytes of a request for a ticket."""

MOST, MOST_OF_ONE = 100, 16
"""How many consoles there may be, and of one person. Arbitrary: each costs some 100 KB here."""

TICKETS = "/api/v1/console-tickets"

BY = ", by "
"""Between the name that another host's page gives, and its own."""

Run = Callable[[Any], Coroutine[Any, Any, str]]
"""Shows a console to a browser until its end; returns why, for people."""


class Consoles:
    """All of them.

    Args:
        settings: of this host.
        overview: the cluster: which instances there are, and where.
        clock: the machine's.
        address_of: where a request comes from.

    Attributes:
        counts: how many were opened, by kind.
    """

    def __init__(
        self, settings: Settings, overview: LiveOverview, clock: Clock, address_of: Callable[[Request], str]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._settings = settings
        self._overview = overview
        self._clock = clock
        self._address_of = address_of
        self._tickets = Tickets(clock.now)
        self._open: dict[object, tuple[Purpose, Callable[[str], None]]] = {}

    @property
    def open(self) -> Counter[str]:
        """How many are open, by kind."""
        return Counter(purpose.console for purpose, _ in self._open.values())

    async def ticket(self, request: Request, person: Person) -> Reply:
        """`POST /api/v1/console-tickets`."""
        need(person, Role.CONSOLE)
        try:
            wanted = decoded(await request.body.read(BODY_MOST))
            kind, instance = _kind(wanted.get("console")), _instance(wanted.get("instance"))
        except TooLarge as large:
            return error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(large))
        except (Unreadable, Unfit) as unfit:
            return error(HTTPStatus.BAD_REQUEST, str(unfit))
        self._find(instance, on_behalf=False)
        try:
            ticket = self._tickets.give(Purpose(person.name, kind, instance))
        except TooMany as many:
            return error(HTTPStatus.TOO_MANY_REQUESTS, str(many), {"Retry-After": "10"})
        return reply({"ticket": ticket, "path": f"/api/v1/instances/{instance}/{kind}?ticket={ticket}"})

    async def connect(self, request: Request, person: Person, name: str, kind: ConsoleKind) -> Reply:
        """`GET /api/v1/instances/<id>/serial?ticket=`, or `/display`: a WebSocket.

        Raises:
            Refusal: it is not for this person.
        """
        instance = parse_id(name)
        # First of all it is used up, whatever comes of this.
        purpose = None if instance is None else Purpose(person.name, kind, instance)
        is_good = self._tickets.use(request.first("ticket"), purpose)
        need(person, Role.CONSOLE)
        need_same_origin(request)
        who, on_behalf = person.name, request.headers.get(FOR)
        if on_behalf is not None and instance is not None and person.name.startswith(CERT):
            # Another host's page. No browser can send that header with a WebSocket, so none is talked into this.
            who, is_good = f"{plain(on_behalf)}{BY}{person.name}", True
            purpose = Purpose(who, kind, instance)
        if not is_good or instance is None or purpose is None:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "a console is opened with a ticket of its own (POST /api/v1/console-tickets): once, within ten "
                "seconds, by who got it; this is none, or not any more",
            )
        of_one = sum(other.person == who for other, _ in self._open.values())
        if of_one >= MOST_OF_ONE or len(self._open) >= MOST:
            what = f"{who} has {of_one} consoles open" if of_one >= MOST_OF_ONE else f"{MOST} consoles are open"
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, f"{what}, and no room for one more: close one")
        url = self._find(instance, on_behalf=on_behalf is not None)
        run = self._here(kind, instance, who) if url is None else self._there(url, kind, instance, who)
        told = log.bind(who=who, address=self._address_of(request), instance=instance, console=str(kind))

        async def serve(browser: Any) -> None:
            why = "the browser has left"

            def end(reason: str) -> None:
                nonlocal why
                why = reason
                browser.close(POLICY, reason)

            with self._counted(purpose, end):
                told.info("web.console_opened")
                try:
                    why = await run(browser) or why
                finally:
                    told.info("web.console_closed", reason=why)

        return Reply(status=HTTPStatus.SWITCHING_PROTOCOLS, body=b"", content_type="text/plain", socket=serve)

    def _here(self, kind: ConsoleKind, instance: InstanceId, who: str) -> Run:
        """Shows a console of this host."""
        from kvmsupervisor.web.console_session import Session  # noqa: PLC0415 - no start should wait for wsproto

        request = ConsoleRequest(kind=kind, instance=instance, who=f"{who} (in a browser)")
        return Session(self._settings.run_dir, request, clock=self._clock).run

    def _there(self, url: str, kind: ConsoleKind, instance: InstanceId, who: str) -> Run:
        """Has another host's page show one of that host."""
        from kvmsupervisor.web import other_hosts  # noqa: PLC0415 - as above

        return lambda browser: other_hosts.session(browser, url, self._settings, kind=kind, instance=instance, who=who)

    def end_unless(self, may: Callable[[str], bool]) -> None:
        """End the consoles of those who may have none any more.

        Args:
            may: whether somebody still may, by name.
        """
        for purpose, end in list(self._open.values()):
            if not may(purpose.person.rpartition(BY)[2]):
                end("you may have no console any more")

    @contextlib.contextmanager
    def _counted(self, purpose: Purpose, end: Callable[[str], None]) -> Iterator[None]:
        mark = object()
        self._open[mark] = purpose, end
        self.counts[purpose.console] += 1
        try:
            yield
        finally:
            del self._open[mark]

    def _find(self, instance: InstanceId, *, on_behalf: bool) -> str | None:
        """Where its console is to be had: the URL of another host's page, or None for this host.

        Args:
            instance: whose.
            on_behalf: whether another page asks, which is not sent on to a third one.

        Raises:
            Refusal: there is no such instance, or it runs elsewhere, or nowhere.
        """
        cluster = self._overview.cluster
        found = cluster.instances.get(instance)
        if found is None:
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no instance {instance}")
        view = shown(found, cluster)
        if view.host is None:
            raise Refusal(HTTPStatus.CONFLICT, f"{instance} does not run: {visible(view.reason)}")
        if view.host == self._settings.hostname:
            return None
        if on_behalf:
            raise Refusal(HTTPStatus.CONFLICT, f"{instance} is on host {visible(view.host)} now; try again")
        return page_of(cluster, HostName(view.host), self._settings)


POLICY = 1008
"""Status code of a WebSocket that is ended because it is not allowed (any more) (RFC 6455, 7.4.1)."""


def _kind(text: object) -> ConsoleKind:
    if not isinstance(text, str) or text not in tuple(ConsoleKind):
        raise Unfit(f"console is one of {', '.join(ConsoleKind)}")
    return ConsoleKind(text)


def _instance(text: object) -> InstanceId:
    if not isinstance(text, str) or (name := parse_id(text)) is None:
        raise Unfit("instance is the id of one")
    return name
