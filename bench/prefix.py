"""A large cluster's keys: how soon a supervisor, to which none of them says anything, is in step."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Figure, Sample, megabytes, seconds, within
from bench.fleet import import_s
from bench.rig import Host, Rig


def measure(rig: Rig, *, instances: int, rounds: int) -> Iterator[Figure]:
    """Load the keys, then let etcdctl and a supervisor read them, in turn."""
    host = rig.host()
    rig.tell(f"{instances} × 8 keys are written")
    rig.keys.put(
        {
            f"/{host.name}/vm{number:05}/{key}": value
            for number in range(instances)
            for key, value in _wish(number).items()
        }
    )
    steps, listings, imports, peaks, rests = [], [], [], [], []
    for number in range(rounds):
        rig.tell(f"{instances} × 8 keys are read, {number + 1} of {rounds}")
        listings.append(_etcdctl(rig, f"/{host.name}/"))
        begun = host.start()
        steps.append(host.wait_ready() - begun)
        peaks.append(_peak(host))
        rests.append(sum(process.memory_full_info().pss for process in host.processes()))
        host.kill()
        imports.append(import_s())
    host.clear()
    measured, reference = Sample.of(steps), Sample.of(listings)
    yield Figure(
        what=f"{instances} × 8 keys: start → in step",
        measured=measured,
        unit=seconds,
        reference=reference,
        reference_is="etcdctl get --prefix",
        budget="≤ 2.2 ×",
        met=within(measured, reference, 2.2),
        notes=(f"interpreter start and imports alone take {seconds(Sample.of(imports).median)} of it",),
    )
    yield Figure(
        what=f"{instances} × 8 keys: peak memory (RSS)",
        measured=Sample.of(peaks),
        unit=megabytes,
        reference=Sample.of(rests),
        reference_is="PSS once in step",
    )


def _wish(number: int) -> dict[str, str]:
    """Eight keys, as people write them; the host is none that lives."""
    return {
        "host": f"node{number % 100:02}",
        "ram": "2G",
        "cpus": "2",
        "mac": f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}",
        "bridge": "br0",
        "rbd": f"rbd/image-of-vm{number:05}",
        "spice_port": str(6000 + number),
        "cloud-config": f"https://config.example.org/vm{number:05}/user-data.yaml",
    }


def _etcdctl(rig: Rig, prefix: str) -> float:
    environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
    begun = time.monotonic()
    subprocess.run(
        ["etcdctl", "--endpoints", rig.etcd.endpoint, "get", "--prefix", prefix],
        stdout=subprocess.DEVNULL,
        env=environment,
        check=True,
    )
    return time.monotonic() - begun


def _peak(host: Host) -> float:
    assert host.process is not None
    status = Path(f"/proc/{host.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024.0 for line in status.splitlines() if line.startswith("VmHWM:"))
