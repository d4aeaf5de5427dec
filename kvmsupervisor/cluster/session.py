"""The host's session in etcd (law 1): one leased key that says "this host is alive".

This host's own clock decides how long the session holds, counted from before each renewal was sent. So this host never
believes in its session longer than etcd keeps it. Losing the session kills nothing: machines run on, and only changes
of locks wait until it is back.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Never

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd.api import (
    Compare,
    Delete,
    Denied,
    EtcdError,
    KeyValue,
    NoSpace,
    Put,
    Rejected,
    Store,
    Target,
)
from kvmsupervisor.adapters.rundir import write_whole
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.timing import RENEWALS_PER_TTL, Reminder, Rival, SessionTimer, retry_delay
from kvmsupervisor.failpoints import point

log = structlog.get_logger(__name__)

FILE_NAME = "_session.json"
FILE_VERSION = 1

RIVAL_POLL_S = 1.0
"""How often to look at a session key that is not ours: etcd tells a lease's rest in whole seconds."""

SHORTEST_TIMEOUT_S = 0.1
"""Calls end by the session's deadline, but each gets at least this long. Arbitrary: a round trip fits."""

NO_SESSION = -1
"""A create revision that no key ever has: a compare with it is always false."""


class HostnameTaken(Exception):
    """Another supervisor is alive under this host's name: give up; the operator must rename one of the two."""


