"""`stop --all --local` and `start --all --local`: this host's guests, without etcd."""

from __future__ import annotations

import asyncio

import click

from kvmsupervisor.adapters.rundir import OutOfReach
from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.errors import Refused, TimedOut
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.draining import Drain


def check(instances: tuple[InstanceId, ...], *, everything: bool, local: bool) -> None:
    """See that exactly one of the command's two forms is used.

    Raises:
        click.UsageError: it is neither.
    """
    if everything != local:
        raise click.UsageError("--all and --local go together: all guests of this host, and of no other.")
    if everything and instances:
        raise click.UsageError("With --all --local no ID is given: it is about all guests of this host.")
    if not everything and not instances:
        raise click.UsageError("Missing argument 'ID...'.")


def stop_all(tools: Tools, *, timeout_s: float) -> None:
    """Shut down all guests of this host, wait for them, and keep them from being started.

    Raises:
        Refused: the supervisor cannot be told.
        TimedOut: some still run.
    """
    drain = _drain(tools)

    def say(left: tuple[InstanceId, ...]) -> None:
        if left:
            click.echo(f"waiting for {len(left)} guests: {', '.join(left)}")

    try:
        done = asyncio.run(drain.begin(timeout_s=timeout_s, on_change=say))
    except OutOfReach as error:
        raise Refused(str(error)) from error
    if not done:
        raise TimedOut(f"still running after {timeout_s:g} s: {', '.join(drain.running())}")
    click.echo("no guest runs on this host; they start again with its next boot, or by `start --all --local`")


def start_all(tools: Tools) -> None:
    """Let this host's guests start again.

    Raises:
        Refused: the supervisor cannot be told.
    """
    try:
        _drain(tools).end()
    except OutOfReach as error:
        raise Refused(str(error)) from error
    click.echo("this host's supervisor starts what the keys ask for")


def _drain(tools: Tools) -> Drain:
    settings = tools.settings()
    return Drain(
        run_dir=settings.run_dir,
        prefix=settings.prefix,
        me=settings.hostname,
        shutdown_timeout_s=settings.shutdown_timeout_s,
    )
