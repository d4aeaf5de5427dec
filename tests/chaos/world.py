"""A cluster on one machine: etcd's members, Ceph and every host in a network namespace of its own.

All of it is real but the hosts' walls: their processes see one another's, and share one kernel. What is looked at to
judge a run comes from etcd and from the disks; processes are only listed to be hit, and to be ended.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.spec import RbdDisk
from tests.chaos import guest
from tests.chaos.armed import FOLDER, Points
from tests.chaos.fabric import Fabric, Node, new_fabric
from tests.chaos.faults import Terms
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph
from tests.support.cluster import ROOT, Host, Keys, Qemu, eventually
from tests.support.etcd import EtcdCluster, EtcdMember, EtcdStartError, _reaper
from tests.support.net import Namespace

FLOOD = "flood"
"""The machine of `World.begin_flood`."""

RUN_DIR_SIZE = 32 << 20
"""Bytes of a host's run directory: twenty times what its machines need, and soon full."""

FILL_S = 0.005
"""Between two looks whether there is room again in a run directory that is to be full."""

ELECTION_S = 10.0
"""How long members may take to choose a leader: ten times what they do on a busy machine."""

LOOK_S = 0.2
"""Between two questions who leads."""

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Asked(Keys):
    """The keys, asked for as one asks an etcd that may be away: soon, and of a member that is well."""

    def try_lock(self, machine: str) -> Lock | None:
        """The machine's lock; None when there is none, or no answer.

        As one member knows it: a quorum that is away would be waited for, machine after machine, and the fault that
        took it away would last for a minute.
        """
        key = self.layout.lock_key(InstanceId(machine))
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            kvs = self._get("--consistency=s", "--", key).get("kvs", ())
            return Lock.from_json(base64.b64decode(kvs[0].get("value", ""))) if kvs else None
        return None

    def try_write(self, key: str, value: str) -> bool:
        """Write a key; False when etcd did not answer, and it may have been written."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.write(key, value)
            return True
        return False

    def try_delete(self, key: str) -> bool:
        """Delete a key; see `try_write`."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self._ctl("del", "--", key)
            return True
        return False

    def values(self, key: str) -> list[tuple[int, bytes | None]]:
        """Each value that a key ever had, with its revision, replayed by etcd; None where it was deleted."""
        end = self.write(f"{self.layout.facts}/end-of-history", "")
        found: list[tuple[int, bytes | None]] = []
        # One watch of all, so that it comes to the end.
        argv = self.etcd.client("watch", "--rev=1", "--prefix", "--write-out=json", self.layout.prefix)
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) as watch:
            try:
                assert watch.stdout is not None
                for line in watch.stdout:
                    answer: dict[str, Any] = json.loads(line)
                    for event in answer.get("Events", ()):
                        kv = event["kv"]
                        if base64.b64decode(kv["key"]).decode(errors="replace") == key:
                            gone = event.get("type") in {1, "DELETE"}
                            value = None if gone else base64.b64decode(kv.get("value", ""))
                            found.append((int(kv["mod_revision"]), value))
                        if int(kv["mod_revision"]) >= end:
                            return found
            finally:
                watch.kill()
        raise AssertionError(f"etcd's history ended before revision {end}")


