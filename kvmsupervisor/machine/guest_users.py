"""Which user each QEMU of this host runs as. No two instances have one while a process of the first lives.

A number is on record with the incarnation before its process exists, so a successor knows it. Nothing on disk belongs
to the users of guests: what QEMU needs is opened for it. So a number is free once no process has it, and that is asked
of the kernel as well, which knows what no record here tells: QEMUs of other supervisors, and what a QEMU has left.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmsupervisor.adapters.users import QemuUser, QemuUsers, is_in_use
from kvmsupervisor.domain.keys import InstanceId


class NoUser(Exception):
    """No number is free. The message says what would help."""


class GuestUsers:
    """The users of one host's QEMUs.

    Args:
        users: who they are.
        is_in_use: whether a process runs as a user.
    """

    def __init__(self, users: QemuUsers, is_in_use: Callable[[int], bool] = is_in_use) -> None:
        self._users = users
        self._is_in_use = is_in_use
        # Invariant: the number of every QEMU that lives here or is being started, as far as it has one of its own.
        self._taken: dict[InstanceId, int] = {}

    def take(self, instance: InstanceId) -> QemuUser | None:
        """The user for a new QEMU; None for the supervisor's own. Nobody else gets its number before `left`.

        Raises:
            NoUser: all numbers are taken.
        """
        users = self._users
        if users.uids is None:
            return users.one
        others = {uid for other, uid in self._taken.items() if other != instance}
        for uid in users.uids.for_instance(instance):
            if uid not in others and uid not in users.avoided and not self._is_in_use(uid):
                self._taken[instance] = uid
                return users.with_id(uid)
        raise NoUser(
            f"none of the users {users.uids} is free (KVM_QEMU_UIDS): {len(self._taken)} QEMUs of this supervisor, "
            "other processes or accounts have them; make the range larger, or name another one"
        )

    def arrived(self, instance: InstanceId, uid: int | None) -> None:
        """Note the number of a living QEMU; None when it has none of its own."""
        if uid is not None:
            self._taken[instance] = uid

    def left(self, instance: InstanceId) -> None:
        """Note that the QEMU is proven gone, or was not started."""
        self._taken.pop(instance, None)
