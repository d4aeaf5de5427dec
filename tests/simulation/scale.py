"""A large cluster in one process: what etcd is asked, and what a host spends, in a few stories.

    python -m tests.simulation.scale --hosts 200 --instances 2000 --story mass-start
    python -m tests.simulation.scale_real --hosts 20 --instances 100 [--proxy]

Every supervisor is production's, whole, on fake QEMUs and a fake Ceph; etcd is `scale_etcd`'s in virtual time, or that
of `scale_real` in real time. docs/scale.md tells what came of it.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import structlog

from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.instance.assembly import REAL
from kvmsupervisor.machine.host import HostFacts
from kvmsupervisor.supervisor.host import Host
from kvmsupervisor.supervisor.supervisor import Supervisor
from tests.fakes.etcd import FakeEtcd
from tests.simulation.ceph import CephCluster, SimCeph
from tests.simulation.clock import SimClock
from tests.simulation.host import PREFIX, settings_of
from tests.simulation.loop import LIFE, WORLD, Life, SimLoop, context_of, run_on
from tests.simulation.outside import outside
from tests.simulation.qemu import SimQemu, SimQemus
from tests.simulation.scale_etcd import Asked, ScaleEtcd, ScaleServer

CANDIDATES = 3
"""How many hosts the key `hosts` of each instance names."""

BOOT_S = 5.0
"""Within which all hosts are there after an outage."""

PATIENCE_S = 3600.0
"""Virtual time after which a story has failed."""

REST_S = 60.0
"""How long nothing happens in the story `rest`."""

AWAY_S = 40.0
"""How long etcd does not answer in the story `etcd-away`: longer than a session."""

APART = "/kvmsupervisor/locks/%i"
"""`LOCK` outside the wishes."""


class FifoLoop(SimLoop):
    """Virtual time in which what is ready runs in its order; the time that each life's callbacks take is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.spent_ns: Counter[Life] = Counter()
        self._line: deque[tuple[Life, asyncio.Handle]] = deque()

    def _enqueue(self, handle: asyncio.Handle) -> None:
        life: Life = handle._context.get(LIFE, WORLD)  # type: ignore[attr-defined]
        if life not in self._lives:
            self._lives[life] = len(self._order)
            self._order.append(life)
        if life.dead:
            self._morgue.append(handle)
        else:
            self._line.append((life, handle))

    def _run_once(self) -> None:
        if not self._line:
            self._advance()
            return
        life, handle = self._line.popleft()
        if life.dead:
            self._morgue.append(handle)
        elif not handle.cancelled():
            self.steps += 1
            begun = time.perf_counter_ns()
            handle._run()
            self.spent_ns[life] += time.perf_counter_ns() - begun
            owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
            if isinstance(owner, asyncio.Task) and owner.done():
                self._lane_of.pop(owner, None)


class Unwatched:
    """Nobody judges."""

    def spawned(self, qemu: SimQemu) -> None:
        pass

    ended = spawned

    def continued(self, qemu: SimQemu, *, again: bool) -> None:
        pass

    def ended_by_us(self, qemu: SimQemu, how: str) -> None:
        pass


_facts: list[HostFacts] = []


def facts_of(settings: Settings) -> HostFacts:
    """Those of this machine, asked once; with memory for all that a host has to run."""
    if not _facts:
        _facts.append(replace(REAL.gather_host_facts(settings), memory_mib=1 << 20))
    return _facts[0]


