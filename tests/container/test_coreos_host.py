"""A whole host as deploy/coreos/README.md makes it: its steps, in their order, and what that host then lives through.

Ignition itself lays out files and units; systemd-networkd makes the bridge; etcd with TLS, the supervisor and single
mode run in Docker by the units as they are. The root is Debian's, and what is told otherwise than there is this: an
address instead of DHCP, one member instead of three.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from tests.support.cluster import eventually
from tests.support.docker import IMAGE, Docker
from tests.support.nspawn import ROOT, BootedHost

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

COREOS = ROOT / "deploy" / "coreos"
ADDRESS = "10.0.0.11"

RUNC = """#!/usr/bin/python3
# A machine that lacks this capability itself (number 24) cannot give it to privileged containers: so it is left out.
import json, os, sys
bounding = next(int(line.split()[1], 16) for line in open("/proc/self/status") if line.startswith("CapBnd"))
for option, name in () if bounding >> 24 & 1 else (("--bundle", "config.json"), ("--process", "")):
    if option in sys.argv:
        path = os.path.join(sys.argv[sys.argv.index(option) + 1], name).rstrip("/")
        told = json.load(open(path))
        for given in told.get("process", told).get("capabilities", {}).values():
            given[:] = [one for one in given if one != "CAP_SYS_RESOURCE"]
        json.dump(told, open(path, "w"))
