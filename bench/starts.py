"""One machine: from its keys to QEMU, and from QEMU's end to the next one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from bench import bare
from bench.figures import Figure, Sample, milliseconds, within
from bench.rig import Host, Rig, kill

BUDGET = "≤ 1.15 × + 10 ms"


def measure(rig: Rig, *, pairs: int) -> Iterator[Figure]:
    """Start and restart, each beside a bare spawn of the same QEMU, in turn.

    A machine's second restart in ten minutes is delayed on purpose, so every one is measured on a machine of its own.
    """
    host = rig.host()
    host.start()
    host.wait_ready()
    _start(rig, host, "warm-up")
    bares, starts, restarts = [], [], []
    for number in range(pairs):
        name = f"vm{number}"
        rig.tell(f"start and restart {number + 1} of {pairs}")
        bares.append(bare.spawn(host.record("warm-up"), host.run_dir / "warm-up", rig.folder / "bare"))
        starts.append(_start(rig, host, name))
        bares.append(bare.spawn(host.record("warm-up"), host.run_dir / "warm-up", rig.folder / "bare"))
        restarts.append(_restart(host, name))
        rig.keys.put({f"{key.removesuffix('host')}power": "off" for key in host.wish([name]) if key.endswith("/host")})
        host.wait_gone(name)
    host.clear()
    reference = Sample.of(one.answered_s for one in bares)
    greeting = Sample.of(one.greeted_s for one in bares)
    note = f"the bare QEMU greets after {milliseconds(greeting.median)} already, before it has made its devices"
    for what, measured in (
        ("key written → QEMU answers QMP", starts),
        ("QEMU killed → the next answers QMP", restarts),
    ):
        sample = Sample.of(measured)
        yield Figure(
            what=what,
            measured=sample,
            unit=milliseconds,
            reference=reference,
            reference_is="bare spawn",
            budget=BUDGET,
            met=within(sample, reference, 1.15, 0.010),
            notes=(note,),
        )


def _start(rig: Rig, host: Host, name: str) -> float:
    """Seconds from before the keys are sent to the answer. Returns when the guest runs."""
    keys = host.wish([name])
    begun = time.monotonic()
    rig.keys.put(keys)
    taken = host.answers([name])[name].answered_at - begun
    _wait_running(host, name)
    return taken


def _restart(host: Host, name: str) -> float:
    """Seconds from before the signal to the answer of the next QEMU."""
    pid = host.pids()[name]
    begun = time.monotonic()
    kill(pid)
    taken = host.answers([name])[name].answered_at - begun
    _wait_running(host, name)
    return taken


def _wait_running(host: Host, name: str) -> None:
    """Wait until the guest runs: what follows a QEMU whose guest never ran is another story."""
    host.wait(f"for the guest of {name} to run", lambda: host.answers([name])[name].run_state == "running", 0.05)


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
