"""Everything that the keys say about one instance, as a JSON object, without secrets."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvmsupervisor.cluster.overview import Cluster, Instance, as_object
from kvmsupervisor.domain.parse_keys import public_value
from kvmsupervisor.domain.spec import RawValue


def details(instance: Instance, cluster: Cluster, agent_seen: str | None = None) -> dict[str, Any]:
    """Everything about one instance, as `show -o json` prints it.

    Args:
        instance: the one.
        cluster: all of them.
        agent_seen: when the agent in its guest last answered; None when it did not, or that is not known.
    """
    host = instance.wish.runs_on or (instance.status.host if instance.status is not None else None)
    session = cluster.sessions.get(host) if host is not None else None
    return {
        "id": instance.id,
        "keys": {
            name.decode("utf-8", "backslashreplace"): _key(name, raw) for name, raw in sorted(instance.keys.items())
        },
        "revision": instance.wish.revision,
        "problems": list(instance.problems),
        "status": as_object(instance, cluster),
        "lock": _lock(instance),
        "placement": None if instance.wish.placement is None else asdict(instance.wish.placement),
        "session": session.to_object() if session is not None else None,
        "agent_seen": agent_seen,
    }


def _key(name: bytes, raw: RawValue) -> dict[str, Any]:
    """A key for JSON. `whole` is whether `value` is all that it holds: who writes another one back loses the rest."""
    shown = public(name, raw.value)
    text = shown.decode("utf-8", "backslashreplace")
    whole = shown == raw.value.strip() and text.encode("utf-8", "replace") == shown
    return {"value": text, "whole": whole, "mod_revision": raw.mod_revision}


def public(name: bytes, value: bytes) -> bytes:
    """A key's value without its secrets."""
    return public_value(name.decode(errors="replace"), value.strip())


def _lock(instance: Instance) -> dict[str, Any] | None:
    """The lock for JSON; an unreadable one as text."""
    if instance.lock is None:
        return None
    if instance.lock.lock is None:
        return {"unreadable": instance.lock.kv.value.decode("utf-8", "backslashreplace")}
    return asdict(instance.lock.lock)