class ScaleHost:
    """One host, its kernel, and its supervisor."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.name = f"h{number:04}"
        self.life: Life | None = None
        self.parts: Host | None = None
        self.store: Store | None = None
        self.run_dir = cluster.folder / self.name
        self._cluster = cluster
        self._number = number
        self._chance = Random(f"host {number}")
        self._supervisor: Supervisor | None = None
        self._task: asyncio.Task[bool] | None = None
        self._boots = 0
        self.lives: list[Life] = []
        self.boot()

    def boot(self) -> None:
        """Power is there."""
        self._boots += 1
        self._hardware = Life(f"{self.name}/hardware")
        self._clock = SimClock(asyncio.get_running_loop(), since_s=1000.0, hardware=context_of(self._hardware))
        self.kernel = SimQemus(
            self.name,
            self._number,
            clock=self._clock,
            ceph=self._cluster.ceph,
            chance=self._chance,
            watcher=Unwatched(),
        )

    def start(self) -> None:
        """Start a supervisor."""
        cluster = self._cluster
        life = self.life = Life(f"{self.name}#{len(self.lives)}")
        self.lives.append(life)
        settings = settings_of(self.name, PREFIX, str(self.run_dir), cluster.lock, cluster.endpoint)
        self._supervisor = Supervisor(
            settings,
            replace(
                outside(
                    clock=self._clock,
                    system=self.kernel.system,
                    jitter=self._chance.random,
                    boot_id=f"boot-{self.name}-{self._boots}",
                    machine_id=f"machine-{self.name}",
                    connect=self._connect,
                    ceph=lambda: SimCeph(cluster.ceph, reach=lambda: True, tell=lambda what: None),
                ),
                gather_host_facts=facts_of,
            ),
        )

        def keep(parts: Host) -> None:
            self.parts = parts

        run = self._supervisor.run(keep)
        self._task = asyncio.get_running_loop().create_task(run, context=context_of(life))

    def _connect(self) -> Store:
        self.store = self._cluster.connect()
        return self.store

    async def stop(self) -> None:
        """SIGTERM; its guests run on."""
        assert self._supervisor is not None
        assert self._task is not None
        assert self.life is not None
        self._supervisor.stop()
        await self._task
        self.kernel.forget(self.life)
        self.parts = None

    async def lose_power(self) -> None:
        """All that was in memory is gone."""
        assert self.life is not None
        assert self._supervisor is not None
        if isinstance(self.store, ScaleEtcd):
            self.life.dead = self._hardware.dead = True
            self._supervisor._run_dir.release()
            self.kernel.forget(self.life)
            self.store.die()
        else:
            # A supervisor that is told to stop leaves its session to run out, as one does that is gone.
            await self.stop()
        for qemu in self.kernel.living:
            qemu.vanish()
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.parts = None

    @property
    def running(self) -> int:
        """How many guests of it run."""
        return sum(qemu.run_state == "running" for qemu in self.kernel.living)

    @property
    def ready(self) -> bool:
        return self.parts is not None and self.parts.http_view.ready()[0]


class Cluster:
    """Hosts, instances, one etcd. What differs between a simulated etcd and a real one is in the two subclasses.

    Args:
        hosts: how many.
        instances: of all of them.
        lock: `LOCK`; None for the default.
    """

    endpoint = "http://127.0.0.1:1"
    boot_s = BOOT_S

    def __init__(self, hosts: int, instances: int, lock: str | None, folder: Path) -> None:
        self.folder = folder
        self.lock = lock
        self.instances = instances
        self.ceph = CephCluster(lambda: asyncio.get_running_loop().time(), Random("ceph"))
        self.hosts = [ScaleHost(self, number) for number in range(hosts)]
        self.dead: set[ScaleHost] = set()

    # --- its etcd ---------------------------------------------------------------------------------------------

    def connect(self) -> Store:
        raise NotImplementedError

    async def load(self, keys: dict[str, str]) -> None:
        """Write keys as people do."""
        raise NotImplementedError

    async def asked(self) -> Asked:
        """What etcd was asked so far."""
        raise NotImplementedError

    def spent_s(self) -> dict[str, float]:
        """Seconds of processor time of each host so far."""
        raise NotImplementedError

    # --- all of it --------------------------------------------------------------------------------------------

    def wishes(self) -> dict[str, str]:
        """What people have written: seven keys for each instance."""
        keys = {}
        for number in range(self.instances):
            first = number % len(self.hosts)
            hosts = [self.hosts[(first + step * 7) % len(self.hosts)].name for step in range(1, CANDIDATES + 1)]
            for name, value in {
                "host": self.hosts[first].name,
                "hosts": " ".join(dict.fromkeys(hosts)),
                "ram": "512M",
                "cpus": "2",
                "rbd": f"rbd/image-of-vm{number:05}",
                "shutdown_timeout": "60",
                "description": f"machine {number} of a large cluster",
            }.items():
                keys[f"/kvm/vm{number:05}/{name}"] = value
        return keys

    @property
    def running(self) -> int:
        return sum(host.running for host in self.hosts if host not in self.dead)

    @property
    def all_is_well(self) -> bool:
        """Everything runs, every supervisor is ready."""
        return self.running == self.instances and all(host.ready for host in self.hosts if host not in self.dead)

    async def until(self, true: Callable[[], bool], step_s: float = 0.25) -> float:
        """Wait; return how long it took."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not true():
            if loop.time() > begun + PATIENCE_S:
                raise TimeoutError(f"{self.running} of {self.instances} run")
            await asyncio.sleep(step_s)
        return loop.time() - begun

    async def start_all(self, within_s: float) -> None:
        loop, chance = asyncio.get_running_loop(), Random("boots")
        for at, host in sorted((chance.random() * within_s, host.name) for host in self.hosts):
            loop.call_later(at, next(one for one in self.hosts if one.name == host).start)
        await asyncio.sleep(within_s)


