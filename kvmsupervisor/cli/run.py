"""`kvmsupervisor run`: the long-running daemon."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click

from kvmsupervisor.config.load import SettingsError, load_settings
from kvmsupervisor.config.settings import Settings

GC_THRESHOLDS = (20_000, 20, 10)
"""Thresholds of the garbage collector. While 80,000 keys were read, a collection stopped the loop for 55 ms with
Python's own thresholds, for 13 ms with these (measured on two noisy cores)."""

HEAD_START_S = 0.02
"""How long etcd may take to answer before the import of the rest begins, which slows the question down: the thread that
imports lets others go on every 5 ms only. Arbitrary: a connection and a question take 5 ms on a quiet network."""


@click.command()
@click.option("--daemon", is_flag=True, help="Detach from the terminal; return once it has started.")
@click.option(
    "--pid-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --daemon: the file for its pid. Default: _supervisor.pid in KVM_RUN_DIR.",
)
def run(daemon: bool, pid_file: Path | None) -> int:
    """Run this host's supervisor until SIGTERM or Ctrl-C. Guests run on without it."""
    try:
        settings = load_settings(os.environ)
    except SettingsError as error:
        raise click.ClickException("the settings cannot be used:\n" + str(error)) from error
    if not daemon:
        return serve(settings, lambda: None)
    # Imported here: only a daemon pays for it.
    from kvmsupervisor.cli.daemon import AlreadyRunningError, run_daemon  # noqa: PLC0415
    from kvmsupervisor.folders import make_folder  # noqa: PLC0415

    make_folder(settings.run_dir)
    log_file = settings.run_dir / "_supervisor.log"
    try:
        return run_daemon(
            lambda ready: serve(settings, ready, log_file=log_file),
            pid_file=pid_file or settings.run_dir / "_supervisor.pid",
            log_file=log_file,
        )
    except (AlreadyRunningError, OSError) as error:
        raise click.ClickException(str(error)) from error


def serve(settings: Settings, started: Callable[[], None], *, log_file: Path | None = None) -> int:
    """Supervise in this process until told to stop; return the exit code.

    Args:
        settings: of this host.
        started: called once the supervisor has started.
        log_file: of standard error, when that is a file of ours, which has to be kept short.
    """
    # Imported here, after the forks of a daemon: gRPC and event loops do not survive a fork.
    import gc  # noqa: PLC0415

    # Imported modules stay, so the garbage collector need not look through them.
    gc.disable()
    import asyncio  # noqa: PLC0415

    from kvmsupervisor.adapters.etcd import Etcd  # noqa: PLC0415
    from kvmsupervisor.config.etcd import etcd_config  # noqa: PLC0415

    async def ask_and_supervise() -> list[BaseException]:
        etcd = Etcd(etcd_config(settings))
        # etcd is asked before the rest is imported. That takes a thread longer than etcd takes to answer.
        asked = etcd.ask_ahead(settings.layout.wishes_prefix)
        try:
            await asyncio.wait((asked,), timeout=HEAD_START_S)
            await asyncio.to_thread(import_module, "kvmsupervisor.cli.supervise")
            from kvmsupervisor.cli.supervise import supervise  # noqa: PLC0415

            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            gc.enable()
            return await supervise(settings, etcd, started, log_file=log_file)
        finally:
            await etcd.close()

    refused = asyncio.run(ask_and_supervise())
    for error in refused:
        click.echo(f"kvmsupervisor: {error}", err=True)
    return 1 if refused else 0