class Session:
    """Acquires the host's session, renews it, and acquires it again after a loss.

    Args:
        store: etcd.
        clock: the machine's.
        layout: of the keys.
        value: of the session key; `host`, `boot_id` and `machine` decide to whom an old key belongs.
        run_dir: where the lease's id is kept for a successor on the same boot; it exists.
        ttl_s: of the lease (`KVM_SESSION_TTL`).
        yields: whether to wait, not give up, when another supervisor is alive under this name.
        rand: random numbers, 0 ≤ x < 1.

    Attributes:
        key: of the session in etcd.
        value: what the key says, or will say. All but `host` may be replaced until `run` is started, and by
            `restate`.
        lost_count: how often a session that was held was lost.
        problem: what keeps the session from being won or renewed, for people; empty when nothing does.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        layout: Layout,
        value: HostSession,
        run_dir: Path,
        ttl_s: int = 15,
        yields: bool = False,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.key = layout.session_key(HostName(value.host))
        self.value = value
        self.lost_count = 0
        self.problem = ""
        self._store = store
        self._clock = clock
        self._ttl_s = ttl_s
        self._yields = yields
        self._rand = rand
        self._file = LeaseFile(run_dir / FILE_NAME, key=self.key, boot_id=value.boot_id)
        self._said: tuple[HostSession, bytes] | None = None
        self._lease = 0
        # Every lease that this host has asked for on this boot, as far as known. A key on one of them is ours, also
        # on an older one: the reply to its move may have been lost.
        self._own_leases: set[int] = set()
        # Invariant: 0 unless the key with this create revision was ours when etcd last told of it.
        self._create_revision = 0
        self._timer = SessionTimer(ttl_s=ttl_s)
        self._announced = False
        self._won_on_this_boot = False
        self._won_by_this_process = False
        self._rival: Rival | None = None
        self._reminder = Reminder()
        self._listeners: list[Callable[[], None]] = []
        self._followers: list[Callable[[float], None]] = []

    @property
    def held(self) -> bool:
        """Whether the clock says that the session is certainly held at this instant."""
        return self._create_revision != 0 and self._timer.held(self._clock.now())

    @property
    def remaining_s(self) -> float:
        """Seconds until the session runs out without another renewal; 0 when it is not held."""
        return self._timer.remaining(self._clock.now()) if self._create_revision else 0.0

    @property
    def create_revision(self) -> int:
        """The number that names this session among all sessions of this host; 0 when it is not held."""
        return self._create_revision if self.held else 0

    @property
    def lease(self) -> int:
        """The session's lease: a key on it ends with the session."""
        return self._lease

    def compare(self) -> Compare:
        """The condition "my session exists" for a transaction.

        etcd checks the condition when the transaction happens, so a late transaction is safe. Without a session the
        condition is false.
        """
        return Compare(self.key, Target.CREATE_REVISION, self._create_revision or NO_SESSION)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever the session is won or lost; return a function that ends that.

        The listener runs in the session's own task: it must neither block nor raise. `asyncio.Event.set` is meant.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def follow(self, follower: Callable[[float], None]) -> None:
        """Tell `follower` after each confirmed renewal when the session runs out, CLOCK_BOOTTIME; see `listen`."""
        self._followers.append(follower)

    async def run(self) -> Never:
        """Keep the session, for ever. Cancelling leaves it in etcd for the successor to resume.

        Raises:
            HostnameTaken: another supervisor holds the session, and this one never did (unless it `yields`).
        """
        self._lease = self._file.load()
        self._won_on_this_boot = self._lease != 0
        self._own_leases = {self._lease} - {0}
        failures = 0
        while True:
            try:
                if self._create_revision:
                    await self._renew()
                else:
                    await self._acquire()
            except EtcdError as error:
                failures += 1
                self._tell(error)
                pause = retry_delay(failures, self._rand(), self._ttl_s / RENEWALS_PER_TTL)
                wake = self._clock.now() + pause
                # The deadline may have passed during the call, or comes before the next one.
                self._announce()
                await self._clock.sleep_until(min(wake, self._timer.deadline) if self.held else wake)
            else:
                failures = 0
                await self._clock.sleep_until(self._timer.next_renewal(self._clock.now()))
            # After a suspend, or a freeze, it may have passed in the sleep.
            self._announce()

    async def restate(self, value: HostSession) -> bool:
        """Write `value` into the key; return whether it is there. Without a session it is written once that is won.

        Raises:
            EtcdError: the value may or may not be there.
        """
        self.value = value
        mine = [self.compare(), Compare(self.key, Target.LEASE, self._lease)]
        return (await self._store.txn(mine, [Put(self.key, value.to_json(), self._lease)])).succeeded

    async def end(self) -> None:
        """End the session, so that no other host waits for its lease to run out. `run` was cancelled before.

        Raises:
            EtcdError: the session was not ended; its lease runs out by itself.
        """
        if self._lease:
            await self._store.revoke(self._lease)

    # Renewing.

    async def _renew(self) -> None:
        """Renew once. Law 1: a renewal counts when a quorum confirmed it, dated from before it was sent."""
        sent = self._clock.now()
        ttl_s = await self._store.keep_alive(self._lease, timeout_s=self._timeout())
        if ttl_s <= 0:
            self._lose("its lease has run out in etcd")
            return
        await point("session kept alive")
        found = await self._confirmed()
        if found is None:
            self._lose(f"{self.key} was deleted or replaced")
            return
        self._confirm(self._create_revision, sent, ttl_s)
        if found.value != (value := self._encoded()):
            # `restate` could not write the value.
            with contextlib.suppress(NoSpace):
                await self._rewrite(found, value)

    def _encoded(self) -> bytes:
        """`value` as the key holds it: the same at nearly every renewal."""
        if self._said is None or self._said[0] is not self.value:
            self._said = self.value, self.value.to_json()
        return self._said[1]

    async def _confirmed(self) -> KeyValue | None:
        """Ask a quorum for our key, without a write; None when the key is not ours any more.

        The key must still be on our lease: a write by another client takes the key off the lease, and then it would
        outlive this host.

        A read, not a transaction that compares: without space, etcd 3.5.0 to 3.5.6 refuse every transaction
        (https://github.com/etcd-io/etcd/issues/14884), and the session would be lost.
        """
        found = await self._store.get(self.key, timeout_s=self._timeout())
        ours = found is not None and (found.create_revision, found.lease) == (self._create_revision, self._lease)
        return found if ours else None

    def _timeout(self) -> float:
        # While the session is held, no call lasts longer than it does, so that its loss is announced in time.
        usual = self._ttl_s / RENEWALS_PER_TTL
        return max(SHORTEST_TIMEOUT_S, min(usual, self.remaining_s)) if self.held else usual

    # Acquiring.

    async def _acquire(self) -> None:
        """Make one attempt. The caller makes another one when this one neither succeeds nor raises."""
        sent = self._clock.now()
        ttl_s = await self._store.keep_alive(self._lease, timeout_s=self._timeout()) if self._lease else 0
        found = await self._store.get(self.key, timeout_s=self._timeout())
        if found is None:
            await self._create(sent, ttl_s)
        elif found.lease in self._own_leases:
            await self._resume(found, sent, ttl_s)
        elif self._is_leftover(found):
            await self._remove(found)
        else:
            await self._stand_off(found)

    async def _create(self, sent: float, ttl_s: int) -> None:
        """Write the absent key, on our lease if that lives and has the right TTL, else on a new lease."""
        if ttl_s != self._ttl_s:
            sent, ttl_s = await self._grant()
        absent = Compare(self.key, Target.CREATE_REVISION, 0)
        put = Put(self.key, self.value.to_json(), self._lease)
        done = await self._store.txn([absent], [put], timeout_s=self._timeout())
        if done.succeeded:
            log.info("session.created", key=self.key, lease=f"{self._lease:x}", revision=done.revision)
            self._confirm(done.revision, sent, ttl_s)

    async def _grant(self) -> tuple[float, int]:
        """Get a new lease; return when it was asked for, and its TTL.

        The id is on file before any key has it: so a successor knows the lease of every session key that this host
        ever wrote, whenever this process dies.
        """
        sent = self._clock.now()
        self._lease = await self._store.grant(self._ttl_s)
        self._own_leases.add(self._lease)
        self._file.save(self._lease)
        return sent, self._ttl_s

    async def _resume(self, found: KeyValue, sent: float, ttl_s: int) -> None:
        """Go on with a session that is ours: a predecessor's, or one whose creation got no reply."""
        value = self.value.to_json()
        try:
            if ttl_s != self._ttl_s:
                # The setting changed, or the lease is about to expire: the key moves to a new lease.
                sent, ttl_s = await self._grant()
            if (found.value, found.lease) != (value, self._lease) and not await self._rewrite(found, value):
                return
        except NoSpace as error:
            if ttl_s <= 0 or found.lease != self._lease:
                raise
            # The key is on our living lease: that is a session. A later renewal corrects its value.
            log.warning("session.not_restated", key=self.key, reason=str(error))
        log.info("session.resumed", key=self.key, lease=f"{self._lease:x}", revision=found.create_revision)
        self._confirm(found.create_revision, sent, ttl_s)

    async def _rewrite(self, found: KeyValue, value: bytes) -> bool:
        """Write `value` into our key as found, on our present lease; False when the key changed meanwhile."""
        mine = [
            Compare(self.key, Target.CREATE_REVISION, found.create_revision),
            Compare(self.key, Target.LEASE, found.lease),
        ]
        put = Put(self.key, value, self._lease)
        return (await self._store.txn(mine, [put], timeout_s=self._timeout())).succeeded

    def _is_leftover(self, found: KeyValue) -> bool:
        """Whether no supervisor can be alive behind a session key that is not ours.

        The same machine id with another boot id: this machine has rebooted. But if this host has won a session on
        the present boot already, the two are clones that share a machine id, and the other one may be alive.
        """
        if found.lease == 0:
            return True
        other = HostSession.from_json(found.value)
        return (
            other is not None
            and other.machine == self.value.machine != ""
            and other.boot_id != self.value.boot_id
            and not self._won_on_this_boot
        )

    async def _remove(self, found: KeyValue) -> None:
        """Delete a leftover key. Creating it anew is another step, because its create revision must change."""
        unchanged = Compare(self.key, Target.MOD_REVISION, found.mod_revision)
        done = await self._store.txn([unchanged], [Delete(self.key)], timeout_s=self._timeout())
        if done.succeeded:
            log.warning(
                "session.leftover_removed",
                key=self.key,
                found=found.value[:500].decode(errors="replace"),
                reason="it has no lease" if found.lease == 0 else "this machine has rebooted since",
            )

    async def _stand_off(self, found: KeyValue) -> None:
        """Look whether another supervisor renews the key, or its lease runs out."""
        ttl_s = await self._store.time_to_live(found.lease)
        self._rival = Rival.seen(
            self._rival,
            lease=found.lease,
            mod_revision=found.mod_revision,
            ttl_s=ttl_s,
            now=self._clock.now(),
        )
        if self._rival.alive:
            message = self._taken(found)
            if not self._won_by_this_process and not self._yields:
                raise HostnameTaken(message)
            self._tell_of("taken", message)
        else:
            self._tell_of(
                "old_session",
                f"{self.key} holds an earlier session of this host; it is replaced when its lease runs out,"
                f" in {max(ttl_s, 0)} s, unless another supervisor renews it",
            )
        await self._clock.sleep(RIVAL_POLL_S)

    def _taken(self, found: KeyValue) -> str:
        other = HostSession.from_json(found.value)
        who = (
            f"at {other.url or 'an unknown address'}, boot id {other.boot_id}, started {other.started or '?'}"
            if other is not None
            else f"whose session key reads {found.value[:200].decode(errors='replace')!r}"
        )
        return (
            f"another supervisor, {who}, is alive under the host name {self.value.host!r}"
            f" (it renews {self.key}): give one of the two another KVM_HOSTNAME, or stop the other one"
        )

    # Won and lost.

    def _confirm(self, create_revision: int, sent: float, ttl_s: int) -> None:
        # First the loss, if the old deadline passed while the reply was on its way: no listener may see the session
        # come back without having been told of the loss.
        self._announce()
        self._create_revision = create_revision
        self._timer = SessionTimer(ttl_s=min(ttl_s, self._ttl_s), confirmed_at=sent)
        self._rival = None
        self._won_on_this_boot = self._won_by_this_process = True
        if self._reminder.kind:
            log.info("session.back", key=self.key)
        self._reminder = Reminder()
        self.problem = ""
        self._announce()
        for follower in self._followers:
            follower(self._timer.deadline)

    def _lose(self, reason: str) -> None:
        self._create_revision = 0
        self._timer = SessionTimer(ttl_s=self._ttl_s)
        self._announce(reason)

    def _announce(self, reason: str = "no quorum confirmed it in time") -> None:
        """Tell the listeners when `held` differs from what they were last told."""
        held = self.held
        if held == self._announced:
            return
        self._announced = held
        if held:
            log.info("session.won", key=self.key, create_revision=self._create_revision)
        else:
            self.lost_count += 1
            log.error("session.lost", key=self.key, reason=reason, lost_count=self.lost_count)
        for listener in tuple(self._listeners):
            listener()

    def _tell(self, error: EtcdError) -> None:
        match error:
            case Denied():
                self._tell_of("denied", f"etcd does not let this host write {self.key}: {error}")
            case Rejected():
                self._tell_of("rejected", f"etcd refuses to write {self.key}: {error}")
            case _:
                self._tell_of("away", f"etcd does not answer: {error}")

    def _tell_of(self, kind: str, problem: str) -> None:
        self.problem = problem
        reminder = self._reminder.tell(kind, self._clock.now())
        if reminder is not None:
            self._reminder = reminder
            tell = log.error if kind in ("denied", "rejected", "taken") else log.warning
            tell(f"session.{kind}", problem=problem, remaining_s=round(self.remaining_s, 1))


