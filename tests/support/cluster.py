"""A cluster as its operators have it: keys in a real etcd, and hosts, each a real supervisor with its QEMUs.

Everything here blocks; a wait polls until its deadline, which is generous: it only ends what would never end. Fixtures,
to be imported by a conftest:

- `keys`: the keys of a cluster of its own, on the etcd that all tests of a worker share.
- `hosts`: makes hosts of that cluster, and ends them and their QEMUs with the test.
- `tiny`: `extra_flags` of a machine that needs no guest and no CPU time.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmsupervisor.adapters.etcd import Batch, Delete, Etcd, EtcdConfig, Put
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.status import Phase, Status
from tests.support import fork_server
from tests.support.etcd import EtcdCluster, EtcdServer
from tests.support.processes import freeze, stat_of

ROOT = Path(__file__).resolve().parents[2]

DEADLINE_S = 90.0
"""For one wait. What goes well takes a second; a machine that does other things too may need twenty."""

ECHO_S = 20.0
"""How long a guest may take to echo what is typed, before it is typed again. Arbitrary; it takes a second at most."""

POLL_S = 0.05

PROC = Path("/proc")

T = TypeVar("T")


def eventually(what: str, look: Callable[[], T | None], deadline_s: float = DEADLINE_S, *, poll_s: float = POLL_S) -> T:
    """Call `look` until it returns something that counts as true; return that. A dear look is taken less often."""
    deadline = time.monotonic() + deadline_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not so within {deadline_s:g} s, last seen: {found!r}"
        time.sleep(poll_s)


# --- keys -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of one key, from etcd's history; `value` is None for a deletion."""

    key: str
    value: bytes | None
    revision: int


