"""A hundred machines on one host: from cold, at rest, and with the supervisor replaced under them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from bench import bare
from bench.figures import Figure, Sample, count, megabytes, percent, seconds, within
from bench.rig import Host, Rig, beside
from bench.starts import cpus

SESSION_METHODS = {"LeaseKeepAlive", "Range"}
"""What renews a session: the lease, and a read of its key (law 1)."""

MEMORY_BUDGET = 50e6
IDLE_BUDGET = 0.003
ADOPTION_BUDGET_S = 0.6

IMPORTS = "import kvmsupervisor.cli.main, kvmsupervisor.cli.run, kvmsupervisor.cli.supervise"
"""In the order in which `run` does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What a supervisor used in a while in which nothing happened."""

    seconds: float
    cpu_s: float
    reference_cpu_s: float
    requests: dict[str, float]
    revisions: int


def measure(
    rig: Rig, *, machines: int, rounds: int, settle_s: float, idle_s: float, adoptions: int
) -> Iterator[Figure]:
    """All that needs the same hundred machines, which take a while to be there.

    Args:
        rig: to measure on.
        machines: how many instead of a hundred.
        rounds: how often they are started, in each way.
        settle_s: pause before the first look at a resting supervisor. The session of a host that was cleared before
            runs out in etcd after 15 s, which is a write, and none of the resting one's.
        idle_s: how long the resting supervisor is watched.
        adoptions: how often the supervisor is replaced.
    """
    names = [f"vm{number}" for number in range(machines)]
    alone = _rest_of_one(rig, settle_s, idle_s)
    colds, warms, loops, imports = [], [], [], []
    for number in range(rounds + 1):
        rig.tell(f"{machines} at once, {number + 1} of {rounds + 1}")
        host = rig.host()
        warms.append(_warm(rig, host, names))
        host.clear()
        rig.tell(f"{machines} from cold, {number + 1} of {rounds + 1}")
        host = rig.host()
        rig.keys.put(host.wish(names))
        colds.append(_cold(host, names))
        imports.append(import_s())
        if number == rounds:
            break
        host.wait_phase("running", machines)
        records = [(host.record(name), host.run_dir / name) for name in names]
        host.clear()
        loops.append(_loop(rig, records, number))
    yield _beside_loop(
        f"{machines} instances from cold → all answer QMP",
        colds,
        loops,
        "begins with the start of the supervisor's interpreter; ends with the last answer to query-status; "
        f"{seconds(Sample.of(imports).median)} are that interpreter and all its imports",
        1.15,
    )
    yield _beside_loop(
        f"{machines} instances at once → all answer QMP",
        warms,
        loops,
        "the same with a supervisor that runs already; begins before the keys are sent",
        1.10,
    )
    host.wait_phase("running", machines)
    time.sleep(settle_s)
    rig.tell(f"{machines} at rest, {idle_s:g} s")
    crowd = _rest(rig, host, idle_s)
    yield _memory(host, machines)
    yield _idle_cpu(alone, crowd, machines)
    yield _idle_requests(alone, crowd, machines)
    yield _adoption(rig, host, names, adoptions)
    host.clear()


def import_s() -> float:
    """Seconds from the start of an interpreter until it has imported what the supervisor does."""
    begun = time.monotonic()
    with beside(IMPORTS):
        return time.monotonic() - begun


def _cold(host: Host, names: Sequence[str]) -> float:
    """Seconds from the start of the supervisor, whose keys are there already, until all answer."""
    begun = host.start()
    return max(answer.answered_at for answer in host.answers(names, poll_s=0.01).values()) - begun


def _warm(rig: Rig, host: Host, names: Sequence[str]) -> float:
    """Seconds from before the keys are sent to a supervisor in step, until all answer."""
    host.start()
    host.wait_ready()
    begun = time.monotonic()
    rig.keys.put(host.wish(names))
    return max(answer.answered_at for answer in host.answers(names, poll_s=0.01).values()) - begun


def _loop(rig: Rig, records: Sequence[tuple[dict[str, Any], Any]], number: int) -> float:
    rig.tell("the same from a shell loop")
    return bare.shell_loop(records, rig.folder / f"loop{number}", 2 * cpus())


def _beside_loop(what: str, times: Sequence[float], loops: Sequence[float], note: str, factor: float) -> Figure:
    measured, reference = Sample.of(times), Sample.of(loops)
    return Figure(
        what=what,
        measured=measured,
        unit=seconds,
        reference=reference,
        reference_is=f"xargs -P {2 * cpus()}",
        budget=f"≤ {factor:.2f} ×",
        met=within(measured, reference, factor),
        notes=(note,),
    )


def _rest_of_one(rig: Rig, settle_s: float, idle_s: float) -> Rest:
    rig.tell(f"one machine at rest, {idle_s:g} s")
    host = rig.host()
    rig.keys.put(host.wish(["vm"]))
    host.start()
    host.wait_ready()
    host.wait_phase("running", 1)
    time.sleep(settle_s)
    rest = _rest(rig, host, idle_s)
    host.clear()
    return rest


def _rest(rig: Rig, host: Host, idle_s: float) -> Rest:
    """Watch a supervisor while nothing happens."""
    processes = host.processes()
    with beside("") as other:
        everybody = [*processes, other]
        before = [cpu_s(process) for process in everybody]
        counters, revision, begun = rig.etcd_counters(), rig.keys.revision(), time.monotonic()
        time.sleep(idle_s)
        after = [cpu_s(process) for process in everybody]
        passed = time.monotonic() - begun
        now = rig.etcd_counters()
        revisions = rig.keys.revision() - revision
    used = [late - early for early, late in zip(before, after, strict=True)]
    requests = {method: number - counters.get(method, 0.0) for method, number in now.items()}
    # The question for the revision, of which one falls between the two looks, is ours.
    requests["Range"] = requests.get("Range", 0.0) - 1
    return Rest(
        seconds=passed,
        cpu_s=sum(used[:-1]),
        reference_cpu_s=used[-1],
        requests={method: number for method, number in requests.items() if number},
        revisions=revisions,
    )


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _memory(host: Host, machines: int) -> Figure:
    processes = host.processes()
    used = Sample.of([sum(process.memory_full_info().pss for process in processes)])
    with beside("import asyncio, kvmsupervisor.adapters.etcd.client") as other:
        client = Sample.of([other.memory_full_info().pss])
    with beside(IMPORTS) as other:
        imported = other.memory_full_info().pss
    with beside("") as other:
        bare_python = other.memory_full_info().pss
    return Figure(
        what=f"supervisor's memory (PSS) with {machines} instances",
        measured=used,
        unit=megabytes,
        reference=client,
        reference_is="Python, asyncio and the etcd client",
        budget="≤ 50 MB",
        met=used.median <= MEMORY_BUDGET,
        notes=(
            f"{len(processes)} process(es); Python with asyncio alone {megabytes(bare_python)}, "
            f"with all that the supervisor imports {megabytes(imported)}",
        ),
    )


def _idle_cpu(alone: Rest, rest: Rest, machines: int) -> Figure:
    used = Sample.of([rest.cpu_s / rest.seconds])
    return Figure(
        what=f"idle CPU with {machines} instances, {rest.seconds:.0f} s",
        measured=used,
        unit=percent,
        reference=Sample.of([rest.reference_cpu_s / rest.seconds]),
        reference_is="of a core, idle Python with asyncio",
        budget="≤ 0.3 % of a core",
        met=used.median <= IDLE_BUDGET,
        notes=(f"with one instance {percent(alone.cpu_s / alone.seconds)}",),
    )


def _idle_requests(alone: Rest, crowd: Rest, machines: int) -> Figure:
    """Requests beside the session's, with one machine and with all."""
    here, there = (
        Sample.of([sum(number for method, number in rest.requests.items() if method not in SESSION_METHODS)])
        for rest in (crowd, alone)
    )
    return Figure(
        what=f"etcd requests at idle beside the session's, {machines} instances, {crowd.seconds:.0f} s",
        measured=here,
        unit=count,
        reference=there,
        reference_is="with one instance",
        budget="none, no writes, whatever the number of instances",
        met=here.median == 0 and crowd.revisions == alone.revisions == 0 and _alike(alone, crowd),
        notes=(
            f"by method: {_listed(crowd.requests)} with {machines}, {_listed(alone.requests)} with one",
            "Watch: a watch that has heard nothing for 5 s asks whether it is alive, by a message on its stream",
            f"revisions made meanwhile: {crowd.revisions} with {machines}, {alone.revisions} with one",
        ),
    )