class ChaosHost(Host):
    """A host in a namespace of its own.

    Args:
        keys: of its cluster.
        node: where it is.
        run_dir: on a file system of its own, which can be filled.
        programs: a folder in which its supervisor looks for programs first.
        settings: further environment variables.
    """

    def __init__(self, keys: Keys, node: Node, run_dir: Path, programs: Path | None, **settings: str) -> None:
        super().__init__(keys, node.name, run_dir=run_dir, **settings)
        self.node = node
        self._programs = programs
        # As `kvmsupervisor`, with failpoints.
        self.entry = "tests.chaos.armed"
        folder = self.folder / "points"
        folder.mkdir()
        self.points = Points(folder)
        self.settings[FOLDER] = str(folder)
        self.around = lambda *argv: node.inside.command("env", "-C", str(ROOT), *argv)
        self._watched: set[int] = set()

    @property
    def environment(self) -> dict[str, str]:
        found = super().environment
        return found if self._programs is None else found | {"PATH": f"{self._programs}:{found['PATH']}"}

    def launch(self, name: str | None = None) -> None:
        """Start the supervisor, under another host's name maybe; does not wait for anything."""
        self.settings["KVM_HOSTNAME"] = name or self.name
        super().launch()
        self._watch(self._watched | {self.pid})

    def qemus(self) -> list[Qemu]:
        found = super().qemus()
        guard = self.guard
        self._watch(
            {qemu.pid for qemu in found} | ({self.pid} if self.running else set()) | ({guard} if guard else set())
        )
        return found

    def crash(self) -> None:
        """As its power fails."""
        if self.running:
            self.kill9()
        self.kill_guard()
        for qemu in self.qemus():
            qemu.signal(signal.SIGKILL)

    def kill_guard(self) -> bool:
        """SIGKILL for the guard of law 7; False when there is none."""
        pid = self.guard
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def reboot(self) -> None:
        """Begin another life: nothing in /run, another boot id, a supervisor that starts."""
        for qemu in self.qemus():
            eventually(f"the end of QEMU {qemu.pid}", lambda qemu=qemu: not qemu.alive)  # type: ignore[misc]
        shutil.rmtree(self.run_dir, ignore_errors=True)
        file = self.folder / "boot_id"
        file.write_text(f"{uuid.uuid4()}\n")
        self.node.inside.run("mount", "--bind", str(file), _BOOT_ID)
        self.launch()

    def record_of(self, instance: str) -> str:
        """What is on record of the QEMU of an instance; empty without a record."""
        file = self.run_dir / instance / "incarnation.json"
        return file.read_text(errors="replace") if file.exists() else ""

    def fill_run_dir(self) -> Callable[[], None]:
        """Leave no byte free in the run directory, whoever frees one; returns what ends that."""
        filler = self.run_dir / "filler"
        done = threading.Event()

        def fill() -> None:
            with filler.open("ab", buffering=0) as file:
                while not done.wait(FILL_S):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(4096))

        thread = threading.Thread(target=fill)
        thread.start()

        def end() -> None:
            done.set()
            thread.join()
            filler.unlink()

        return end

    @property
    def run_dir_used(self) -> int:
        """Bytes of its file system that are taken."""
        found = os.statvfs(self.run_dir)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def close(self) -> None:
        super().close()
        self._watch(set())

    def _watch(self, alive: set[int]) -> None:
        """Have these killed if this process is; a pid that is free by now may be anybody's."""
        for pid in alive - self._watched:
            _reaper().watch(pid)
        for pid in self._watched - alive:
            _reaper().forget(pid)
        self._watched = alive