class Simulated(Cluster):
    """On `scale_etcd`."""

    def __init__(self, hosts: int, instances: int, lock: str | None, folder: Path, loop: FifoLoop) -> None:
        super().__init__(hosts, instances, lock, folder)
        self.server = ScaleServer(loop.time)
        self._loop = loop
        self._data = FakeEtcd(server=self.server)
        self._ticking = loop.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.server.tick()

    def connect(self) -> ScaleEtcd:
        return ScaleEtcd(self._data.peer(), self.server)

    async def load(self, keys: dict[str, str]) -> None:
        for key, value in keys.items():
            self._data.write(key, value)

    async def asked(self) -> Asked:
        return self.server.asked.copy()

    def spent_s(self) -> dict[str, float]:
        return {host.name: sum(self._loop.spent_ns[life] for life in host.lives) / 1e9 for host in self.hosts}


# --- the stories --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Told:
    """What came of a story.

    Attributes:
        took_s: until all was well.
        asked: of etcd meanwhile.
        per_host_s: processor time of a host, on average, and of the busiest.
        peak_mib: of this process.
    """

    story: str
    hosts: int
    instances: int
    lock: str
    took_s: float
    asked: Asked
    per_host_s: tuple[float, float]
    more: dict[str, float] = field(default_factory=dict)


async def mass_start(cluster: Cluster) -> float:
    """All hosts boot after an outage; nothing runs yet."""
    begun = asyncio.get_running_loop().time()
    await cluster.start_all(cluster.boot_s)
    await cluster.until(lambda: cluster.all_is_well)
    return asyncio.get_running_loop().time() - begun


async def dead_tenth(cluster: Cluster) -> float:
    """A tenth of the hosts loses power at once."""
    for host in cluster.hosts[::10]:
        cluster.dead.add(host)
        await host.lose_power()
    return await cluster.until(lambda: cluster.all_is_well)


async def rolling_upgrade(cluster: Cluster) -> float:
    """Each supervisor is replaced, one after the other, guests running."""
    begun = asyncio.get_running_loop().time()
    for host in cluster.hosts:
        await host.stop()
        host.start()
        await cluster.until(lambda host=host: host.ready, 0.1)  # type: ignore[misc]
    await cluster.until(lambda: cluster.all_is_well)
    return asyncio.get_running_loop().time() - begun


