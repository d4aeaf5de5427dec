"""Snapshots of a machine: all its disks at one instant, as keys wish for them and as statuses tell of them. Pure.

A snapshot `NAME` is `kvm-NAME` on every disk. On an image in Ceph it is `kvm-.NAME` until all disks have theirs: so one
that was cut off is told from a whole one, by whoever comes next, without anything else on record. See
docs/decisions/0041-snapshots.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import ID_PATTERN, ID_RULE
from kvmsupervisor.domain.values import Unfit

KEY = "snapshot/"
"""What the key of a snapshot begins with."""

ROLLBACK = "rollback_request"
"""The key that asks for a rollback: the snapshot's name, then a colon and any text that makes the value a new one."""

DELETE = "delete"
"""The value of a snapshot's key that has it taken away."""

MOST = 128
"""Most snapshot keys of one machine. Arbitrary: they fit into its status with room to spare, and Ceph allows 510."""

NOTE_LENGTH = 256
"""Characters of a note. Arbitrary: a line."""

REQUEST_LENGTH = 256
"""Characters of a `rollback_request`. Arbitrary, as for `restart_request`."""

_WHOLE, _UNFINISHED = "kvm-", "kvm-."


def stored(name: str) -> str:
    """What a snapshot is called on a disk."""
    return f"{_WHOLE}{name}"


def unfinished(name: str) -> str:
    """What it is called on an image in Ceph until all disks have theirs; no name begins with a dot."""
    return f"{_UNFINISHED}{name}"


def name_of(found: str) -> str | None:
    """The name of a whole snapshot by what a disk calls it; None for one that is unfinished, or not of ours."""
    name = found.removeprefix(_WHOLE) if found.startswith(_WHOLE) else ""
    return name if ID_PATTERN.fullmatch(name) else None


def unfinished_in(found: Iterable[str]) -> tuple[str, ...]:
    """Those of a disk's snapshots that were cut off, by name."""
    return tuple(one.removeprefix(_UNFINISHED) for one in found if one.startswith(_UNFINISHED))


def snapshot_name(text: str) -> str:
    """A snapshot's name, checked."""
    if not ID_PATTERN.fullmatch(text) or ".." in text:
        raise Unfit(f"the name of a snapshot is {ID_RULE}, without '..'")
    return text


@frozen
class SnapshotWish:
    """One key `snapshot/NAME`.

    Attributes:
        name: of the snapshot.
        delete: it is to be taken away; otherwise it is to exist.
        revision: `mod_revision` of the key.
    """

    name: str
    delete: bool
    revision: int


@frozen
class RollbackWish:
    """The key `rollback_request`.

    Attributes:
        request: its value.
        name: the snapshot that it names.
        revision: `mod_revision` of the key.
    """

    request: str
    name: str
    revision: int


def is_deleted(text: str) -> bool:
    """Whether the value of a snapshot's key has it taken away; any other text is a note, for people."""
    if len(text) > NOTE_LENGTH:
        raise Unfit(f"it is a note of at most {NOTE_LENGTH} characters, or `{DELETE}`")
    return text == DELETE


def rollback_request(text: str) -> str:
    """The snapshot's name in a `rollback_request`."""
    wanted = "it is the name of a snapshot, then a colon and any text that makes it a new request, such as before:1"
    name, _, _ = text.partition(":")
    if len(text) > REQUEST_LENGTH:
        raise Unfit(f"{wanted}, at most {REQUEST_LENGTH} characters")
    try:
        return snapshot_name(name)
    except Unfit as unfit:
        raise Unfit(f"{wanted}; {unfit}") from unfit


class How(StrEnum):
    """How a snapshot's instant came about, which says what its disks hold."""

    FROZEN = "frozen"
    """The guest's agent had frozen its file systems: they are as after an orderly unmount."""
    PAUSED = "paused"
    """The guest stood still: as after a power cut."""
    AT_ONCE = "at once"
    """One operation took all disks, while the guest ran: as after a power cut."""
    OFF = "off"
    """The machine was off: nothing was open."""
    FOUND = "found"
    """It was there when this host looked; how it was taken is not on record."""


@frozen(kw_only=True)
class Snap:
    """A snapshot that exists.

    Attributes:
        name: of it.
        at: when it was taken, RFC 3339 in UTC.
        size: bytes of its disks at that instant, all of them.
        how: how the instant came about.
        disks: the keys of the disks that have it; `firmware` is the image of its UEFI variables.
        why: why the guest's file systems were not frozen, for people; None where they were, or nothing ran.
    """

    name: str
    at: str
    size: int
    how: str
    disks: tuple[str, ...] = ()
    why: str | None = None

    @property
    def is_consistent(self) -> bool:
        """Whether its file systems are clean."""
        return self.how in {How.FROZEN, How.OFF}


@frozen(kw_only=True)
class Rollback:
    """The last rollback of a machine.

    Attributes:
        request: the value of the key that asked for it.
        name: of the snapshot.
        done: whether all disks are rolled back. While they are not the machine does not start.
    """

    request: str
    name: str
    done: bool = False