class World:
    """The cluster, while it lives; `new_world` makes it."""

    def __init__(self, stack: ExitStack, terms: Terms, fabric: Fabric, programs: Path | None) -> None:
        self.terms = terms
        self.guarded = frozenset({"guarded"} if terms.guarded else ())
        self.machines = (*(f"vm{number}" for number in range(terms.machines)), *self.guarded)
        self.image = {machine: RbdDisk(POOL, machine) for machine in self.machines}
        self._nodes = {name: fabric.node(name) for name in ("m0", "m1", "m2", "ceph", "witness")}
        members = [self._nodes[name] for name in ("m0", "m1", "m2")]
        witness = self._nodes["witness"].inside.command
        self.etcd = stack.enter_context(EtcdCluster(3, places=[one.place for one in members], around=witness))
        self.ceph = stack.enter_context(Ceph(self._nodes["ceph"].place))
        self.ceph.new_client("vm", CLIENT_CAPS)
        self.keys = Asked(self.etcd)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvs", dir="/tmp")))
        folder.chmod(0o755)
        self.guest = guest.build(folder)
        settings = {
            "CEPH_CONF": str(self.ceph.conf),
            "CEPH_ID": "vm",
            "KVM_QEMU": str(guest.qemu_wrapper(folder)),
            "KVM_QEMU_USER": "",
            "KVM_EXTRA_FLAGS": "any",
            "KVM_SESSION_TTL": f"{terms.ttl_s:.0f}",
            "KVM_TAKEOVER_WAIT": f"{terms.wait_s:g}",
            "KVM_SHUTDOWN_TIMEOUT": "0",
            "KVM_LOG_MAX_BYTES": "256K",
            **({"KVM_UNFENCED": "guard"} if terms.guarded else {}),
        }
        self.hosts: list[ChaosHost] = []
        for number in range(terms.hosts):
            # Before the host's namespace is made, which takes a copy of all mounts.
            run_dir = stack.enter_context(_small(folder / f"run{number}"))
            host = ChaosHost(self.keys, fabric.node(f"h{number}"), run_dir, programs, **settings)
            stack.callback(host.close)
            self.hosts.append(host)
        self._flood = guest.build_flood(folder)
        self._where: dict[str, ChaosHost] = {}
        self._backup, self._backup_revision = folder / "backup", 0
        # What each lock was in former histories of etcd, and up to which revision the present one shares them.
        self._former: dict[str, list[Lock | None]] = {machine: [] for machine in self.machines}
        self._shared_revision = 0

    def begin(self) -> None:
        """Make the disks, and start the supervisors."""
        for host in self.hosts:
            host.launch()
        for machine in self.machines:
            self.guest.make_disk(self.ceph, self.image[machine])
        for host in self.hosts:
            eventually(f"the session of {host.name}", lambda host=host: self._began(host))  # type: ignore[misc]

    def _began(self, host: ChaosHost) -> bool:
        assert host.running, f"the supervisor of {host.name} ended by itself:\n{host.log}"
        return self.has_session(host)

    def begin_machine(self, machine: str) -> None:
        """Write its keys: each machine begins on the next host."""
        self.keys.put(machine, **self.wishes(machine), host=self._first_host(machine).name)

    def wishes(self, machine: str) -> Mapping[str, str]:
        """All keys of a machine but `host`."""
        usual = {"ram": str(self.guest.ram_mib), "rbd": self.image[machine].name}
        if machine in self.guarded:
            # What is not known to be harmless counts as a file of the host's.
            return {**usual, "extra_flags": "-fw_cfg name=opt/unknown,string=x"}
        first = self.hosts.index(self._first_host(machine))
        return {**usual, "hosts": " ".join(host.name for host in (*self.hosts[first:], *self.hosts[:first]))}

    def _first_host(self, machine: str) -> ChaosHost:
        return self.hosts[self.machines.index(machine) % len(self.hosts)]

    # --- who is where -----------------------------------------------------------------------------------------

    def host(self, name: str) -> ChaosHost:
        """A host by its name."""
        return next(host for host in self.hosts if host.name == name)

    def host_of(self, machine: str) -> ChaosHost:
        """Who has its lock; while etcd does not tell, who had it when it last told."""
        lock = self.keys.try_lock(machine)
        if lock is not None:
            self._where[machine] = self.host(lock.host)
        return self._where.get(machine, self._first_host(machine))

    def machines_of(self, host: ChaosHost) -> list[str]:
        """The machines whose lock a host has."""
        return [machine for machine in self.machines if self.host_of(machine) is host]

    def qemus_of(self, machine: str) -> list[Qemu]:
        """The QEMUs of a machine on all hosts, living ones."""
        return [qemu for host in self.hosts for qemu in host.qemus() if qemu.instance == machine]

    def runs(self, machine: str) -> Lock | None:
        """Its lock, if that says that its guest runs."""
        lock = self.keys.try_lock(machine)
        return lock if lock is not None and lock.state is LockState.RUNNING else None

    def has_session(self, host: ChaosHost) -> bool:
        """Whether etcd has its session."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            return self.keys.session(host.name) is not None
        return False

    # --- links ------------------------------------------------------------------------------------------------

    @property
    def witness(self) -> Namespace:
        """The network from which all that does not fail is seen."""
        return self._nodes["witness"].inside

    @property
    def etcd_addresses(self) -> list[str]:
        """Of etcd's members."""
        return [self._nodes[name].address for name in ("m0", "m1", "m2")]

    @property
    def ceph_address(self) -> str:
        """Of monitor and OSD."""
        return self._nodes["ceph"].address

    # --- keys -------------------------------------------------------------------------------------------------

    def wish_key(self, machine: str, name: str) -> str:
        """A key of a machine."""
        return self.keys.layout.wish_key(InstanceId(machine), name)

    def lock_key(self, machine: str) -> str:
        """The key of its lock."""
        return self.keys.layout.lock_key(InstanceId(machine))

    def status_key(self, machine: str) -> str:
        """The key of its status."""
        return self.keys.layout.status_key(InstanceId(machine))

    def session_key(self, host: ChaosHost) -> str:
        """The key of a host's session."""
        return self.keys.layout.session_key(HostName(host.name))

    def locks(self, machine: str) -> list[Lock | None]:
        """Each value that its lock ever had, in all histories; None where it was deleted.

        What nobody can read is left out.
        """
        found = list(self._former[machine])
        for revision, value in self.keys.values(self.lock_key(machine)):
            lock = None if value is None else Lock.from_json(value)
            if revision > self._shared_revision and (value is None or lock is not None):
                found.append(lock)
        return found

    # --- etcd's data ------------------------------------------------------------------------------------------

    def back_up(self) -> None:
        """Make the backup that `restore` goes back to."""
        self._backup_revision = self.etcd.back_up(self._backup)

    def restore(self) -> None:
        """Have etcd begin again with the backup."""
        self._begin_history(self._backup, self._backup_revision)

    def wipe(self) -> None:
        """Have etcd begin again with nothing."""
        self._begin_history(None, 0)

    def _begin_history(self, backup: Path | None, revision: int) -> None:
        self._former = {machine: self.locks(machine) for machine in self.machines}
        self._shared_revision = revision
        self.etcd.restore(backup)

    # --- one more machine -------------------------------------------------------------------------------------

    def begin_flood(self, host: ChaosHost) -> bool:
        """Have a machine on this host that floods its console; False when its keys may not be written."""
        drive = f"-drive file={self._flood},format=raw,if=virtio,readonly=on"
        wishes = {"ram": "16", "extra_flags": drive, "host": host.name}
        return all(self.keys.try_write(self.wish_key(FLOOD, name), value) for name, value in wishes.items())

    def end_flood(self) -> bool:
        """Take its keys away; False when etcd did not answer."""
        return all(self.keys.try_delete(self.wish_key(FLOOD, name)) for name in ("ram", "extra_flags", "host"))

    # --- etcd's members ---------------------------------------------------------------------------------------

    def leader(self) -> EtcdMember | None:
        """Who leads now; None when nobody does for a while."""
        deadline = time.monotonic() + ELECTION_S
        while time.monotonic() < deadline:
            with contextlib.suppress(EtcdStartError):
                return self.etcd.leader()
            time.sleep(LOOK_S)
        return None

    def freeze_members(self, members: Sequence[EtcdMember]) -> Callable[[], None]:
        """Freeze them; returns what ends that. The test itself asks another one meanwhile."""
        for member in members:
            member.freeze()
        self._ask_the_living()

        def end() -> None:
            for member in members:
                if member.running and member.frozen:
                    member.thaw()
            self._ask_the_living()

        return end

    def kill_member(self, member: EtcdMember) -> Callable[[], None]:
        """Kill it; returns what starts it again."""
        member.kill()
        self._ask_the_living()

        def end() -> None:
            if not member.running:
                member.start()
            self._ask_the_living()

        return end

    def _ask_the_living(self) -> None:
        living = [member.endpoint for member in self.etcd.members if member.running and not member.frozen]
        self.keys.endpoint = living[0] if living else None


@contextmanager
def _small(folder: Path) -> Iterator[Path]:
    """A file system of its own that is soon full, in memory as /run is."""
    folder.mkdir()
    options = f"size={RUN_DIR_SIZE},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, timeout=10)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)


@contextmanager
def new_world(terms: Terms, *, programs: Path | None = None) -> Iterator[World]:
    """A cluster whose machines are started; at the end nothing of it is left.

    Args:
        terms: its size, and what its supervisors are set to.
        programs: a folder that supervisors look for programs in first; for sabotage.
    """
    with ExitStack() as stack:
        fabric = stack.enter_context(new_fabric())
        yield World(stack, terms, fabric, programs)
