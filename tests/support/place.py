"""Where a server of a test listens, and how to run a program there: here on loopback, or in a network namespace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"


def _as_it_is(*argv: str) -> list[str]:
    return [*argv]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A network, and an address in it.

    Attributes:
        address: IPv4, of the server.
        around: makes the command line that runs a program in that network of the plain one.
    """

    address: str = LOOPBACK
    around: Callable[..., list[str]] = _as_it_is

    @property
    def is_here(self) -> bool:
        """Whether this process can connect to it."""
        return self.address == LOOPBACK


HERE = Place()
