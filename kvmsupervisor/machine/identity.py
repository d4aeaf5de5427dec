"""The environment of a QEMU process: what it inherits, and the marks that identify it to a successor (laws 8 and 12).

A process belongs to an incarnation when its pid, its start time and the incarnation's name in its environment agree.
The name is random and used once, so the name alone tells processes apart. The prefix in the environment only says where
its keys are: a supervisor with another prefix finds the process, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from kvmsupervisor.adapters.process import Hidden
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.machine.system import Processes, QemuProcess

KEPT_ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "CEPH_CONF",
    "CEPH_ARGS",
)
"""The variables that QEMU inherits. No others: the supervisor's environment may hold secrets."""

PREFIX_MARK = "KVMSUPERVISOR_PREFIX"
INSTANCE_MARK = "KVMSUPERVISOR_INSTANCE"
INCARNATION_MARK = "KVMSUPERVISOR_INCARNATION"
FOLDER_MARK = "KVMSUPERVISOR_FOLDER"


@frozen(kw_only=True)
class ProcessIdentity:
    """What identifies a QEMU process as one incarnation: the marks in its environment.

    Attributes:
        prefix: `KVM_PREFIX` of the supervisor that started it.
        instance: the instance's id.
        incarnation: the incarnation's name.
        folder: the folder of its record.
    """

    prefix: str
    instance: str
    incarnation: str
    folder: Path

    def environment(self) -> dict[str, str]:
        """The marks as environment variables."""
        told = {PREFIX_MARK: self.prefix, FOLDER_MARK: str(self.folder)}
        return told | name_of(self.instance, self.incarnation)


def name_of(instance: str, incarnation: str | None) -> dict[str, str]:
    """The variables that identify the process, wherever it was started from; any of an instance's without a name."""
    return {INSTANCE_MARK: instance} | ({} if incarnation is None else {INCARNATION_MARK: incarnation})


def environment_of(identity: ProcessIdentity) -> dict[str, str]:
    """The whole environment of a QEMU process."""
    kept = {name: value for name in KEPT_ENVIRONMENT if (value := os.environ.get(name)) is not None}
    return kept | identity.environment()


def reopen(processes: Processes, record: Incarnation, *, on_end: Callable[[], None]) -> QemuProcess | None:
    """The living process of a record of this boot; None when the process is certainly gone.

    Args:
        processes: of this host.
        record: of the process; a record without a pid is looked up by the incarnation's name.
        on_end: called once when the process ends.

    Raises:
        Hidden: a process with that pid lives, and its identity cannot be read. The caller must not take it for gone.
    """
    names = name_of(record.instance, record.incarnation)
    candidates = [record.pid] if record.pid is not None else list(processes.find(names))
    for pid in candidates:
        found = processes.reopen(pid, starttime=record.starttime, marks=names, on_end=on_end)
        if found is not None:
            return found
    if record.pid is not None and record.starttime is not None and processes.is_alive(record.pid, record.starttime):
        # A guest that has broken into its QEMU may have overwritten the environment.
        raise Hidden(
            f"process {record.pid} lives with the start time on record, but its environment does not have "
            f"{INCARNATION_MARK}={record.incarnation}; end that process and start the supervisor again"
        )
    return None


def pid_of(
    processes: Processes, instance: str, incarnation: str | None, *, pid: int | None, starttime: int | None
) -> int | None:
    """The pid of an incarnation's living process, by pid and start time where they are known; None without one.

    Without an incarnation it may be any of the instance.
    """
    if pid is not None and starttime is not None:
        return pid if processes.is_alive(pid, starttime) else None
    return next(processes.find(name_of(instance, incarnation)), None)


def prefix_of(processes: Processes, pid: int) -> str | None:
    """The prefix of the supervisor that started a QEMU; None when the environment cannot be read."""
    return processes.environment_of(pid).get(PREFIX_MARK)


def seek(processes: Processes, folder: Path) -> tuple[int, int] | None:
    """Pid and start time of the living QEMU that was started from an instance's folder; None without one.

    Used when the record in that folder cannot be read.
    """
    for pid in processes.find({INSTANCE_MARK: folder.name}):
        found, starttime = folder_of(processes, pid, folder.name), processes.starttime_of(pid)
        if found is not None and is_same(found, folder) and starttime is not None:
            return pid, starttime
    return None


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same folder: /var/run is /run on most hosts."""
    return os.path.realpath(one) == os.path.realpath(other)


def folders_of_all(processes: Processes) -> dict[int, tuple[str, Path | None]]:
    """Every QEMU on this host that we may inspect: pid → instance, and its folder when that can be read."""
    found: dict[int, tuple[str, Path | None]] = {}
    for pid in processes.having(INSTANCE_MARK):
        instance = processes.environment_of(pid).get(INSTANCE_MARK, "")
        found[pid] = instance, folder_of(processes, pid, instance)
    return found


def folder_of(processes: Processes, pid: int, instance: str) -> Path | None:
    """The instance's folder of a QEMU; None when it cannot be read.

    A QEMU of an early release does not name the folder in its environment; its options name files in it.
    """
    named = processes.environment_of(pid).get(FOLDER_MARK)
    if named is not None:
        return Path(named)
    words = (re.search(rf"(/[^,=]*/{re.escape(instance)})/", word) for word in processes.command_line_of(pid))
    return next((Path(word[1]) for word in words if word), None)


def uuid_to_check(record: Incarnation, process: QemuProcess | None) -> str | None:
    """The uuid of the machine that must answer at the socket of an adopted process (law 8).

    None for our own child: it inherited the socket, which listened before the process existed.
    """
    argv = record.argv
    is_child = process is not None and process.is_child
    return None if is_child or "-uuid" not in argv else argv[argv.index("-uuid") + 1]
