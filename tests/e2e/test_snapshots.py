"""Snapshots with real supervisors, QEMU and Ceph: what a guest has written is read from its disks."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.status import Phase, Status
from tests.chaos.armed import FOLDER, KILL, Points
from tests.e2e.test_live_move import LISTEN
from tests.support.ceph import Ceph
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.farm import Farm
from tests.support.lock_history import check_lock_history
from tests.support.rbd_qemu import COUNTER, SECTOR, WRITES_PER_S

# As the writer of `rbd_qemu`, but each count goes to the first disk and then to the second: whatever is of one instant
# has them equal, or the first one ahead by one.
_CODE = bytes.fromhex(
    "31c0 8ed8 8ec0 fb f4 ff06007d b80103 b90200 ba8000 bb007c cd13 b80103 b90200 ba8100 bb007c cd13 ebdd"
)
TWO_WRITER = _CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


class Pair:
    """A machine with a disk in Ceph and a second one, in Ceph or in a file, whose guest counts on both."""

    def __init__(self, farm: Farm, folder: Path, *, second: str) -> None:
        self.farm, self.keys, self.ceph = farm, farm.keys, farm.ceph
        self.disks = folder / "disks"
        self.disks.mkdir(mode=0o700)
        self.first = farm.image.beside(f"{farm.image.image}-first")
        boot = folder / "boot.img"
        boot.write_bytes(TWO_WRITER.ljust(1 << 20, b"\0"))
        features = [word for name in ("layering", "exclusive-lock") for word in ("--image-feature", name)]
        self.ceph.rbd("import", "--no-progress", *features, str(boot), self.first.name)
        self.second: RbdDisk | Path
        if second == "rbd":
            self.second = farm.image.beside(f"{farm.image.image}-second")
            self.ceph.rbd_create(self.second.name, "1M")
            key = f"{self.second.name} iops={WRITES_PER_S}"
        else:
            self.second = self.disks / "second.qcow2"
            key = f"file:second.qcow2 size=1M iops={WRITES_PER_S}"
        self.wishes = {"ram": 16, "disk/0": f"{self.first.name} iops={WRITES_PER_S}", "disk/1": key}

    def host(self, name: str) -> Host:
        return self.farm.host(name, KVM_DISK_DIR=str(self.disks))

    def begin(self, host: Host) -> None:
        self.keys.machines(host.name, "1", **self.wishes)
        host.wait_running("1")
        eventually("writes", lambda: self.counts("", live=True)[0] > 3)

    def counts(self, snap: str, *, live: bool = False) -> tuple[int, int]:
        """What is on both disks, or in a snapshot of them. Of a file that QEMU has open only snapshots are read."""
        at = f"@{snap}" if snap else ""
        first = _count(self.ceph, f"{self.first.name}{at}")
        if isinstance(self.second, RbdDisk):
            return first, _count(self.ceph, f"{self.second.name}{at}")
        return first, -1 if live else _file_count(self.second, snap)


def _count(ceph: Ceph, spec: str) -> int:
    out = Path(str(ceph.folder)) / f"out-{spec.replace('/', '-')}"
    ceph.rbd("export", "--no-progress", spec, str(out))
    with out.open("rb") as file:
        file.seek(SECTOR + COUNTER)
        found = int.from_bytes(file.read(2), "little")
    out.unlink()
    return found


def _file_count(path: Path, snap: str) -> int:
    raw = path.with_suffix(".out")
    options = ["-l", f"snapshot.name={snap}"] if snap else []
    subprocess.run(["qemu-img", "convert", "-U", *options, "-f", "qcow2", "-O", "raw", path, raw], check=True)
    with raw.open("rb") as file:
        file.seek(SECTOR + COUNTER)
        return int.from_bytes(file.read(2), "little")


def has(*names: str) -> Any:
    return lambda status: tuple(snap.name for snap in status.snapshots) == names


@pytest.mark.parametrize("second", ["rbd", "file"])
def test_all_disks_at_one_instant(farm: Farm, tmp_path: Path, second: str) -> None:
    """A snapshot of two disks, on which a guest counts, has both of one instant; taken, rolled back to, taken away."""
    pair = Pair(farm, tmp_path, second=second)
    host, keys = pair.host("alpha"), farm.keys
    pair.begin(host)
    names = [f"s{number}" for number in range(3)]
    for number, name in enumerate(names):
        keys.put("1", **{f"snapshot/{name}": "a note — ünïcode"})
        status = host.wait_for("1", has(*names[: number + 1]))
        assert status.phase is Phase.RUNNING
        one, two = pair.counts(f"kvm-{name}")
        assert one - two in {0, 1}, (one, two)
    snap = status.snapshots[-1]
    assert (snap.how, snap.disks, snap.size) == ("paused", ("disk/0", "disk/1"), 2 << 20)
    assert "agent" in (snap.why or "")
    assert host.run_state(host.qemu("1")) == "running"

    keys.put("1", rollback_request="s0:1")
    told = host.wait_for("1", lambda s: "once it is off" in s.reason)
    assert told.phase is Phase.RUNNING
    keys.put("1", power="off")
    done: Status = host.wait_for("1", lambda s: s.rollback is not None and s.rollback.done)
    assert done.rollback is not None
    assert done.rollback.request == "s0:1"
    eventually("the lock to be released", lambda: keys.lock("1") is None)
    assert pair.counts("") == pair.counts("kvm-s0")

    keys.put("1", **{"snapshot/s1": "delete", "snapshot/off": "while it is off"})
    status = host.wait_for("1", has("off", "s0", "s2"))
    assert status.snapshots[0].how == "off"
    assert pair.counts("kvm-off") == pair.counts("kvm-s0")
    before = pair.counts("kvm-off")
    keys.put("1", power="on")
    host.wait_running("1")
    eventually("it to go on from there", lambda: pair.counts("", live=True)[0] != before[0])
    for name in ("off", "s0", "s2"):
        keys.put("1", **{f"snapshot/{name}": "delete"})
    host.wait_for("1", has())
    assert json.loads(farm.ceph.rbd("snap", "ls", pair.first.name, "--format", "json")) == []
    assert host.metric("internal_errors_total", instance="1") == 0


def armed(hosts: Hosts, keys: Keys, **settings: str) -> tuple[Host, Points]:
    """A host whose supervisor has failpoints."""
    host = hosts("alpha", keys=keys, KVM_QEMU_USER="", KVM_EXTRA_FLAGS="any", **settings)
    folder = host.folder / "points"
    folder.mkdir()
    host.settings |= {FOLDER: str(folder)}
    host.entry = "tests.chaos.armed"
    return host.start(), Points(folder)


def killed_at(host: Host, points: Points, name: str) -> None:
    eventually(f"{name} is come to", lambda: points.was_met)
    eventually("its end", lambda: not host.running)


def held(pair: Pair) -> set[str]:
    """What the first disk calls its snapshots."""
    found: list[dict[str, Any]] = json.loads(pair.ceph.rbd("snap", "ls", pair.first.name, "--format", "json"))
    return {one["name"] for one in found}


def test_cut_off(farm: Farm, tmp_path: Path) -> None:
    """A supervisor that is killed at any step: the guest goes on without it, and the next one finishes what it began.

    A snapshot is of one instant, or is none; a rollback is on all disks before the machine starts.
    """
    pair = Pair(farm, tmp_path, second="rbd")
    keys = farm.keys
    settings = {"CEPH_CONF": str(farm.ceph.conf), "CEPH_ID": "vm", "KVM_DISK_DIR": str(pair.disks)}
    host, points = armed(farm.hosts, keys, KVM_SHUTDOWN_TIMEOUT="0", **settings)
    pair.begin(host)
    qemu = host.qemu("1")
    for name in ("before SNAPSHOT", "standing still", "images snapshot", "snapshot taken"):
        snap = name.replace(" ", "-")
        points.arm(name, KILL)
        keys.put("1", **{f"snapshot/{snap}": "x"})
        killed_at(host, points, name)
        eventually("the guest to go on by itself", lambda: host.run_state(qemu) == "running")
        host.start()
        status = host.wait_for("1", lambda s, snap=snap: snap in [one.name for one in s.snapshots])  # type: ignore[misc]
        one, two = pair.counts(f"kvm-{snap}")
        assert one - two in {0, 1}, (name, one, two)
        assert [name for name in held(pair) if name.startswith("kvm-.")] == []
    assert qemu.alive, "none of that ended its QEMU"

    points.arm("taken away from one disk", KILL)
    keys.put("1", **{"snapshot/standing-still": "delete"})
    killed_at(host, points, "taken away from one disk")
    host.start()
    host.wait_for("1", lambda s: "standing-still" not in [one.name for one in s.snapshots])
    assert "kvm-standing-still" not in held(pair)

    keys.put("1", power="off")
    host.wait_for("1", lambda s: s.phase is Phase.STOPPED)
    for number, name in enumerate(("to be rolled back", "one disk rolled back")):
        points.arm(name, KILL)
        keys.put("1", rollback_request=f"images-snapshot:{number}")
        killed_at(host, points, name)
        assert keys.lock("1").storage is Storage.UNFENCEABLE  # type: ignore[union-attr]
        # Whatever people want by now, it does not start with one disk rolled back.
        keys.put("1", power="on")
        host.start()
        status = host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.rollback is not None and s.rollback.done)
        assert status.rollback is not None
        assert status.rollback.request == f"images-snapshot:{number}"
        keys.put("1", power="off")
        host.wait_for("1", lambda s: s.phase is Phase.STOPPED)
        one, two = pair.counts("")
        assert one - two in {0, 1}
    check_lock_history(keys, "1")


def test_clones(farm: Farm, tmp_path: Path) -> None:
    """`clone`: of a machine that runs, with disks in Ceph and, once it is off, in a file: each goes on from there."""
    pair = Pair(farm, tmp_path, second="file")
    host, keys = pair.host("alpha"), farm.keys
    pair.begin(host)
    refused = host.cli("clone", "1", "2")
    assert refused.returncode == 1
    assert "`stop 1 --wait`" in refused.stderr

    # Only the first disk of one that runs, as a clone and as a copy.
    for new, more in (("2", ()), ("3", ("--full",))):
        made = host.cli("clone", "1", new, f"disk/1=file:other-{new}.qcow2 size=1M", *more)
        assert made.returncode == 0, made.stderr
    for new in ("2", "3"):
        host.wait_running(new)
        image = keys.get(keys.layout.wish_key(InstanceId(new), "disk/0")).split()[0].decode()  # type: ignore[union-attr]
        info = json.loads(farm.ceph.rbd("info", image, "--format", "json"))
        assert ("parent" in info) is (new == "2")
        eventually("it to write", lambda image=image: _count(farm.ceph, image) > 0)  # type: ignore[misc]
        snap = _count(farm.ceph, f"{pair.first.name}@kvm-clone-{new}")
        eventually("it to go on from there", lambda image=image, snap=snap: _count(farm.ceph, image) != snap)  # type: ignore[misc]
    assert host.cli("snapshot", "delete", "1", "clone-3", "--wait").returncode == 0
    assert host.cli("snapshot", "delete", "1", "clone-2").returncode == 0
    stays = host.wait_for("1", lambda s: "is a clone of it" in s.reason)
    assert "clone-2" in [snap.name for snap in stays.snapshots]

    keys.put("1", power="off")
    host.wait_for("1", lambda s: s.phase is Phase.STOPPED)
    made = host.cli("clone", "1", "4", "--full", "--wait")
    assert made.returncode == 0, made.stderr
    assert "running on alpha" in made.stdout
    found = keys.get(keys.layout.wish_key(InstanceId("4"), "disk/1"))
    assert found is not None
    assert found.startswith(b"file:4-1.qcow2 ")
    before = pair.counts("")[1]
    keys.put("4", power="off")
    host.wait_for("4", lambda s: s.phase is Phase.STOPPED)
    assert _file_count(pair.disks / "4-1.qcow2", "") != before
    assert keys.get(keys.layout.wish_key(InstanceId("4"), "power")) == b"off"


def test_a_guest_with_an_agent(keys: Keys, hosts: Hosts, agent_options: list[str], tmp_path: Path) -> None:
    """Its file system is clean in the snapshot, and goes on: also where its supervisor is killed while it is frozen."""
    disks = tmp_path / "disks"
    disks.mkdir(mode=0o700)
    raw, disk = tmp_path / "raw", disks / "a.qcow2"
    subprocess.run(["mkfs.ext4", "-q", raw, "16M"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, disk], check=True)
    host, points = armed(hosts, keys, KVM_DISK_DIR=str(disks))
    flags = shlex.join(agent_options)
    keys.put("1", host=host.name, ram=192, extra_flags=flags, shutdown_timeout=600, **{"disk/0": "file:a.qcow2"})
    host.wait_for("1", lambda s: s.agent is not None)
    eventually("its disk is mounted", lambda: "MOUNTED" in host.console("1"))

    points.arm("standing still", KILL)
    keys.put("1", **{"snapshot/one": "x"})
    killed_at(host, points, "standing still")
    eventually("the keeper to thaw it", lambda: asked(host, "guest-fsfreeze-status") == "thawed")
    host.start()
    status = host.wait_for("1", has("one"))
    assert (status.snapshots[0].how, status.snapshots[0].why) == ("frozen", None)
    assert asked(host, "guest-fsfreeze-status") == "thawed"
    copy = tmp_path / "copy"
    subprocess.run(["qemu-img", "convert", "-U", "-l", "snapshot.name=kvm-one", "-O", "raw", disk, copy], check=True)
    head = subprocess.run(["dumpe2fs", "-h", copy], check=True, capture_output=True, text=True).stdout
    assert "needs_recovery" not in head, "nothing is left to be done by whoever mounts it"
    assert subprocess.run(["e2fsck", "-fn", copy], check=False, capture_output=True).returncode == 0


def asked(host: Host, command: str) -> object:
    """What the guest's agent answers; None where somebody else speaks to it just now."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(5)
        line.connect(str(host.run_dir / "1" / "agent.sock"))
        line.sendall(b"\xff" + json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": 5}}).encode() + b"\n")
        line.sendall(json.dumps({"execute": command}).encode() + b"\n")
        heard = b""
        try:
            while heard.rpartition(b"\xff")[2].count(b"\n") < 2:
                heard += line.recv(4096)
        except TimeoutError:
            return None
        return json.loads(heard.rpartition(b"\xff")[2].splitlines()[1]).get("return")


def test_a_machine_that_moves_and_grows(farm: Farm) -> None:
    """Snapshots go with it, live: they are listed, rolled back to and taken away there, whatever size its disk has."""
    hosts = [farm.host(name, **LISTEN) for name in ("alpha", "beta")]
    alpha, beta = hosts
    keys, image = farm.keys, farm.image
    farm.machine("alpha", rbd=f"{image.name} size=1M iops={WRITES_PER_S}")
    alpha.wait_running("1")
    farm.writes()
    keys.put("1", **{"snapshot/small": "before it grew"})
    taken = alpha.wait_for("1", has("small")).snapshots
    keys.delete("1", "snapshot/small")
    keys.put("1", rbd=f"{image.name} size=4M iops={WRITES_PER_S}")

    def size() -> int:
        return int(json.loads(farm.ceph.rbd("info", image.name, "--format", "json"))["size"])

    eventually("it to be grown", lambda: size() == 4 << 20)
    keys.put("1", host="beta")
    moved = beta.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.move is not None)
    assert moved.snapshots == taken, "also without its key, which does nothing"
    keys.put("1", power="off")
    beta.wait_for("1", lambda s: s.phase is Phase.STOPPED)
    rolled = beta.cli("snapshot", "rollback", "1", "small", "--yes", "--wait")
    assert rolled.returncode == 0, rolled.stderr
    assert size() == 1 << 20
    assert _count(farm.ceph, image.name) == _count(farm.ceph, f"{image.name}@kvm-small")
    keys.put("1", power="on")
    beta.wait_running("1")
    assert size() == 4 << 20, "the size of its key, again"
    listed = json.loads(beta.cli("snapshot", "list", "1", "-o", "json").stdout)
    assert [(one["name"], one["state"], one["wished"]) for one in listed] == [("small", "at once", False)]
    gone = beta.cli("snapshot", "delete", "1", "small", "--wait")
    assert gone.returncode == 0, gone.stderr
    assert keys.names(keys.layout.wish_key(InstanceId("1"), "snapshot/")) == []
    assert json.loads(farm.ceph.rbd("snap", "ls", image.name, "--format", "json")) == []
