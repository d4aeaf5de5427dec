"""What the benchmarks run on: a real etcd, real supervisors, real QEMUs with guests that sleep."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from bench.qmp import Answer, NotAnswered, Run, await_answers, await_run
from kvmsupervisor.domain.names import QMP_SPARE_SOCKET
from tests.support.etcd import EtcdServer, free_port

PATIENCE_S = 120.0
"""How long anything may take before a benchmark gives up. Not a budget."""

_RECEIVED = re.compile(
    r'^grpc_server_msg_received_total\{grpc_method="(\w+)",grpc_service="etcdserverpb.*?\} (\S+)$', re.MULTILINE
)

OPS_PER_TXN = 128
"""What etcd allows by default (--max-txn-ops)."""

SHARED_MEMORY = Path("/dev/shm")
"""A tmpfs on every Linux. The run directory is on one on a real host too (/run)."""


class Keys:
    """Writes and deletes keys, through etcd's JSON gateway: no gRPC in the process that measures."""

    def __init__(self, endpoint: str) -> None:
        self._connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=30)

    def put(self, pairs: Mapping[str, str]) -> None:
        """Write all, in transactions as large as etcd allows."""
        items = list(pairs.items())
        for at in range(0, len(items), OPS_PER_TXN):
            puts = [
                {"requestPut": {"key": _encoded(key), "value": _encoded(value)}}
                for key, value in items[at : at + OPS_PER_TXN]
            ]
            self._post("txn", {"success": puts})

    def revision(self) -> int:
        """The store's, as a quorum knows it."""
        return int(self._post("range", {"key": _encoded("nothing"), "countOnly": True})["header"]["revision"])

    def close(self) -> None:
        self._connection.close()

    def _post(self, method: str, request: object) -> Any:
        self._connection.request("POST", f"/v3/kv/{method}", json.dumps(request))
        reply = self._connection.getresponse()
        body = reply.read()
        assert reply.status == http.client.OK, f"etcd answers {method} with {reply.status}: {body!r}"
        return json.loads(body)


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Rig:
    """One etcd, one scratch folder, and the hosts made on them. Leaves nothing running.

    Attributes:
        etcd: the server.
        keys: writes to it.
        folder: for anything; on a tmpfs where there is one.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self._stack = contextlib.ExitStack()
        self._hosts: list[Host] = []

    def __enter__(self) -> Self:
        with self._stack:
            self.etcd = self._stack.enter_context(EtcdServer(args=("--quota-backend-bytes", str(1 << 30))))
            self.keys = Keys(self.etcd.endpoint)
            self._stack.callback(self.keys.close)
            place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
            self.folder = Path(tempfile.mkdtemp(prefix="kvb", dir=place))
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._rom = self.folder / "halt.rom"
            self._rom.write_bytes(halting_rom())
            self._stack.callback(self._clear)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _clear(self) -> None:
        for host in self._hosts:
            host.clear()

    def host(self) -> Host:
        """A new host, with a prefix of its own in etcd: nothing of an earlier one is in its way."""
        host = Host(self, f"h{len(self._hosts)}")
        self._hosts.append(host)
        return host

    def etcd_counters(self) -> Mapping[str, float]:
        """How many messages etcd has received, by gRPC method."""
        url = f"http://127.0.0.1:{self.etcd.member.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read().decode()
        counters: defaultdict[str, float] = defaultdict(float)
        for method, number in re.findall(_RECEIVED, text):
            counters[method] += float(number)
        return counters

    def machine_keys(self) -> dict[str, str]:
        """The wishes of a machine that costs as little as one can: 16 MiB, and a processor that sleeps for ever."""
        return {"ram": "16", "extra_flags": f"-bios {self._rom}", "shutdown_timeout": "0"}


class Host:
    """One supervisor on the rig's etcd, and its machines.

    Attributes:
        name: of the host, and of its prefix in etcd.
        run_dir: `KVM_RUN_DIR`.
        process: of the supervisor that was started last.
    """

    def __init__(self, rig: Rig, name: str) -> None:
        self.name = name
        self._rig = rig
        self._prefix = f"/{name}"
        self.run_dir = rig.folder / name
        self.log = rig.folder / f"{name}.log"
        self._port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def wish(self, names: Sequence[str], **more: str) -> dict[str, str]:
        """The keys by which this host runs these instances."""
        keys = {"host": self.name, **self._rig.machine_keys(), **more}
        return {f"{self._prefix}/{name}/{key}": value for name in names for key, value in keys.items()}

    def key(self, name: str) -> str:
        """A key of this host's cluster."""
        return f"{self._prefix}/{name}"

    def start(self, endpoint: str | None = None, **settings: str) -> float:
        """Start the supervisor; return when (`time.monotonic`). Does not wait for anything.

        Args:
            endpoint: of another etcd than the rig's.
            settings: further environment variables.
        """
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ},
            "ETCD_ENDPOINTS": endpoint or self._rig.etcd.endpoint,
            "KVM_HOSTNAME": self.name,
            "KVM_PREFIX": self._prefix,
            "KVM_RUN_DIR": str(self.run_dir),
            "KVM_LISTEN": f"127.0.0.1:{self._port}",
            "KVM_ACCEL": "tcg",
            "KVM_ETCD_WALL": "off",
            "KVM_LOG_FORMAT": "json",
            **settings,
        }
        begun = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvmsupervisor", "run"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return begun

    def wait_ready(self, poll_s: float = 0.01) -> float:
        """Wait until `/readyz` says yes; return when."""

        def ready() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(f"127.0.0.1:{self._port}", timeout=10)
                with contextlib.closing(connection):
                    connection.request("GET", "/readyz")
                    status: int = connection.getresponse().status
                    return status == http.client.OK
            return False

        return self.wait("to be ready", ready, poll_s)

    def wait_phase(self, phase: str, number: int) -> None:
        """Wait until so many instances are in that phase."""

        def there() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/instances", timeout=10) as reply:
                phases: list[str] = [one["phase"] for one in json.load(reply)]
            return phases.count(phase) == number

        self.wait(f"for {number} instances to be {phase}", there, 0.1)

    def wait_gone(self, name: str) -> None:
        """Wait until there is no QEMU of the instance on record."""
        self.wait(f"for {name} to be gone", lambda: name not in self.pids(), 0.02)

    def wait_logged(self, event: str, number: int) -> float:
        """Wait until the supervisor has logged so many events of that name; return when."""
        mark = f'"{event}"'.encode()
        return self.wait(f"for {number} × {event}", lambda: self.log.read_bytes().count(mark) >= number, 0.005)

    def wait(self, what: str, done: Callable[[], bool], poll_s: float) -> float:
        """Wait until `done`; return when. The supervisor must live meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert self.process is not None
            assert self.process.poll() is None, f"the supervisor ended:\n{self._log_end()}"
            assert time.monotonic() < deadline, f"waited in vain {what}:\n{self._log_end()}"
            time.sleep(poll_s)
        return time.monotonic()

    def spare(self, name: str) -> Path:
        """The instance's QMP socket for others."""
        return self.run_dir / name / QMP_SPARE_SOCKET

    def answers(self, names: Sequence[str], *, poll_s: float = 0.0005) -> dict[str, Answer]:
        """Wait until the QEMUs of all these instances answer QMP."""
        paths = {self.spare(name): name for name in names}
        try:
            found = await_answers(paths, timeout_s=PATIENCE_S, poll_s=poll_s)
        except NotAnswered as error:
            raise NotAnswered(f"{error}; the supervisor's last words:\n{self._log_end()}") from error
        return {paths[path]: answer for path, answer in found.items()}

    def run_of(self, name: str) -> Run:
        """Wait until the guest of an instance runs."""
        try:
            return await_run(self.spare(name), let_it=False, timeout_s=PATIENCE_S)
        except NotAnswered as error:
            raise NotAnswered(f"{error}; the supervisor's last words:\n{self._log_end()}") from error

    def record(self, name: str) -> dict[str, Any]:
        """The instance's incarnation, as the supervisor wrote it down."""
        record: dict[str, Any] = json.loads((self.run_dir / name / "incarnation.json").read_bytes())
        return record

    def pids(self) -> dict[str, int]:
        """The QEMUs on record, by instance."""
        records = []
        for path in self.run_dir.glob("*/incarnation.json"):
            # One may end, and its record go, meanwhile.
            with contextlib.suppress(FileNotFoundError):
                records.append(self.record(path.parent.name))
        return {record["instance"]: record["pid"] for record in records if record["pid"] is not None}

    def processes(self) -> list[psutil.Process]:
        """The supervisor and whatever it started, but for QEMUs and what those started."""
        assert self.process is not None
        machines = set(self.pids().values())
        found, left = [], [psutil.Process(self.process.pid)]
        while left:
            process = left.pop()
            if process.pid not in machines:
                found.append(process)
                left += process.children()
        return found

    def kill(self) -> None:
        """SIGKILL for the supervisor; returns when it is gone. QEMUs run on."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def clear(self) -> None:
        """End the supervisor, then every QEMU of this host."""
        self.kill()
        if self.run_dir.is_dir():
            for pid in self.pids().values():
                if self._is_ours(pid):
                    kill(pid)
            shutil.rmtree(self.run_dir)

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(psutil.Error):
            return self._prefix == psutil.Process(pid).environ().get("KVMSUPERVISOR_PREFIX")
        return False

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def kill(pid: int) -> None:
    """SIGKILL; returns when the process has ended, be it as a zombie."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], PATIENCE_S)
        finally:
            os.close(descriptor)


def halting_rom() -> bytes:
    """Firmware that stops the interval timer and halts where an x86 processor begins, interrupts off as they are.

    A guest of it uses no processor time and never changes, so that a hundred of them disturb no measurement. (With
    the timer as it is after a reset QEMU wakes 36 times a second.)
    """
    code = bytes.fromhex("b030 e643 fa f4 ebfd")  # mov al, 0x30; out 0x43, al; cli; hlt; jmp to the hlt
    return b"\xf4" * (65536 - 16) + code + b"\xf4" * (16 - len(code))


@contextmanager
def beside(code: str) -> Iterator[psutil.Process]:
    """Another Python that runs `code`, as a reference. It is given a moment to get there."""
    process = subprocess.Popen([sys.executable, "-c", f"{code}\nprint(flush=True)\n{_IDLE}"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.communicate()


_IDLE = "import asyncio; asyncio.run(asyncio.sleep(3600))"
