"""Machines that are clones of one image in Ceph, all at once, beside `rbd clone` and QEMU alone."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Figure, Sample, seconds
from bench.qmp import await_answers
from bench.rig import PATIENCE_S, Rig, kill
from bench.starts import cpus
from kvmsupervisor.domain.images import parent_of, parse_image
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph

IMAGE_BYTES, DISK = 8 << 20, "20G"
NAME = "bench"
MOST_RATIO = 3.0


def measure(rig: Rig, *, machines: int, rounds: int) -> Iterator[Figure]:
    """From the keys of all of them to all their guests, on a Ceph of one OSD in memory.

    Args:
        rig: to measure on.
        machines: how many.
        rounds: how often, each with clones of another image.
    """
    times, clones, spawns, imports = [], [], [], []
    with Ceph() as ceph:
        ceph.new_client("vm", CLIENT_CAPS)
        for number in range(rounds):
            rig.tell(f"{machines} clones, {number + 1} of {rounds}")
            took, parent, spawned = _all_at_once(rig, ceph, number, machines)
            times.append(took)
            spawns.append(spawned)
            imports.append(_images(ceph).count(parent.partition("@")[0].partition("/")[2]))
            clones.append(_clone_loop(ceph, parent, machines))
    alone = Sample.of(a + b for a, b in zip(clones, spawns, strict=True))
    yield Figure(
        what=f"{machines} machines with clones of one image, written at once → all run",
        measured=Sample.of(times),
        unit=seconds,
        reference=alone,
        reference_is=f"`rbd clone` and the same QEMUs, xargs -P {cpus() * 2}",
        budget=f"≤ {MOST_RATIO:g} ×",
        met=Sample.of(times).median <= MOST_RATIO * alone.median,
        notes=(
            f"`rbd clone` alone {seconds(Sample.of(clones).median)}",
            f"the QEMUs alone {seconds(Sample.of(spawns).median)}",
            f"images of the library in Ceph afterwards, by round: {', '.join(map(str, imports))}",
            "every image is looked at, made aside, noted and named; the import of the image is in it",
        ),
    )


def _images(ceph: Ceph) -> list[str]:
    found: list[str] = json.loads(ceph.rbd("ls", POOL, "--format", "json"))
    return found


def _all_at_once(rig: Rig, ceph: Ceph, number: int, machines: int) -> tuple[float, str, float]:
    """Seconds until all run, the snapshot that they are clones of, and seconds of their QEMUs alone."""
    shelf = rig.folder / f"shelf{number}"
    (shelf / "disks").mkdir(parents=True)
    (shelf / "images").mkdir(mode=0o700)
    data = f"image {number}".encode().ljust(IMAGE_BYTES, b"\0")
    (shelf / "a.raw").write_bytes(data)
    value = f"file://{shelf}/a.raw sha256={hashlib.sha256(data).hexdigest()}"
    host = rig.host()
    host.start(
        CEPH_CONF=str(ceph.conf),
        CEPH_ID="vm",
        KVM_QEMU_USER="",
        KVM_EXTRA_FLAGS="any",
        KVM_DISK_DIR=str(shelf / "disks"),
        KVM_IMAGE_DIR=str(shelf / "images"),
        KVM_MEDIA_ROOT=str(shelf),
    )
    host.wait_ready()
    names = [f"{NAME}{number}-{one}" for one in range(machines)]
    keys = {host.key(f".images/{NAME}"): value}
    for name in names:
        keys |= host.wish([name], rbd=f"{POOL}/{name} size={DISK} from={NAME}")
    begun = time.monotonic()
    rig.keys.put(keys)
    took = max(host.run_of(name).runs_at for name in names) - begun
    parent = str(parent_of(parse_image(NAME, value), POOL))
    host.clear()
    flags = rig.machine_keys()["extra_flags"]
    spawned = _qemus_alone(ceph, [f"{POOL}:{name}" for name in names], flags, rig.folder / f"bare{number}")
    return took, parent, spawned


def _qemus_alone(ceph: Ceph, images: list[str], flags: str, folder: Path) -> float:
    """Seconds until as many QEMUs with those images, from a shell loop, answer QMP."""
    folder.mkdir()
    places = [folder / str(number) for number in range(len(images))]
    lines = []
    for image, place in zip(images, places, strict=True):
        place.mkdir()
        pool, name = image.split(":")
        node = {"driver": "rbd", "node-name": "d", "pool": pool, "image": name, "conf": str(ceph.conf), "user": "vm"}
        argv = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "16"]
        argv += [*shlex.split(flags), "-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=d"]
        argv += ["-qmp", f"unix:{place / 'qmp'},server=on,wait=off", "-daemonize", "-pidfile", str(place / "pid")]
        lines.append(shlex.join(argv))
    begun = time.monotonic()
    loop = subprocess.Popen(
        ["xargs", "-P", str(cpus() * 2), "-d", "\\n", "-I", "LINE", "sh", "-c", "LINE"],
        stdin=subprocess.PIPE,
        text=True,
    )
    try:
        loop.communicate("\n".join(lines) + "\n")
        assert loop.returncode == 0, f"xargs ended with {loop.returncode}"
        answers = await_answers([place / "qmp" for place in places], timeout_s=PATIENCE_S, poll_s=0.01)
        return max(answer.answered_at for answer in answers.values()) - begun
    finally:
        for place in places:
            if (place / "pid").exists():
                kill(int((place / "pid").read_text()))


def _clone_loop(ceph: Ceph, parent: str, machines: int) -> float:
    """Seconds that a shell loop takes for as many clones, each made large."""
    rbd = shlex.join(["rbd", "--conf", str(ceph.conf), "--id", "admin"])
    names = [f"{POOL}/loop-{hashlib.sha256(parent.encode()).hexdigest()[:8]}-{one}" for one in range(machines)]
    line = f"{rbd} clone {shlex.quote(parent)} NAME && {rbd} resize --no-progress --size {DISK} NAME"
    begun = time.monotonic()
    subprocess.run(
        ["xargs", "-P", str(cpus() * 2), "-I", "NAME", "sh", "-c", line],
        input="\n".join(names),
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=Path("/"),
    )
    return time.monotonic() - begun
