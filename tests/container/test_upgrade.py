"""The upgrade test: a full host, its supervisor replaced ten times. `make upgrade`; figures in docs/reliability.md."""

from __future__ import annotations

import os
import signal
import time

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from tests.support.boxed import Boxed, Boxes, begin
from tests.support.cluster import Keys, Qemu, eventually
from tests.support.docker import Docker
from tests.support.guest import heart_flags
from tests.support.heartbeat import Heartbeats

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.soak, pytest.mark.timeout(3000)]

GUESTS = [f"up{number:02}" for number in range(1, 21)]
LATE = ["late1", "late2"]
"""Started while the supervisor is killed."""

HEARTBEAT_S = 0.2

AT_ONCE = 4
REFERENCE_S = 30.0
REPLACEMENTS = 10
IN_THE_MIDDLE = 5
WORST_S = 1.0
"""No pause may be longer, unless undisturbed guests on this machine have such pauses, too."""


def kill_in_the_middle_of_a_start(box: Boxed, keys: Keys, heart: Guest) -> list[str]:
    """SIGKILL for the container's init when the record of the first late guest is there; what the locks say then."""
    init = box.init
    for one in LATE:
        box.run_dir.joinpath(one).mkdir()
    flags = heart_flags(heart, tag="late", heartbeat_s=HEARTBEAT_S)
    keys.machines(box.name, *LATE, ram=96, extra_flags=flags, shutdown_timeout=0)
    deadline = time.monotonic() + 60
    while not any(box.record(one).exists() for one in LATE):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(init, signal.SIGKILL)
    box.wait_ended()
    locks = {one: keys.lock(one) for one in LATE}
    return [f"{one} {'without a lock' if lock is None else lock.state.value}" for one, lock in locks.items()]


def gaps(hearts: Heartbeats, since: float, until: float) -> str:
    """The largest gaps between two times, and what the machine had to do."""
    return (
        f"largest gap {hearts.gap(since, until):.2f} s, by the guests' clocks {hearts.uptime_gap(since, until):.2f} s "
        f"(the listener was held up {hearts.held_up(since, until):.2f} s, load {os.getloadavg()[0]:.1f})"
    )


def test_twenty_guests_and_ten_versions(docker: Docker, boxes: Boxes, keys: Keys, heart: Guest) -> None:
    """Law: no guest is started again, none pauses; each is adopted by every version, with its process and its epoch."""
    versions = [docker.build_version(str(number)) for number in range(2, REPLACEMENTS + 2)]
    box = boxes(heart).start()
    before: dict[str, Qemu] = {}
    # Not at once: a guest that boots takes a whole processor.
    for first in range(0, len(GUESTS), AT_ONCE):
        some = GUESTS[first : first + AT_ONCE]
        before |= begin(box, keys, {one: heart_flags(heart, tag=one, heartbeat_s=HEARTBEAT_S) for one in some})
    told = [f"{len(GUESTS)} guests, a heartbeat every {HEARTBEAT_S:g} s, {os.cpu_count()} processors"]
    with Heartbeats({one: box.run_dir / one / "console.log" for one in GUESTS}) as hearts:
        begun = time.monotonic()
        time.sleep(REFERENCE_S)
        now = time.monotonic()
        reference = hearts.gap(begun, now)
        told.append(f"before: {gaps(hearts, begun, now)}")
        worst = 0.0
        for number, version in enumerate(versions, 1):
            expected = [*GUESTS, *(LATE if number > IN_THE_MIDDLE else [])]
            ended_at = time.monotonic()
            if number == IN_THE_MIDDLE:
                how = f"kill -9 in the middle of a start ({', '.join(kill_in_the_middle_of_a_start(box, keys, heart))})"
            else:
                how = ("stop --time=15", "kill", "rm --force", "kill -9 of init")[number % 4]
                box.kill9_init() if how.startswith("kill -9") else box.end(*how.split())
            gone_at = time.monotonic()
            docker.run("rm", "--force", box.container, check=False)
            old, box.image = box.image, version
            box.start()
            if number == IN_THE_MIDDLE:
                before |= box.wait_running(*LATE)
                eventually("the adoptions", lambda: box.metric("adopted_total") >= len(GUESTS))
            else:
                box.adopted(len(expected))
            adopted_at = time.monotonic()
            docker.run("rmi", "--force", old)
            eventually("a heartbeat of each", lambda since=adopted_at: hearts.all_beat(since))  # type: ignore[misc]
            now = time.monotonic()
            # A pause in which the listener did not look is not known to be one of a guest.
            worst = max(
                worst, hearts.gap(ended_at, now) - hearts.held_up(ended_at, now), hearts.uptime_gap(ended_at, now)
            )
            told.append(
                f"{number:2} {how}: {gaps(hearts, ended_at, now)}; all adopted {box.adoption_s:.2f} s after its start, "
                f"{adopted_at - box.began:.2f} s after docker run, {adopted_at - gone_at:.2f} s after the other's end"
            )
            assert {qemu.instance: qemu for qemu in box.qemus()} == before
    print("\n".join(told))  # noqa: T201
    hearts.assert_unbroken()
    assert box.wait_running(*GUESTS, *LATE) == before
    for one, status in box.instances().items():
        assert (status.pid, status.restarts) == (before[one].pid, 0), status
        assert one in LATE or status.epoch == 1
    assert worst <= max(WORST_S, 2 * reference)
