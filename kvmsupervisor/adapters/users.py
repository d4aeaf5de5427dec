"""The users that QEMUs run as, and how a program becomes one of them without any privilege.

`setpriv` (util-linux, setpriv(1)) changes the user before the program is executed: none of our code runs in the forked
process. A QEMU that has its user for itself goes without it: a thread that is that user starts it (`apart.become`).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvmsupervisor.domain.capabilities import TO_BE_ANOTHER, lacking, what_is_lacking
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.uids import DEFAULT_UIDS, UidRange
from kvmsupervisor.domain.words import option


class NoSuchUser(ValueError):
    """QEMU cannot run as the configured user. The message says why and what would be right."""


class Unprivileged(ValueError):
    """This process is root, but lacks capabilities to start QEMU as another user. The message names all of them."""


@frozen(kw_only=True)
class QemuUser:
    """An unprivileged user.

    Attributes:
        name: the user's name, for people.
        uid: the user's id.
        gid: the id of its primary group.
        groups: the ids of all its groups, and of those that devices need.
        setpriv: path of the program `setpriv`.
        is_alone: whether no other process is this user.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    setpriv: str
    is_alone: bool = False

    def joining(self, gid: int | None) -> QemuUser:
        """The same user, also a member of `gid`."""
        return self if gid is None or gid in self.groups else replace(self, groups=(*self.groups, gid))

    def become(self) -> Sequence[str]:
        """The prefix of a command that runs as this user: without capabilities, and with no way to get any."""
        return (
            self.setpriv,
            option("--reuid", str(self.uid)),
            option("--regid", str(self.gid)),
            option("--groups", ",".join(map(str, self.groups))),
            "--inh-caps=-all",
            "--ambient-caps=-all",
            "--bounding-set=-all",
            "--no-new-privs",
            "--",
        )


@frozen(kw_only=True)
class QemuUsers:
    """Who the QEMUs of this host run as: each as a user of its own, all as one, or as the supervisor.

    Attributes:
        uids: the range of their numbers; None when they have none of their own.
        one: the user of all of them; None when each has its own, or they run as the supervisor.
        setpriv: path of the program `setpriv`, with `uids`.
        groups: groups that those of `uids` are in, beside their own.
        avoided: numbers of `uids` that belong to an account.
        why_not_apart: why they have no users of their own; None when they have.
    """

    uids: UidRange | None = None
    one: QemuUser | None = None
    setpriv: str = ""
    groups: tuple[int, ...] = ()
    avoided: frozenset[int] = frozenset()
    why_not_apart: str | None = None

    def with_id(self, uid: int) -> QemuUser:
        """The user of this number, which no process has, with a group of the same number."""
        groups = (uid, *self.groups)
        return QemuUser(name=str(uid), uid=uid, gid=uid, groups=groups, setpriv=self.setpriv, is_alone=True)

    @property
    def of_tools(self) -> QemuUser | None:
        """Who programs run as that read images from outside; None for the supervisor's own user."""
        if self.uids is None:
            return self.one
        uid = self.uids.of_tools
        return QemuUser(name=str(uid), uid=uid, gid=uid, groups=(uid,), setpriv=self.setpriv)

    @property
    def is_own(self) -> bool:
        """Whether QEMUs run as the supervisor itself."""
        return self.uids is None and self.one is None

    def has(self, uid: int) -> bool:
        """Whether QEMUs, or the tools that read what comes from outside, run as this user."""
        if self.uids is not None:
            return self.uids.first <= uid <= self.uids.last
        return self.one is not None and self.one.uid == uid

    @property
    def title(self) -> str | None:
        """For people; None for the supervisor's own user."""
        return str(self.uids) if self.uids is not None else None if self.one is None else self.one.name

    def joining(self, gid: int | None) -> QemuUsers:
        """The same, also members of `gid`."""
        if gid is None or self.is_own:
            return self
        if self.one is not None:
            return replace(self, one=self.one.joining(gid))
        return self if gid in self.groups else replace(self, groups=(*self.groups, gid))


