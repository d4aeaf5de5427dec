"""Cgroups on a host that systemd runs, on pure cgroup v2: its real D-Bus, its real scopes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.nspawn import BootedHost

pytestmark = pytest.mark.docker

INSIDE = """
import asyncio, json, subprocess, sys
from pathlib import Path
from kvmsupervisor.adapters.cgroup import choose
from kvmsupervisor.adapters.cgroup.manager import cgroups_of, CgroupFailed
from kvmsupervisor.adapters.cgroup.place import look
from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits
ONE = InstanceId("one")

async def begin(manager, *argv, incarnation="i1", limits=Limits(), **more):
    cgroup = await manager.prepare(ONE, incarnation, limits)
    stdin = subprocess.DEVNULL if cgroup.stdin is None else cgroup.stdin
    def start():
        cgroup.enter()
        return subprocess.Popen(cgroup.wrap(argv), stdin=stdin, start_new_session=True, **more)

    child = in_own_thread(start)
    try:
        await cgroup.settle(child.pid)
    finally:
        cgroup.close()
    return child

def show(unit, *names):
    out = subprocess.run(["systemctl", "show", unit, *["-p" + name for name in names]], capture_output=True, text=True)
    return dict(line.split("=", 1) for line in out.stdout.splitlines())

def tell(**told):
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def host() -> Iterator[BootedHost]:
    with BootedHost() as booted:
        yield booted


def inside(host: BootedHost, code: str) -> dict[str, Any]:
    """Run the body of a coroutine inside; return what it told."""
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    told: dict[str, Any] = json.loads(host.python(f"{INSIDE}\nasync def main():\n{body}\nasyncio.run(main())"))
    return told


def test_a_process_is_in_its_scope_before_it_execs(host: BootedHost) -> None:
    """Law: systemd is what `auto` takes first; the program itself finds itself in its scope, in machine.slice."""
    told = inside(
        host,
        """
chosen = await choose("auto")
child = await begin(chosen.cgroups, "/bin/cat", "/proc/self/cgroup", stdout=subprocess.PIPE)
out = child.communicate()[0].decode()
tell(name=chosen.cgroups.name, survives=chosen.cgroups.survives_container, warning=chosen.warning, cgroups=out,
     service=look().service)
""",
    )
    assert (told["name"], told["survives"], told["warning"]) == ("systemd", True, None)
    assert "0::/machine.slice/kvm-one-i1.scope\n" in told["cgroups"]
    assert told["service"].startswith("run-")


def test_the_scope_says_what_it_is_and_is_gone_with_its_process(host: BootedHost) -> None:
    """Law: limits, slice and description are systemd's to show; the end of the process is the end of the scope."""
    told = inside(
        host,
        """
manager = (await choose("systemd")).cgroups
child = await begin(manager, "/bin/sleep", "60", limits=Limits(cpu_shares=2048, memory_limit=1 << 28))
unit = "kvm-one-i1.scope"
names = ("Slice", "Description", "CPUWeight", "MemoryMax", "KillMode", "CollectMode", "Before", "ActiveState")
before = show(unit, *names)
child.kill(); child.wait()
for _ in range(500):
    after = show(unit, "LoadState")["LoadState"]
    if after == "not-found":
        break
    await asyncio.sleep(0.01)
tell(before=before, after=after)
""",
    )
    before = told["before"]
    assert before.pop("Before").split().count("kvmsupervisor-guests.service") == 1
    assert before == {
        "Slice": "machine.slice",
        "Description": "KVM guest one",
        "CPUWeight": "200",
        "MemoryMax": str(1 << 28),
        "KillMode": "control-group",
        "CollectMode": "inactive-or-failed",
        "ActiveState": "active",
    }
    assert told["after"] == "not-found"


def test_the_end_of_the_service_that_spawned_it_does_not_touch_it(host: BootedHost) -> None:
    """Law: systemd ends all of a service's processes with it; the guest, in its scope, runs on."""
    told = inside(
        host,
        """
manager = (await choose("systemd")).cgroups
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
child = await begin(manager, "/bin/sleep", "61", **quiet)
stays = subprocess.Popen(["/bin/sleep", "62"], start_new_session=True, **quiet)
tell(guest=child.pid, neighbour=stays.pid)
""",
    )
    state = host.run("ps", "-o", "pid=,args=", "-p", f"{told['guest']},{told['neighbour']}", check=False).stdout
    assert state.split() == [str(told["guest"]), "/bin/sleep", "61"]
    host.run("kill", "-9", str(told["guest"]))


def test_a_second_home_of_one_name_is_refused_and_its_process_ends(host: BootedHost) -> None:
    """Law: what systemd refuses is told in its own words, and the child never execs."""
    told = inside(
        host,
        """
manager = (await choose("systemd")).cgroups
child = await begin(manager, "/bin/sleep", "60")
cgroup = await manager.prepare(ONE, "i1", Limits())
both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
second = subprocess.Popen(cgroup.wrap(["/bin/echo", "ran"]), stdin=cgroup.stdin, **both)
try:
    await cgroup.settle(second.pid)
    said = "nothing"
except CgroupFailed as error:
    said = str(error)
out = second.communicate()[0].decode()
child.kill(); child.wait()
tell(said=said, out=out, code=second.returncode)
""",
    )
    assert "refuses: Unit kvm-one-i1.scope" in told["said"]
    assert (told["out"], told["code"]) == ("", 125)


def test_a_bus_that_was_restarted_is_found_again(host: BootedHost) -> None:
    """Law: the connection that is kept may end; the next start opens another."""
    told = inside(
        host,
        """
manager = (await choose("systemd")).cgroups
(await begin(manager, "/bin/true")).wait()
await manager._connection.close()
(await begin(manager, "/bin/true", incarnation="i2")).wait()
child = await begin(manager, "/bin/cat", "/proc/self/cgroup", incarnation="i3", stdout=subprocess.PIPE)
tell(cgroups=child.communicate()[0].decode())
""",
    )
    assert "kvm-one-i3.scope" in told["cgroups"]


def test_v2s_own_tree_is_the_second_choice(host: BootedHost) -> None:
    """Law: without D-Bus the tree itself is used: the process is in its folder before it execs, which goes with it."""
    told = inside(
        host,
        """
chosen = await choose("auto", bus=Path("/nowhere"))
child = await begin(chosen.cgroups, "/bin/cat", "/proc/self/cgroup", stdout=subprocess.PIPE)
out = child.communicate()[0].decode()
await chosen.cgroups.remove(ONE)
left = [path.name for path in Path("/sys/fs/cgroup/kvmsupervisor").glob("*@*")]
tell(name=chosen.cgroups.name, cgroups=out, rejected=chosen.rejected, left=left)
""",
    )
    assert told["name"] == "cgroup"
    assert "0::/kvmsupervisor/one@i1\n" in told["cgroups"]
    assert "cannot reach the host's D-Bus at /nowhere" in told["rejected"]["systemd"]
    assert told["left"] == []
