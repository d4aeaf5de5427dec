"""Tickets for consoles: a WebSocket can bring no header of its own, and a browser opens one for any page.

Who may have a console asks for a ticket, as for an act; the address of the WebSocket holds it. A ticket is good for one
person, one console, a few seconds and one try, whatever comes of that. So it is no secret any more once an address was
written into a log. Only digests are kept.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId

GOOD_S = 10.0
"""For how long. Arbitrary: a script uses it at once; a slow network takes a second."""

BYTES = 24
"""192 bits, which nobody guesses."""

MOST, MOST_OF_ONE = 1000, 20
"""How many there may be, and of one person. Arbitrary: who opens more consoles in ten seconds is a program."""


class TooMany(Exception):
    """There is no ticket now."""


@frozen
class Purpose:
    """What a ticket is good for.

    Attributes:
        person: by name.
        console: `serial` or `display`.
        instance: of which.
    """

    person: str
    console: str
    instance: InstanceId


class Tickets:
    """Those that were given out.

    Args:
        now: seconds of a clock that never goes back.
        token: makes one of so many bytes.
    """

    def __init__(self, now: Callable[[], float], token: Callable[[int], str] = secrets.token_urlsafe) -> None:
        self._now = now
        self._token = token
        # In the order in which they end.
        self._open: OrderedDict[bytes, tuple[Purpose, float]] = OrderedDict()

    def give(self, purpose: Purpose) -> str:
        """A new one.

        Raises:
            TooMany: there are as many as there may be.
        """
        self._forget()
        of_one = sum(other.person == purpose.person for other, _ in self._open.values())
        if len(self._open) >= MOST or of_one >= MOST_OF_ONE:
            raise TooMany(f"there are too many tickets for consoles that nobody has used; wait {GOOD_S:g} s")
        ticket = self._token(BYTES)
        self._open[_digest(ticket)] = purpose, self._now() + GOOD_S
        return ticket

    def use(self, ticket: str, purpose: Purpose | None) -> bool:
        """Whether it is good for that; from now on it is good for nothing. None is nothing that one is good for."""
        found, until = self._open.pop(_digest(ticket), (None, 0.0))
        return found is not None and found == purpose and self._now() < until

    def _forget(self) -> None:
        now = self._now()
        while self._open:
            digest, (_, until) = next(iter(self._open.items()))
            if until > now:
                return
            del self._open[digest]


def _digest(ticket: str) -> bytes:
    """Of a ticket: what is looked up tells nobody how much of a guess is right."""
    return hashlib.sha256(ticket.encode(errors="surrogateescape")).digest()
