"""A whole host: systemd, Docker with its systemd driver, cgroup v2; containers ended and the host shut down."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.test_image import SPAWNER
from tests.support.cluster import eventually
from tests.support.docker import PRIVILEGED
from tests.support.nspawn import ROOT, BootedHost

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

COREOS = ROOT / "deploy" / "coreos"
PYTHON = (ROOT, Path(sys.prefix), Path(sys.base_prefix))


@pytest.fixture
def host() -> Iterator[BootedHost]:
    with BootedHost() as booted:
        yield booted


def lives(host: BootedHost, pid: int, seconds: str) -> bool:
    """Whether this very `sleep` lives."""
    return f"sleep {seconds}" in host.run("ps", "-o", "args=", "-p", str(pid), check=False).stdout


def nest(host: BootedHost) -> dict[str, object]:
    """Run the spawner in a container that has the host's programs; return what it said."""
    host.run(
        "sh",
        "-euc",
        "mkdir -p /box/usr; for one in bin sbin lib lib64; do ln -s usr/$one /box/$one; done; mkdir -p /box/tmp;"
        "tar -C /box -c . | docker import - box",
    )
    binds = [f"--volume={path}:{path}:ro" for path in {*PYTHON, Path("/usr"), Path("/etc/alternatives")}]
    mounts = [f"--volume={path}:{path}" for path in ("/run/dbus/system_bus_socket", "/run/systemd")]
    host.run(
        *("docker", "run", "--detach", "--name=nest", "--network=none", "--pid=host", *PRIVILEGED, *binds, *mounts),
        *(f"--env=PYTHONPATH={ROOT}", "--env=PYTHONDONTWRITEBYTECODE=1", "box", sys.executable, "-c", SPAWNER),
    )
    # What goes wrong is written to standard error, and is no JSON.
    said = eventually("its word", lambda: "".join(host.run("sh", "-c", "docker logs nest 2>&1").stdout))
    told: dict[str, object] = json.loads(said)
    return told


def test_a_guest_outlives_container_docker_and_containerd(host: BootedHost) -> None:
    """Law: from inside a container the host's systemd gives the cgroup; nothing of Docker can take the guest along."""
    told = nest(host)
    guest, neighbour = int(str(told["guest"])), int(str(told["neighbour"]))
    assert (told["home"], told["survives"], told["warning"]) == ("systemd", True, None)
    host.run("docker", "restart", "--time=1", "nest", check=False)
    eventually("the neighbour's end", lambda: not lives(host, neighbour, "601"))
    for command in ("docker kill nest", "docker rm --force nest", "systemctl stop docker.socket docker containerd"):
        host.run("sh", "-c", command, check=False)
        assert lives(host, guest, "600"), command


def test_at_shutdown_the_guests_unit_comes_before_the_scopes_and_docker(host: BootedHost) -> None:
    """Law: while `stop --all --local` runs, guests, Docker and the network are still there; systemd waits for it."""
    units = host.root / "etc" / "systemd" / "system"
    text = (COREOS / "kvmsupervisor-guests.service").read_text()
    kept = [line for line in text.split("[Service]")[0].splitlines() if line]
    (units / "kvmsupervisor-guests.service").write_text(
        "\n".join(kept)
        + "\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\nExecStop=/witness\nTimeoutStopSec=60\n"
    )
    witness = host.root / "witness"
    witness.write_text(
        "#!/bin/sh\nsleep 1\n{ pgrep -x -f '/bin/sleep 600'; systemctl is-active docker; } >/seen 2>&1\n"
        "pkill -x -f '/bin/sleep 600'\necho done >>/seen\n"
    )
    witness.chmod(0o755)
    told = nest(host)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "kvmsupervisor-guests")
    host.run("systemctl", "poweroff", "--no-wall", check=False)
    assert host.wait_off() == 0
    assert (host.root / "seen").read_text().split() == [str(told["guest"]), "active", "done"]


def test_systemd_takes_the_units_on_a_whole_host(host: BootedHost) -> None:
    """Law: with Docker installed as it is on a host, the units as they are verify without a word."""
    for unit in COREOS.glob("*.service"):
        name = unit.name.replace("@.", "@1.")
        host.run("sh", "-c", f"cp {unit} /etc/systemd/system/{name}")
    for unit in COREOS.glob("*.service"):
        path = f"/etc/systemd/system/{unit.name.replace('@.', '@1.')}"
        done = host.run("systemd-analyze", "verify", "--man=no", path, check=False)
        said = [line for line in (done.stdout + done.stderr).splitlines() if "modprobe" not in line]
        assert said == []


def test_the_old_unit_takes_its_mutex_and_gives_it_back() -> None:
    """Law: kvm@N makes /kvm/N/host, keeps its own, fails on another's with its name, and deletes its own only."""
    programs = [Path(shutil.which(name) or name).resolve() for name in ("etcd", "etcdctl")]
    with BootedHost(programs) as host:
        for path in programs:
            host.run("ln", "-sf", str(path), f"/usr/local/bin/{path.name}")
        serve = "etcd --data-dir /tmp/etcd --heartbeat-interval 10 --election-timeout 100"
        host.run("systemd-run", "--unit=etcd-member", "--setenv=PATH=/usr/local/bin:/usr/bin", "sh", "-c", serve)
        ctl = ("env", "ETCDCTL_API=3", "/usr/local/bin/etcdctl")
        eventually("etcd", lambda: host.run(*ctl, "put", "/kvm/2/host", "another", check=False).returncode == 0)
        # The mutex is tried here, not Docker: something that runs is enough.
        text = (COREOS / "kvm@.service").read_text()
        text = re.sub(r"^ExecStart=.*?[^\\]$", "ExecStart=/bin/sleep 600", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"^(ExecStop=|ExecStartPre=-|Requires=).*$", "", text, flags=re.MULTILINE)
        (host.root / "etc/systemd/system/kvm@.service").write_text(text)
        (host.root / "etc/kvmsupervisor").mkdir()
        (host.root / "etc/kvmsupervisor/etcdctl.env").write_text("ETCDCTL_ENDPOINTS=127.0.0.1:2379\n")
        name = host.run("hostname").stdout.strip()

        def mutex(instance: int) -> str:
            return host.run(*ctl, "get", "--print-value-only", f"/kvm/{instance}/host").stdout.strip()

        host.run("systemctl", "daemon-reload")
        for _ in range(2):
            host.run("systemctl", "start", "kvm@1")
            assert mutex(1) == name
            host.run("systemctl", "kill", "--signal=KILL", "kvm@1")
            host.run("systemctl", "stop", "kvm@1")
            assert mutex(1) == ""
        host.run(*ctl, "put", "/kvm/1/host", name)
        host.run("systemctl", "start", "kvm@1")
        assert host.run("systemctl", "start", "kvm@2", check=False).returncode != 0
        assert f"/kvm/2/host is another, this host is {name}" in host.run("journalctl", "-u", "kvm@2").stdout
        host.run("systemctl", "stop", "kvm@2")
        assert mutex(2) == "another"
