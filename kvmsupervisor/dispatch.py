"""Which instance is told what: the keys and locks that concern this host, and the removals that are held.

It is asked for every change of every key of the cluster, so what does not concern this host is passed over cheaply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Protocol

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.domain.grouping import names
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.removal import RemovalGuard
from kvmsupervisor.domain.spec import RawValue, Wish
from kvmsupervisor.domain.wishes import parse_wish
from kvmsupervisor.instance import Instance
from kvmsupervisor.mirror import Wishes

log = structlog.get_logger(__name__)


class Admit(Protocol):
    """Makes an instance that was not known here; None when what is kept of it is to be left alone."""

    def __call__(self, name: InstanceId, *, fresh: bool) -> Instance | None:
        """Make it; `fresh`: its keys were just written."""
        ...


class Dispatch:
    """Tells each instance that is, or was, this host's what its keys and its lock are now.

    Args:
        me: this host.
        clock: the machine's.
        wishes: the keys and locks of all instances.
        instances: those of this host; `admit` adds to them.
        guard: judges removals.
        admit: makes an instance that was not known here.
        start: called with an instance that was just made, once it was told its wish.
        on_candidates: keys of an instance with candidates (`hosts`) differ.
        on_held: a removal is held.
    """

    def __init__(
        self,
        *,
        me: HostName,
        clock: Clock,
        wishes: Wishes,
        instances: Mapping[InstanceId, Instance],
        guard: RemovalGuard,
        admit: Admit,
        start: Callable[[Instance], None],
        on_candidates: Callable[[], None],
        on_held: Callable[[], None],
    ) -> None:
        self._me = me
        self._clock = clock
        self._wishes = wishes
        self._instances = instances
        self._guard = guard
        self._admit = admit
        self._start = start
        self._on_candidates = on_candidates
        self._on_held = on_held
        # The wishes of the instances that are this host's, and the keys that they were parsed from.
        self._read: dict[InstanceId, tuple[Mapping[bytes, RawValue], Wish]] = {}
        # Before keys and locks were all listed, an absent one means nothing.
        self._listed = False

    def begin(self) -> None:
        """All is listed: look at all of it, and at what runs here although it has neither keys nor a lock."""
        self._listed = True
        self.tell(self._wishes.naming(self._me.encode()) | self._instances.keys(), fresh=False)

    def tell(self, changed: Set[InstanceId], *, fresh: bool = True) -> None:
        """Tell each of these instances that is, or was, this host's what its keys and its lock are now.

        Args:
            changed: whose keys or lock differ.
            fresh: somebody has just written them.
        """
        if not self._listed:
            return
        if any(b"hosts" in self._wishes.keys_of(name) for name in changed):
            self._on_candidates()
        ours = {name for name in changed if name in self._instances or self._is_ours(name)}
        wishes = {name: self._wish(name) for name in ours}
        held = self._judge_removals(wishes)
        for name, wish in wishes.items():
            known = self._instances.get(name)
            instance = known or self._admit(name, fresh=fresh)
            if instance is None:
                continue
            lock = self._wishes.lock_of(name)
            instance.saw_lock(
                data=None if lock is None else lock.value,
                mod_revision=0 if lock is None else lock.mod_revision,
                as_of=self._wishes.locks_revision,
            )
            instance.update(wish, held=name in held, fresh=fresh)
            if known is None:
                self._start(instance)

    def let_go(self, freed: Set[InstanceId]) -> None:
        """An operator has confirmed these removals."""
        for name in freed & self._instances.keys():
            self._instances[name].update(self._wish(name), held=False, fresh=False)

    def forget(self, name: InstanceId) -> None:
        """Nothing of an instance is this host's any more."""
        self._read.pop(name, None)

    def is_wanted_here(self, name: InstanceId) -> bool:
        """Whether this host is where it shall run: by the key `host`, or by the placement that stands in for it."""
        host = self._wishes.keys_of(name).get(b"host")
        if host is None:
            return False
        placement = self._wishes.placed(name).placement
        if placement is not None and placement.stands(host.mod_revision):
            return placement.host == self._me
        return names(host.value, self._me.encode())

    def _is_ours(self, name: InstanceId) -> bool:
        """Whether this host has to do with an instance that it does not know yet. Cheap: asked for every key."""
        if self.is_wanted_here(name) or self._left_its_placement(name):
            return True
        entry = self._wishes.lock_of(name)
        # Looking for the name costs less than reading JSON, but it may also be part of another host's.
        if entry is None or self._me.encode() not in entry.value:
            return False
        lock = Lock.from_json(entry.value)
        return lock is not None and lock.host == self._me

    def _left_its_placement(self, name: InstanceId) -> bool:
        """Whether nothing but a placement here is left of an instance, while nobody was here to take it away."""
        placement = self._wishes.placed(name).placement
        return placement is not None and placement.host == self._me and not self._wishes.keys_of(name)

    def _wish(self, name: InstanceId) -> Wish:
        """What the keys say. They are parsed when they differ only: most that is heard of a start is its lock."""
        keys, placed = self._wishes.keys_of(name), self._wishes.placed(name)
        read = self._read.get(name)
        if read is None or read[0] != keys or read[1].placed != placed:
            read = self._read[name] = (keys, parse_wish(name, keys, placed))
        return read[1]

    def _judge_removals(self, wishes: dict[InstanceId, Wish]) -> Set[InstanceId]:
        """Which of these instances go on as they are, because too many lost their keys at once."""
        guard = self._guard
        without = {name for name, wish in wishes.items() if _names_no_host(wish)}
        guard.release(wishes.keys() - without)
        fresh = {name for name in without - guard.held if self._was_ours(name)}
        # What an earlier supervisor held stays so, however few are left of it.
        held = {name for name in fresh if self._instances[name].was_held}
        guard.held |= held
        if fresh - held:
            held |= guard.judge(fresh - held, self._instances.keys(), self._clock.now())
        if held:
            log.error(
                "removal.held",
                instances=sorted(held),
                reason="more than half of this host's instances lost their keys at once; they run on until "
                f"`kvmsupervisor confirm-removal {self._me}`, or until their keys are back",
            )
            self._on_held()
        return guard.held & without

    def _was_ours(self, name: InstanceId) -> bool:
        """Whether the last that was known of an instance made it this host's: its keys, or a process found here."""
        instance = self._instances.get(name)
        if instance is None:
            return False
        wish = instance.wish
        # Also what runs here until the host that its keys name is there.
        return instance.pid is not None or (wish is not None and wish.runs_on == self._me)


def _names_no_host(wish: Wish) -> bool:
    """Whether its keys are gone, or `host` is. Another host, a bad one, or `power=off`, is an order, not a removal."""
    return wish.host is None and not any(problem.key == "host" for problem in wish.problems)
