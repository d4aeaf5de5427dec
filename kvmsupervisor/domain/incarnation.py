"""What a supervisor keeps in the run directory so that its successor can adopt (law 8).

Two small records per instance: the incarnation (one QEMU process) and the state (what outlives the process). Each has a
version. A newer one is left alone with a reason, see `Unreadable`. A third record is the guard's note of a machine that
it killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.identity import HostIdentity
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.records import Unfit, build, lined, load
from kvmsupervisor.domain.spec import spec_from_object
from kvmsupervisor.domain.storage import images_of

VERSION = 1


class Unreadable(Exception):
    """A record that this release cannot read. The message says why; the file is left as it is."""


@frozen(kw_only=True)
class Incarnation:
    """One QEMU process, on record before it is spawned and until its exit is recorded.

    Attributes:
        instance: whose it is.
        incarnation: its name, also in the lock and in the process's environment.
        epoch: of the lock that it runs under.
        boot_id: of the kernel that runs it.
        argv: its command line, which says what it was started with.
        spec: the machine as it is now (`domain.spec.spec_to_object`), to tell what is pending.
        storage: what it may write to.
        accelerator: `kvm` or `tcg`.
        machine: the versioned machine type, None when it was not known.
        taps: names of its NICs' interfaces on the host, in their order.
        tap_indexes: numbers of these interfaces, 0 for one in another network namespace.
        bridges: the bridges that they were plugged into.
        restart_request: the value of that key at its start.
        revision: etcd revision of the wish that it was started from.
        log_offset: where its part of the instance's QEMU log begins, in bytes.
        spawned_at: when it was spawned, CLOCK_BOOTTIME seconds.
        pid: None until the process exists.
        starttime: of the process, clock ticks since boot.
        clients: its Ceph client addresses, as written into the lock.
        medium: what is in its CD-ROM drive, as the key `cdrom` names it; None for nothing.
        coming: disks and NICs that it is being given, by name: `spec` has them, QEMU maybe not yet.
        going: those of `spec` that its guest was asked to let go of: QEMU may not have them any more.
        paused: whether its guest was paused when it was last asked for its run state.
        standing: whether its guest stands still for a snapshot, and its supervisor lets it go on.
        uid: the user that it runs as; None for its supervisor's own, and in a record of an older release.
        incoming: whether it waits for the guest of another host (`-incoming`), which is not its own yet. Its epoch is 0
            until then, so that no release takes the lock of that host for an older one.
        under: the identity of the supervisor that started it, or took it over by a person's word (law 12); None in a
            record of an older release.
        history: the name of the history of etcd that it was started in, as `Lock.history`; None in a cluster's first
            history, and in a record of an older release.
        vouched: whether its clients stand among the facts wherever they stand in a lock that people may write
            (`Layout.clients_key`); not so for an older release.
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
    machine: str | None = None
    taps: tuple[str, ...] = ()
    tap_indexes: tuple[int, ...] = ()
    bridges: tuple[str, ...] = ()
    pid: int | None = None
    starttime: int | None = None
    clients: tuple[str, ...] = ()
    medium: str | None = None
    coming: tuple[str, ...] = ()
    going: tuple[str, ...] = ()
    paused: bool = False
    standing: bool = False
    uid: int | None = None
    incoming: bool = False
    under: HostIdentity | None = None
    history: str | None = None
    vouched: bool = False
    version: int = VERSION

    def as_lock(self, host: HostName, *, facts: str, ran: bool, machine: str | None = None) -> Lock:
        """The lock for this process.

        Args:
            host: this one, by its present name.
            facts: its `KVM_FACTS_PREFIX`.
            ran: whether its guest may have run.
            machine: this one, as `HostSession.machine`.
        """
        return Lock(
            host=host,
            boot_id=self.boot_id,
            epoch=self.epoch,
            state=LockState.RUNNING if ran else LockState.STARTING,
            incarnation=self.incarnation,
            pid=self.pid,
            starttime=self.starttime,
            clients=self.clients,
            images=self.images,
            storage=self.storage,
            facts=facts,
            machine=machine or None,
        )

    def is_after(self, mark: str | None, revision: int, era: Era) -> bool:
        """Whether it was started after a key was written that came with the change to `era`.

        Revisions order all writes of one history, epochs do not: they begin anew with a machine that was removed and
        made again. So a backup from before that has a greater epoch than the machine that runs. The revision that it
        was started from is older than its lock.

        Args:
            mark: the history that the key says it was written in.
            revision: of the key.
            era: the present history.
        """
        came = era.has_changed and not era.has(mark, revision)
        return came and mark == self.history and revision <= self.revision

    @property
    def images(self) -> tuple[str, ...]:
        """The images in Ceph that it has open for writing, by name; none where that is not known."""
        spec = spec_from_object(self.spec)
        return () if spec is None else tuple(image.name for image in images_of(spec))

    def to_json(self) -> bytes:
        """As `incarnation.json` holds it."""
        return lined(self)

    @classmethod
    def from_json(cls, data: bytes) -> Incarnation:
        """Read `incarnation.json`.

        Raises:
            Unreadable: it is damaged or written by a newer release.
        """
        return _read(cls, data)


