"""Snapshots as keys wish for them and disks hold them, and the keys of clones."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters import disk_files
from kvmsupervisor.domain.clones import Unclonable, clone
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.snapshots import (
    MOST,
    Errand,
    Kind,
    Piece,
    Rollback,
    RollbackWish,
    Sight,
    Snap,
    SnapshotWish,
    errands,
    waits,
)
from kvmsupervisor.domain.spec import RawValue, Wish
from kvmsupervisor.domain.status import Phase, Status

ONE, TWO = InstanceId("web1"), InstanceId("web2")
PIECE = Piece(size=1 << 20, at="2026-01-01T00:00:00Z")


def wish(**keys: str) -> Wish:
    raw = {name.encode(): RawValue(value.encode(), 7) for name, value in {"ram": "64", **keys}.items()}
    return parse_wish(ONE, raw)


# --- wishes -----------------------------------------------------------------------------------------------------


def test_keys_of_snapshots() -> None:
    """A note of any script, or nothing, is a snapshot that shall exist; one word is the order to take it away."""
    found = wish(
        **{"snapshot/a": "für später — 🐧", "snapshot/b": "", "snapshot/c": " delete ", "snapshot/d.1-x_": "deleted"}
    )
    assert found.problems == ()
    assert [(one.name, one.delete) for one in found.snapshots] == [
        ("a", False), ("b", False), ("c", True), ("d.1-x_", False),
    ]  # fmt: skip
    assert found.rollback is None
    asked = wish(rollback_request="before:2026")
    assert asked.rollback == RollbackWish("before:2026", "before", 7)


@pytest.mark.parametrize("name", ["a/b", "..", "a..b", "-a", ".a", "a b", "ä", "", "x" * 64])
def test_names_that_lead_elsewhere(name: str) -> None:
    (problem,) = wish(**{f"snapshot/{name}": "x"}).problems
    assert problem.key == "unknown key"
    (problem,) = wish(rollback_request=f"{name}:1").problems
    assert "the name of a snapshot" in problem.wanted


def test_too_many() -> None:
    assert wish(**{f"snapshot/{number}": "x" for number in range(MOST)}).problems == ()
    (problem,) = wish(**{f"snapshot/{number}": "x" for number in range(MOST + 1)}).problems
    assert f"at most {MOST}" in problem.wanted
    (problem,) = wish(**{"snapshot/a": "x" * 257}).problems
    assert (problem.key, "at most 256" in problem.wanted) == ("snapshot/a", True)


# --- what is next -----------------------------------------------------------------------------------------------

TAKE, GONE = SnapshotWish("new", False, 9), SnapshotWish("old", True, 9)
BACK = RollbackWish("old:1", "old", 9)


def next_of(**more: Any) -> list[tuple[Kind, str]]:
    plain: dict[str, Any] = {
        "wishes": [TAKE, GONE], "rollback": BACK, "known": {"old"}, "last": None, "stale": False,
        "runs": False, "since": 0,
    }  # fmt: skip
    found = {**plain, **more}
    return [(one.kind, one.name) for one in errands(found.pop("wishes"), found.pop("rollback"), **found)]


def test_what_is_next() -> None:
    """Off: all of it. While it runs nothing is rolled back. What exists is not taken, what does not is not deleted."""
    assert next_of() == [(Kind.DELETE, "old"), (Kind.ROLL_BACK, "old"), (Kind.TAKE, "new")]
    assert next_of(runs=True) == [(Kind.DELETE, "old"), (Kind.TAKE, "new")]
    assert next_of(known={"new"}, rollback=None) == []
    assert next_of(runs=True, stale=True, known={"new"}) == [(Kind.LOOK, "")]


def test_a_rollback_is_done_once_and_finished_first() -> None:
    done = Rollback(request="old:1", name="old", done=True)
    assert (Kind.ROLL_BACK, "old") not in next_of(last=done)
    begun = Rollback(request="other:1", name="other")
    (first,) = errands([TAKE, GONE], BACK, known=(), last=begun, stale=True, runs=False, since=0)
    assert first == Errand(kind=Kind.ROLL_BACK, name="other", request="other:1", begun=True)
    assert next_of(last=begun, runs=True) == []


def test_law_11_orders_of_another_history_wait() -> None:
    """What would destroy something waits until it is written again; what would only add something does not."""
    assert next_of(since=9) == [(Kind.TAKE, "new")]
    assert waits(BACK, None, since=9) is not None
    assert "write it again" in str(waits(BACK, None, since=9))
    assert "once it is off" in str(waits(BACK, None, since=0))
    assert waits(BACK, Rollback(request="old:1", name="old", done=True), since=0) is None


# --- on disks ---------------------------------------------------------------------------------------------------


def test_what_is_on_disks() -> None:
    """One that has its name on one disk was on all; others' snapshots are none of ours."""
    sight = Sight(
        {
            "disk/0": {
                "kvm-a": PIECE,
                "kvm-.b": PIECE,
                "kvm-.c": PIECE,
                "daily": PIECE,
                "kvm-": PIECE,
                "kvm-x/y": PIECE,
            },
            "disk/1": {"kvm-a": PIECE, "kvm-b": PIECE},
        }
    )
    assert sight.begun == {"a", "b"}
    assert sight.unfinished == {"b", "c"}
    known = {"a": Snap(name="a", at="then", size=5, how="frozen", disks=("disk/0",))}
    found = sight.snaps(known)
    assert found["a"] == Snap(name="a", at="then", size=5, how="frozen", disks=("disk/0", "disk/1"))
    assert found["b"] == Snap(name="b", at=PIECE.at, size=1 << 20, how="found", disks=("disk/1",))


