"""Cgroups in the host's tree: this machine's own hierarchies (as root), and what is read of others."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvmsupervisor.adapters.cgroup import CgroupFailed, CgroupManager, Impossible, NoCgroups, choice, choose
from kvmsupervisor.adapters.cgroup.manager import Cgroup, cgroups_of
from kvmsupervisor.adapters.cgroup.place import FIRST_PID_NAMESPACE, Place, is_of_the_host, look
from kvmsupervisor.adapters.cgroup.scope import Scopes
from kvmsupervisor.adapters.cgroup.tree import FOLDER, Hierarchy, Tree, find_hierarchies, open_tree
from kvmsupervisor.aio import in_own_thread
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import TASKS, Limits

ONE = InstanceId("one")
HOST = Place(contained=False, host_pids=True, host_cgroups=True, service=None)
V1 = """\
30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/memory rw,nosuid shared:10 - cgroup cgroup rw,memory
32 25 0:28 / /sys/fs/cgroup/my\\040own rw,nosuid shared:11 - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
33 25 0:29 / /sys/fs/cgroup/unified rw,nosuid shared:12 - cgroup2 cgroup2 rw,nsdelegate
"""


def proc_of(tmp_path: Path, mountinfo: str, own: str, inits: str = "0::/\n") -> Path:
    """A /proc that tells this."""
    for name, text in {"self/mountinfo": mountinfo, "self/cgroup": own, "1/cgroup": inits}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def hierarchies() -> Iterator[tuple[Hierarchy, ...]]:
    """This machine's hierarchies; cgroups are made in a folder of this test's, below our own cgroup and its limits."""
    own = {frozenset(names.split(",")) - {""}: path for names, path in cgroups_of("self").items()}
    name = f"kvst{uuid.uuid4().hex[:8]}"
    found = tuple(
        replace(one, top=one.top / own[one.controllers].removeprefix("/").removesuffix("/") / name)
        for one in find_hierarchies()
    )
    for one in found:
        one.top.mkdir()
        if "cpuset" in one.controllers:
            for file in ("cpuset.cpus", "cpuset.mems"):
                (one.top / file).write_text((one.top.parent / file).read_text())
    yield found
    for one in found:
        for path in sorted([one.top, *one.top.rglob("*")], key=lambda path: len(path.parts), reverse=True):
            if path.is_dir():
                path.rmdir()


async def spawned(cgroups: CgroupManager, cgroup: Cgroup, *argv: str) -> subprocess.Popen[bytes]:
    """Spawn as the supervisor does, and see it in."""

    def start() -> subprocess.Popen[bytes]:
        cgroup.enter()
        return subprocess.Popen(
            cgroup.wrap(argv),
            stdin=subprocess.PIPE if cgroup.stdin is None else cgroup.stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    child = in_own_thread(start)
    await cgroup.settle(child.pid)
    cgroup.close()
    return child


@pytest.mark.docker
async def test_a_process_is_in_its_home_in_every_hierarchy_when_it_execs(hierarchies: tuple[Hierarchy, ...]) -> None:
    """Law: moved before exec, everywhere, with the pid it was spawned with; the limits are the kernel's by then."""
    cgroups = Tree(hierarchies, survives_container=True)
    limits = Limits(cpu_shares=512, memory_limit=64 << 20)
    if not any(one.has("memory") for one in hierarchies):
        limits = Limits()
    cgroup = await cgroups.prepare(ONE, "abc", limits)
    child = await spawned(cgroups, cgroup, "/bin/sh", "-c", "cat /proc/$$/cgroup; echo $$; exec sleep 600")
    assert child.stdout is not None
    lines = []
    while not (line := child.stdout.readline().decode().strip()).isdigit():
        lines.append(line)
    try:
        assert int(line) == child.pid
        own = cgroups_of("self")
        told = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
        for one in hierarchies:
            names = next(names for names in told if frozenset(names.split(",")) - {""} == one.controllers)
            assert told[names] == f"{own[names].rstrip('/')}/{one.top.name}/{FOLDER}/one@abc"
            folder = one.top / FOLDER / "one@abc"
            if "memory" in one.controllers and limits.memory_limit:
                assert (folder / "memory.limit_in_bytes").read_text().strip() == str(64 << 20)
            if "cpu" in one.controllers and limits.cpu_shares:
                assert (folder / "cpu.shares").read_text().strip() == "512"
        # While it lives its cgroup stays; when it is gone so is its cgroup.
        (busy,) = {(one.top / FOLDER / "one@abc").exists() for one in hierarchies}
        await cgroups.remove(ONE)
        assert busy
        assert all((one.top / FOLDER / "one@abc").exists() for one in hierarchies)
    finally:
        child.kill()
        child.communicate()
    await cgroups.remove(ONE)
    assert not any((one.top / FOLDER / "one@abc").exists() for one in hierarchies)