class Keys:
    """The keys of one cluster, written and read by etcdctl as people do it.

    Args:
        etcd: the servers.
        prefix: `KVM_PREFIX`.
    """

    def __init__(self, etcd: EtcdCluster, prefix: str = "/kvm") -> None:
        self.etcd = etcd
        self.endpoint: str | None = None
        """The one member that etcdctl shall ask while others are made to fail; None for any."""
        self.layout = Layout(prefix=prefix, facts=f"{prefix}supervisor", lock=f"{prefix}/%i/lock")

    def put(self, instance: str, **wishes: object) -> int:
        """Write wishes, one after the other, in their order; return the revision of the last."""
        return max(self.write(self.layout.wish_key(InstanceId(instance), name), str(wishes[name])) for name in wishes)

    def write(self, key: str, value: str) -> int:
        """Write any key; return its revision."""
        return int(json.loads(self._ctl("put", "-w", "json", "--", key, value))["header"]["revision"])

    def delete(self, instance: str, *names: str) -> None:
        """Delete some wishes; without names whatever lies below `<prefix>/<instance>/`, its lock too."""
        if not names:
            self._ctl("del", "--prefix", self.layout.instance_prefix(InstanceId(instance)))
        for name in names:
            self._ctl("del", self.layout.wish_key(InstanceId(instance), name))

    def machines(self, host: str, *instances: str, **wishes: object) -> None:
        """Wish for several equal machines in one transaction, so that each is started once."""
        told = {"host": host, **wishes}
        self.together(
            {
                self.layout.wish_key(InstanceId(one), name): str(told[name]).encode()
                for one in instances
                for name in told
            }
        )

    def together(self, wishes: Mapping[str, bytes], *, delete: Sequence[str] = ()) -> None:
        """Write and delete many keys, a hundred in one transaction."""
        ops: list[Put | Delete] = [
            *(Put(key, value) for key, value in wishes.items()),
            *(Delete(key) for key in delete),
        ]

        async def write() -> None:
            etcd = Etcd(EtcdConfig(endpoints=self.etcd.endpoints))
            try:
                for begin in range(0, len(ops), 100):
                    await etcd.txn([], ops[begin : begin + 100])
            finally:
                await etcd.close()

        asyncio.run(write())

    def get(self, key: str) -> bytes | None:
        """Read any key."""
        found = self._get(key)
        return base64.b64decode(found["kvs"][0].get("value", "")) if found.get("kvs") else None

    def names(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`."""
        listed = self._get(prefix, "--prefix", "--keys-only").get("kvs", [])
        return [base64.b64decode(kv["key"]).decode(errors="replace") for kv in listed]

    @property
    def revision(self) -> int:
        """Of the store."""
        return int(self._get("-")["header"]["revision"])

    def lock(self, instance: str) -> Lock | None:
        """The instance's lock."""
        found = self.get(self.layout.lock_key(InstanceId(instance)))
        return None if found is None else Lock.from_json(found)

    def status(self, instance: str) -> Status | None:
        """The instance's status key."""
        found = self.get(self.layout.status_key(InstanceId(instance)))
        return None if found is None else Status.from_json(found)

    def session(self, host: str) -> HostSession | None:
        """A host's session key."""
        found = self.get(self.layout.session_key(HostName(host)))
        return None if found is None else HostSession.from_json(found)

    def wait_status(self, instance: str, wanted: Callable[[Status], bool]) -> Status:
        """Wait for a status in etcd that is as wanted."""

        def look() -> Status | None:
            status = self.status(instance)
            return status if status is not None and wanted(status) else None

        return eventually(f"the status key of {instance}", look)

    def history(self, prefix: str, since: int = 1) -> list[Change]:
        """Everything that has happened to the keys below `prefix`, from revision `since` on, replayed by etcd."""
        last = self.write(f"{self.layout.facts}/end-of-history", "")

        async def replay() -> list[Batch]:
            etcd, seen = Etcd(EtcdConfig(endpoints=self.etcd.endpoints)), list[Batch]()
            try:
                # Of the whole cluster, so that the watch comes to the mark at its end.
                async with asyncio.timeout(DEADLINE_S), etcd.watch(self.layout.prefix, since) as watch:
                    async for batch in watch:
                        seen.append(batch)
                        if batch.revision >= last:
                            break
            finally:
                await etcd.close()
            return seen

        return [
            Change(
                key=event.kv.key.decode(errors="replace"),
                value=None if event.deleted else event.kv.value,
                revision=event.kv.mod_revision,
            )
            for batch in asyncio.run(replay())
            for event in batch.events
            if event.kv.key.startswith(prefix.encode())
        ]

    def _get(self, *args: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._ctl("get", "-w", "json", *args))
        return found

    def _ctl(self, *args: str) -> str:
        return self.etcd.ctl(*args, endpoint=self.endpoint)


# --- processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """A QEMU process, told from any later one with its pid by its start time."""

    instance: str
    incarnation: str
    pid: int
    starttime: int
    argv: tuple[str, ...]

    @property
    def alive(self) -> bool:
        """Whether it has not ended; a zombie has."""
        stat = stat_of(self.pid)
        return stat is not None and stat.alive and stat.starttime == self.starttime

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it, never to another process that has its pid by now."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if self.alive:
                    signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)

    def kill(self) -> None:
        """SIGKILL; returns when it has ended."""
        self.signal(signal.SIGKILL)
        eventually(f"the end of QEMU {self.pid}", lambda: not self.alive)


def find_qemus(prefix: str, run_dir: Path) -> list[Qemu]:
    """All living QEMUs of one host: told by their environment, and by the folder of their sockets."""
    found = []
    mark = f"KVMSUPERVISOR_PREFIX={prefix}".encode()
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if mark not in environment:
                continue
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            continue  # it has ended meanwhile, or is none of ours
        said = dict(word.decode().partition("=")[::2] for word in environment if word.startswith(b"KVMSUPERVISOR_"))
        instance = said["KVMSUPERVISOR_INSTANCE"]
        stat = stat_of(int(entry.name))
        if stat is None or not stat.alive or not any(f"={run_dir}/{instance}/" in word for word in argv):
            continue
        found.append(
            Qemu(
                instance=instance,
                incarnation=said["KVMSUPERVISOR_INCARNATION"],
                pid=int(entry.name),
                starttime=stat.starttime,
                argv=tuple(argv),
            )
        )
    return sorted(found, key=lambda qemu: qemu.pid)


# --- hosts ----------------------------------------------------------------------------------------------------


class Host:
    """A supervisor and its run directory, which outlives it.

    Args:
        keys: of its cluster.
        name: `KVM_HOSTNAME`.
        run_dir: that of another host, to be in its way; None for one of its own.
        settings: further environment variables.
    """

    def __init__(self, keys: Keys, name: str = "alpha", *, run_dir: Path | None = None, **settings: str) -> None:
        # Short: sockets of instances lie below it, and their paths have at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
        # As /run is: QEMU may run as another user.
        self.folder.chmod(0o755)
        self.keys = keys
        self.name = name
        self.run_dir = run_dir or self.folder / "run"
        self.settings = {
            "KVM_HOSTNAME": name,
            "KVM_PREFIX": keys.layout.prefix,
            "KVM_RUN_DIR": str(self.run_dir),
            "KVM_CGROUP": "none",
            # Tests change nothing of this machine's own network.
            "KVM_ETCD_WALL": "off",
            "KVM_STATE_DIR": str(self.folder / "state"),
            "KVM_ACCEL": "tcg",
            "KVM_LISTEN": "127.0.0.1:0",
            "KVM_LOG_FORMAT": "json",
            "KVM_CONFIG": "/dev/null",
            "ETCD_ENDPOINTS": ",".join(keys.etcd.endpoints),
            **settings,
        }
        self.url = ""
        self.around: Callable[..., list[str]] = lambda *argv: [*argv]
        """Makes the supervisor's command line of the plain one, for instance to start it on a test's own network."""
        self.entry = fork_server.MAIN
        self.args: Sequence[str] = ("run",)
        self._log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | fork_server.Forked | None = None
        _open.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """Of the supervisor, and of commands: nothing of this process's own settings."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return kept | self.settings

    # The supervisor.

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the supervisor lives."""
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start the supervisor; does not wait for anything."""
        assert not self.running
        plain = fork_server.command(self.args, entry=self.entry)
        argv = self.around(*plain)
        with self._log.open("ab") as log:
            if argv == plain:
                self._process = fork_server.start(
                    self.args, env=self.environment, cwd=ROOT, output=log.fileno(), entry=self.entry
                )
                return
            self._process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self, *, ready: bool = True) -> Self:
        """Start the supervisor and wait until it serves, and with `ready` until it is in step with etcd."""
        before = len(self.events("supervisor.started"))
        self.launch()

        def started() -> dict[str, Any] | None:
            assert self.running, f"the supervisor of {self.name} ended by itself:\n{self.log}"
            lines = self.events("supervisor.started")
            return lines[-1] if len(lines) > before else None

        self.url = str(eventually(f"the start of {self.name}", started)["url"])
        if ready:
            self.wait_ready()
        return self

    @property
    def ready(self) -> bool:
        """Whether `/readyz` says so."""
        return self._fetch("/readyz")[0] == 200

    def wait_ready(self) -> None:
        """Wait until it is ready."""
        eventually(f"{self.name} to be ready", lambda: self.ready)

    def kill9(self) -> None:
        """SIGKILL for the supervisor; returns when it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM for the supervisor; returns its exit status."""
        return self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP for the supervisor."""
        freeze(self.pid)

    def thaw(self) -> None:
        """End `freeze`."""
        os.kill(self.pid, signal.SIGCONT)

    def wait_ended(self) -> int:
        """Wait until the supervisor ends by itself; return its exit status."""
        assert self._process is not None
        return self._process.wait(DEADLINE_S)

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `kvmsupervisor` on this host."""
        return fork_server.run(args, env=self.environment, cwd=ROOT, timeout=DEADLINE_S)

    # What it says.

    @property
    def log(self) -> str:
        """All that supervisors of this host have written."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def events(self, event: str = "", **match: object) -> list[dict[str, Any]]:
        """The lines of the log with this event's name and these fields; without a name, all."""
        found = []
        for line in self.log.splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if (not event or said["event"] == event) and match.items() <= said.items():
                    found.append(said)
        return found

    def instances(self) -> dict[str, Status]:
        """What `/api/v1/instances` tells, by id."""
        return {found["id"]: _status(found) for found in json.loads(self._fetch("/api/v1/instances")[1])}

    def status(self, instance: str) -> Status | None:
        """What `/api/v1/instances/<id>` tells; None when the host does not know it."""
        code, body = self._fetch(f"/api/v1/instances/{instance}")
        return _status(json.loads(body)) if code == 200 else None

    def wait_for(
        self, instance: str, wanted: Callable[[Status], bool] | Phase, deadline_s: float = DEADLINE_S
    ) -> Status:
        """Wait until the instance is in a phase, or otherwise as wanted; return its status."""
        last: Status | None = None

        def look() -> Status | None:
            nonlocal last
            last = self.status(instance)
            if last is None:
                return None
            right = last.phase is wanted if isinstance(wanted, Phase) else wanted(last)
            return last if right else None

        try:
            return eventually(f"{instance} on {self.name}", look, deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\nits status is {last}") from None

    def wait_running(self, *instances: str) -> dict[str, Qemu]:
        """Wait until these run; return their QEMUs."""
        for instance in instances:
            self.wait_for(instance, lambda status: status.phase is Phase.RUNNING and status.pid is not None)
        return {instance: self.qemu(instance) for instance in instances}

    def wait_forgotten(self, instance: str) -> None:
        """Wait until the host has nothing to do with the instance any more."""
        eventually(f"{instance} to be forgotten by {self.name}", lambda: self.status(instance) is None)

    def page(self, path: str = "/") -> str:
        """What it answers over HTTP, as text."""
        return self._fetch(path)[1]

    def metric(self, name: str, **labels: str) -> float:
        """One sample of `/metrics`; `name` comes without its `kvmsupervisor_`, and an instance's without `host`."""
        labels |= {"host": self.name} if "instance" in labels else {}
        name = f"kvmsupervisor_{name}"
        for family in text_string_to_metric_families(self.metrics()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        raise AssertionError(f"no {name} with {labels} in:\n{self.metrics()}")

    def metrics(self) -> str:
        """The body of `/metrics`."""
        code, body = self._fetch("/metrics")
        assert code == 200
        return body

    # Its guard.

    @property
    def guard(self) -> int | None:
        """The pid of the guard that lives, told from any later process by its start time; None when there is none."""
        with contextlib.suppress(OSError, ValueError):
            pid, starttime = map(int, (self.run_dir / "_guard.lock").read_text().split())
            stat = stat_of(pid)
            if stat is not None and stat.alive and stat.starttime == starttime:
                return pid
        return None

    def wait_guard(self, *, but: int | None = None) -> int:
        """Wait until a guard lives, another one than `but`; return its pid."""
        return eventually(f"a guard of {self.name}", lambda: self.guard if self.guard != but else None)

    # Its QEMUs.

    def qemus(self) -> list[Qemu]:
        """All QEMUs that live on this host."""
        return find_qemus(self.keys.layout.prefix, self.run_dir)

    def run_state(self, qemu: Qemu) -> str | None:
        """What the QEMU says of itself on its spare QMP socket; None when it ends meanwhile."""
        with contextlib.suppress(OSError, ValueError):
            return str(self.ask(qemu.instance, "query-status")["return"]["status"])
        return None

    def ask(self, instance: str, command: str, **arguments: object) -> dict[str, Any]:
        """QEMU's answer on the spare QMP socket, a `return` or an `error`.

        Raises:
            OSError, ValueError: it ends meanwhile.
        """
        with socket.socket(socket.AF_UNIX) as spare:
            spare.settimeout(DEADLINE_S)
            spare.connect(str(self.run_dir / instance / "qmp-spare.sock"))
            with spare.makefile("rw") as qmp:
                qmp.readline()
                answer: dict[str, Any] = {}
                for name, told in (("qmp_capabilities", {}), (command, arguments)):
                    qmp.write(json.dumps({"execute": name, "arguments": told}))
                    qmp.flush()
                    answer = json.loads(qmp.readline())
                    while not answer.keys() & {"return", "error"}:
                        answer = json.loads(qmp.readline())  # an event
                return answer

    def qemu(self, instance: str) -> Qemu:
        """The one QEMU of this instance."""
        (found,) = [qemu for qemu in self.qemus() if qemu.instance == instance]
        return found

    def record(self, instance: str) -> Path:
        """The record of the instance's QEMU in the run directory."""
        return self.run_dir / instance / "incarnation.json"

    def rewrite(self, instance: str, **fields: object) -> None:
        """Change fields of that record, as another course of events would have left it."""
        found = json.loads(self.record(instance).read_bytes())
        self.record(instance).write_text(json.dumps(found | fields))

    def console(self, instance: str) -> str:
        """What the guest has written on its serial console."""
        path = self.run_dir / instance / "console.log"
        return path.read_bytes().decode(errors="replace") if path.exists() else ""

    def say(self, instance: str, word: str) -> None:
        """Type a line on the guest's serial console; returns when the terminal has echoed it.

        What the guest writes at that instant stands within the echo, which is not seen then: it is typed again.
        """
        before = self.console(instance).count(f"{word}\r")
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(str(self.run_dir / instance / "console.sock"))
            deadline = time.monotonic() + DEADLINE_S
            while True:
                console.sendall(f"{word}\n".encode())
                try:
                    eventually(
                        f"the echo of {word!r}", lambda: self.console(instance).count(f"{word}\r") > before, ECHO_S
                    )
                except AssertionError:
                    if time.monotonic() > deadline:
                        raise
                else:
                    return

    def hears(self, instance: str, text: str, times: int = 1) -> None:
        """Wait until the guest has written `text` so many times."""
        try:
            eventually(f"{text!r} of {instance}", lambda: self.console(instance).count(text) >= times)
        except AssertionError as error:
            raise AssertionError(f"{error}\nits console:\n{self.console(instance)[-2000:]}") from None

    # The end.

    def close(self) -> None:
        """End the supervisor and every QEMU of this host, delete its folder."""
        _open.discard(self)
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
            self.kill9()
        for qemu in self.qemus():
            qemu.kill()
        if (guard := self.guard) is not None:
            os.kill(guard, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(DEADLINE_S)

    def _fetch(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=DEADLINE_S) as reply:  # noqa: S310 - our own
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


def _status(found: dict[str, Any]) -> Status:
    status = Status.from_json(json.dumps(found).encode())
    assert status is not None
    return status


_open: set[Host] = set()


@atexit.register
def _close_leftovers() -> None:
    # A test run that ends in the middle of a fixture must leave nothing running.
    for host in list(_open):
        host.close()


class Hosts:
    """Makes the hosts of one test."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.made: list[Host] = []

    def __call__(self, name: str = "alpha", *, keys: Keys | None = None, **settings: Any) -> Host:
        """A host, not started."""
        host = Host(keys or self.keys, name, **settings)
        self.made.append(host)
        return host

    def close(self) -> None:
        """End all; print what they have logged, which pytest shows when the test has failed."""
        for host in self.made:
            print(f"--- log of {host.name} ---\n{host.log}")  # noqa: T201
            host.close()


@pytest.fixture
def keys(etcd_server: EtcdServer, etcd_prefix: str) -> Keys:
    """The keys of a cluster of its own, on an etcd that others use too."""
    return Keys(etcd_server, etcd_prefix)


@pytest.fixture
def hosts(keys: Keys) -> Iterator[Hosts]:
    """Makes hosts: `hosts("alpha").start()`."""
    hosts = Hosts(keys)
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`extra_flags` of a machine whose firmware is one HLT after the other: it runs, and uses no CPU."""
    firmware = tmp_path_factory.mktemp("tiny") / "hlt.bin"
    firmware.write_bytes(b"\xf4" * 65536)
    return f"-bios {firmware}"
