"""What only a host's supervisor knows, and tells over HTTP: when a guest's agent last answered, and its metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import TypeVar
from urllib.parse import urlsplit

from kvmsupervisor.cli.output import parse_time
from kvmsupervisor.domain.keys import InstanceId

TIMEOUT_S = 1.0
"""How long `show` waits for the answer in all. Arbitrary: if it took longer, people would think that it hangs."""

REPLY_LIMIT = 256 * 1024
"""Bytes to read at most. A status has 64 KiB at most."""

METRICS_LIMIT = 16 * 1024 * 1024
"""The same of metrics: a thousand instances have some megabytes."""

T = TypeVar("T")


def agent_seen(url: str, instance: InstanceId, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """When the agent of `instance` last answered, RFC 3339; None when its host does not answer, or does not know.

    Args:
        url: of the host's supervisor, from its session key.
        instance: of the agent.
        timeout_s: for everything, the look-up of the host's name included.
    """
    return _within(timeout_s, lambda: _look(url, instance, timeout_s))


def metrics_of(url: str, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """The metrics of a host, as text; None when it does not answer.

    Args:
        url: of its supervisor, from its session key.
        timeout_s: for everything.
    """
    found = _within(timeout_s, lambda: _ask(url, "/metrics", METRICS_LIMIT, timeout_s))
    return None if found is None else found.decode(errors="backslashreplace")


def _within(timeout_s: float, look: Callable[[], T | None]) -> T | None:
    found: list[T | None] = []
    # A resolver takes no deadline: when it is slow, it is left behind in its thread.
    thread = threading.Thread(target=lambda: found.append(look()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else None


def _ask(url: str, path: str, limit: int, timeout_s: float) -> bytes | None:
    # Not urllib, which follows `file:` and redirects: the session key may have been written by a stranger.
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            return None
        connection = HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            return connection.getresponse().read(limit)
        finally:
            connection.close()
    except (OSError, HTTPException, ValueError):
        return None


def _look(url: str, instance: InstanceId, timeout_s: float) -> str | None:
    reply = _ask(url, f"/api/v1/instances/{instance}", REPLY_LIMIT, timeout_s)
    try:
        answer = None if reply is None else json.loads(reply)
    except (ValueError, RecursionError):
        return None
    seen = answer.get("agent_seen") if isinstance(answer, dict) else None
    return seen if isinstance(seen, str) and parse_time(seen) is not None else None