@pytest.mark.docker
async def test_a_home_of_another_instance_with_a_like_name_is_left_alone(hierarchies: tuple[Hierarchy, ...]) -> None:
    """Law: `remove` takes what is of its instance and nothing else."""
    cgroups = Tree(hierarchies, survives_container=True)
    for name in ("one", "one.two", "one-1"):
        await cgroups.prepare(InstanceId(name), "i", Limits())
    await cgroups.remove(ONE)
    left = {path.name for one in hierarchies for path in (one.top / FOLDER).glob("*@*")}
    assert left == {"one.two@i", "one-1@i"}
    for name in ("one.two", "one-1"):
        await cgroups.remove(InstanceId(name))


@pytest.mark.docker
async def test_homes_that_nobody_removed_are_swept(
    hierarchies: tuple[Hierarchy, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: an old cgroup without a process goes, one with a process and a fresh one stay."""
    cgroups = Tree(hierarchies, survives_container=True)
    child = await spawned(cgroups, await cgroups.prepare(ONE, "lived-in", Limits()), "/bin/sh", "-c", "read -r _")
    await cgroups.prepare(InstanceId("two"), "empty", Limits())
    names = {"one@lived-in", "two@empty"}

    def left() -> set[str]:
        return {path.name for one in hierarchies for path in (one.top / FOLDER).glob("*@*")}

    cgroups.sweep()
    assert left() == names
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    await asyncio.to_thread(_wait_in, hierarchies, child.pid)
    cgroups.sweep()
    assert left() == {"one@lived-in"}
    child.communicate()
    await cgroups.remove(ONE)


def _wait_in(hierarchies: tuple[Hierarchy, ...], pid: int) -> None:
    """Wait until the process has entered the last of its cgroups."""
    doors = [one.top / FOLDER / "one@lived-in" / "cgroup.procs" for one in hierarchies]
    for _ in range(1000):
        if all(str(pid) in door.read_text().split() for door in doors):
            return
        time.sleep(0.01)
    raise AssertionError("it never entered")


@pytest.mark.docker
async def test_a_process_that_cannot_enter_never_execs(hierarchies: tuple[Hierarchy, ...]) -> None:
    """Law: no guest runs outside its cgroup; the end says which door was shut."""
    cgroups = Tree(hierarchies, survives_container=True)
    cgroup = await cgroups.prepare(ONE, "gone", Limits())
    await cgroups.remove(ONE)
    if any(not one.unified for one in hierarchies):
        with pytest.raises(FileNotFoundError, match="one@gone"):
            await spawned(cgroups, cgroup, "/bin/echo", "ran")
        cgroup.close()
        return
    child = await spawned(cgroups, cgroup, "/bin/echo", "ran")
    said = child.communicate()[0].decode()
    assert child.returncode == 126
    assert "ran" not in said


async def test_a_limit_that_no_controller_keeps_is_refused(tmp_path: Path) -> None:
    """Law: a limit holds, or there is no start; nothing is left of the attempt."""
    top = tmp_path / "unified"
    top.mkdir()
    (top / "cgroup.controllers").write_text("pids\n")
    cgroups = Tree([Hierarchy(top=top)], survives_container=True)
    with pytest.raises(CgroupFailed, match="no cgroup controller memory for this limit"):
        await cgroups.prepare(ONE, "i", Limits(memory_limit=1 << 30))
    assert not [one for one in (top / FOLDER).iterdir() if one.is_dir()]


async def test_v2_limits_are_written_in_its_own_words(tmp_path: Path) -> None:
    """Law: on v2 controllers are switched on down to the cgroup, shares are weight, and the door is cgroup.procs."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    cgroups = Tree([Hierarchy(top=tmp_path)], survives_container=True)
    folder = tmp_path / FOLDER / "one@i"
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").touch()
    (folder / "pids.max").write_text("max")
    cgroup = await cgroups.prepare(ONE, "i", Limits(cpu_shares=2048, memory_limit=1 << 30))
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (tmp_path / FOLDER / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (folder / "cpu.weight").read_text() == "200"
    assert (folder / "memory.max").read_text() == str(1 << 30)
    assert (folder / "pids.max").read_text() == str(TASKS)
    assert cgroup.stdin is not None
    assert os.path.samestat(os.fstat(cgroup.stdin), (folder / "cgroup.procs").stat())
    cgroup.close()
    assert cgroup.stdin is None


async def test_threads_are_bounded_without_any_limit_of_a_key(tmp_path: Path) -> None:
    """Law: v2's controller is switched on where nothing else has; where there is none, a start goes on without."""
    for has, told in (("pids", "+pids"), ("io", None)):
        top = tmp_path / has
        top.mkdir()
        (top / "cgroup.controllers").write_text(f"{has}\n")
        folder = top / FOLDER / "one@i"
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").touch()
        cgroup = await Tree([Hierarchy(top=top)], survives_container=True).prepare(ONE, "i", Limits())
        cgroup.close()
        for above in (top, top / FOLDER):
            file = above / "cgroup.subtree_control"
            assert (file.read_text() if file.exists() else None) == told
    top = tmp_path / "v1"
    (top / FOLDER / "one@i").mkdir(parents=True)
    (top / FOLDER / "one@i" / "pids.max").write_text("max")
    hierarchy = Hierarchy(top=top, controllers=frozenset({"pids"}))
    (await Tree([hierarchy], survives_container=True).prepare(ONE, "i", Limits())).close()
    assert (top / FOLDER / "one@i" / "pids.max").read_text() == str(TASKS)


def test_v1_and_hybrid_mounts_are_told_apart(tmp_path: Path) -> None:
    """Law: every hierarchy that we are in is found where it is mounted, co-mounted controllers and odd names too."""
    tops = {path: tmp_path / path[1:].replace("\\040", " ") for path in ("/a", "/b", "/my\\040own", "/d")}
    mountinfo = V1
    for line, path in zip(V1.splitlines(), tops, strict=True):
        tops[path].mkdir()
        mountinfo = mountinfo.replace(line.split()[4], str(tmp_path) + path)
    proc = proc_of(
        tmp_path, mountinfo, "4:cpu,cpuacct:/x\n3:memory:/x\n2:name=systemd:/x\n1:pids:/\n0::/x\n", "1:pids:/\n"
    )
    found = {one.controllers: one.top for one in find_hierarchies(proc)}
    assert found == {
        frozenset({"cpu", "cpuacct"}): tops["/a"],
        frozenset({"memory"}): tops["/b"],
        frozenset({"name=systemd"}): tops["/my\\040own"],
        frozenset(): tops["/d"],
    }


@pytest.mark.parametrize(
    ("own", "v2_has", "expected"),
    [
        ("/", "hugetlb", {"memory"}),
        ("/", "hugetlb cpu", {"memory", "v2"}),
        ("/docker/1234", "hugetlb", {"memory", "devices", "v2"}),
    ],
    ids=["root", "root with limits", "container"],
)
def test_a_hierarchy_is_entered_for_a_reason(tmp_path: Path, own: str, v2_has: str, expected: set[str]) -> None:
    """Law: a cgroup is for leaving a container, or for limits; in a root without limits there is neither."""
    tops = {name: tmp_path / name for name in ("memory", "devices", "v2")}
    for top in tops.values():
        top.mkdir()
    (tops["v2"] / "cgroup.controllers").write_text(f"{v2_has}\n")
    mountinfo = f"""\
30 25 0:26 / {tops["memory"]} rw - cgroup cgroup rw,memory
31 25 0:27 / {tops["devices"]} rw - cgroup cgroup rw,devices
32 25 0:28 / {tops["v2"]} rw - cgroup2 cgroup2 rw
"""
    proc = proc_of(tmp_path, mountinfo, f"2:memory:{own}\n1:devices:{own}\n0::{own}\n", "1:devices:/\n")
    assert {one.top.name for one in find_hierarchies(proc)} == expected
    # Where it is the only one, it is the one to have.
    (proc / "self/cgroup").write_text(f"0::{own}\n")
    assert [one.unified for one in find_hierarchies(proc)] == [True]


@pytest.mark.parametrize(
    "mountinfo",
    [
        "",
        "30 25 0:26 /docker/1234 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    ],
    ids=["not mounted", "only the container's own part"],
)
def test_without_the_hosts_tree_it_is_impossible_and_says_which_mount_is_missing(
    tmp_path: Path, mountinfo: str
) -> None:
    """Law: a part of the tree is not enough: a cgroup in it would end with the container."""
    proc = proc_of(tmp_path, mountinfo, "0::/docker/1234\n")
    with pytest.raises(Impossible, match="-v /sys/fs/cgroup:/sys/fs/cgroup"):
        find_hierarchies(proc)


def test_a_private_cgroup_namespace_is_refused() -> None:
    """Law: what can be seen and not be left is no cgroup of its own."""
    with pytest.raises(Impossible, match="--cgroupns=host"):
        open_tree(replace(HOST, contained=True, host_cgroups=False))


@pytest.mark.parametrize(
    ("seen", "inits", "expected"),
    [
        ({"first", "marked"}, "0::/init.scope", {"host_pids", "host_cgroups"}),
        ({"first", "marked", "apart"}, "0::/", {"contained", "host_pids", "host_cgroups"}),
        ({"marked", "apart"}, "0::/../..", {"contained", "host_pids"}),
        ({"marked"}, "0::/", {"contained", "host_cgroups"}),
        (set(), "0::/", {"host_pids", "host_cgroups"}),
        ({"first", "marked", "apart", "hidden"}, "0::/", {"contained", "host_pids", "host_cgroups"}),
        ({"first", "marked", "hidden"}, "0::/", {"host_pids", "host_cgroups"}),
        ({"marked", "hidden"}, "0::/", {"contained", "host_cgroups"}),
    ],
    ids=[
        "host",
        "container, --pid=host",
        "same, own cgroup namespace",
        "container",
        "booted in a namespace",
        "container with few capabilities, --pid=host",
        "host, few capabilities",
        "container with few capabilities",
    ],
)
def test_where_we_stand_is_told_from_proc(tmp_path: Path, seen: set[str], inits: str, expected: set[str]) -> None:
    """Law: process 1's mount namespace, the PID namespace's number and the runtime's mark tell a container.

    So they do where that namespace's name is hidden from us.
    """
    first, apart, marked = (word in seen for word in ("first", "apart", "marked"))
    proc = proc_of(tmp_path, "", "0::/system.slice/a.service\n", f"{inits}\n")
    for who, number in (("1", 2 if apart else 1), ("self", 1)):
        (proc / who / "ns").mkdir()
        (proc / who / "mountinfo").write_text(f"{number}22 27 0:21 / /proc rw - proc proc rw\n")
        if who == "self" or "hidden" not in seen:
            (proc / who / "ns" / "mnt").symlink_to(f"mnt:[{number}]")
    (proc / "self/ns/pid").symlink_to(FIRST_PID_NAMESPACE if first else "pid:[4026532000]")
    mark = tmp_path / ".dockerenv"
    if marked:
        mark.touch()
    place = look(proc, (mark,))
    assert {name for name in ("contained", "host_pids", "host_cgroups") if getattr(place, name)} == expected
    assert place.service == "a.service"


async def test_auto_says_why_the_others_were_not_possible(tmp_path: Path) -> None:
    """Law: `auto` falls back to none with a warning that names what is missing, backend by backend."""
    place = Place(contained=True, host_pids=True, host_cgroups=False, service=None)
    chosen = await choose("auto", place=place, bus=tmp_path / "socket")
    assert isinstance(chosen.cgroups, NoCgroups)
    assert not chosen.cgroups.survives_container
    assert "-v /run/dbus/system_bus_socket" in chosen.rejected["systemd"]
    assert "--cgroupns=host" in chosen.rejected["cgroup"]
    assert chosen.warning is not None
    assert chosen.warning.startswith("guests end with this container: QEMU runs in its cgroup (systemd: ")


async def test_a_run_directory_of_the_containers_own_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: guests that outlive the container and cannot be adopted are told of as loudly as those that do not."""
    monkeypatch.setattr(choice, "open_tree", lambda place: Tree((), survives_container=place.host_pids))
    place = Place(contained=True, host_pids=True, host_cgroups=True, service=None)
    for ours, warned in ((True, False), (False, True)):
        monkeypatch.setattr(choice, "is_of_the_host", lambda path, ours=ours: ours)
        chosen = await choose("cgroup", place=place, run_dir=tmp_path)
        assert chosen.cgroups.survives_container
        assert (chosen.warning is not None) is warned
    assert f"run it with -v {tmp_path}:{tmp_path}" in str(chosen.warning)
    # On the host itself it is the host's, whatever it is mounted on.
    chosen = await choose("cgroup", place=replace(place, contained=False), run_dir=tmp_path)
    assert chosen.warning is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/run/kvmsupervisor", True),
        ("/run/kvmsupervisor/deeper", True),
        ("/run/my own", True),
        ("/run", False),
        ("/tmp/x", False),
        ("/", False),
    ],
)
def test_a_folder_of_the_host_is_told_from_one_of_the_container(tmp_path: Path, path: str, expected: bool) -> None:
    """Law: neither the root, which the host has mounted as well, nor a tmpfs of the container's own is the host's."""
    for who, lines in {
        "self": (
            "60 50 0:50 / / rw - overlay overlay rw",
            "61 60 0:61 / /tmp rw - tmpfs tmpfs rw",
            "62 60 0:24 /kvmsupervisor /run/kvmsupervisor rw - tmpfs tmpfs rw",
            "63 60 0:24 /x /run/my\\040own rw - tmpfs tmpfs rw",
        ),
        "1": (
            "20 1 8:1 / / rw - ext4 /dev/sda1 rw",
            "24 20 0:24 / /run rw - tmpfs tmpfs rw",
            "50 20 0:50 / /o rw - overlay o rw",
        ),
    }.items():
        (tmp_path / who).mkdir()
        (tmp_path / who / "mountinfo").write_text("\n".join(lines) + "\n")
    assert is_of_the_host(Path(path), tmp_path) is expected


async def test_what_is_asked_for_by_name_is_had_or_refused(tmp_path: Path) -> None:
    """Law: no silent fallback from a backend that was named."""
    with pytest.raises(Impossible, match="KVM_CGROUP is systemd, but cannot reach the host's D-Bus"):
        await choose("systemd", place=HOST, bus=tmp_path / "socket")
    with pytest.raises(Impossible, match="KVM_CGROUP is cgroup, but"):
        await choose("cgroup", place=replace(HOST, host_cgroups=False))
    chosen = await choose("none", place=HOST)
    assert (chosen.cgroups.name, chosen.cgroups.survives_container, chosen.warning) == ("none", True, None)


async def test_without_the_hosts_pids_nothing_survives() -> None:
    """Law: with a PID namespace of its own a container's end is its guests' end, whatever their cgroup; it is said."""
    place = Place(contained=True, host_pids=False, host_cgroups=True, service=None)
    chosen = await choose("auto", place=place)
    assert not chosen.cgroups.survives_container
    assert "--pid=host" in str(chosen.warning)
    assert "--pid=host" in chosen.rejected["systemd"]


async def test_no_home_takes_no_limits() -> None:
    """Law: a limit that nobody would keep is refused."""
    with pytest.raises(CgroupFailed, match="limits need a cgroup"):
        await NoCgroups(survives_container=True).prepare(ONE, "i", Limits(cpu_shares=2))


async def test_a_child_whose_supervisor_ends_before_it_is_moved_never_execs(tmp_path: Path) -> None:
    """Law: the end of the pipe is no leave to go on; systemd out of reach is told, and the child ends."""
    scopes = Scopes(tmp_path / "socket")
    cgroup = await scopes.prepare(ONE, "i", Limits())
    child = subprocess.Popen(  # noqa: ASYNC220 - as the supervisor does
        cgroup.wrap(["/bin/echo", "ran"]), stdin=cgroup.stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with pytest.raises(CgroupFailed, match="cannot reach the host's D-Bus"):
        await cgroup.settle(child.pid)
    said = await asyncio.to_thread(child.communicate)
    assert (child.returncode, said[0]) == (125, b"")
    assert cgroup.stdin == -1
    await scopes.close()


async def test_what_is_not_the_bus_is_told(tmp_path: Path) -> None:
    """Law: a socket that says no, or nothing sensible, makes the backend impossible, not the supervisor fail."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"REJECTED NOTHING\r\n")
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "bus")
    try:
        chosen = await choose("auto", place=replace(HOST, host_cgroups=False), bus=tmp_path / "bus")
    finally:
        server.close()
    assert chosen.cgroups.name == "none"
    assert "cannot reach the host's D-Bus" in chosen.rejected["systemd"]
    assert os.fspath(tmp_path) in chosen.rejected["systemd"]
