"""Guests outlive their supervisor's container, whatever ends it: real guests, a real engine, the real image."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvmsupervisor.cli.demo_guest import Guest
from kvmsupervisor.domain.status import Phase
from tests.support.boxed import Boxed, Boxes
from tests.support.cluster import Keys, Qemu, eventually
from tests.support.docker import Docker
from tests.support.heartbeat import Heartbeats

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

HEARTBEAT_S = 0.2

ENDS: dict[str, Callable[[Boxed], None]] = {
    "stop": lambda box: box.end("stop", "--time=15"),
    "kill": lambda box: box.end("kill"),
    "rm": lambda box: box.end("rm", "--force"),
    "kill-9-of-init": lambda box: box.kill9_init(),
}


def begin(box: Boxed, keys: Keys, guest: Guest, *instances: str, heartbeat_s: float = HEARTBEAT_S) -> dict[str, Qemu]:
    """Start guests that tell their heartbeats; they have booted when this returns."""
    for one in instances:
        flags = guest.extra_flags(tag=one, heartbeat_s=heartbeat_s)
        keys.machines(box.name, one, ram=96, extra_flags=flags, shutdown_timeout=0)
    running = box.wait_running(*instances)
    for one in instances:
        box.hears(one, f"HELLO from {one}")
    return running


@pytest.mark.parametrize("end", ENDS)
def test_a_guest_outlives_the_end_of_its_container(
    docker: Docker, boxes: Boxes, keys: Keys, guest: Guest, end: str
) -> None:
    """Law: the same process, its heart beating; a new version adopts it with its epoch, and starts nothing."""
    box = boxes().start()
    assert box.metric("guests_survive") == 1
    (before,) = begin(box, keys, guest, "one").values()
    lock = keys.lock("one")
    with Heartbeats({"one": box.run_dir / "one" / "console.log"}) as hearts:
        eventually("heartbeats", lambda: len(hearts.beats("one")) > 5)
        ended_at = time.monotonic()
        ENDS[end](box)
        gone_at = time.monotonic()
        eventually("a heartbeat without a supervisor", lambda: hearts.all_beat(gone_at))
        assert box.qemus() == [before]
        box.replace(docker.build_version("2"))
        box.adopted(1)
        adopted_at = time.monotonic()
        eventually("a heartbeat after the adoption", lambda: hearts.all_beat(adopted_at))
        now = time.monotonic()
    hearts.assert_unbroken()
    assert box.wait_running("one") == {"one": before}
    status = box.status("one")
    assert status is not None
    assert (status.pid, status.epoch, status.restarts, status.last_exit) == (before.pid, 1, 0, None)
    assert keys.lock("one") == lock
    print(  # noqa: T201
        f"{end}: largest gap {hearts.gap(ended_at, now):.2f} s, by the guest's clock "
        f"{hearts.uptime_gap(ended_at, now):.2f} s; adopted {adopted_at - box.began:.2f} s after docker run"
    )


def load_rbd(box: Boxed, instance: str) -> str:
    """QEMU's error when a disk in Ceph is plugged in that nobody can reach; its RBD driver is a module."""
    node = {"driver": "rbd", "node-name": "late", "pool": "p", "image": "i", "conf": "/nowhere"}
    return str(box.ask(instance, "blockdev-add", **node)["error"]["desc"])


def test_what_the_deletion_of_the_old_image_takes_along(docker: Docker, boxes: Boxes, keys: Keys, guest: Guest) -> None:
    """Law: a guest runs on, reboots and is adopted; QEMU's modules that it had not loaded are gone with the image.

    What docs/container.md says of it: an image that a container names, a stopped one even, is kept by Docker.
    """
    old = docker.copy_alone("kvmsupervisor-old")
    box = boxes()
    box.image = old
    box.start()
    before = begin(box, keys, guest, "bare", "kept")
    # In one of them the module is there before.
    assert "Unknown driver" not in load_rbd(box, "kept")
    box.end("stop", "--time=15")
    # Docker keeps what any container names.
    assert docker.run("rmi", old, check=False).returncode != 0
    docker.run("rm", box.container)
    with Heartbeats({one: box.run_dir / one / "console.log" for one in before}) as hearts:
        docker.run("rmi", old)
        box.replace(docker.build_version("2"))
        box.adopted(2)
        now = time.monotonic()
        eventually("heartbeats without the image", lambda: hearts.all_beat(now))
    hearts.assert_unbroken()
    assert box.wait_running("bare", "kept") == before
    assert "Unknown driver" in load_rbd(box, "bare")
    assert "Unknown driver" not in load_rbd(box, "kept")
    # The firmware and what the guest boots are in QEMU's memory.
    box.say("bare", "reboot")
    box.hears("bare", "HELLO from bare", times=2)
    assert box.qemu("bare") == before["bare"]
    # The next start is one from the new image: all is there again.
    keys.put("bare", restart_request=1)
    box.wait_for("bare", lambda status: status.phase is Phase.RUNNING and status.pid not in {None, before["bare"].pid})
    assert "Unknown driver" not in load_rbd(box, "bare")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "it has a PID namespace of its own; run it with --pid=host"),
        (("--pid=host",), "QEMU runs in its cgroup (systemd: "),
    ],
    ids=["own pids", "own cgroups"],
)
def test_without_the_mounts_it_says_so_and_the_guest_ends(
    boxes: Boxes, keys: Keys, guest: Guest, options: tuple[str, ...], said: str
) -> None:
    """Law: an error in the log of the start and a metric of 0 announce it; then the guest does end with the container.

    The next container finds that it ended, and starts it again.
    """
    box = boxes(options=options).start()
    (line,) = box.events("homes.lost_with_container")
    assert line["level"] == "error"
    assert said in line["reason"], line
    assert box.metric("guests_survive") == 0
    (before,) = begin(box, keys, guest, "one").values()
    box.end("kill")
    eventually("the guest's end", lambda: not before.alive)
    box.start()
    after = box.wait_running("one")["one"]
    assert (after.pid, after.incarnation) != (before.pid, before.incarnation)
    status = box.status("one")
    assert status is not None
    assert status.epoch == 2
