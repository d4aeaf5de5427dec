"""`kvmsupervisor demo`: etcd, a supervisor and a guest that boots, all on this machine; nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from kvmsupervisor.adapters.etcd.api import EtcdError
from kvmsupervisor.cli.demo.play import Play, say
from kvmsupervisor.cli.demo.stage import DemoError, clear_away, make_folder


@click.command()
@click.option(
    "--once", is_flag=True, envvar="KVM_DEMO_ONCE", help="Do not wait for Ctrl-C: end once the guest has booted."
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("~/.cache/kvmsupervisor/guest"),
    show_default=True,
    help="Folder that keeps the built guest for the next time.",
)
def demo(once: bool, cache: Path) -> None:
    """Try it on this machine: the demo starts an etcd, a supervisor and a guest that boots.

    Ctrl-C shuts the guest down and removes everything; a second Ctrl-C does so by force. Exit code 0 means that the
    guest booted and was shut down gracefully.
    """
    sys.exit(asyncio.run(run_demo(once=once, cache=cache.expanduser().absolute())))


async def run_demo(
    *,
    once: bool,
    cache: Path,
    environ: Mapping[str, str] = os.environ,
    supervisor: Sequence[str] = (sys.executable, "-m", "kvmsupervisor", "run"),
) -> int:
    """Run the demo to its end and take everything away; return the exit code.

    Args:
        once: end as soon as the guest has said hello, instead of waiting for a signal.
        cache: folder where the guest is kept; absolute.
        environ: the environment; variables for other supervisors are left out.
        supervisor: the command that runs the supervisor.
    """
    problems: list[str] = []
    with _interrupts() as interrupts:
        folder = make_folder()
        try:
            play = Play(folder=folder, environ=environ, supervisor=supervisor)
            try:
                with _told(problems):
                    await _unless(interrupts.end, play.begin(cache, stay=not once))
                failed = bool(problems)
                with _told(problems):
                    await _unless(interrupts.force, play.end())
                # Also where the guest, cut off while it booted, did not hear the power button in time.
                if not play.said_hello and not failed:
                    problems.append("ended before the guest said hello")
                await _unless(interrupts.force, play.stop())
            finally:
                await play.kill()
        finally:
            killed = clear_away(folder)
    if killed:
        problems.append(f"had to be killed: {', '.join(killed)}")
    for problem in problems:
        click.secho(f"demo: {problem}", fg="red", err=True)
    if not problems:
        say("gone", "guest, supervisor, etcd and their files; nothing is left")
    return 1 if problems else 0


class Interrupts:
    """The effect of Ctrl-C: the first one asks for the end, the second one for an end by force."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.force = asyncio.Event()

    def count(self) -> None:
        """Note one more."""
        (self.force if self.end.is_set() else self.end).set()


@contextmanager
def _interrupts() -> Iterator[Interrupts]:
    """Turn signals into events while the body runs, so that they do not interrupt the clean-up."""
    interrupts = Interrupts()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, interrupts.count)
    try:
        yield interrupts
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _told(problems: list[str]) -> Iterator[None]:
    """Note a failure in the body, for people, and go on after the body."""
    try:
        yield
    except (DemoError, EtcdError) as error:
        problems.append(str(error))


async def _unless(event: asyncio.Event, work: Awaitable[None]) -> None:
    """Do `work` until it is done or `event` is set; then it is cancelled."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = task.done()
        waiter.cancel()
        task.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)
    if finished:
        task.result()
