"""The cluster of one history: hosts with production supervisors, one etcd, one Ceph, and people who write keys."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from kvmsupervisor.adapters.etcd.api import Event
from kvmsupervisor.domain.ceph import Client
from kvmsupervisor.domain.host_wish import HostProgress
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.placement import FAILOVER, Placement
from kvmsupervisor.domain.status import Status
from tests.fakes.etcd import FakeEtcd
from tests.fakes.transfer import FakeNet
from tests.simulation.ceph import CephCluster
from tests.simulation.chance import Chance
from tests.simulation.clock import SimClock
from tests.simulation.host import SimHost
from tests.simulation.judge import TICK_S, Judge
from tests.simulation.looks import Looks
from tests.simulation.loop import LIFE, WORLD, Life, SimLoop, context_of
from tests.simulation.points import Armed
from tests.simulation.qemu import SimQemu
from tests.simulation.trace import Trace
from tests.simulation.tries import hear

PASSAGE_S = 0.01
"""The longest time that what one host sends another is under way."""

SHAKEN_S = 60.0
"""How long after its end a fault may still cost a session."""

WRITE_S = 5.0
"""The longest time a guest writes nothing."""

OF_THIS_MACHINE = frozenset({"qemu.privileged", "files.too_few"})
"""What supervisors say of the machine that they are played on: who plays, and with how many open files."""

log = structlog.get_logger(__name__)


class _Bell(asyncio.Event):
    """Rung with the watches of an etcd whenever that changes: then there is something to look at after this step."""

    def __init__(self, loop: SimLoop) -> None:
        super().__init__()
        self._loop = loop

    def set(self) -> None:
        self._loop.stirred = True


class Enough(BaseException):
    """Something was violated, and no more is to be known."""


class World:
    """All of it.

    Attributes:
        lock_template: `LOCK`; None for the default.
        settings: of all hosts, besides; `{number}` stands for the host's.
        net: over which guests are moved.
        host_wishes: what people want of hosts: `drain`, `return`.
        pauses_s: the last pause after a live move that failed, by instance.
        layout: of the keys.
        quorum: set while etcd has one.
        elsewhere: the data of another cluster's etcd.
        over: the history has ended; what is torn down now counts no more.
        until: what is wrong → how long.
        to_the_first: the history ends with the first violation.
        is_healed: nothing goes wrong any more.
        is_copied: the other cluster's etcd is, or was, a copy of this one's.
        asked: how often people have read in a status that they are to end another QEMU, by instance.
        upgraded: supervisors that were stopped to be replaced.
        on_log: told what a supervisor logs: its name, the event, what goes with it.
    """

    def __init__(
        self,
        loop: SimLoop,
        chance: Chance,
        folder: Path,
        *,
        names: Sequence[str] = "abc",
        keep: int | None = None,
        lock: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.loop = loop
        self.settings = settings or {}
        self.folder = folder
        self.chance = chance
        self.lock_template = lock
        self.layout = Layout() if lock is None else Layout(lock=lock)
        self.on_log: Callable[[str, str, Mapping[str, Any]], None] = lambda who, event, told: None
        self.trace = Trace(loop.time, steps=lambda: loop.steps, hide=str(folder), keep=keep)
        self.etcd = FakeEtcd(loop.time)
        self.elsewhere = FakeEtcd(loop.time, cluster=2)
        self._elsewhere: Any = self.elsewhere._server
        self._server: Any = self.etcd._server
        self.judge = Judge(
            loop.time,
            layout=self.layout,
            tell=self._told,
            exists=lambda key: key.encode() in self._server.keys,
            belongs=self.belongs,
            wanted=self.wanted,
            at_home=self.at_home,
            leaves=self.leaves,
            watched=lambda image: bool(self.ceph.watching(image)),
            shut_out=lambda client: self.ceph.is_shut_out(Client(client)),
        )
        self.ceph = CephCluster(loop.time, self.chance.of("ceph"))
        self.ceph.on_shut_out = self._shut_out
        self.ceph.on_unwatched = self.judge.unwatched
        net_chance = self.chance.of("transfers")
        self.net = FakeNet(SimClock(loop, hardware=context_of(WORLD)))  # type: ignore[arg-type]
        self.net_slow_s = PASSAGE_S
        self.net.passage_s = lambda: net_chance.random() * self.net_slow_s
        self.quorum = asyncio.Event()
        self.quorum.set()
        self.over = self.to_the_first = self.is_healed = self.is_copied = False
        self.asked: Counter[str] = Counter()
        self.until: dict[str, float] = {}
        self._shaken_until = 0.0
        self.ended_at = loop.time()
        self.upgraded: set[str] = set()
        self.backup: FakeEtcd | None = None
        self.armed: dict[str, Armed] = {}
        self.reached: Counter[str] = Counter()
        self.wishes: dict[str, dict[str, str]] = {}
        self.host_wishes: dict[str, dict[str, str]] = {}
        self.pauses_s: dict[str, float] = {}
        self.looks = Looks(self)
        self._histories = {False: [self._server.history], True: [self._elsewhere.history]}
        self.hosts = [SimHost(self, number, name) for number, name in enumerate(names)]
        self._seen = self._seen_elsewhere = 0
        self._born = self._born_elsewhere = 0
        loop.on_step = self._stepped
        for server in (self._server, self._elsewhere):
            server.wakers.add(_Bell(loop))
        loop.create_task(self._tick())

    def host(self, name: str) -> SimHost:
        return next(host for host in self.hosts if host.true_name == name)

    # --- after every step -------------------------------------------------------------------------------------

    def _told(self, who: str, what: str) -> None:
        """The judge says something, of a violation too."""
        self.trace.add(who, what)
        self.loop.stirred = True

    def _stepped(self, life: Life) -> None:
        if self.loop.errors:
            self._hear_errors()
        if self.to_the_first and self.judge.violations:
            # What is torn down now counts no more.
            self.over = True
            raise Enough
        server = self._server
        if server.born != self._born:
            self._born = server.born
            self._seen = len(server.history)
            self._histories[False].append(server.history)
            named = self.layout.history_key in self.etcd.data
            self.judge.another_history(self.locks(), self._statuses(), self._revisions(), named=named)
        if self._elsewhere.born != self._born_elsewhere:
            self._born_elsewhere = self._elsewhere.born
            self._seen_elsewhere = len(self._elsewhere.history)
            locks = self._elsewhere.keys.items()
            self.judge.another_history_elsewhere({key: kv.value for key, kv in locks if self._is_lock(key)})
        while self._seen_elsewhere < len(self._elsewhere.history):
            event = self._elsewhere.history[self._seen_elsewhere]
            self._seen_elsewhere += 1
            self.judge.changed_elsewhere(event)
        while self._seen < len(server.history):
            event = server.history[self._seen]
            self._seen += 1
            self.judge.changed(event)

    def _is_lock(self, key: bytes) -> bool:
        return self.layout.id_of_lock(key.decode(errors="replace")) is not None

    def _hear_errors(self) -> None:
        while self.loop.errors:
            self.judge.wrong("unheard error", self.loop.errors.pop(0))

    async def _tick(self) -> None:
        while True:
            await self.loop.pause(TICK_S)
            self.etcd.tick()
            self.elsewhere.tick()
            for host in self.hosts:
                keys = (self.elsewhere if host.astray else self.etcd)._server.keys
                life = host.life
                if life is None or life.frozen or not life.holds_session:
                    self.judge.believes(host.true_name, None, exists=False)
                else:
                    assert life.parts is not None
                    key = life.parts._session.key
                    self.judge.believes(host.true_name, key, exists=key.encode() in keys)
            self.looks.look()
            self.look_at_watches()

    def look_at_watches(self) -> None:
        """Note which images nobody watches: once in a while, and before a watch may be there again."""
        for name, image in self.ceph.images.items():
            if not image.watchers or not self.ceph.watching(name):
                self.judge.unwatched(name)

    def _shut_out(self, client: Client) -> None:
        """A guest whose client is shut out is stopped at its next write (`werror=stop`)."""
        for host in self.hosts:
            for qemu in host.kernel.living:
                if qemu.client == client:
                    self.judge.shut_out(qemu)
                    after_s = self.ceph.chance.random() * WRITE_S
                    self.loop.call_later(after_s, qemu.fail_to_write, context=context_of(host.hardware))

    def histories_of(self, *, elsewhere: bool) -> list[list[Event]]:
        """All that an etcd had, the present one last; the list grows."""
        found, server = self._histories[elsewhere], self._elsewhere if elsewhere else self._server
        if found[-1] is not server.history:
            found.append(server.history)
        return found

    def shaken(self, for_s: float) -> None:
        """For so long, and until sessions are won again, something may keep them from being renewed."""
        self._shaken_until = max(self._shaken_until, self.loop.time() + for_s + SHAKEN_S)

    # --- people -----------------------------------------------------------------------------------------------

    def put(self, instance: str, **keys: str) -> None:
        """A person writes keys, one after the other."""
        for name, value in keys.items():
            self.wishes.setdefault(instance, {})[name] = value
            self.judge.wrote(self.etcd.revision + 1)
            self.etcd.write(f"/kvm/{instance}/{name}", value)
        self.trace.add("people", f"put {instance} {keys}")

    def remove(self, instance: str, *names: str) -> None:
        """A person deletes keys, all of them without names."""
        prefix = f"/kvm/{instance}/"
        found = [key for key in self.etcd.data if key.startswith(prefix) and key != f"{prefix}lock"]
        if names:
            found = [key for key in found if key.removeprefix(prefix) in names]
        self.judge.wrote(self.etcd.revision + 1)
        self.etcd.erase(*found)
        for key in found:
            self.wishes.get(instance, {}).pop(key.removeprefix(prefix), None)
        self.trace.add("people", f"remove {found}")

    def want(self, host: str, name: str, value: str | None) -> None:
        """A person writes, or deletes, what is wanted of a host."""
        key = f"{self.layout.host_wishes_prefix}{host}/{name}"
        self.judge.wrote(self.etcd.revision + 1)
        if value is None:
            self.host_wishes.get(host, {}).pop(name, None)
            self.etcd.erase(key)
        else:
            self.host_wishes.setdefault(host, {})[name] = value
            self.etcd.write(key, value)
        self.trace.add("people", f"{host}: {name} {value}")

    def drain(self, host: str, mode: str) -> None:
        """`drain`. What runs there, or may start there, may be stopped where the mode says so."""
        if mode != "live":
            for name, keys in sorted(self.wishes.items()):
                if host in {keys.get("host"), self.placed(name)} or any(
                    q.host == host for q in self.judge.living(name)
                ):
                    self.judge.ordered(name, f"{host} drains ({mode})")
        self.want(host, "return", None)
        self.want(host, "drain", mode)

    def undrain(self, host: str, back: str | None) -> None:
        """`undrain`, and `--return`."""
        if back == "cold":
            for name, keys in sorted(self.wishes.items()):
                if keys.get("host") == host:
                    self.judge.ordered(name, f"{host} takes it back")
        self.want(host, "drain", None)
        if back is not None:
            self.want(host, "return", back)

    def drains(self, host: str) -> bool:
        """Whether etcd has it that a host drains."""
        return self.layout.drain_key(host).encode() in self._server.keys

    def progress(self, host: str) -> HostProgress | None:
        """How far a drain, or a return, has come, as its host says."""
        value = self.etcd.data.get(self.layout.drain_fact_key(host))
        return None if value is None else HostProgress.from_json(value)

    def has_anothers(self, instance: str, image: str | None) -> bool:
        """Whether a QEMU of an instance has this image open, which its keys do not name any more."""
        own = self.wishes.get(instance, {}).get("rbd")
        return image not in {None, own} and any(qemu.image == image for qemu in self.judge.living(instance))

    def set_right(self) -> None:
        """A person writes down again what etcd has lost, or has otherwise since it was restored."""
        for instance, keys in sorted(self.wishes.items()):
            found = self.etcd.data
            for name, value in keys.items():
                if found.get(f"/kvm/{instance}/{name}") != value.encode():
                    if name in {"host", "power", "restart_request"}:
                        self.judge.ordered(instance, f"{name} is written again")
                    self.put(instance, **{name: value})
            stray = [key.split("/")[3] for key in found if key.startswith(f"/kvm/{instance}/")]
            if gone := [name for name in stray if name not in keys and name != "lock"]:
                self.judge.ordered(instance, "keys of the backup are taken away")
                self.remove(instance, *gone)
        for host in sorted(one.true_name for one in self.hosts):
            for name in ("drain", "return"):
                wanted = self.host_wishes.get(host, {}).get(name)
                there = self.etcd.data.get(f"{self.layout.host_wishes_prefix}{host}/{name}")
                if there != (None if wanted is None else wanted.encode()):
                    self.want(host, name, wanted)

    def locks(self) -> dict[str, bytes]:
        found = {}
        for key, value in self.etcd.data.items():
            if (instance := self.layout.id_of_lock(key)) is not None:
                found[str(instance)] = value
        return found

    def _statuses(self) -> dict[str, bytes]:
        prefix = self.layout.statuses_prefix
        return {key.removeprefix(prefix): value for key, value in self.etcd.data.items() if key.startswith(prefix)}

    def _revisions(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for key, kv in self._server.keys.items():
            instance, _, name = key.decode(errors="replace").removeprefix("/kvm/").partition("/")
            if key.startswith(b"/kvm/") and name != "lock":
                found.setdefault(instance, {})[name] = kv.mod_revision
        return found

    def erase(self, keys: Sequence[str]) -> None:
        """A person deletes these keys by mistake: what is wanted does not change."""
        self.judge.wrote(self.etcd.revision + 1)
        self.etcd.erase(*keys)
        self.trace.add("people", f"delete {list(keys)} by mistake")

    def break_lock(self, instance: str) -> None:
        """`break-lock`: a person says that nothing of its holder writes any more, which may be wrong."""
        lock = self.lock(instance)
        if lock is None or lock.storage is not Storage.UNFENCEABLE or lock.state is LockState.BROKEN:
            return
        if self.layout.session_key(lock.host) in self.etcd.data:
            return
        self.judge.broken(instance)
        self.judge.wrote(self.etcd.revision + 1)
        self.etcd.write(self.layout.lock_key(InstanceId(instance)), lock.broken().to_json())

    def belongs(self, instance: str, host: str) -> bool:
        """Whether an instance is to run there, as people want it and supervisors have placed it.

        A `host` that there is not moves nothing.
        """
        wish = self.wishes.get(instance, {})
        if not self.wanted(instance):
            return False
        if all(wish["host"] != one.true_name for one in self.hosts):
            return True
        return host in {wish["host"], self.placed(instance)}

    def wanted(self, instance: str) -> bool:
        """Whether people want it to run."""
        wish = self.wishes.get(instance, {})
        return wish.get("power", "on") == "on" and "host" in wish

    def leaves(self, instance: str, host: str) -> bool | None:
        """Whether a placement has it leave a host where it may be: True where its guest may be stopped for that.

        False: it may not be, but by a person's order: a drain, or a return, that says so is one (`drain`, `undrain`).
        None: nothing has it leave.
        """
        found = self._placement(instance)
        if found is None or found.host == host:
            return None
        return found.why == FAILOVER

    def at_home(self, instance: str, host: str) -> bool:
        """Whether it is to run there, as the keys are now, or may stay until the host where it is to run is there."""
        keys = self._server.keys
        value = keys.get(self.layout.wish_key(InstanceId(instance), "host").encode())
        wanted = self.placed(instance) or ("" if value is None else value.value.decode())
        return host == wanted or self.layout.session_key(HostName(wanted)).encode() not in keys

    def has_session(self, host: str) -> bool:
        """Whether etcd has its session."""
        return self.layout.session_key(HostName(host)).encode() in self._server.keys

    def is_heeded(self, instance: str, host: str) -> bool:
        """Whether it is this host that acts on the keys of an instance: they name it, or it is placed there."""
        value = self._server.keys.get(self.layout.wish_key(InstanceId(instance), "host").encode())
        return value is not None and host in {value.value.decode(), self.placed(instance)}

    def placed(self, instance: str) -> str | None:
        """Where its placement says, while that stands."""
        found = self._placement(instance)
        return None if found is None else found.host

    def _placement(self, instance: str) -> Placement | None:
        keys, name = self._server.keys, InstanceId(instance)
        home = keys.get(self.layout.wish_key(name, "host").encode())
        placed = keys.get(self.layout.placement_key(name).encode())
        placement = None if placed is None else Placement.from_json(placed.value)
        stands = placement is not None and home is not None and 0 < home.mod_revision <= placement.of
        return placement if stands else None

    def let_go_on(self, guest: object) -> None:
        """Whoever has paused a guest lets it go on, wherever it is by then."""
        for host in self.hosts:
            for qemu in host.kernel.living:
                if qemu.boot is guest and self.is_the_guests(qemu):
                    qemu.resume()

    def is_the_guests(self, qemu: SimQemu) -> bool:
        """Whether a QEMU is the one whose guest a person lets go on: its lock's, or the only one that has it."""
        lock, living = self.lock(qemu.instance), self.judge.living(qemu.instance)
        holds = lock is not None and lock.incarnation == qemu.incarnation
        return holds or not any(one is not qemu and one.boot is qemu.boot for one in living)

    def lock(self, instance: str) -> Lock | None:
        value = self.etcd.data.get(self.layout.lock_key(InstanceId(instance)))
        return None if value is None else Lock.from_json(value)

    def status(self, instance: str) -> Status | None:
        value = self.etcd.data.get(self.layout.status_key(InstanceId(instance)))
        return None if value is None else Status.from_json(value)

    # --- the end ----------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Nothing is wrong with anything any more."""
        self.trace.add("world", "all is healed")
        self.is_healed = True
        self.quorum.set()
        self.etcd.allow()
        self.ceph.away = None
        self.ceph.slow_s = 0.3
        self.ceph.late_s = 0.0
        self.net.swallowed.clear()
        self.net_slow_s = PASSAGE_S
        self.net.changed()
        self.etcd.make_space()
        self.armed.clear()
        self.set_right()
        for host in self.hosts:
            host.heal()

    def end(self) -> None:
        """The history is told."""
        self.trace.add("world", "the end")
        self.ended_at, self.over = self.loop.time(), True

    @property
    def moves_live(self) -> bool:
        """Whether guests are moved while they run."""
        return "KVM_MIGRATION_LISTEN" in self.settings

    @property
    def has_begun_again(self) -> bool:
        """Whether etcd has had another history."""
        return self._born > 0

    def missing(self) -> dict[str, str]:
        """What is not as people want it, by instance."""
        missing: dict[str, str] = {}
        wanted_ones = {name for name, keys in self.wishes.items() if keys.get("host") and keys.get("power") != "off"}
        for name in sorted(self.wishes):
            image = self.wishes[name].get("rbd")
            wanted = name in wanted_ones and self.ceph.has_exclusive_lock(image)
            others = [one for one in wanted_ones - {name} if image is not None and self.wishes[one].get("rbd") == image]
            if wanted and any(qemu.writes for one in others for qemu in self.judge.living(one)):
                # Two that name one image: either of them is to run.
                wanted = False
            living = self.judge.living(name)
            running = [qemu for qemu in living if qemu.writes]
            if wanted and (len(running) != 1 or len(living) != 1):
                found = ", ".join(f"{one.pid} on {one.host} ({one.run_state}, {one.writes})" for one in living)
                status = self.status(name)
                reason = None if status is None else f"{status.host} {status.phase} {status.reason}"
                missing[name] = f"{name} is to run once; there is: {found or 'none'}; its status: {reason}"
            elif wanted and not self.belongs(name, running[0].host):
                missing[name] = f"{name} is to run on {self.wishes[name]['host']}, and runs on {running[0].host}"
            elif any(self.judge.was_broken(qemu) for qemu in living):
                missing[name] = f"{name}: its lock was broken, and {living[0].pid} on {living[0].host} lives"
            elif not wanted and living:
                status = self.status(name)
                reason = None if status is None else f"{status.host} {status.phase} {status.reason}"
                missing[name] = f"{name} is not to run, and {living[0].pid} does; its status: {reason}"
        return missing


class LogTap:
    """What supervisors log goes into the trace; an error of theirs in it is a violation."""

    def __init__(self) -> None:
        self.world: World | None = None

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        world = self.world
        if world is not None and not world.over:
            name = event.pop("event")
            if name in OF_THIS_MACHINE:
                raise structlog.DropEvent
            broken = event.pop("exc_info", None)
            world.trace.add(LIFE.get().name, f"{method} {name} {event}")
            hear(world.looks.tries, LIFE.get().name, name, event, wishes=world.wishes)
            world.on_log(LIFE.get().name, name, event)
            if name == "move.failed":
                world.pauses_s[event["instance"]] = event["pause_s"]
            if name == "session.lost" and world.loop.time() > world._shaken_until:
                world.judge.lost_session(LIFE.get().name)
            if name == "instance.error":
                told = "".join(traceback.format_exception(sys.exc_info()[1])) if broken else ""
                world.judge.wrong("internal error", told or str(event))
        raise structlog.DropEvent


@contextlib.contextmanager
def tapped(world: World) -> Iterator[None]:
    """Have the log go into the world's trace."""
    before = structlog.get_config()
    tap = LogTap()
    tap.world = world
    structlog.configure(
        processors=[tap],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
