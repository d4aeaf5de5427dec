"""A whole host with systemd, the real image in its Docker: a real guest lives in a scope, through a new container."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.demo_guest import Guest
from tests.support.cluster import eventually
from tests.support.docker import IMAGE, PRIVILEGED, Docker
from tests.support.guest import heart_flags
from tests.support.heartbeat import Heartbeats
from tests.support.nspawn import BootedHost

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

MOUNTS = ("/run/dbus/system_bus_socket", "/run/systemd", "/run/kvmsupervisor")
SETTINGS = ("ETCD_ENDPOINTS=http://127.0.0.1:2379", "KVM_HOSTNAME=booted", "KVM_ACCEL=tcg", "KVM_SESSION_TTL=5")
CTL = ("env", "ETCDCTL_API=3", "/usr/local/bin/etcdctl")


def supervise(host: BootedHost, heart: Guest, name: str) -> None:
    boot = heart.kernel.parent
    volumes = [f"--volume={path}:{path}" for path in (*MOUNTS, boot)]
    host.run(
        *("docker", "run", "--detach", f"--name={name}", "--network=host", "--pid=host", *PRIVILEGED, *volumes),
        *(*(f"--env={one}" for one in SETTINGS), IMAGE),
    )


def test_a_real_guest_lives_on_in_its_scope(docker: Docker, heart: Guest) -> None:
    """Law: the guest is a scope in machine.slice; neither the end of its container nor Docker's own takes it along.

    The next container adopts it with its process and its epoch.
    """
    programs = [Path(shutil.which(name) or name).resolve() for name in ("etcd", "etcdctl")]
    with BootedHost([*programs, heart.kernel.parent]) as host:
        for path in programs:
            host.run("ln", "-sf", str(path), f"/usr/local/bin/{path.name}")
        serve = "etcd --data-dir /tmp/etcd --heartbeat-interval 10 --election-timeout 100"
        host.run("systemd-run", "--unit=etcd-member", "--setenv=PATH=/usr/local/bin:/usr/bin", "sh", "-c", serve)
        docker.run("save", f"--output={host.root}/image.tar", IMAGE)
        host.run("docker", "load", "--input=/image.tar", timeout_s=600)
        host.run("mkdir", "/run/kvmsupervisor")

        def get(key: str) -> dict[str, Any]:
            found: dict[str, Any] = json.loads(host.run(*CTL, "get", "--print-value-only", key).stdout or "{}")
            return found

        def log() -> str:
            return host.run("sh", "-c", "docker logs $(docker ps --latest --quiet) 2>&1").stdout

        supervise(host, heart, "first")
        flags = heart_flags(heart, tag="one", heartbeat_s=0.2)
        for name, value in {"ram": "96", "extra_flags": flags, "shutdown_timeout": "0", "host": "booted"}.items():
            host.run(*CTL, "put", "--", f"/kvm/one/{name}", value)
        try:
            eventually("it runs", lambda: get("/kvmsupervisor/instances/one").get("phase") == "running")
            before, lock = get("/kvmsupervisor/instances/one"), get("/kvm/one/lock")
            scope = f"kvm-one-{before['incarnation']}.scope"
            shown = host.run("systemctl", "show", scope, "--property=Slice,ActiveState,ControlGroup").stdout.split()
            assert {"Slice=machine.slice", "ActiveState=active"} <= set(shown), shown
            assert scope in host.run("cat", f"/proc/{before['pid']}/cgroup").stdout
            console = Path(f"/proc/{host.leader}/root/run/kvmsupervisor/one/console.log")
            with Heartbeats({"one": console}) as hearts:
                eventually("heartbeats", lambda: len(hearts.beats("one")) > 5)
                ended_at = time.monotonic()
                for command in ("docker kill first", "docker rm first", "systemctl restart docker"):
                    host.run("sh", "-c", command)
                supervise(host, heart, "second")
                eventually("the adoption", lambda: "instance.adopted" in log())
                now = time.monotonic()
                eventually("a heartbeat after it", lambda: hearts.all_beat(now))
            hearts.assert_unbroken()
            after = get("/kvmsupervisor/instances/one")
            same = ("pid", "epoch", "restarts", "incarnation", "phase")
            assert [after[name] for name in same] == [before[name] for name in same]
            assert get("/kvm/one/lock") == lock
            print(f"largest gap {hearts.gap(ended_at, now):.2f} s")  # noqa: T201
        finally:
            print(log())  # noqa: T201
