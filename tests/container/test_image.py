"""The image, built and run for real: what is in it, what its arguments do, and that guests outlive it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.process import is_alive
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Keys, eventually
from tests.support.docker import IMAGE, PRIVILEGED, Docker
from tests.support.processes import starttime_of

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]

CGROUPS = Path("/sys/fs/cgroup")

SPAWNER = """
import asyncio, json, subprocess, sys
from pathlib import Path
from kvmsupervisor.adapters.cgroup import choose
from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits

async def main():
    chosen = await choose("auto")
    cgroup = await chosen.cgroups.prepare(InstanceId("one"), "i1", Limits())
    stdin = subprocess.DEVNULL if cgroup.stdin is None else cgroup.stdin
    def start():
        cgroup.enter()
        return subprocess.Popen(cgroup.wrap(["/bin/sleep", "600"]), stdin=stdin, start_new_session=True)
    guest = in_own_thread(start)
    await cgroup.settle(guest.pid)
    neighbour = subprocess.Popen(["/bin/sleep", "601"], stdin=subprocess.DEVNULL, start_new_session=True)
    while Path(f"/proc/{guest.pid}/comm").read_text() != "sleep\\n":
        await asyncio.sleep(0.01)
    print(json.dumps({"guest": guest.pid, "neighbour": neighbour.pid, "home": chosen.cgroups.name,
                      "survives": chosen.cgroups.survives_container, "warning": chosen.warning}), flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def shell(docker: Docker, script: str, *options: str) -> str:
    return docker.run("run", "--rm", "--network=none", *options, "--entrypoint=sh", IMAGE, "-euc", script).stdout


def test_it_has_what_guests_and_storage_need(docker: Docker) -> None:
    """Law: QEMU with SPICE, QXL and RBD, Ceph's two programs, firmware, setpriv and modprobe; users with known ids."""
    out = shell(
        docker,
        "kvmsupervisor --version; ceph --version; rbd --version;"
        "for program in setpriv modprobe qemu-img ip; do command -v $program; done;"
        "ls /usr/share/OVMF/OVMF_CODE_4M.fd; id qemu;"
        "qemu-system-x86_64 -machine none -device qxl,help | head -1;"
        'qemu-img info \'json:{"driver":"rbd","pool":"p","image":"i"}\' 2>&1 || true',
    )
    for said in ("kvmsupervisor, version", "ceph version", "/setpriv", "/modprobe", "OVMF_CODE_4M.fd", "qxl options"):
        assert said in out, out
    assert "uid=107(qemu) gid=107(qemu) groups=107(qemu),36(kvm)" in out
    assert "Unknown driver" not in out
    assert "No such file" in out or "error connecting" in out, out


def test_it_is_small_and_says_what_it_is(docker: Docker) -> None:
    """Law: half a gigabyte, most of it QEMU and Ceph; no compiler, no pip; labels, health check, stop signal."""
    (found,) = json.loads(docker.run("image", "inspect", IMAGE).stdout)
    assert found["Size"] < 500e6
    assert found["Config"]["Labels"]["org.opencontainers.image.title"] == "kvmsupervisor"
    assert found["Config"]["Healthcheck"]["Test"] == ["CMD", "python3", "-m", "kvmsupervisor.cli.health"]
    assert found["Config"]["StopSignal"] == "SIGTERM"
    assert shell(docker, "command -v gcc pip pip3 curl || true") == ""


def test_it_works_as_an_ordinary_user(docker: Docker) -> None:
    """Law: the commands need no root: exit code 3 is that of the command line, etcd is not there."""
    done = docker.run("run", "--rm", "--network=none", "--user=qemu", IMAGE, "list", check=False)
    assert done.returncode == 3
    assert "etcd is unreachable" in done.stderr


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    path = Path("/run") / f"kvst{os.getpid()}"
    yield path
    for one in (path, *path.rglob("*")) if path.exists() else ():
        one.chmod(0o755) if one.is_dir() else None
    for one in sorted(path.rglob("*"), reverse=True):
        one.rmdir() if one.is_dir() else one.unlink()
    if path.exists():
        path.rmdir()


def test_without_arguments_it_supervises(docker: Docker, keys: Keys, run_dir: Path) -> None:
    """Law: a guest with SPICE and QXL runs from its keys; healthy and ready; SIGTERM ends it with status 0.

    Another container with the same run directory stops the host's guests, and lets them start again.
    """
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, spice = probe.getsockname()[1], other.getsockname()[1]
    environment = {
        "ETCD_ENDPOINTS": ",".join(keys.etcd.endpoints),
        "KVM_PREFIX": keys.layout.prefix,
        "KVM_HOSTNAME": "boxed",
        "KVM_RUN_DIR": str(run_dir),
        "KVM_LISTEN": f"127.0.0.1:{port}",
        "KVM_ACCEL": "tcg",
    }
    options = [f"--env={name}={value}" for name, value in environment.items()]
    volume = f"--volume={run_dir}:{run_dir}"
    docker.run("run", "--detach", "--name=boxed", "--network=host", "--pid=host", *PRIVILEGED, *options, volume, IMAGE)
    try:
        health = ("exec", "boxed", "python3", "-m", "kvmsupervisor.cli.health")
        eventually("healthy", lambda: docker.run(*health, check=False).stdout == "healthy\n")

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as reply:
                    return bool(reply.status == 200)
            except urllib.error.URLError:
                return False

        eventually("ready", ready)
        keys.put("one", ram=64, spice_port=spice, shutdown_timeout=3, host="boxed")
        keys.wait_status("one", lambda status: status.phase is Phase.RUNNING)
        with socket.create_connection(("127.0.0.1", spice), timeout=10) as connection:
            connection.sendall(b"REDQ")
        assert "one" in docker.run("exec", "boxed", "kvmsupervisor", "list").stdout
        # As kvmsupervisor-guests.service does it: a container of its own, which finds the supervisor in the other.
        beside = ("run", "--rm", "--network=none", "--pid=host", *PRIVILEGED, *options, volume, IMAGE)
        said = docker.run(*beside, "stop", "--all", "--local", "--timeout=60").stdout
        assert said.splitlines()[0] == "waiting for 1 guests: one"
        stopped = keys.wait_status("one", lambda status: status.phase is Phase.STOPPED)
        assert "this host stops all its guests" in stopped.reason
        docker.run(*beside, "start", "--all", "--local")
        keys.wait_status("one", lambda status: status.phase is Phase.RUNNING)
        docker.run("stop", "--time=30", "boxed")
        assert docker.run("inspect", "--format={{.State.ExitCode}}", "boxed").stdout == "0\n"
    finally:
        print(docker.run("logs", "boxed", check=False).stdout[-4000:])  # noqa: T201
        docker.run("rm", "--force", "boxed", check=False)


@pytest.mark.parametrize("end", [("stop", "--time=5"), ("kill",), ("rm", "--force")], ids=lambda words: words[0])
def test_a_guest_outlives_its_container(docker: Docker, end: tuple[str, ...]) -> None:
    """Law: whatever Docker does to a container, a process in a cgroup of its own runs on; its neighbour does not."""
    mounts = ("--pid=host", "--cgroupns=host", f"--volume={CGROUPS}:{CGROUPS}", *PRIVILEGED)
    docker.run(
        "run", "--detach", "--name=nest", "--network=none", *mounts, "--entrypoint=python3", IMAGE, "-c", SPAWNER
    )
    guest = 0
    try:
        line = eventually("its word", lambda: docker.run("logs", "nest").stdout)
        told = json.loads(line)
        guest, begun, neighbour = told["guest"], starttime_of(told["guest"]), told["neighbour"]
        beside = starttime_of(neighbour)
        assert (told["home"], told["survives"], told["warning"]) == ("cgroup", True, None)
        docker.run(*end, "nest")
        eventually("the neighbour's end", lambda: not is_alive(neighbour, beside))
        assert is_alive(guest, begun)
    finally:
        docker.run("rm", "--force", "nest", check=False)
        if guest:
            os.kill(guest, signal.SIGKILL)
            eventually("its end", lambda: not is_alive(guest, begun))
        _remove_cgroups()


def test_without_the_hosts_pids_it_says_that_nothing_survives(docker: Docker) -> None:
    """Law: an ordinary container is told apart, and its warning names what is missing."""
    script = (
        "import asyncio;from kvmsupervisor.adapters.cgroup import choose;print(asyncio.run(choose('auto')).warning)"
    )
    out = docker.run("run", "--rm", "--network=none", "--entrypoint=python3", IMAGE, "-c", script).stdout
    assert out.startswith("guests end with this container")
    assert "--pid=host" in out


def _remove_cgroups() -> None:
    deadline = time.monotonic() + 10
    while left := list(CGROUPS.glob("*/kvmsupervisor/one@i1")):
        for path in left:
            try:
                path.rmdir()
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    for path in CGROUPS.glob("*/kvmsupervisor"):
        # Cgroups of others on this machine stay.
        with contextlib.suppress(OSError):
            path.rmdir()
