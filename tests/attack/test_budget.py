"""A QEMU that its guest has taken over, as its supervisor and its neighbours meet it: `rogue.c`, in QEMU's place.

What each may take has a bound, and what it says is not believed: the supervisor and the other guests go on.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kvmsupervisor.adapters.resources import MOST_FILES
from kvmsupervisor.domain.limits import TASKS
from kvmsupervisor.domain.qmp_answers import WORDS
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root bounds other users")

TALKERS = ("endless", "large", "nonsense", "hangup", "events", "answers", "descriptors", "lies", "verbose")
"""What they do to QMP once their guest runs: a line without an end, messages as large as allowed, what is no QMP,
hanging up at once, events and answers as fast as they are read, descriptors beside the text, answers of a wrong form, a
megabyte of words in each answer."""


@pytest.fixture(scope="module")
def rogue() -> Iterator[str]:
    """`KVM_QEMU`: QEMU itself, and a rogue where `extra_flags` say `rogue=`."""
    assert shutil.which("gcc") is not None, "gcc is missing: tools/install-system dev"
    folder = Path(tempfile.mkdtemp(prefix="kva"))
    folder.chmod(0o755)
    program = folder / "bin" / "qemu-system-x86_64"
    program.parent.mkdir(mode=0o755)
    source = Path(__file__).with_name("rogue.c")
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, source], check=True)
    yield str(program)
    shutil.rmtree(folder)


def start(keys: Keys, host: Host, *hows: str) -> None:
    for how in hows:
        keys.machines(host.name, how, ram=16, extra_flags=f"-fw_cfg name=opt/x,string=rogue={how}", shutdown_timeout=0)


def connected_often(host: Host, instance: str) -> bool:
    return host.metric("instance_qmp_connections_total", instance=instance) > 3


def test_what_they_say_hurts_nobody(hosts: Hosts, keys: Keys, rogue: str, tiny: str) -> None:
    """Law: all of them at once, and one that says nothing: others start, none of it is a bug of ours, nothing grows.

    That one which says nothing loses its slot to others is in `test_supervisor.py`, in virtual time.
    """
    host = hosts(KVM_QEMU=rogue, KVM_START_PARALLEL="4", KVM_SETTLE="0").start()
    keys.machines(host.name, "well", ram=16, extra_flags=tiny)
    before = host.wait_running("well")
    start(keys, host, "silent", *TALKERS)
    for how in TALKERS:
        host.wait_for(how, Phase.RUNNING)
    keys.machines(host.name, "next", ram=16, extra_flags=tiny)
    host.wait_running("next")
    eventually("events of the flood", lambda: host.metric("instance_events_total", instance="events") > 10_000)
    eventually("large ones", lambda: host.metric("instance_events_total", instance="large") > 3)
    for how in ("nonsense", "hangup", "endless"):
        eventually(how, partial(connected_often, host, how))
    eventually("its lies to be told", lambda: "names no state" in host.log)
    said = host.wait_for("verbose", lambda status: "QMP says xxx" in status.reason)
    assert len(said.reason) < WORDS
    assert host.wait_running("well") == before
    assert (host.ready, host._fetch("/healthz")[0]) == (True, 200)
    assert host.events("instance.error") == []
    # None of the descriptors was taken.
    assert len(list(Path(f"/proc/{host.pid}/fd").iterdir())) < 80 + 5 * (len(TALKERS) + 5)
    assert len(host.log) < 200_000


def test_what_they_take_has_a_bound(hosts: Hosts, keys: Keys, rogue: str, tiny: str) -> None:
    """Law: threads and files end at the limit of each user, and are told; a neighbour starts beside them."""
    host = hosts(KVM_QEMU=rogue, KVM_SETTLE="0").start()
    start(keys, host, "threads", "files")
    for how in ("threads", "files"):
        host.wait_for(how, Phase.RUNNING)
    most = {
        "threads": min(TASKS, resource.getrlimit(resource.RLIMIT_NPROC)[1]),
        "files": min(MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
    }
    eventually("threads", lambda: host.metric("instance_threads", instance="threads") >= most["threads"])
    # One is let go of for each connection.
    eventually("files", lambda: host.metric("instance_open_files", instance="files") >= most["files"] - 2)
    assert host.metric("instance_threads", instance="threads") == most["threads"]
    keys.machines(host.name, "next", ram=16, extra_flags=tiny)
    host.wait_running("next")
    qemu = host.qemu("threads")
    limits = Path(f"/proc/{qemu.pid}/limits").read_text()
    assert [line.split()[-3:-1] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]
    # Nothing is left of one that is ended, and its user is free again.
    keys.delete("threads")
    host.wait_forgotten("threads")
    assert not qemu.alive


@pytest.mark.soak
def test_a_fork_bomb_has_a_bound(hosts: Hosts, keys: Keys, rogue: str, tiny: str) -> None:
    """Law: the same of processes, which QEMU's own filter forbids; here there is no such filter."""
    host = hosts(KVM_QEMU=rogue, KVM_SETTLE="0").start()
    start(keys, host, "forks")
    pid = eventually("it", lambda: (status := host.status("forks")) and status.pid)
    uid = Path(f"/proc/{pid}").stat().st_uid

    def count() -> int:
        return sum(1 for entry in Path("/proc").iterdir() if entry.name.isdigit() and _owner(entry) == uid)

    wanted = min(TASKS, resource.getrlimit(resource.RLIMIT_NPROC)[1])
    eventually("processes", lambda: count() >= wanted - 2, poll_s=1.0)
    keys.machines(host.name, "next", ram=16, extra_flags=tiny)
    host.wait_for("next", Phase.RUNNING)
    assert count() <= wanted
    # The first of them forks on as long as it lives; with it all end.
    keys.delete("forks")
    host.wait_forgotten("forks")
    eventually("the end of all", lambda: count() == 0, poll_s=1.0)


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None
