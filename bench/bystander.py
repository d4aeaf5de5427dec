"""A supervisor that hears of another host's machines: what each change of one of their locks costs it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import psutil

from bench.figures import Figure, Sample, microseconds
from bench.fleet import cpu_s
from bench.rig import Rig, beside
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage

BUDGET_S = 150e-6

PAUSE_S = 0.004
"""Between two writes, so that etcd tells of each by itself."""

WATCH = """
import asyncio, sys
from kvmsupervisor.adapters.etcd.protocol import grpc, rpc
async def follow():
    channel = grpc.aio.insecure_channel({target!r})
    stream = channel.stream_stream(
        "/etcdserverpb.Watch/Watch",
        request_serializer=rpc.WatchRequest.SerializeToString,
        response_deserializer=rpc.WatchResponse.FromString,
    )()
    await stream.write(rpc.WatchRequest(create_request=rpc.WatchCreateRequest(key={prefix!r}, range_end={end!r})))
    await stream.read()
    print(flush=True)
    while True:
        await stream.read()
asyncio.run(follow())
"""
"""Reads what a watch tells, and does nothing with it."""


def measure(rig: Rig, *, instances: int, events: int, rounds: int) -> Iterator[Figure]:
    """Let another host's locks change under a supervisor in step, and under a bare watch.

    Args:
        rig: to measure on.
        instances: how many the other host has; each with three keys and a lock.
        events: how many changes of a lock make one round.
        rounds: how many of them.
    """
    host = rig.host()
    names = [f"vm{number:04}" for number in range(instances)]
    rig.tell(f"{instances} instances of another host are written")
    rig.keys.put({key: "elsewhere" if key.endswith("/host") else text for key, text in host.wish(names).items()})
    rig.keys.put({f"/{host.name}/{name}/lock": text for name, text in zip(names, _locks(len(names)), strict=True)})
    host.start()
    host.wait_ready()
    assert host.process is not None
    here = psutil.Process(host.process.pid)
    prefix = f"/{host.name}/".encode()
    watch = WATCH.format(target=rig.etcd.endpoint.removeprefix("http://"), prefix=prefix, end=prefix[:-1] + b"0")
    used, bare = [], []
    with beside(watch) as other:
        for number in range(rounds):
            rig.tell(f"{events} changes of another host's locks, {number + 1} of {rounds}")
            before = cpu_s(here), cpu_s(other)
            _change(rig, host.name, names, events)
            time.sleep(0.5)
            used.append((cpu_s(here) - before[0]) / events)
            bare.append((cpu_s(other) - before[1]) / events)
    host.clear()
    measured = Sample.of(used)
    yield Figure(
        what="another host's lock changes: CPU of a supervisor that it does not concern, an event",
        measured=measured,
        unit=microseconds,
        reference=Sample.of(bare),
        reference_is="a watch in Python that does nothing",
        budget="≤ 150 µs an event",
        met=measured.median <= BUDGET_S,
        notes=(f"{events} events, one by one, {instances} instances; what the supervisor does beside is in it",),
    )


def _change(rig: Rig, prefix: str, names: Sequence[str], events: int) -> None:
    for number, text in enumerate(_locks(events)):
        rig.keys.put({f"/{prefix}/{names[number % len(names)]}/lock": text})
        time.sleep(PAUSE_S)


def _locks(number: int) -> Iterator[str]:
    """Values of a lock as a start writes them: taken, then on record."""
    taken = Lock(
        host=HostName("elsewhere"),
        boot_id="0d4f7a5e-0000-4000-8000-000000000000",
        epoch=1,
        state=LockState.STARTING,
        incarnation="c1b6c3ce-0000-4000-8000-000000000000",
        storage=Storage.RBD,
        facts="/kvmsupervisor",
    )
    for epoch in range(number):
        lock = replace(taken, epoch=1 + epoch // 2)
        if epoch % 2:
            lock = lock.recorded(pid=os.getpid(), starttime=1, clients=("192.0.2.1:0/1234567890",))
        yield lock.to_json().decode()