def last_key(run_dir: Path, *, boot_id: str) -> str | None:
    """The session key that was last used with this run directory on this boot; None when none is noted."""
    try:
        found = json.loads((run_dir / FILE_NAME).read_bytes())
        return str(found["key"]) if found["boot_id"] == boot_id else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


class LeaseFile:
    """The lease's id in the run directory, for a successor on the same boot.

    Args:
        path: of the file.
        key: of the session; a lease that is noted for another key is not used.
        boot_id: of the present boot; a lease that is noted for another boot is not used.
    """

    def __init__(self, path: Path, *, key: str, boot_id: str) -> None:
        self._path = path
        self._key = key
        self._boot_id = boot_id
        self._leave_alone = False

    def load(self) -> int:
        """Return the noted lease, or 0. Never raises: without the file a new session is made."""
        try:
            found = json.loads(self._path.read_bytes())
            # The version first: nothing else of a newer file has a known shape.
            if (version := int(found["version"])) > FILE_VERSION:
                self._leave_alone = True
                log.warning(
                    "session.file_newer",
                    path=str(self._path),
                    version=version,
                    known=FILE_VERSION,
                    problem="left as it is, so sessions are not resumed across restarts; remove it to mend that",
                )
                return 0
            same = (found["key"], found["boot_id"]) == (self._key, self._boot_id)
            return int(found["lease"]) if same else 0
        except FileNotFoundError:
            return 0
        except OSError as error:
            log.warning("session.file_unreadable", path=str(self._path), error=str(error))
        except (ValueError, TypeError, KeyError) as error:
            log.warning("session.file_invalid", path=str(self._path), error=repr(error))
        return 0

    def save(self, lease: int) -> None:
        """Note the lease, whole or not at all. Never raises: a session works without the file.

        The directory is in memory (/run), so this does not block the event loop, and needs no fsync: after a power
        loss the host has another boot id.
        """
        if self._leave_alone:
            return
        noted = {"version": FILE_VERSION, "key": self._key, "boot_id": self._boot_id, "lease": lease}
        try:
            write_whole(self._path, json.dumps(noted).encode())
        except OSError as error:
            log.warning("session.file_unwritable", path=str(self._path), error=str(error))