def test_a_status_holds_them() -> None:
    snaps = (Snap(name="a", at="t", size=1, how="off", disks=("disk/0",)),)
    status = Status(id="web1", host="a", phase=Phase.RUNNING, reason="", since="", snapshots=snaps)
    status = replace(status, rollback=Rollback(request="a:1", name="a"))
    read = Status.from_json(status.to_json().replace(b'"phase":"running"', b'"phase":"running","newer":1'))
    assert read is not None
    assert (read.snapshots, read.rollback) == (status.snapshots, status.rollback)


def test_snapshots_within_a_qcow2_image(tmp_path: Path) -> None:
    """As `qemu-img` writes them: names, times and sizes, also after the disk has grown."""
    path = tmp_path / "a.qcow2"
    longest = f"kvm-{'x' * 63}"

    def tool(*words: str) -> None:
        subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)

    tool("create", "-q", "-f", "qcow2", str(path), "1M")
    with path.open("rb") as file:
        assert disk_files.snapshots_of(file.fileno()) == (1 << 20, ())
        tool("snapshot", "-c", "kvm-one", str(path))
        tool("resize", "-q", str(path), "2M")
        for number in range(100):
            tool("snapshot", "-c", longest if number == 0 else f"n{number}", str(path))
        size, found = disk_files.snapshots_of(file.fileno())
    assert size == 2 << 20
    assert [(one.name, one.size >> 20) for one in found[:3]] == [("kvm-one", 1), (longest, 2), ("n1", 2)]
    assert len(found) == 101
    assert all(one.at > 1_700_000_000 for one in found)


@pytest.mark.parametrize("cut", [0, 8, 40, 60])
def test_a_table_that_is_cut_off_is_read_as_far_as_it_goes(cut: int, tmp_path: Path) -> None:
    """Whoever has taken over a QEMU may have written anything there."""
    path = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    with path.open("r+b") as file:
        file.seek(60)
        file.write((2**32 - 1).to_bytes(4, "big") + (path.stat().st_size - cut).to_bytes(8, "big"))
        file.flush()
        size, found = disk_files.snapshots_of(file.fileno())
    assert size == 1 << 20
    assert len(found) <= 1


# --- clones -----------------------------------------------------------------------------------------------------

KEYS = {
    "host": "a", "ram": "64", "mac": "02:00:00:00:00:01", "nic/1/mac": "02:00:00:00:00:02", "spice_port": "5901",
    "power": "off", "restart_request": "r", "rollback_request": "s:1", "snapshot/s": "x", "user-data": "#cloud-config",
    "rbd": "rbd/web1 size=2G discard", "disk/1": "rbd/ns/web1-data iops=5", "disk/2": "rbd/iso ro",
    "disk/3": "file:web1-3.qcow2 size=1G", "disk/4": "file:other.raw", "description": "the shop",
}  # fmt: skip


def cloned(*, given: dict[str, str] | None = None, full: bool = False, taken: tuple[str, ...] = ()) -> dict[str, str]:
    spec = wish(**KEYS).spec
    assert spec is not None
    found = clone(ONE, TWO, keys=KEYS, spec=spec, given=given or {}, snapshot="s", full=full, taken=taken)
    assert (
        parse_wish(
            TWO,
            {
                k.encode(): RawValue(v.replace("auto", "02:00:00:00:00:0a").encode(), 1)
                for k, v in found.keys.items()
                if k != "mac"
            },
        ).problems
        == ()
    )
    return dict(found.keys)


def test_the_keys_of_a_clone() -> None:
    """All but what no two machines may have; disks of its own, which begin as those were."""
    assert cloned() == {
        "host": "a", "ram": "64", "mac": "auto", "nic/1/mac": "auto", "user-data": "#cloud-config",
        "rbd": "rbd/web2 size=2G from=rbd/web1@kvm-s discard",
        "disk/1": "rbd/ns/web2-data from=rbd/ns/web1-data@kvm-s iops=5",
        "disk/2": "rbd/iso ro",
        "disk/3": "file:web2-3.qcow2 size=1G from=file:web1-3.qcow2",
        "disk/4": "file:web2-4.raw from=file:other.raw",
        "description": "the shop",
    }  # fmt: skip
    assert cloned(full=True)["rbd"] == "rbd/web2 size=2G from=rbd/web1@kvm-s copy discard"


def test_a_namespace_that_is_its_own() -> None:
    """Where guests have namespaces, a clone gets the one of its id."""
    keys = {"ram": "64", "rbd": "rbd/web1/root", "disk/1": "rbd/web1/web1-data"}
    spec = wish(**keys).spec
    assert spec is not None
    found = clone(ONE, TWO, keys=keys, spec=spec, given={}, snapshot="s", full=True, taken=()).keys
    assert found["rbd"] == "rbd/web2/root from=rbd/web1/root@kvm-s copy"
    assert found["disk/1"] == "rbd/web2/web2-data from=rbd/web1/web1-data@kvm-s copy"


def test_what_people_say_wins() -> None:
    found = cloned(
        given={"disk/0": "rbd/mine", "host": "b", "disk/3": "file:x.qcow2 size=1G", "mac": "02:00:00:00:00:09"}
    )
    assert "rbd" not in found
    assert (found["disk/0"], found["disk/3"], found["host"]) == ("rbd/mine", "file:x.qcow2 size=1G", "b")
    assert found["mac"] == "02:00:00:00:00:09"


def test_no_disk_of_another_machine_is_taken() -> None:
    with pytest.raises(Unclonable, match="rbd would be rbd/web2"):
        cloned(taken=("rbd/web2",))
    assert cloned(taken=("rbd/web2",), given={"rbd": "rbd/mine"})["rbd"] == "rbd/mine"
