"""What a decision about an instance is made of: the `View` it sees, the `Action` and the `Decision` it may come to."""

from __future__ import annotations

import math
from dataclasses import field
from enum import Enum

from kvmsupervisor.domain.exits import Exit
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.history import FIRST_ERA, Era, is_older
from kvmsupervisor.domain.incarnation import Incarnation, Memory
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Claim, LockView
from kvmsupervisor.domain.run_state import NEVER_RAN
from kvmsupervisor.domain.spec import Problem, Spec, Wish
from kvmsupervisor.domain.status import Phase


class Action(Enum):
    """One step. Each may fail or be cut off half way; what is observed afterwards decides what follows."""

    READ = "read again what an earlier supervisor left, which could not be read"
    LOOK = "read lock and status again, because no watch would tell"
    ASK = "look whether its images, which another instance names, too, are free"
    WATCH = "ask storage who has the disks of a host's machine open that has no session"
    TAKE = "write the lock for a new incarnation"
    REASSERT = "write the lock again that somebody deleted under a living QEMU"
    RENAME = "write this host's present name into the lock of its own QEMU"
    FENCE = "fence every address of earlier incarnations"
    QUEUE = "stand in line for a start slot"
    PREPARE = "make ready what takes its time: boot media, UEFI variables"
    SPAWN = "open its taps, put the incarnation on record and start QEMU, paused"
    CONNECT = "connect to QMP, ask for the run state"
    RECORD = "write pid and addresses into the lock"
    GUARD = "have the guard watch it"
    CONTINUE = "let the guest run"
    PROBE = "ask QEMU for its run state"
    PLUG = "plug its NICs in again"
    GROW = "look whether its images were grown, and tell QEMU"
    POWERDOWN = "press the power button"
    FINISH = "tell QEMU to end whose guest has powered itself off"
    QUIT = "tell QEMU to end"
    RESET = "reset the machine, as its button would: the process stays"
    KILL = "SIGKILL through the pidfd, on purpose"
    GIVE_UP = "SIGKILL a QEMU that never answered: a failure, not a wish"
    TIDY = "delete a placement that stands in for nothing any more"
    BURY = "take the process's end to the books, delete its record"
    RELEASE = "delete the lock of a process that is proven gone"
    FORGET = "nothing of it is ours any more"


@frozen(kw_only=True)
class Stopping:
    """How far a stop has come. Times are CLOCK_BOOTTIME seconds."""

    since: float
    pressed_at: float | None = None
    quit_at: float | None = None


@frozen(kw_only=True)
class Process:
    """A QEMU process as observed.

    Attributes:
        incarnation: its record.
        spec: the machine it was started as; None when a newer release wrote a spec that cannot be read.
        exit: why it ended, None while it lives.
        connected: whether QMP answered on the present connection.
        run_state: QMP's, as last told; None when never told to this supervisor.
        connect_at: when the next attempt to connect is due.
        probe_at: when the next probe is due.
        grow_at: when its images are to be looked at again; never for a machine without.
        unplugged: what is to be said of its NICs, for people; empty when all are plugged in as they were.
        plug_at: when a NIC is to be plugged in again; never while all are.
        silent_since: since when it owes an answer, None when it answers.
        stopping: how far a stop has come, None when none was begun.
        asked: whether this supervisor has asked it to end; its end is no failure then.
    """

    incarnation: Incarnation
    spec: Spec | None
    exit: Exit | None = None
    connected: bool = False
    run_state: str | None = None
    connect_at: float = 0.0
    probe_at: float = 0.0
    grow_at: float = math.inf
    unplugged: tuple[str, ...] = ()
    plug_at: float = math.inf
    silent_since: float | None = None
    stopping: Stopping | None = None
    asked: bool = False

    @property
    def never_ran(self) -> bool:
        """Whether the guest certainly never ran. An unknown state counts as "may have run"."""
        return self.run_state == NEVER_RAN


@frozen(kw_only=True)
class Holdover:
    """A QEMU that lives here and has no record in the run directory.

    Attributes:
        pid: of it.
        folder: where it was put on record; None when that is not known.
    """

    pid: int
    folder: str | None = None


@frozen(kw_only=True)
class LeftAlone:
    """What an earlier supervisor left of an instance, and this one cannot read, or must not touch.

    Attributes:
        reason: why, and what would end it, for people.
        pid: of the living QEMU that it tells of, as far as that is known.
        starttime: of that process, clock ticks since boot.
        look_at: when it is to be read again, CLOCK_BOOTTIME.
    """

    reason: str
    pid: int | None = None
    starttime: int | None = None
    look_at: float = 0.0


@frozen(kw_only=True)
class Target:
    """Another host where an instance shall run, as it is seen from here.

    Attributes:
        there: whether it has a session; None when not known.
        drains: whether it says that it stops all its guests.
        meant: a host that has a session and was probably meant, when it has none; None when none comes close.
    """

    there: bool | None = None
    drains: bool = False
    meant: str | None = None

    @property
    def receives(self) -> bool:
        """Whether somebody is there to move to."""
        return self.there is True and not self.drains


