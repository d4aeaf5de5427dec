"""`kvmsupervisor exec`: single mode, where one container is one guest. See docs/single-mode.md."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import termios
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import click

from kvmsupervisor.aio import leaves
from kvmsupervisor.cli.common import Tools, pass_tools
from kvmsupervisor.cli.entrypoint import INSTANCE
from kvmsupervisor.cli.errors import EtcdAway, Refused
from kvmsupervisor.cli.output import printable
from kvmsupervisor.config.settings import SETTINGS, Settings
from kvmsupervisor.domain.keys import ID_RULE, LOCK_PLACEHOLDER, InstanceId, parse_id
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.single import overrides_in, unsuitable

LOCK = "LOCK"
ENDPOINTS = "ETCD_ENDPOINTS"
LOG_LEVEL = "KVM_LOG_LEVEL"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that shut the guest down: from Docker or systemd, from a person, from a terminal that is closed."""

Signalled = Callable[[signal.Signals], None]


@click.command("exec")
@click.option("--no-wait", is_flag=True, help="With LOCK: exit with 1 when another holds the lock.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- QEMU_OPTIONS]")
@pass_tools
def exec_command(tools: Tools, no_wait: bool, options: tuple[str, ...]) -> int:
    """Run one QEMU and exit with it: a QEMU with QEMU_OPTIONS, or the instance in the variable INSTANCE.

    With QEMU_OPTIONS, the variables LOCK (a key; %i stands for INSTANCE) and ETCD_ENDPOINTS put QEMU under a lock. The
    exit code is QEMU's status. SIGTERM and Ctrl-C shut the guest down.
    """
    named = tools.environ.get(INSTANCE, "").strip()
    instance = parse_id(named)
    if named and instance is None:
        raise Refused(f"INSTANCE: found {printable(named)!r}, which is no id: {ID_RULE}")
    # systemd fills %i in, and then LOCK is no template; the setting takes templates only.
    environ = {name: value for name, value in tools.environ.items() if name != LOCK}
    settings = replace(tools, environ=environ).settings()
    given = tools.environ.get(LOCK, "").strip()
    lock_key = _lock_key(given, instance, settings) if given else None
    if options:
        return _options(settings, options, tools.environ, lock_key=lock_key, wait=not no_wait)
    if instance is None:
        raise click.UsageError("Give QEMU's options behind --, or name an instance in the variable INSTANCE.")
    if no_wait:
        raise click.UsageError("--no-wait is only for QEMU's options: an instance always waits for its lock.")
    return _instance(settings, instance, tools.environ, lock_key=lock_key or settings.layout.lock_key(instance))


def _lock_key(given: str, instance: InstanceId | None, settings: Settings) -> str:
    """The lock's key, with `%i` filled in.

    Raises:
        Refused: LOCK cannot be the key of a lock.
    """
    if LOCK_PLACEHOLDER in given and instance is None:
        raise Refused(
            f"LOCK: found {printable(given)!r}; name the instance that {LOCK_PLACEHOLDER} stands for in INSTANCE"
        )
    key = given.replace(LOCK_PLACEHOLDER, instance or "")
    if not re.fullmatch(r"(?:/[^/\s%]+)+", key) or not key.isprintable():
        raise Refused(f"LOCK: found {printable(given)!r}; it is a key that begins with '/', such as /kvm/1/lock")
    prefix, facts = settings.prefix, settings.facts_prefix
    wish = key.removeprefix(f"{prefix}/").partition("/")[2]
    if (key.startswith(f"{prefix}/") and wish in WISH_KEYS) or key.startswith(f"{facts}/"):
        raise Refused(f"LOCK: found {printable(given)!r}; it is not the key of a wish, nor among sessions and statuses")
    return key


