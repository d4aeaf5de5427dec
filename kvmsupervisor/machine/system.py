"""The ports to the host: processes, QMP, the guest's agent, bridges, device nodes, TCP ports, transfers of guests.

Code that starts a program or connects to one takes a `System` as an argument, as it takes the clock and the store.
`REAL` is the system of this host. Tests use another one (`tests/fakes/qemu.py`).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvmsupervisor.adapters import agent, devices, links, network, ports, process, transfer
from kvmsupervisor.adapters.devices import Device
from kvmsupervisor.adapters.network import Tap
from kvmsupervisor.adapters.qmp import Monitor
from kvmsupervisor.domain.agent import GuestFacts
from kvmsupervisor.domain.exits import WaitStatus
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.guard import keeper_client
from kvmsupervisor.guard.keeper_client import Keeper


class QemuProcess(Protocol):
    """One process, as `adapters.process.Process` describes it."""

    pid: int
    starttime: int
    is_child: bool
    ended: asyncio.Event
    status: WaitStatus

    @property
    def pidfd(self) -> int:
        """The pidfd; -1 once the process has ended or is no longer watched."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""

    async def terminate(self) -> None:
        """Send SIGTERM; return when the process has ended, or after some seconds."""

    def close(self) -> None:
        """Stop watching the process, which goes on."""


class Processes(Protocol):
    """The processes of a host, as the functions of `adapters.process` describe them."""

    def spawn(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_fd: int,
        pass_fds: Sequence[int],
        on_end: Callable[[], None],
        stdin: int | None = None,
        enter: Callable[[], None] | None = None,
    ) -> QemuProcess:
        """Start a program; raises SpawnFailed, OSError."""

    def spawn_in_front(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        pass_fds: Sequence[int],
        on_end: Callable[[], None],
    ) -> QemuProcess:
        """Start a program on our own standard streams; raises SpawnFailed."""

    def reopen(
        self, pid: int, *, starttime: int | None, marks: Mapping[str, str], on_end: Callable[[], None]
    ) -> QemuProcess | None:
        """Find a process again; None when it is gone; raises Hidden."""

    def find(self, marks: Mapping[str, str]) -> Iterator[int]:
        """The pids of all processes with these environment variables; raises Hidden."""

    def having(self, name: str) -> Iterator[int]:
        """The pids of all processes with an environment variable of this name."""

    def is_alive(self, pid: int, starttime: int) -> bool:
        """Whether the process that had this pid and start time lives."""

    def starttime_of(self, pid: int) -> int | None:
        """When a process started, in clock ticks since boot; None when it is gone."""

    def environment_of(self, pid: int) -> Mapping[str, str]:
        """The environment that a process was started with; empty when it cannot be read."""

    def command_line_of(self, pid: int) -> tuple[str, ...]:
        """The command line that a process was started with; empty when it is gone."""


class QmpConnection(Protocol):
    """One connection to one QEMU, as `adapters.qmp.Monitor` describes it."""

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 5.0,
        fd: int | None = None,
    ) -> Any:
        """Run one command; a descriptor may go with it; raises MonitorRefused, MonitorSilent, MonitorLost."""

    async def drained(self, timeout_s: float) -> None:
        """Wait until the connection has ended and `on_event` got its last event."""

    async def close(self) -> None:
        """End the connection. QEMU goes on."""


class Connect(Protocol):
    """Connects to QMP, as `adapters.qmp.Monitor.connect` does."""

    async def __call__(
        self,
        path: str,
        *,
        on_event: Callable[[str, Mapping[str, Any]], None],
        on_lost: Callable[[], None],
        timeout_s: float,
    ) -> QmpConnection:
        """Connect to the socket at `path`; raises MonitorLost, MonitorSilent."""


class Network(Protocol):
    """Taps and bridges, as the functions of `adapters.network` describe them."""

    async def open_tap(self, bridge: str, *, helper: Path | None = None) -> Tap:
        """A new tap on the bridge; raises NetworkTrouble."""

    def tap_name(self, fd: int) -> str:
        """The name of an open tap's interface."""

    def allow_bridges(self, bridges: Iterable[str], *, owner: str | None = None) -> tuple[str, ...]:
        """Allow taps on these bridges; raises NetworkTrouble."""

    def withdraw_bridges(self, wanted: Container[str], *, owner: str) -> tuple[str, ...]:
        """Take back what the owner has allowed for other bridges than these; raises NetworkTrouble."""

    def denial_of(self, bridge: str) -> str | None:
        """Why an administrator denies taps on this bridge; None when nothing denies them."""


