"""What a supervisor finds on its host before it starts any QEMU."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Collection
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters import accelerator, devices, users
from kvmsupervisor.adapters.devices import Device, DeviceTrouble, Grant
from kvmsupervisor.adapters.users import NoSuchUser
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.capabilities import NET_ADMIN
from kvmsupervisor.domain.flags import AllowedFlags
from kvmsupervisor.domain.hardware import Ceph, Ovmf
from kvmsupervisor.machine import host as machine_host
from kvmsupervisor.machine.host import gather_host_facts

NOBODY = pwd.getpwnam("nobody")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def settings(**environ: str) -> Settings:
    base = {"ETCD_ENDPOINTS": "http://127.0.0.1:1", "KVM_HOSTNAME": "a", "KVM_ACCEL": "tcg", "KVM_QEMU_USER": ""}
    return load_settings(base | environ, default_config=Path("/nonexistent"))


class Kvm:
    """KVM's device.

    Attributes:
        trouble: why it cannot be had.
        granted: what is answered to who asks for it.
        asked: for which groups, and which to fall back on.
    """

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.granted = Grant(gid=None)
        self.ensured: list[Device] = []
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def ensure(self, device: Device) -> bool:
        self.ensured.append(device)
        if self.trouble is not None:
            raise DeviceTrouble(self.trouble)
        return False

    def grant(self, node: Path, groups: Collection[int], gid: int) -> Grant:
        assert node == devices.KVM.path
        self.asked.append((tuple(groups), gid))
        return self.granted


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> Kvm:
    made = Kvm()
    monkeypatch.setattr(accelerator, "why_no_kvm", lambda device: made.trouble and "/dev/kvm cannot be opened")
    monkeypatch.setattr(devices, "ensure", made.ensure)
    monkeypatch.setattr(devices, "grant", made.grant)
    return made


def test_without_kvm_no_device_is_touched(kvm: Kvm) -> None:
    """Law: KVM_ACCEL=tcg leaves KVM's device as it is."""
    assert gather_host_facts(settings()).accelerator.name == "tcg"
    assert kvm.ensured == []


def test_trouble_with_the_device_is_why_not_kvm(kvm: Kvm) -> None:
    """Law: with auto, what is wrong with the device is the reason for TCG; where KVM is demanded it stops the start."""
    kvm.trouble = "/dev/kvm is missing, and so on"
    found = gather_host_facts(settings(KVM_ACCEL="auto"))
    assert found.accelerator.name == "tcg"
    assert "/dev/kvm is missing, and so on" in str(found.accelerator)
    assert found.host_side.accel == "tcg"
    with pytest.raises(ValueError, match="/dev/kvm is missing, and so on"):
        gather_host_facts(settings(KVM_ACCEL="kvm"))


@as_root
def test_qemus_user_gets_at_kvm(kvm: Kvm) -> None:
    """Law: the user joins the group that the device belongs to; a device that was changed for it is told."""
    kvm.granted = Grant(gid=4242, changed=True)
    with capture_logs() as lines:
        found = gather_host_facts(settings(KVM_ACCEL="auto", KVM_QEMU_USER="nobody"))
    assert found.users.one is not None
    assert 4242 in found.users.one.groups
    assert kvm.asked[0][0] == (NOBODY.pw_gid,)
    assert [line["event"] for line in lines if line["event"] == "device.granted"] == ["device.granted"]
    kvm.granted = Grant(gid=None)
    with capture_logs() as lines:
        found = gather_host_facts(settings(KVM_ACCEL="auto", KVM_QEMU_USER="nobody"))
    assert found.users.one is not None
    assert found.users.one.groups == (NOBODY.pw_gid,)
    assert "device.granted" not in {line["event"] for line in lines}


