"""Which instance is told what: the keys and locks that concern this host, and the removals that are held.

It is asked for every change of every key of the cluster, so what does not concern this host is passed over cheaply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Protocol

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.domain.grouping import names
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.removal import Hold, MassRemovalHold, differing, ends_it, names_no_host, order_of, why_held
from kvmsupervisor.domain.spec import RawValue, Wish
from kvmsupervisor.instance.sharing import Namesakes
from kvmsupervisor.instance.worker import Worker

log = structlog.get_logger(__name__)


class Admit(Protocol):
    """Makes an instance that was not known here."""

    def __call__(self, name: InstanceId, *, fresh: bool) -> Worker:
        """Make it; `fresh`: its keys were just written."""
        ...


class Dispatch:
    """Tells each instance that is, or was, this host's what its keys and its lock are now.

    Args:
        me: this host.
        clock: the machine's.
        wishes: the keys and locks of all instances.
        instances: those of this host; `admit` adds to them.
        namesakes: which instances name which images; told of every change of the keys.
        guard: judges removals.
        admit: makes an instance that was not known here.
        start: called with an instance that was just made, once it was told its wish.
        on_heard: called with all instances whose keys, lock or placement differ.
        on_held: a removal is held.
        on_told: it is known anew which instances are this host's, and what they want.
    """

    def __init__(
        self,
        *,
        me: HostName,
        clock: Clock,
        wishes: Wishes,
        instances: Mapping[InstanceId, Worker],
        namesakes: Namesakes,
        guard: MassRemovalHold,
        admit: Admit,
        start: Callable[[Worker], None],
        on_heard: Callable[[Set[InstanceId]], None],
        on_held: Callable[[], None],
        on_told: Callable[[], None],
    ) -> None:
        self._me = me
        self._mark = me.encode()
        self._clock = clock
        self._wishes = wishes
        self._instances = instances
        self._namesakes = namesakes
        self._guard = guard
        self._admit = admit
        self._start = start
        self._on_heard = on_heard
        self._on_held = on_held
        self._on_told = on_told
        # The wishes of the instances that are this host's, and the keys that they were parsed from.
        self._read: dict[InstanceId, tuple[Mapping[bytes, RawValue], Wish]] = {}
        # The keys that each was last told of.
        self._told: dict[InstanceId, Mapping[bytes, RawValue]] = {}
        # Why removals and other orders are held, where more is known of that.
        self._holds: dict[InstanceId, Hold] = {}
        # Before keys and locks were all listed, an absent one means nothing.
        self._listed = False

    def begin(self) -> None:
        """All is listed: look at all of it, and at what runs here although it has neither keys nor a lock."""
        self._listed = True
        if self._wishes.era:
            # It is not what a predecessor acted on.
            self.begin_anew()
        else:
            self.tell(self._everything(), fresh=False)
        # Also where that is nothing: it is known now.
        self._on_told()

    @property
    def has_begun(self) -> bool:
        """Whether instances are told of keys."""
        return self._listed

    def begin_anew(self) -> None:
        """Etcd has another history: look at all of it. What it would end here is held, whatever its number."""
        self._namesakes.heard_anew()
        if not self._listed:
            return
        for name in self._everything():
            instance = self._instances.get(name)
            if instance is None:
                continue
            keys, wish = self._wishes.keys_of(name), self._wish(name)
            former, before = instance.wish, self._told.get(name)
            # Its keys named a host that was not there: no order was being followed.
            stayed = instance.report.status.awaited_host is not None
            instance.begin_anew(wish)
            if not (instance.has_guest and ends_it(wish, self._me)):
                self._release({name})
            elif former is None or stayed or name in self._guard.held or not ends_it(former, self._me):
                held = self._holds.get(name) or instance.hold
                stood: Mapping[str, str] = {"host": str(self._me)} if before is None else differing(before, keys)
                stood = stood if held is None else held.stood
                self._holds[name] = Hold(order=order_of(wish), why=why_held(wish), stood=stood)
        self.tell(self._everything(), fresh=False)

    def _everything(self) -> Set[InstanceId]:
        return self._wishes.naming(self._me.encode()) | self._instances.keys()

    def tell(self, changed: Set[InstanceId], *, fresh: bool = True) -> None:
        """Tell each of these instances that is, or was, this host's what its keys and its lock are now.

        Args:
            changed: whose keys or lock differ.
            fresh: somebody has just written them.
        """
        if concerned := self._namesakes.heard(changed):
            for name in sorted(concerned & self._instances.keys()):
                self._instances[name].notify()
        if not self._listed:
            return
        self._on_heard(changed)
        # In the order of their ids: who is told, and started, first does not depend on how Python hashes names.
        ours = sorted(name for name in changed if name in self._instances or self._is_ours(name))
        if not ours:
            return
        wishes = {name: self._wish(name) for name in ours}
        held = self._judge_orders(wishes) | self._judge_removals(wishes)
        told = False
        for name, wish in wishes.items():
            known = self._instances.get(name)
            instance = known or self._admit(name, fresh=fresh)
            lock, as_of = self._wishes.lock_of(name), self._wishes.lock_known_at(name)
            if as_of is not None:
                instance.saw_lock(
                    data=None if lock is None else lock.value,
                    mod_revision=0 if lock is None else lock.mod_revision,
                    as_of=as_of,
                )
            if wish is instance.wish and name not in held and not instance.was_held:
                # Its lock alone differs, as at each step of a start.
                continue
            told = True
            instance.update(wish, held=name in held, fresh=fresh, hold=self._holds.get(name))
            self._told[name] = self._wishes.keys_of(name)
            if known is None:
                self._start(instance)
        if told:
            self._on_told()

    def let_go(self, freed: Set[InstanceId]) -> None:
        """An operator has confirmed these removals."""
        self._release(freed)
        for name in sorted(freed & self._instances.keys()):
            self._instances[name].update(self._wish(name), held=False, fresh=False)

    def links_differ(self, changed: Set[int]) -> None:
        """Network interfaces of this host differ, told by their indexes: one may be a guest's."""
        for instance in self._instances.values():
            if instance.plugs.concern(changed):
                instance.notify()

    def forget(self, name: InstanceId) -> None:
        """Nothing of an instance is this host's any more."""
        self._read.pop(name, None)
        self._told.pop(name, None)
        self._release({name})
        self._on_told()

    def is_wanted_here(self, name: InstanceId) -> bool:
        """Whether this host is where it shall run: by the key `host`, or by the placement that stands in for it."""
        return self._names_us(self._wishes.keys_of(name).get(b"host"), self._wishes.placed(name).placement)

    def _names_us(self, host: RawValue | None, placement: Placement | None) -> bool:
        if host is None:
            return False
        if placement is not None and placement.stands(host.mod_revision):
            return placement.host == self._me
        return names(host.value, self._mark)

    def concerns(self, name: InstanceId) -> bool:
        """Whether an instance is here, or is to be, whatever its lock says. Cheap: asked for every key."""
        if name in self._instances:
            return True
        keys, placement = self._wishes.keys_of(name), self._wishes.placed(name).placement
        if self._names_us(keys.get(b"host"), placement):
            return True
        # Nothing but a placement here is left of it, while nobody was here to take that away.
        return placement is not None and placement.host == self._me and not keys

    def _is_ours(self, name: InstanceId) -> bool:
        """Whether this host has to do with an instance that it does not know yet. Cheap: asked for every key."""
        if self.concerns(name):
            return True
        entry = self._wishes.lock_of(name)
        # Looking for the name costs less than reading JSON, but it may also be part of another host's.
        if entry is None or self._mark not in entry.value:
            return False
        lock = Lock.from_json(entry.value)
        return lock is not None and lock.host == self._me

    def _wish(self, name: InstanceId) -> Wish:
        """What the keys say. They are parsed when they differ only: most that is heard of a start is its lock."""
        keys, placed = self._wishes.keys_of(name), self._wishes.placed(name)
        read = self._read.get(name)
        if read is None or read[0] != keys or read[1].placed != placed:
            read = self._read[name] = (keys, parse_wish(name, keys, placed))
        return read[1]

    def _judge_orders(self, wishes: Mapping[InstanceId, Wish]) -> Set[InstanceId]:
        """Which of these instances go on as they are, because what would end them came with another history.

        Until an operator says that it is meant, or gives another order: keys that are written again are one.
        """
        held = set()
        for name, wish in wishes.items():
            instance = self._instances.get(name)
            hold = self._holds.get(name) or (None if instance is None else instance.hold)
            if hold is None or not hold.order or instance is None:
                continue
            if not (instance.has_guest and ends_it(wish, self._me)) or order_of(wish) != hold.order:
                self._release({name})
                continue
            if name not in self._guard.held:
                log.error("removal.held", instances=[name], reason=hold.why, stood=dict(hold.stood))
            self._holds[name] = hold
            held.add(name)
        self._guard.held |= held
        if held:
            self._on_held()
        return held

    def _judge_removals(self, wishes: Mapping[InstanceId, Wish]) -> Set[InstanceId]:
        """Which of these instances go on as they are, because too many lost their keys at once."""
        guard = self._guard
        ordered = {name for name, hold in self._holds.items() if hold.order}
        without = {name for name, wish in wishes.items() if names_no_host(wish)} - ordered
        self._release(wishes.keys() - without - ordered)
        fresh = {name for name in without - guard.held if self._was_ours(name)}
        # What an earlier supervisor held stays so, however few are left of it.
        held = {name for name in fresh if self._instances[name].was_held}
        guard.held |= held
        if news := {name for name in fresh - held if self._instances[name].pid is not None}:
            # All others are looked at only then: this is asked at each change of a key or a lock.
            running = {name for name, instance in self._instances.items() if instance.pid is not None}
            held |= guard.judge(news, running, self._clock.now())
        if held:
            for name in held:
                self._holds[name] = self._instances[name].hold or Hold(order="", why="", stood=self._before(name))
            log.error(
                "removal.held",
                instances=sorted(held),
                reason="more than half of this host's running instances lost their keys at once; they run on until "
                f"`kvmsupervisor confirm-removal {self._me}`, or until their keys are back",
            )
            self._on_held()
        return guard.held & without

    def _before(self, name: InstanceId) -> Mapping[str, str]:
        """The values that its keys had when it was last told of them, of those that differ now."""
        told = self._told.get(name)
        return {} if told is None else differing(told, self._wishes.keys_of(name))

    def _release(self, names: Set[InstanceId]) -> None:
        self._guard.release(names)
        for name in names:
            self._holds.pop(name, None)

    def _was_ours(self, name: InstanceId) -> bool:
        """Whether the last that was known of an instance made it this host's: its keys, or a process found here."""
        instance = self._instances.get(name)
        if instance is None:
            return False
        wish = instance.wish
        # Also what runs here until the host that its keys name is there.
        return instance.pid is not None or (wish is not None and wish.runs_on == self._me)
