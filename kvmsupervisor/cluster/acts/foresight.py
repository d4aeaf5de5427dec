"""How a move or a drain will go, as far as keys, statuses and sessions tell.

What only a target sees is not known here: its ports, bridges, files and free memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cluster.acts.refused import Refused
from kvmsupervisor.cluster.overview import Cluster, Instance, read_instance
from kvmsupervisor.domain.admission import OVERHEAD_MIB, need_mib
from kvmsupervisor.domain.evacuation import Leaver, Plan, Room, named_hosts, plan, why_it_stays, why_kept
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host_wish import Mode
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.move_checks import Guest, refusals
from kvmsupervisor.domain.single import is_single
from kvmsupervisor.domain.spec import Power, Spec


@frozen
class Foreseen:
    """What a move will be.

    Attributes:
        live: whether the guest goes on running.
        said: the sentence for people.
    """

    live: bool
    said: str


def foresee(instance: Instance, cluster: Cluster, target: str) -> Foreseen:
    """Tell by keys, statuses and sessions, as the hosts will judge.

    What only the target sees is not known here: its ports, bridges and free memory.
    """
    status, spec = instance.status, instance.wish.spec
    if status is None or status.pid is None:
        return Foreseen(live=False, said=f"it does not run: it starts on {target}")
    if status.host == target:
        return Foreseen(live=True, said=f"it runs on {target} already")
    if spec is None:
        return Foreseen(live=False, said="its keys have problems: it stays as it is until they are mended")
    sessions = [cluster.sessions.get(host) for host in (status.host, target)]
    here, there = (None if session is None else session.moves for session in sessions)
    guest = Guest(spec=spec, machine=status.machine, accel=status.accelerator)
    found = refusals(guest, target, here, there)
    if found:
        why = "; ".join(map(str, found))
        return Foreseen(live=False, said=f"cold: it is stopped on {status.host} and started on {target}, because {why}")
    return Foreseen(live=True, said=f"live: it goes on running while it moves from {status.host} to {target}")


async def look_ahead(store: Store, layout: Layout, instance: InstanceId, target: str, *, force: bool) -> Foreseen:
    """How a move would go.

    Raises:
        Refused: there is nothing to move, or the target has no session and `force` is not set.
    """
    return foresee_unless_refused(*await read_instance(store, layout, instance), target, force=force)


def foresee_unless_refused(found: Instance, cluster: Cluster, target: str, *, force: bool) -> Foreseen:
    """The same of what was read already.

    Raises:
        Refused: likewise.
    """
    if found.wish.keys == 0:
        raise Refused(f"{found.id} has no keys: there is nothing to move")
    if not cluster.takes(found.id, target) and not force:
        raise Refused(f"{target} has no session{cluster.meant_by(target)}: {found.id} would stay where it is")
    return foresee(found, cluster, target)


def _need_mib(spec: Spec | None) -> int:
    """As a host counts it."""
    return OVERHEAD_MIB if spec is None else need_mib(spec)


def _rooms(cluster: Cluster, leaving: str) -> dict[str, Room]:
    promised: dict[str, int] = {}
    for one in cluster.instances.values():
        host = one.wish.runs_on
        if host is not None and one.wish.power is Power.ON:
            promised[host] = promised.get(host, 0) + _need_mib(one.wish.spec)
    return {
        host: Room(
            drains=session is None or session.draining or cluster.wish_of(host).drain is not None,
            free_mib=session.guests_mib - promised.get(host, 0) if session and session.guests_mib else math.inf,
        )
        for host, session in cluster.sessions.items()
        if host != leaving and not is_single(host)
    }


def _leaver(one: Instance, cluster: Cluster, host: str, rooms: Mapping[str, Room]) -> Leaver:
    status, wish, spec = one.status, one.wish, one.wish.spec
    assert status is not None
    here = cluster.sessions.get(host)
    not_live: dict[str, str] = {}
    if spec is not None:
        guest = Guest(spec=spec, machine=status.machine, accel=status.accelerator)
        for target in rooms:
            there = cluster.sessions.get(target)
            moves = (None if session is None else session.moves for session in (here, there))
            if found := refusals(guest, target, *moves):
                not_live[target] = "; ".join(map(str, found))
    named, home = named_hosts(wish, host)
    return Leaver(
        id=one.id,
        named=named,
        home=home,
        priority=wish.priority,
        need_mib=_need_mib(spec),
        stays=why_it_stays(wish, None),
        # The order would be newer than every `host`.
        kept=why_kept(wish, me=host, drain_revision=wish.host_revision, held=status.held),
        not_live=not_live,
    )


def foresee_drain(cluster: Cluster, host: str, mode: Mode) -> Plan:
    """What a drain would do with each machine that runs there, as far as keys, statuses and sessions tell.

    What only the targets see is not known here: their ports, bridges and files.
    """
    session = cluster.sessions.get(host)
    rooms = _rooms(cluster, host)
    leavers = [
        _leaver(one, cluster, host, rooms)
        for one in cluster.instances.values()
        if one.status is not None and one.status.host == host and one.status.pid is not None and one.wish.keys
    ]
    any_host = session is not None and session.drain_any
    return plan(leavers, rooms, mode=mode, any_host=any_host, leaving=0, most=math.inf, now=0.0)


def told(found: Plan) -> list[str]:
    """What a drain would do, one line for each machine; none where nothing runs."""
    lines = []
    for go in found.go:
        how = "while it runs" if go.live else "while it runs if it can, else cold"
        lines.append(f"{go.id}: goes to {go.host}, {how}")
    for name, why in found.refused.items():
        does = "is shut down" if name in found.evicted else "stays"
        lines.append(f"{name}: {does}: {why}")
    return lines
