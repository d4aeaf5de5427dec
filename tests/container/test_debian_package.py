"""`make deb` on Debian 12 and 13: installed, upgraded, removed and purged on a booted host, with a guest that runs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import checkout
from tests.support.bare_root import in_bare_root
from tests.support.cluster import eventually
from tests.support.nspawn import BootedHost, debian_root

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,python3-venv,ca-certificates,procps,iproute2,kmod,"
    "qemu-system-x86,qemu-utils,libstdc++6"
)
"""What the package depends on, and what makes and watches it: a booted host has no network to fetch more."""

LATER = "9.0"
BUILD = f"""
set -eu
cd /given
tools/make-deb
cp dist/*.deb /made/
first=$(echo /made/*.deb)
dpkg-deb -R "$first" /tmp/again
sed -i 's/^Version: .*/Version: {LATER}/' /tmp/again/DEBIAN/control
dpkg-deb --root-owner-group -Zgzip -z1 --build /tmp/again /made/later.deb
mv "$first" /made/first.deb
"""

KEYS = {"ram": "64M", "extra_flags": "-display none", "shutdown_timeout": "1", "restart": "always", "host": "deb"}
CTL = ("env", "ETCDCTL_API=3", "/usr/local/bin/etcdctl")
DISK = "/var/lib/kvmsupervisor/disks/kept.raw"


@dataclass
class Installed:
    """A booted host with etcd, and the two packages in /packages."""

    host: BootedHost

    def dpkg(self, *words: str) -> str:
        """Run dpkg; return all that it said."""
        done = self.host.run("dpkg", *words, timeout_s=300)
        return done.stdout + done.stderr

    def pid(self) -> int | None:
        """The guest's QEMU, as `list` tells it."""
        done = self.host.run("kvmsupervisor", "list", "-o", "json", check=False)
        found = json.loads(done.stdout) if done.returncode == 0 else []
        return next((one["pid"] for one in found if one["phase"] == "running"), None)

    def lives(self, pid: int) -> bool:
        return "qemu-system" in self.host.run("ps", "-o", "args=", "-p", str(pid), check=False).stdout

    def is_active(self, unit: str) -> bool:
        return self.host.run("systemctl", "is-active", unit, check=False).stdout.strip() == "active"


@pytest.fixture(params=["bookworm", "trixie"])
def debian(request: pytest.FixtureRequest) -> Path:
    spice = ",qemu-system-modules-spice" if request.param == "trixie" else ""
    return debian_root(request.param, f"{request.param}-deb", PACKAGES + spice)


@pytest.fixture
def packages(debian: Path, tmp_path: Path) -> Path:
    """Two packages, made in a bare Debian of that release: the present one, and the same with a later version."""
    source, made = tmp_path / "source", tmp_path / "made"
    made.mkdir()
    checkout.copy_to(source)
    with tempfile.TemporaryDirectory(prefix="kvd") as folder:
        done = in_bare_root(debian, Path(folder), BUILD, given=source, made=made)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture
def installed(debian: Path, packages: Path) -> Iterator[Installed]:
    programs = [Path(shutil.which(name) or name).resolve() for name in ("etcd", "etcdctl")]

    def prepare(root: Path) -> None:
        shutil.copytree(packages, root / "packages")
        for path in programs:
            shutil.copy(path, root / "usr/local/bin" / path.name)
        (root / "etc/hostname").write_text("deb\n")
        (root / "etc/hosts").write_text("127.0.0.1 localhost deb\n")
        (root / "etc/systemd/system/etcd.service").write_text(
            "[Service]\nExecStart=/usr/local/bin/etcd --data-dir /var/lib/etcd\nRestart=always\n"
            "[Install]\nWantedBy=multi-user.target\n"
        )
        # A machine without real KVM may have /dev/kvm all the same.
        (root / "etc/kvmsupervisor").mkdir()
        (root / "etc/kvmsupervisor/kvmsupervisor.env").write_text("KVM_ACCEL=tcg\n")
        disk = root / DISK.removeprefix("/")
        disk.parent.mkdir(parents=True)
        disk.write_bytes(b"kept")

    with BootedHost(prepare=prepare, debian=debian) as host:
        host.run("hostname", "deb")
        host.run("systemctl", "enable", "--now", "etcd")
        asked = (*CTL, "endpoint", "health")
        eventually("etcd", lambda: host.run(*asked, check=False).returncode == 0)
        yield Installed(host)


def write_keys(host: BootedHost) -> None:
    for name, value in KEYS.items():
        host.run(*CTL, "put", f"/kvm/one/{name}", "--", value)


def test_it_is_installed_upgraded_and_removed_with_a_guest(installed: Installed) -> None:
    """Law: the guest has one pid through upgrade, removal and reinstallation; a purge keeps disks; a boot starts it."""
    host = installed.host
    installed.dpkg("-i", "/packages/first.deb")
    for unit in ("kvmsupervisor", "kvmsupervisor-guests"):
        eventually(unit, lambda unit=unit: installed.is_active(unit))  # type: ignore[misc]
    assert (
        host.run("systemctl", "is-enabled", "kvmsupervisor", "kvmsupervisor-guests").stdout.split() == ["enabled"] * 2
    )
    for shell in ("bash-completion/completions/kvmsupervisor", "zsh/vendor-completions/_kvmsupervisor"):
        assert (host.root / "usr/share" / shell).stat().st_size > 0
    write_keys(host)
    pid = eventually("the guest", installed.pid)

    installed.dpkg("-i", "/packages/later.deb")
    assert host.run("dpkg-query", "-W", "-f=${Version}", "kvmsupervisor").stdout == LATER
    assert installed.lives(pid)
    eventually("its adoption", lambda: installed.pid() == pid and installed.is_active("kvmsupervisor"))

    # One that a person has disabled and runs all the same goes on; one that a person has stopped stays so.
    host.run("systemctl", "disable", "kvmsupervisor")
    installed.dpkg("-i", "/packages/later.deb")
    eventually("its adoption", lambda: installed.pid() == pid and installed.is_active("kvmsupervisor"))
    host.run("systemctl", "enable", "kvmsupervisor")
    host.run("systemctl", "stop", "kvmsupervisor")
    assert "was stopped before, and is not started" in installed.dpkg("-i", "/packages/later.deb")
    assert not installed.is_active("kvmsupervisor")
    assert installed.lives(pid)
    host.run("systemctl", "start", "kvmsupervisor")
    eventually("its adoption", lambda: installed.pid() == pid)

    said = installed.dpkg("-r", "kvmsupervisor")
    assert "Guests run on without a supervisor: one\n" in said
    assert installed.lives(pid)
    assert not installed.is_active("kvmsupervisor")
    assert not (host.root / "usr/lib/kvmsupervisor").exists()

    installed.dpkg("-i", "/packages/later.deb")
    eventually("its adoption", lambda: installed.pid() == pid)

    host.run("systemctl", "poweroff", "--no-wall", check=False)
    assert host.wait_off() == 0
    host.boot()
    eventually("the guest, at the next boot", installed.pid)
    host.run("kvmsupervisor", "delete", "one", "--yes", "--wait")
    said = installed.dpkg("-P", "kvmsupervisor")
    assert "/var/lib/kvmsupervisor is kept" in said
    assert (host.root / DISK.removeprefix("/")).read_bytes() == b"kept"
    assert [one.name for one in (host.root / "etc/kvmsupervisor").iterdir()] == ["kvmsupervisor.env"]
    assert host.run("systemctl", "list-unit-files", "kvmsupervisor*", check=False).stdout.count("kvmsupervisor") == 0
