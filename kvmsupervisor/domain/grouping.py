"""Keys below a watched prefix. The cost of a change depends on the keys that it touches, not on how many there are.

A table is changed by stages: one is begun, filled (in as many steps as its filler likes) and committed.
Until the commit readers see nothing of it; the commit itself is short. What readers got before stays as it
was: groups are replaced, never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Protocol, TypeVar

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import ID_RULE, LOCK_PLACEHOLDER, InstanceId, Layout, parse_id
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT
from kvmsupervisor.domain.spec import RawValue

LabelT_co = TypeVar("LabelT_co", bound=Hashable, covariant=True)

NAMES_SHARED = 256
"""Key names that are stored once for all instances. Arbitrary; above the number of known names."""

_NOTHING: Mapping[bytes, RawValue] = MappingProxyType({})


@frozen
class Entry:
    """One key as etcd held it at `mod_revision`; the value is cut to `VALUE_LIMIT` + 1 bytes, if not said otherwise."""

    value: bytes
    mod_revision: int
    create_revision: int
    lease: int


class Stage(Protocol[LabelT_co]):
    """A change of a table, not yet committed."""

    def put(self, key: bytes, value: bytes, mod_revision: int, create_revision: int, lease: int) -> None:
        """Note a key that was written."""
        ...

    def put_all(self, entries: Iterable[tuple[bytes, bytes, int, int, int]]) -> None:
        """Note many keys that were written, each with what `put` takes, in that order."""
        ...

    def delete(self, key: bytes) -> None:
        """Note a key that was deleted."""
        ...

    def commit(self) -> Set[LabelT_co]:
        """Apply the change at once; return the labels of what differs now."""
        ...


class Table(Protocol[LabelT_co]):
    """What a `informer.Informer` fills."""

    def begin(self, *, fresh: bool) -> Stage[LabelT_co]:
        """Begin a stage: on top of the present keys, or `fresh`: keys that are not put again are dropped."""
        ...


def _same(old: Entry | RawValue | None, value: bytes, mod_revision: int) -> bool:
    # The value is compared too: a store that was restored from a backup counts its revisions again.
    return old is not None and old.mod_revision == mod_revision and old.value == value


def names(value: bytes, host: bytes) -> bool:
    """Whether the value of a key `host` is this host's name. Cheap: asked of every instance.

    Surrounding white space is stripped as the parser of the wish does it (a no-break space, too). If the two differed,
    an instance could belong to a host for all others, and not for the host itself: it would run nowhere.
    """
    return value == host or (host in value and value.decode(errors="replace").strip().encode() == host)


class Flat:
    """A table of keys by themselves; the label of a change is the key.

    Args:
        limit: bytes of a value that are kept.
    """

    def __init__(self, limit: int = VALUE_LIMIT + 1) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._limit = limit

    @property
    def entries(self) -> Mapping[bytes, Entry]:
        """All keys, as of now: it changes with the next commit."""
        return MappingProxyType(self._entries)

    def get(self, key: bytes) -> Entry | None:
        """One key, None when it is absent."""
        return self._entries.get(key)

    def begin(self, *, fresh: bool) -> Stage[bytes]:
        """See `Table.begin`."""
        return _FlatStage(self._entries, self._limit, self._replace if fresh else None)

    def _replace(self, entries: dict[bytes, Entry]) -> None:
        self._entries = entries


class _FlatStage:
    def __init__(
        self, old: dict[bytes, Entry], limit: int, replace: Callable[[dict[bytes, Entry]], None] | None
    ) -> None:
        self._old = old
        self._limit = limit
        self._replace = replace
        self._new: dict[bytes, Entry] = {}
        self._gone: set[bytes] = set()
        self._changed: set[bytes] = set()

    def put(self, key: bytes, value: bytes, mod_revision: int, create_revision: int, lease: int) -> None:
        value = value[: self._limit]
        old = self._old.get(key)
        self._gone.discard(key)
        if old is not None and _same(old, value, mod_revision):
            self._new[key] = old
        else:
            self._new[key] = Entry(value, mod_revision, create_revision, lease)
            self._changed.add(key)

    def put_all(self, entries: Iterable[tuple[bytes, bytes, int, int, int]]) -> None:
        for entry in entries:
            self.put(*entry)

    def delete(self, key: bytes) -> None:
        self._new.pop(key, None)
        self._gone.add(key)
        self._changed.add(key)

    def commit(self) -> Set[bytes]:
        if self._replace is not None:
            self._changed |= self._old.keys() - self._new.keys()
            self._replace(self._new)
        else:
            self._old.update(self._new)
            for key in self._gone:
                self._old.pop(key, None)
        return self._changed


@dataclass(slots=True)
class _Group:
    """The keys of one instance. Changed only while it is being staged."""

    keys: dict[bytes, RawValue] = field(default_factory=dict)
    lock: Entry | None = None


class Groups:
    """A table of wishes and locks by instance; the label of a change is the instance's id.

    Keys that belong to no instance are kept apart with the reason, see `foreign`.

    Args:
        layout: of the keys.
        kept: beginnings of keys that belong to no instance, and whose values are kept all the same, see `apart`.
        on_apart: called when a key that belongs to no instance has changed: no label tells of it.

    Attributes:
        lock_before: the beginning of every lock's key.
        lock_after: its end.
        kept: see above.
        on_apart: see above.
        names: the names of keys that are stored once for all instances.
    """

    def __init__(
        self, layout: Layout, kept: tuple[bytes, ...] = (), on_apart: Callable[[], None] = lambda: None
    ) -> None:
        self.kept = kept
        self.on_apart = on_apart
        # Under None: the foreign keys, whole, without values but for those that are kept.
        self._groups: dict[InstanceId | None, _Group] = {}
        self._layout = layout
        self._prefix = layout.wishes_prefix.encode()
        before, _, after = layout.lock.partition(LOCK_PLACEHOLDER)
        self.lock_before, self.lock_after = before.encode(), after.encode()
        self.names: dict[bytes, bytes] = {}
        # Invariant: the id in `_last_head`, None when that is no id. (The empty one is no id.)
        self._last_head = b""
        self._last_id: InstanceId | None = None

    def ids(self) -> Set[InstanceId]:
        """Every instance that has a wish key or a lock."""
        return {instance for instance in self._groups if instance is not None}

    def keys_of(self, instance: InstanceId) -> Mapping[bytes, RawValue]:
        """The wish keys of one instance by what follows `/kvm/<id>/`, as of now; it stays as it is."""
        group = self._groups.get(instance)
        return _NOTHING if group is None else MappingProxyType(group.keys)

    def lock_of(self, instance: InstanceId) -> Entry | None:
        """The lock of one instance, None when it is absent."""
        group = self._groups.get(instance)
        return None if group is None else group.lock

    def naming(self, host: bytes) -> Set[InstanceId]:
        """The instances whose key `host` is this name, or whose lock contains it, maybe as a part of another name.

        One walk, for the first look at a large cluster.
        """
        return {
            instance
            for instance, group in self._groups.items()
            if instance is not None
            and (
                ((wish := group.keys.get(b"host")) is not None and names(wish.value, host))
                or (group.lock is not None and host in group.lock.value)
            )
        }

    def having(self, key: bytes) -> Set[InstanceId]:
        """The instances that have a wish key of that name. One walk, without a call for each."""
        return {instance for instance, group in self._groups.items() if instance is not None and key in group.keys}

    def apart(self, prefix: bytes) -> Mapping[bytes, RawValue]:
        """The keys that belong to no instance and begin so, whole, in no order; their values only if they are kept."""
        group = self._groups.get(None)
        return {} if group is None else {key: raw for key, raw in group.keys.items() if key.startswith(prefix)}

    def foreign(self) -> Mapping[bytes, str]:
        """Keys below the prefix that belong to no instance, no host and not the image library, with the reason."""
        group = self._groups.get(None)
        others = (self._layout.images_prefix.encode(), self._layout.host_wishes_prefix.encode())
        keys = () if group is None else (key for key in group.keys if not key.startswith(others))
        return {key: self._why_foreign(key) for key in keys}

    def begin(self, *, fresh: bool) -> Stage[InstanceId]:
        """See `Table.begin`."""
        return _GroupStage(self, self._groups, self._replace if fresh else None)

    def place(self, key: bytes) -> tuple[InstanceId | None, bytes | None] | None:
        """The owner of `key`: (id, name), (id, None) for a lock, (None, key) for a foreign one.

        None: the key is not for this table.
        """
        if key.endswith(self.lock_after) and key.startswith(self.lock_before):
            owner = self._id_of(key[len(self.lock_before) : len(key) - len(self.lock_after)])
            if owner is not None:
                return owner, None
        if not key.startswith(self._prefix):
            return None
        head, slash, name = key[len(self._prefix) :].partition(b"/")
        if not slash:
            return None, key
        instance = self._id_of(head)
        if instance is None:
            return None, key
        return instance, self.share(name)

    def _id_of(self, head: bytes) -> InstanceId | None:
        if head != self._last_head:
            # A list comes in key order: all keys of an instance come together.
            self._last_head, self._last_id = head, parse_id(head.decode(errors="replace"))
        return self._last_id

    def share(self, name: bytes) -> bytes:
        """The shared object for a key's name, where the name is shared."""
        if len(self.names) < NAMES_SHARED:
            return self.names.setdefault(name, name)
        return self.names.get(name, name)

    def _why_foreign(self, key: bytes) -> str:
        head, slash, _ = key[len(self._prefix) :].partition(b"/")
        if not slash:
            return f"no key of an instance: those begin with {self._prefix.decode()}<id>/"
        if not head:
            return "the instance's id is empty"
        return f"{head[:80].decode(errors='backslashreplace')!r} is no instance's id: {ID_RULE}"

    def _replace(self, groups: dict[InstanceId | None, _Group]) -> None:
        self._groups = groups


