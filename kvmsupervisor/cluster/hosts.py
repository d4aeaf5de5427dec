"""The hosts of the cluster: which of them have a session, and in which history of etcd each has spoken (law 11)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Set

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.aio import start_part
from kvmsupervisor.cluster.history import History
from kvmsupervisor.cluster.informer import Informer
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.history import HistoryName
from kvmsupervisor.domain.host import HostSession, dissent
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.offer import MoveFacts


class Neighbours:
    """Follows the sessions of all hosts, and the name of the present history.

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        me: this host.
        history: gets both.
        on_change: called when either differs; see `informer.Informer`.
        rand: random numbers, 0 ≤ x < 1.

    Attributes:
        table: the session keys; a live table.
        synced: set once they were listed.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        layout: Layout,
        me: HostName,
        history: History,
        on_change: Callable[[], None],
        rand: Callable[[], float] = random.random,
    ) -> None:
        def follow(prefix: str, table: Flat, told: Callable[[Set[bytes], int], None]) -> Informer[bytes]:
            return Informer(
                store=store, clock=clock, history=history, prefix=prefix, table=table, on_change=told, rand=rand
            )

        self.table = Flat()
        self._layout = layout
        self._me = me
        self._history = history
        self._on_change = on_change
        self._name_table = Flat()
        # Where each other host looks for locks, as far as its session says.
        self._locks: dict[str, str] = {}
        self._dissent: str | None = "the sessions of the other hosts have not been read yet"
        # Host → the history that it says it has spoken in. None before the first list of an era.
        self._sessions: dict[str, str] | None = None
        self._gone_at: dict[str, float] = {}
        self._clock = clock
        self._era = history.era
        self._hosts = follow(layout.hosts_prefix, self.table, self._hosts_differ)
        self._name = follow(layout.history_key, self._name_table, self._name_differs)
        self.synced = self._hosts.synced

    async def run(self) -> None:
        """Follow them, for ever."""
        async with asyncio.TaskGroup() as tasks:
            start_part(tasks, self._hosts.run)
            start_part(tasks, self._name.run)

    def has_session(self, host: HostName) -> bool | None:
        """Whether a host has a session; None when that is not known in the present history."""
        if not self.synced.is_set() or self._hosts.era != self._history.era:
            return None
        return self.table.get(self._layout.session_key(host).encode()) is not None

    def gone_since(self, host: HostName) -> float:
        """When a host's session was last seen to go, CLOCK_BOOTTIME; 0 where it never was.

        Whoever asks storage for long may not see that the host was back meanwhile, and has gone once more.
        """
        return self._gone_at.get(host, 0.0)

    def session_of(self, host: HostName) -> HostSession | None:
        """What a host says of itself; None where it has no session, or one that cannot be read."""
        entry = self.table.get(self._layout.session_key(host).encode())
        return None if entry is None else HostSession.from_json(entry.value)

    def number_of(self, host: HostName) -> int:
        """The create revision of a host's session, which names it among all sessions of that host; 0 without one."""
        entry = self.table.get(self._layout.session_key(host).encode())
        return 0 if entry is None else entry.create_revision

    def drains(self, host: HostName) -> bool:
        """Whether a host has a session that says that the host stops all its guests."""
        found = self.session_of(host)
        return found is not None and found.draining

    def moves_of(self, host: HostName) -> MoveFacts | None:
        """What live moves to a host need; None where it has no session, or takes part in none."""
        found = self.session_of(host)
        return None if found is None else found.moves

    def dissent(self) -> str | None:
        """Why a free lock must not be taken; None when the other hosts look for locks where this one does."""
        return self._dissent

    def names(self) -> Collection[str]:
        """The hosts that have a session."""
        return () if self._sessions is None else self._sessions.keys()

    def _hosts_differ(self, changed: Set[bytes], revision: int) -> None:
        if self._era != self._hosts.era:
            self._sessions, self._locks = None, {}
        # Some of a thousand only, but for the first time.
        news = self.table.entries if self._sessions is None else changed
        sessions = {} if self._sessions is None else self._sessions
        for key in news:
            host, entry = key[len(self._layout.hosts_prefix) :].decode(errors="replace"), self.table.get(key)
            found = None if entry is None else HostSession.from_json(entry.value)
            if entry is None:
                if sessions.pop(host, None) is not None:
                    self._gone_at[host] = self._clock.now()
            else:
                sessions[host] = "" if found is None else found.history
            if found is not None and found.lock and host != self._me:
                self._locks[host] = found.lock
            else:
                self._locks.pop(host, None)
        self._dissent = dissent(self._layout.lock, self._locks)
        self._sessions, self._era = sessions, self._hosts.era
        self._history.sessions_are(dict(sessions), era=self._era)
        self._on_change()

    def _name_differs(self, changed: Set[bytes], revision: int) -> None:
        entry = self._name_table.get(self._layout.history_key.encode())
        name = None if entry is None else HistoryName.from_json(entry.value)
        if entry is not None and name is not None and self._name.era == self._history.era:
            self._history.heard(name, entry.mod_revision)
            self._on_change()