async def etcd_away(cluster: Cluster) -> float:
    """Etcd does not answer for longer than a session; how long until all hosts are ready again."""
    assert isinstance(cluster, Simulated)
    cluster.server.up = False
    await asyncio.sleep(AWAY_S)
    cluster.server.come_back()
    return await cluster.until(lambda: cluster.all_is_well)


async def rest(cluster: Cluster) -> float:
    """Nothing happens."""
    await asyncio.sleep(REST_S)
    return REST_S


STORIES: dict[str, Callable[[Cluster], Awaitable[float]]] = {
    "mass-start": mass_start,
    "rest": rest,
    "rolling-upgrade": rolling_upgrade,
    "etcd-away": etcd_away,
    "dead-tenth": dead_tenth,
}
"""In an order in which one cluster can play all of them."""


async def play(
    cluster: Cluster, stories: list[str], on_told: Callable[[Told], object] = lambda told: None
) -> list[Told]:
    """Play stories, after one another; what is needed before them is not told."""
    told = []
    await cluster.load(cluster.wishes())
    for name in dict.fromkeys(["mass-start", *stories]):
        before, spent = await cluster.asked(), cluster.spent_s()
        took_s = await STORIES[name](cluster)
        after = cluster.spent_s()
        used = [after[host.name] - spent[host.name] for host in cluster.hosts if host not in cluster.dead]
        if name in stories:
            told.append(
                Told(
                    story=name,
                    hosts=len(cluster.hosts),
                    instances=cluster.instances,
                    lock=cluster.lock or "default",
                    took_s=took_s,
                    asked=(await cluster.asked()).since(before),
                    per_host_s=(sum(used) / len(used), max(used)),
                )
            )
            on_told(told[-1])
        # What is still under way, such as statuses, belongs to nothing.
        await asyncio.sleep(20.0 if isinstance(cluster, Simulated) else 3.0)
    return told


def simulate(stories: list[str], hosts: int, instances: int, lock: str | None) -> list[Told]:
    """Play stories in virtual time."""
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    async def playing(loop: FifoLoop) -> list[Told]:
        return await play(Simulated(hosts, instances, lock, folder, loop), stories)

    try:
        with silent():
            return run_on(FifoLoop(), playing)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def silent() -> Iterator[None]:
    """Without the log."""
    before = structlog.get_config()

    def drop(logger: Any, method: str, event: Any) -> Any:
        raise structlog.DropEvent

    structlog.configure(
        processors=[drop], wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=False
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def show(told: Told) -> str:
    asked, number = told.asked, told.hosts
    total = sum(asked.requests.values())
    lines = [
        f"{told.story}: {told.hosts} hosts, {told.instances} instances, LOCK {told.lock}: {told.took_s:.1f} s",
        f"  requests {total} ({total / number:.1f} a host): {_listed(asked.requests)}",
        f"  bytes of answers {_listed(asked.sent)}",
        f"  watch events {sum(asked.events.values())} ({sum(asked.events.values()) / number:.1f} a host): "
        f"{_listed(asked.events)}",
        f"  etcd works {asked.busy_s:.2f} s (by the model); a host {1e3 * told.per_host_s[0]:.0f} ms, "
        f"the busiest {1e3 * told.per_host_s[1]:.0f} ms",
    ]
    return "\n".join([*lines, *(f"  {name} {value:g}" for name, value in told.more.items())])


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def parser() -> argparse.ArgumentParser:
    """What both commands are told."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hosts", type=int, default=20)
    made.add_argument("--instances", type=int, default=None, help="of all hosts; ten for each where it is not said")
    made.add_argument("--story", choices=sorted(STORIES), nargs="+", default=["mass-start"])
    made.add_argument("--locks-apart", action="store_true", help=f"LOCK={APART}")
    return made


def main() -> int:
    """The command."""
    told = parser().parse_args()
    lock = APART if told.locks_apart else None
    for one in simulate(told.story, told.hosts, told.instances or 10 * told.hosts, lock):
        print(show(one), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
