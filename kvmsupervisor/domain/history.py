"""One history of one store: how it is told from another one, and its name (law 11).

A revision, an epoch or a missing key means something within one history only. A store that was restored from a backup
has another history from that backup on, whatever its revision and cluster id say. So has another store at the same
address. Histories are told apart by *witnesses*: the newest keys that were observed, each with the revision that wrote
it. Read at its own revision, such a key is the same in the same history and in no other; so all that came before it is
proven, too. A copy that was made a moment ago has all of them: it is told by another cluster id, if it has one.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import ClassVar

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.lock import Lock, Storage
from kvmsupervisor.domain.records import Unfit, compact, lined, parse

VERSION = 1
"""Of the key and of the file. A newer one is left alone."""

KEPT = 16
"""Witnesses that are kept. The newest alone decides while etcd has its revision; after a compaction the others still
contradict another history. Arbitrary: several, and cheap to write."""

EPOCHS_PER_HISTORY = 1_000_000
"""A lock that is taken in the n-th history of a cluster gets an epoch above n times this: a backup does not know how
often a machine started after the backup. Arbitrary; a machine that restarts every five minutes needs nine years for
it."""


@frozen(kw_only=True)
class Witness:
    """A key as it was observed.

    Attributes:
        key: its name.
        revision: of the write or deletion.
        digest: of the value; empty for a deletion.
    """

    key: str
    revision: int
    digest: str

    def is_value(self, value: bytes) -> bool:
        """Whether this is the value that was observed."""
        return self.digest == digest_of(value)


def digest_of(value: bytes) -> str:
    """The digest of a value: never empty."""
    return hashlib.blake2b(value, digest_size=12).hexdigest()


class Witnesses:
    """The newest keys that were observed."""

    def __init__(self, known: Iterable[Witness] = ()) -> None:
        self._by_key = {one.key: one for one in known}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._by_key)

    def saw(self, key: bytes, revision: int, value: bytes | None) -> bool:
        """Note a key that was written, or deleted (None); return whether it is among the newest."""
        try:
            name = key.decode()
        except UnicodeDecodeError:
            return False  # no key of ours; the next one serves as well
        before = self._by_key.get(name)
        if before is not None and before.revision >= revision:
            return False
        self._by_key[name] = Witness(key=name, revision=revision, digest="" if value is None else digest_of(value))
        if len(self._by_key) > 2 * KEPT:
            self._by_key = {one.key: one for one in self.newest()}
        return name in self._by_key

    def newest(self) -> list[Witness]:
        """At most `KEPT`, the newest first."""
        return heapq.nlargest(KEPT, self._by_key.values(), key=lambda one: one.revision)


class Verdict(Enum):
    """What a proof came to."""

    FIRST = "nothing was observed before"
    SAME = "the same history"
    OTHER = "another history"
    UNPROVEN = "what could prove it is compacted away"


def judge_now(witness: Witness, revision: int | None, value: bytes | None) -> Verdict:
    """The verdict by a key as it is now, where its own revision is compacted away.

    Args:
        witness: the key as it was observed.
        revision: its `mod_revision` now, None when it is absent.
        value: its value now.
    """
    if revision is None or revision > witness.revision:
        # Written or deleted since: that can happen in any history.
        return Verdict.UNPROVEN
    if revision == witness.revision and value is not None and witness.is_value(value):
        return Verdict.SAME
    # A key never goes back to an older revision.
    return Verdict.OTHER


@frozen(kw_only=True)
class HistoryName:
    """The value of the key `<facts>/history`: the name of the present history.

    A restored backup still holds the former name, so the first host that notices gives it a new one.

    Attributes:
        id: the name, random.
        number: how many histories this cluster had before it.
        after: the name of the history before it, empty for the first.
        by: the host that gave the name.
        hosts: those that had a session when it was noticed: nothing unfenceable starts before they have spoken. Emptied
            once they have.
        gone: those of them that are gone for good, as an operator said.
        found: the name that the store had, where that is an older one than `after`: a backup of then was restored.
    """

    id: str
    number: int = 0
    after: str = ""
    by: str = ""
    hosts: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    found: str = ""
    version: int = VERSION

    def follows(self, names: Iterable[str]) -> bool:
        """Whether it is one of these histories, or comes after one of them."""
        return not {self.id, self.after, self.found or self.after}.isdisjoint(names)

    def with_former(self, formers: tuple[Former, ...]) -> tuple[Former, ...]:
        """The former histories, and the one before this: a host that has booted since then knows that by its name."""
        if not self.after or any(one.id == self.after for one in formers):
            return formers
        return (Former(id=self.after), *formers)[-Former.KEPT :]

    def to_json(self) -> bytes:
        """As the key holds it."""
        return compact(self)

    @classmethod
    def from_json(cls, data: bytes) -> HistoryName | None:
        """Read the key, which anybody may have written; None when it is not one that this release understands."""
        try:
            name = parse(cls, data)
        except Unfit:
            return None
        return name if name.version == VERSION else None


@frozen(kw_only=True)
class Former:
    """A history that was left, for one of two reasons that look alike.

    This host was with another cluster's etcd for a while: then its own one goes on where it was. Or a backup was
    restored, and then an older one, which has the name of a history that nobody goes on with.

    Attributes:
        id: its name.
        cluster: the id of etcd's cluster; 0 where it is not known.
        hosts: those that had a session in it.
        witnesses: the newest keys that were observed in it; none where this host knows it by name only.
    """

    KEPT: ClassVar = 8
    WITNESSES: ClassVar = 4
    """How many former histories are remembered, and with how many keys. Arbitrary: a person who tries one etcd after
    the other makes no more, and the newest key alone decides while etcd has its revision."""

    id: str
    cluster: int = 0
    hosts: tuple[str, ...] = ()
    witnesses: tuple[Witness, ...] = ()

    def added_to(self, formers: Iterable[Former]) -> tuple[Former, ...]:
        """Those that are remembered once this one is left."""
        return (*(one for one in formers if one.id != self.id), self)[-self.KEPT :]


@frozen(kw_only=True)
class HistoryFile:
    """`_history.json` in the run directory: what a supervisor acted on, for its successor.

    Attributes:
        id: the name of the history, empty before it had one.
        number: how many histories there were before it.
        since: the revision of the change to it, 0 for the first: keys that are not newer came with the change.
        foreign: whether, by its name, this host's cluster was never in that store.
        members: hosts in a foreign store that are known to be of this host's cluster.
        spoken: whether this host's machines have their locks in it.
        hosts: those that had a session.
        witnesses: the newest keys that were observed.
        former: other histories in which this host has spoken, the newest last.
        cluster: the id of etcd's cluster; 0 where an earlier release has not noted it.
    """

    id: str = ""
    number: int = 0
    since: int = 0
    foreign: bool = False
    members: tuple[str, ...] = ()
    spoken: bool = True
    hosts: tuple[str, ...] = ()
    witnesses: tuple[Witness, ...] = ()
    former: tuple[Former, ...] = ()
    cluster: int = 0
    version: int = VERSION

    def to_json(self) -> bytes:
        """As the file holds it."""
        return lined(self)

    @classmethod
    def from_json(cls, data: bytes) -> HistoryFile | None:
        """Read the file; None when it is damaged, or a newer release's."""
        try:
            found = parse(cls, data)
        except Unfit:
            return None
        return found if found.version == VERSION else None


