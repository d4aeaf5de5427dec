"""From the start of the supervisor's process until it asks etcd: the interpreter, and what is imported before that."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from bench.figures import Figure, Sample, milliseconds, within
from bench.rig import PATIENCE_S, Rig

FACTOR = 1.6

BARE = """
import asyncio, sys
import grpc.aio

async def ask():
    channel = grpc.aio.insecure_channel(sys.argv[1])
    channel.get_state(try_to_connect=True)
    await asyncio.sleep(60)

asyncio.run(ask())
"""
"""The least that asks etcd: its imports are those that no client in Python can do without."""


def measure(rig: Rig, *, rounds: int) -> Iterator[Figure]:
    """Let both connect, in turn, to a socket that does not answer."""
    host = rig.host()
    supervisors, bares = [], []
    for number in range(rounds + 1):
        rig.tell(f"start until etcd is asked, {number + 1} of {rounds + 1}")
        with socket.create_server(("127.0.0.1", 0)) as etcd:
            etcd.settimeout(PATIENCE_S)
            address = f"127.0.0.1:{etcd.getsockname()[1]}"
            begun = host.start(f"http://{address}")
            etcd.accept()[0].close()
            supervisors.append(time.monotonic() - begun)
            host.kill()
            bares.append(_bare(etcd, address))
    host.clear()
    # The first of each has read its files from the disk, and written its bytecode.
    measured, reference = Sample.of(supervisors[1:]), Sample.of(bares[1:])
    yield Figure(
        what="start of the supervisor → etcd is asked",
        measured=measured,
        unit=milliseconds,
        reference=reference,
        reference_is="Python with asyncio and grpc.aio",
        budget=f"≤ {FACTOR} ×",
        met=within(measured, reference, FACTOR),
        notes=("the rest is imported by a thread while etcd answers",),
    )


def _bare(etcd: socket.socket, address: str) -> float:
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", BARE, address], stdin=subprocess.DEVNULL)
    try:
        etcd.accept()[0].close()
        return time.monotonic() - begun
    finally:
        process.kill()
        process.wait()
