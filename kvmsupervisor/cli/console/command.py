"""`console`: an instance's serial console, on the host that runs it."""

from __future__ import annotations

import errno
import os
import pwd
import sys
from collections.abc import Callable

import click

from kvmsupervisor.adapters import process as kernel
from kvmsupervisor.adapters.console import ConsoleLog, Keyboard
from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.adapters.rundir import InstanceDir, RunDir
from kvmsupervisor.cli.common import INSTANCE, Tools, pass_tools, with_store
from kvmsupervisor.cli.console.session import Lacking, Mode, Session
from kvmsupervisor.cli.console.terminal import Signalled, is_terminal
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cluster.overview import Cluster, Instance, read_instance, shown
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.incarnation import Incarnation, Unreadable
from kvmsupervisor.domain.keys import InstanceId

SCROLLBACK_LINES = 20
"""Default of `--lines`. Arbitrary: a prompt and the lines that led to it, and the greeting fits on a small terminal."""


@click.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.option("--read-only", is_flag=True, help="Only read; never take the keyboard.")
@click.option("--take", is_flag=True, help="Take the keyboard from the person who has it.")
@click.option(
    "--lines",
    type=click.IntRange(min=0),
    default=SCROLLBACK_LINES,
    show_default=True,
    metavar="N",
    help="How many earlier lines to show.",
)
@pass_tools
def console(tools: Tools, instance: InstanceId, read_only: bool, take: bool, lines: int) -> None:
    """Use the serial console of ID, on the host that runs it. Ctrl-] followed by q detaches.

    Any number of people may read. One person has the keyboard; the others see who that is. When QEMU is started again,
    the session goes on.

    Without a terminal, the command sends standard input to the guest, and then shows the output until QEMU ends or
    Ctrl-C.
    """
    if read_only and take:
        raise click.UsageError("--read-only and --take exclude each other.")
    settings = tools.settings()
    folder = RunDir(settings.run_dir).find(instance)
    record = _recorded(folder)
    if record is None or not _lives(record):
        raise Refused(_why_not_here(tools, instance, folder))
    mode = Mode(read_only=read_only, take=take, lines=lines, terminal=is_terminal())
    session = Session(
        instance,
        record,
        recorded=lambda: _recorded(folder),
        lives=_lives,
        is_here=folder.path.is_dir,
        log=ConsoleLog(folder.console_log),
        keyboard=_keyboard(folder),
        mode=mode,
    )
    try:
        session.run()
    except Lacking as error:
        raise Refused(str(error)) from error
    except Signalled as signalled:
        # As shells have it.
        click.get_current_context().exit(128 + signalled.number)
    except BrokenPipeError:
        # The reader of the output has closed it. Python itself must not try to flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PermissionError as error:
        raise Refused(f"the console of {instance} cannot be opened: {error}") from error
    except OSError as error:
        # The terminal is gone, and with it the person.
        if error.errno != errno.EIO:
            raise


def _recorded(folder: InstanceDir) -> Incarnation | None:
    """The record of the QEMU on this host; None when there is none.

    Raises:
        Refused: the record cannot be read.
    """
    try:
        return folder.read_incarnation()
    except (Unreadable, PermissionError, NotADirectoryError) as error:
        raise Refused(str(error)) from error


def _lives(record: Incarnation) -> bool:
    """Whether the QEMU of that record lives."""
    return record.pid is not None and record.starttime is not None and kernel.is_alive(record.pid, record.starttime)


def _keyboard(folder: InstanceDir) -> Callable[[Callable[[], None]], Keyboard]:
    """Makes a keyboard; other sessions see this process's user and terminal as its holder."""

    def make(wake: Callable[[], None]) -> Keyboard:
        return Keyboard(folder.path, who=_who(), wake=wake)

    return make


def _who() -> str:
    """This person, described for others."""
    user = os.environ.get("SUDO_USER")
    if not user:
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            user = str(os.getuid())
    where = f", on {os.ttyname(0).removeprefix('/dev/')}" if is_terminal() else ""
    return f"{user} (process {os.getpid()}{where})"


def _why_not_here(tools: Tools, instance: InstanceId, folder: InstanceDir) -> str:
    """Why the console is not on this host, and where it is. Only this needs etcd."""

    async def work(store: Store, settings: Settings) -> tuple[Instance, Cluster, Settings]:
        return *await read_instance(store, settings.layout, instance), settings

    found, cluster, settings = with_store(tools, work)
    if instance not in cluster.instances:
        return f"there is no instance {instance}"
    view = shown(found, cluster)
    if view.host is None:
        return f"{instance} does not run: {view.reason}"
    if view.host != settings.hostname:
        return (
            f"{instance} is {view.phase} on host {view.host}, and its console is there: "
            f"ssh -t {view.host} kvmsupervisor console {instance}"
        )
    return f"{instance} does not run here: {view.phase}, {view.reason} (no process of it on record in {folder.path})"
