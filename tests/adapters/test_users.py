"""The user that QEMU runs as, and what a program has left that was started as it."""

from __future__ import annotations

import os
import pwd
import subprocess
import time
from pathlib import Path

import pytest

from kvmsupervisor.adapters import users
from kvmsupervisor.adapters.users import (
    NoSuchUser,
    QemuUser,
    Unprivileged,
    accounts_in,
    effective_capabilities,
    is_in_use,
    is_mapped,
    qemu_users,
    subordinates_in,
)
from kvmsupervisor.domain.capabilities import NET_ADMIN, TO_BE_ANOTHER, Capability
from kvmsupervisor.domain.uids import DEFAULT_UIDS, UidRange

NOBODY = pwd.getpwnam("nobody")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def status_of(user: QemuUser) -> dict[str, str]:
    """`/proc/self/status` of a program that was started as `user`."""
    told = subprocess.run([*user.become(), "cat", "/proc/self/status"], capture_output=True, text=True, check=True)
    return dict(line.split(":\t", 1) for line in told.stdout.splitlines() if ":\t" in line)


def one_user(name: str) -> QemuUser:
    found = qemu_users(name, None)
    assert found.one is not None
    assert (found.uids, found.is_own, found.of_tools) == (None, False, found.one)
    assert found.why_not_apart is not None
    return found.one


def test_empty_means_our_own() -> None:
    """Law: an empty setting switches it off."""
    found = qemu_users("", None)
    assert (found.is_own, found.title, found.of_tools) == (True, None, None)
    assert "KVM_QEMU_USER is empty" in (found.why_not_apart or "")


def test_a_user_that_does_not_exist_stops_the_start() -> None:
    """Law: a named user that does not exist is an error that says what would be right."""
    with pytest.raises(NoSuchUser, match=r"KVM_QEMU_USER is no-such-user.*useradd --system") as caught:
        qemu_users("no-such-user", None)
    assert caught.value.__cause__ is None


def test_our_own_user_needs_no_becoming() -> None:
    """Law: named or not, our own user is what we are already."""
    assert qemu_users(pwd.getpwuid(os.geteuid()).pw_name, None).is_own


@as_root
def test_by_default_each_has_its_own() -> None:
    """Law: without a setting, users come from the default range, and image tools have one beside them."""
    found = qemu_users(None, None)
    assert (found.uids, found.one, found.title) == (DEFAULT_UIDS, None, "70000-79999")
    assert found.why_not_apart is None
    assert found.of_tools is not None
    assert found.of_tools.uid == DEFAULT_UIDS.first
    assert found.joining(36).joining(36).with_id(70123).groups == (70123, 36)
    named = qemu_users(None, UidRange(200000, 200099))
    assert named.title == "200000-200099"


def test_whoever_is_not_root_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: only root can become another: the default is not tried, and what was asked for is refused."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert qemu_users(None, None).is_own
    with pytest.raises(NoSuchUser, match="only root"):
        qemu_users("nobody", None)
    with pytest.raises(NoSuchUser, match="KVM_QEMU_UIDS is 70000-79999, but only root"):
        qemu_users(None, DEFAULT_UIDS)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY.pw_uid)
    assert qemu_users("nobody", None).is_own


def test_a_namespace_without_these_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: numbers that a rootless container does not have are no users: never root in silence."""
    (tmp_path / "gid_map").write_text("         0          0 4294967295\n")
    for spans, mapped in (("0 0 4294967295", True), ("0 100000 65536", False), ("0 0 70010", False)):
        (tmp_path / "uid_map").write_text(f"{spans}\n")
        assert is_mapped(DEFAULT_UIDS, tmp_path) is mapped
    monkeypatch.setattr(users, "is_mapped", lambda uids: False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(NoSuchUser, match=r"uid_map.*KVM_QEMU_USER"):
        qemu_users(None, None)


@as_root
def test_without_setpriv_it_cannot_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: the missing program is named, with its package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("nobody", None):
        with pytest.raises(NoSuchUser, match="setpriv is missing: install util-linux"):
            qemu_users(name, None)


@as_root
def test_a_user_is_in_use_while_a_process_has_it() -> None:
    """Law: the kernel knows of processes that no record here tells of; also of those that have ended, until reaped."""
    user = qemu_users(None, None).with_id(79999)
    assert not is_in_use(79999)
    with subprocess.Popen([*user.become(), "cat"], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        while not is_in_use(79999):
            assert time.monotonic() < deadline
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_in_use(79999)
    assert not is_in_use(79999)


def test_accounts_are_avoided(tmp_path: Path) -> None:
    """Law: numbers of accounts and groups are no guest's; those that containers may have are named."""
    (tmp_path / "passwd").write_text("root:x:0:0::/:/bin/sh\nann:x:70005:70006::/:/bin/sh\nbroken\n")
    (tmp_path / "group").write_text("ann:x:70006:\nbob:x:80000:\n")
    (tmp_path / "subuid").write_text("ann:100000:65536\nbob:65536:5000\nbroken\n")
    assert accounts_in(DEFAULT_UIDS, tmp_path) == {70005, 70006}
    assert subordinates_in(DEFAULT_UIDS, tmp_path) == (f"{tmp_path}/subuid: bob:65536:5000",)
    assert subordinates_in(UidRange(200000, 200099), tmp_path) == ()


@as_root
def test_all_groups_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: its own group comes first, each one once."""
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [77, gid, 78, 77])
    found = one_user("nobody")
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
    user = one_user("nobody")
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
    user = one_user("nobody")
    told = subprocess.run([*user.become(), "echo", "--reuid=0", "--"], capture_output=True, text=True, check=True)
    assert told.stdout == "--reuid=0 --\n"


@as_root
@pytest.mark.parametrize("less", TO_BE_ANOTHER, ids=lambda one: one.name)
def test_root_that_may_too_little_is_refused(monkeypatch: pytest.MonkeyPatch, less: Capability) -> None:
    """Law: what root lacks for QEMU to run as another user is named before anything is begun, and what to do."""
    monkeypatch.setattr(users, "effective_capabilities", lambda: ~(1 << less.number))
    with pytest.raises(Unprivileged, match=rf"as the user nobody.*CAP_{less.name} \(.*--cap-add={less.name};.*_USER"):
        qemu_users("nobody", None)
    assert qemu_users("", None).is_own


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
