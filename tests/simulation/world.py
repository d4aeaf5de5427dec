"""The cluster of one history: hosts with production supervisors, one etcd, one Ceph, and people who write keys."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

import structlog

from kvmsupervisor.adapters.rundir import AlreadyRunning
from kvmsupervisor.cluster.session import HostnameTaken
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.ceph import Client
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Status
from kvmsupervisor.instance.assembly import Outside
from kvmsupervisor.supervisor.supervisor import Supervisor
from tests.fakes.etcd import FakeEtcd
from tests.simulation.ceph import CephCluster, SimCeph
from tests.simulation.chance import Chance
from tests.simulation.clock import SimClock
from tests.simulation.etcd import SimEtcd, Weather
from tests.simulation.judge import Judge
from tests.simulation.loop import LIFE, Life, SimLoop, context_of
from tests.simulation.outside import outside
from tests.simulation.points import Armed
from tests.simulation.qemu import SimQemu, SimQemus
from tests.simulation.trace import Trace

AGAIN_S = 2.0
"""Pause before a supervisor that ended by itself is started again, as its unit does (`RestartSec=`)."""

TICK_S = 0.5
"""How often leases are looked at."""

WRITE_S = 5.0
"""The longest time a guest writes nothing."""

LAYOUT = Layout()

log = structlog.get_logger(__name__)


class SupervisorLife(Life):
    """One supervisor, from its start to its end."""

    def __init__(self, host: SimHost, number: int) -> None:
        super().__init__(f"{host.name}#{number}")
        self.host = host
        self.supervisor: Supervisor | None = None
        self.client: SimEtcd | None = None


@cache
def settings_of(name: str, run_dir: str) -> Settings:
    """What a host is set to: defaults, but for what would touch this machine."""
    environ = {
        "ETCD_ENDPOINTS": "http://127.0.0.1:1",
        "KVM_HOSTNAME": name,
        "KVM_RUN_DIR": run_dir,
        "KVM_STATE_DIR": f"{run_dir}-state",
        "KVM_LISTEN": "off",
        "KVM_ACCEL": "tcg",
        "KVM_CGROUP": "none",
    }
    return load_settings(environ, default_config=Path(run_dir, "none.toml"))


class SimHost:
    """One host: its hardware, its kernel, its way to etcd and Ceph, and the supervisor that lives on it now.

    Attributes:
        name: `KVM_HOSTNAME`, as its present settings say.
        true_name: as they say when nobody has made a mistake.
        powered: it has power.
        frozen: nothing on it runs.
    """

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.name = self.true_name = "abcdefgh"[number]
        self.machine_id = f"machine-{self.name}"
        self.run_dir = world.folder / self.name
        self.powered = True
        self.frozen = False
        self.reaches_ceph = True
        self.weather = Weather()
        self.life: SupervisorLife | None = None
        self._boots = self._lives = 0
        self._chance = world.chance.of(f"host {number}")
        self._boot()

    def _boot(self) -> None:
        self._boots += 1
        self.boot_id = f"boot-{self.true_name}-{self._boots}"
        self.hardware = Life(f"{self.true_name}/hardware")
        hardware = context_of(self.hardware)
        since_s = self._chance.random() * 10_000.0 - self.world.loop.time()
        self.clock = SimClock(since_s=since_s, hardware=hardware)
        self.kernel = SimQemus(
            self.true_name,
            self.number + 1,
            clock=self.clock,
            ceph=self.world.ceph,
            chance=self.world.chance.of(f"qemu {self.number} {self._boots}"),
            watcher=self.world.judge,
        )
        # Addresses, and so clients, are given once.
        for _ in range(1000 * self._boots):
            next(self.kernel._pids)

    # --- what its supervisor is given -------------------------------------------------------------------------

    def _outside(self, life: SupervisorLife) -> Outside:
        return outside(
            clock=self.clock,
            system=self.kernel.system,
            jitter=self._chance.random,
            boot_id=self.boot_id,
            machine_id=self.machine_id,
            connect=lambda: self.connect(life),
            ceph=self.ceph_client,
        )

    def connect(self, life: SupervisorLife) -> SimEtcd:
        world = self.world
        life.client = SimEtcd(
            world.etcd.peer(),
            weather=self.weather,
            quorum=lambda: world.quorum,
            chance=world.chance.of(f"net {life.name}"),
            tell=lambda what: world.trace.add(life.name, what),
        )
        return life.client

    def ceph_client(self) -> SimCeph:
        name = self.true_name
        return SimCeph(
            self.world.ceph, reach=lambda: self.reaches_ceph, tell=lambda what: self.world.trace.add(name, what)
        )

    # --- its supervisor ---------------------------------------------------------------------------------------

    @property
    def supervised(self) -> bool:
        return self.life is not None

    def start(self) -> None:
        """Start a supervisor, unless one lives."""
        if self.life is not None or not self.powered:
            return
        self._lives += 1
        life = self.life = SupervisorLife(self, self._lives)
        life.frozen = self.frozen
        self.world.trace.add(self.true_name, f"supervisor starts as {self.name}")
        task = self.world.loop.create_task(self._live(life), context=context_of(life))
        task.add_done_callback(lambda done: self._over(life, done), context=context_of(self.hardware))

    async def _live(self, life: SupervisorLife) -> bool:
        settings = settings_of(self.name, str(self.run_dir))
        supervisor = life.supervisor = Supervisor(settings, self._outside(life))
        return await supervisor.run()

    def _over(self, life: SupervisorLife, task: asyncio.Task[bool]) -> None:
        """A supervisor has ended by itself, or as it was told."""
        error = None if task.cancelled() else task.exception()
        self.world.trace.add(self.true_name, f"supervisor ended: {error!r}")
        if self.world.over:
            return
        if task.cancelled() or (error is not None and not _is_usual(error)):
            self.world.judge.wrong("no part ends", f"the supervisor of {self.true_name} ended with {error!r}")
        if self.life is life:
            self.kernel.forget(life)
            self.life = None
        stopped = error is None and not task.result()
        if not stopped or life.name in self.world.upgraded:
            self.world.loop.call_later(AGAIN_S, self.start, context=context_of(self.hardware))

    def stop(self) -> None:
        """SIGTERM, and a successor."""
        if self.life is not None and self.life.supervisor is not None and not self.life.frozen:
            self.world.upgraded.add(self.life.name)
            self.life.supervisor.stop()

    def kill(self) -> None:
        """SIGKILL for the supervisor."""
        life, self.life = self.life, None
        if life is None:
            return
        life.dead = True
        self.world.trace.add(self.true_name, "supervisor killed")
        if life.supervisor is not None:
            # As the kernel does with what a process had open.
            life.supervisor._run_dir.release()
        self.kernel.forget(life)

    def freeze_supervisor(self, *, on: bool) -> None:
        """SIGSTOP, SIGCONT."""
        if self.life is not None:
            self.life.frozen = on or self.frozen
            self.world.trace.add(self.true_name, f"supervisor {'frozen' if on else 'thawed'}")

    # --- all of it --------------------------------------------------------------------------------------------

    def freeze(self, *, on: bool) -> None:
        """The whole host stands still, guests and all; thawed, its clients in Ceph are back, unless shut out."""
        if not self.powered:
            return
        self.frozen = self.hardware.frozen = on
        if self.life is not None:
            self.life.frozen = on
        self.world.trace.add(self.true_name, "frozen" if on else "thawed")
        self.weather_changed()
        for qemu in self.kernel.living:
            image = self.world.image_of(qemu)
            if on:
                self.world.ceph.vanish(qemu.client)
            elif image is not None:
                self.world.ceph.open(image, qemu.client)

    def lose_power(self) -> None:
        """All that was in memory is gone: processes, the run directory."""
        if not self.powered:
            return
        self.world.trace.add(self.true_name, "loses power")
        self.frozen = False
        self.kill()
        self.hardware.dead = True
        for qemu in self.kernel.living:
            qemu.vanish()
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.powered = False

    def boot(self) -> None:
        """Power is back."""
        if self.powered:
            return
        self.world.trace.add(self.true_name, "boots")
        self.powered = True
        self._boot()
        self.start()

    def weather_changed(self) -> None:
        """Watches break, or link again."""
        client = None if self.life is None else self.life.client
        if client is not None:
            client.lose_watches()
            client.link()

    def heal(self) -> None:
        """Nothing is wrong with it any more."""
        self.weather.clear()
        self.reaches_ceph = True
        self.name = self.true_name
        self.clock.skew_s = 0.0
        self.kernel.no_program = self.kernel.lose_answer_to = None
        self.kernel.next_words.clear()
        self.kernel.hidden.clear()
        for qemu in self.kernel.living:
            qemu.deaf = qemu.stubborn = qemu.frozen = qemu.mute = False
        self.boot()
        if self.frozen:
            self.freeze(on=False)
        self.freeze_supervisor(on=False)
        self.weather_changed()
        self.start()


def _is_usual(error: BaseException) -> bool:
    """Whether a supervisor may end so: another one lives under its name, or in its run directory."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_usual(one) for one in error.exceptions)
    return isinstance(error, HostnameTaken | AlreadyRunning)


