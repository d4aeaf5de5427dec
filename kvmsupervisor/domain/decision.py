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
        process: `none`, `ended`, `paused` (alive, its guest has never run), `coming` (alive, waits for another host's
            guest) or `ran` (alive, its guest may have run).
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
    HELD_OVER        = Cells("none",       "absent leftover stranger broken", "any",    "wait",
                             "its QEMU lives, without a record in this run directory")
    DISSENT          = Cells("none",       "absent",                   "run",           "look wait",
                             "other hosts look for its lock under another key (law 12)")
    LOCK_NEWER       = Cells("paused coming ran", "newer",             "any",           "guard probe connect wait",
                             "a newer release has it in its hands, in the midst of a live move maybe")
    MISMATCH         = Cells("none",       "any",                      "any",           "wait",
                             "the settings are not those of what lives on this host (law 12)")
    MISMATCH_QEMU    = Cells("paused coming ran", "any",               "any",           "guard probe connect wait",
                             "the settings are not those of what lives on this host, such as this QEMU (law 12)")

    # An end.
    END_UNREAD       = Cells("ended",      "any",                      "keep stop",     "wait",
                             "its keys have not been read yet")
    END              = Cells("ended",      "any",                      "any",           "record_exit",
                             "its keys have been read")

    # A living QEMU that waits for another host's guest, or was given it (`move.py`, law 13).
    COMING_LOCKLESS  = Cells("coming",     "unknown unreadable renamed", "any",         "wait",
                             "what is not known ends nothing")
    COMING_END       = Cells("coming",     "absent mine leftover stranger broken", "any", "kill",
                             "the guest does not come: called off, or its host is gone")
    COMING_CONNECT   = Cells("coming",     "stranger",                 "any",           "connect wait",
                             "QMP does not answer yet")
    COMING_TELL      = Cells("coming",     "stranger",                 "run",           "tell wait",
                             "ready, and not on record yet")
    COMING_WAIT      = Cells("coming",     "stranger",                 "any",           "wait",
                             "on record in the offer, or in the lock")
    ARRIVED          = Cells("coming",     "mine",                     "any",           "settle",
                             "the lock is `running`, and its arrival could not be recorded: it is this host's own")
    ARRIVING_CONNECT = Cells("coming ran paused", "mine",              "any",           "connect wait",
                             "the lock gives the guest to it, and QMP does not answer")
    SETTLE           = Cells("coming ran", "mine",                     "any",           "settle wait",
                             "the same, and it goes on here")
    ARRIVE           = Cells("coming ran paused", "mine",              "any",           "arrive",
                             "the same, and it has all of the guest. No other row lets one go on that was sent here")
    ARRIVING_PROBE   = Cells("coming ran paused", "mine",              "any",           "probe wait",
                             "the same, and the rest is being loaded")

    MOVE_LEFT        = Cells("ran",        "mine renamed",             "any",           "wait",
                             "sent, and the lock is of another history: it may run elsewhere")

    # A living QEMU, by its lock (`ownership.py`). A lock of another cluster is as good as its own, but not written.
    REWRITE_PAUSED   = Cells("paused",     "absent stranger leftover broken", "any",    "kill",
                             "absent, or older than this QEMU; session held: nothing is lost, it starts anew (law 11)")
    REWRITE          = Cells("ran",        "absent stranger leftover broken", "any",    "reassert",
                             "absent, or older than this QEMU; session held (law 11)")
    LOCK_LOST        = Cells("paused ran", "stranger leftover",        "any",           "kill",
                             "not older than this QEMU: somebody else has it (law 6)")
    LOCK_BROKEN      = Cells("paused ran", "broken",                   "any",           "kill",
                             "not older than this QEMU: an operator gave it away (law 7)")
    RENAME           = Cells("paused coming ran", "renamed",                  "any",           "rename",
                             "session held (law 12)")
    VOUCH            = Cells("ran",        "mine",                     "any",           "vouch",
                             "an earlier release started it, people may write locks; session held (law 4)")

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
    # A live move, at the source (`move.py`, law 13).
    MOVE_UNREAD      = Cells("ran",        "unknown",                  "stop run",      "wait",
                             "to go elsewhere; whether it is on its way is not known")
    MOVE_CONNECT     = Cells("ran",        "mine renamed",             "any",           "connect wait",
                             "here and in the next: on its way, or to go. QMP does not answer")
    MOVE_PROBE       = Cells("ran",        "mine renamed",             "any",           "probe",
                             "QEMU was not asked how far it has come")
    MOVE_SEND        = Cells("ran",        "mine",                     "stop run",      "send",
                             "here and in the next six, the lock says `migrating`. Nothing is sent yet")
    MOVE_SWITCH      = Cells("ran",        "mine",                     "stop run",      "switch",
                             "the guest is stopped; etcd is there")
    MOVE_CUT         = Cells("ran",        "mine renamed",             "any",           "cut",
                             "the rest has been under way for too long")
    MOVE_WATCH       = Cells("ran",        "mine renamed",             "any",           "wait",
                             "it is being sent")
    MOVE_GIVE        = Cells("ran",        "mine",                     "stop run",          "give wait",
                             "all is sent: the one hand-over")
    MOVE_CALL_OFF    = Cells("ran",        "mine renamed",             "any",           "call_off wait",
                             "it is not sent, or not to be handed over")
    MOVE_CANCEL      = Cells("ran",        "mine renamed",             "any",           "cancel",
                             "memory is sent, or the guest is stopped for the rest, and it is not to go on")
    MOVE_BACK        = Cells("ran",        "mine",                     "any",           "go_back",
                             "sent, and called off. No other row lets a guest go on that was sent")
    MOVE_REFUSED     = Cells("ran",        "mine",                     "stop run",      "wait",
                             "to go, and it can only be moved cold, which is not wanted")
    MOVE_UNSETTLED   = Cells("ran",        "mine",                     "stop run",      "change wait",
                             "to go, and a change of its machine has begun: both hosts have to know what it is")
    MOVE_LATER       = Cells("ran",        "mine",                     "stop",          "wait",
                             "to go, and the last attempt has failed a moment ago")
    MOVE_ANNOUNCE    = Cells("ran",        "mine",                     "stop run",      "announce wait",
                             "to go, and the target's QEMU is ready")
    MOVE_CALL        = Cells("ran",        "mine",                     "stop run",          "call wait",
                             "to go")

    # A living QEMU whose guest may have run, otherwise.
    OFF_TOLD         = Cells("ran",        "any",                      "any",           "kill wait",
                             "the guest powered itself off, and QEMU was told to end")
    OFF_FINISH       = Cells("ran",        "any",                      "any",           "finish",
                             "the guest powered itself off, and QMP answers")
    RESET            = Cells("ran",        "any",                      "run",           "reset",
                             "a new reset is asked for, and QMP answers")
    STOP_TOLD        = Cells("ran",        "any",                      "stop run",      "kill wait",
                             "here and in the next four, run: a new restart is asked for. QEMU was told to end")
    STOP_FORCE       = Cells("ran",        "any",                      "stop run",      "quit",
                             "the guest has had its time, or is not asked")
    STOP_CONNECT     = Cells("ran",        "any",                      "stop run",      "connect wait",
                             "QMP does not answer")
    STOP_PROBE       = Cells("ran",        "any",                      "stop run",      "probe",
                             "its guest may have stopped meanwhile, and the button is not due")
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
    RUNS_MEDIUM      = Cells("ran",        "any",                      "run",           "medium",
                             "its CD-ROM drive holds another medium than its key says")
    RUNS_CHANGE      = Cells("ran",        "mine",                     "run",           "change",
                             "its machine differs from its keys in what QEMU can change; session held")
    RUNS_SNAPSHOT    = Cells("ran",        "mine",                     "run keep",      "snapshot",
                             "a snapshot is to be taken, or taken away; or one has left its guest standing still")
    RUNS_GROW        = Cells("ran",        "any",                      "run keep",      "grow",
                             "its images were not looked at for a while")
    RUNS_ROOM        = Cells("ran",        "any",                      "run keep",      "room",
                             "a disk's error has stopped its guest")
    RUNS             = Cells("ran",        "any",                      "run keep",      "wait",
                             "as it should be")

    # No process, and none wanted.
    REST_UNREAD      = Cells("none",       "any",                      "keep stop",     "wait",
                             "its keys have not been read yet")
    REST_UNKNOWN     = Cells("none",       "unknown",                  "keep stop rest", "wait",
                             "nothing is forgotten before the lock was read")
    ERRAND_LATER     = Cells("none",       "any",                      "run",           "wait",
                             "a rollback was begun, and has just failed")
    ERRAND_FENCE     = Cells("none",       "mine",                     "stop rest run", "fence wait",
                             "a snapshot is to be taken, or a rollback done, and earlier incarnations are not fenced")
    ERRAND           = Cells("none",       "mine",                     "stop rest run", "snapshot wait",
                             "the same; a rollback under a lock that nobody takes over")
    ERRAND_TAKE      = Cells("none",       "absent ours",              "stop rest run", "take wait",
                             "the same, and it has no lock that suffices. Run: a rollback was begun")
    REST_FENCE       = Cells("none",       "ours broken",              "keep stop rest", "fence wait",
                             "held by this host, with addresses that may not be fenced yet (law 4)")
    REST_RELEASE     = Cells("none",       "ours broken",              "keep stop rest", "release wait",
                             "held by this host (law 9)")
    REST_TIDY        = Cells("none",       "absent stranger broken unreadable newer", "stop", "tidy wait",
                             "its placement has ended, and is this host's to delete (law 10)")
    FORGET           = Cells("none",       "absent stranger broken unreadable newer", "stop keep", "forget",
                             "it does not run on this host: it leaves, was removed, or runs elsewhere")
    REST_LOOK        = Cells("none",       "absent",                   "keep stop rest", "look wait",
                             "its status key was not read yet")
    REST             = Cells("none",       "absent stranger broken unreadable newer", "keep stop rest", "wait",
                             "as it should be")

    # No process, and one wanted: what holds it up whatever the lock says.
    CLOSED_FENCE     = Cells("none",       "ours",                     "run",           "fence wait",
                             "this host drains, and the lock has addresses that are not fenced")
    CLOSED_RELEASE   = Cells("none",       "ours",                     "run",           "release wait",
                             "this host drains: another one may start it")
    CLOSED           = Cells("none",       "unknown unreadable newer stranger broken absent", "run", "look wait",
                             "this host drains")
    HISTORY          = Cells("none",       "any",                      "run",           "look wait",
                             "etcd has another history, in which not all hosts have spoken (law 11)")
    BACKOFF          = Cells("none",       "any",                      "run",           "look wait",
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
    UNREADABLE       = Cells("none",       "unreadable newer",         "run",           "wait",
                             "a newer release's, or damaged: it counts as held")
    HELD_UNSEEN      = Cells("none",       "stranger",                 "run",           "wait",
                             "its holder's session is below another facts prefix: it may live (law 12)")
    RECEIVE          = Cells("none",       "stranger",                 "run",           "receive",
                             "its holder has a session and moves it here live: it has said what comes")
    OFFERED          = Cells("none",       "stranger",                 "run",           "wait",
                             "the same, and this host has said that it takes it")
    OFFER            = Cells("none",       "stranger",                 "run",           "offer wait",
                             "the same, and it has not")
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

    # In front of taking a lock.
    DOUBT            = Cells("none",       "absent renamed leftover stranger broken", "run", "ask_watchers",
                             "it is older than the present history of etcd: Ceph is asked who runs it (law 11)")
    DOUBTED          = Cells("none",       "absent renamed leftover stranger broken", "run", "look wait",
                             "the same, and somebody has its disks open: only a person may end that guest (law 11)")

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