class _GroupStage:
    def __init__(
        self,
        table: Groups,
        old: dict[InstanceId | None, _Group],
        replace: Callable[[dict[InstanceId | None, _Group]], None] | None,
    ) -> None:
        self._table = table
        self._place = table.place
        self._old = old
        self._replace = replace
        self._new: dict[InstanceId | None, _Group] = {}
        self._changed: set[InstanceId | None] = set()

    def put(self, key: bytes, value: bytes, mod_revision: int, create_revision: int, lease: int) -> None:
        if (place := self._place(key)) is None:
            return
        instance, name = place
        kept = instance is not None or key.startswith(self._table.kept)
        value = value[: VALUE_LIMIT + 1] if kept else b""
        group = self._staged(instance)
        before = self._old.get(instance)
        if name is None:
            lock = None if before is None else before.lock
            same = _same(lock, value, mod_revision)
            group.lock = lock if same else Entry(value, mod_revision, create_revision, lease)
        else:
            wish = None if before is None else before.keys.get(name)
            same = _same(wish, value, mod_revision)
            group.keys[name] = wish if wish is not None and same else RawValue(value, mod_revision)
        if not same:
            self._changed.add(instance)

    def put_all(self, entries: Iterable[tuple[bytes, bytes, int, int, int]]) -> None:
        """See `Stage.put_all`. A list comes in key order, so the instance is looked up once for all its keys."""
        table, make = self._table, partial(tuple.__new__, RawValue)
        before, after, names = table.lock_before, table.lock_after, table.names
        # Invariant: a key that begins with `run` and is no lock is a wish of one instance, new here and staged with
        # `keys`. (The first value fits no key.)
        run, length = b"\0", 1
        keys: dict[bytes, RawValue] = {}
        for entry in entries:
            key = entry[0]
            if not key.startswith(run) or (key.endswith(after) and key.startswith(before)):
                instance, wish = table.place(key) or (None, None)
                if instance is None or wish is None or instance in self._old:
                    self.put(*entry)
                    continue
                length = len(key) - len(wish)
                run, keys = key[:length], self._staged(instance).keys
                self._changed.add(instance)
            name = key[length:]
            keys[names.get(name) or table.share(name)] = make((entry[1][: VALUE_LIMIT + 1], entry[2]))

    def delete(self, key: bytes) -> None:
        if (place := self._place(key)) is None:
            return
        instance, name = place
        group = self._staged(instance)
        if name is None:
            group.lock = None
        else:
            group.keys.pop(name, None)
        self._changed.add(instance)

    def commit(self) -> Set[InstanceId]:
        if self._replace is not None:
            # `put` noted what changed or is new; here the instances are found that lost keys.
            for instance, before in self._old.items():
                now = self._new.get(instance)
                if now is None or len(now.keys) < len(before.keys) or (before.lock and not now.lock):
                    self._changed.add(instance)
            self._replace(self._new)
        else:
            for instance, group in self._new.items():
                if group.keys or group.lock:
                    self._old[instance] = group
                else:
                    self._old.pop(instance, None)
        if None in self._changed:
            self._table.on_apart()
        return {instance for instance in self._changed if instance is not None}

    def _staged(self, instance: InstanceId | None) -> _Group:
        """The group that this stage may change: a copy of the published one, or an empty one."""
        group = self._new.get(instance)
        if group is None:
            before = None if self._replace is not None else self._old.get(instance)
            group = _Group() if before is None else _Group(dict(before.keys), before.lock)
            self._new[instance] = group
        return group