@frozen(kw_only=True)
class Deferral:
    """How the takeover of a lock waits for a host that may have lost etcd only (law 4).

    Attributes:
        until: when it has waited long enough, CLOCK_BOOTTIME.
        told: the same for people.
        ask_at: when storage is to be asked again.
        watchers: who has the disks open, as last told; None before that.
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
        boot_id: of this boot.
        wish: the keys; None until they were read for the first time.
        problems: the wish's, and those that this host has with it (no bridge, …). Empty ⇔ it can be run here.
        left_alone: what cannot be read of it, or must not be touched; None when all can. There is no process then.
        mismatch: why nothing is started or stopped here at all (law 12); None when all goes its way.
        dissent: why no lock is taken where none is (law 12): other hosts look for it elsewhere; None when all agree.
        held: what its keys have come to (removed, another `host`, `power` off) waits for an operator's word.
        held_why: how that came about, for people; empty for a mass removal.
        era: the history of etcd that it is decided in.
        draining: the host is being shut down or serviced: nothing runs here meanwhile, whatever the wish.
        leaving: why this instance is to be stopped and let go of, whatever the wish; None when it is not.
        session_held: whether this host's session holds now.
        etcd_at: when etcd is worth the next attempt (after an error or a lost compare); the past when now.
        etcd_trouble: what the last attempt said, None when it went well.
        lock: as last seen.
        planned: incarnation that the lock was taken for and that has no process yet.
        buried: incarnation of the last process whose end was taken to the books here; None when there was none.
        holder_has_session: of the lock's host; None when not known.
        deferral: how long a takeover has waited, None when it has not begun to.
        target: the host where it shall run, when that is another, as it is seen from here.
        holdover: a QEMU of ours that lives without a record in the run directory; None when there is none.
        claimed_by: host whose status says that it runs this although the lock is absent, None when none does.
        looked: whether the status key was read, which another host may have written; only then it is written over.
        process: None when there is none.
        memory: what outlives a process.
        slot: whether a start slot is held (True), asked for (False), or neither (None).
        shortage: which memory does not suffice for it, None when it waits for no memory.
        prepared: whether what takes its time was made ready for the wish as it stands.
        start_at: when the host is worth the next attempt, after something was missing on it; the past when now.
        obstacle: what was missing, None when nothing was.
        rival: for which other instance of the same image it waits, for people; None when for none.
        ask_at: when it is to be asked again whether that image is free.
        shared: which others name an image of the machine that runs, for people; None when none does.
        guarded: whether the guard watches the process, which may write to what no storage can fence; None when it need
            not be watched.
        guard_at: when the guard is worth the next attempt; the past when now.
        guard_trouble: what the last attempt said, None when there was none.
        quiet_at: when the wish will have been quiet for long enough to let a new guest run.
        start_timeout_s: within which a new QEMU must answer.
        shutdown_timeout_s: between the power button and force.
    """

    now: float
    me: HostName
    boot_id: str
    wish: Wish | None
    problems: tuple[Problem, ...] = ()
    left_alone: LeftAlone | None = None
    mismatch: str | None = None
    dissent: str | None = None
    held: bool = False
    held_why: str = ""
    era: Era = FIRST_ERA
    draining: bool = False
    leaving: str | None = None
    session_held: bool = True
    etcd_at: float = 0.0
    etcd_trouble: str | None = None
    lock: LockView = field(default_factory=LockView)
    planned: str | None = None
    buried: str | None = None
    holder_has_session: bool | None = None
    deferral: Deferral | None = None
    target: Target = field(default_factory=Target)
    holdover: Holdover | None = None
    claimed_by: HostName | None = None
    looked: bool = True
    process: Process | None = None
    memory: Memory
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

    @property
    def is_strange(self) -> bool:
        """Whether the lock is another cluster's, so that it says nothing of this process."""
        lock = self.lock.lock
        return lock is not None and lock.host != self.me and self.era.is_strange(lock.host, self.lock.mod_revision)

    @property
    def is_outdated(self) -> bool:
        """Whether the lock is older than the process: it was restored, or written by hand, and is no takeover."""
        lock, process = self.lock.lock, self.process
        if lock is None or process is None:
            return False
        return is_older(lock, epoch=process.incarnation.epoch, incarnation=process.incarnation.incarnation)

    @property
    def unadopted_pid(self) -> int | None:
        """Of the QEMU that is known to live here and is not this supervisor's to touch; None when there is none."""
        if self.left_alone is not None:
            return self.left_alone.pid
        return None if self.holdover is None else self.holdover.pid

    @property
    def claim(self) -> Claim:
        """What the lock means to us: to the process's incarnation, or to the one that is planned."""
        known = self.planned if self.process is None else self.process.incarnation.incarnation
        return self.lock.claim(host=self.me, boot_id=self.boot_id, incarnation=known, buried=self.buried)

    @property
    def stays(self) -> bool:
        """Whether it stays here although it shall run elsewhere: a move needs somebody to move to (DESIGN §4).

        It begins when that host has a session, and this one has, to hand the lock over. Here is where its QEMU is, or
        where its lock says that it was.
        """
        if self.wish is None or not self.wish.is_elsewhere(self.me) or (self.target.receives and self.session_held):
            return False
        return self.process is not None or self.claim in {Claim.MINE, Claim.RENAMED, Claim.LEFTOVER}


@frozen(kw_only=True)
class Decision:
    """What to say and to do.

    Attributes:
        phase: for status, metrics and people.
        reason: one sentence: the cause, and what would end it.
        action: the next step, None to wait.
        wake_at: when to decide again although nothing was heard, CLOCK_BOOTTIME; None: only when heard.
        slot: whether a start slot, or a place in the line for one, is to be kept.
    """

    phase: Phase
    reason: str
    action: Action | None = None
    wake_at: float | None = None
    slot: bool = False
