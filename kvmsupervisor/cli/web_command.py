"""`kvmsupervisor web`: the cluster on a page, read from etcd, and acts of those who may."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

# Before all others that import structlog: it keeps rich out.
from kvmsupervisor.config.logs import configure

# isort: split
import click

from kvmsupervisor.config.load import SettingsError, load_settings

if TYPE_CHECKING:
    from kvmsupervisor.adapters.etcd.api import Store


@click.command()
def web() -> None:
    """Show the whole cluster on a page, live, until SIGTERM or Ctrl-C.

    On KVM_WEB_LISTEN (127.0.0.1:9747) it shows what it reads to whoever reaches it. With KVM_WEB_CONFIG (users, TLS)
    and KVM_WEB_PEOPLE (roles) it asks who they are, and operators act there. It needs no privileges, and of etcd the
    role reader, for acts another user with the role operator. One in a cluster is enough; several do not disturb each
    other.

    Example: KVM_WEB_CONFIG=/etc/kvmsupervisor/web.yml kvmsupervisor web
    """
    from kvmsupervisor.adapters.clock import Clock  # noqa: PLC0415 - `--help` needs nothing of these
    from kvmsupervisor.adapters.etcd import Etcd  # noqa: PLC0415
    from kvmsupervisor.adapters.web import ListenError  # noqa: PLC0415
    from kvmsupervisor.config.etcd import etcd_config, web_writer_config  # noqa: PLC0415
    from kvmsupervisor.web.access import AccessError, read_access  # noqa: PLC0415
    from kvmsupervisor.web.service import Service  # noqa: PLC0415

    try:
        settings = load_settings(os.environ)
    except SettingsError as error:
        raise click.ClickException("the settings cannot be used:\n" + str(error)) from error
    try:
        access = read_access(settings)
    except AccessError as error:
        raise click.ClickException("the files that say who may come in cannot be used:\n" + str(error)) from error
    log = configure(level=settings.log_level, format=settings.log_format, rotation=None)

    def connect() -> Store:
        return Etcd(web_writer_config(settings))

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        etcd = Etcd(etcd_config(settings))
        try:
            await Service(settings, etcd, Clock(), connect, access).run(stop)
        finally:
            await etcd.close()

    try:
        asyncio.run(serve())
    except ListenError as error:
        raise click.ClickException(str(error)) from error
    finally:
        log.close()
