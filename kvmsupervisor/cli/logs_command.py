"""`logs`: what the supervisor and QEMU have said about an instance, on the host where that is.

Every read is bounded: at most the last MiB of a log and of the one before it. What QEMU says may be what its guest
wants it to say, so each line is printed as text of strangers.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from kvmsupervisor.adapters.console import ConsoleLog
from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.adapters.rundir import InstanceDir, RunDir
from kvmsupervisor.cli.choice import meant_by
from kvmsupervisor.cli.common import INSTANCE, Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import local_time, note, printable
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster, shown
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import InstanceId

LINES = 50
"""Default of `-n`, for each log. Arbitrary: two screens."""

POLL_S = 0.3
"""How often `--follow` looks. Arbitrary: people notice no delay."""

LINE_LENGTH = 4000
"""Characters of a line. Arbitrary: a guest that has QEMU write a line of a megabyte must not fill a terminal."""

ALL_LINES = 1 << 30

UNIT = "kvmsupervisor"
JOURNAL_S = 10.0
"""How long the journal may take. It reads files that may be gigabytes."""

JOURNAL_LINES = 20_000
"""Lines of the journal that are looked through. Arbitrary: days of a host at rest."""

NOT_SHOWN = frozenset({"timestamp", "level", "event", "instance", "incarnation"})


@click.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=LINES,
    show_default=True,
    metavar="LINES",
    help="How many of the last lines of each log to show.",
)
@pass_tools
def logs(tools: Tools, instance: InstanceId, *, follow: bool, lines: int) -> None:
    """Show what the supervisor and QEMU have said about ID, on the host that runs it.

    The supervisor's lines are found in its log file (`run --daemon`) or in the journal of its unit. Elsewhere the
    command says on which host the logs are. `events` needs no host, `console` has the guest's own output.
    """
    settings = tools.settings()
    folder = RunDir(settings.run_dir).find(instance)
    own = settings.run_dir / "_supervisor.log"
    if not _is_here(folder):
        raise Refused(_why_not_here(tools, instance, folder))
    with ExitStack() as stack:
        qemu = _Log("QEMU", folder.qemu_log, _text)
        supervisor = _Log("supervisor", own, lambda line: _line_of(line, instance))
        stack.callback(qemu.close)
        stack.callback(supervisor.close)
        printer = _Printer()
        try:
            if own.exists():
                printer.print(supervisor, supervisor.begin(lines, follow=follow))
            else:
                _print_journal(printer, supervisor, instance, lines)
            printer.print(qemu, qemu.begin(lines, follow=follow))
            while follow:
                printer.print(supervisor, supervisor.read())
                printer.print(qemu, qemu.read())
                time.sleep(POLL_S)
        except PermissionError as error:
            raise Refused(f"{error.filename}: {error.strerror}: run `logs` as root, like the supervisor") from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise Refused(f"{error.filename}: it is a link, and is not followed") from error


def _is_here(folder: InstanceDir) -> bool:
    try:
        return folder.qemu_log.exists()
    except PermissionError as error:
        raise Refused(f"{error.filename}: {error.strerror}: run `logs` as root, like the supervisor") from error


class _Log:
    """One log, line by line.

    Args:
        title: what it is.
        path: of the file.
        shown: makes text of a line; None for a line that is not shown.
    """

    def __init__(self, title: str, path: Path, shown: Callable[[bytes], str | None]) -> None:
        self.title = f"{title} ({path})"
        self.shown = shown
        self._log = ConsoleLog(path)
        self._rest = b""

    def begin(self, lines: int, *, follow: bool) -> list[str]:
        """The last lines that are shown; `read` goes on behind them, with the rest of an unfinished one."""
        found = self._whole(self._log.begin(ALL_LINES) + (b"" if follow else b"\n"))
        if not follow and found and not found[-1]:
            found.pop()
        return found[-lines:] if lines else []

    def read(self) -> list[str]:
        """New lines."""
        return self._whole(self._log.read())

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def _whole(self, data: bytes) -> list[str]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_LENGTH:
            # Without an end in sight: what is there is a line.
            whole, self._rest = [*whole, self._rest], b""
        return [text for line in whole if (text := self.shown(line)) is not None]


class _Printer:
    """Prints lines of several logs, with a heading whenever they are another log's, as tail(1) does."""

    def __init__(self) -> None:
        self._last: str | None = None

    def print(self, log: _Log, lines: Iterable[str], title: str | None = None) -> None:
        """Print lines of one log, and what it is."""
        title = title or log.title
        for line in lines:
            if title != self._last:
                click.echo(("" if self._last is None else "\n") + f"==> {printable(title)} <==")
                self._last = title
            click.echo(line)


def _print_journal(printer: _Printer, log: _Log, instance: InstanceId, lines: int) -> None:
    """Print what the journal has, or say where to look."""
    program = shutil.which("journalctl")
    found: Sequence[str] = ()
    if program is not None and lines:
        command = [program, "-u", UNIT, "-o", "cat", "--no-pager", "-n", str(JOURNAL_LINES)]
        try:
            told = subprocess.run(command, capture_output=True, check=False, timeout=JOURNAL_S).stdout
        except (OSError, subprocess.TimeoutExpired):
            told = b""
        found = [text for line in told.split(b"\n") if (text := log.shown(line)) is not None][-lines:]
        printer.print(log, found, f"supervisor (journalctl -u {UNIT})")
    if not found:
        note(
            f"the supervisor's own lines about {instance} are not in a file here: see `journalctl -u {UNIT}` or "
            f"`docker logs {UNIT}`; `events {instance}` has what happened"
        )


def _text(line: bytes) -> str:
    text = line.rstrip(b"\r").decode(errors="backslashreplace")
    shown = printable(text[:LINE_LENGTH])
    return shown if len(text) <= LINE_LENGTH else f"{shown}… ({len(line)} bytes)"


def _line_of(line: bytes, instance: InstanceId) -> str | None:
    """A line of the supervisor's log as people read it; None when it is about something else."""
    if instance.encode() not in line:
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("instance") != instance:
        return None
    when = local_time(found.get("timestamp"))
    rest = [f"{name}={value}" for name, value in found.items() if name not in NOT_SHOWN and value is not None]
    return _text(f"{when} {found.get('level')} {found.get('event')} {' '.join(rest)}".rstrip().encode(errors="replace"))


def _why_not_here(tools: Tools, instance: InstanceId, folder: InstanceDir) -> str:
    """Why there is no log on this host, and where it is. Only this needs etcd."""

    async def work(store: Store, settings: Settings) -> tuple[Cluster, Settings]:
        return await read_cluster(store, settings.layout), settings

    cluster, settings = with_store(tools, work)
    found: Instance | None = cluster.instances.get(instance)
    if found is None:
        return f"there is no instance {instance}{meant_by(instance, cluster.instances)}"
    host = found.status.host if found.status is not None else found.wish.runs_on
    if host is None or host == settings.hostname:
        return f"{instance} has no log here: {shown(found, cluster).reason} (nothing in {folder.path})"
    if not cluster.alive(host):
        return (
            f"the logs of {instance} are on host {host}, which has no session; `kvmsupervisor events {instance}` says "
            "what happened"
        )
    return f"the logs of {instance} are on host {host}: ssh {host} kvmsupervisor logs {instance}"
