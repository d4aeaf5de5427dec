"""Proves that etcd still has the history that this host acts on (law 11), and notices when etcd has another one.

An informer that connects to etcd anew asks for the proof before it applies anything. A proof costs one read of one key.
This module notices another history, names it, remembers it for a successor, and knows which hosts have spoken in it.
What has to happen then is decided by the informers, the instances and the dispatch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Never
from uuid import uuid4

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import Compare, Denied, EtcdError, Put, Rejected, Store, Target, Unavailable
from kvmsupervisor.adapters.rundir import write_whole
from kvmsupervisor.cluster.proof import judge_by
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.history import Era, Former, HistoryFile, HistoryName, Verdict, Witnesses, spoken_in
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.failpoints import cut, point

log = structlog.get_logger(__name__)

FILE_NAME = "_history.json"

CHANGED = (
    "etcd has another history than the one this host acted on: it was restored from a backup, its data was lost, or it "
    "is another etcd. Machines run on and their locks are written again; removals, moves and `power=off` that came "
    "with it wait for `kvmsupervisor confirm-removal`"
)

UNPROVEN = (
    "etcd has compacted away what could prove that its history is the one this host acted on: removals, moves and "
    "`power=off` since then wait for `kvmsupervisor confirm-removal`"
)

SPEAK_POLL_S = 0.2
"""How often to look whether all locks are written again, after a change. Arbitrary: this is seldom, and soon over."""

SPEAK_AGAIN_S = 5.0
"""The same after etcd has not taken the word, as one without space does. Arbitrary."""

SAVE_EVERY_S = 1.0
"""The shortest time between two writes of the file. A killed supervisor leaves a file that is at most this old, and its
successor can prove no more than the file says. Arbitrary: a busy cluster then costs 0.1 ms a second."""


@frozen(kw_only=True)
class _Found:
    """What etcd says of its history.

    Attributes:
        name: of the history; None when it cannot be read or written.
        since: all revisions up to this one are older than the name, or than this look at it.
        revision: of the name's key; 0 when it was absent.
        missing: whether the history had no name before.
        written: whether the name was written just now, in the revision `since`.
    """

    name: HistoryName | None
    since: int
    revision: int = 0
    missing: bool = False
    written: bool = False


class History:
    """The history that this host acts on.

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        me: this host.
        run_dir: where the file is; it exists.
        patience_s: how long a machine that can be fenced waits for other hosts to speak (`KVM_TAKEOVER_WAIT`).

    Attributes:
        era: how many times the history has changed since this supervisor started.
        changes: the same, without the changes that could only not be disproven.
        hosts: how many hosts have a session, as far as it is known.
    """

    def __init__(
        self, *, store: Store, clock: Clock, layout: Layout, me: HostName, run_dir: Path, patience_s: float
    ) -> None:
        self.era = 0
        self.changes = 0
        # The newest era whose orders were judged: only then a successor may know its history as its own.
        self._applied = 0
        self._store = store
        self._clock = clock
        self._key = layout.history_key
        self._me = me
        self._path = run_dir / FILE_NAME
        self._patience_s = patience_s
        self._leave_file_alone = False
        found = self._load()
        self._witnesses = Witnesses(found.witnesses)
        self._id, self._number, self._since = found.id, found.number, found.since
        self._foreign, self._members = found.foreign, frozenset(found.members)
        self._formers = found.former
        self._cluster = found.cluster
        self.spoken = found.spoken
        # The hosts of the former history: waited for when the present one cannot be named.
        self._former: frozenset[str] = frozenset()
        self._named: HistoryName | None = None
        # Host with a session → the history that it has spoken in.
        self._sessions: Mapping[str, str] = dict.fromkeys(found.hosts, "")
        self._sessions_era, self.hosts = 0, len(found.hosts)
        self._until = clock.now() + patience_s
        # Since when only members with another history answer.
        self._doubted_at: float | None = None
        self._proving, self._turn = asyncio.Lock(), asyncio.Event()
        # How many proofs were begun, and the last one that succeeded.
        self._begun = self._had = 0
        self._dirty = asyncio.Event()
        self._unspoken = asyncio.Event()
        if not self.spoken:
            self._unspoken.set()

    # --- what others tell and ask -------------------------------------------------------------------------------

    def saw(self, key: bytes, revision: int, value: bytes | None) -> None:
        """A key that was observed, and applied: written, or deleted (None)."""
        if self._witnesses.saw(key, revision, value):
            self._dirty.set()

    def applied(self, era: int) -> None:
        """All instances were told the keys of this era, and what they hold is on record for a successor."""
        self._applied = era
        self._dirty.set()

    def sessions_are(self, sessions: Mapping[str, str], *, era: int) -> None:
        """Which hosts have a session, and the history that each says it has spoken in, as seen in `era`."""
        if sessions != self._sessions or era != self._sessions_era:
            self._dirty.set()
        self._sessions, self._sessions_era, self.hosts = sessions, era, len(sessions)

    @property
    def id(self) -> str:
        """The name of the present history; empty while it has none."""
        return self._id

    @property
    def spoken_name(self) -> str:
        """What this host's session has to say: the history that it has spoken in, if the history ever changed."""
        return self._id if self.spoken and self._number else ""

    @property
    def present(self) -> Era:
        """What a decision needs to know of the history."""
        return Era(
            count=self.era,
            number=self._number,
            since=self._since,
            mark=self._id if self._number else "",
            foreign=self._foreign,
            members=self._members,
            awaited=self.awaited,
            until=self._until,
        )

    @property
    def awaited(self) -> tuple[str, ...]:
        """The hosts that have not spoken in the present history; none if it never changed, or all have spoken."""
        if self._number == 0:
            return ()
        name = self._named
        current = self._sessions if self._sessions_era == self.era else {}
        if name is None or name.id != self._id:
            # The history could not be named, so no host can say that it has spoken in it.
            return tuple(sorted((self._former | current.keys()) - {self._me}))
        if not name.hosts:
            return ()
        said = spoken_in(current, self._id) | ({self._me} if self.spoken else frozenset())
        return tuple(sorted((current.keys() | set(name.hosts)) - said - set(name.gone)))

    # --- the proof ----------------------------------------------------------------------------------------------

    async def prove(self) -> None:
        """Prove that etcd has the history that this host acted on; otherwise begin another `era`.

        A proof that another caller began since then serves as well.

        Raises:
            EtcdError: etcd does not answer, so nothing is proven.
        """
        asked = self._begun
        async with self._proving:
            if self._had > asked:
                return
            self._begun += 1
            verdict = await self._judge()
            match verdict:
                case Verdict.OTHER | Verdict.UNPROVEN:
                    await self._begin(verdict)
                case Verdict.FIRST if not self._id:
                    await self._name_first()
                case _:
                    pass
            if self._cluster != self._store.cluster:
                self._cluster = self._store.cluster
                self._dirty.set()
            self._had = self._begun

    async def turned(self, era: int) -> None:
        """Return once the history is another one than in `era`."""
        while self.era == era:
            await self._turn.wait()

    async def _judge(self) -> Verdict:
        """Ask every member before another history is believed: a member that was restored alone is left.

        Raises:
            Unavailable: some members have another history, the others do not answer, and `patience_s` is not over.
        """
        if not self._witnesses:
            return Verdict.FIRST
        strangers: set[str] = set()
        for _ in range(2 * self._store.members):
            verdict = await self._ask()
            if verdict is not Verdict.OTHER:
                self._doubted_at = None
                return verdict
            # Members that did not answer were passed over.
            strangers.add(self._store.endpoint)
            if len(strangers) == self._store.members:
                break
            self._store.leave()
        now = self._clock.now()
        self._doubted_at = now if self._doubted_at is None else self._doubted_at
        if len(strangers) < self._store.members and now < self._doubted_at + self._patience_s:
            raise Unavailable(f"{', '.join(sorted(strangers))}: another history; the other members do not answer")
        self._doubted_at = None
        return Verdict.OTHER

    async def _ask(self) -> Verdict:
        verdict = await judge_by(self._store, self._witnesses.newest())
        if self._cluster and self._store.cluster != self._cluster:
            # A copy, as new as what was observed here: no cluster ever changes its id. The same id proves nothing.
            return Verdict.OTHER
        return verdict

    # --- another one --------------------------------------------------------------------------------------------

    async def _begin(self, verdict: Verdict) -> None:
        """Begin everything anew: the history is another one, or cannot be proven."""
        # First the steps that may fail.
        former, formers = self._id, self._formers
        if verdict is Verdict.OTHER and former and self.spoken:
            formers = self._as_former().added_to(formers)
        found = await (self._rename() if verdict is Verdict.OTHER else self._look())
        name, since = found.name, found.since
        self.era += 1
        self._turn.set()
        self._turn = asyncio.Event()
        cut("history changed, no key read")
        self._since = since
        self._witnesses = Witnesses()
        if name is not None and found.written:
            # So that even an empty store is known again.
            self.saw(self._key.encode(), since, name.to_json())
        self._dirty.set()
        if verdict is Verdict.UNPROVEN:
            log.warning("history.unproven", history=self._id, since=since, reason=UNPROVEN)
            return
        self.changes += 1
        # No name: etcd is empty, or belongs to another cluster that never had one. The hosts tell which.
        self._formers = formers if name is None else name.with_former(formers)
        follows = name is not None and name.follows({former, *(one.id for one in formers)})
        self._foreign = found.missing or not follows
        self._members = frozenset(self._sessions) if found.missing else frozenset()
        self._former = frozenset(self._sessions) - {self._me}
        self._named = name
        self._id = "" if name is None else name.id
        self._number = self._number + 1 if name is None else name.number
        self._until = self._clock.now() + self._patience_s
        self._must_speak()
        log.error(
            "history.changed",
            history=self._id,
            former=former,
            number=self._number,
            foreign=self._foreign,
            since=since,
            reason=CHANGED,
        )

    async def _look(self) -> _Found:
        """The store's name."""
        reading = await self._store.read(self._key)
        (found,) = reading.kvs
        name = HistoryName.from_json(found.value) if found is not None else None
        revision = found.mod_revision if found is not None else 0
        return _Found(name=name, since=reading.revision, revision=revision, missing=found is None)

    async def _rename(self) -> _Found:
        """Give the history a new name, unless another host has done so."""
        while True:
            reading = await self._store.read(self._key)
            (found,) = reading.kvs
            name = HistoryName.from_json(found.value) if found is not None else None
            left = await self._left_for_good(name)
            if found is not None and left is None and (name is None or name.id != self._id):
                # Another host's word, or another cluster's, or a newer release's; or our own cluster goes on there.
                follows = name is not None and name.follows({self._id})
                return _Found(name=name, since=found.mod_revision if follows else reading.revision)
            hosts = {*(() if left and self._foreign else self._sessions), *(left.hosts if left else ()), self._me}
            fresh = HistoryName(
                id=str(uuid4()),
                number=max(self._number, 0 if name is None else name.number) + 1,
                after=self._id,
                by=self._me,
                hosts=tuple(sorted(hosts)),
                found=left.id if left else "",
            )
            unchanged = Compare(self._key, Target.MOD_REVISION, found.mod_revision if found is not None else 0)
            await point("history to be named")
            try:
                done = await self._store.txn([unchanged], [Put(self._key, fresh.to_json())])
            except Denied as error:
                log.warning("history.unnamed", key=self._key, reason=str(error))
                return _Found(name=None, since=reading.revision, missing=found is None)
            except Rejected as error:
                # Nothing can start there either. Without a name nobody could ever speak in it.
                raise Rejected(f"etcd has another history, and takes no name for it: {error}") from error
            await point("history named")
            if done.succeeded:
                return _Found(name=fresh, since=done.revision, missing=found is None, written=True)

    async def _left_for_good(self, name: HistoryName | None) -> Former | None:
        """The former history that a store has the name of, where nobody goes on with that: an older backup."""
        former = next((one for one in self._formers if name is not None and one.id == name.id), None)
        if former is None or name is None or name.id == self._id:
            return None
        is_copy = former.cluster not in {0, self._store.cluster}
        # Of a history before this host's boot it knows the name only: nothing proves that anybody goes on with that.
        is_proven = former.witnesses and await judge_by(self._store, former.witnesses) is not Verdict.OTHER
        return None if is_proven and not is_copy else former

    def _as_former(self) -> Former:
        """The present history, for when it is left."""
        return Former(
            id=self._id,
            cluster=self._cluster,
            hosts=tuple(sorted(self._sessions)),
            witnesses=tuple(self._witnesses.newest()[: Former.WITNESSES]),
        )

    async def _name_first(self) -> None:
        """Learn the name of the history; give it one if it has none."""
        found = await self._look()
        if found.missing:
            name = HistoryName(id=str(uuid4()), by=self._me)
            absent = Compare(self._key, Target.MOD_REVISION, 0)
            try:
                done = await self._store.txn([absent], [Put(self._key, name.to_json())])
            except (Denied, Rejected) as error:
                # The name is needed only once there is another history.
                log.warning("history.unnamed", key=self._key, reason=str(error))
                return
            if done.succeeded:
                self.saw(self._key.encode(), done.revision, name.to_json())
                self.heard(name, done.revision)
                return
            found = await self._look()
        if found.name is not None:
            self.heard(found.name, found.revision)

    def heard(self, name: HistoryName, revision: int) -> None:
        """Take what the key says: another host gave a new name, or all have spoken, or an operator spoke for them.

        Args:
            name: as read.
            revision: of the key, or a later one.
        """
        if name.id != self._id:
            log.info("history.named", history=name.id, number=name.number, by=name.by, after=name.after)
            if name.number > self._number:
                # Nothing that this host saw is lost in that history; what other hosts have not told is.
                self._since, self._until = revision, self._clock.now() + self._patience_s
            if name.number:
                self._must_speak()
            self._formers = name.with_former(self._formers)
            self._id, self._number = name.id, name.number
            self._dirty.set()
        self._named = name

    def _must_speak(self) -> None:
        self.spoken = False
        self._unspoken.set()

    # --- for a successor, and for all -----------------------------------------------------------------------------

    async def run(self) -> Never:
        """Keep the file up to date, and note in etcd once all hosts have spoken, for ever."""
        while True:
            await self._clock.wait(self._dirty, None)
            self._dirty.clear()
            self.save()
            await self._settle()
            await self._clock.sleep(SAVE_EVERY_S)

    async def run_speaking(self, ready: Callable[[], bool], say: Callable[[str], Awaitable[bool]]) -> Never:
        """Let this host say that it has spoken, after each change of the history, for ever.

        Args:
            ready: whether every machine here has its lock in the present history.
            say: puts the name of that history into this host's session; returns whether it is there.
        """
        trouble = ""
        while True:
            await self._clock.wait(self._unspoken, None)
            name, pause_s = self._id, SPEAK_POLL_S
            if name and ready():
                try:
                    await point("history to be spoken in")
                    if await say(name) and name == self._id:
                        self._unspoken.clear()
                        self.spoken = True
                        self._dirty.set()
                        log.info("history.spoken", history=name)
                        continue
                except EtcdError as error:
                    if str(error) != trouble:
                        log.warning("history.not_spoken", reason=str(error))
                    trouble, pause_s = str(error), SPEAK_AGAIN_S
            await self._clock.sleep(pause_s)

    async def _settle(self) -> None:
        """Once all hosts have spoken, write that into the key: a host that starts later need not wait."""
        name = self._named
        if name is None or name.id != self._id or self.awaited or not name.hosts:
            return
        if name.by != self._me and name.by in self._sessions:
            return
        try:
            found = await self._store.get(self._key)
            if found is None or HistoryName.from_json(found.value) != name:
                return
            settled = replace(name, hosts=(), gone=())
            unchanged = Compare(self._key, Target.MOD_REVISION, found.mod_revision)
            if (await self._store.txn([unchanged], [Put(self._key, settled.to_json())])).succeeded:
                self._named = settled
                log.info("history.settled", history=name.id)
        except EtcdError as error:
            log.warning("history.unsettled", reason=str(error))

    def _load(self) -> HistoryFile:
        """Read the file of a predecessor. Never raises: without the file there is nothing to prove."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return HistoryFile()
        except OSError as error:
            log.warning("history.file_unreadable", path=str(self._path), error=str(error))
            return HistoryFile()
        found = HistoryFile.from_json(data)
        if found is None:
            self._leave_file_alone = True
            log.warning("history.file_unfit", path=str(self._path), problem="left as it is; remove it to mend that")
            return HistoryFile()
        return found

    def save(self) -> None:
        """Write the file, whole or not at all. Never raises: only a successor needs it.

        Not between a change and its orders being held: a successor would take them for orders of its own history. It
        finds the change once more instead.
        """
        if self._leave_file_alone or self._applied != self.era:
            return
        noted = HistoryFile(
            id=self._id,
            number=self._number,
            since=self._since,
            foreign=self._foreign,
            members=tuple(sorted(self._members)),
            spoken=self.spoken,
            hosts=tuple(sorted(self._sessions)),
            witnesses=tuple(self._witnesses.newest()),
            former=self._formers,
            cluster=self._cluster,
        )
        try:
            write_whole(self._path, noted.to_json(), mode=0o600)
        except OSError as error:
            log.warning("history.file_unwritable", path=str(self._path), error=str(error))
