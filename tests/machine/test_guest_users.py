"""Which user each QEMU runs as."""

from __future__ import annotations

import pytest

from kvmsupervisor.adapters.users import QemuUser, QemuUsers
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.uids import UidRange
from kvmsupervisor.machine.guest_users import GuestUsers, NoUser

SPAN = UidRange(70000, 70017)
ONE, TWO = InstanceId("one"), InstanceId("two")


class Host:
    """A host with processes.

    Attributes:
        living: the numbers of users that have one.
    """

    def __init__(self, users: QemuUsers) -> None:
        self.living: set[int] = set()
        self.users = GuestUsers(users, lambda uid: uid in self.living)

    def taken(self, instance: InstanceId) -> int:
        user = self.users.take(instance)
        assert user is not None
        return user.uid


def test_a_number_is_not_given_away_while_a_process_has_it() -> None:
    """Law: not even when its instance is gone for all that is on record, and not to the instance itself."""
    host = Host(QemuUsers(uids=SPAN))
    first = host.taken(ONE)
    host.living.add(first)
    host.users.left(ONE)
    assert host.taken(ONE) != first
    host.living.clear()
    host.users.left(ONE)
    assert host.taken(ONE) == first


def test_accounts_keep_theirs() -> None:
    """Law: an account's number is no guest's."""
    preferred = next(SPAN.for_instance(ONE))
    assert Host(QemuUsers(uids=SPAN, avoided=frozenset({preferred}))).taken(ONE) != preferred


def test_none_is_left() -> None:
    """Law: a full range is said with its setting, and no number is had twice."""
    host = Host(QemuUsers(uids=SPAN))
    found = {host.taken(InstanceId(f"vm{number}")) for number in range(16)}
    assert len(found) == 16
    with pytest.raises(NoUser, match=r"70000-70017 is free \(KVM_QEMU_UIDS\): 16 QEMUs"):
        host.users.take(ONE)
    host.users.left(InstanceId("vm3"))
    assert host.taken(ONE) in found


def test_one_user_for_all() -> None:
    """Law: without a range nothing is taken."""
    one = QemuUser(name="qemu", uid=107, gid=107, groups=(107,), setpriv="")
    host = Host(QemuUsers(one=one))
    assert host.users.take(ONE) is host.users.take(TWO) is one
    assert Host(QemuUsers()).users.take(ONE) is None
