"""`make cluster-demo`. Exit status 0 if each scene came to what it promises."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from subprocess import TimeoutExpired

from tests.cluster_demo.apart import Refused, run_apart

ONCE = "KVM_DEMO_ONCE"
LOGS = ".cache/cluster-demo"
"""Where the logs are kept of a demo that failed, below the checkout."""

PROGRAMS = ("ip", "ping", "nsenter", "unshare", "mount", "ceph-mon", "ceph-osd", "rbd", "etcd", "qemu-system-x86_64")


def main(argv: list[str], *, root: bool) -> int:
    """Run the demo, which takes root; return the exit status."""
    argparse.ArgumentParser(
        prog="make cluster-demo",
        description="Three hosts on one machine: a guest answers ping, moves live, is drained, and outlives its host.",
        epilog=f"{ONCE}=1 runs it without a person. Exit status: 0 each scene came to what it promises; 1 one did not; "
        "2 this machine cannot; 130 Ctrl-C.",
    ).parse_args(argv)
    if not root:
        print(
            "cluster-demo: it makes network namespaces and plugs in bridges, which takes root: sudo make cluster-demo"
        )
        return 2
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        print(f"cluster-demo: not installed, or not in PATH: {', '.join(missing)}; `make cluster-demo` sees to that")
        return 2
    try:
        return run_apart(play)
    except Refused as error:
        print(error)
        return 2


def play(folder: Path) -> int:
    """Play it, in a world of its own; return the exit status."""
    # Not before: gRPC does not like to be forked.
    from kvmsupervisor.cli.demo.packages import GuestError  # noqa: PLC0415
    from tests.cluster_demo.board import Board, table  # noqa: PLC0415
    from tests.cluster_demo.cluster import Cluster  # noqa: PLC0415
    from tests.cluster_demo.scenes import Broken, Play  # noqa: PLC0415
    from tests.cluster_demo.view import on_screen  # noqa: PLC0415
    from tests.support.ceph import CephError  # noqa: PLC0415
    from tests.support.checkout import ROOT  # noqa: PLC0415
    from tests.support.etcd import EtcdStartError  # noqa: PLC0415

    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    person = terminal and sys.stdin.isatty() and os.environ.get(ONCE, "") in {"", "0"}
    problem = ""
    with ExitStack() as stack:
        cluster = Cluster(stack, folder)
        board = Board(cluster.now, *(() if terminal else (say,)), program=f"{folder}/kvmsupervisor" if person else "")
        try:
            with on_screen(board, cluster, person=person) if terminal else nullcontext() as screen:
                pause: Callable[[str], None] = (lambda then: None) if screen is None else screen.pause
                Play(cluster, board, pause).run()
                if person:
                    pause("what was seen, and the end")
        except (Broken, CephError, EtcdStartError, GuestError, AssertionError, OSError, TimeoutExpired) as error:
            problem = str(error)
            cluster.keep_logs(ROOT / LOGS)
        except KeyboardInterrupt:
            say("Ended before its end; nothing is left.")
            raise
        finally:
            for line in ("", *table(board.results), "") if board.results else ():
                say(line)
    if problem:
        say(f"cluster-demo: {board.title}: {problem}")
        say(f"What the hosts and Ceph have logged is in {LOGS}.")
        return 1
    say("All is ended; nothing is left.")
    return 0


def say(line: str) -> None:
    """Print a line."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], root=os.geteuid() == 0))
