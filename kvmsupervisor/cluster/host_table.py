"""Each host that etcd knows of: those with a session, and those that have left something and have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvmsupervisor.cluster.overview import Cluster, Instance, natural
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.host_wish import IN_SERVICE, HostProgress, HostWish, summary, title_of
from kvmsupervisor.domain.lock import LockState
from kvmsupervisor.domain.records import plain
from kvmsupervisor.domain.values import some

UP, DRAINING, DRAINED = "up", "draining", "drained"
NO_SESSION, UNREADABLE = "no session", "unreadable"

NAMED = 5
"""Instances that a notice names; the others are counted. Arbitrary: a line."""


@frozen(kw_only=True)
class HostFact:
    """A host as the keys show it.

    Attributes:
        host: its name.
        state: `up`, `draining` (it empties itself, or stops all its guests), `drained`, `no session`, or `unreadable`:
            it has a session of another release.
        session: what it says of itself.
        running: the instances whose guests run there, as it says; none without a session.
        locks: the instances whose locks it holds.
        promised_mib: the memory of these, by their keys.
        wish: what people want of it.
        progress: how far it has come with that.
    """

    host: str
    state: str
    session: HostSession | None
    running: tuple[str, ...]
    locks: tuple[str, ...]
    promised_mib: int
    wish: HostWish = IN_SERVICE
    progress: HostProgress | None = None

    @property
    def notice(self) -> str:
        """What a person should know."""
        if self.state == NO_SESSION:
            held = f"it holds the locks of {some(self.locks, NAMED)}, and may run them" if self.locks else ""
            return held or "nothing of it is locked; `remove-host` deletes what it has left"
        if self.session is None:
            return "this release cannot read its session"
        said = [self.session.notice]
        if self.wish.drain is not None and self.progress is None:
            said.append(f"drains ({self.wish.drain}); its supervisor has not said anything yet")
        elif self.progress is not None:
            what = "takes back" if self.progress.mode is None else f"drains ({self.progress.mode})"
            said += [f"{what}: {summary(self.progress)}", self.progress.notice]
        return "; ".join(filter(None, said))

    def to_object(self) -> dict[str, Any]:
        """For programs."""
        session = self.session
        return {
            "host": self.host,
            "state": self.state,
            "since": None if session is None else session.started or None,
            "running": list(self.running),
            "locks": list(self.locks),
            "promised_mib": self.promised_mib,
            "memory_mib": None if session is None else session.memory_mib,
            "guests_mib": None if session is None else session.guests_mib or None,
            "drain": None if self.wish.drain is None else self.wish.drain.value,
            "progress": None if self.progress is None else plain(self.progress),
            "cpus": None if session is None else session.cpus,
            "version": None if session is None else session.version,
            "url": None if session is None else session.url,
            "notice": self.notice,
        }


def facts_of(cluster: Cluster) -> list[HostFact]:
    """All hosts that etcd knows of, in natural order."""
    locked: dict[str, list[Instance]] = {}
    said: dict[str, list[Instance]] = {}
    for instance in cluster.instances.values():
        lock = None if instance.lock is None else instance.lock.lock
        if lock is not None and lock.state is not LockState.BROKEN:
            locked.setdefault(lock.host, []).append(instance)
        if instance.status is not None:
            said.setdefault(instance.status.host, []).append(instance)
    names = {
        *cluster.sessions,
        *cluster.host_wishes,
        *locked,
        *(host for host, left in said.items() if any(_tells(one) for one in left)),
    }
    return [
        _fact(host, cluster, locked=locked.get(host, ()), said=said.get(host, ()))
        for host in sorted(names, key=natural)
    ]


def _tells(instance: Instance) -> bool:
    """Whether its status says that something of it runs; that of an ended container is no host's."""
    return instance.status is not None and instance.status.tells_of_a_process


def _fact(host: str, cluster: Cluster, *, locked: Sequence[Instance], said: Sequence[Instance]) -> HostFact:
    session = cluster.sessions.get(host)
    if not cluster.alive(host):
        state = NO_SESSION
    elif session is None:
        state = UNREADABLE
    else:
        drains = title_of(cluster.wish_of(host), cluster.progress.get(host))
        state = drains or (DRAINING if session.draining else UP)
    return HostFact(
        host=host,
        state=state,
        session=session,
        running=tuple(one.id for one in said if state != NO_SESSION and one.status is not None and one.status.up),
        locks=tuple(one.id for one in locked),
        promised_mib=sum(one.wish.spec.ram_mib for one in locked if one.wish.spec is not None),
        wish=cluster.wish_of(host),
        progress=cluster.progress.get(host),
    )
