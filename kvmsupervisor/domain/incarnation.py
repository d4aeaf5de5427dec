"""What a supervisor keeps in the run directory so that its successor can adopt (law 8).

Two small records per instance: the incarnation (one QEMU process) and the memory (what outlives it). Both carry a
version; a newer one is left alone with a reason, see `Unreadable`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from kvmsupervisor.domain.lock import Storage

VERSION = 1


class Unreadable(Exception):
    """A record that this release cannot read. The message says why; the file is left as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incarnation:
    """One QEMU process, on record before it is spawned and until it is buried.

    Attributes:
        instance: whose it is.
        incarnation: its name, also in the lock and in the process's environment.
        epoch: of the lock that it runs under.
        boot_id: of the kernel that runs it.
        argv: its command line.
        spec: the machine (`domain.spec.spec_to_object`), to tell what is pending.
        storage: what it may write to.
        accelerator: `kvm` or `tcg`.
        restart_request: the value of that key that it was started under.
        revision: etcd revision of the wish that it was started from.
        log_offset: where its words begin in the instance's QEMU log, in bytes.
        spawned_at: when it was spawned, CLOCK_BOOTTIME seconds.
        pid: None until the process exists.
        starttime: of the process, clock ticks since boot.
        clients: its Ceph client addresses, as written into the lock.
    """

    instance: str
    incarnation: str
    epoch: int
    boot_id: str
    argv: tuple[str, ...]
    spec: Mapping[str, Any]
    storage: Storage
    accelerator: str
    restart_request: str | None
    revision: int
    log_offset: int
    spawned_at: float
    pid: int | None = None
    starttime: int | None = None
    clients: tuple[str, ...] = ()
    version: int = VERSION

    def to_json(self) -> bytes:
        """As `incarnation.json` holds it."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read `incarnation.json`.

        Raises:
            Unreadable: it is damaged or written by a newer release.
        """
        values = _read(cls, data)
        try:
            return cls(
                **{
                    **values,
                    "argv": tuple(values["argv"]),
                    "clients": tuple(values.get("clients", ())),
                    "storage": Storage(values["storage"]),
                }
            )
        except (TypeError, ValueError, KeyError) as error:
            raise Unreadable(f"fields are missing or wrong ({error})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A machine that ended by itself and whose policy says: leave it.

    It starts again when any of these changes: a person has asked for it.
    """

    reason: str
    clean: bool
    host_revision: int
    power_revision: int
    restart_request: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What outlives one QEMU process, but not a reboot of the host.

    Attributes:
        boot_id: the boot whose clock `not_before` is on.
        attempt: how many restarts in a row came too soon; 0 when the next one may be at once.
        not_before: CLOCK_BOOTTIME before which it is not started again.
        pause_s: how long the pause before `not_before` was drawn, seconds.
        restarts: unasked restarts since the instance came to this host.
        last_exit: why the last process ended.
        ended: set while the policy says to leave it.
    """

    boot_id: str
    attempt: int = 0
    not_before: float = 0.0
    pause_s: float = 0.0
    restarts: int = 0
    last_exit: str | None = None
    ended: Ended | None = None
    version: int = VERSION

    def to_json(self) -> bytes:
        """As `memory.json` holds it."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read `memory.json`.

        Raises:
            Unreadable: it is damaged or written by a newer release.
        """
        values = _read(cls, data)
        try:
            ended = values.get("ended")
            return cls(**{**values, "ended": None if ended is None else Ended(**ended)})
        except TypeError as error:
            raise Unreadable(f"fields are missing or wrong ({error})") from error


def _read(cls: type[Incarnation] | type[Memory], data: bytes) -> dict[str, Any]:
    """Parse a record and judge its version."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Unreadable(f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise Unreadable("it is not a JSON object")
    if found.get("version") != VERSION:
        raise Unreadable(f"its version is {found.get('version')!r}, this release reads {VERSION}")
    known = {field.name for field in fields(cls)}
    return {name: value for name, value in found.items() if name in known}
