"""What nobody tells of in a history, looked at between two steps: who writes, what is on record, what statuses claim.

Statuses are held against what is so where they could be right: the host has its session, and nothing has been wrong
with it for as long as the table in `tests.support.bounds` says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmsupervisor.domain.status import Status
from tests.simulation.etcd import Weather
from tests.simulation.qemu import SimQemu
from tests.support import bounds
from tests.support.invariants import Fact, Lasting, Tries, unrecorded, untrue

if TYPE_CHECKING:
    from tests.simulation.host import SimHost
    from tests.simulation.world import World

FINE = Weather()

WRITERS, STATUSES, RECORDS = 4, 8, 16
"""Of how many ticks one looks at these, which last. To look at each at each tick made a history a third longer."""


class Looks:
    """The looks of one history.

    Attributes:
        tries: what supervisors try again.
    """

    def __init__(self, world: World) -> None:
        self.tries = Tries(bounds.SILENCE_S)
        self._world = world
        self._ticks = 0
        self._excused: set[str] = set()
        # Incarnation → the state of its record's file when that was read last.
        self._read: dict[str, tuple[int, int]] = {}
        self._files: dict[str, str] = {}
        self._claims: Lasting[tuple[str, bool]] = Lasting()
        # Host → since when nothing is wrong with it; the same of its way to Ceph.
        self._well: dict[str, float] = {}
        self._stored: dict[str, float] = {}

    def excuse(self, qemus: Iterable[SimQemu]) -> None:
        """Somebody took away, or damaged, the records of these."""
        self._excused.update(qemu.incarnation for qemu in qemus)

    def look(self) -> None:
        """Look at what it is time for."""
        world, hosts = self._world, self._world.hosts
        self._ticks += 1
        if self._ticks % WRITERS:
            return
        awake = [host for host in hosts if not host.frozen]
        world.judge.look_at_writers(qemu for host in awake for qemu in host.kernel.living if not qemu.frozen)
        if self._ticks % STATUSES:
            return
        for host in hosts:
            self._note_health(host)
        sessions = {host for host in self._well if world.has_session(host)}
        for name in world.judge.with_a_status():
            self._look_at_status(name, sessions)
        for what in self.tries.silent():
            world.judge.wrong("nothing in silence", what)
        if self._ticks % RECORDS == 0:
            for host in hosts:
                self._look_at_records(host)

    # --- what is on record ------------------------------------------------------------------------------------

    def _look_at_records(self, host: SimHost) -> None:
        living = {qemu.incarnation: qemu for qemu in host.kernel.living if qemu.incarnation not in self._excused}
        recorded = {name for name, qemu in living.items() if self._is_recorded(host, qemu)}
        for name in unrecorded(living, recorded):
            qemu = living[name]
            self._excused.add(name)
            said = f"{qemu.instance}: {qemu.pid} lives on {host.true_name}, and its record was deleted"
            self._world.judge.wrong("the living are on record", said)

    def _is_recorded(self, host: SimHost, qemu: SimQemu) -> bool:
        path = self._files.get(qemu.incarnation)
        if path is None:
            path = self._files[qemu.incarnation] = str(host.run_dir / qemu.instance / "incarnation.json")
        try:
            found = os.stat(path)  # noqa: PTH116 - thousands of times, and a `Path` costs as much as the call
        except OSError:
            return False
        state = found.st_ino, found.st_mtime_ns
        if self._read.get(qemu.incarnation) != state:
            if qemu.incarnation not in Path(path).read_text():
                return False
            self._read[qemu.incarnation] = state
        return True

    # --- what statuses claim ----------------------------------------------------------------------------------

    def _note_health(self, host: SimHost) -> None:
        now, name = self._world.loop.time(), host.true_name
        if not self._is_well(host):
            self._well.pop(name, None)
        else:
            self._well.setdefault(name, now)
        if self._world.ceph.away is not None or not host.reaches_ceph or self._world.ceph.slow_s > bounds.TELL_S:
            self._stored.pop(name, None)
        else:
            self._stored.setdefault(name, now)

    def _is_well(self, host: SimHost) -> bool:
        world, life, weather = self._world, host.life, host.weather
        if life is None or life.frozen or not life.holds_session or not host.is_set_right:
            return False
        data: Any = world.etcd._server
        return world.quorum.is_set() and not data.full and weather == FINE

    def _look_at_status(self, instance: str, sessions: Set[str]) -> None:
        world = self._world
        status = world.judge.status(instance)
        if status is None:
            return
        now = world.loop.time()
        host = next((one for one in world.hosts if one.true_name == status.host), None)
        claim, bound_s, is_silent = None, bounds.STATUS_S, False
        # Without a session of that name the host cannot correct it: it works under another one, maybe (law 12).
        if host is not None and status.host in sessions:
            qemus = [qemu for qemu in host.kernel.living if qemu.instance == instance]
            is_silent = any(qemu.frozen or qemu.mute for qemu in qemus)
            claim = untrue(status, self._fact(status, qemus, sessions))
            if is_silent:
                bound_s = bounds.STATUS_SILENT_S
            elif now - self._stored.get(status.host, now) < bounds.STATUS_STORAGE_S:
                bound_s = bounds.STATUS_STORAGE_S
        # What was claimed of it while it was silent, or was not, counts anew.
        self._claims.see((instance, not is_silent), None, now=now, bound_s=bound_s)
        lasted_s = self._claims.see((instance, is_silent), claim, now=now, bound_s=bound_s)
        if lasted_s is not None:
            said = f"{instance}: its status of {status.host} says {claim!r} for {lasted_s:.1f} s, and that is not so"
            world.judge.wrong("a status is so", said)

    def _fact(self, status: Status, qemus: list[SimQemu], sessions: Set[str]) -> Fact:
        world, name = self._world, status.id
        return Fact(
            living=[qemu.pid for qemu in qemus],
            running=[qemu.pid for qemu in qemus if qemu.run_state == "running" and not qemu.frozen],
            lock=world.judge.lock(name),
            newest=0 if status.held or not world.is_heeded(name, status.host) else world.judge.newest(name),
            sessions={one for one in sessions if not world.drains(one)},
        )
