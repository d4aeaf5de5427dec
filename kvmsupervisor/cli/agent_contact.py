"""Asks when a guest's agent last answered: only its host's supervisor knows, and tells it over HTTP."""

from __future__ import annotations

import json
import threading
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

from kvmsupervisor.cli.output import parse_time
from kvmsupervisor.domain.keys import InstanceId

TIMEOUT_S = 1.0
"""How long `show` waits for the answer in all. Arbitrary: if it took longer, people would think that it hangs."""

REPLY_LIMIT = 256 * 1024
"""Bytes to read at most. A status has 64 KiB at most."""


def agent_seen(url: str, instance: InstanceId, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """When the agent of `instance` last answered, RFC 3339; None when its host does not answer, or does not know.

    Args:
        url: of the host's supervisor, from its session key.
        instance: of the agent.
        timeout_s: for everything, the look-up of the host's name included.
    """
    found: list[str] = []

    def look() -> None:
        seen = _look(url, instance, timeout_s)
        if seen is not None:
            found.append(seen)

    # A resolver takes no deadline: when it is slow, it is left behind in its thread.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else None


def _look(url: str, instance: InstanceId, timeout_s: float) -> str | None:
    # Not urllib, which follows `file:` and redirects: the session key may have been written by a stranger.
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            return None
        connection = HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        try:
            connection.request("GET", f"/api/v1/instances/{instance}")
            reply = connection.getresponse()
            answer = json.loads(reply.read(REPLY_LIMIT))
        finally:
            connection.close()
    except (OSError, HTTPException, ValueError, RecursionError):
        return None
    seen = answer.get("agent_seen") if isinstance(answer, dict) else None
    return seen if isinstance(seen, str) and parse_time(seen) is not None else None
