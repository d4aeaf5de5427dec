"""A thread that becomes another user, and what it starts."""

from __future__ import annotations

import os
import pwd
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from kvmsupervisor.adapters.apart import become
from kvmsupervisor.adapters.users import QemuUser, qemu_users
from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.machine.spawn import Quarters

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

TOLD = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")


def user() -> QemuUser:
    return qemu_users(None, None).with_id(79994).joining(4242)


def status(words: Sequence[str], before: Callable[[], None] = lambda: None) -> dict[str, str]:
    """What the kernel says of a program that a thread starts after `before`."""

    def run() -> str:
        before()
        return subprocess.run([*words, "cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout

    lines = (line.partition(":\t") for line in in_own_thread(run).splitlines())
    return {name: value.strip() for name, _, value in lines if name in TOLD}


def test_it_is_what_setpriv_makes_of_it() -> None:
    """Law: a program started so has the user's ids and groups alone, no capability, and can gain none."""
    one = user()
    found = status((), lambda: become(one.uid, one.gid, one.groups))
    assert found == status(one.become())
    assert found["Uid"].split() == ["79994"] * 4
    assert found["Groups"].split() == ["4242", "79994"]
    assert {found[name] for name in TOLD if name.startswith("Cap")} == {"0" * 16}
    assert found["NoNewPrivs"] == "1"


def test_we_stay_who_we_are() -> None:
    """Law: no other thread changes, and nobody but root looks into the memory that was shared meanwhile."""
    one, before = user(), status(())
    status((), lambda: become(one.uid, one.gid, one.groups))
    assert status(()) == before
    nobody = pwd.getpwnam("nobody")
    looks = subprocess.run(
        ["cat", f"/proc/{os.getpid()}/maps"], user=nobody.pw_uid, capture_output=True, text=True, check=False
    )
    assert "Permission denied" in looks.stderr


def test_whoever_may_not_is_told() -> None:
    """Law: a thread that may not become another user says so, and starts nothing."""
    one = user()

    def twice() -> None:
        become(one.uid, one.gid, one.groups)
        become(one.uid, one.gid, one.groups)

    with pytest.raises(PermissionError, match="PR_CAPBSET_DROP"):
        status((), twice)


@pytest.mark.parametrize("is_alone", [True, False])
def test_who_shares_a_user_shares_no_thread_of_ours(is_alone: bool) -> None:
    """Law: nobody but the process to come may kill a thread of the supervisor; a program becomes one of several."""
    mine = threading.get_native_id()
    quarters = Quarters(user=replace(user(), is_alone=is_alone))
    found: dict[str, str] = {}

    def run() -> str:
        quarters.enter()
        assert threading.get_native_id() != mine
        found["thread"] = str(os.getresuid() == (0, 0, 0))
        words = [*quarters.wrap(["cat", "/proc/self/status"])]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert "79994\t79994\t79994\t79994" in in_own_thread(run)
    assert found["thread"] == str(not is_alone)
