"""`move`: writes a new `host`, and tells beforehand whether the guest will move while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli import waiting
from kvmsupervisor.cli.common import INSTANCE, Tools, pass_tools, wait_options, with_store
from kvmsupervisor.cli.errors import INTERRUPTED, Refused
from kvmsupervisor.cli.output import note, printable
from kvmsupervisor.cli.waiting import Goal, Sighting, Verdict
from kvmsupervisor.cli.write_commands import act, force_option
from kvmsupervisor.cluster.acts import instances as actions
from kvmsupervisor.cluster.acts.foresight import Foreseen, look_ahead
from kvmsupervisor.cluster.acts.instances import Written
from kvmsupervisor.cluster.overview import read_instance
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.status import Phase


def until_on(host: str, written: Written) -> Goal:
    """Until it runs on that host by the written wish."""
    running = waiting.until_running(written)

    def judge(sighting: Sighting) -> Verdict:
        status = sighting.status
        if status is None or status.host != host or status.phase is Phase.MIGRATING:
            return None
        verdict = running(sighting)
        if verdict is None or not verdict[0] or status.move is None or status.move.stopped_ms is None:
            return verdict
        return True, f"{verdict[1]}; its guest stood still for {status.move.stopped_ms} ms on the way"

    return judge


@click.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.argument("host", metavar="HOST")
@click.option("--dry-run", is_flag=True, help="Tell how it would move, and change nothing; exit status 1: not live.")
@force_option
@wait_options
@pass_tools
def move(
    tools: Tools, *, instance: InstanceId, host: str, dry_run: bool, force: bool, wait: bool, timeout_s: float
) -> None:
    """Move an instance to another host: write its key `host`.

    Its guest goes on running where both hosts can do that (docs/moving.md), otherwise it is stopped and started there.
    Writing the former host back cancels the move, as long as the guest is not handed over; with --wait, Ctrl-C twice
    does.

    Example: kvmsupervisor move web1 beta --wait
    """

    async def look(store: Store, settings: Settings) -> Foreseen:
        return await look_ahead(store, settings.layout, instance, host, force=force)

    foreseen = with_store(tools, look)
    if dry_run:
        click.echo(printable(f"{instance}: {foreseen.said}"))
        if not foreseen.live:
            raise SystemExit(1)
        return

    interrupted = Interrupted(instance)

    async def action(store: Store, settings: Settings, one: InstanceId) -> Written:
        found, _ = await read_instance(store, settings.layout, one)
        written = await actions.change(store, settings.layout, one, {"host": host}, unset=(), force=force)
        if wait and found.wish.host is not None:
            interrupted.listen(back=found.wish.host, written=host)
        return written

    click.echo(printable(f"{instance}: {foreseen.said}"), err=True)
    try:
        act(tools, [instance], action, f"moves to {host}", lambda written: until_on(host, written), wait=wait,
            timeout_s=timeout_s)  # fmt: skip
    except asyncio.CancelledError:
        interrupted.call_off(tools)
        raise SystemExit(INTERRUPTED) from None


class Interrupted:
    """Ctrl-C while a move is waited for: once, it is asked whether that is meant; twice, the move is called off.

    Args:
        instance: that moves.
    """

    def __init__(self, instance: InstanceId) -> None:
        self._instance = instance
        self._back, self._written = "", ""
        self._presses = 0

    def listen(self, *, back: str, written: str) -> None:
        """From now on, in the present task.

        Args:
            back: the former value of `host`.
            written: the new one.
        """
        self._back, self._written = back, written
        task = asyncio.current_task()
        assert task is not None

        def pressed() -> None:
            self._presses += 1
            if self._presses == 1:
                note(f"{self._instance} goes on moving; Ctrl-C again calls that off (`host` is {back} again)")
            else:
                task.cancel()

        # Without signals, as in a thread, Ctrl-C ends the command, and the move goes on.
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, pressed)

    def call_off(self, tools: Tools) -> None:
        """Write the former `host` back, unless somebody has written another one since.

        Raises:
            Refused: somebody has.
        """

        async def work(store: Store, settings: Settings) -> None:
            found, _ = await read_instance(store, settings.layout, self._instance)
            if found.wish.host != self._written:
                raise Refused(f"`host` of {self._instance} is {found.wish.host} by now: it is left so")
            await actions.change(store, settings.layout, self._instance, {"host": self._back}, unset=(), force=True)

        with_store(tools, work)
        click.echo(printable(f"{self._instance}: called off: `host` is {self._back} again"))
