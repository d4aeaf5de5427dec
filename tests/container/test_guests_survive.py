"""Guests outlive their supervisor's container, whatever ends it: real guests, a real engine, the real image."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.status import Phase
from tests.support.boxed import Boxed, Boxes, begin
from tests.support.cluster import Keys, eventually
from tests.support.docker import Docker
from tests.support.heartbeat import Heartbeats

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

ENDS: dict[str, Callable[[Boxed], None]] = {
    "stop": lambda box: box.end("stop", "--time=15"),
    "kill": lambda box: box.end("kill"),
    "rm": lambda box: box.end("rm", "--force"),
    "kill-9-of-init": lambda box: box.kill9_init(),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_guest_outlives_the_end_of_its_container(
    docker: Docker, boxes: Boxes, keys: Keys, guest: Guest, end: str
) -> None:
    """Law: the same process, its heart beating; a new version adopts it with its epoch, and starts nothing."""
    box = boxes().start()
    assert box.metric("guests_survive") == 1
    (before,) = begin(box, keys, {"one": guest.extra_flags(tag="one", heartbeat_s=0.2)}).values()
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
        f"{hearts.uptime_gap(ended_at, now):.2f} s; adopted {box.adoption_s:.2f} s after its start, "
        f"{adopted_at - box.began:.2f} s after docker run"
    )


UNREACHABLE = {
    "https": {"url": "https://127.0.0.1:1/x"},
    "rbd": {"pool": "p", "image": "i", "conf": "/nowhere"},
}
"""Disks that cannot be opened, of drivers that are modules of QEMU."""


def plug_in(box: Boxed, instance: str, driver: str) -> str:
    """QEMU's error when such a disk is plugged in; another one when it has no such driver."""
    answer = box.ask(instance, "blockdev-add", driver=driver, **{"node-name": "late"}, **UNREACHABLE[driver])
    return str(answer["error"]["desc"])


def test_what_the_deletion_of_the_old_image_takes_along(docker: Docker, boxes: Boxes, keys: Keys, guest: Guest) -> None:
    """Law: a guest runs on, reboots and is adopted; QEMU's modules that it had not loaded are gone with the image.

    What docs/container.md says of it: an image that a container names, be it a stopped one, is kept by Docker.
    """
    old = docker.copy_alone("kvmsupervisor-old")
    box = boxes()
    box.image = old
    box.start()
    (before,) = begin(box, keys, {"one": guest.extra_flags(tag="one", heartbeat_s=0.2)}).values()
    assert "Unknown driver" not in plug_in(box, "one", "https")
    box.end("stop", "--time=15")
    # Docker keeps what any container names.
    assert docker.run("rmi", old, check=False).returncode != 0
    docker.run("rm", box.container)
    with Heartbeats({"one": box.run_dir / "one" / "console.log"}) as hearts:
        eventually("heartbeats", lambda: len(hearts.beats("one")) > 5)
        deleted_at = time.monotonic()
        docker.run("rmi", old)
        box.replace(docker.build_version("2"))
        box.adopted(1)
        now = time.monotonic()
        eventually("heartbeats without the image", lambda: hearts.all_beat(now))
    hearts.assert_unbroken()
    print(f"largest gap around the deletion {hearts.gap(deleted_at, now):.2f} s")  # noqa: T201
    assert box.wait_running("one") == {"one": before}
    missing = plug_in(box, "one", "rbd")
    assert "Unknown driver 'rbd'" in missing, missing
    assert "Unknown driver" not in plug_in(box, "one", "https")
    # The firmware, and what the guest boots, are in QEMU's memory.
    box.say("one", "reboot")
    box.hears("one", "HELLO from one", times=2)
    assert box.qemu("one") == before
    # The next start is one from the new image: all is there again.
    keys.put("one", restart_request=1)
    box.wait_for("one", lambda status: status.phase is Phase.RUNNING and status.pid not in {None, before.pid})
    assert "Unknown driver" not in plug_in(box, "one", "rbd")


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
    (before,) = begin(box, keys, {"one": guest.extra_flags(tag="one", heartbeat_s=0.2)}).values()
    box.end("kill")
    eventually("the guest's end", lambda: not before.alive)
    box.start()
    after = box.wait_running("one")["one"]
    assert (after.pid, after.incarnation) != (before.pid, before.incarnation)
    status = box.status("one")
    assert status is not None
    assert status.epoch == 2
