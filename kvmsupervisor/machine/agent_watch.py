"""Asks one guest's agent while its channel is open, and keeps the last answer. Decides nothing.

QEMU says when the guest opens or closes the channel (event VSERPORT_CHANGE, qapi/char.json); a client that connects
later reads the state with `query-chardev`. The agent is asked only while the channel is open, in a task of its own:
the worker never waits for it, and an instance without an agent costs nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from kvmsupervisor.adapters.agent import AgentSilent
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.domain.agent import GuestFacts
from kvmsupervisor.domain.argv import AGENT_PORT
from kvmsupervisor.domain.qmp_answers import objects_in

ASK_EVERY_S = 60.0
"""How often to ask while the channel is open. One exchange costs 1 ms of CPU: 0.2 % of a core with 100 guests."""

SOON_S = (5.0, 15.0)
"""The first pauses after the channel was opened, while the agent reports no address: an agent often starts before DHCP
is done, and a person waits for the address. Arbitrary."""

LEAST_PAUSE_S = 5.0
"""The least pause between two exchanges, also when a guest opens and closes its channel all the time. Arbitrary."""


class AgentWatch:
    """The agent of one instance's guest, for one QEMU after the other.

    Attributes:
        facts: the last answer, also of an agent that no longer answers; None when there was none.
        rests: whether it is not asked, as the guest's file systems are frozen.
        seen: when the agent last answered this supervisor, RFC 3339 in UTC; None when it never did.
    """

    def __init__(
        self,
        *,
        ask: Callable[[Path], Awaitable[GuestFacts]],
        socket: Path,
        clock: Clock,
        notify: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._ask = ask
        self._socket = socket
        self._clock = clock
        self._notify = notify
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self._asked_at = -math.inf
        self._told = False
        self.facts: GuestFacts | None = None
        self.seen: str | None = None
        self.rests = False

    @property
    def open(self) -> bool:
        """Whether the guest has the channel open, as far as QEMU has said."""
        return self._task is not None

    def recall(self, facts: GuestFacts | None) -> None:
        """Use the facts that an earlier supervisor published for the same QEMU, until the agent answers."""
        if self.facts is None and facts is not None:
            self.facts = facts
            self._notify()

    async def look(self, command: Callable[[str], Awaitable[Any]]) -> None:
        """Ask over QMP whether the channel is open: its events went to an earlier connection."""
        self._told = False
        answer = await command("query-chardev")
        # An event that arrived meanwhile is newer than the answer.
        if answer is not None and not self._told:
            ours = (one for one in objects_in(answer) if one.get("label") == AGENT_PORT)
            self.turn(is_open=any(one.get("frontend-open") is True for one in ours))

    def turn(self, *, is_open: bool) -> None:
        """Note that the guest has opened or closed the channel. Does not block."""
        self._told = True
        if is_open and self._task is None:
            self._task = asyncio.create_task(self._keep_asking())
        elif not is_open and self._task is not None:
            self._task.cancel()
            self._task = None

    def reset(self) -> None:
        """Forget everything: there is another QEMU, or none."""
        self.turn(is_open=False)
        self.rests = False
        self.facts = None
        self.seen = None

    async def close(self) -> None:
        """Stop asking; return when the task has ended. The facts are kept."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _keep_asking(self) -> None:
        """Ask at once, again soon while there is no address, then once a minute."""
        await self._clock.sleep_until(self._asked_at + LEAST_PAUSE_S)
        for pause_s in itertools.chain(SOON_S, itertools.repeat(ASK_EVERY_S)):
            self._asked_at = self._clock.now()
            has_address = await self._ask_once()
            await self._clock.sleep(ASK_EVERY_S if has_address else pause_s)

    async def _ask_once(self) -> bool:
        """Ask; return whether the agent reported an address."""
        if self.rests:
            return False
        try:
            facts = await self._ask(self._socket)
        except AgentSilent as error:
            self._log.debug("agent.silent", error=str(error))
            return False
        self.seen = self._clock.wall()
        if facts != self.facts:
            self.facts = facts
            self._notify()
        return bool(facts.addresses)
