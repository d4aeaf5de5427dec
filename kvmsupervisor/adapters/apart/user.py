"""Another user for one process to come, without any privilege.

Users and capabilities belong to a thread, as namespaces do, and what it starts inherits them (credentials(7)).
`setpriv` does the same in a program of its own, which is executed before QEMU: that takes as much as all walls.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmsupervisor.adapters.apart import calls


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Let this thread, which must end afterwards, be that user: without capabilities, and with no way to get any.

    The thread shares our memory. So from then on the kernel lets nobody but root look into it, as with every process
    whose user changes, and dumps no core of us unless the host wants that (ptrace(2) and core(5), "dumpable").

    Args:
        uid: of the user.
        gid: of its own group.
        groups: all groups that it is in.

    Raises:
        OSError: the kernel refuses. This thread may be half of that user then.
    """
    calls.empty_bounding_set()
    calls.set_user(uid, gid, groups)
    calls.drop_capabilities()
    calls.no_new_privileges()