def _alike(alone: Rest, crowd: Rest) -> bool:
    """Whether the session costs the same for both, but for one renewal more or less at the ends."""
    return all(
        abs(alone.requests.get(method, 0.0) - crowd.requests.get(method, 0.0)) <= 1 for method in SESSION_METHODS
    )


def _listed(requests: dict[str, float]) -> str:
    return ", ".join(f"{method} {number:g}" for method, number in sorted(requests.items())) or "none"


def _adoption(rig: Rig, host: Host, names: Sequence[str], times: int) -> Figure:
    """Kill the supervisor, start the next, until that has adopted all; the imports alone, in turn."""
    taken, imports = [], []
    before = host.pids()
    for number in range(times):
        rig.tell(f"supervisor replaced, {number + 1} of {times}")
        host.kill()
        begun = host.start()
        taken.append(host.wait_logged("instance.adopted", len(names)) - begun)
        imports.append(import_s())
    after = host.pids()
    kept = before == after and all(psutil.pid_exists(pid) for pid in after.values())
    measured, reference = Sample.of(taken), Sample.of(imports)
    net = measured.median - reference.median
    return Figure(
        what=f"supervisor killed and replaced, {len(names)} instances → all adopted",
        measured=measured,
        unit=seconds,
        reference=reference,
        reference_is="interpreter start and imports alone",
        budget="≤ 0.6 s, no guest stopped",
        met=measured.median <= ADOPTION_BUDGET_S and kept and len(after) == len(names),
        notes=(
            f"from the start of the process; {seconds(net)} of it is left without the imports",
            f"{sum(before[name] == after.get(name) for name in before)} of {len(names)} pids are the same",
        ),
    )
