"""One machine: from its keys to QEMU, and from QEMU's end to the next one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from bench import bare
from bench.figures import Figure, Sample, milliseconds, within
from bench.rig import Host, Rig, kill


def measure(rig: Rig, *, pairs: int) -> Iterator[Figure]:
    """Start and restart, each beside a bare spawn of the same QEMU, in turn.

    A machine's second restart in ten minutes is delayed on purpose, so every one is measured on a machine of its own.
    Its keys come in one transaction: nothing more is waited for (decision 0003).
    """
    host = rig.host()
    host.start()
    host.wait_ready()
    _start(rig, host, "warm-up")
    bares, starts, runs, restarts = [], [], [], []
    for number in range(pairs):
        name = f"vm{number}"
        rig.tell(f"start and restart {number + 1} of {pairs}")
        bares.append(bare.spawn(host.record("warm-up"), host.run_dir / "warm-up", rig.folder / "bare"))
        answered_s, runs_s = _start(rig, host, name)
        starts.append(answered_s)
        runs.append(runs_s)
        bares.append(bare.spawn(host.record("warm-up"), host.run_dir / "warm-up", rig.folder / "bare"))
        restarts.append(_restart(host, name))
        rig.keys.put({f"{key.removesuffix('host')}power": "off" for key in host.wish([name]) if key.endswith("/host")})
        host.wait_gone(name)
    host.clear()
    answers = Sample.of(one.answered_s for one in bares)
    yield _beside("key written → QEMU answers QMP", starts, answers, name="bare spawn", factor=1.10, plus_s=0.008)
    yield _beside("QEMU killed → the next answers QMP", restarts, answers, name="bare spawn", factor=1.10, plus_s=0.008)
    yield _beside(
        "keys written in one transaction → the guest runs",
        runs,
        Sample.of(one.runs_s for one in bares),
        name="bare spawn and `cont`",
        factor=1.15,
        plus_s=0.015,
    )


def _beside(what: str, times: Sequence[float], reference: Sample, *, name: str, factor: float, plus_s: float) -> Figure:
    measured = Sample.of(times)
    return Figure(
        what=what,
        measured=measured,
        unit=milliseconds,
        reference=reference,
        reference_is=name,
        budget=f"≤ {factor:.2f} × + {plus_s * 1000:g} ms",
        met=within(measured, reference, factor, plus_s),
    )


def _start(rig: Rig, host: Host, name: str) -> tuple[float, float]:
    """Seconds from before the keys are sent to QEMU's answer, and until its guest runs."""
    keys = host.wish([name])
    begun = time.monotonic()
    rig.keys.put(keys)
    run = host.run_of(name)
    return run.answered_at - begun, run.runs_at - begun


def _restart(host: Host, name: str) -> float:
    """Seconds from before the signal to the answer of the next QEMU. Returns when its guest runs."""
    pid = host.pids()[name]
    begun = time.monotonic()
    kill(pid)
    # What follows a QEMU whose guest never ran is another story.
    return host.run_of(name).answered_at - begun


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
