"""This host's session, as far as those need it who write under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvmsupervisor.adapters.etcd.api import Compare


class SessionView(Protocol):
    """What the status writer needs of `session.Session`."""

    @property
    def held(self) -> bool:
        """Whether the session is held now."""

    def compare(self) -> Compare:
        """The condition "my session exists"."""

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever the session is won or lost; return a function that ends that."""
        ...
