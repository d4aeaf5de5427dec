"""The user that QEMU runs as, and what a program has left that was started as it."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import pytest

from kvmsupervisor.adapters import users
from kvmsupervisor.adapters.users import NoSuchUser, QemuUser, Unprivileged, effective_capabilities, qemu_user
from kvmsupervisor.domain.capabilities import NET_ADMIN, TO_BE_ANOTHER, Capability

NOBODY = pwd.getpwnam("nobody")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def status_of(user: QemuUser) -> dict[str, str]:
    """`/proc/self/status` of a program that was started as `user`."""
    told = subprocess.run([*user.become(), "cat", "/proc/self/status"], capture_output=True, text=True, check=True)
    return dict(line.split(":\t", 1) for line in told.stdout.splitlines() if ":\t" in line)


def test_empty_means_our_own() -> None:
    """Law: an empty setting switches it off."""
    assert qemu_user("") is None


def test_a_user_that_does_not_exist_stops_the_start() -> None:
    """Law: a named user that does not exist is an error that says what would be right."""
    with pytest.raises(NoSuchUser, match=r"KVM_QEMU_USER is no-such-user.*useradd --system") as caught:
        qemu_user("no-such-user")
    assert caught.value.__cause__ is None


def test_our_own_user_needs_no_becoming() -> None:
    """Law: named or not, our own user is what we are already."""
    assert qemu_user(pwd.getpwuid(os.geteuid()).pw_name) is None


@as_root
def test_the_default_is_used_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: without a setting it is the user qemu where that exists, and our own elsewhere."""
    monkeypatch.setattr(users, "DEFAULT_USER", "nobody")
    found = qemu_user(None)
    assert found is not None
    assert (found.name, found.uid, found.gid) == ("nobody", NOBODY.pw_uid, NOBODY.pw_gid)
    monkeypatch.setattr(users, "DEFAULT_USER", "no-such-user")
    assert qemu_user(None) is None


def test_whoever_is_not_root_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: only root can become another: the default is not tried, and a name is refused."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(users, "DEFAULT_USER", "nobody")
    assert qemu_user(None) is None
    with pytest.raises(NoSuchUser, match="only root"):
        qemu_user("nobody")
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY.pw_uid)
    assert qemu_user("nobody") is None


@as_root
def test_without_setpriv_it_cannot_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: the missing program is named, with its package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSuchUser, match="setpriv is missing: install util-linux"):
        qemu_user("nobody")


@as_root
def test_all_groups_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: its own group comes first, each one once."""
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [77, gid, 78, 77])
    found = qemu_user("nobody")
    assert found is not None
    assert found.groups == (NOBODY.pw_gid, 77, 78)


def test_joining_a_group() -> None:
    """Law: a group is added once; none changes nothing."""
    user = QemuUser(name="u", uid=1, gid=2, groups=(2,), setpriv="/setpriv")
    assert user.joining(None) is user
    assert user.joining(2) is user
    assert user.joining(108).groups == (2, 108)


@as_root
def test_no_privilege_is_left() -> None:
    """Law: a program started so has the user's ids and groups alone, no capability, and can gain none."""
    user = qemu_user("nobody")
    assert user is not None
    status = status_of(user.joining(4242))
    nothing = "0" * 16
    assert {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        "CapInh": nothing,
        "CapPrm": nothing,
        "CapEff": nothing,
        "CapBnd": nothing,
        "CapAmb": nothing,
    }
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"].split() == [str(NOBODY.pw_uid)] * 4
    assert status["Gid"].split() == [str(NOBODY.pw_gid)] * 4
    assert sorted(map(int, status["Groups"].split())) == sorted({*user.groups, 4242})


@as_root
def test_what_follows_is_the_command() -> None:
    """Law: words that look like options of setpriv are the program's own."""
    user = qemu_user("nobody")
    assert user is not None
    told = subprocess.run([*user.become(), "echo", "--reuid=0", "--"], capture_output=True, text=True, check=True)
    assert told.stdout == "--reuid=0 --\n"


@as_root
@pytest.mark.parametrize("less", TO_BE_ANOTHER, ids=lambda one: one.name)
def test_root_that_may_too_little_is_refused(monkeypatch: pytest.MonkeyPatch, less: Capability) -> None:
    """Law: what root lacks for QEMU to run as another user is named before anything is begun, and what to do."""
    monkeypatch.setattr(users, "effective_capabilities", lambda: ~(1 << less.number))
    with pytest.raises(Unprivileged, match=rf"as the user nobody.*CAP_{less.name} \(.*--cap-add={less.name};.*_USER"):
        qemu_user("nobody")
    assert qemu_user("") is None


def test_capabilities_are_numbered_as_the_kernel_does() -> None:
    """Law: setpriv lists those that the kernel has by their numbers, from 0 on."""
    listed = subprocess.run(["setpriv", "--list-caps"], capture_output=True, text=True, check=True).stdout.split()
    for one in (*TO_BE_ANOTHER, NET_ADMIN):
        assert listed[one.number] == one.name.lower()


def test_our_own_capabilities_are_read(tmp_path: Path) -> None:
    """Law: of the sets in /proc the effective one counts; a program without any has none."""
    (tmp_path / "status").write_text(
        "CapInh:\t0000000000000001\nCapEff:\t00000000a80425fb\nCapBnd:\t000001ffffffffff\n"
    )
    assert effective_capabilities(tmp_path / "status") == 0xA80425FB
    mine = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    assert effective_capabilities() == int(mine["CapEff"], 16)
