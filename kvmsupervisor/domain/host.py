"""A host's session: the object in `/kvmsupervisor/hosts/<host>` and in `/api/v1/hosts`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.offer import MoveFacts
from kvmsupervisor.domain.records import Unfit, parse
from kvmsupervisor.domain.records import plain as as_object
from kvmsupervisor.domain.values import nearest, plain, some

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

SOME = 3
"""How many hosts a sentence names."""


@frozen(kw_only=True)
class HostSession:
    """What a host publishes of itself in its session key.

    Attributes:
        host: its name (`KVM_HOSTNAME`).
        version: of the supervisor.
        url: where its HTTP server answers.
        boot_id: of the kernel's present boot.
        machine: names the machine across boots (DMI product UUID or machine id); empty when unknown.
        started: when the supervisor started, RFC 3339 in UTC, for people.
        cpus: of the host.
        memory_mib: of the host.
        guests_mib: of that, for all guests together; 0 where an earlier release does not say.
        notice: what a person should know of it, or empty.
        draining: whether it stops all its guests (`stop --all --local`), and starts none.
        history: the history of etcd in which its locks say what runs here; empty where none ever changed.
        lock: where it looks for locks (`LOCK`); empty in single mode, and where an earlier release does not say.
        gaps: the walls between guests that cannot be had on it, each with the reason.
        drain_any: whether any host may run its machines without the key `hosts` when it drains (`KVM_DRAIN_ANY`).
        web: where the page of this host answers other hosts' pages (`KVM_WEB_URL`); empty where it does not.
        moves: what live moves to it need; None where it takes part in none.
    """

    host: str
    version: str
    url: str
    boot_id: str
    machine: str = ""
    started: str = ""
    cpus: int = 0
    memory_mib: int = 0
    guests_mib: int = 0
    notice: str = ""
    draining: bool = False
    history: str = ""
    lock: str = ""
    gaps: tuple[str, ...] = ()
    drain_any: bool = False
    web: str = ""
    moves: MoveFacts | None = None

    def to_object(self) -> dict[str, Any]:
        """As a JSON object."""
        return as_object(self)

    def to_json(self) -> bytes:
        """As the session key holds it."""
        # A lone surrogate (of bytes that were no UTF-8) becomes what JSON writes for it.
        return _ENCODER.encode(self.to_object()).encode(errors="backslashreplace")

    @classmethod
    def from_json(cls, data: bytes) -> HostSession | None:
        """Read a session key, which anybody may have written; None when it is not one."""
        try:
            return parse(cls, data)
        except Unfit:
            return None


def dissent(mine: str, others: Mapping[str, str]) -> str | None:
    """Why an absent lock may not be taken: the other hosts look for it under another key. None where all agree.

    If one other host agrees with this one, this host is not the wrong one.

    Args:
        mine: the `LOCK` of this host.
        others: host → its `LOCK`, of the other hosts that say one.
    """
    if not others or mine in others.values():
        return None
    said = some([f"{host}: {lock}" for host, lock in sorted(others.items())], SOME)
    return (
        f"LOCK is {mine} here, and another one on every other host ({said}), which may run it under that: it is "
        "not started before they are the same"
    )


def resembling(name: str, sessions: Collection[str]) -> str | None:
    """The host with a session that was probably meant by `name`, which has none; None when none comes close.

    Args:
        name: as written.
        sessions: the holders of sessions, containers in single mode (with a slash in their names) among them.
    """
    hosts = {plain(host): host for host in sorted(sessions) if "/" not in host}
    label = plain(name).partition(".")[0]
    # The most frequent mistake is a short name for the full one, or the reverse; their letters are not alike.
    same = [host for key, host in hosts.items() if key.partition(".")[0] == label]
    return same[0] if same else nearest(name, hosts)
