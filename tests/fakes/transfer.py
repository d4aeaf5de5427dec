"""The connections between supervisors over which guests are moved, in virtual time: as `adapters.transfer` has them.

A connection is of two ends, each on a host, each in the context of whoever opened it. What goes over it keeps its
order. Where the way is not whole for `SILENCE_S`, in one direction or both, it breaks, as TCP's user timeout has it;
what was sent in the direction that is open has arrived. What it has in common with real sockets is held by
`tests/adapters/test_transfer_contract.py`, which runs on both.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvmsupervisor.adapters.transfer import SILENCE_S, TransferFailed
from tests.fakes.clock import FakeClock
from tests.fakes.migration import Descriptors

PASSAGE_S = 0.001
"""How long what is sent is under way."""


@dataclass(frozen=True)
class _End:
    """The last thing that comes."""


END = _End()


class FakeNet:
    """The network between hosts.

    Args:
        clock: its time.

    Attributes:
        swallowed: directions in which nothing passes: from, to; hosts by their names.
        down: hosts that hear nothing, and answer nothing.
        passage_s: how long what is sent now is under way.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.swallowed: set[tuple[str, str]] = set()
        self.down: set[str] = set()
        self.passage_s: Callable[[], float] = lambda: PASSAGE_S
        self.listeners: dict[tuple[str, int], FakeListener] = {}
        self.connections: list[FakeConnection] = []

    def passes(self, one: FakeTransfers, other: FakeTransfers) -> bool:
        """Whether something that is sent in this direction arrives."""
        return (one.name, other.name) not in self.swallowed and not {one.name, other.name} & self.down

    def is_whole(self, one: FakeTransfers, other: FakeTransfers) -> bool:
        return self.passes(one, other) and self.passes(other, one)

    def changed(self) -> None:
        """The ways are others: what was held up passes, and what is not whole will break."""
        for end in tuple(self.connections):
            end.look()

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        self.clock.call_at(self.clock.now() + seconds, what)

    def gone(self, host: FakeTransfers, whose: Callable[[contextvars.Context], bool], *, silently: bool) -> None:
        """A process of a host is gone, with all that it had open; `silently`: the other side is not told."""
        for place, listener in tuple(self.listeners.items()):
            if listener.host is host and whose(listener.context):
                del self.listeners[place]
        for end in tuple(self.connections):
            if end.host is host and whose(end.context):
                end.lose_owner(silently=silently)


class FakeTransfers:
    """One host on it.

    Args:
        net: the network.
        descriptors: of its QEMUs.
        name: of the host.
    """

    def __init__(self, net: FakeNet, descriptors: Descriptors, name: str = "") -> None:
        self.net = net
        self.name = name
        self.descriptors = descriptors

    async def call(self, host: str, port: int, *, instance: str, key: bytes, timeout_s: float) -> FakeConnection:
        """See `adapters.transfer.call`."""
        net, clock = self.net, self.net.clock
        answered: asyncio.Event = asyncio.Event()
        found: list[FakeConnection | None] = []

        def answer(mine: FakeConnection | None) -> None:
            found.append(mine)
            answered.set()

        def arrive() -> None:
            listener = net.listeners.get((host, port))
            if listener is None:
                answer(None)
            elif net.is_whole(self, listener.host):
                loop = asyncio.get_running_loop()
                loop.call_soon(listener.greet, self, instance, key, answered, answer, context=listener.context)

        context = contextvars.copy_context()
        net.after(net.passage_s(), arrive)
        if not await clock.wait(answered, clock.now() + timeout_s):
            answered.set()
            raise TransferFailed(f"{host}:{port}: timed out")
        (mine,) = found
        if mine is None:
            raise TransferFailed(f"{host}:{port}: it refuses")
        mine.context = context
        return mine

    def listen(
        self, address: str, port: int, *, key_of: Callable[[str], bytes | None], on_call: Callable[..., None]
    ) -> FakeListener:
        """See `adapters.transfer.listen`."""
        if (address, port) in self.net.listeners:
            raise OSError("Address already in use")
        return FakeListener(self, address, port, key_of=key_of, on_call=on_call)


