"""What the informers of a history tell, each change of it, held against what etcd's history says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from kvmsupervisor.adapters.etcd.api import Event
from kvmsupervisor.cluster.informer import Informer
from kvmsupervisor.domain.grouping import Flat, Groups
from tests.simulation.loop import LIFE
from tests.support.invariants import Followed, Value

if TYPE_CHECKING:
    from tests.simulation.world import World


def _label(table: Flat | Groups) -> Callable[[bytes], Any]:
    """By what changes of a key are told."""
    if isinstance(table, Flat):
        return lambda key: key

    def owner(key: bytes) -> Any:
        place = table.place(key)
        return None if place is None else place[0]

    return owner


def _held(table: Flat | Groups) -> Callable[[bytes], Value]:
    """A key as the table has it."""

    def get(key: bytes) -> Value:
        if isinstance(table, Flat):
            entry: Any = table.get(key)
        else:
            instance, name = table.place(key) or (None, None)
            if instance is None:
                return None
            entry = table.lock_of(instance) if name is None else table.keys_of(instance).get(name)
        return None if entry is None else (entry.value, entry.mod_revision)

    return get


class _Followed:
    """One informer, as its listener hears it.

    It may tell of a history that etcd has no more, as long as it has not found that out: any of those that etcd had
    since it told something last will do.
    """

    def __init__(self, world: World, prefix: str, table: Flat | Groups) -> None:
        self._world = world
        self._prefix = prefix.encode()
        self._held = _held(table)
        self._follows = Followed(_label(table))
        life: Any = LIFE.get()
        self._life = life.name
        self._elsewhere = life.host.astray
        self._history: list[Event] | None = None

    def told(self, changed: Set[Any], revision: int) -> None:
        """Its listener is told of this."""
        self._world.judge.counts["told"] += 1
        found: list[str] = []
        histories = self._world.histories_of(elsewhere=self._elsewhere)
        known = 0 if self._history is None else next(i for i, one in enumerate(histories) if one is self._history)
        for history in histories[known:]:
            # A copy that had all that was told may have been listed without a word.
            for anew in (False,) if history is self._history else (True, False):
                events = self._events(history, 0 if anew else self._follows.revision, revision)
                wrong = self._follows.told(changed, revision, events=events, held=self._held, anew=anew)
                if not wrong:
                    self._history = history
                    return
                found = found or wrong
        # From here on as it should have been, so that one fault is told once.
        self._history = histories[-1]
        self._follows.begin_at(self._events(histories[-1], 0, revision), revision)
        self._world.judge.wrong("etcd's watch", f"{self._life} {self._prefix.decode()}: {'; '.join(found)}"[:500])

    def _events(self, history: list[Event], since: int, until: int) -> list[Event]:
        return [event for event in _between(history, since, until) if event.kv.key.startswith(self._prefix)]


def _between(history: list[Event], since: int, until: int) -> Iterator[Event]:
    """What happened behind one revision, up to another."""
    at = len(history)
    while at and history[at - 1].kv.mod_revision > since:
        at -= 1
    for event in history[at:]:
        if event.kv.mod_revision > until:
            return
        yield event


@contextmanager
def followed(world: World) -> Iterator[None]:
    """Hold all that informers tell in this world against etcd's history."""
    right = Informer.__init__

    def init(self: Informer[Any], *, table: Any, prefix: str, on_change: Callable[..., None], **told: Any) -> None:
        listener = _Followed(world, prefix, table)

        def heard(changed: Set[Any], revision: int) -> None:
            listener.told(changed, revision)
            on_change(changed, revision)

        right(self, table=table, prefix=prefix, on_change=heard, **told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Informer, "__init__", init)
        yield