class World:
    """All of it.

    Attributes:
        quorum: whether etcd has one.
        over: the history has ended; what is torn down now counts no more.
        upgraded: supervisors that were stopped to be replaced.
    """

    def __init__(self, loop: SimLoop, seed: object, folder: Path, *, hosts: int = 3, keep: int | None = None) -> None:
        self.loop = loop
        self.folder = folder
        self.chance = Chance(seed)
        self.trace = Trace(loop.time, hide=str(folder), keep=keep)
        self.etcd = FakeEtcd(loop.time)
        self._server: Any = self.etcd._server
        self.judge = Judge(
            loop.time, LAYOUT, self.trace.add, lambda key: key.encode() in self._server.keys, self.belongs
        )
        self.ceph = CephCluster(loop.time, self.chance.of("ceph"))
        self.ceph.on_shut_out = self._shut_out
        self.quorum = True
        self.over = False
        self.upgraded: set[str] = set()
        self.backup: FakeEtcd | None = None
        self.armed: dict[str, Armed] = {}
        self.reached: Counter[str] = Counter()
        self.wishes: dict[str, dict[str, str]] = {}
        self.hosts = [SimHost(self, number) for number in range(hosts)]
        self._seen = 0
        self._born = 0
        loop.on_step = self._stepped
        loop.create_task(self._tick())

    def host(self, name: str) -> SimHost:
        return next(host for host in self.hosts if host.true_name == name)

    @staticmethod
    def image_of(qemu: SimQemu) -> str | None:
        return f"rbd/{qemu.instance}" if qemu.instance.startswith("r") else None

    # --- after every step -------------------------------------------------------------------------------------

    def _stepped(self, life: Life) -> None:
        self.trace.mix(self.loop.steps)
        server = self._server
        if server.born != self._born:
            self._born = server.born
            self._seen = len(server.history)
            self.judge.another_history(self.locks())
        while self._seen < len(server.history):
            event = server.history[self._seen]
            self._seen += 1
            self.judge.changed(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.etcd.tick()

    def _shut_out(self, client: Client) -> None:
        """A guest whose client is shut out is stopped at its next write (`werror=stop`)."""
        for host in self.hosts:
            for qemu in host.kernel.living:
                if qemu.client == client:
                    after_s = self.ceph.chance.random() * WRITE_S
                    self.loop.call_later(after_s, qemu.fail_to_write, context=context_of(host.hardware))

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

    def confirm(self) -> None:
        """A person confirms whatever any host holds."""
        held: dict[str, list[str]] = {}
        for key, value in self.etcd.data.items():
            if key.startswith("/kvmsupervisor/instances/"):
                status = Status.from_json(value)
                if status is not None and status.held:
                    held.setdefault(status.host, []).append(status.id)
        for host, instances in sorted(held.items()):
            for instance in instances:
                self.judge.ordered(instance, "confirmed")
            self.trace.add("people", f"confirm {host} {instances}")
            self.etcd.write(LAYOUT.confirmation_key(HostName(host)), json.dumps(instances))

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

    def locks(self) -> dict[str, bytes]:
        found = {}
        for key, value in self.etcd.data.items():
            if key.startswith("/kvm/") and key.endswith("/lock"):
                found[key.split("/")[2]] = value
        return found

    def belongs(self, instance: str, host: str) -> bool:
        """Whether an instance is to run there, as people want it and supervisors have placed it."""
        wish = self.wishes.get(instance, {})
        if wish.get("power", "on") != "on" or "host" not in wish:
            return False
        placed = self.etcd.data.get(LAYOUT.placement_key(InstanceId(instance)))
        placement = None if placed is None else Placement.from_json(placed)
        return host in {wish["host"], None if placement is None else placement.host}

    def lock(self, instance: str) -> Lock | None:
        value = self.etcd.data.get(LAYOUT.lock_key(InstanceId(instance)))
        return None if value is None else Lock.from_json(value)

    def status(self, instance: str) -> Status | None:
        value = self.etcd.data.get(LAYOUT.status_key(InstanceId(instance)))
        return None if value is None else Status.from_json(value)

    # --- the end ----------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Nothing is wrong with anything any more."""
        self.trace.add("world", "all is healed")
        self.quorum = True
        self.ceph.away = None
        self.ceph.slow_s = 0.3
        self.etcd.make_space()
        self.armed.clear()
        self.set_right()
        for host in self.hosts:
            host.heal()

    def what_is_missing(self) -> list[str]:
        """What is not as people want it."""
        missing = []
        for name, keys in sorted(self.wishes.items()):
            wanted = bool(keys.get("host")) and keys.get("power", "on") == "on"
            living = self.judge.living(name)
            running = [qemu for qemu in living if qemu.writes]
            if wanted and (len(running) != 1 or len(living) != 1):
                found = ", ".join(f"{one.pid} on {one.host} ({one.run_state}, {one.writes})" for one in living)
                status = self.status(name)
                reason = None if status is None else f"{status.host} {status.phase} {status.reason}"
                missing.append(f"{name} is to run once; there is: {found or 'none'}; its status: {reason}")
            elif not wanted and living:
                status = self.status(name)
                reason = None if status is None else f"{status.host} {status.phase} {status.reason}"
                missing.append(f"{name} is not to run, and {living[0].pid} does; its status: {reason}")
        return missing


class LogTap:
    """What supervisors log goes into the trace; an error of theirs in it is a violation."""

    def __init__(self) -> None:
        self.world: World | None = None

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        world = self.world
        if world is not None and not world.over:
            name = event.pop("event")
            broken = event.pop("exc_info", None)
            world.trace.add(LIFE.get().name, f"{method} {name} {event}")
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
