"""What people want of a whole host, and how far it has come: the keys of a drain and of a return. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.placement import Written
from kvmsupervisor.domain.records import Unfit, compact, parse
from kvmsupervisor.domain.values import show_bytes

VERSION = 1
"""Of the fact. One of a newer release is not read."""


class Mode(StrEnum):
    """How a host empties itself. Each does what the one before it does, and more."""

    LIVE = "live"
    COLD = "cold"
    STOP = "stop"

    @property
    def stops_guests(self) -> bool:
        """Whether a guest may be stopped, to be started elsewhere."""
        return self is not Mode.LIVE


@frozen(kw_only=True)
class HostWish:
    """What the keys `/kvm/.hosts/<host>/drain` and `…/return` say.

    Attributes:
        drain: how the host is to empty itself; None: it is in service.
        drain_revision: `mod_revision` of that key, 0 without it.
        return_revision: `mod_revision` of the key `return`: what was placed elsewhere before it comes back. 0 without.
        return_cold: whether guests may be stopped for that.
        odd: what should be otherwise in one of the values, for people; empty when nothing should.
    """

    drain: Mode | None = None
    drain_revision: int = 0
    return_revision: int = 0
    return_cold: bool = False
    odd: str = ""

    @classmethod
    def of(cls, drain: Written | None, back: Written | None) -> HostWish:
        """Read the two keys as etcd has them; None when one is absent.

        A value that is no mode counts as `live`, which stops no guest: whoever writes this key wants the host empty.
        """
        mode, odd = (None, "") if drain is None else _mode(drain.value, (Mode.LIVE, Mode.COLD, Mode.STOP), "drain")
        how, odd_too = (None, "") if back is None else _mode(back.value, (Mode.LIVE, Mode.COLD), "return")
        return cls(
            drain=mode,
            drain_revision=0 if drain is None else drain.mod_revision,
            return_revision=0 if back is None else back.mod_revision,
            return_cold=how is Mode.COLD,
            odd=odd or odd_too,
        )

    @property
    def title(self) -> str:
        """The drain as a clause."""
        return f"this host drains ({self.drain})"


IN_SERVICE = HostWish()


def _mode(value: bytes, right: tuple[Mode, ...], key: str) -> tuple[Mode, str]:
    text = value.decode(errors="replace").strip()
    if not text:
        return Mode.LIVE, ""
    try:
        mode = Mode(text)
    except ValueError:
        mode = None
    if mode in right:
        return mode, ""
    return (
        Mode.LIVE,
        f"its key `{key}` holds {show_bytes(value)}, which counts as live; {', '.join(right)} would be right",
    )


@frozen(kw_only=True)
class HostProgress:
    """The value of `/kvmsupervisor/drains/<host>`: how far a drain, or a return, has come.

    Attributes:
        host: which.
        mode: of the drain; None for a return.
        of: `mod_revision` of the key that asks for it.
        since: when this host began, RFC 3339 in UTC.
        left: the instances that run here and are to go; in a return those that stand elsewhere.
        moving: those of them that are on their way, each with the host that it goes to.
        moved: those that have come there, likewise.
        refused: why the others cannot go, or cannot go yet.
        later: those of them that are asked for elsewhere again after a pause.
        drained: since when no QEMU is left here; None before.
        notice: what a person should know besides, or empty.
    """

    host: str
    mode: Mode | None
    of: int
    since: str
    left: tuple[str, ...] = ()
    moving: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    later: tuple[str, ...] = ()
    drained: str | None = None
    notice: str = ""
    version: int = VERSION

    @property
    def waits_for_people(self) -> bool:
        """Whether nothing goes on by itself just now: none is on its way, and each that is left says why it stays."""
        return not self.moving and not self.later and bool(self.left) and self.refused.keys() >= {*self.left}

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """How many machines are in each state."""
        states = {"left": self.left, "moving": self.moving, "moved": self.moved, "refused": self.refused}
        return tuple((state, len(machines)) for state, machines in states.items())

    def to_json(self) -> bytes:
        """The value of the key."""
        return compact(self)

    @classmethod
    def from_json(cls, data: bytes) -> HostProgress | None:
        """Read the key; None when it is not one that this release understands."""
        try:
            found = parse(cls, data)
        except Unfit:
            return None
        return found if found.version == VERSION else None


def summary(found: HostProgress) -> str:
    """How far a drain, or a return, has come, in one line."""
    if found.drained is not None and not found.left:
        return f"empty since {found.drained}"
    parts = [f"{len(found.left)} {'left' if found.mode is not None else 'to come back'}"]
    if found.moving:
        parts.append(f"moving: {named_moves(found.moving)}")
    if found.moved:
        parts.append(f"{len(found.moved)} moved")
    if found.refused:
        parts.append("; ".join(f"{name} stays: {why}" for name, why in found.refused.items()))
    return ", ".join(parts)


def named_moves(moves: Mapping[str, str]) -> str:
    """Each machine with the host that it goes to."""
    return ", ".join(f"{name} → {host}" for name, host in moves.items()) or "none"


def title_of(wish: HostWish, found: HostProgress | None) -> str | None:
    """The state of a host that drains, in one word; None for one in service."""
    if wish.drain is None:
        return None
    return "drained" if found is not None and found.of == wish.drain_revision and found.drained else "draining"
