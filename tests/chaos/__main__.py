"""`python -m tests.chaos`: a run from the command line; `make chaos` calls it. Exit status 1 for a violation."""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.faults import Fault, Kind, Terms, by_hand, schedule
from tests.chaos.report import Report
from tests.chaos.run import Run
from tests.chaos.sabotage import lying_ceph
from tests.chaos.world import new_world
from tests.support.cluster import ROOT


def main(argv: list[str]) -> int:
    """Play a run; return the exit status."""
    options = _parser().parse_args(argv)
    if os.geteuid() != 0 and not options.list:
        # Namespaces of an ordinary user's own: there it is root.
        user = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
        os.execvp(user[0], [*user, sys.executable, "-m", "tests.chaos", *argv])  # noqa: S606 - the same program again
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    terms = Terms(
        machines=options.machines,
        hosts=options.hosts,
        ttl_s=options.ttl,
        wait_s=options.wait,
        settle_s=options.settle,
        guarded=not options.no_guard,
    )
    faults = (
        by_hand(options.play) if options.play is not None else schedule(seed, options.minutes, terms, options.kinds)
    )
    if options.faults is not None:
        faults = _first(faults, options.faults)
    replay = _replay(options, seed)
    print(f"seed {seed}; again: {replay}", flush=True)
    if options.list:
        print(*faults, sep="\n")
        return 0
    # Whoever ends this wants nothing left of it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = _play(faults, terms, seed, replay, options)
    print(f"\n{report}", flush=True)
    if options.json:
        options.json.write_text(report.to_json())
    return 1 if report.violations else 0


def _play(faults: tuple[Fault, ...], terms: Terms, seed: int, replay: str, options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory(prefix="kvs") as folder:
        programs = lying_ceph(Path(folder)) if options.sabotage else None
        with new_world(terms, programs=programs) as world:
            try:
                return Run(
                    world,
                    seed=seed,
                    minutes=options.minutes,
                    replay=replay,
                    say=lambda line: print(line, flush=True),
                    # Whoever was let write beside another one may hold its image up for 30 s.
                    heal=not options.sabotage,
                ).play(faults)
            finally:
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    for host in world.hosts:
                        shutil.copy(host.folder / "log", options.keep / f"{host.name}.log")
                    for log in world.ceph.logs:
                        shutil.copy(log, options.keep / f"ceph-{log.name}")


def _first(faults: tuple[Fault, ...], number: int) -> tuple[Fault, ...]:
    """The first so many, with those that ride on them."""
    found: list[Fault] = []
    for fault in faults:
        if not fault.rides and sum(not one.rides for one in found) == number:
            break
        found.append(fault)
    return tuple(found)


def _replay(options: argparse.Namespace, seed: int) -> str:
    default = _parser().parse_args([])
    words = ["python", "-m", "tests.chaos", "--seed", str(seed), "--minutes", f"{options.minutes:g}"]
    short = len(words)
    for name in ("machines", "hosts", "ttl", "wait", "settle", "faults"):
        if getattr(options, name) != getattr(default, name):
            words += [f"--{name}", f"{getattr(options, name):g}"]
    if options.kinds:
        words += ["--kinds", ",".join(options.kinds)]
    if options.no_guard:
        words.append("--no-guard")
    if options.play:
        words += ["--play", options.play]
    if options.sabotage:
        words.append("--sabotage")
    if len(words) == short:
        return f"make chaos SEED={seed} MINUTES={options.minutes:g}"
    return shlex.join(words)


def _kinds(text: str) -> list[Kind]:
    try:
        return [Kind(word) for word in text.split(",") if word]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; there are {', '.join(Kind)}") from None


def _written(text: str) -> str:
    try:
        by_hand(text)
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{error}; a kind is one of {', '.join(Kind)}") from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Faults at random on a cluster of network namespaces, and a judge that reads the disks.",
    )
    parser.add_argument("--seed", type=int, help="draws the same faults again; by default another one each time")
    parser.add_argument("--minutes", type=float, default=30, help="how long the faults go on, about (30)")
    parser.add_argument("--machines", type=int, default=3, help="how many write (3)")
    parser.add_argument("--no-guard", action="store_true", help="without the one more that a guard watches")
    parser.add_argument("--hosts", type=int, default=3, help="how many there are (3)")
    parser.add_argument("--ttl", type=float, default=5, help="KVM_SESSION_TTL (5)")
    parser.add_argument("--wait", type=float, default=40, help="KVM_TAKEOVER_WAIT (40)")
    parser.add_argument(
        "--settle", type=float, default=12, help="seconds reckoned until all is well after a fault (12)"
    )
    parser.add_argument("--kinds", type=_kinds, default=[], help="draw only from these, with commas between")
    parser.add_argument("--faults", type=int, help="end after so many, riders not counted")
    parser.add_argument(
        "--play", type=_written, help="these instead: KIND[:SECONDS[:MACHINE[:OTHER[:WAY]]]], with commas between"
    )
    parser.add_argument("--list", action="store_true", help="print the schedule, and do nothing")
    parser.add_argument("--json", type=Path, help="write everything that was seen into this file")
    parser.add_argument("--keep", type=Path, help="copy the logs of supervisors and Ceph into this folder")
    parser.add_argument(
        "--sabotage",
        action="store_true",
        help="switch fencing off behind the supervisors' backs: to be found out",
    )
    return parser


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        # All that was started has been ended by now.
        sys.exit(130)
