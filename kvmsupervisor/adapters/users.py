"""The user that QEMU runs as, and how QEMU becomes that user without any privilege.

`setpriv` (util-linux, setpriv(1)) changes the user before QEMU is executed: it takes 1 ms, and none of our code runs in
the forked process.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvmsupervisor.domain.capabilities import TO_BE_ANOTHER, lacking, what_is_lacking
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.words import option

DEFAULT_USER = "qemu"
"""The user when it exists and the setting names no other."""


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
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    setpriv: str

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


def qemu_user(wanted: str | None) -> QemuUser | None:
    """The user that QEMU runs as; None for the supervisor's own user.

    Args:
        wanted: the user's name; empty for the supervisor's own; None for `DEFAULT_USER` when it exists.

    Raises:
        NoSuchUser: the named user does not exist, or this process cannot start programs as that user.
        Unprivileged: this process lacks capabilities.
    """
    if wanted == "" or (wanted is None and os.geteuid() != 0):
        return None
    name = DEFAULT_USER if wanted is None else wanted
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        if wanted is None:
            return None
        raise NoSuchUser(
            f"KVM_QEMU_USER is {name}, and there is no such user: create it "
            f"(useradd --system --no-create-home {name}), or leave the setting empty"
        ) from None
    if entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise NoSuchUser(f"KVM_QEMU_USER is {name}, but only root can start programs as another user")
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise NoSuchUser(f"KVM_QEMU_USER is {name}, but the program setpriv is missing: install util-linux")
    missing = lacking(effective_capabilities(), TO_BE_ANOTHER)
    if missing:
        raise Unprivileged(
            f"QEMU runs as the user {name}, and here is too little for that: {what_is_lacking(missing)}; or let QEMU "
            "run as root (KVM_QEMU_USER empty), which confines it less"
        )
    groups = tuple(dict.fromkeys((entry.pw_gid, *os.getgrouplist(name, entry.pw_gid))))
    return QemuUser(name=name, uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, setpriv=setpriv)


def effective_capabilities(status: Path = Path("/proc/self/status")) -> int:
    """The present capabilities of this process, one bit for each (proc_pid_status(5), CapEff)."""
    lines = (line.partition(":\t") for line in status.read_text(encoding="utf-8", errors="replace").splitlines())
    return next(int(value, 16) for name, _, value in lines if name == "CapEff")
