"""Taps and bridges that a test makes up: what `adapters.network` does, without the kernel and without bridge.conf."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Container, Iterable
from pathlib import Path

from kvmsupervisor.adapters import ports
from kvmsupervisor.adapters.network import NetworkTrouble, Tap


class FakeNetwork:
    """The bridges of a host. Its taps are `tap7`, `tap8` and so on; each one's index is that number.

    Attributes:
        bridges: those that are there; None for all that a guest may name.
        denied: why no guest may be plugged into a bridge, by the bridge's name.
        trouble: why bridge.conf cannot be written; None when it can.
        hung: bridges whose helper never returns.
        taken: ports on which another program listens.
        taps: all that were opened, in order.
        allowed: all bridges that were allowed, in order.
        owner: for whom they were allowed last.
        kept: all bridges of `allowed` that were wanted, each time that the others were withdrawn.
    """

    def __init__(self) -> None:
        self.bridges: set[str] | None = None
        self.denied: dict[str, str] = {}
        self.trouble: str | None = None
        self.hung: set[str] = set()
        self.taken: set[int] = set()
        self.taps: list[Tap] = []
        self.allowed: list[str] = []
        self.owner: str | None = None
        self.kept: list[set[str]] = []
        self._numbers = itertools.count(7)
        self._names: dict[int, str] = {}

    def index_of(self, name: str) -> int | None:
        """Stands for `adapters.links.index_of`."""
        return int(name.removeprefix("tap")) if name in self._names.values() else None

    def port_trouble(self, address: str, port: int, protocol: str = "tcp") -> str | None:
        """Stands for `adapters.ports.trouble_with`."""
        return ports.TAKEN if port in self.taken else None

    async def open_tap(self, bridge: str, *, helper: Path | None = None) -> Tap:
        await asyncio.sleep(0)
        if bridge in self.hung:
            await asyncio.Event().wait()
        if self.bridges is not None and bridge not in self.bridges:
            raise NetworkTrouble(f"there is no bridge {bridge}")
        fd, vhost_fd = (os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(2))
        self._names[fd] = f"tap{next(self._numbers)}"
        self.taps.append(Tap(fd=fd, vhost_fd=vhost_fd))
        return self.taps[-1]

    def tap_name(self, fd: int) -> str:
        return self._names[fd]

    def allow_bridges(self, bridges: Iterable[str], *, owner: str | None = None) -> tuple[str, ...]:
        self.owner = owner
        self.allowed += bridges
        return ()

    def withdraw_bridges(self, wanted: Container[str], *, owner: str) -> tuple[str, ...]:
        if self.trouble is not None:
            raise NetworkTrouble(self.trouble)
        self.owner = owner
        self.kept.append({bridge for bridge in self.allowed if bridge in wanted})
        return ()

    def denial_of(self, bridge: str) -> str | None:
        return self.denied.get(bridge)