def _options(
    settings: Settings, options: tuple[str, ...], environ: Mapping[str, str], *, lock_key: str | None, wait: bool
) -> int:
    default = next(one.default for one in SETTINGS if one.name == "etcd_endpoints")
    if lock_key is not None:
        if not environ.get(ENDPOINTS, "").strip() and settings.etcd_endpoints == (default,):
            # A slip must not run QEMU without the lock that was asked for.
            raise Refused(f"{ENDPOINTS}: found nothing; LOCK is set and needs it: the lock is kept in that etcd")
        reason = unsuitable(options)
        if reason is not None:
            raise Refused(reason)
    elif not wait:
        raise click.UsageError("--no-wait needs the variable LOCK.")
    from kvmsupervisor.config.values import LogLevel  # noqa: PLC0415

    if not environ.get(LOG_LEVEL, "").strip() and settings.log_level is LogLevel.INFO:
        # The terminal is the guest's.
        settings = replace(settings, log_level=LogLevel.WARNING)

    def begin() -> tuple[Coroutine[Any, Any, int], Signalled]:
        from kvmsupervisor.instance.assembly import REAL  # noqa: PLC0415
        from kvmsupervisor.single.command import SingleCommand  # noqa: PLC0415

        command = SingleCommand(settings, options, REAL, lock_key=lock_key, wait=wait)
        return command.run(), command.signalled

    with _terminal_as_it_is():
        return _run(settings, begin)


def _instance(settings: Settings, instance: InstanceId, environ: Mapping[str, str], *, lock_key: str) -> int:
    def begin() -> tuple[Coroutine[Any, Any, int], Signalled]:
        from kvmsupervisor.instance.assembly import REAL  # noqa: PLC0415
        from kvmsupervisor.single.instance import Single  # noqa: PLC0415

        single = Single(settings, instance, REAL, lock_key=lock_key, overrides=overrides_in(environ))
        return single.run(), single.signalled

    return _run(settings, begin)


def _run(settings: Settings, begin: Callable[[], tuple[Coroutine[Any, Any, int], Signalled]]) -> int:
    """Run the work in an event loop, with its signals handled; return the exit code.

    Raises:
        Refused: it could not begin; the message says why.
        EtcdAway: etcd did not answer before it began.
    """
    # Imported here: no other command needs them. The log first: it keeps rich out.
    from kvmsupervisor.config.logs import configure  # noqa: PLC0415

    # isort: split
    from kvmsupervisor.adapters.etcd import EtcdError, Unavailable  # noqa: PLC0415
    from kvmsupervisor.adapters.process import Hidden  # noqa: PLC0415
    from kvmsupervisor.adapters.rundir import AlreadyRunning  # noqa: PLC0415
    from kvmsupervisor.cluster.session import HostnameTaken  # noqa: PLC0415
    from kvmsupervisor.domain.incarnation import Unreadable  # noqa: PLC0415
    from kvmsupervisor.single.life import NotHere  # noqa: PLC0415

    async def run() -> int:
        work, signalled = begin()
        loop = asyncio.get_running_loop()

        def tell(number: int, _frame: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(signalled, signal.Signals(number))

        # Not `loop.add_signal_handler`, whose handlers end with the loop.
        for number in SIGNALS:
            signal.signal(number, tell)
        return await work

    log = configure(level=settings.log_level, format=settings.log_format)
    refused: list[BaseException] = []
    status = 0
    try:
        status = asyncio.run(run())
    except* (
        AlreadyRunning,
        EtcdError,
        Hidden,
        HostnameTaken,
        NotHere,
        OSError,
        Unreadable,
        ValueError,
    ) as group:
        refused = leaves(group)
    finally:
        # During interpreter shutdown no handler runs, so ignore further signals: they must not change the exit code.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        log.close()
    if not refused:
        return status
    said = "\n".join(_said(one) for one in refused)
    if all(isinstance(one, Unavailable) for one in refused):
        raise EtcdAway(f"etcd is unreachable: {said}")
    raise Refused(said)


def _said(error: BaseException) -> str:
    return "\n".join(str(printable(line)) for line in str(error).splitlines())


@contextmanager
def _terminal_as_it_is() -> Iterator[None]:
    """Restore the terminal at the end: a killed QEMU does not."""
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
