"""The life of `kvmsupervisor web`: watches etcd, keeps the rows, serves, until it is told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address
from typing import Never

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.adapters.web import Web
from kvmsupervisor.aio import start_part, until_one_ends
from kvmsupervisor.cluster.live_overview import LiveOverview
from kvmsupervisor.cluster.read_history import ReadHistory
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.web.access import EVERYBODY, Access, AccessWatch
from kvmsupervisor.web.acts import Acts
from kvmsupervisor.web.board import Board
from kvmsupervisor.web.consoles import TICKETS, Consoles
from kvmsupervisor.web.frame import State
from kvmsupervisor.web.metrics import Numbers
from kvmsupervisor.web.people import Role
from kvmsupervisor.web.recognition import Recognition
from kvmsupervisor.web.routes import Routes
from kvmsupervisor.web.stream import BEAT_S, Stream

log = structlog.get_logger(__name__)

GATHER_S = 0.2
"""How long changes are gathered. Arbitrary: a start makes five in a moment, and a page is to show them within 1 s."""

LOOK_S = 2.0
"""How often to look whether etcd answers; of a change of that nobody tells. Arbitrary: the silence of a member that
hangs is noticed after five seconds at the earliest."""


class Service:
    """All parts of the process.

    Args:
        settings: of this host.
        store: etcd.
        clock: the machine's.
        connect: makes the client of etcd that writes, with the first act.
        access: who may come in, as the settings' files say.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        clock: Clock,
        connect: Callable[[], Store],
        access: Access = EVERYBODY,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._access = access
        self._watch = AccessWatch(settings, access, clock, self._let_in)
        self._people = Recognition(access.known, clock.now)
        self._overview = LiveOverview(store=store, clock=clock, layout=settings.layout, history=ReadHistory(store))
        self._board = Board(self._overview)
        self._as_of: str | None = None
        self._stream = Stream(self._board, self.state)
        self._acts = Acts(
            connect=connect,
            layout=settings.layout,
            overview=self._overview,
            clock=clock,
            address_of=self._people.address_of,
        )
        self._consoles = Consoles(settings, self._overview, clock, self._people.address_of)
        self.routes = Routes(
            overview=self._overview,
            board=self._board,
            stream=self._stream,
            layout=settings.layout,
            state=self.state,
            names=(settings.hostname.lower(), *(settings.web_names or ())),
            people=self._people,
            changing={"/api/v1/acts": self._acts, TICKETS: self._consoles.ticket},
            connect=self._consoles.connect,
            numbers=self._numbers,
        )
        self._web = Web(settings.web_listen.host, settings.web_listen.port, self.routes, setting="KVM_WEB_LISTEN")
        self._let_in(access)

    def _let_in(self, access: Access) -> None:
        """From now on. Who looks already comes again, and is asked again."""
        self._access = access
        self._people.use(access.known)
        self.routes.transport_security = access.transport_security
        self._web.tls = access.tls
        self._stream.end()
        self._consoles.end_unless(lambda name: access.known.gives(name, Role.CONSOLE))

    def _numbers(self) -> Numbers:
        return Numbers(
            consoles=self._consoles.open,
            opened=self._consoles.counts,
            acts=self._acts.counts,
            refused=self._people.refused,
            access=not self._watch.problems,
        )

    def state(self) -> State:
        """What is known of etcd now; while all is in step, that is noted for later."""
        overview = self._overview
        # Before the first rows nothing is shown of what was read.
        if overview.in_step and self._board.turn:
            self._as_of = self._clock.wall()
            return State(in_step=True, revision=overview.revision)
        problem = overview.problem or "the first list is being read"
        return State(in_step=False, problem=problem, as_of=self._as_of, revision=overview.revision)

    async def run(self, stop: asyncio.Event, listening: Callable[[int], None] = lambda port: None) -> None:
        """Serve until `stop` is set.

        Args:
            stop: ends it.
            listening: called with the port.

        Raises:
            ListenError: `KVM_WEB_LISTEN` cannot be listened on.
        """
        try:
            await self._web.start()
            log.info("web.listening", port=self._web.port)
            self._warn()
            listening(self._web.port)
            await until_one_ends(stop.wait(), self._keep_up())
        finally:
            await self._web.close()
            await self._acts.close()
            self._people.close()

    def _warn(self) -> None:
        """What an operator should know of the files."""
        if self._access.without_effect:
            log.info("web.config_ignored", names=self._access.without_effect)
        host = self._settings.web_listen.host
        if self._access.tls is None and self._access.known.users and not ip_address(host).is_loopback:
            log.warning("web.passwords_in_clear", note=f"{host} is answered without TLS: tls_server_config is missing")

    async def _keep_up(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            start_part(tasks, self._overview.run)
            start_part(tasks, self._keep_rows)
            start_part(tasks, self._keep_state)
            start_part(tasks, self._keep_alive)
            if self._access.mark:
                start_part(tasks, self._watch.run)

    async def _keep_rows(self) -> Never:
        await self._overview.wait_synced()
        while True:
            if await self._board.turn_over():
                self._stream.tell()
            await self._clock.sleep(GATHER_S)
            await self._overview.changed.wait()

    async def _keep_state(self) -> Never:
        told = self.state()
        while True:
            state = self.state()
            if state != told:
                (log.info if state.in_step else log.warning)("web.state", in_step=state.in_step, problem=state.problem)
                told = state
                self._stream.tell()
            await self._clock.sleep(LOOK_S)

    async def _keep_alive(self) -> Never:
        while True:
            await self._clock.sleep(BEAT_S)
            self._stream.beat()
