"""Device nodes: made, left alone, refused, and opened to a group."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvmsupervisor.adapters import devices
from kvmsupervisor.adapters.devices import Device, DeviceTrouble, Grant, ensure, grant

AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root makes device nodes and gives files away")

QEMU, KVM_GROUP, OTHER = 12001, 12002, 12003
"""Groups; nobody needs to have them."""


@pytest.fixture
def misc(tmp_path: Path) -> Path:
    """A /proc/misc with tun and kvm."""
    path = tmp_path / "misc"
    path.write_text("258 vsock\n200 tun\n232 kvm\n 58 rfkill\n")
    return path


def device(tmp_path: Path, name: str = "tun") -> Device:
    return Device(path=tmp_path / "dev" / "net" / name, name=name, module=name)


# --- made -----------------------------------------------------------------------------------------------------


@needs_root
def test_a_missing_node_is_made(tmp_path: Path, misc: Path) -> None:
    """Law: with its folder, with the numbers that the kernel has now, for root only."""
    made = device(tmp_path)
    assert ensure(made, misc=misc)
    found = made.path.stat()
    assert stat.S_ISCHR(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (10, 200)
    assert not ensure(made, misc=misc)


@needs_root
def test_the_kernels_own_list_is_read(tmp_path: Path) -> None:
    """Law: the node is the device: it opens as the real one does."""
    name = next(line.split()[1] for line in Path("/proc/misc").read_text().splitlines() if " " in line.strip())
    made = device(tmp_path, name)
    assert ensure(made)
    minor = os.minor(made.path.stat().st_rdev)
    assert f"{minor} {name}" in Path("/proc/misc").read_text()


def test_a_device_that_the_kernel_does_not_have(tmp_path: Path, misc: Path) -> None:
    """Law: the module that brings it is named, and nothing is made."""
    absent = Device(path=tmp_path / "dev" / "vhost-net", name="vhost-net", module="vhost_net")
    with pytest.raises(
        DeviceTrouble, match=r"vhost-net is missing, and .*misc lists no vhost-net: .*modprobe vhost_net"
    ):
        ensure(absent, misc=misc)
    assert not absent.path.parent.exists()
    with pytest.raises(DeviceTrouble, match="cannot be read: No such file"):
        ensure(absent, misc=tmp_path / "nowhere")


def test_the_real_devices_are_named_rightly() -> None:
    """Law: paths and names are the kernel's (Documentation/admin-guide/devices.txt)."""
    known = {(str(one.path), one.name) for one in (devices.KVM, devices.TUN, devices.VHOST_NET)}
    assert known == {("/dev/kvm", "kvm"), ("/dev/net/tun", "tun"), ("/dev/vhost-net", "vhost-net")}
    nowhere = Device(path=Path("/proc/nowhere"), name="no-such-device", module=devices.KVM.module)
    with pytest.raises(DeviceTrouble, match="the module kvm_intel or kvm_amd is not loaded; modprobe kvm_intel on the"):
        ensure(nowhere)


def test_a_node_that_may_not_be_made(tmp_path: Path, misc: Path) -> None:
    """Law: without CAP_MKNOD it says so, and what to give to the container."""
    code = (
        "import sys; from pathlib import Path; from kvmsupervisor.adapters.devices import Device, ensure\n"
        "ensure(Device(path=Path(sys.argv[1]), name='tun', module='tun'), misc=Path(sys.argv[2]))"
    )
    path = tmp_path / "dev" / "tun"
    without = ["setpriv", "--bounding-set=-mknod", "--inh-caps=-mknod"] if AS_ROOT else []
    done = subprocess.run(
        [*without, sys.executable, "-c", code, str(path), str(misc)], capture_output=True, text=True, check=False
    )
    assert f"DeviceTrouble: {path} is missing and cannot be made: Operation not permitted; " in done.stderr
    assert f"CAP_MKNOD, or give the container the device (--device {path})" in done.stderr


# --- there already --------------------------------------------------------------------------------------------


@needs_root
def test_a_node_whose_module_is_not_loaded_is_left_alone(tmp_path: Path) -> None:
    """Law: opening a static node may load its module, so one that is there is no trouble yet."""
    there = device(tmp_path)
    there.path.parent.mkdir(parents=True)
    os.mknod(there.path, stat.S_IFCHR | 0o640, os.makedev(10, 200))
    (tmp_path / "misc").write_text("")
    assert not ensure(there, misc=tmp_path / "misc")
    assert stat.S_IMODE(there.path.stat().st_mode) == 0o640