@frozen(kw_only=True)
class Era:
    """What a decision needs to know of the history that it is made in.

    Attributes:
        count: how many times this supervisor has begun anew with another history.
        number: how many histories this cluster had before it.
        since: the revision up to which everything came with the last change of history; 0 when there was none.
        mark: what a lock says that was written in it: its name; empty for the first history, or without a name.
        foreign: whether, by its name, this host's cluster was never in this store.
        members: hosts in a foreign store that are known to be of this host's cluster.
        awaited: the hosts that have not spoken in it yet.
        until: how long what can be fenced waits for them, CLOCK_BOOTTIME.
    """

    count: int = 0
    number: int = 0
    since: int = 0
    mark: str = ""
    foreign: bool = False
    members: frozenset[str] = frozenset()
    awaited: tuple[str, ...] = ()
    until: float = 0.0

    @property
    def epoch_floor(self) -> int:
        """Every epoch of this history is greater than this."""
        return self.number * EPOCHS_PER_HISTORY

    def has(self, mark: str | None, revision: int) -> bool:
        """Whether a lock was written in this history: by its revision, or by what it says.

        A host that learns of the change later than others takes a revision of that later time for the change.

        Args:
            mark: what the lock says.
            revision: of the lock.
        """
        return revision > self.since or (bool(self.mark) and mark == self.mark)

    @property
    def has_changed(self) -> bool:
        """Whether there was another history, or another store, before it."""
        return self.number > 0 or self.foreign

    def keeps_waiting(self, storage: Storage, now: float) -> bool:
        """Whether a machine with this storage must wait, because another host may be running it."""
        return bool(self.awaited) and (storage is Storage.UNFENCEABLE or now < self.until)

    def is_strange(self, host: str, revision: int) -> bool:
        """Whether a key belongs to another cluster, so that it says nothing of our machines.

        Args:
            host: the writer.
            revision: of the key.
        """
        return self.foreign and revision <= self.since and host not in self.members


FIRST_ERA = Era()
"""The era of a cluster whose etcd has always had one history."""


def is_older(lock: Lock, *, epoch: int, incarnation: str) -> bool:
    """Whether a lock is older than the incarnation that runs: it was restored, and is no takeover.

    Epochs grow within one history. Two equal ones come only from a change of history; then the greater name wins, on
    both hosts.
    """
    return (lock.epoch, lock.incarnation) < (epoch, incarnation)


def spoken_in(sessions: Mapping[str, str], name: str) -> frozenset[str]:
    """The hosts that have spoken in a history, by their sessions (host → the history in which it has spoken)."""
    return frozenset(host for host, said in sessions.items() if said == name)
