"""Informer: keeps the keys below a prefix in step with etcd by list and watch, and lists again after a compaction.

No change is lost and none is applied twice: the watch begins right behind the list, and after a compaction the new list
is compared with the table, which yields exactly the changes that the watch could not tell.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Hashable, Iterable, Set
from contextlib import aclosing
from operator import itemgetter
from typing import Generic, Never, Protocol, TypeVar

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import (
    Compacted,
    Denied,
    EtcdError,
    Event,
    Store,
    Unavailable,
    Watch,
)
from kvmsupervisor.aio import until_one_ends
from kvmsupervisor.domain.grouping import Stage, Table
from kvmsupervisor.domain.history import KEPT
from kvmsupervisor.domain.timing import RETRY_CAP_S, retry_delay

log = structlog.get_logger(__name__)

LabelT = TypeVar("LabelT", bound=Hashable)

SLICE = 1000
"""Keys that are applied before other tasks get their turn: at most 2 ms of work."""

PAGE = 10_000
"""Keys that a list asks for at once: a supervisor is to be in step soon, also with 80,000 keys."""

_BY_REVISION = itemgetter(2)


SPREAD_CAP_S = 30.0
"""The longest time within which the hosts of a cluster list again. Arbitrary: half of what a takeover waits."""

SPREAD_FROM_S = 0.1
"""Nothing is spread that is over that soon."""


class Proof(Protocol):
    """What an informer needs of `history.History`."""

    @property
    def hosts(self) -> int:
        """How many hosts have a session, as far as it is known."""
        ...

    @property
    def era(self) -> int:
        """A number that differs in another history."""
        ...

    async def prove(self) -> None:
        """Prove that etcd has the history that this host acted on, or begin another era."""
        ...

    async def turned(self, era: int) -> None:
        """Return once the history is another one than in `era`."""
        ...

    def saw(self, key: bytes, revision: int, value: bytes | None) -> None:
        """A key was observed: written, or deleted (None)."""
        ...


class AnotherHistory(EtcdError):
    """The list belongs to a history that etcd no longer has: list again."""


class Following:
    """What keeps keys in step with etcd, whatever keys they are: lists, follows, and begins again after trouble.

    Args:
        store: etcd.
        clock: the machine's.
        prefix: of the keys.
        history: asked before anything is applied that came over a new connection.
        rand: random numbers, 0 ≤ x < 1.

    Attributes:
        era: the history's era to which the keys belong.
        synced: set once the first list is known, and was told of.
        revision: of etcd; all changes up to it are known. 0 before the first list.
    """

    def __init__(
        self, *, store: Store, clock: Clock, history: Proof, prefix: str, rand: Callable[[], float] = random.random
    ) -> None:
        self.synced = asyncio.Event()
        self.revision = 0
        self.era = history.era
        self._history = history
        self._store = store
        self._clock = clock
        self._prefix = prefix
        self._rand = rand
        self._listed = False
        self._list_s = SPREAD_CAP_S
        self._watch: Watch | None = None
        self._trouble: tuple[type[EtcdError], str] | None = None

    @property
    def in_step(self) -> bool:
        """Whether the keys are in step with etcd: listed, and the watch is connected."""
        return self._listed and self._watch is not None and self._watch.connected

    @property
    def problem(self) -> str:
        """What keeps the table from being in step, for people; empty while it is in step."""
        if self.in_step:
            return ""
        if self._trouble is not None:
            return self._trouble[1]
        step = "the watch on" if self._listed else "the first list of"
        return f"{step} {self._prefix} is not answered yet"

    async def run(self) -> Never:
        """Follow the keys, for ever."""
        failures = 0
        while True:
            began = self._clock.now()
            try:
                if not self._listed:
                    await self._list_in_turn()
                await until_one_ends(self._follow(), self._until_another())
            except EtcdError as error:
                # A connection that lasted resets the backoff.
                failures = 1 if self._clock.now() - began > RETRY_CAP_S else failures + 1
                self._note(error)
                if not isinstance(error, Compacted | AnotherHistory) or failures > 1:
                    await self._clock.sleep(retry_delay(failures, self._rand()))

    async def _until_another(self) -> Never:
        """A watch that goes on hears nothing of another history that was found beside it."""
        await self._history.turned(self.era)
        raise AnotherHistory("etcd has another history")

    async def _list_in_turn(self) -> None:
        """List. What makes this host list again, a compaction mostly, makes all hosts do so at the same instant.

        Then each waits for a random part of the time that all these lists take, one after the other. A first list does
        not wait: a host that starts alone is to be there soon.
        """
        if self.synced.is_set():
            spread_s = min((self._history.hosts - 1) * self._list_s, SPREAD_CAP_S)
            if spread_s > SPREAD_FROM_S:
                await self._clock.sleep(self._rand() * spread_s)
        began = self._clock.now()
        await self._list()
        # The shortest: that of a store that was not busy.
        self._list_s = min(self._list_s, self._clock.now() - began)

    async def _list(self) -> None:
        """Read the keys, and tell of them."""
        raise NotImplementedError

    async def _follow(self) -> Never:
        """Tell of their changes, for ever."""
        raise NotImplementedError

    def _lag(self) -> None:
        """What the watch could have told is gone."""
        self._listed = False

    async def _prove(self) -> None:
        """Prove the history before anything is applied that comes over a new connection.

        Raises:
            AnotherHistory: the table belongs to another history than this connection.
        """
        await self._history.prove()
        if self._history.era != self.era:
            raise AnotherHistory("etcd has another history")

    async def _prove_list(self, era: int) -> None:
        """Prove the history of a list. After the list: the proof then asks the member that answered the list.

        Args:
            era: in which the list was begun.

        Raises:
            AnotherHistory: another one was found since. The list may be the former history's, or be older than the
                new one's name.
        """
        await self._history.prove()
        if self._history.era != era:
            raise AnotherHistory("etcd has another history")

    def _note(self, error: EtcdError) -> None:
        """Remember what is wrong; log it when it differs from what was wrong before."""
        before, self._trouble = self._trouble, (type(error), f"{self._prefix} cannot be read: {error}")
        match error:
            case Compacted():
                self._lag()
                log.info("mirror.compacted", prefix=self._prefix, since=self.revision, oldest=error.revision)
            case AnotherHistory():
                self._listed = False
            case _ if before is not None and before[0] is type(error):
                pass
            case Denied():
                log.error("mirror.denied", prefix=self._prefix, error=str(error))
            case _:
                log.warning("mirror.away", prefix=self._prefix, error=str(error))

    def _well(self) -> None:
        if self._trouble is not None:
            log.info("mirror.back", prefix=self._prefix)
            self._trouble = None


class Informer(Following, Generic[LabelT]):
    """Keeps `table` in step with the keys below `prefix`; see `Following`.

    Args:
        table: holds the keys; changes are told by its labels (`grouping.Flat`: the keys).
        on_change: called with the labels that differ and the revision, once per batch that changed
            anything, after the whole batch is in the table. It runs in the informer's own task: it must
            neither block nor raise. It is called after the first list of another era, too, whatever differs.
        page: keys that are asked for at once. Fewer are slower, and need less memory.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        history: Proof,
        prefix: str,
        table: Table[LabelT],
        on_change: Callable[[Set[LabelT], int], None],
        rand: Callable[[], float] = random.random,
        page: int = PAGE,
    ) -> None:
        super().__init__(store=store, clock=clock, history=history, prefix=prefix, rand=rand)
        self._table = table
        self._on_change = on_change
        self._page = page

    async def _list(self) -> None:
        stage, era = self._table.begin(fresh=True), self._history.era
        revision = 0
        newest: list[tuple[bytes, bytes, int, int, int]] = []
        async with aclosing(self._store.pages(self._prefix, page=self._page)) as pages:
            async for page in pages:
                for begin in range(0, len(page.entries), SLICE):
                    entries = page.entries[begin : begin + SLICE]
                    stage.put_all(entries)
                    if len(newest) < KEPT or max(map(_BY_REVISION, entries)) > _BY_REVISION(newest[-1]):
                        newest = heapq.nlargest(KEPT, [*newest, *entries], key=_BY_REVISION)
                    await asyncio.sleep(0)
                revision = page.revision
        await self._prove_list(era)
        self._listed = True
        self._well()
        for key, value, mod_revision, _, _ in newest:
            self._history.saw(key, mod_revision, value)
        self._commit(stage, revision, era=era)
        self.synced.set()

    async def _follow(self) -> Never:
        async with self._store.watch(self._prefix, self.revision + 1, prove=self._prove) as watch:
            self._watch = watch
            try:
                async for batch in watch:
                    stage = self._table.begin(fresh=False)
                    await _fill(stage, batch.events)
                    self._well()
                    if self._history.era != self.era:
                        # This came over an older connection than the proof that found another history.
                        raise AnotherHistory("etcd has another history")
                    # Of one transaction, too: any of its keys may be what a restored backup contradicts.
                    for event in batch.events[-KEPT:]:
                        self._history.saw(
                            event.kv.key, event.kv.mod_revision, None if event.deleted else event.kv.value
                        )
                    self._commit(stage, batch.revision, era=self.era)
            finally:
                self._watch = None
        raise Unavailable(f"the watch on {self._prefix} has ended")

    def _commit(self, stage: Stage[LabelT], revision: int, *, era: int) -> None:
        changed = stage.commit()
        anew, self.era = era != self.era, era
        self.revision = revision
        if changed or anew:
            self._on_change(changed, revision)


async def _fill(stage: Stage[LabelT], events: Iterable[Event]) -> None:
    """Fill a stage slice by slice, so that other tasks get their turn during a large list."""
    for index, event in enumerate(events, start=1):
        if event.deleted:
            stage.delete(event.kv.key)
        else:
            stage.put(*event.kv)
        if index % SLICE == 0:
            await asyncio.sleep(0)