class PortTrouble(Protocol):
    """Looks whether a port is free, as `adapters.ports.trouble_with` does."""

    def __call__(self, address: str, port: int, protocol: str = "tcp") -> str | None:
        """Why a server cannot listen there; None when it can."""


class Descriptor(Protocol):
    """A socket that QEMU is to get."""

    def fileno(self) -> int:
        """Its number."""

    def close(self) -> None:
        """Close it here."""


class Relay(Protocol):
    """Carries what a QEMU sends and receives, as `adapters.transfer.Relay` describes it."""

    @property
    def qemus_end(self) -> Descriptor:
        """To be given to QEMU, and closed afterwards."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is carried any more."""

    def cut(self) -> None:
        """Cut the connection, on both sides."""


class Connection(Protocol):
    """A connection to the other side of a live move, as `adapters.transfer.Connection` describes it."""

    instance: str

    async def send(self, message: Mapping[str, Any], *, timeout_s: float) -> None:
        """Send one message; raises TransferFailed."""

    async def receive(self, *, timeout_s: float) -> dict[str, Any]:
        """The next message of the other side; raises TransferFailed."""

    @property
    def is_alive(self) -> bool:
        """Whether the other side has not hung up, as far as is known."""

    def carry(self, on_end: Callable[[], None]) -> Relay:
        """Carry what a QEMU sends and receives from now on."""

    def close(self) -> None:
        """Hang up."""


class Listener(Protocol):
    """Takes the connections of sources, as `adapters.transfer.Listener` describes it."""

    port: int

    async def run(self) -> None:
        """Take connections, for ever."""

    def close(self) -> None:
        """Listen no more."""


class Transfers(Protocol):
    """Connections over which guests are moved, as the functions of `adapters.transfer` make them."""

    async def call(self, host: str, port: int, *, instance: str, key: bytes, timeout_s: float) -> Connection:
        """Connect to a target that knows `key`; raises TransferFailed."""

    def listen(
        self,
        address: str,
        port: int,
        *,
        key_of: Callable[[str], bytes | None],
        on_call: Callable[[Connection], None],
    ) -> Listener:
        """Take connections of sources; raises OSError."""


class Count(Protocol):
    """Has the guest's agent do something to its file systems, as `adapters.agent.thaw` does."""

    async def __call__(self, path: Path, *, timeout_s: float) -> int:
        """To how many; raises AgentSilent."""
        ...


class Keep(Protocol):
    """Starts a keeper, as `guard.keeper_client.keep` does."""

    async def __call__(self, *, monitors: Sequence[Path], agent: Path, limit_s: float) -> Keeper:
        """See there; raises KeeperTrouble."""
        ...


@frozen(kw_only=True)
class System:
    """The ports to one host.

    Attributes:
        processes: the processes of the host.
        connect: connects to a QMP socket.
        ask_agent: asks the guest's agent at the socket of that path; raises AgentSilent.
        freeze: has it freeze the guest's file systems; see `adapters.agent.freeze`.
        thaw: has it thaw them; see there.
        keep: starts what ends a standstill should this supervisor not come to it; see `guard.keeper_client`.
        network: taps and bridges.
        index_of: returns the index of a network interface; None when there is no interface of that name.
        ensure_device: makes a device node if it is missing, and returns whether it did; raises DeviceTrouble.
        port_trouble: returns why a server cannot listen at an address and a port; None when it can.
        transfers: connections over which guests are moved.
    """

    processes: Processes
    connect: Connect
    ask_agent: Callable[[Path], Awaitable[GuestFacts]]
    freeze: Count
    thaw: Count
    keep: Keep
    network: Network
    index_of: Callable[[str], int | None]
    ensure_device: Callable[[Device], bool]
    port_trouble: PortTrouble
    transfers: Transfers


REAL = System(
    processes=process,
    connect=Monitor.connect,
    ask_agent=agent.ask,
    freeze=agent.freeze,
    thaw=agent.thaw,
    keep=keeper_client.keep,
    network=network,
    index_of=links.index_of,
    ensure_device=devices.ensure,
    port_trouble=ports.trouble_with,
    transfers=transfer,
)
"""The host that this program runs on."""