def qemu_users(name: str | None, uids: UidRange | None) -> QemuUsers:
    """Who QEMUs run as.

    Args:
        name: `KVM_QEMU_USER`: one user for all; empty for the supervisor's own; None for users of their own.
        uids: `KVM_QEMU_UIDS`; None for the default.

    Raises:
        NoSuchUser: the named user does not exist, or this process cannot start programs as another one.
        Unprivileged: this process lacks capabilities.
    """
    if name == "":
        return QemuUsers(why_not_apart="KVM_QEMU_USER is empty: QEMU runs as the supervisor")
    if name is None and os.geteuid() != 0:
        if uids is not None:
            raise NoSuchUser(f"KVM_QEMU_UIDS is {uids}, but only root can start programs as another user")
        return QemuUsers(why_not_apart="the supervisor is not root, so QEMU runs as the same user")
    if name is not None:
        one = _named(name)
        why = f"KVM_QEMU_USER is set: all QEMUs run as {name}; leave it out, and each has a user of its own"
        return QemuUsers(one=one, why_not_apart=why)
    wanted = uids or DEFAULT_UIDS
    if not is_mapped(wanted):
        raise NoSuchUser(
            f"KVM_QEMU_UIDS is {wanted}, and the user namespace of this process has no such users (/proc/self/uid_map, "
            "/proc/self/gid_map): name a range that it has, or one user for all QEMUs by KVM_QEMU_USER"
        )
    setpriv = _able_to_be(f"users of their own ({wanted})", "KVM_QEMU_UIDS")
    return QemuUsers(uids=wanted, setpriv=setpriv, avoided=accounts_in(wanted))


def _named(name: str) -> QemuUser | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise NoSuchUser(
            f"KVM_QEMU_USER is {name}, and there is no such user: create it "
            f"(useradd --system --no-create-home {name}), or leave the setting out"
        ) from None
    if entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise NoSuchUser(f"KVM_QEMU_USER is {name}, but only root can start programs as another user")
    setpriv = _able_to_be(f"the user {name}", "KVM_QEMU_USER")
    groups = tuple(dict.fromkeys((entry.pw_gid, *os.getgrouplist(name, entry.pw_gid))))
    return QemuUser(name=name, uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, setpriv=setpriv)


def _able_to_be(who: str, setting: str) -> str:
    """Path of `setpriv`, which root can use.

    Raises:
        NoSuchUser: there is none.
        Unprivileged: root lacks capabilities for it.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise NoSuchUser(f"QEMU is to run as {who} ({setting}), but the program setpriv is missing: install util-linux")
    missing = lacking(effective_capabilities(), TO_BE_ANOTHER)
    if missing:
        raise Unprivileged(
            f"QEMU runs as {who}, and here is too little for that: {what_is_lacking(missing)}; or let QEMU "
            "run as root (KVM_QEMU_USER empty), which confines it less"
        )
    return setpriv


def is_in_use(uid: int) -> bool:
    """Whether a process that is seen from here runs as this user.

    The kernel counts processes by user, so this reads none of them: getpriority(2) fails where there is none.
    """
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


def is_mapped(uids: UidRange, proc: Path = Path("/proc/self")) -> bool:
    """Whether our user namespace has all these users and groups (user_namespaces(7))."""

    def has(file: str) -> bool:
        spans = (tuple(map(int, line.split())) for line in (proc / file).read_text(encoding="ascii").splitlines())
        return any(inside <= uids.first and uids.last < inside + size for inside, _, size in spans)

    return has("uid_map") and has("gid_map")


def accounts_in(uids: UidRange, etc: Path = Path("/etc")) -> frozenset[int]:
    """The numbers of the range that are in passwd(5) or group(5). Directory services, maybe slow, are not asked."""
    found = set()
    for file in ("passwd", "group"):
        with contextlib.suppress(OSError):
            for line in (etc / file).read_text(encoding="utf-8", errors="replace").splitlines():
                number = [*line.split(":"), "", "", ""][2]
                if number.isdecimal() and uids.first <= int(number) <= uids.last:
                    found.add(int(number))
    return frozenset(found)


def subordinates_in(uids: UidRange, etc: Path = Path("/etc")) -> tuple[str, ...]:
    """The lines of subuid(5) and subgid(5) that share numbers with the range: containers may have the same users."""
    found = []
    for file in ("subuid", "subgid"):
        with contextlib.suppress(OSError):
            for line in (etc / file).read_text(encoding="utf-8", errors="replace").splitlines():
                _, first, size = [*line.split(":"), "", "", ""][:3]
                are_numbers = first.isdecimal() and size.isdecimal()
                if are_numbers and int(first) <= uids.last and uids.first < int(first) + int(size):
                    found.append(f"{etc / file}: {line}")
    return tuple(found)


def effective_capabilities(status: Path = Path("/proc/self/status")) -> int:
    """The present capabilities of this process, one bit for each (proc_pid_status(5), CapEff)."""
    lines = (line.partition(":\t") for line in status.read_text(encoding="utf-8", errors="replace").splitlines())
    return next(int(value, 16) for name, _, value in lines if name == "CapEff")
