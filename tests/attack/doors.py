"""The doors that code inside a QEMU tries, and what stops each. `doors.c` has a function for each name.

A door is written down with every measure that stops it by itself. So three things can be tried of each: with all
measures it is shut; without those that stop it, and with all others, it opens; and with any single one of them put back
it is shut again. The last says what still holds on a host that lacks one of them.

Where they come from: what escapes from virtual machines and containers did next, and what a user of Linux may do to
others. Sources: docs/system/security of QEMU (qemu.org); man 7 capabilities, namespaces, landlock, keyrings, sock_diag,
io_uring, shm_overview; man 2 open_by_handle_at, ptrace, pidfd_getfd, perf_event_open, userfaultfd, seccomp.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from kvmsupervisor.domain.frozen import frozen


class Measure(StrEnum):
    """What stops doors, and how the test leaves it out."""

    UNPRIVILEGED = "unprivileged"
    """It is not root, and has no capability; left out: `KVM_QEMU_USER=`."""
    USER = "user"
    """It has a user of its own; left out: it is the neighbour's, as with `KVM_QEMU_USER=NAME`."""
    VIEW = "view"
    """Namespaces of its own, without a network; left out: as where the supervisor lacks SYS_ADMIN."""
    LANDLOCK = "landlock"
    """A Landlock domain; left out: as on a kernel without."""
    FILTER = "filter"
    """QEMU's seccomp filter; left out: no `-sandbox`."""
    LIMITS = "limits"
    """Limits of threads, files and core files; left out: those of this test."""
    HANDED = "handed"
    """Files that it inherits have no right too many; left out: as anybody may read and write, and not sealed."""


ALL = frozenset(Measure)


@frozen
class Door:
    """One thing to try.

    Attributes:
        name: of a function in doors.c.
        argument: for it; `{…}` is something of `street.Neighbourhood`.
        stopped_by: every measure that stops it by itself.
        ends_it: whether QEMU's filter ends QEMU, or the thread that tries.
    """

    name: str
    argument: str
    stopped_by: frozenset[Measure]
    ends_it: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.argument}"


U, O, V, L = Measure.UNPRIVILEGED, Measure.USER, Measure.VIEW, Measure.LANDLOCK  # noqa: E741 - letters for a table
F, N, H = Measure.FILTER, Measure.LIMITS, Measure.HANDED