os.execv("/usr/sbin/runc", ["runc", *sys.argv[1:]])
"""

CABLE = """[Unit]
DefaultDependencies=no
Before=systemd-networkd.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip link add en0 type veth peer name cable
ExecStart=ip link set cable up
[Install]
WantedBy=sysinit.target
"""
"""The hardware: an interface with a link."""


class CoreosHost(BootedHost):
    """The host. `folder` has the README's files, edited as it says, and the certificates."""

    def __init__(self, folder: Path, guest: Guest) -> None:
        etcdctl = Path(shutil.which("etcdctl") or "etcdctl").resolve()
        super().__init__([etcdctl], prepare=self._install)
        self._config = folder
        self._guest = guest
        self._etcdctl = etcdctl

    def _install(self, root: Path) -> None:
        """Steps 2 and 3: the files edited, Ignition made of them and run, as at a first boot."""
        told = self._config / "config.ign"
        made = subprocess.run(
            [sys.executable, ROOT / "tools" / "ignition", self._config / "flatcar.bu"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # Debian's Ignition still has the name that this version of the format had before its release.
        told.write_text(made.replace('"3.4.0"', '"3.4.0-experimental"', 1))
        (root / "etc" / "selinux").mkdir(exist_ok=True)
        (root / "etc" / "selinux" / "config").write_text("SELINUXTYPE=none\n")
        # It labels what it has written, which a root without SELinux has no program for.
        (self._config / "setfiles").write_text("#!/bin/sh\n")
        (self._config / "setfiles").chmod(0o755)
        for stage in ("fetch", "files"):
            argv = ["ignition", "-platform=file", f"-stage={stage}", f"-root={root}", "-log-to-stdout"]
            argv += [
                f"-config-cache={self._config}/cache.json",
                f"-state-file={self._config}/state",
            ]
            done = subprocess.run(
                [*argv, f"-neednet={self._config}/neednet"],
                env=os.environ | {"IGNITION_CONFIG_FILE": str(told), "PATH": f"{self._config}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-3000:]
        (root / "var" / "log" / "journal").mkdir(exist_ok=True)
        (root / "etc/systemd/system/cable.service").write_text(CABLE)
        (root / "etc/systemd/network/20-br0.network.d").mkdir()
        (root / "etc/systemd/network/20-br0.network.d/address.conf").write_text(
            f"[Network]\nDHCP=no\nAddress={ADDRESS}/24\n"
        )
        wrapper = root / "usr/local/sbin/runc-here"
        wrapper.write_text(RUNC)
        wrapper.chmod(0o755)
        (root / "etc/docker").mkdir(exist_ok=True)
        runtimes = {"runtimes": {"here": {"path": "/usr/local/sbin/runc-here"}}, "default-runtime": "here"}
        (root / "etc/docker/daemon.json").write_text(json.dumps(runtimes))
        # Where the units' containers see it.
        for file in (self._guest.kernel, self._guest.initramfs):
            shutil.copy(file, root / "etc/kvmsupervisor" / file.name)
        (root / "usr/local/bin/etcdctl").symlink_to(self._etcdctl)
        # What systemd does at a first boot, by the presets that Ignition has written.
        units = [path.name for path in COREOS.glob("*.service") if "@" not in path.name]
        for verb, *names in (("preset", "docker.service", *units), ("enable", "cable", "systemd-networkd")):
            subprocess.run(["systemctl", f"--root={root}", verb, *names], check=True, capture_output=True)

    def certify(self) -> None:
        """Step 4: the certificates, into a host that runs."""
        for source, name in (("ca", "ca"), ("node1", "server"), ("supervisor", "supervisor")):
            for end in (".pem", "-key.pem"):
                if source + end == "ca-key.pem":
                    continue
                path = self.root / "etc/kvmsupervisor/tls" / f"{name}{end}"
                shutil.copy(self._config / "tls" / f"{source}{end}", path)
                path.chmod(0o600)

    def kvm(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the supervisor's container."""
        return self.run("docker", "exec", "kvmsupervisor", "kvmsupervisor", *args, check=check, timeout_s=180)

    def wait_ready(self) -> None:
        """Wait until its supervisor runs and etcd answers."""
        last = ""

        def answers() -> bool:
            nonlocal last
            done = self.kvm("list", check=False)
            last = done.stdout + done.stderr
            return done.returncode == 0

        try:
            eventually("etcd's answer", answers)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{last}") from None

    def show(self, instance: str) -> dict[str, Any]:
        """What `list` tells of an instance; nothing when it does not know it."""
        done = self.kvm("list", "-o", "json", check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
        return next((one for one in found if one["id"] == instance), {})

    def state(self, unit: str) -> str:
        """Of a unit."""
        return self.run("systemctl", "is-active", unit, check=False).stdout.strip()

    def said(self, unit: str, *more: str) -> str:
        """A unit's journal."""
        return self.run("journalctl", "--output=cat", f"--unit={unit}", *more, check=False).stdout


@pytest.fixture
def host(docker: Docker, guest: Guest, tmp_path: Path) -> Iterator[CoreosHost]:
    """The host after step 4, its images loaded."""
    folder = tmp_path / "coreos"
    shutil.copytree(COREOS, folder)
    # Step 1.
    subprocess.run([folder / "make-certificates", folder / "tls", f"node1={ADDRESS}"], check=True)
    env = folder / "etcd-member.env"
    env.write_text(
        re.sub(r"^CLUSTER=.*$", f"CLUSTER=node1=https://{ADDRESS}:2380", env.read_text(), flags=re.MULTILINE)
    )
    # Where /dev/kvm can be made, its guests need not run in it; see tests/support/guest.py.
    with (folder / "kvmsupervisor.env").open("a") as settings:
        settings.write("KVM_ACCEL=tcg\n")
    image = tmp_path / "etcd"
    image.mkdir()
    shutil.copy(shutil.which("etcd") or "etcd", image)
    (image / "Dockerfile").write_text(f"FROM {IMAGE}\nENTRYPOINT []\nCOPY etcd /usr/local/bin/\n")
    docker.run("build", "--tag=etcd:3.5", str(image))
    try:
        with CoreosHost(folder, guest) as booted:
            docker.run("tag", IMAGE, "kvmsupervisor:latest")
            docker.run("save", f"--output={booted.root}/images.tar", "kvmsupervisor:latest", "etcd:3.5", timeout_s=600)
            booted.run("docker", "load", "--input=/images.tar", timeout_s=600)
            (booted.root / "images.tar").unlink()
            booted.certify()
            yield booted
    finally:
        docker.run("rmi", "etcd:3.5", "kvmsupervisor:latest", check=False)


def test_a_host_from_its_first_boot_to_its_second(host: CoreosHost) -> None:
    """Law: what came late is waited for; guests outlive Docker; the host's shutdown is theirs; a boot starts them."""
    units = ("etcd-member", "kvmsupervisor", "kvmsupervisor-guests")
    boot = Guest.at(Path("/etc/kvmsupervisor"))
    try:
        for unit in units:
            eventually(f"{unit} to be active", lambda unit=unit: host.state(unit) == "active")  # type: ignore[misc]
        host.wait_ready()
        wishes = ["ram=96", "mac=52:54:00:12:34:56", f"extra_flags={boot.extra_flags(tag='web1')}"]
        host.kvm("create", "web1", "host=node1", *wishes, "--wait")
        before = eventually("web1", lambda: host.show("web1"))
        scopes = host.run("systemctl", "list-units", "--plain", "--no-legend", "--type=scope", "kvm-*").stdout
        assert f"kvm-web1-{before['incarnation']}.scope" in scopes
        assert "tap" in host.run("ls", "/sys/class/net/br0/brif").stdout
        console = Path(f"/proc/{host.leader}/root/run/kvmsupervisor/web1/console.log")
        eventually("the guest", lambda: "HELLO from web1" in console.read_text(errors="replace"))

        for command in ("docker stop kvmsupervisor", "systemctl restart kvmsupervisor", "systemctl restart docker"):
            host.run("sh", "-c", command, timeout_s=180)
            host.wait_ready()
            after = eventually("web1", lambda: host.show("web1"))
            assert [after[one] for one in ("pid", "epoch")] == [before[one] for one in ("pid", "epoch")], command
            assert host.state("kvmsupervisor-guests") == "active"
        assert "GOODBYE" not in console.read_text(errors="replace")

        host.run("systemctl", "poweroff", "--no-wall", check=False)
        assert host.wait_off() == 0
        host.boot()
        last = host.said("kvmsupervisor", "--boot=-1")
        assert re.search(r'"event": "instance.ended", "instance": "web1".*guest-shutdown', last), last[-3000:]
        host.wait_ready()
        again = eventually("web1", lambda: (one := host.show("web1")).get("phase") == "running" and one)
        assert again["epoch"] == before["epoch"] + 1
        assert host.run("ls", "/sys/class/net/br0/brif").stdout.split()[0] == "en0"
    finally:
        for unit in units:
            print(f"--- {unit} ---\n{host.said(unit)[-6000:]}")  # noqa: T201


def test_single_mode_by_its_unit(host: CoreosHost) -> None:
    """Law: `kvm@N` runs the guest of the keys under its mutex and its lock; its stop is a shutdown, and frees both."""
    options = Guest.at(Path("/etc/kvmsupervisor")).extra_flags(tag="seven")
    etcdctl = ("sh", "-euc", 'set -a; . /etc/kvmsupervisor/etcdctl.env; exec etcdctl "$@"', "sh")
    try:
        eventually("etcd", lambda: host.run(*etcdctl, "put", "/kvm/7/ram", "96", check=False).returncode == 0)
        host.run(*etcdctl, "put", "--", "/kvm/7/extra_flags", options)
        host.run("systemctl", "start", "kvm@7", timeout_s=180)
        name = host.run("hostname").stdout.strip()
        assert host.run(*etcdctl, "get", "--print-value-only", "/kvm/7/host").stdout.strip() == name

        def lock() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(
                host.run(*etcdctl, "get", "--print-value-only", "/kvm/7/lock").stdout or "{}"
            )
            return found

        eventually("it to run", lambda: lock().get("state") == "running")
        # With a PID namespace's number behind it, as this host is in none of the kernel's first.
        assert lock()["host"].partition("@")[0] == f"{name}/7"
        log = ("docker", "exec", "kvm-7", "sh", "-c", "cat /run/kvmsupervisor/_*/7/console.log")
        eventually("the guest", lambda: "HELLO from seven" in host.run(*log, check=False).stdout)
        host.run("systemctl", "stop", "kvm@7", timeout_s=200)
        assert "guest-shutdown" in host.said("kvm@7")
        for key in ("host", "lock"):
            assert host.run(*etcdctl, "get", f"/kvm/7/{key}").stdout == ""
    finally:
        print(host.said("kvm@7")[-6000:])  # noqa: T201
