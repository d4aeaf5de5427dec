"""What happened to an instance: which facts count as events, and how a history is cut to size.

An event is worth its place when a person asks "why did it restart last night?": phases, ends, moves, takeovers, held
orders. The history lies in two places: a file of the host, and one key in etcd that outlives the host. Both are bounded
whatever a guest, QEMU or a writer of keys does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.records import Unfit, build, load, shallow
from kvmsupervisor.domain.status import Phase, Status

MOST = 16
"""Events in the key of an instance."""

MOST_BYTES = 4096
"""Bytes of that key's value."""

LINE_BYTES = 2048
"""Bytes of a reason in the file. QEMU's last words fit; a reason that repeats a megabyte of them does not."""

REASON_BYTES = (600, 300, 150, 80, 40)
"""Bytes of a reason in the key: the longest of these with which all events fit. With 40 and names of 63 characters, 16
events still do not: then fewer events are kept."""

NAME_BYTES = 253
"""Bytes of the name of a host or an event: as long as a name in DNS may be."""

TIME_LENGTH = 40
"""Characters of a time. RFC 3339 with microseconds and a zone has 32."""

HELD, UNHELD, HALTED, GOES_ON = "instance.held", "instance.unheld", "instance.halted", "instance.goes_on"
PENDING, PROBLEMS = "instance.pending", "instance.problems"
TAKEN, PLACED = "lock.taken", "failover.taken"

TOLD: Mapping[str, str] = {
    "instance.ended": "QEMU has ended",
    "instance.adopted": "another supervisor process watches this QEMU from now on",
    "instance.unkillable": "QEMU was killed and does not end",
    "instance.unreadable": "its record cannot be read",
    "instance.error": "an error of the supervisor itself",
    "instance.notice": "",
    "instance.forgotten": "this host has nothing to do with it any more",
    GOES_ON: "its guest was let go on",
    "lock.reasserted": "the lock had vanished while QEMU runs here, and was written again",
    "lock.orphaned": "the host that has the lock has no session",
    "lock.fenced": "former storage clients are shut out in Ceph",
    "lock.left_unfenced": "",
    "move.offered": "this host is ready to take the guest",
    "move.unwelcome": "",
    "move.announced": "the guest's memory is being sent",
    "move.given": "the guest was handed over",
    "move.arrived": "the guest goes on here",
    "move.failed": "",
    "move.called_off": "",
    "move.went_back": "the guest goes on here after all",
    "disk.grown": "a disk was grown",
    "snapshot.taken": "",
    "snapshot.failed": "",
    "snapshot.deleted": "",
    "snapshot.rolled_back": "",
    "snapshot.released": "",
    "instance.medium_changed": "another medium is in its CD-ROM drive",
    "instance.plugged": "its guest was given a device",
    "instance.unplugged": "its guest has let go of a device",
    "instance.changed": "its machine was changed while it runs",
}
"""Lines of the log that are events, by their names there; and what they say where a line has no reason of its own."""

DUE = frozenset(
    {
        "instance.guest_reset",
        "instance.medium_changed",
        "instance.unkillable",
        "lock.reasserted",
        "move.called_off",
        "move.failed",
        "move.unwelcome",
        "move.went_back",
    }
)
"""Events that are written although the status may stay as it is. The others come with a change of it, or right before
one: to write them at once would delay that. And a supervisor that is replaced must not write a key for each machine."""

STEPS = frozenset(
    {
        "instance.starting",
        "instance.waiting",
        "instance.stopping",
        "instance.backoff",
        "instance.adopted",
        "lock.fenced",
    }
)
"""Steps on the way to something: the first to be left out. With disks in Ceph each turn of a crash loop has six."""

NEWEST = 4
"""The last events stay whatever they are: a step that lasts is what a person asks about."""

FILE_ONLY = frozenset({"instance.forgotten"})
"""Events for this host's file only: the key is another host's by then, or gone."""

RESET, RESET_SAYS = "instance.guest_reset", "the guest has rebooted itself"

_NUMBERS = re.compile(r"[0-9]+(?:\.[0-9]+)?")


@frozen(kw_only=True)
class Event:
    """Something that happened to an instance.

    Attributes:
        at: when, RFC 3339 in UTC. Wall clocks differ between hosts: the order of a history is its own.
        host: where.
        event: its name, that of the line in the log.
        epoch: of the lock.
        reason: one sentence.
        revision: the etcd revision of the wish acted on; 0 when unknown.
        end: the class of a QEMU's end (`exits.ExitClass`); empty for other events.
        times: how many events this one stands for; all happened on that host, for the same reason.
        since: when the first of these happened; empty for a single one.
    """

    at: str
    host: str
    event: str
    epoch: int = 0
    reason: str = ""
    revision: int = 0
    end: str = ""
    times: int = 1
    since: str = ""

    def to_object(self) -> dict[str, Any]:
        """As a JSON object, without what says nothing."""
        found = shallow(self)
        for name, nothing in (("revision", 0), ("end", ""), ("times", 1), ("since", "")):
            if found[name] == nothing:
                del found[name]
        return found

    @property
    def kind(self) -> tuple[str, str, str]:
        """What it has in common with its like: pauses and pids differ in each turn of a crash loop."""
        return self.event, self.host, _NUMBERS.sub("#", self.reason[:LINE_BYTES])

    def covers(self, other: Event) -> bool:
        """Whether `other` is among the events that this one stands for."""
        if (self.at, self.host, self.event, self.epoch) == (other.at, other.host, other.event, other.epoch):
            # The key may have less of a reason than the file.
            mine, theirs = self.reason.removesuffix("…"), other.reason.removesuffix("…")
            return mine.startswith(theirs) or theirs.startswith(mine)
        same = self.times > 1 and (self.event, self.host) == (other.event, other.host)
        # Epochs tell two of one second apart.
        return same and self.since <= other.at <= self.at and other.epoch <= self.epoch


