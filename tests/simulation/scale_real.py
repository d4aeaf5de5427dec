"""The stories of `scale` on a real etcd, in real time, so that the simulation is known to be right.

    python -m tests.simulation.scale_real --hosts 20 --instances 100 --story mass-start rest [--proxy] [--locks-apart]

All supervisors live in this process, each with its own client and connection; QEMU and Ceph are the same fakes. What
etcd was asked is what etcd itself says (`/metrics`). With `--proxy` etcd's own gRPC proxy is between them and etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from kvmsupervisor.adapters.etcd import Etcd, EtcdConfig, Put
from tests.simulation.scale import APART, Cluster, Told, parser, play, show, silent
from tests.simulation.scale_etcd import Asked
from tests.support.etcd import EtcdServer, free_port

OPS_PER_TXN = 100

_RECEIVED = re.compile(r'^grpc_server_msg_received_total\{grpc_method="(\w+)",grpc_service="etcdserverpb.*?\} (\S+)$')
_VALUE = re.compile(r"^(\w+) (\S+)$")


class Real(Cluster):
    """On a real etcd.

    Args:
        server: of etcd.
        proxy: pid of the proxy; None without one.
        endpoint: where supervisors connect to.
    """

    def __init__(
        self,
        hosts: int,
        instances: int,
        lock: str | None,
        folder: Path,
        *,
        server: EtcdServer,
        proxy: int | None,
        endpoint: str,
    ) -> None:
        super().__init__(hosts, instances, lock, folder)
        self.endpoint = endpoint
        self._server = server
        self._proxy = None if proxy is None else psutil.Process(proxy)

    def connect(self) -> Etcd:
        return Etcd(EtcdConfig(endpoints=(self.endpoint,)))

    async def load(self, keys: dict[str, str]) -> None:
        client = Etcd(EtcdConfig(endpoints=self._server.endpoints))
        puts = [Put(key, value.encode()) for key, value in keys.items()]
        for begin in range(0, len(puts), OPS_PER_TXN):
            await client.txn([], puts[begin : begin + OPS_PER_TXN])
        await client.close()

    async def asked(self) -> Asked:
        return await asyncio.to_thread(self._asked)

    def _asked(self) -> Asked:
        url = f"http://127.0.0.1:{self._server.member.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        asked = Asked()
        values: dict[str, float] = {}
        for line in lines:
            if found := _RECEIVED.match(line):
                asked.requests[found[1]] += int(float(found[2]))
            elif found := _VALUE.match(line):
                values[found[1]] = float(found[2])
        asked.sent["all"] = int(values["etcd_network_client_grpc_sent_bytes_total"])
        asked.events["all"] = int(values["etcd_debugging_mvcc_events_total"])
        asked.busy_s = values["process_cpu_seconds_total"]
        if self._proxy is not None:
            times = self._proxy.cpu_times()
            asked.sent["proxy, ms of processor"] = int(1000 * (times.user + times.system))
        return asked

    def spent_s(self) -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        each = (used.ru_utime + used.ru_stime) / len(self.hosts)
        return dict.fromkeys((host.name for host in self.hosts), each)

    async def end(self) -> None:
        """Stop all supervisors."""
        for host in self.hosts:
            if host not in self.dead and host.parts is not None:
                await host.stop()


@contextmanager
def proxied(server: EtcdServer, folder: Path) -> Iterator[tuple[int, str]]:
    """Etcd's gRPC proxy in front of a server: its pid, and where it listens."""
    port = free_port()
    with (folder / "proxy.log").open("wb") as log:
        words = ["--endpoints", server.endpoint, "--listen-addr", f"127.0.0.1:{port}"]
        process = subprocess.Popen(["etcd", "grpc-proxy", "start", *words], stdout=log, stderr=log)
    try:
        yield process.pid, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def told_by(cluster: Real, stories: list[str], on_told: Callable[[Told], object]) -> list[Told]:
    """Play stories, and end."""
    try:
        return await play(cluster, stories, on_told)
    finally:
        await cluster.end()


def play_for_real(
    stories: list[str],
    hosts: int,
    instances: int,
    lock: str | None,
    *,
    proxy: bool = False,
    boot_s: float | None = None,
    on_told: Callable[[Told], object] = lambda told: None,
) -> list[Told]:
    """Play stories on an etcd of their own."""
    folder = Path(tempfile.mkdtemp(prefix="kvs", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    async def run(server: EtcdServer, pid: int | None, endpoint: str) -> list[Told]:
        cluster = Real(hosts, instances, lock, folder, server=server, proxy=pid, endpoint=endpoint)
        cluster.boot_s = cluster.boot_s if boot_s is None else boot_s
        return await told_by(cluster, stories, on_told)

    try:
        with silent(), EtcdServer() as server, contextlib.ExitStack() as stack:
            pid, endpoint = stack.enter_context(proxied(server, folder)) if proxy else (None, server.endpoint)
            return asyncio.run(run(server, pid, endpoint))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """The command."""
    options = parser()
    options.add_argument("--proxy", action="store_true", help="put etcd's gRPC proxy between them and etcd")
    told = options.parse_args()
    lock = APART if told.locks_apart else None

    def tell(one: Told) -> None:
        print(show(one).replace("by the model", "as etcd says"), flush=True)

    number = told.instances or 10 * told.hosts
    play_for_real(told.story, told.hosts, number, lock, proxy=told.proxy, on_told=tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
