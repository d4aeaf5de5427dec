"""`snapshot` and `clone`: what they write, what they refuse before they write, and what they list."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.main import cli
from kvmsupervisor.cli.snapshot_command import _until_rolled_back
from kvmsupervisor.cli.waiting import Sighting
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.snapshots import Rollback, Snap
from kvmsupervisor.domain.status import Phase, Status
from tests.cli.conftest import World

OLD = Snap(name="old", at="2026-03-01T10:00:00Z", size=3 << 30, how="frozen", disks=("rbd", "disk/1"))
DIRTY = Snap(name="dirty", at="2026-03-01T11:59:00Z", size=5 << 20, how="paused", disks=("rbd",), why="no agent")


@pytest.fixture
def snapped(world: World) -> World:
    """A machine with two disks that runs, and has two snapshots; one key has no snapshot yet, another no key."""
    world.host("alpha")
    world.keys("web1", host="alpha", ram="1G", rbd="rbd/web1", mac="02:00:00:00:00:01", spice_port="5901")
    world.etcd.write(b"/kvm/web1/disk/1", "rbd/web1-data")
    world.etcd.write(b"/kvm/web1/snapshot/old", "vor dem Umzug \x1b[2J")
    world.etcd.write(b"/kvm/web1/snapshot/next", "-")
    world.lock("web1", "alpha")
    world.status("web1", "alpha", Phase.RUNNING, pid=1, epoch=1, snapshots=(OLD, DIRTY))
    return world


def key(world: World, name: str) -> str | None:
    found = world.etcd.data.get(f"/kvm/web1/{name}")
    return None if found is None else found.decode()


def off(world: World, **more: Any) -> None:
    world.keys("web1", power="off")
    world.status("web1", "alpha", Phase.STOPPED, epoch=1, snapshots=(OLD, DIRTY), **more)


def test_they_are_listed(snapped: World) -> None:
    """With age and size, whether they are clean, and those that are to be taken; nothing of a note moves a cursor."""
    done = snapped.run("snapshot", "list")
    assert done.exit_code == 0
    rows = [line.split() for line in done.output.splitlines()]
    assert rows[1][:2] + rows[1][3:5] == ["web1", "dirty", "5", "MiB"]
    assert rows[2][:3] == ["web1", "next", "-"]
    assert rows[3][1] == "old"
    assert rows[3][3:6] == ["3.0", "GiB", "frozen"]
    assert "\x1b" not in done.output
    assert "disk/1" not in done.output
    assert "rbd, disk/1" in snapped.run("snapshot", "list", "web1", "-o", "wide").output
    found = json.loads(snapped.run("snapshot", "list", "web1", "-o", "json").output)
    assert [(one["name"], one["consistent"], one["wished"]) for one in found] == [
        ("dirty", False, False), ("next", None, True), ("old", True, True),
    ]  # fmt: skip
    assert found[0]["why"] == "no agent"


def test_show_tells_of_them(snapped: World) -> None:
    shown = snapped.run("show", "web1").output
    assert "2h old, frozen, of rbd, disk/1" in shown
    assert "paused: no agent" in shown
    assert "\x1b" not in shown


def test_one_is_asked_for(snapped: World) -> None:
    done = snapped.run("snapshot", "create", "web1", "new", "--note", "für später")
    assert (done.exit_code, done.output) == (0, "web1 new to be taken\n")
    assert key(snapped, "snapshot/new") == "für später"
    snapped.run("snapshot", "create", "web1", "plain")
    assert key(snapped, "snapshot/plain") == "-"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("create", "web1", "old"), 1, "has a snapshot old already"),
        (("create", "web1", "a/b"), 2, "is no name"),
        (("create", "web1", ".."), 2, "is no name"),
        (("create", "web1", "new", "--note", "delete"), 2, "give another note"),
        (("create", "web1", "new", "--note", "x" * 300), 2, "at most 256"),
        (("create", "web9", "new"), 1, "there is no instance web9"),
        (("delete", "web1", "none"), 1, "has no snapshot none; it has dirty, next, old"),
        (("rollback", "web1", "none", "--yes"), 1, "has no snapshot none"),
        (("rollback", "web1", "old", "--yes"), 1, "`stop web1 --wait`"),
        (("rollback", "web1", "old"), 2, "give --yes"),
    ],
)
def test_what_is_refused(snapped: World, words: tuple[str, ...], code: int, said: str) -> None:
    """Nothing is written, and the message says what would be right."""
    before = snapped.etcd.revision
    done = snapped.run("snapshot", *words)
    assert (done.exit_code, said in done.output) == (code, True), done.output
    assert snapped.etcd.revision == before


def test_disks_that_keep_none(world: World) -> None:
    world.keys("web1", host="alpha", ram="1G")
    assert "nothing to snapshot" in world.run("snapshot", "create", "web1", "a").output
    world.etcd.write(b"/kvm/web1/disk/0", "file:a.raw size=1G")
    assert "a .raw file keeps none" in world.run("snapshot", "create", "web1", "a").output


def test_one_is_taken_away(snapped: World) -> None:
    """By a key that says so; one that is done goes with the next command."""
    assert snapped.run("snapshot", "delete", "web1", "old").exit_code == 0
    assert key(snapped, "snapshot/old") == "delete"
    assert "being deleted" in snapped.run("snapshot", "list").output
    snapped.status("web1", "alpha", Phase.RUNNING, pid=1, epoch=1, snapshots=(DIRTY,))
    assert "old" not in snapped.run("snapshot", "list").output
    assert snapped.run("snapshot", "delete", "web1", "dirty").exit_code == 0
    assert (key(snapped, "snapshot/old"), key(snapped, "snapshot/dirty")) == (None, "delete")


def test_a_rollback_is_asked_for(snapped: World) -> None:
    """Each time by another value: the same twice is done twice."""
    off(snapped)
    asked = []
    for _ in range(2):
        done = snapped.run("snapshot", "rollback", "web1", "old", "--yes")
        assert done.exit_code == 0, done.output
        asked.append(key(snapped, "rollback_request"))
    assert asked[0] != asked[1]
    assert all(value is not None and value.startswith("old:2026-03-01T12:00:00Z-") for value in asked)
    refused = snapped.run("snapshot", "rollback", "web1", "old", input_text="n\n", asked=True)
    assert refused.exit_code == 1
    assert key(snapped, "rollback_request") == asked[1]


def test_names_are_completed(snapped: World) -> None:
    tools = Tools(environ=snapped.environ, connect=lambda settings: snapped.etcd.peer())
    shell = ShellComplete(cli, {"obj": tools}, "kvmsupervisor", "_X")
    found = shell.get_completions(["snapshot", "delete", "web1"], "")
    assert [item.value for item in found] == ["dirty", "old"]
    assert "snapshot" in [item.value for item in shell.get_completions([], "sna")]


def test_export_leaves_them_out(snapped: World) -> None:
    """They lie on disks that another machine does not have, and orders are no part of what a machine is."""
    snapped.keys("web1", rollback_request="old:1")
    printed = snapped.run("export", "web1").output
    assert "snapshot" not in printed
    assert "rollback" not in printed
    done = snapped.run("apply", "-f", "-", "--dry-run", input_text=printed)
    assert "snapshot" not in done.output, done.output


# --- clone ------------------------------------------------------------------------------------------------------


def clone_of(world: World, new: str = "web2") -> dict[str, str]:
    prefix = f"/kvm/{new}/"
    return {
        name.removeprefix(prefix): value.decode() for name, value in world.etcd.data.items() if name.startswith(prefix)
    }


def test_a_clone_begins_with_a_snapshot(snapped: World) -> None:
    """One transaction writes its keys and has the snapshot taken."""
    done = snapped.run("clone", "web1", "web2", "cpus=2")
    assert done.exit_code == 0, done.output
    found = clone_of(snapped)
    mac = found.pop("mac")
    assert mac != "02:00:00:00:00:01"
    assert found == {
        "host": "alpha", "ram": "1G", "cpus": "2",
        "rbd": "rbd/web2 from=rbd/web1@kvm-clone-web2", "disk/1": "rbd/web2-data from=rbd/web1-data@kvm-clone-web2",
    }  # fmt: skip
    assert key(snapped, "snapshot/clone-web2") == "for the clone web2"
    assert "stays as long as web2 has its disks" in done.output


def test_a_clone_of_one_that_is_there(snapped: World) -> None:
    done = snapped.run("clone", "web1", "web2", "--snapshot", "old", "--full")
    assert done.exit_code == 0, done.output
    assert clone_of(snapped)["rbd"] == "rbd/web2 from=rbd/web1@kvm-old copy"
    assert key(snapped, "snapshot/clone-web2") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("web9", "web2"), "there is no instance web9"),
        (("web1", "web2", "--snapshot", "none"), "`snapshot list web1`"),
        (("web1", "web2", "--snapshot", "dirty"), "does not have disk/1, which came later"),
        (("web1", "web1"), "exists already"),
        (("web1", "web2", "ram=x"), "was not created"),
        (("web1", "web2", "host=nobody"), "which has no session"),
    ],
)
def test_clones_that_are_refused(snapped: World, words: tuple[str, ...], said: str) -> None:
    """Nothing is written, neither keys nor a snapshot's."""
    before = snapped.etcd.revision
    done = snapped.run("clone", *words)
    assert (done.exit_code, said in done.output) == (1, True), done.output
    assert snapped.etcd.revision == before