def made(
    event: str,
    status: Status,
    *,
    at: str,
    reason: str | None = None,
    epoch: int | None = None,
    end: str = "",
    times: int = 1,
    untold: int = 0,
) -> Event:
    """An event of an instance, of bounded length.

    Args:
        event: its name.
        status: of the instance.
        at: when.
        reason: one sentence; None for what the event's name says.
        epoch: None for that of the status.
        end: the class of an end.
        times: how many it stands for.
        untold: how many before it were not noted, because there were too many.
    """
    said = TOLD.get(event, "") if reason is None else reason
    if untold:
        said = f"{said} ({untold} events before this one are left out)"
    return Event(
        at=at,
        host=cut(status.host, NAME_BYTES),
        event=cut(event, NAME_BYTES),
        epoch=status.epoch if epoch is None else epoch,
        reason=cut(said, LINE_BYTES),
        revision=status.revision,
        end=end,
        times=times,
    )


def said(event: str, details: Mapping[str, Any]) -> str | None:
    """What a line of the log says as an event; None where it is none.

    Args:
        event: its name.
        details: of that line.
    """
    if event == TAKEN:
        return None if details.get("reason") is None else str(details["reason"])
    if event not in TOLD:
        return None
    reason = str(details.get("reason") or TOLD[event])
    others = [f"{word} {details[name]}" for name, word in _DETAILS.items() if details.get(name)]
    return f"{reason} ({', '.join(others)})" if others else reason


_DETAILS = {
    "to": "to",
    "of": "from",
    "holder": "held by",
    "taken_from": "taken from",
    "medium": "now",
    "device": "in QEMU",
    "key": "by the key",
}
"""What else of a line is told, and how."""


def why_taken(previous: Lock | None, *, me: str, boot_id: str) -> str | None:
    """Why a lock was taken that another host had, or this one before it booted; None where that is no news."""
    if previous is None or (previous.host, previous.boot_id) == (me, boot_id):
        return None
    if previous.state is LockState.BROKEN:
        return f"the lock of {previous.host}, which a person has broken (break-lock), is taken"
    if previous.host == me:
        return f"{me} has booted since, and its guests ended with that"
    return f"the lock of {previous.host}, which has no session, is taken over"


def _for_the_next_start(status: Status) -> list[str]:
    """The keys that are pending, and of which nothing is being done while it runs."""
    return [key for key in status.pending if key not in status.changing]


def changes(before: Status, now: Status) -> Iterable[tuple[str, str]]:
    """The events between two statuses of a host: names, and reasons. Progress within a phase is none."""
    if now.phase is not before.phase or (now.phase is Phase.WAITING and _kind(now.reason) != _kind(before.reason)):
        yield f"instance.{now.phase}", now.reason
    if now.held is not before.held:
        yield (HELD, now.reason) if now.held else (UNHELD, "the order that was held waits no more")
    if now.halted != before.halted and now.phase is before.phase:
        yield (GOES_ON, TOLD[GOES_ON]) if now.halted is None else (HALTED, now.reason)
    waits = _for_the_next_start(now)
    if waits and waits != _for_the_next_start(before):
        yield PENDING, f"these keys take effect at the next start: {', '.join(waits)}"
    if now.problems != before.problems and now.problems and now.phase is before.phase:
        yield PROBLEMS, "; ".join(now.problems)


def _kind(reason: str) -> str:
    return _NUMBERS.sub("#", reason[:LINE_BYTES])


def joined(known: Sequence[Event], more: Iterable[Event]) -> tuple[Event, ...]:
    """A history and what came after it, each event once."""
    found = list(known)
    for event in more:
        if not any(one.covers(event) for one in found):
            found.append(event)
    return tuple(found)


def woven(own: Sequence[Event], known: Sequence[Event]) -> tuple[Event, ...]:
    """A host's own events and those that the key knows, each once, in the order in which they happened.

    Both are in that order, and times tell it only to the second, by clocks that differ. So what the key has between two
    events that both know stays between them.
    """
    found: list[Event] = []
    rest = list(known)
    for event in own:
        place = next((index for index, one in enumerate(rest) if event.covers(one)), None)
        if place is None:
            place = next((index for index, one in enumerate(rest) if one.at >= event.at), len(rest))
            found += rest[:place]
            del rest[:place]
        else:
            found += rest[:place]
            del rest[: place + 1]
        found.append(event)
    return (*found, *rest)


