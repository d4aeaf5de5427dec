"""What a process without privileges may ask a supervisor for: the console of an instance. Pure.

One request, one JSON object. For a display the reply is one descriptor, and that is all. For a serial console the
connection stays, as the right to type does: `supervisor/serial.py` says what is told on it.
"""

from __future__ import annotations

import json
from enum import StrEnum

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import ID_RULE, InstanceId, parse_id

WHO_LENGTH = 120
"""Characters of a person's name, as others see it who want the keyboard. Arbitrary."""


class ConsoleKind(StrEnum):
    """Which console."""

    SERIAL = "serial"
    DISPLAY = "display"


class Unfit(ValueError):
    """What came is no request. The message says what would be one."""


@frozen(kw_only=True)
class ConsoleRequest:
    """A request for a console.

    Attributes:
        kind: which.
        instance: whose.
        who: asks for it, for others to read.
    """

    kind: ConsoleKind
    instance: InstanceId
    who: str = ""

    def to_json(self) -> bytes:
        """As it is sent: one line."""
        return encoded({"console": self.kind, "instance": self.instance, "who": self.who})

    @classmethod
    def parse(cls, data: bytes) -> ConsoleRequest:
        """Read what a client has sent.

        Raises:
            Unfit: it is none.
        """
        found = decoded(data)
        unknown = sorted(found.keys() - {"console", "instance", "who"})
        if unknown:
            raise Unfit(f"a request has no {unknown[0][:40]!r}: it has console, instance and who")
        kind, instance = found.get("console"), found.get("instance")
        if not isinstance(kind, str) or kind not in tuple(ConsoleKind):
            raise Unfit(f"console is one of {', '.join(ConsoleKind)}")
        if not isinstance(instance, str) or (name := parse_id(instance)) is None:
            raise Unfit(f"instance is {ID_RULE}")
        who = found.get("who", "")
        if not isinstance(who, str):
            raise Unfit("who is text")
        return cls(kind=ConsoleKind(kind), instance=name, who=plain(who))


def plain(who: str) -> str:
    """A name as one line of characters that can be seen."""
    return "".join(c if c.isprintable() else "?" for c in who[:WHO_LENGTH])


def encoded(message: dict[str, object]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


def decoded(data: bytes) -> dict[str, object]:
    """The object that a message is.

    Raises:
        Unfit: it is none.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Unfit("a message is one JSON object, in one line") from None
    if not isinstance(found, dict):
        raise Unfit("a message is one JSON object, in one line")
    return found
