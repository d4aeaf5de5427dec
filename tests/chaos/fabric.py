"""A network of namespaces: one for each host, etcd member and the storage, joined by a bridge in one of its own.

A host's packets to and from others are lost by rules inside its own namespace, one way or both, as a switch or a cable
loses them: nothing is refused, connections stay, and TCP goes on where it was when the rules are gone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults import Way
from tests.support.net import Namespace, new_namespace
from tests.support.place import Place

SUBNET = "10.97.0"

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of the network."""

    name: str
    address: str
    inside: Namespace

    @property
    def place(self) -> Place:
        """For servers that are to run there."""
        return Place(address=self.address, around=self.inside.command)

    def lose(self, addresses: Iterable[str], way: Way) -> None:
        """Lose all packets to or from (as `way` says) these addresses, until `hear`."""
        for address in addresses:
            if way is not Way.OUT:
                self.inside.run("iptables", "-w", "10", "-A", "INPUT", "-s", address, "-j", "DROP")
            if way is not Way.IN:
                self.inside.run("iptables", "-w", "10", "-A", "OUTPUT", "-d", address, "-j", "DROP")

    def hear(self) -> None:
        """Lose nothing any more."""
        self.inside.run("iptables", "-w", "10", "-F")


class Fabric:
    """The bridge, and what is plugged into it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._inside = stack.enter_context(new_namespace())
        self._taken = 9
        self._inside.run("ip", "link", "add", "br0", "type", "bridge")
        self._inside.run("ip", "link", "set", "br0", "up")

    def node(self, name: str) -> Node:
        """A namespace of its own with an address, joined to the others."""
        self._taken += 1
        inside = self._stack.enter_context(new_namespace(beside=self._inside))
        address = f"{SUBNET}.{self._taken}"
        pair = ("ip", "link", "add", f"v{self._taken}", "type", "veth", "peer", "name", "lan0")
        self._inside.run(*pair, "netns", str(inside.pid))
        self._inside.run("ip", "link", "set", f"v{self._taken}", "master", "br0", "up")
        inside.run("ip", "address", "add", f"{address}/24", "dev", "lan0")
        inside.run("ip", "link", "set", "lan0", "up")
        return Node(name=name, address=address, inside=inside)


@contextmanager
def new_fabric() -> Iterator[Fabric]:
    """A network, until the end; its namespaces also end when this process is killed."""
    with ExitStack() as stack:
        yield Fabric(stack)


@contextmanager
def joined(inside: Namespace) -> Iterator[None]:
    """What this thread opens meanwhile is in that network, and so are threads that it starts, for good. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(network: int) -> None:
        if libc.setns(network, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    with Path("/proc/thread-self/ns/net").open() as home, Path(f"/proc/{inside.pid}/ns/net").open() as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())
