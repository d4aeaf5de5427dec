"""`stop --all --local` and `start --all --local`: this host's guests, without etcd."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import click

from kvmsupervisor.adapters.clock import Clock, boot_id
from kvmsupervisor.adapters.rundir import OutOfReach, RunDir
from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.errors import Refused, TimedOut
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.machine.identity import folders_of_all
from kvmsupervisor.machine.system import REAL
from kvmsupervisor.supervisor.drain import Drain


def check(instances: Sequence[object], *, everything: bool, local: bool) -> None:
    """Check that exactly one of the command's two forms is used.

    Raises:
        click.UsageError: neither form is used.
    """
    if everything != local:
        raise click.UsageError("--all and --local need each other: together they mean all guests of this host.")
    if everything and instances:
        raise click.UsageError("--all --local takes no ID: it means all guests of this host.")
    if not everything and not instances:
        raise click.UsageError("Missing argument 'ID...'.")


def stop_all(tools: Tools, *, timeout_s: float) -> None:
    """Shut down all guests of this host, wait for them, and let none start.

    Raises:
        Refused: the supervisor cannot be told, or this is not its run directory, or we are not root.
        TimedOut: some guests still run.
    """
    drain = _drain(tools)
    _look_elsewhere(tools)

    def say(left: tuple[InstanceId, ...]) -> None:
        if left:
            click.echo(f"waiting for {len(left)} guests: {', '.join(left)}")

    try:
        done = asyncio.run(drain.begin(timeout_s=timeout_s, on_change=say))
    except OutOfReach as error:
        raise Refused(str(error)) from error
    except OSError as error:
        raise _refused("stop", error) from error
    if not done:
        raise TimedOut(f"still running after {timeout_s:g} s: {', '.join(drain.running())}")
    click.echo("no guest runs on this host; guests start again at its next boot, or by `start --all --local`")


def start_all(tools: Tools) -> None:
    """Let this host's guests start again.

    Raises:
        Refused: the supervisor cannot be told.
    """
    _look_elsewhere(tools)
    try:
        _drain(tools).end()
    except OutOfReach as error:
        raise Refused(str(error)) from error
    except OSError as error:
        raise _refused("start", error) from error
    click.echo("this host's supervisor starts what the keys ask for")


def _refused(verb: str, error: OSError) -> Refused:
    """The message when a file or process cannot be accessed."""
    said = f"{error.filename or 'a process of this host'}: {error.strerror}"
    if isinstance(error, PermissionError):
        said += f": run `{verb} --all --local` as root, like the supervisor"
    return Refused(said)


def _look_elsewhere(tools: Tools) -> None:
    """Check that this run directory is the supervisor's: a shell does not have the settings of the unit.

    Raises:
        Refused: it was never used, and guests run whose files are elsewhere.
    """
    run_dir = tools.settings().run_dir
    if RunDir(run_dir).was_used:
        return
    found = folders_of_all(REAL.processes).values()
    if not found:
        return
    names = ", ".join(sorted(instance for instance, _ in found))
    others = sorted({str(folder.parent) for _, folder in found if folder is not None})
    there = f" in {', '.join(others)}" if others else ""
    raise Refused(
        f"no supervisor has used KVM_RUN_DIR={run_dir} since this host booted, and {len(found)} guests run here whose "
        f"files are elsewhere{there}: {names}. Set KVM_RUN_DIR as their supervisor has it"
    )


def _drain(tools: Tools) -> Drain:
    settings = tools.settings()
    return Drain(
        system=REAL,
        clock=Clock(),
        boot_id=boot_id(),
        run_dir=RunDir(settings.run_dir),
        prefix=settings.prefix,
        me=settings.hostname,
        shutdown_timeout_s=settings.shutdown_timeout_s,
    )
