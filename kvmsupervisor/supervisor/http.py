"""The supervisor's HTTP server: where it listens, and under which URL others reach it."""

from __future__ import annotations

import contextlib

from kvmsupervisor import __version__
from kvmsupervisor.adapters.web import Routes, Web
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.supervisor.http_view import HttpView


async def serve(http_view: HttpView, settings: Settings, stack: contextlib.AsyncExitStack) -> str:
    """Serve HTTP until `stack` ends; return the URL, empty when nothing listens.

    Raises:
        ListenError: `KVM_LISTEN` cannot be listened on.
    """
    if settings.listen is None:
        return ""
    web = Web(
        settings.listen.host, settings.listen.port, Routes(http_view, host=settings.hostname, version=__version__)
    )
    stack.push_async_callback(web.close)
    await web.start()
    return f"http://{_reachable(settings.listen.host, settings.hostname)}:{web.port}"


def _reachable(listen: str, hostname: str) -> str:
    """The name under which others reach what listens on `listen`, which may be every address."""
    if listen in {"0.0.0.0", "::"}:
        return hostname
    return f"[{listen}]" if ":" in listen else listen