def test_the_name_of_another_machines_disk(snapped: World) -> None:
    snapped.keys("other", host="alpha", ram="1G", rbd="rbd/web2")
    done = snapped.run("clone", "web1", "web2")
    assert (done.exit_code, "rbd would be rbd/web2, which is a disk of another instance" in done.output) == (1, True)


def test_files_are_copied_where_they_are(world: World) -> None:
    """Of a machine that is off, on its own host; otherwise the message says what to do."""
    world.host("alpha", "beta")
    world.keys("web1", host="alpha", ram="1G", power="off")
    world.etcd.write(b"/kvm/web1/disk/0", "file:web1.qcow2 size=1G")
    files = {"file:web1.qcow2": "alpha"}
    world.status("web1", "alpha", Phase.RUNNING, pid=1, files=files)
    assert "`stop web1 --wait`" in world.run("clone", "web1", "web2").output
    world.status("web1", "alpha", Phase.STOPPED, files=files)
    assert "give host=alpha" in world.run("clone", "web1", "web2", "host=beta").output
    assert world.run("clone", "web1", "web2").exit_code == 0
    found = clone_of(world)
    assert found["disk/0"] == "file:web2.qcow2 size=1G from=file:web1.qcow2"
    assert "power" not in found
    assert key(world, "snapshot/clone-web2") is None


def test_a_rollback_is_waited_for(snapped: World) -> None:
    """What the wait looks for is in the status: that request, done, and no lock."""
    off(snapped, rollback=Rollback(request="old:1", name="old"))
    status = snapped_status(snapped)
    goal = _until_rolled_back("old:1", "old")
    assert goal(Sighting(status=status, locked=False)) is None
    off(snapped, rollback=Rollback(request="old:1", name="old", done=True))
    status = snapped_status(snapped)
    assert goal(Sighting(status=status, locked=True)) is None
    assert goal(Sighting(status=status, locked=False)) == (True, "rolled back to old")


def snapped_status(world: World) -> Any:
    return Status.from_json(world.etcd.data[world.layout.status_key(InstanceId("web1"))])