TABLE: tuple[tuple[str, str, tuple[Measure, ...]], ...] = (
    # Files of another guest, of the host, and of everybody.
    ("read_file", "{secret}", (O, V, L)),
    ("write_file", "{secret}", (O, V, L)),
    ("cut_file", "{secret}", (O, V, L)),
    ("lease", "{secret}", (O, V, L)),
    ("by_ring", "{secret}", (O, V, L)),
    ("read_file", "{shared}", (V, L)),
    ("write_file", "{shared}", (V, L)),
    ("lock", "{shared}", (V, L)),
    ("by_ring", "{shared}", (V, L)),
    ("see", "{shared}", (V,)),
    ("watch", "{shared}", (V,)),
    ("list", "{folder}", (V, L)),
    ("list", "/var", (V, L)),
    ("read_file", "/etc/passwd", (V, L)),
    ("list", "/sys/class/net", (V, L)),
    ("change_mode", "{own}", (O, V)),
    ("change_time", "{own}", (O, V)),
    ("delete", "{own}", (O, V, L)),
    ("rename_it", "{own}", (O, V, L)),
    ("create", "{home}/new", (O, V, L)),
    ("soft_link", "/etc/shadow {home}/console.log", (O, V, L)),
    ("hard_link", "{own} {everybody}/link", (O, V, L)),
    ("pipe_there", "{home}/pipe", (O, V, L)),
    ("socket_there", "{home}/qmp.sock", (O, V, L)),
    ("create", "{everybody}/new", (V, L)),
    ("fill", "{everybody}/large", (V, L)),
    ("soft_link", "/etc/shadow {everybody}/soft", (V, L)),
    ("pipe_there", "{everybody}/pipe", (V, L)),
    ("socket_there", "{everybody}/sock", (V, L)),
    ("fill", "/dev/shm/{name}", (V, L)),
    ("read_file", "{terminal}", (O, V, L)),
    # The kernel's own files.
    ("read_file", "/proc/kallsyms", (V,)),
    ("read_file", "/proc/net/tcp", (V,)),
    ("command_line", "1", (V,)),
    ("write_file", "/proc/sys/kernel/core_pattern", (U, V, L)),
    ("write_file", "/proc/sys/vm/overcommit_memory", (U, V, L)),
    ("write_file", "{cgroup}", (U, V, L)),
    ("write_file", "/dev/kmsg", (U, V, L)),
    # The process of another guest.
    ("command_line", "{pid}", (V,)),
    ("environment", "{pid}", (O, L)),
    ("memory", "{pid}", (O, L)),
    ("read_file", "/proc/{pid}/maps", (O, L)),
    ("list", "/proc/{pid}/fd", (O, L)),
    ("list", "/proc/{pid}/root/etc", (O, L)),
    ("write_file", "/proc/{pid}/oom_score_adj", (O, L)),
    ("send_signal", "{pid}", (O, L)),
    ("signal_by_pidfd", "{pid}", (O, L)),
    ("queue_signal", "{pid}", (O, L)),
    ("trace", "{pid}", (O, L)),
    ("read_memory", "{pid} {address:x}", (O, L)),
    ("write_memory", "{pid} {heap:x}", (O, L)),
    ("take_descriptor", "{pid}", (O, L)),
    ("futexes", "{pid}", (O, L)),
    ("compare", "{pid}", (O, L)),
    ("perf", "{pid}", (O, L)),
    ("limit_other", "{pid}", (O,)),
    ("slow_down", "{pid}", (O, F)),
    ("pin", "{pid}", (O, F)),
    ("idle_io", "{pid}", (O,)),
    # The supervisor.
    ("environment", "{parent}", (U,)),
    ("memory", "{parent}", (U, L)),
    ("take_descriptor", "{parent}", (U, L)),
    ("futexes", "{parent}", (U, L)),
    ("send_signal", "{parent}", (U, L)),
    # Sockets.
    ("reach_socket", "{qmp}", (O, V)),
    ("reach_socket", "{bus}", (V,)),
    ("reach_packets", "{consoles}", (U, V)),
    ("reach_abstract", "{abstract}", (V, L)),
    ("reach_tcp", "{etcd}", (V, L)),
    ("reach_udp", "{dns}", (V,)),
    ("listen_tcp", "{free} {etcd}", (V, L)),
    ("share_port", "{display}", (O, V, L)),
    ("see_listener", "{etcd}", (V,)),
    ("raw_socket", "2", (U,)),
    ("raw_socket", "17", (U,)),
    # Objects of the kernel that have no file.
    ("shared_memory", "{key}", (V,)),
    ("semaphores", "{key}", (V,)),
    ("messages", "{key}", (V,)),
    ("message_queue", "/{name}", (V, L)),
    ("key_of_user", "{name}", (O,)),
    ("key_of_session", "{name}", (V, L)),
    # What root may.
    ("leave_root", "-", (U,)),
    ("by_handle", "{handle}", (U,)),
    ("device_there", "{everybody}/null", (U, V, L)),
    ("change_owner", "{own}", (U, V)),
    ("watch_all", "-", (U,)),
    ("filter_program", "-", (U,)),
    ("page_faults", "-", (U,)),
    ("perf", "-1", (U,)),
    ("host_name", "-", (U,)),
    ("new_mount", "-", (U,)),
    ("type_for_others", "{terminal}", (U, V, L)),
    ("hurry", "-", (U, F)),
    ("real_time", "-", (U, F)),
    # What it has been given.
    ("map_for_writing", "{file}", (H,)),
    ("reopen_to_write", "{file}", (H, L)),
    ("reopen_to_write", "{sealed}", (H,)),
    ("reopen_to_read", "{log}", (H,)),
    ("make_longer", "{log}", (H,)),
    ("empty_it", "{log}", (H,)),
    ("many_threads", "{threads}", (N,)),
    ("many_files", "{files}", (N,)),
    ("dump_core", "-", (N,)),
)
"""Everything whose answer is an error. U: unprivileged, O: a user of its own, V: a view, L: Landlock, F: filter,
N: limits, H: handed."""

DEADLY: tuple[tuple[str, str, tuple[Measure, ...]], ...] = (
    ("fork_once", "-", (F,)),
    ("run", "/bin/true", (F,)),
    ("run_memory", "/bin/true", (F,)),
    ("user_namespace", "-", (F, V)),
    ("be_root", "-", (F, U)),
    ("enter_namespace", "/proc/{parent}/ns/net", (F, U, L)),
    ("mount_one", "{everybody}", (F, U, V, L)),
)
"""What QEMU's filter answers with the end of QEMU, or of the thread."""


def _doors() -> Iterator[Door]:
    for deadly, table in ((False, TABLE), (True, DEADLY)):
        for name, argument, measures in table:
            yield Door(name, argument, frozenset(measures), ends_it=deadly)


DOORS = tuple(_doors())
