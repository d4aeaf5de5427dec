"""Cgroups by the host's systemd: a transient scope for each process, requested over the system's D-Bus.

systemd owns the cgroup tree of its host, handles cgroup v1 and v2, and removes the scope when its process has ended.
The child is a shell at first. It waits for a line on its standard input, which comes once the child is in its scope;
then the child becomes QEMU.

Sources: org.freedesktop.systemd1(5), StartTransientUnit; systemd.scope(5); systemd.kill(5); D-Bus specification.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmsupervisor.adapters.cgroup.manager import PROC, Cgroup, CgroupFailed, Impossible, cgroups_of
from kvmsupervisor.adapters.cgroup.place import Place
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import TASKS, Limits, cpu_weight

if TYPE_CHECKING:
    from jeepney import Message
    from jeepney.io.asyncio import DBusConnection, DBusRouter

BUS = Path("/run/dbus/system_bus_socket")
SLICE = "machine.slice"
STOPS_AFTER = "kvmsupervisor-guests.service"
"""The host's unit that shuts guests down (deploy/coreos). The scopes are ordered before this unit: at the host's
shutdown systemd ends what is left in the scopes only after the unit has stopped."""

WAIT = 'read -r _ || exit 125; exec "$@" </dev/null'
"""The child's prefix, run by /bin/sh. When the supervisor ends, the child's standard input ends, and so does the
child."""

CALL_S = 5.0
"""How long one call may take. On an idle host it takes 2 ms."""

SETTLE_S = 10.0
"""How long systemd may take to move a process. On an idle host it takes 5 ms; a busy one starts units one by one."""

POLL_S = 0.001
"""How often to ask the kernel whether the process has been moved. Polled, because the D-Bus signal for it (JobRemoved)
would wake the supervisor for every job of the host, and because what the kernel says is what counts."""

TERM_S = 30
"""Seconds between SIGTERM and SIGKILL when somebody stops a scope. At SIGTERM QEMU flushes its disks and exits."""

Properties = list[tuple[str, tuple[str, Any]]]


class ScopeCgroup:
    """A scope that is still to be made, and the pipe on which its process waits."""

    enters_as_root = False

    def __init__(self, start: Callable[[int], Any], unit: str) -> None:
        self._start = start
        self._unit = unit
        self.stdin, self._gate = os.pipe2(os.O_CLOEXEC)

    def enter(self) -> None:
        """Nothing to do: systemd moves the process."""

    def wrap(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Wait for a line on standard input, then become `argv` with /dev/null as standard input."""
        return ("/bin/sh", "-c", WAIT, "sh", *argv)

    async def settle(self, pid: int) -> None:
        """Have systemd move the process, check that it was moved, and let it go on.

        Raises:
            CgroupFailed: systemd refuses, or does not do it in time. The process has been told to end.
        """
        try:
            await self._start(pid)
            async with asyncio.timeout(SETTLE_S):
                while not _is_in(pid, self._unit):  # noqa: ASYNC110 - /proc has no events
                    await asyncio.sleep(POLL_S)
            os.write(self._gate, b"\n")
        except TimeoutError as error:
            raise CgroupFailed(
                f"systemd has not moved process {pid} into {self._unit} within {SETTLE_S:g} s"
            ) from error
        except OSError as error:
            raise CgroupFailed(f"process {pid} ended before it was in {self._unit}: {error.strerror}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Close the pipe. A process that still waits on it ends."""
        for descriptor in {self.stdin, self._gate} - {-1}:
            os.close(descriptor)
        self.stdin = self._gate = -1


class Scopes:
    """Makes scopes.

    Keeps one connection, which subscribes to no signals and so costs nothing when idle. After the connection is lost
    (the bus was restarted) the next call opens another one.
    """

    name = "systemd"
    survives_container = True

    def __init__(self, bus: Path = BUS) -> None:
        self._bus = bus
        self._connection: DBusConnection | None = None
        self._router: DBusRouter | None = None
        self._opening = asyncio.Lock()

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Cgroup:
        """Open the pipe. The scope itself needs the process, so `settle` makes it."""
        unit = f"kvm-{instance}-{incarnation}.scope"

        async def start(pid: int) -> None:
            await self._start(unit, pid, f"KVM guest {instance}", limits)

        try:
            return ScopeCgroup(start, unit)
        except OSError as error:
            raise CgroupFailed(f"cannot open a pipe: {error.strerror}") from error

    async def remove(self, instance: InstanceId) -> None:
        """Nothing to do: systemd removes a scope whose processes have ended."""

    async def close(self) -> None:
        """Close the connection."""
        router, connection = self._router, self._connection
        self._router = self._connection = None
        if router is not None:
            with contextlib.suppress(OSError, EOFError):
                await router.__aexit__(None, None, None)
        if connection is not None:
            with contextlib.suppress(OSError):
                await connection.close()

    async def check(self) -> str:
        """Check that the host's systemd answers, and that it sees this process under the same pid.

        Returns:
            systemd's version.

        Raises:
            Impossible: it does not answer, or its pids are not ours.
        """
        from jeepney import DBusAddress, Properties, message_bus  # noqa: PLC0415 - loaded only where it is used

        manager = DBusAddress(
            "/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager"
        )
        try:
            router = await self._connected()
            pid = (await self._call(message_bus.GetConnectionUnixProcessID(router.unique_name)))[0]
            version = (await self._call(Properties(manager).get("Version")))[0][1]
        except CgroupFailed as error:
            raise Impossible(
                f"{error}; give the container -v /run/dbus/system_bus_socket:/run/dbus/system_bus_socket"
            ) from error
        if pid != os.getpid():
            raise Impossible(f"the host knows this process as {pid}, not as {os.getpid()}; run it with --pid=host")
        return str(version)

    async def _start(self, unit: str, pid: int, description: str, limits: Limits) -> None:
        """Ask for a scope with one process in it.

        Raises:
            CgroupFailed: systemd refuses, or cannot be reached.
        """
        from jeepney import DBusAddress, new_method_call  # noqa: PLC0415 - loaded only where it is used

        manager = DBusAddress(
            "/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager"
        )
        body: tuple[Any, ...] = (unit, "fail", _properties(pid, description, limits), [])
        await self._call(new_method_call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", body))

    async def _call(self, message: Message) -> tuple[Any, ...]:
        """Make one D-Bus call and return the body of its answer.

        Raises:
            CgroupFailed: no answer came, or an error.
        """
        from jeepney import DBusErrorResponse  # noqa: PLC0415 - loaded only where it is used
        from jeepney.io.common import RouterClosed  # noqa: PLC0415
        from jeepney.wrappers import unwrap_msg  # noqa: PLC0415

        router = await self._connected()
        try:
            async with asyncio.timeout(CALL_S):
                body: tuple[Any, ...] = unwrap_msg(await router.send_and_get_reply(message))
                return body
        except TimeoutError as error:
            raise CgroupFailed(f"the host's systemd did not answer over D-Bus within {CALL_S:g} s") from error
        except DBusErrorResponse as error:
            raise CgroupFailed(f"the host's systemd refuses: {error.data[0] if error.data else error.name}") from error
        except (RouterClosed, OSError, EOFError) as error:
            await self.close()
            raise CgroupFailed(f"the connection to the host's D-Bus was lost: {error}") from error

    async def _connected(self) -> DBusRouter:
        """The connection; opened when there is none, or it was lost.

        Raises:
            CgroupFailed: the bus cannot be reached.
        """
        async with self._opening:
            if self._connection is not None and self._connection.reader.at_eof():
                await self.close()
            if self._router is None:
                try:
                    async with asyncio.timeout(CALL_S):
                        self._connection, self._router = await _open(self._bus)
                except (OSError, EOFError, ValueError, TimeoutError) as error:
                    said = getattr(error, "strerror", None) or str(error) or "no answer"
                    raise CgroupFailed(f"cannot reach the host's D-Bus at {self._bus}: {said}") from error
            return self._router


async def _open(bus: Path) -> tuple[DBusConnection, DBusRouter]:
    """Connect, authenticate as this user and say hello.

    The library's own function leaves the socket open when it fails.

    Raises:
        OSError, EOFError: nothing listens on the socket, or the connection ended.
        ValueError: the bus refuses us, or what listens is not a bus.
    """
    from jeepney import message_bus  # noqa: PLC0415 - loaded only where it is used
    from jeepney.auth import BEGIN, Authenticator  # noqa: PLC0415
    from jeepney.io.asyncio import DBusConnection, DBusRouter  # noqa: PLC0415
    from jeepney.wrappers import unwrap_msg  # noqa: PLC0415

    reader, writer = await asyncio.open_unix_connection(bus)
    with contextlib.ExitStack() as undo:
        undo.callback(writer.close)
        authenticator = Authenticator()
        for line in authenticator:
            writer.write(line)
            answer = await reader.read(1024)
            # An empty answer means that the connection ended. "ERROR" makes the authenticator refuse that, too.
            authenticator.feed(answer or b"ERROR\r\n")
        writer.write(BEGIN)
        connection = DBusConnection(reader, writer)
        router = DBusRouter(connection)
        connection.unique_name = unwrap_msg(await router.send_and_get_reply(message_bus.Hello()))[0]
        undo.pop_all()
    return connection, router


async def open_scopes(place: Place, bus: Path = BUS) -> Scopes:
    """The manager that uses the host's systemd.

    Raises:
        Impossible: the host's systemd cannot be reached.
    """
    if not place.host_pids:
        raise Impossible("the container has a PID namespace of its own, with which its guests end; use --pid=host")
    scopes = Scopes(bus)
    try:
        await scopes.check()
    except Impossible:
        await scopes.close()
        raise
    return scopes


def _properties(pid: int, description: str, limits: Limits) -> Properties:
    properties: Properties = [
        ("Description", ("s", description)),
        ("PIDs", ("au", [pid])),
        ("Slice", ("s", SLICE)),
        ("CollectMode", ("s", "inactive-or-failed")),
        ("KillMode", ("s", "control-group")),
        ("TimeoutStopUSec", ("t", TERM_S * 1_000_000)),
        ("Before", ("as", [STOPS_AFTER])),
        ("TasksMax", ("t", TASKS)),
    ]
    if limits.cpu_shares is not None:
        properties.append(("CPUWeight", ("t", cpu_weight(limits.cpu_shares))))
    if limits.memory_limit is not None:
        properties.append(("MemoryMax", ("t", limits.memory_limit)))
    return properties


def _is_in(pid: int, unit: str) -> bool:
    """Whether the kernel has the process in the unit's cgroup.

    Raises:
        OSError: there is no such process.
    """
    found = cgroups_of(pid, PROC)
    return any(found.get(tree, "").endswith(f"/{unit}") for tree in ("", "name=systemd"))
