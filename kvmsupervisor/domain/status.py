"""What is observed of an instance: the object in the status key, in `/api/v1/instances` and in `list`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any

from kvmsupervisor.domain.agent import GuestFacts
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.records import Unfit, parse, shallow
from kvmsupervisor.domain.run_state import RUNNING
from kvmsupervisor.domain.snapshots import Rollback, Snap
from kvmsupervisor.domain.words import is_name

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

VALUE_BYTES = 64 * 1024
"""A status is cut to about this: an instance with 10,000 bad keys must not fill etcd. Arbitrary."""


class Phase(StrEnum):
    """Where an instance is in its life."""

    INVALID = "invalid"
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    STOPPED = "stopped"
    MIGRATING = "migrating"


@frozen(kw_only=True)
class Transfer:
    """A live move of a guest: under way, or how the last one to this host went.

    Attributes:
        source: the host that it leaves.
        target: the host that it goes to.
        sent_bytes: so far.
        left_bytes: what is to be sent yet, as QEMU guesses: the guest may write the same page again.
        bytes_per_s: lately.
        stopped_ms: how long the guest stood still, as QEMU tells it; None until it has come.
    """

    source: str
    target: str
    sent_bytes: int = 0
    left_bytes: int = 0
    bytes_per_s: int = 0
    stopped_ms: int | None = None


@frozen(kw_only=True)
class Status:
    """One instance as its host sees it.

    Attributes:
        id: the instance.
        host: the host that reports.
        phase: where it is in its life.
        reason: one sentence: the cause, and what would end it.
        since: when the phase began, RFC 3339 in UTC, for people (no decision uses it).
        pid: of QEMU, on that host, or None.
        epoch: of the lock; grows with each incarnation. 0 before the first.
        restarts: QEMU processes started after the first, unasked, since it came to this host.
        pending: names of the keys that take effect at the next restart.
        changing: those of them of which something is being done while it runs.
        problems: every problem of its keys.
        revision: the etcd revision of the wish that was acted on.
        incarnation: name of the running QEMU process's incarnation, or None.
        last_exit: why the last QEMU process ended, or None.
        accelerator: `kvm` or `tcg` while QEMU lives, else None.
        machine: the versioned machine type that the guest knows, from its first start on.
        machine_key: the value of `machine` that `machine` was found for; another value is looked up again.
        notice: what else a person should know of the running machine, or None.
        held: whether an order in its keys waits for `confirm-removal`.
        stood: meanwhile, the former values of the keys that differ.
        agent: what the guest's agent last said of the guest, None when it never answered.
        run_state: QMP's run state; None without a QEMU, and while it does not answer. Only in `running` the guest runs.
        unplugged: what people should know of its NICs while one is not plugged into its bridge.
        guarded: whether the guard watches QEMU, which may write to what cannot be fenced; None when it need not.
        placed_for: the host for which this one runs it (law 10), None for its own host.
        files: the host that has each of its disks that are files, by name (`file:NAME`), once it has run with them.
        cdrom: what is in its CD-ROM drive, `empty` for nothing; None without a drive.
        images: its images in Ceph that are made when they are missing, once it has run with them.
        snapshots: those that exist, as far as this host has seen.
        rollback: the last one to a snapshot, under way or done.
        move: its live move that is under way, or by which its QEMU came here; None without one.
        awaited_host: the host where it is to run, while that has no session and it stays here; else None.
    """

    id: str
    host: str
    phase: Phase
    reason: str
    since: str
    pid: int | None = None
    epoch: int = 0
    restarts: int = 0
    pending: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    revision: int = 0
    incarnation: str | None = None
    last_exit: str | None = None
    accelerator: str | None = None
    machine: str | None = None
    machine_key: str | None = None
    notice: str | None = None
    held: bool = False
    agent: GuestFacts | None = None
    guarded: bool | None = None
    stood: Mapping[str, str] | None = None
    run_state: str | None = None
    unplugged: tuple[str, ...] = ()
    placed_for: str | None = None
    awaited_host: str | None = None
    move: Transfer | None = None
    files: Mapping[str, str] | None = None
    cdrom: str | None = None
    images: tuple[str, ...] = ()
    snapshots: tuple[Snap, ...] = ()
    rollback: Rollback | None = None
    changing: tuple[str, ...] = ()

    @property
    def up(self) -> bool:
        """Whether its guest runs."""
        return self.pid is not None and self.run_state == RUNNING

    @property
    def halted(self) -> str | None:
        """The run state of a guest that should run and does not, although QEMU lives; else None."""
        return self.run_state if self.phase is Phase.RUNNING and self.run_state != RUNNING else None

    @property
    def tells_of_a_process(self) -> bool:
        """Whether it says that a QEMU of this instance lives on its host."""
        living = {Phase.STARTING, Phase.RUNNING, Phase.STOPPING, Phase.MIGRATING}
        return self.pid is not None and self.phase in living

    def inheriting(self, theirs: Status) -> Status:
        """The same with what goes on from host to host, by another status where this one tells nothing of it."""
        is_known = self.machine is not None
        return replace(
            self,
            machine=self.machine if is_known else theirs.machine,
            machine_key=self.machine_key if is_known else theirs.machine_key,
            files=self.files if self.files is not None else theirs.files,
            images=self.images or theirs.images,
            snapshots=self.snapshots or theirs.snapshots,
            rollback=self.rollback or theirs.rollback,
        )

    def taken_over(self, host: str, *, epoch: int, since: str, reason: str) -> Status:
        """What `host` says in its place when it takes the lock over: what goes on from host to host, and no QEMU."""
        return Status(
            id=self.id,
            host=host,
            phase=Phase.WAITING,
            reason=reason,
            since=since,
            epoch=max(epoch, self.epoch),
            revision=self.revision,
            machine=self.machine,
            machine_key=self.machine_key,
            files=self.files,
            images=self.images,
            snapshots=self.snapshots,
            rollback=self.rollback,
        )

    def to_object(self) -> dict[str, Any]:
        """As a JSON object, that of the status key and of HTTP; see docs/cli.md."""
        return shallow(self) | {
            "phase": self.phase.value,
            "pending": list(self.pending),
            "changing": list(self.changing),
            "problems": list(self.problems),
            "unplugged": list(self.unplugged),
            "images": list(self.images),
            "agent": None if self.agent is None else asdict(self.agent),
            "move": None if self.move is None else shallow(self.move),
            "snapshots": [shallow(snap) | {"disks": list(snap.disks)} for snap in self.snapshots],
            "rollback": None if self.rollback is None else shallow(self.rollback),
        }

    def to_json(self) -> bytes:
        """The value of the status key."""
        # A lone surrogate (of bytes that were no UTF-8) becomes what JSON writes for it.
        return _ENCODER.encode(self.to_object()).encode(errors="backslashreplace")

    @classmethod
    def from_json(cls, data: bytes) -> Status | None:
        """Read a status key, which anybody may have written; None when it is not one."""
        try:
            found = parse(cls, data)
        except Unfit:
            return None
        # It becomes an argument of QEMU.
        fits = found.machine is None or is_name(found.machine)
        return found if fits else replace(found, machine=None, machine_key=None)


def encoded(status: Status) -> bytes:
    """The value of the key, with as many problems as fit."""
    value = status.to_json()
    if len(value) <= VALUE_BYTES:
        return value
    kept: list[str] = []
    size = 0
    for problem in status.problems:
        size += len(problem.encode()) + 3
        if size > VALUE_BYTES // 2:
            break
        kept.append(problem)
    left_out = len(status.problems) - len(kept)
    return replace(status, problems=(*kept, f"and {left_out} more problems, see `kvmsupervisor check`")).to_json()