def fitted(events: Sequence[Event]) -> tuple[Event, ...]:
    """At most `MOST` events. Repetitions are counted before anything is left out: a crash loop erases no history.

    Of events of one kind the first and the last stay as they are told, with the number of those between in the last.
    Then the oldest steps go, and only then causes.
    """
    found = list(events)
    while len(found) > MOST:
        if not _fold(found):
            del found[_least(found)]
    return tuple(found)


def _least(events: Sequence[Event]) -> int:
    """Which to leave out: the oldest step, or else the oldest."""
    return next((index for index, one in enumerate(events[:-NEWEST]) if one.event in STEPS), 0)


def _fold(events: list[Event]) -> bool:
    """Count one event of the kind that is there most often in the next of its kind; False when none is there thrice."""
    places: dict[tuple[str, str, str], list[int]] = {}
    for index, event in enumerate(events):
        places.setdefault(event.kind, []).append(index)
    most = max(places.values(), key=len)
    if len(most) < 3:
        return False
    one, next_one = events[most[1]], events[most[2]]
    # A reader cannot tell these from an event that says the same, so its kind is the last one's.
    events[most[2]] = replace(next_one, times=one.times + next_one.times, since=one.since or one.at)
    del events[most[1]]
    return True


def to_json(events: Sequence[Event]) -> tuple[bytes, tuple[Event, ...]]:
    """The value of an instance's events key, and the events that are in it."""
    kept = fitted(events)
    while True:
        for limit in REASON_BYTES:
            value = _encode([{**one.to_object(), "reason": cut(one.reason, limit)} for one in kept])
            if len(value) <= MOST_BYTES:
                return value, kept
        least = _least(kept)
        kept = (*kept[:least], *kept[least + 1 :])


def from_json(data: bytes) -> tuple[Event, ...]:
    """Read an events key, which anybody may have written: what is no event is left out."""
    try:
        found = load(data)
    except Unfit:
        return ()
    return tuple(event for item in found if (event := _read(item)) is not None) if isinstance(found, list) else ()


def to_line(event: Event, instance: InstanceId) -> bytes:
    """One line of an instance's file."""
    return _encode({"instance": instance, **event.to_object()}) + b"\n"


def from_lines(data: bytes) -> tuple[Event, ...]:
    """Read an instance's file; a line that is torn, or is no event, is left out."""
    found = []
    for line in data.split(b"\n"):
        try:
            event = _read(load(line)) if line else None
        except Unfit:
            continue
        if event is not None:
            found.append(event)
    return tuple(found)


def in_order(histories: Mapping[InstanceId, Sequence[Event]]) -> list[tuple[InstanceId, Event]]:
    """The events of several instances by time, where each history has its own order: clocks of hosts differ."""
    every = []
    for name, history in histories.items():
        times = accumulate((when(event) for event in history), max)
        every += [(at, name, event) for at, event in zip(times, history, strict=True)]
    return [(name, event) for _, name, event in sorted(every, key=lambda one: one[0])]


def when(event: Event) -> datetime:
    """The time of an event; before all others when it is no time with a zone."""
    try:
        at = datetime.fromisoformat(event.at)
        return at.astimezone(UTC) if at.tzinfo is not None else _NEVER
    except (ValueError, OverflowError):
        # At the ends of the calendar a time has no UTC.
        return _NEVER


_NEVER = datetime.min.replace(tzinfo=UTC)


def _read(found: object) -> Event | None:
    try:
        event = build(Event, found)
    except Unfit:
        return None
    times = len(event.at) <= TIME_LENGTH and len(event.since) <= TIME_LENGTH
    fits = times and all(0 <= number < 1 << 63 for number in (event.epoch, event.revision, event.times - 1))
    if not fits:
        return None
    return replace(
        event,
        host=cut(event.host, NAME_BYTES),
        event=cut(event.event, NAME_BYTES),
        end=cut(event.end, NAME_BYTES),
        reason=cut(event.reason, LINE_BYTES),
    )


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _encode(value: Any) -> bytes:
    # A lone surrogate (of bytes that were no UTF-8) becomes what JSON writes for it.
    return _ENCODER.encode(value).encode(errors="backslashreplace")


def cut(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of JSON; what is left out is marked. Each escape sequence counts as written."""
    # A character takes one byte at least, so what is behind these cannot fit.
    head = text[: limit + 1]
    if len(head) == len(text) and _size(head) <= limit:
        return text
    size = _size("…")
    for index, char in enumerate(head):
        size += _size(char)
        if size > limit:
            return head[:index] + "…"
    return head + "…"


def _size(text: str) -> int:
    return len(text) if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text else _slow(text)


def _slow(text: str) -> int:
    return len(_encode(text)) - 2
