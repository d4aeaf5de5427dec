"""What `lifecycle.decide` returns: a `Decision`, and the table with the `Row` that it came from."""

from __future__ import annotations

from enum import Enum, unique
from typing import NamedTuple

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.view import Action


class Cells(NamedTuple):
    """One row of the table, in fixed words; `tests/domain/test_decision_table.py` holds every cell.

    Attributes:
        process: `none`, `ended`, `paused` (alive, its guest has never run) or `ran` (alive, its guest may have run).
        lock: what the lock means to this host, as `lock.Claim` names it; `ours` is `mine`, `renamed` or `leftover`.
        goal: what the keys come to, as `goal.Goal` names it.
        action: what the row does, as `view.Action` names it; `wait` is no action: for time, for etcd, or for news.
        further: what else must be so, for readers.
    """

    process: str
    lock: str
    goal: str
    action: str
    further: str


@unique
class Row(Enum):
    """The decision table. In each block the first row that fits decides; `any` means that the row does not ask.

    Rows that speak of the lock's holder, its storage or its state are about the lock that `lock` says.
    """

    # fmt: off
    # Hands off (`hands_off.py`).
    #                        process       lock                        goal             action
    LEFT_ALONE       = Cells("none",       "any",                      "any",           "read look wait",
                             "what was left of it cannot be read, or must not be touched")
    HELD_OVER        = Cells("none",       "leftover stranger broken", "any",           "wait",
                             "its QEMU lives, without a record in this run directory")
    DISSENT          = Cells("none",       "absent",                   "run",           "wait",
                             "other hosts look for its lock under another key (law 12)")
    MISMATCH         = Cells("none",       "any",                      "any",           "wait",
                             "the settings are not those of what lives on this host (law 12)")
    MISMATCH_QEMU    = Cells("paused ran", "any",                      "any",           "guard probe connect wait",
                             "the settings are not those of what lives on this host, such as this QEMU (law 12)")

    # An end.
    END_UNREAD       = Cells("ended",      "any",                      "keep stop",     "wait",
                             "its keys have not been read yet")
    END              = Cells("ended",      "any",                      "any",           "record_exit",
                             "its keys have been read")

    # A living QEMU, by its lock (`ownership.py`). A lock of another cluster is as good as its own, but not written.
    REWRITE_PAUSED   = Cells("paused",     "absent stranger leftover broken", "any",    "kill",
                             "absent, or older than this QEMU; session held: nothing is lost, it starts anew (law 11)")
    REWRITE          = Cells("ran",        "absent stranger leftover broken", "any",    "reassert",
                             "absent, or older than this QEMU; session held (law 11)")
    LOCK_LOST        = Cells("paused ran", "stranger leftover",        "any",           "kill",
                             "not older than this QEMU: somebody else has it (law 6)")
    LOCK_BROKEN      = Cells("paused ran", "broken",                   "any",           "kill",
                             "not older than this QEMU: an operator gave it away (law 7)")
    RENAME           = Cells("paused ran", "renamed",                  "any",           "rename",
                             "session held (law 12)")

    # A living QEMU whose guest has never run.
    PAUSED_KEEP      = Cells("paused",     "any",                      "keep",          "wait",
                             "its keys have not been read yet, or what they say waits for an operator")
    PAUSED_UNWANTED  = Cells("paused",     "any",                      "stop keep",     "kill",
                             "nothing is lost")
    PAUSED_CHANGED   = Cells("paused",     "any",                      "run",           "kill",
                             "its keys changed: QEMU starts anew")
    PAUSED_RIVAL     = Cells("paused",     "any",                      "run",           "kill",
                             "another instance has its image: who waits holds nothing")
    PAUSED_SILENT    = Cells("paused",     "any",                      "run",           "give_up",
                             "QMP did not answer in time")
    PAUSED_CONNECT   = Cells("paused",     "any",                      "run",           "connect wait",
                             "QMP does not answer yet")
    PAUSED_LOCKLESS  = Cells("paused",     "unknown absent renamed leftover stranger broken unreadable", "run", "wait",
                             "without its lock a guest does not run (law 3)")
    PAUSED_UNQUIET   = Cells("paused",     "mine",                     "run",           "wait",
                             "its keys may still be changing")
    RECORD           = Cells("paused",     "mine",                     "run",           "record wait",
                             "the lock does not say that this process may run (law 3)")
    PAUSED_GUARD     = Cells("paused",     "mine",                     "run",           "guard wait",
                             "the guard does not watch it yet (law 7)")
    CONTINUE         = Cells("paused",     "mine",                     "run",           "continue",
                             "on record, and watched where it has to be")

    # A living QEMU whose guest may have run.
    RUNS_GUARD       = Cells("ran",        "any",                      "any",           "guard",
                             "the guard does not watch it yet: before all that follows but its forced end (law 7)")
    OFF_TOLD         = Cells("ran",        "any",                      "any",           "kill wait",
                             "the guest powered itself off, and QEMU was told to end")
    OFF_FINISH       = Cells("ran",        "any",                      "any",           "finish",
                             "the guest powered itself off, and QMP answers")
    RESET            = Cells("ran",        "any",                      "run",           "reset",
                             "a new reset is asked for, and QMP answers")
    STOP_TOLD        = Cells("ran",        "any",                      "stop run",      "kill wait",
                             "here and in the next three, run: a new restart is asked for. QEMU was told to end")
    STOP_FORCE       = Cells("ran",        "any",                      "stop run",      "quit",
                             "the guest has had its time, or is not asked")
    STOP_CONNECT     = Cells("ran",        "any",                      "stop run",      "connect wait",
                             "QMP does not answer")
    STOP_ASK         = Cells("ran",        "any",                      "stop run",      "powerdown wait",
                             "the power button, again and again")
    RUNS_CONNECT     = Cells("ran",        "any",                      "run keep",      "connect wait",
                             "QMP does not answer")
    RUNS_PROBE       = Cells("ran",        "any",                      "run keep",      "probe",
                             "QEMU was not asked for a while")
    RUNS_TIDY        = Cells("ran",        "mine",                     "run",           "tidy",
                             "its placement has ended, and the lock is worth an attempt (law 10)")
    RUNS_PLUG        = Cells("ran",        "any",                      "run keep",      "plug",
                             "one of its NICs has lost its bridge")
    RUNS_GROW        = Cells("ran",        "any",                      "run keep",      "grow",
                             "its images were not looked at for a while")
    RUNS_ROOM        = Cells("ran",        "any",                      "run keep",      "room",
                             "a full file system has stopped its guest")
    RUNS             = Cells("ran",        "any",                      "run keep",      "wait",
                             "as it should be")

    # No process, and none wanted.
    REST_UNREAD      = Cells("none",       "any",                      "keep stop",     "wait",
                             "its keys have not been read yet")
    REST_UNKNOWN     = Cells("none",       "unknown",                  "keep stop rest", "wait",
                             "nothing is forgotten before the lock was read")
    REST_FENCE       = Cells("none",       "ours broken",              "keep stop rest", "fence wait",
                             "held by this host, with addresses that may not be fenced yet (law 4)")
    REST_RELEASE     = Cells("none",       "ours broken",              "keep stop rest", "release wait",
                             "held by this host (law 9)")
    REST_TIDY        = Cells("none",       "absent stranger broken unreadable", "stop", "tidy wait",
                             "its placement has ended, and is this host's to delete (law 10)")
    FORGET           = Cells("none",       "absent stranger broken unreadable", "stop keep", "forget",
                             "it does not run on this host: it leaves, was removed, or runs elsewhere")
    REST_LOOK        = Cells("none",       "absent",                   "keep stop rest", "look wait",
                             "its status key was not read yet")
    REST             = Cells("none",       "absent stranger broken unreadable", "keep stop rest", "wait",
                             "as it should be")

    # No process, and one wanted: what holds it up whatever the lock says.
    HISTORY          = Cells("none",       "any",                      "run",           "wait",
                             "etcd has another history, in which not all hosts have spoken (law 11)")
    BACKOFF          = Cells("none",       "any",                      "run",           "wait",
                             "too early after an end that nobody asked for")
    SHARE_FENCE      = Cells("none",       "ours",                     "run",           "fence wait",
                             "another instance has its image, and the lock has addresses that are not fenced")
    SHARE_RELEASE    = Cells("none",       "ours",                     "run",           "release wait",
                             "another instance has its image")
    SHARE_ASK        = Cells("none",       "absent",                   "run",           "ask look wait",
                             "another instance has its image")

    # No process, and one wanted: by the lock.
    UNKNOWN          = Cells("none",       "unknown",                  "run",           "wait",
                             "not read yet")
    UNREADABLE       = Cells("none",       "unreadable",               "run",           "wait",
                             "a newer release's, or damaged: it counts as held")
    HELD_UNSEEN      = Cells("none",       "stranger",                 "run",           "wait",
                             "its holder's session is below another facts prefix: it may live (law 12)")
    HELD             = Cells("none",       "stranger",                 "run",           "wait",
                             "its holder has a session, as far as is known")
    TAKE_HARMLESS    = Cells("none",       "stranger",                 "run",           "take wait",
                             "its holder is gone, and could write to nothing (law 7)")
    UNFENCEABLE      = Cells("none",       "stranger",                 "run",           "wait",
                             "its holder is gone, and storage cannot fence it: an operator's word is needed (law 7)")
    TAKE_OVER        = Cells("none",       "stranger",                 "run",           "take wait",
                             "its holder is gone, and its disks are not in use, or have been for too long (law 4)")
    ASK_WATCHERS     = Cells("none",       "stranger",                 "run",           "ask_watchers wait",
                             "its holder is gone: Ceph is asked who has the disks open (law 4)")
    BROKEN_HELD      = Cells("none",       "broken",                   "run",           "wait",
                             "its holder has a session: it lets go by itself (law 7)")
    TAKE_BROKEN      = Cells("none",       "broken",                   "run",           "take wait",
                             "its holder has no session, or is this host (law 7)")
    CLAIMED          = Cells("none",       "absent",                   "run",           "look wait",
                             "another host's status says that it runs there")
    TAKE             = Cells("none",       "absent leftover renamed",  "run",           "take wait",
                             "nobody else has it")
    FENCE            = Cells("none",       "mine",                     "run",           "fence wait",
                             "earlier incarnations may not be fenced yet (law 3)")
    SPAWN            = Cells("none",       "mine",                     "run",           "spawn",
                             "all that was there to fence is fenced")

    # In front of taking a lock, and of `SPAWN`.
    OBSTACLE         = Cells("none",       "ours absent stranger broken", "run",        "look wait",
                             "something was missing on this host a moment ago")
    PREPARE          = Cells("none",       "ours absent stranger broken", "run",        "prepare",
                             "media and UEFI variables are not ready")
    QUEUE            = Cells("none",       "ours absent stranger broken", "run",        "queue",
                             "no start slot asked for")
    MEMORY           = Cells("none",       "ours absent stranger broken", "run",        "look wait",
                             "this host has not enough memory free")
    TURN             = Cells("none",       "ours absent stranger broken", "run",        "wait",
                             "others are starting")
    # fmt: on


@frozen(kw_only=True)
class Decision:
    """What to say and to do.

    Attributes:
        row: of the table, by which it was decided.
        phase: for status, metrics and people.
        reason: one sentence: the cause, and what would end it.
        action: the next step, None to wait.
        wake_at: when to decide again without news, CLOCK_BOOTTIME; None: only when there is news.
        slot: whether to keep a start slot, or a place in the line for one.
    """

    row: Row
    phase: Phase
    reason: str
    action: Action | None = None
    wake_at: float | None = None
    slot: bool = False
