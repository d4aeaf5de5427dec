"""What a decision is based on, the `View`, and what it may ask for, the `Action`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import field
from enum import Enum, IntEnum

from kvmsupervisor.domain.cdrom import medium_of
from kvmsupervisor.domain.exits import Exit
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.history import FIRST_ERA, Era, is_older
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.live import Attempt, key_of, steps
from kvmsupervisor.domain.lock import NOT_YET_RUN, Claim, LockView
from kvmsupervisor.domain.run_state import NEVER_RAN
from kvmsupervisor.domain.snapshots import Errand
from kvmsupervisor.domain.spec import Problem, Spec, Wish
from kvmsupervisor.domain.transfer import NO_COURSE, Course, Stage


class Haste(IntEnum):
    """In what a hurry an instance is stopped by whoever lets go of it."""

    NONE = 0
    QUIT = 1
    """Its guest is asked no more: QEMU is told to end."""
    KILL = 2
    """QEMU is not waited for either."""


class Action(Enum):
    """One step. Each may fail or be cut off half way; what is observed afterwards decides what follows."""

    READ = "read again what an earlier supervisor left, which could not be read"
    LOOK = "read lock and status again, because no watch shows them"
    ASK = "look whether its images are free, which another instance names, too"
    ASK_WATCHERS = "ask Ceph who still has the disks open, when the lock's holder has no session"
    TAKE = "write the lock for a new incarnation"
    REASSERT = "write the lock of a living QEMU again, which was deleted or is older"
    RENAME = "write this host's present name into the lock of its own QEMU"
    VOUCH = "repeat its clients among the facts"
    FENCE = "fence every address of earlier incarnations"
    QUEUE = "queue for a start slot"
    PREPARE = "prepare what takes time: boot media, UEFI variables"
    SPAWN = "open its taps, record the incarnation and start QEMU, paused"
    CONNECT = "connect to QMP, ask for the run state"
    RECORD = "write pid and addresses into the lock"
    GUARD = "have the guard watch it"
    CONTINUE = "let the guest run"
    PROBE = "ask QEMU for its run state"
    PLUG = "plug its NICs in again"
    CHANGE = "make one thing of its machine what its keys want"
    GROW = "look whether its images grew, and tell QEMU"
    MEDIUM = "change the medium in its CD-ROM drive"
    SNAPSHOT = "take a snapshot of its disks, take one away, or roll them back to one"
    ROOM = "look why a disk's error has stopped its guest, and whether it can go on"
    POWERDOWN = "press the power button"
    FINISH = "tell QEMU to end, whose guest powered itself off"
    QUIT = "tell QEMU to end"
    RESET = "reset the machine like its button: the process stays"
    KILL = "SIGKILL through the pidfd, on purpose"
    GIVE_UP = "SIGKILL a QEMU that never answered: a failure, not a wish"
    OFFER = "say that this host takes the guest in live"
    RECEIVE = "start QEMU for the guest that the source has told of"
    TELL = "put that QEMU's addresses on record in the offer, and tell the source"
    CALL = "ask the target to make ready, and tell it what comes"
    ANNOUNCE = "write the target's QEMU into the lock"
    SEND = "have QEMU transfer its guest"
    CANCEL = "have QEMU cancel the transfer"
    SWITCH = "ask etcd once more, then have QEMU transfer the rest"
    CUT = "cut the connection of a transfer that is stuck"
    GIVE = "hand the lock over to the target"
    CALL_OFF = "take the target's QEMU out of the lock"
    GO_BACK = "let the guest go on that was not handed over"
    ARRIVE = "let the guest go on that was handed over"
    SETTLE = "write that it runs here, once nothing of it is left at the source"
    TIDY = "delete a placement that has ended"
    RECORD_EXIT = "record the exit, delete the process's record"
    RELEASE = "delete the lock of a process that is proven gone"
    FORGET = "end the loop: the instance is not this host's any more"


@frozen(kw_only=True)
class Stopping:
    """How far a stop has come. Times are CLOCK_BOOTTIME seconds.

    Attributes:
        since: when it began.
        asked_at: when the power button was pressed first; None before.
        pressed_at: when it was pressed last.
        quit_at: when QEMU was told to end.
    """

    since: float
    asked_at: float | None = None
    pressed_at: float | None = None
    quit_at: float | None = None

    def force_at(self, limit_s: float) -> float:
        """When a guest has had its time, which begins when it is asked: before that its supervisor may be frozen."""
        return (self.since if self.asked_at is None else self.asked_at) + limit_s


@frozen(kw_only=True)
class Process:
    """A QEMU process as observed.

    Attributes:
        incarnation: its record.
        spec: the machine that was started; None when a newer release wrote it and it cannot be read.
        exit: why it ended, None while it lives.
        connected: whether QMP answered on the present connection.
        stage: how far a live move of its guest has come.
        run_state: the last known run state of QMP; None before the first answer to this supervisor.
        connect_at: when the next attempt to connect is due.
        probe_at: when the next probe is due.
        grow_at: when to look at its images again; never for a machine without.
        disk_trouble: what keeps its disks from the size of their keys, for people.
        room_at: when to look why a disk's error has stopped its guest, and whether it can go on; never without one.
        full: what people should know of that: its file system is full, its client is shut out; None for nothing.
        medium_at: when its CD-ROM drive is worth the next attempt to change its medium; the past: now.
        medium_trouble: why the last one came to nothing, for people; None for no reason.
        attempts: at devices that come, go or change while it runs, by name.
        unplugged: what people should know of its NICs; empty when all are plugged in.
        plug_at: when to plug a NIC in again; never while all are plugged in.
        silent_since: since when it owes an answer, None when it answers.
        stopping: how far a stop has come; None without one.
        asked: whether this supervisor asked it to end: its end is no failure then.
    """

    incarnation: Incarnation
    spec: Spec | None
    exit: Exit | None = None
    connected: bool = False
    run_state: str | None = None
    stage: Stage = Stage.UNKNOWN
    connect_at: float = 0.0
    probe_at: float = 0.0
    grow_at: float = math.inf
    disk_trouble: tuple[str, ...] = ()
    room_at: float = math.inf
    full: str | None = None
    medium_at: float = 0.0
    medium_trouble: str | None = None
    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    unplugged: tuple[str, ...] = ()
    plug_at: float = math.inf
    silent_since: float | None = None
    stopping: Stopping | None = None
    asked: bool = False

    @property
    def never_ran(self) -> bool:
        """Whether the guest certainly never ran. An unknown state counts as "may have run"."""
        return self.run_state == NEVER_RAN or self.incarnation.incoming

    @property
    def has_drive(self) -> bool:
        """Whether it was started with a CD-ROM drive."""
        return self.spec is not None and self.spec.cdrom is not None

    def holds_another(self, wanted: Spec | None) -> bool:
        """Whether another medium is in its drive than `wanted` says; False where nothing sound is wanted."""
        return self.has_drive and wanted is not None and self.incarnation.medium != medium_of(wanted.cdrom)

    def medium_due(self, wish: Wish | None) -> float:
        """When to change the medium in its drive for `wish`; never where that, or None, wants no other one."""
        return self.medium_at if wish is not None and self.holds_another(wish.spec) else math.inf

    def changes(self, wanted: Spec | None, *, takes: bool) -> dict[str, str]:
        """The devices to which something is to be done for `wanted`, each with its key.

        Those whose last change was cut off come first.
        """
        known = self.incarnation
        begun = {device: key_of(device) for device in (*known.coming, *known.going)}
        if self.spec is None or wanted is None:
            return begun
        due = steps(self.spec, wanted, argv=known.argv, takes=takes)
        return begun | {step.device: step.key for step in due if step.device not in begun}

    def change_due(self, devices: Collection[str]) -> float:
        """When the next attempt at one of these devices is due; never without one."""
        return min((self.attempt(device).at for device in devices), default=math.inf)

    def attempt(self, device: str) -> Attempt:
        """What is known of the last attempt at a device."""
        return self.attempts.get(device) or Attempt()


@frozen(kw_only=True)
class Holdover:
    """A QEMU that lives here and has no record in the run directory.

    Attributes:
        pid: of it.
        starttime: of it, clock ticks since boot.
        folder: the run directory with its record; None when that is not known.
    """

    pid: int
    starttime: int
    folder: str | None = None


@frozen(kw_only=True)
class LeftAlone:
    """What an earlier supervisor left of an instance, which this one cannot read, or must not touch.

    Attributes:
        reason: why, and what would end it, for people.
        pid: of its living QEMU, as far as that is known.
        starttime: of that process, clock ticks since boot.
        look_at: when to read it again, CLOCK_BOOTTIME.
    """

    reason: str
    pid: int | None = None
    starttime: int | None = None
    look_at: float = 0.0


@frozen(kw_only=True)
class Target:
    """The other host where an instance is to run, as seen from here.

    Attributes:
        there: whether it has a session; None when not known.
        drains: whether it drains, or stops all its guests.
        meant: a host with a session that was probably meant, when this one has none; None when none comes close.
    """

    there: bool | None = None
    drains: bool = False
    meant: str | None = None

    @property
    def receives(self) -> bool:
        """Whether an instance can move there now."""
        return self.there is True and not self.drains


@frozen(kw_only=True)
class Clearing:
    """What a host that empties itself means to one of its instances.

    Attributes:
        closed: why nothing is started here; None when things are.
        evicted: why this one is stopped, whatever its wish; None when it is not.
        remark: what a person should know of it besides; None for nothing.
    """

    closed: str | None = None
    evicted: str | None = None
    remark: str | None = None


IN_SERVICE = Clearing()


@frozen(kw_only=True)
class Deferral:
    """The wait of a takeover for a host that may have lost etcd only (law 4).

    Attributes:
        until: when the wait ends, CLOCK_BOOTTIME.
        told: the same for people.
        ask_at: when to ask storage again.
        watchers: the clients that have the disks open, as last heard; None before the first answer.
    """

    until: float
    told: str
    ask_at: float
    watchers: tuple[str, ...] | None = None


@frozen(kw_only=True)
class View:
    """All that a decision may depend on.

    Attributes:
        now: CLOCK_BOOTTIME, seconds.
        me: this host.
        facts: its `KVM_FACTS_PREFIX`.
        locks_are_open: as `Layout.locks_are_open`.
        boot_id: of this boot.
        machine: this one, as `HostSession.machine`; None where that does not matter.
        wish: the keys; None until they were read for the first time.
        problems: the wish's, and those that this host has with it (no bridge, …). Empty ⇔ it can be run here.
        left_alone: what is left of it and cannot be read, or must not be touched; None without that. No process then.
        mismatch: why nothing is started or stopped here at all (law 12); None without a mismatch.
        dissent: why an absent lock is not taken (law 12): other hosts look for it elsewhere; None when all agree.
        held: an order in its keys (removed, another `host`, `power` off) waits for an operator's word.
        held_why: the cause, for people; empty for a mass removal.
        era: the history of etcd in which this is decided.
        draining: the host stops all its guests, whatever the wish.
        clearing: what the host's drain means to it.
        leaving: why this instance is to be stopped and released, whatever the wish; None when it is not.
        haste: how much of a hurry that is.
        session_held: whether this host's session holds now.
        etcd_at: when etcd is worth the next attempt (after an error or a failed compare); the past: now.
        etcd_trouble: the error of the last attempt, None when it went well.
        lock: as last seen.
        planned: the incarnation that the lock was taken for, and that has no process yet.
        last_ended: the incarnation of the last process whose exit was recorded here, or None.
        holder_has_session: whether the lock's host has a session; None when not known.
        deferral: the wait of a takeover, None before it begins.
        target: the host where it is to run, when that is another one.
        course: of its live move.
        holdover: a QEMU of ours that lives without a record in the run directory, or None.
        claimed_by: the host whose status says that it runs this although the lock is absent, or None.
        looked: whether the status key was read, which another host may have written; it is not overwritten before.
        statuses_known: whether the status keys were read since the supervisor started.
        process: its QEMU, or None.
        saved: the state that outlives a process.
        slot: whether a start slot is held (True), asked for (False), or neither (None).
        shortage: why its memory does not fit, for people; None when it does not wait for memory.
        prepared: whether media and UEFI variables were prepared for the present wish.
        start_at: when the next attempt to start is due, after something was missing; the past: now.
        obstacle: what was missing, or None.
        rival: the other instance of the same image that it waits for, for people; or None.
        ask_at: when to look again whether that image is free.
        shared: the others that name an image of the running machine, for people; or None.
        guarded: whether the guard watches the process, which may write to what storage cannot fence; None when it need
            not be watched.
        guard_at: when the next attempt to reach the guard is due; the past: now.
        guard_trouble: the error of the last attempt, or None.
        quiet_at: when the wish has been quiet for long enough to let a new guest run.
        start_timeout_s: time limit for a new QEMU to answer.
        shutdown_timeout_s: time between the power button and force.
        errand: what is to be done next about its snapshots; None for nothing.
        errand_trouble: what people should know of that: why it failed, or what it waits for; None for nothing.
        claim: what the lock means to the process's incarnation, or to the planned one. One that was seen in a former
            history means nothing in the present one.
    """

    now: float
    me: HostName
    facts: str
    boot_id: str
    wish: Wish | None
    problems: tuple[Problem, ...] = ()
    left_alone: LeftAlone | None = None
    locks_are_open: bool = False
    mismatch: str | None = None
    dissent: str | None = None
    held: bool = False
    held_why: str = ""
    era: Era = FIRST_ERA
    draining: bool = False
    clearing: Clearing = IN_SERVICE
    leaving: str | None = None
    haste: Haste = Haste.NONE
    session_held: bool = True
    etcd_at: float = 0.0
    etcd_trouble: str | None = None
    lock: LockView = field(default_factory=LockView)
    planned: str | None = None
    last_ended: str | None = None
    holder_has_session: bool | None = None
    machine: str | None = None
    deferral: Deferral | None = None
    target: Target = field(default_factory=Target)
    course: Course = NO_COURSE
    holdover: Holdover | None = None
    claimed_by: HostName | None = None
    looked: bool = True
    statuses_known: bool = True
    process: Process | None = None
    saved: InstanceState
    slot: bool | None = None
    shortage: str | None = None
    prepared: bool = True
    start_at: float = 0.0
    obstacle: str | None = None
    rival: str | None = None
    ask_at: float = 0.0
    shared: str | None = None
    guarded: bool | None = None
    guard_at: float = 0.0
    guard_trouble: str | None = None
    quiet_at: float = 0.0
    start_timeout_s: float = 60.0
    shutdown_timeout_s: float = 120.0
    errand: Errand | None = None
    errand_trouble: str | None = None
    claim: Claim = field(init=False, compare=False, repr=False)

    @property
    def is_strange(self) -> bool:
        """Whether the lock belongs to another cluster, so that it says nothing of this process."""
        lock = self.lock.lock
        return lock is not None and lock.host != self.me and self.era.is_strange(lock.host, self.lock.mod_revision)

    @property
    def takes(self) -> bool:
        """Whether something may be taken from a running guest, or changed under it, because its keys say so.

        Not from one that was started in another history of etcd: what a restored backup lacks, or says otherwise, was
        maybe written since (law 11).
        """
        return self.process is not None and self.process.incarnation.history == (self.era.mark or None)

    @property
    def is_namesakes(self) -> bool:
        """Whether another machine took the lock under this host's name (law 12)."""
        lock = self.lock.lock
        return lock is not None and lock.is_namesakes(self.me, boot_id=self.boot_id, machine=self.machine)

    @property
    def is_outdated(self) -> bool:
        """Whether the lock is older than the process: restored, or written by hand, and no takeover.

        Of a process that was started in the present history, a lock that was written in it by a host that lives is a
        takeover, whatever its epoch: the instance was removed and made again while this host was away, and its epochs
        began anew.
        """
        lock, process = self.lock.lock, self.process
        if lock is None or process is None:
            return False
        known = process.incarnation
        if lock.epoch <= known.epoch and lock.state in NOT_YET_RUN and not process.never_ran:
            # Somebody deleted lock and status of a guest that runs, so another host began anew. That one has not run.
            return True
        if self.claim is Claim.LEFTOVER and known.history != (self.era.mark or None):
            # This host wrote it, for a QEMU before this one, which was started in another history, or another store.
            return True
        # Two histories may have one number: two restores of one backup, noticed by different hosts.
        started_in_it = known.epoch > self.era.epoch_floor and known.history == (self.era.mark or None)
        written_in_it = self.lock.mod_revision > self.era.since
        if started_in_it and written_in_it and lock.host != self.me and self.holder_has_session:
            return False
        if known.is_after(lock.history, self.lock.mod_revision, self.era):
            return True
        return is_older(lock, epoch=known.epoch, incarnation=known.incarnation)

    @property
    def unadopted_pid(self) -> int | None:
        """The pid of a QEMU that lives here and must not be touched, or None."""
        if self.left_alone is not None:
            return self.left_alone.pid
        return None if self.holdover is None else self.holdover.pid

    def __post_init__(self) -> None:
        """Judge the lock once: decision and status ask for that often."""
        object.__setattr__(self, "claim", self._claim())

    def _claim(self) -> Claim:
        if self.lock.era != self.era.count:
            return Claim.UNKNOWN
        known = self.planned if self.process is None else self.process.incarnation.incarnation
        return self.lock.claim(
            host=self.me,
            facts=self.facts,
            boot_id=self.boot_id,
            incarnation=known,
            last_ended=self.last_ended,
            mark=self.era.mark,
            machine=self.machine,
        )

    @property
    def stays(self) -> bool:
        """Whether it stays here although it is to run elsewhere: a move needs a host to move to.

        A move begins when both hosts have a session. "Here" is where its QEMU is, or was by its lock.
        """
        if self.wish is None or not self.wish.is_elsewhere(self.me) or (self.target.receives and self.session_held):
            return False
        return self.process is not None or self.claim in {Claim.MINE, Claim.RENAMED, Claim.LEFTOVER}

    @property
    def goes_only_live(self) -> bool:
        """Whether its guest may have run here, is to go elsewhere, and may not be stopped for that."""
        placement = None if self.wish is None else self.wish.placement
        if placement is None or not placement.only_live or placement.host == self.me or self.process is None:
            return False
        return self.process.exit is None and not self.process.never_ran
