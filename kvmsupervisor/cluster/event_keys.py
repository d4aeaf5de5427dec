"""The events keys of this host's instances: each is written in a transaction that writes the instance's status, too.

Invariant: who writes an events key writes the status key in the same transaction. So an events key that was read is
still the same while the status key has the revision that it had then, which every such transaction compares.
What the key holds is read once before the first write, because another host may have written it before a move.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmsupervisor.adapters.etcd.api import Delete, KeyValue, Put, Store
from kvmsupervisor.domain.events import DUE, Event, fitted, from_json, joined, to_json
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId, Layout


@frozen
class EventPut:
    """A value for an events key, and the events that are in it then."""

    op: Put
    events: tuple[Event, ...]


@frozen
class Known:
    """What a key holds, as of a revision, as bytes: parsed ones of a hundred instances take a megabyte.

    `value` is None when a write got no reply, or another host may have written it.
    """

    value: bytes | None
    revision: int


class EventKeys:
    """What the events keys hold, as far as known, and what is to be added.

    Args:
        store: etcd.
        layout: of the keys.
    """

    def __init__(self, *, store: Store, layout: Layout) -> None:
        self._store = store
        self._layout = layout
        self._known: dict[InstanceId, Known] = {}
        # Events that no transaction has written for certain. Bounded: etcd may refuse writes for days.
        self._untold: dict[InstanceId, tuple[Event, ...]] = {}
        self._era = 0

    def add(self, instance: InstanceId, event: Event) -> None:
        """Note an event, to be written with a status."""
        self._untold[instance] = fitted((*self._untold.get(instance, ()), event))

    def due(self, instance: InstanceId) -> bool:
        """Whether there is an event that has to be written although the status may be the same."""
        return any(event.event in DUE for event in self._untold.get(instance, ()))

    async def read(self, instances: Iterable[InstanceId]) -> None:
        """Read the keys that are to be written and are not known.

        Raises:
            EtcdError: they could not be read.
        """
        unread = [one for one in instances if self._untold.get(one) and self._value(one) is None]
        if not unread:
            return
        era = self._era
        found = await self._store.read(*(self._layout.events_key(one) for one in unread))
        if era != self._era:
            return
        for instance, kv in zip(unread, found.kvs, strict=True):
            self.was_read(instance, kv, found.revision)

    def was_read(self, instance: InstanceId, found: KeyValue | None, revision: int) -> None:
        """The key holds this, as of a revision."""
        known = self._known.get(instance)
        if known is None or revision >= known.revision:
            self._known[instance] = Known(b"" if found is None else found.value, revision)

    def put(self, instance: InstanceId) -> EventPut | None:
        """What writes the events that are to be added; None when there are none, or the key has to be read first."""
        known, untold = self._value(instance), self._untold.get(instance)
        if known is None or not untold:
            return None
        value, events = to_json(joined(from_json(known), untold))
        return EventPut(Put(self._layout.events_key(instance), value), events)

    def delete(self, instance: InstanceId) -> Delete:
        """What deletes the key."""
        return Delete(self._layout.events_key(instance))

    def wrote(self, instance: InstanceId, put: EventPut | None, revision: int) -> None:
        """A transaction has written that; `revision` orders it among the others."""
        if put is None:
            return
        known = self._known.get(instance)
        if known is None or revision > known.revision:
            self._known[instance] = Known(put.op.value, revision)
        rest = [one for one in self._untold.get(instance, ()) if not any(told.covers(one) for told in put.events)]
        if rest:
            self._untold[instance] = tuple(rest)
        else:
            self._untold.pop(instance, None)

    def doubt(self, instance: InstanceId) -> None:
        """Another host may have written the key, or a write of ours may have come to nothing: read it again."""
        if (known := self._known.get(instance)) is not None:
            self._known[instance] = Known(None, known.revision)

    def forget(self, instance: InstanceId) -> None:
        """The key is another host's, or gone."""
        self._known.pop(instance, None)
        self._untold.pop(instance, None)

    def begin_anew(self) -> None:
        """Etcd has another history, in which the keys may lack what was written: all that is known is to be added."""
        self._era += 1
        for instance, known in self._known.items():
            told = fitted(joined(from_json(known.value or b""), self._untold.get(instance, ())))
            if told:
                self._untold[instance] = told
        self._known.clear()

    def _value(self, instance: InstanceId) -> bytes | None:
        known = self._known.get(instance)
        return None if known is None else known.value