@needs_root
def test_a_node_with_the_wrong_numbers(tmp_path: Path, misc: Path) -> None:
    """Law: it is another device; both pairs of numbers are named, and nothing is removed."""
    there = device(tmp_path)
    there.path.parent.mkdir(parents=True)
    os.mknod(there.path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with pytest.raises(DeviceTrouble, match="has the numbers 1, 3, and tun has 10, 200 now; remove it"):
        ensure(there, misc=misc)
    assert there.path.exists()


@pytest.mark.parametrize("what", ["folder", "file", "dangling"])
def test_something_else_in_its_place(tmp_path: Path, misc: Path, what: str) -> None:
    """Law: it is said, and left to its owner. Docker makes a folder for a mount whose source is missing."""
    there = device(tmp_path)
    there.path.parent.mkdir(parents=True)
    if what == "folder":
        there.path.mkdir()
    elif what == "file":
        there.path.touch()
    else:
        there.path.symlink_to("nowhere")
    with pytest.raises(DeviceTrouble, match=r"is no device node; remove|cannot be looked at: No such file"):
        ensure(there, misc=misc)
    assert there.path.is_symlink() or there.path.exists()


# --- opened to a group ----------------------------------------------------------------------------------------


def node(tmp_path: Path, group: int, mode: int) -> Path:
    """Stands for a node: only owner, group and mode are looked at."""
    path = tmp_path / "kvm"
    path.touch()
    os.chown(path, -1, group)
    path.chmod(mode)
    return path


def looks(path: Path) -> tuple[int, int]:
    return path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)


@needs_root
@pytest.mark.parametrize(
    ("group", "mode", "gid"),
    [
        (KVM_GROUP, 0o660, KVM_GROUP),  # its user is in the group
        (OTHER, 0o660, OTHER),  # a group that may: QEMU gets it, instead of the node another group
        (0, 0o666, None),  # everybody may
        (OTHER, 0o606, None),  # everybody but that group
        (0, 0o020666, None),
    ],
)
def test_a_node_that_some_group_can_use_is_not_changed(tmp_path: Path, group: int, mode: int, gid: int | None) -> None:
    """Law: what an administrator or udev has set is used as it is."""
    path = node(tmp_path, group, mode & 0o777)
    before = looks(path)
    assert grant(path, [QEMU, KVM_GROUP], QEMU) == Grant(gid=gid, changed=False)
    assert looks(path) == before


@needs_root
@pytest.mark.parametrize(
    ("group", "mode"),
    [
        (0, 0o600),  # root's alone
        (0, 0o660),  # root's group, which is never handed out
        (OTHER, 0o640),  # may read only
        (KVM_GROUP, 0o606),  # its own group may not, so all others do not help
    ],
)
def test_a_node_that_no_group_can_use_is_given_to_one(tmp_path: Path, group: int, mode: int) -> None:
    """Law: by root, to the group that is named, with mode 0660; and then it stays so."""
    path = node(tmp_path, group, mode)
    assert grant(path, [QEMU, KVM_GROUP], QEMU) == Grant(gid=QEMU, changed=True)
    assert looks(path) == (QEMU, 0o660)
    assert grant(path, [QEMU], QEMU) == Grant(gid=QEMU, changed=False)


def test_who_is_not_root_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the commands that would help are named."""
    path = node(tmp_path, -1, 0o600)
    before = looks(path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        DeviceTrouble, match=rf"mode 0600, so QEMU's user cannot open it; chgrp {QEMU} {path} && chmod 0660"
    ):
        grant(path, [QEMU], QEMU)
    assert looks(path) == before


def test_a_node_that_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a read-only /dev, for instance, is named with the cause. /proc stands for it."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(DeviceTrouble, match=r"cannot open it, and that cannot be changed: .*; on the host: chgrp"):
        grant(Path("/proc/self/mem"), [QEMU], QEMU)
    with pytest.raises(DeviceTrouble, match="cannot be looked at: No such file"):
        grant(tmp_path / "nowhere", [QEMU], QEMU)