@as_root
@pytest.mark.parametrize("exists", [True, False])
def test_the_group_that_a_device_is_given_to(kvm: Kvm, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    """Law: it is the group kvm, and where there is none the user's own."""

    def getgrnam(name: str) -> grp.struct_group:
        assert name == "kvm"
        if not exists:
            raise KeyError(name)
        return grp.struct_group(("kvm", "x", 77, []))

    monkeypatch.setattr(grp, "getgrnam", getgrnam)
    gather_host_facts(settings(KVM_ACCEL="auto", KVM_QEMU_USER="nobody"))
    assert kvm.asked[0][1] == (77 if exists else NOBODY.pw_gid)


def test_a_user_that_does_not_exist_stops_the_start(kvm: Kvm) -> None:
    """Law: QEMU never runs as another user than the one that was named."""
    with pytest.raises(NoSuchUser):
        gather_host_facts(settings(KVM_QEMU_USER="no-such-user"))


def test_our_own_user_needs_no_grant(kvm: Kvm) -> None:
    """Law: without another user the device is left to whom it belongs."""
    gather_host_facts(settings(KVM_ACCEL="auto"))
    assert (kvm.ensured, kvm.asked) == ([devices.KVM], [])


def test_memory_for_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: guests have what the host has, without the reserve, and never less than nothing."""
    monkeypatch.setattr(machine_host, "memory_for_guests_mib", lambda: 2048)
    assert gather_host_facts(settings(KVM_MEMORY_RESERVE="512M")).memory_mib == 1536
    assert gather_host_facts(settings(KVM_MEMORY_RESERVE="4G")).memory_mib == 0


def test_what_every_command_line_is_made_with(tmp_path: Path) -> None:
    """Law: the host's settings arrive in what its command lines are made of."""
    for name in ("code", "vars", "ceph.conf"):
        (tmp_path / name).touch()
    found = gather_host_facts(
        settings(
            KVM_QEMU="qemu-system-x86_64",
            BRIDGE_IF="br7",
            SPICE_ADDR="::1",
            KVM_EXTRA_FLAGS="device,S",
            KVM_OVMF_CODE=str(tmp_path / "code"),
            KVM_OVMF_VARS=str(tmp_path / "vars"),
            CEPH_CONF=str(tmp_path / "ceph.conf"),
            CEPH_ID="guests",
        )
    )
    side = found.host_side
    assert (side.qemu, side.accel, side.bridge_if, side.spice_addr) == ("qemu-system-x86_64", "tcg", "br7", "::1")
    assert side.flags == AllowedFlags(frozenset({"device", "S"}))
    assert side.ovmf == Ovmf(code=str(tmp_path / "code"), variables=str(tmp_path / "vars"))
    assert side.ceph == Ceph(conf=str(tmp_path / "ceph.conf"), user="guests")


def test_an_empty_user_means_unconfined() -> None:
    """Law: QEMU is confined by seccomp unless an empty user switches it off."""
    assert gather_host_facts(settings(KVM_QEMU_USER="")).host_side.sandbox is False
    ours = pwd.getpwuid(os.geteuid()).pw_name
    assert gather_host_facts(settings(KVM_QEMU_USER=ours)).host_side.sandbox is True


@as_root
def test_any_flags_are_asked_for_where_qemu_is_root() -> None:
    """Law: where nothing bounds QEMU, a host allows no option unless its settings say so; elsewhere any."""
    for user in ("", "root"):
        flags = gather_host_facts(settings(KVM_QEMU_USER=user)).host_side.flags
        (problem,) = flags.problems(("-netdev", "bridge,id=n,helper=/tmp/x"))
        assert "KVM_EXTRA_FLAGS allows none, because QEMU runs as root there" in problem.wanted
        assert "set KVM_EXTRA_FLAGS=any there" in problem.wanted
        asked = gather_host_facts(settings(KVM_QEMU_USER=user, KVM_EXTRA_FLAGS="any")).host_side.flags
        assert asked.problems(("-netdev", "user")) == ()
    bounded = gather_host_facts(settings(KVM_QEMU_USER="nobody")).host_side.flags
    assert bounded.problems(("-netdev", "user")) == ()


def test_where_files_are(tmp_path: Path) -> None:
    """Law: the folders of the settings are those that files are made in and read from."""
    found = gather_host_facts(settings(KVM_STATE_DIR=str(tmp_path / "state"), KVM_MEDIA_ROOT=str(tmp_path)))
    assert (found.files.state_dir, found.files.media_root) == (tmp_path / "state", tmp_path)


def test_running_qemu_as_root_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: whether guests run with root's privileges is a fact of the host, for its warning and metric."""
    assert gather_host_facts(settings()).privileged == (os.geteuid() == 0)
    found = gather_host_facts(settings())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert found.privileged is False


@as_root
def test_a_bridge_that_nothing_can_be_plugged_into_is_told(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: root without CAP_NET_ADMIN hears at the start that its bridge is of no use; without a bridge it does not."""
    monkeypatch.setattr(users, "effective_capabilities", lambda: ~(1 << NET_ADMIN.number))
    with capture_logs() as lines:
        gather_host_facts(settings())
        gather_host_facts(settings(BRIDGE_IF="br7"))
        monkeypatch.setattr(users, "effective_capabilities", lambda: 1 << NET_ADMIN.number)
        gather_host_facts(settings(BRIDGE_IF="br7"))
    (line,) = lines
    assert (line["event"], line["log_level"], line["bridge"]) == ("bridge.out_of_reach", "warning", "br7")
    assert "CAP_NET_ADMIN" in line["reason"]
    assert "--cap-add=NET_ADMIN" in line["reason"]