@frozen(kw_only=True)
class Ended:
    """A machine that ended by itself, and stays so by its policy.

    When any of the last three fields changes, a person asked for a start.
    """

    reason: str
    clean: bool
    host_revision: int
    power_revision: int
    restart_request: str | None


@frozen(kw_only=True)
class InstanceState:
    """What outlives one QEMU process, but not a reboot of the host.

    Attributes:
        boot_id: the boot whose clock `not_before` is on.
        attempt: how many restarts in a row came too soon; 0: the next one may come at once.
        not_before: CLOCK_BOOTTIME before which it is not started again.
        pause_s: length of the pause before `not_before`, seconds.
        revision: of the wish under which the last process ended by itself; 0 when it was not known.
        keys: how many keys that wish had. With any other wish the pause is over: people changed something.
        restarts: unasked restarts since the instance came to this host.
        last_exit: why the last process ended.
        held: whether what its keys say now waits for an operator's word. It is kept, so that a successor holds it, too.
        held_as: the order that is held, as `removal.order_of` names it; None for a mass removal.
        held_why: the cause of the hold, for people.
        stood: the values that its keys had before, of those that differ.
        restart_seen: a value of `restart_request` that came with another history of etcd: it asks for no restart.
        shutdown_timeout_s: the last sound value of that key (None: the host's default), for a shutdown after the keys
            were deleted.
        ended: set while the policy keeps it stopped.
    """

    boot_id: str
    attempt: int = 0
    not_before: float = 0.0
    pause_s: float = 0.0
    revision: int = 0
    keys: int = 0
    restarts: int = 0
    last_exit: str | None = None
    held: bool = False
    held_as: str | None = None
    held_why: str = ""
    stood: Mapping[str, str] | None = None
    restart_seen: str | None = None
    shutdown_timeout_s: float | None = None
    ended: Ended | None = None
    version: int = VERSION

    def to_json(self) -> bytes:
        """As `memory.json` holds it."""
        return lined(self)

    @classmethod
    def from_json(cls, data: bytes) -> InstanceState:
        """Read `memory.json`.

        Raises:
            Unreadable: it is damaged or written by a newer release.
        """
        return _read(cls, data)


@frozen(kw_only=True)
class GuardNote:
    """The guard's note of a machine that it killed: which, and when, RFC 3339 in UTC."""

    incarnation: str
    at: str
    version: int = VERSION

    @classmethod
    def from_json(cls, data: bytes) -> GuardNote:
        """Read `guard.json`.

        Raises:
            Unreadable: it is damaged or written by a newer release.
        """
        return _read(cls, data)


RecordT = TypeVar("RecordT", Incarnation, InstanceState, GuardNote)


def _read(cls: type[RecordT], data: bytes) -> RecordT:
    """Parse a record; its version is judged first, because a newer one may have other fields."""
    try:
        found = load(data)
        version = build(_Versioned, found).version
        if version != VERSION:
            raise Unreadable(f"its version is {version}, this release reads {VERSION}")
        return build(cls, found)
    except Unfit as error:
        raise Unreadable(str(error)) from error


@frozen
class _Versioned:
    version: int
