"""One host of the simulation: hardware, kernel, its way to etcd and Ceph, and the supervisor that lives on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsupervisor.adapters.rundir import AlreadyRunning, RunDir
from kvmsupervisor.cluster.session import HostnameTaken
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.identity import HostIdentity
from kvmsupervisor.domain.incarnation import Unreadable
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.instance.assembly import Outside
from kvmsupervisor.supervisor.host import Host
from kvmsupervisor.supervisor.identity import Standing
from kvmsupervisor.supervisor.supervisor import Supervisor
from tests.simulation.clock import SimClock
from tests.simulation.etcd import SimEtcd, Weather
from tests.simulation.loop import Life, context_of
from tests.simulation.outside import outside
from tests.simulation.qemu import SimQemu, SimQemus
from tests.simulation.tries import TriedCeph, TriedEtcd

if TYPE_CHECKING:
    from tests.simulation.world import World

LASTS_S = 1.0
"""The longest time that memory is sent once nothing is wrong any more."""

AGAIN_S = 2.0
"""Pause before a supervisor that ended by itself is started again, as its unit does (`RestartSec=`)."""


PREFIX = "/kvm"
NOWHERE = "http://127.0.0.1:1"
"""An endpoint for who has another way to etcd."""
"""The prefix that is the right one."""


class SupervisorLife(Life):
    """One supervisor, from its start to its end."""

    def __init__(self, host: SimHost, number: int) -> None:
        super().__init__(f"{host.name}#{number}")
        self.host = host
        self.supervisor: Supervisor | None = None
        self.parts: Host | None = None
        self.client: SimEtcd | None = None

    @property
    def holds_session(self) -> bool:
        """Whether this supervisor believes that it has its session."""
        return self.parts is not None and self.parts._session.held


@lru_cache(maxsize=64)
def settings_of(
    name: str,
    prefix: str,
    run_dir: str,
    lock: str | None,
    endpoint: str = NOWHERE,
    *,
    more: tuple[tuple[str, str], ...] = (),
) -> Settings:
    """What a host is set to: defaults, but for what would touch this machine, and `more`."""
    environ = {
        "ETCD_ENDPOINTS": endpoint,
        "KVM_HOSTNAME": name,
        "KVM_PREFIX": prefix,
        "KVM_RUN_DIR": run_dir,
        "KVM_STATE_DIR": f"{run_dir}-state",
        "KVM_LISTEN": "off",
        "KVM_ACCEL": "tcg",
        "KVM_CGROUP": "none",
        **({} if lock is None else {"LOCK": lock}),
        **dict(more),
    }
    return load_settings(environ, default_config=Path(run_dir, "none.toml"))


class SimHost:
    """One host: its hardware, its kernel, its way to etcd and Ceph, and the supervisor that lives on it now.

    Attributes:
        name: `KVM_HOSTNAME`, as its present settings say.
        true_name: as they say when nobody has made a mistake.
        prefix: `KVM_PREFIX`, as its present settings say.
        astray: they name another cluster's etcd.
        was_earlier: its last supervisor was of an earlier release.
        powered: it has power.
        frozen: nothing on it runs.
    """

    def __init__(self, world: World, number: int, name: str) -> None:
        self.world = world
        self.number = number
        self.name = self.true_name = name
        self.prefix = PREFIX
        self.astray = self.was_earlier = False
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
        self.clock = SimClock(self.world.loop, since_s=since_s, hardware=hardware)
        self.kernel = SimQemus(
            self.true_name,
            self.number + 1,
            clock=self.clock,
            ceph=self.world.ceph,
            net=self.world.net,
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
        life.client = TriedEtcd(
            (world.elsewhere if self.astray else world.etcd).peer(),
            weather=self.weather,
            quorum=world.quorum,
            chance=world.chance.of(f"net {life.name}"),
            tell=lambda what: world.trace.add(life.name, what),
            tries=world.looks.tries,
            who=life.name,
        )
        return life.client

    def ceph_client(self) -> TriedCeph:
        name = self.true_name
        return TriedCeph(
            self.world.ceph,
            reach=lambda: self.reaches_ceph,
            tell=lambda what: self.world.trace.add(name, what),
            tries=self.world.looks.tries,
        )

    # --- its supervisor ---------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The present ones."""
        more = {name: value.format(number=self.number + 1) for name, value in self.world.settings.items()}
        known = self.name, self.prefix, str(self.run_dir), self.world.lock_template
        return settings_of(*known, more=tuple(more.items()))

    def start(self) -> None:
        """Start a supervisor, unless one lives."""
        if self.life is not None or not self.powered:
            return
        if self.was_earlier:
            self.was_earlier = False
            self._leave_unvouched()
        self._lives += 1
        life = self.life = SupervisorLife(self, self._lives)
        life.frozen = self.frozen
        where = " in another cluster" if self.astray else ""
        self.world.trace.add(self.true_name, f"supervisor starts as {self.name} at {self.prefix}{where}")
        task = self.world.loop.create_task(self._live(life), context=context_of(life))
        task.add_done_callback(lambda done: self._over(life, done), context=context_of(self.hardware))

    async def _live(self, life: SupervisorLife) -> bool:
        supervisor = life.supervisor = Supervisor(self.settings, self._outside(life))

        def keep(parts: Host) -> None:
            life.parts = parts

        return await supervisor.run(keep)

    def _over(self, life: SupervisorLife, task: asyncio.Task[bool]) -> None:
        """A supervisor has ended by itself, or as it was told."""
        error = None if task.cancelled() else task.exception()
        self.world.trace.add(self.true_name, f"supervisor ended: {error!r}")
        if self.world.over:
            return
        if task.cancelled() or (error is not None and not _is_usual(error)):
            self.world.judge.wrong("no part ends", f"the supervisor of {self.true_name} ended with {error!r}")
        self.world.looks.tries.over(life.name)
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
        self.world.looks.tries.over(life.name)
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

    def start_with(self, *, name: str | None = None, prefix: str = PREFIX, astray: bool = False) -> None:
        """Start its supervisor again with these settings; without any, with the right ones."""
        self.kill()
        self.name, self.prefix, self.astray = name or self.true_name, prefix, astray
        self.start()

    @property
    def is_set_right(self) -> bool:
        return (self.name, self.prefix, self.astray) == (self.true_name, PREFIX, False)

    def confirm_identity(self) -> bool:
        """A person says that what runs goes on under the present settings; False when nobody has asked."""
        settings = self.settings
        wanted = HostIdentity.of(settings.hostname, settings.layout)
        standing = Standing(self.kernel, RunDir(self.run_dir), wanted=wanted, boot_id=self.boot_id)
        note = standing.note()
        if note is None or note.confirmed or note.wanted != wanted:
            return False
        for name, under in standing.living():
            # First the keys, or guests would be shut down.
            if under == note.recorded and self.world.wishes.get(name, {}).get("host"):
                self.world.judge.ordered(name, f"goes on on {self.name}")
                self.world.put(name, host=self.name)
        standing.confirm(note)
        self.world.trace.add("people", f"confirm that {self.true_name} is {self.name}")
        return True

    # --- its run directory ------------------------------------------------------------------------------------

    def lose_records(self) -> None:
        """Somebody empties the run directory, between two supervisors."""
        self.kill()
        self.world.looks.excuse(self.kernel.living)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.world.trace.add(self.true_name, "its run directory is empty")

    def damage_record(self, instance: str) -> None:
        """What is on record of one QEMU cannot be read any more; as after a fault of the file system."""
        record = self.run_dir / instance / "incarnation.json"
        if record.exists():
            record.write_bytes(b"{")
            self.world.looks.excuse(qemu for qemu in self.kernel.living if qemu.instance == instance)
            self.world.trace.add(self.true_name, f"the record of {instance} is damaged")

    def _leave_unvouched(self) -> None:
        """Leave its guests as a release did that did not repeat their clients among the facts."""
        for path in sorted(self.run_dir.glob("*/incarnation.json")):
            with contextlib.suppress(ValueError):
                record = json.loads(path.read_bytes())
                record.pop("vouched", None)
                path.write_text(json.dumps(record))
        theirs = [qemu.instance for qemu in self.kernel.living if self._holds(qemu)]
        self.world.erase([self.world.layout.clients_key(InstanceId(name)) for name in theirs])
        self.world.trace.add(self.true_name, "its last supervisor was of an earlier release")

    def _holds(self, qemu: SimQemu) -> bool:
        """Whether the lock of a QEMU here is its own."""
        lock = self.world.lock(qemu.instance)
        return lock is not None and lock.incarnation == qemu.incarnation

    def end_the_unrecorded(self) -> None:
        """A person ends what lives and cannot be adopted, as its reason says, and takes away what cannot be read."""
        recorded = set()
        for path in sorted(self.run_dir.glob("*/incarnation.json")):
            try:
                record = RunDir(self.run_dir).instance(InstanceId(path.parent.name)).read_incarnation()
            except Unreadable:
                path.unlink()
            else:
                recorded.add(record and record.incarnation)
        for qemu in self.kernel.living:
            if qemu.incarnation not in recorded:
                self.world.judge.ordered(qemu.instance, f"{qemu.pid} on {self.true_name} is ended by hand")
                qemu.crash(15)

    # --- all of it --------------------------------------------------------------------------------------------

    def freeze(self, *, on: bool) -> None:
        """The whole host stands still, guests and all; thawed, its clients in Ceph are back, unless shut out."""
        if not self.powered:
            return
        self.world.look_at_watches()
        self.frozen = self.hardware.frozen = on
        if self.life is not None:
            self.life.frozen = on
        self.world.trace.add(self.true_name, "frozen" if on else "thawed")
        self._is_on_the_net(on=not on)
        self.weather_changed()
        for qemu in self.kernel.living:
            image = qemu.image
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
        self._is_on_the_net(on=False)
        self.world.net.gone(self.kernel.transfers, lambda context: True, silently=True)
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
        # One that has just booted, and is led to a copy, knows nothing that would tell it (decision 0028).
        self.astray = self.astray and not self.world.is_copied
        self._boot()
        self._is_on_the_net(on=True)
        self.start()

    def _is_on_the_net(self, *, on: bool) -> None:
        """Whether its kernel answers other hosts."""
        (self.world.net.down.discard if on else self.world.net.down.add)(self.true_name)
        self.world.net.changed()

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
        self.clock.skew_s = 0.0
        self.kernel.no_program = self.kernel.lose_answer_to = self.kernel.dies_at = None
        self.kernel.next_words.clear()
        self.kernel.hidden.clear()
        self.kernel.hangs_until = self.kernel.fails_until = 0.0
        for qemu in self.kernel.living:
            qemu.deaf = qemu.stubborn = qemu.frozen = qemu.mute = False
            qemu.migration.lasts_s = min(qemu.migration.lasts_s, LASTS_S)
            if self.world.is_the_guests(qemu):
                qemu.resume()
        self.end_the_unrecorded()
        self.boot()
        if not self.is_set_right:
            self.start_with()
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
