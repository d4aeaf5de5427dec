"""`kvmsupervisor web` with a thousand instances and twenty open pages: memory, rest, and how soon a change is told.

It runs beside a supervisor of another, empty cluster.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from bench.figures import Figure, Sample, megabytes, milliseconds, percent
from bench.fleet import cpu_s
from bench.rig import PATIENCE_S, Rig, beside
from kvmsupervisor.domain.keys import Layout
from tests.support.etcd import free_port
from tests.support.made_up import made_up

MEMORY_BUDGET = 40e6
IDLE_BUDGET = 0.002
TOLD_BUDGET_S = 1.0

IMPORTS = "import asyncio, kvmsupervisor.cli.main, kvmsupervisor.adapters.etcd, kvmsupervisor.web.service"
"""What a page has in memory that knows no cluster."""

PAUSE_S = 0.7
"""Between two changes: each comes alone, as people's do, and not within the time in which changes are gathered."""


WATCHES = """
import asyncio, threading
from kvmsupervisor.adapters.etcd import Etcd, EtcdConfig
async def follow(etcd, prefix):
    async with etcd.watch(prefix, 1) as watch:
        async for batch in watch:
            pass
async def main():
    etcd = Etcd(EtcdConfig(endpoints=("http://{target}",)))
    await asyncio.gather(follow(etcd, "/nothing/"), follow(etcd, "/nothing-else/"))
threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
"""
"""What the way to etcd costs, whatever is done with it."""


class Viewer:
    """One open page: its stream, as a browser holds it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        self._connection.request("GET", "/api/v1/stream")
        self._reply = self._connection.getresponse()

    def next(self, kind: str) -> str:
        """The data of the next event of a kind."""
        found = ""
        while found != kind:
            fields: dict[str, str] = {}
            while line := self._reply.readline().decode().rstrip("\n"):
                name, _, value = line.partition(": ")
                fields[name] = value
            found = fields.get("event", "")
        return fields["data"]

    def close(self) -> None:
        self._connection.close()


def measure(
    rig: Rig, *, instances: int, viewers: int, settle_s: float, idle_s: float, changes: int
) -> Iterator[Figure]:
    """Run the page on a cluster that nobody runs.

    Args:
        rig: to measure on.
        instances: how many there are.
        viewers: how many streams are open.
        settle_s: how long it is left alone before it is looked at.
        idle_s: how long it is looked at.
        changes: how many are written, one after the other.
    """
    layout = Layout()
    rig.tell(f"{instances} instances are written")
    rig.keys.put({key: value.decode() for key, value in made_up(instances, layout)})
    host = rig.host()
    host.start()
    host.wait_ready()
    with contextlib.ExitStack() as stack:
        stack.callback(host.clear)
        port = free_port()
        process = stack.enter_context(_page(rig, port))
        open_pages = [Viewer(port) for _ in range(viewers)]
        for viewer in open_pages:
            stack.callback(viewer.close)
            assert len(json.loads(viewer.next("reset"))["rows"]) == instances
        for path in ("/", "/hosts", "/instances/vm1", "/api/v1/instances"):
            _get(port, path)
        rig.tell(f"the page rests for {settle_s:.0f} s, then it is looked at for {idle_s:.0f} s")
        time.sleep(settle_s)
        with beside(WATCHES.format(target=rig.etcd.endpoint.removeprefix("http://"))) as watches:
            used, watched, began = cpu_s(process), cpu_s(watches), time.monotonic()
            time.sleep(idle_s)
            idle_of_watches = (cpu_s(watches) - watched) / (time.monotonic() - began)
            idle = (cpu_s(process) - used) / (time.monotonic() - began)
        memory = process.memory_full_info().pss
        with beside(IMPORTS) as other:
            bare = other.memory_full_info().pss
        rig.tell(f"{changes} changes, one by one")
        told = [_told(rig, layout, open_pages[0], number) for number in range(changes)]
    said = f"{instances} instances, {viewers} open pages"
    yield Figure(
        what=f"the page's memory (PSS): {said}",
        measured=Sample.of([memory]),
        unit=megabytes,
        reference=Sample.of([bare]),
        reference_is="its imports alone",
        budget="≤ 40 MB",
        met=memory <= MEMORY_BUDGET,
        notes=("beside a supervisor, with which it shares the libraries' pages, as on a host",),
    )
    yield Figure(
        what=f"the page's CPU at rest, of a core: {said}",
        measured=Sample.of([idle]),
        unit=percent,
        reference=Sample.of([idle_of_watches]),
        reference_is="a connection to etcd with two watches that do nothing",
        budget="≤ 0.2 %",
        met=idle <= IDLE_BUDGET,
        notes=(f"over {idle_s:.0f} s in which nothing changed",),
    )
    measured = Sample.of(told)
    yield Figure(
        what="a wish is written → a viewer is told",
        measured=measured,
        unit=milliseconds,
        budget="≤ 1 s",
        met=measured.median <= TOLD_BUDGET_S,
        notes=("one change after the other; those that come within 0.2 s of one are gathered",),
    )


@contextlib.contextmanager
def _page(rig: Rig, port: int) -> Iterator[psutil.Process]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    environment = kept | {
        "ETCD_ENDPOINTS": rig.etcd.endpoint,
        "KVM_CONFIG": "/dev/null",
        "KVM_WEB_LISTEN": f"127.0.0.1:{port}",
        "KVM_LOG_FORMAT": "json",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmsupervisor", "web"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if _get(port, "/readyz") == http.client.OK:
                    break
            assert process.poll() is None, "the page ended by itself"
            assert time.monotonic() < deadline, "the page is not in step"
            time.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_S)


def _get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        reply = connection.getresponse()
        reply.read()
        return reply.status


def _told(rig: Rig, layout: Layout, viewer: Viewer, number: int) -> float:
    time.sleep(PAUSE_S)
    began = time.monotonic()
    rig.keys.put({f"{layout.wishes_prefix}vm1/description": f"change {number}"})
    while f"change {number}" not in viewer.next("change"):
        pass
    return time.monotonic() - began