class FakeListener:
    """See `adapters.transfer.Listener`."""

    def __init__(
        self,
        host: FakeTransfers,
        address: str,
        port: int,
        *,
        key_of: Callable[[str], bytes | None],
        on_call: Callable[..., None],
    ) -> None:
        self.host = host
        self.port = port
        self.context = contextvars.copy_context()
        self._address = address
        self._key_of = key_of
        self._on_call = on_call
        host.net.listeners[address, port] = self

    async def run(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        listeners = self.host.net.listeners
        if listeners.get((self._address, self.port)) is self:
            del listeners[self._address, self.port]

    def greet(
        self,
        caller: FakeTransfers,
        instance: str,
        key: bytes,
        answered: asyncio.Event,
        answer: Callable[[FakeConnection | None], None],
    ) -> None:
        """Somebody calls, unless he has given up."""
        if answered.is_set():
            return
        if self._key_of(instance) != key:
            answer(None)
            return
        theirs, mine = FakeConnection(caller, instance), FakeConnection(self.host, instance)
        theirs.peer, mine.peer = mine, theirs
        self.host.net.connections += (theirs, mine)
        answer(theirs)
        self._on_call(mine)


class FakeConnection:
    """One end; see `adapters.transfer.Connection`."""

    def __init__(self, host: FakeTransfers, instance: str) -> None:
        self.host = host
        self.instance = instance
        self.context = contextvars.copy_context()
        self.peer: FakeConnection
        self._net = host.net
        self._inbox: deque[object] = deque()
        self._bell = asyncio.Event()
        self._sent: deque[object] = deque()
        self._is_over = self._is_passing = self._is_lost = False
        self._broken_at: float | None = None
        self._relay: FakeRelay | None = None

    # --- messages ---------------------------------------------------------------------------------------------

    async def send(self, message: Mapping[str, Any], *, timeout_s: float) -> None:
        await asyncio.sleep(0)
        if self._is_over or END in self._inbox:
            raise TransferFailed("it has hung up")
        self.put(dict(message))

    async def receive(self, *, timeout_s: float) -> dict[str, Any]:
        deadline = self._net.clock.now() + timeout_s
        try:
            while not self._inbox and not self._is_over:
                self._bell.clear()
                if not await self._net.clock.wait(self._bell, deadline):
                    raise TransferFailed("timed out")
        except asyncio.CancelledError:
            self.close()
            raise
        if self._is_over or self._inbox[0] is END:
            raise TransferFailed("it has hung up")
        found = self._inbox.popleft()
        assert isinstance(found, dict)
        return found

    @property
    def is_alive(self) -> bool:
        return not self._is_over and not self._inbox

    def carry(self, on_end: Callable[[], None]) -> FakeRelay:
        self._relay = FakeRelay(self, on_end)
        return self._relay

    def close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self.put(END)
            self._bell.set()

    # --- what is under way ------------------------------------------------------------------------------------

    def put(self, part: object) -> None:
        """Send the next part."""
        self._sent.append(part)
        if not self._is_passing:
            self._is_passing = True
            self._net.after(self._net.passage_s(), self._arrive)

    def _arrive(self) -> None:
        self._is_passing = False
        if not self._net.passes(self.host, self.peer.host):
            self.look()
            return
        while self._sent:
            self.peer.come(self._sent.popleft())
        if self._is_over:
            self.forget()

    def come(self, part: object) -> None:
        """Something has come to this host: its owner hears of it as soon as he hears of anything."""
        asyncio.get_running_loop().call_soon(self._take, part, context=self.context)

    def _take(self, part: object) -> None:
        if self._is_over:
            return
        if self._relay is not None:
            self._relay.hear(part)
        else:
            self._inbox.append(part)
            self._bell.set()

    def flush(self) -> None:
        """Whatever came before there was a relay is the relay's."""
        while self._inbox:
            self._take(self._inbox.popleft())

    def look(self) -> None:
        """The ways may be others."""
        net = self._net
        if self._sent and not self._is_passing and net.passes(self.host, self.peer.host):
            self._is_passing = True
            net.after(net.passage_s(), self._arrive)
        if net.is_whole(self.host, self.peer.host):
            self._broken_at = None
            if self.peer._is_lost:
                # That host knows nothing of it.
                self.come(END)
                self.forget()
        elif self._broken_at is None:
            self._broken_at = at = net.clock.now() + SILENCE_S
            net.after(SILENCE_S, lambda: self._break(at))

    def _break(self, at: float) -> None:
        """It was not whole for too long: whoever owns this end hears of it, and what was not delivered is lost."""
        if self._broken_at == at:
            self._sent.clear()
            self.come(END)
            self.forget()

    def lose_owner(self, *, silently: bool) -> None:
        """Whoever had this end is gone."""
        was_over, self._is_over = self._is_over, True
        if self._relay is not None:
            self._relay.lose_owner()
        if silently:
            self._is_lost = True
            self._sent.clear()
            self.forget()
        elif not was_over:
            self.put(END)

    def forget(self) -> None:
        if self in self._net.connections:
            self._net.connections.remove(self)


class FakeRelay:
    """See `adapters.transfer.Relay`."""

    def __init__(self, connection: FakeConnection, on_end: Callable[[], None]) -> None:
        self.qemus_end, self._local = connection.host.descriptors.pair()
        self.is_over = False
        self._connection = connection
        self._on_end = on_end
        self._context = contextvars.copy_context()
        self._is_ending = False
        self._local.heard = lambda part: self._in_its_turn(self._send, part)
        self._local.ended = lambda: self._in_its_turn(self._end)
        self._in_its_turn(connection.flush)

    def _in_its_turn(self, what: Callable[..., None], *parts: object) -> None:
        """The thread that carries lives, and is frozen, with its supervisor."""
        asyncio.get_running_loop().call_soon(what, *parts, context=self._context)

    def _send(self, part: object) -> None:
        if not self._is_ending:
            self._connection.put(part)

    def hear(self, part: object) -> None:
        """Something has come for QEMU."""
        if part is END:
            self._end()
        elif not self._is_ending:
            self._local.send(part)

    def _end(self) -> None:
        if self._is_ending:
            return
        self._is_ending = True
        self._local.shut_down()
        self._connection.close()
        self._in_its_turn(self._over)

    def _over(self) -> None:
        self.is_over = True
        self._on_end()

    def cut(self) -> None:
        self._end()

    def lose_owner(self) -> None:
        """Nobody carries any more."""
        self._is_ending = True
        self._local.shut_down()
