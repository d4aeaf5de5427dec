"""A booted host (`nspawn`) as an operator has it: etcd, a bridge, and the image in its Docker.

Containers there are started by the command lines of the project's own pages (`tests.support.pages`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.status import Phase, Status
from tests.support.cluster import eventually
from tests.support.docker import IMAGE, Docker
from tests.support.nspawn import BootedHost

BRIDGE = "qemu0"
ETCD = "http://127.0.0.1:2379"
CTL = ("env", "ETCDCTL_API=3", "/usr/local/bin/etcdctl")
RUNTIME = """#!/usr/bin/python3
# runc, as `docker run --privileged` wants it, where the machine itself lacks one capability of those.
import json, os, sys
for option, place in (("--bundle", "/config.json"), ("--process", "")):
    if option in sys.argv:
        path = sys.argv[sys.argv.index(option) + 1] + place
        with open(path) as file:
            config = json.load(file)
        process = config.get("process", config)
        for names in process.get("capabilities", {}).values():
            names[:] = [name for name in names if name != "CAP_SYS_RESOURCE"]
        with open(path, "w") as file:
            json.dump(config, file)
os.execv("/usr/sbin/runc", ["runc", *sys.argv[1:]])
"""


class ImageHost(BootedHost):
    """As a context manager: boots, has the image, and leaves nothing behind.

    Args:
        docker: the daemon that has built the image.
        guests: seen inside at their own paths.
    """

    def __init__(self, docker: Docker, guests: Sequence[Guest]) -> None:
        self._programs = [Path(shutil.which(name) or name).resolve() for name in ("etcd", "etcdctl")]
        self.folders = [guest.kernel.parent for guest in guests]
        super().__init__([*self._programs, *self.folders])
        self._docker = docker

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._furnish()
        except BaseException:
            self.close()
            raise
        return self

    def _furnish(self) -> None:
        for path in self._programs:
            self.run("ln", "-sf", str(path), f"/usr/local/bin/{path.name}")
        serve = "etcd --data-dir /tmp/etcd --heartbeat-interval 10 --election-timeout 100"
        self.run("systemd-run", "--unit=etcd-member", "--setenv=PATH=/usr/local/bin:/usr/bin", "sh", "-c", serve)
        self.write("/usr/local/bin/less-runc", RUNTIME, mode=0o755)
        runtimes = {"runtimes": {"less": {"path": "/usr/local/bin/less-runc"}}, "default-runtime": "less"}
        self.write("/etc/docker/daemon.json", json.dumps(runtimes))
        # Nodes of its own, as every host has them: those of this machine are not to be changed.
        for node, minor in (("/dev/kvm", 232), ("/dev/net/tun", 200)):
            self.run("sh", "-c", f"mkdir -p {Path(node).parent}; [ -e {node} ] || mknod -m 0600 {node} c 10 {minor}")
        for words in (("add", BRIDGE, "type", "bridge"), ("set", BRIDGE, "up"), ("set", "lo", "up")):
            self.run("ip", "link", *words)
        self.run("mkdir", "-p", "/run/kvmsupervisor", "/etc/ceph", "/var/lib/kvmsupervisor")
        self.run("systemctl", "restart", "docker")
        self._docker.run("save", f"--output={self.root}/image.tar", IMAGE)
        self.run("docker", "load", "--input=/image.tar", timeout_s=600)
        self.run("rm", "/image.tar")
        eventually("etcd", lambda: self.run(*CTL, "put", "/probe", "", check=False).returncode == 0)

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """Write a file inside."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    # --- keys -------------------------------------------------------------------------------------------------

    def put(self, instance: str, **wishes: object) -> None:
        """Write wishes, `host` last: nothing happens before."""
        for name in sorted(wishes, key=lambda name: name == "host"):
            self.run(*CTL, "put", "--", f"/kvm/{instance}/{name}", str(wishes[name]))

    def forget(self, instance: str) -> None:
        """Delete all its keys, its lock too."""
        self.run(*CTL, "del", "--prefix", f"/kvm/{instance}/")

    def get(self, key: str) -> bytes | None:
        """Read any key."""
        found = self.run(*CTL, "get", "--print-value-only", key).stdout.strip()
        return found.encode() or None

    def status(self, instance: str) -> Status | None:
        """The instance's status key."""
        found = self.get(f"/kvmsupervisor/instances/{instance}")
        return None if found is None else Status.from_json(found)

    def lock(self, instance: str) -> Lock | None:
        """The instance's lock."""
        found = self.get(f"/kvm/{instance}/lock")
        return None if found is None else Lock.from_json(found)

    def wait_running(self, instance: str) -> Status:
        """Wait until it runs."""

        def look() -> Status | None:
            status = self.status(instance)
            return status if status is not None and status.phase is Phase.RUNNING else None

        return eventually(f"{instance} to run", look)

    def wait_reason(self, instance: str, words: str) -> str:
        """Wait until it says why it does not run, in these words among others; return all."""

        def look() -> str | None:
            status = self.status(instance)
            return status.reason if status is not None and words in status.reason else None

        return eventually(f"{instance} to say {words!r}", look)

    # --- containers -------------------------------------------------------------------------------------------

    def docker(self, *words: str, check: bool = True) -> str:
        """Run `docker`; return what it said on both outputs."""
        done = self.run("docker", *words, check=check, timeout_s=120)
        return done.stdout + done.stderr

    def supervise(self, name: str, options: Sequence[str], settings: Mapping[str, object] | None = None) -> None:
        """Start a supervisor in a container of this name."""
        said = {"ETCD_ENDPOINTS": ETCD, "KVM_HOSTNAME": "booted", "KVM_ACCEL": "tcg", "KVM_SESSION_TTL": "5"}
        environment = [f"--env={key}={value}" for key, value in (said | dict(settings or {})).items()]
        volumes = [f"--volume={path}:{path}:ro" for path in self.folders]
        self.docker("run", "--detach", f"--name={name}", *options, *environment, *volumes, IMAGE)

    def log(self, name: str) -> str:
        """What a container has written."""
        return self.docker("logs", name, check=False)

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        """Those lines of a supervisor's log."""
        lines = [line for line in self.log(name).splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def wait_event(self, name: str, event: str) -> dict[str, Any]:
        """Wait for the first of them."""
        return eventually(f"{event} of {name}", lambda: self.events(name, event))[0]

    def adoption_s(self, name: str) -> float:
        """Wait for a supervisor to adopt; from its start (it serves, and what ran is found) to that, by its log."""
        times = [
            datetime.fromisoformat(self.wait_event(name, event)["timestamp"])
            for event in ("supervisor.started", "instance.adopted")
        ]
        return (times[1] - times[0]).total_seconds()

    def metric(self, name: str) -> float:
        """A metric without labels; `name` comes without its `kvmsupervisor_`."""
        code = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9746/metrics').read().decode())"
        text = self.run("python3", "-c", code).stdout
        (found,) = re.findall(rf"^kvmsupervisor_{name} (\S+)$", text, re.MULTILINE)
        return float(found)

    @property
    def containers(self) -> list[str]:
        """All, by name."""
        return self.run("docker", "ps", "--all", "--format={{.Names}}").stdout.split()

    def console_of(self, instance: str) -> Path:
        """The console's log of an instance, as seen from outside."""
        return self.seen(f"/run/kvmsupervisor/{instance}/console.log")

    def seen(self, path: str) -> Path:
        """What is inside, mounts too, as seen from outside."""
        return Path(f"/proc/{self.leader}/root{path}")

    def reset(self) -> None:
        """End all containers and guests, forget all keys: nothing of a test is left for the next."""
        for name in self.containers:
            self.docker("rm", "--force", name, check=False)
        self.run("pkill", "-9", "-x", "-f", "qemu-system-x86_64 .*", check=False)
        eventually("no QEMU", lambda: self.run("pgrep", "-f", "^qemu-system-x86_64 ", check=False).stdout == "")
        self.run(*CTL, "del", "--prefix", "/kvm")
        tree = "/sys/fs/cgroup/kvmsupervisor"
        self.run("sh", "-c", f"rm -rf /run/kvmsupervisor/*; rmdir {tree}/* {tree}", check=False)


@pytest.fixture(scope="session")
def booted(docker: Docker, guest: Guest, heart: Guest) -> Iterator[ImageHost]:
    """One such host for all tests."""
    with ImageHost(docker, [guest, heart]) as host:
        yield host


@pytest.fixture
def image_host(booted: ImageHost) -> Iterator[ImageHost]:
    """The host, with nothing of an earlier test on it."""
    try:
        yield booted
    finally:
        for name in booted.containers:
            print(f"--- log of {name} ---\n{booted.log(name)}")  # noqa: T201
        booted.reset()