class Kind(StrEnum):
    """What is to be done about a machine's snapshots."""

    RELEASE = "the guest that an earlier supervisor has frozen or paused goes on"
    LOOK = "its snapshots are looked at"
    TAKE = "a snapshot is taken"
    DELETE = "a snapshot is taken away"
    ROLL_BACK = "it is rolled back"


@frozen(kw_only=True)
class Errand:
    """The next thing to be done about a machine's snapshots.

    Attributes:
        kind: what.
        name: of the snapshot; empty where it is about no single one.
        request: of a rollback.
        at: when it is due, CLOCK_BOOTTIME: later than now after a failure.
        begun: whether it is a rollback that was begun: it is finished before the machine starts.
    """

    kind: Kind
    name: str = ""
    request: str = ""
    at: float = 0.0
    begun: bool = False

    @property
    def said(self) -> str:
        """The same for people."""
        match self.kind:
            case Kind.TAKE:
                return f"the snapshot {self.name} is taken"
            case Kind.DELETE:
                return f"the snapshot {self.name} is taken away"
            case Kind.ROLL_BACK:
                return f"its disks are rolled back to the snapshot {self.name}"
            case _:
                return self.kind.value


def errands(
    wishes: Iterable[SnapshotWish],
    rollback: RollbackWish | None,
    *,
    known: Collection[str],
    last: Rollback | None,
    stale: bool,
    runs: bool,
    since: int,
) -> list[Errand]:
    """What is to be done, in this order; one that fails does not keep the others from being done.

    A deletion or a rollback that came with another history of etcd is no order of now (law 11): it waits until it is
    written again.

    Args:
        wishes: the keys of snapshots.
        rollback: the request, None without one.
        known: the snapshots that exist, as far as known.
        last: the last rollback.
        stale: whether what is known of a machine that runs may have changed.
        runs: whether its QEMU lives.
        since: the revision with which the present history began; 0 where it is the first.
    """
    if last is not None and not last.done:
        # Nothing else, and no start, before all disks are rolled back.
        return [] if runs else [Errand(kind=Kind.ROLL_BACK, name=last.name, request=last.request, begun=True)]
    wishes = tuple(wishes)
    found = [
        Errand(kind=Kind.DELETE, name=wish.name)
        for wish in wishes
        if wish.delete and wish.name in known and wish.revision > since
    ]
    if not runs and rollback is not None and rollback.revision > since and _is_new(rollback, last):
        found.append(Errand(kind=Kind.ROLL_BACK, name=rollback.name, request=rollback.request))
    found += [Errand(kind=Kind.TAKE, name=wish.name) for wish in wishes if not wish.delete and wish.name not in known]
    return [*found, Errand(kind=Kind.LOOK)] if stale and runs else found


def _is_new(rollback: RollbackWish, last: Rollback | None) -> bool:
    return last is None or last.request != rollback.request


def waits(rollback: RollbackWish | None, last: Rollback | None, *, since: int) -> str | None:
    """What a machine that runs says of a rollback that waits for its end; None where none does."""
    if rollback is None or not _is_new(rollback, last):
        return None
    if rollback.revision <= since:
        return f"`{ROLLBACK}` came with another history of etcd: write it again if it is meant"
    return f"it is rolled back to the snapshot {rollback.name} once it is off (`stop`)"


def lacking(disks: Collection[str], having: Collection[str]) -> tuple[str, ...]:
    """The disks that a snapshot does not have, by key."""
    return tuple(key for key in disks if key not in having)


@frozen(kw_only=True)
class Piece:
    """A snapshot of one disk.

    Attributes:
        size: bytes of the disk then.
        at: when it was taken, RFC 3339 in UTC; empty where the disk does not tell.
        is_protected: whether it is kept from being removed, where that is done.
    """

    size: int
    at: str
    is_protected: bool = True


@frozen
class Sight:
    """The snapshots on each disk of a machine, by key, by what the disk calls them."""

    pieces: Mapping[str, Mapping[str, Piece]]

    @property
    def begun(self) -> frozenset[str]:
        """Those that were on all disks once: on one at least they have their name."""
        return frozenset(name for held in self.pieces.values() for one in held if (name := name_of(one)) is not None)

    @property
    def unfinished(self) -> frozenset[str]:
        """Those of which an image has a part without its name."""
        return frozenset(name for held in self.pieces.values() for name in unfinished_in(held))

    def snaps(self, known: Mapping[str, Snap]) -> dict[str, Snap]:
        """All that are there, by name; what is known of one besides is kept."""
        found = {}
        for name in sorted(self.begun):
            having = {key: held[stored(name)] for key, held in self.pieces.items() if stored(name) in held}
            before = known.get(name)
            found[name] = Snap(
                name=name,
                at=before.at if before else min((piece.at for piece in having.values() if piece.at), default=""),
                size=before.size if before else sum(piece.size for piece in having.values()),
                how=before.how if before else How.FOUND,
                disks=tuple(having),
                why=before.why if before else None,
            )
        return found
