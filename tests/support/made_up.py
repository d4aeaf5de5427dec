"""The keys of a cluster that nobody runs: hosts, instances in every phase, a host that is dead. Always the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.events import Event, to_json
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status

HOSTS = ("alpha", "beta", "gamma")
DEAD = "delta"

REASONS = {
    Phase.RUNNING: "QEMU runs the guest",
    Phase.STOPPED: "`power` is off",
    Phase.BACKOFF: "QEMU ended 4 times in a row, last: crashed (signal 9); it is started again in 23 s",
    Phase.WAITING: "the image vms/db is in use by a client that is on no record; it is shut out first",
    Phase.INVALID: "2 keys are not valid",
    Phase.STARTING: "QEMU has been started; its guest does not run yet",
    Phase.MIGRATING: "the guest's memory is being sent to beta: 42 % of 4096 MiB",
}
WEIGHTS = (90, 6, 1, 1, 1, 0.5, 0.5)
PROBLEMS = ("ram: found 'plenty'; wanted MiB, or a number with M or G", "mac: found '52:54'; wanted a MAC address")
TEAMS = ("shop", "mail", "build", "wiki", "payments")


def made_up(number: int, layout: Layout, *, dead: bool = True) -> Iterator[tuple[str, bytes]]:
    """The keys.

    Args:
        number: of instances.
        layout: of the keys.
        dead: whether every 97th instance is of a host that is gone.
    """
    chance = random.Random(5)
    for host in HOSTS:
        yield layout.session_key(HostName(host)), session(host).to_json()
    for index in range(number):
        name = InstanceId(f"vm{index + 1}")
        (phase,) = chance.choices(list(REASONS), WEIGHTS)
        host = DEAD if dead and index % 97 == 5 else chance.choice(HOSTS)
        yield from _instance(name, index, host=host, phase=phase, layout=layout, chance=chance)


def session(host: str) -> HostSession:
    """A host's session; without a lease, so it stays until somebody deletes it."""
    return HostSession(
        host=host, version="0.9.0", url=f"http://{host}:9746", boot_id="b", started="2026-11-28T08:00:00Z", cpus=64,
        memory_mib=1 << 20, lock="/kvm/%i/lock",
    )  # fmt: skip


def _instance(
    name: InstanceId, index: int, *, host: str, phase: Phase, layout: Layout, chance: random.Random
) -> Iterator[tuple[str, bytes]]:
    is_up = phase is Phase.RUNNING
    wishes = {
        "host": host,
        "ram": "plenty" if phase is Phase.INVALID else chance.choice(("1G", "2G", "4G", "16G")),
        "cpus": "4",
        "rbd": f"/vms/{name}",
        "mac": f"52:54:00:00:{index // 256:02x}:{index % 256:02x}",
        "bridge": "br0",
        "description": f"{chance.choice(TEAMS)}, team {chance.choice('abc')}",
        "x-team": chance.choice(TEAMS),
    }
    for key, value in wishes.items():
        yield layout.wish_key(name, key), value.encode()
    address = GuestAddress(interface="eth0", address=f"10.0.{index // 256}.{index % 256}")
    agent = GuestFacts(os="Debian GNU/Linux 12 (bookworm)", hostname=name, version="7.2", addresses=(address,))
    status = Status(
        id=name, host=host, phase=phase, reason=REASONS[phase],
        since=f"2026-11-{chance.randint(10, 29):02}T{chance.randint(0, 23):02}:12:07Z",
        pid=1000 + index if is_up else None, epoch=chance.randint(1, 9), restarts=chance.choice([0] * 20 + [1, 2, 7]),
        pending=("ram", "cpus") if index % 50 == 7 else (), problems=PROBLEMS if phase is Phase.INVALID else (),
        revision=1 << 40, incarnation=f"{index:08x}-0000-4000-8000-000000000000" if is_up else None,
        last_exit="guest-shutdown" if phase is Phase.STOPPED else None, accelerator="kvm" if is_up else None,
        machine="pc-q35-7.2", run_state="running" if is_up else None, agent=agent if is_up else None,
    )  # fmt: skip
    yield layout.status_key(name), status.to_json()
    if is_up:
        lock = Lock(
            host=HostName(host), boot_id="b", epoch=status.epoch, state=LockState.RUNNING,
            incarnation=status.incarnation or "", pid=status.pid, starttime=1, storage=Storage.RBD,
            clients=(f"192.0.2.1:0/{index}",), facts=layout.facts,
        )  # fmt: skip
        yield layout.lock_key(name), lock.to_json()
    told = [
        Event(at="2026-11-29T01:10:00Z", host=host, event="instance.starting", epoch=1, reason="its keys ask for it"),
        Event(at="2026-11-29T01:10:01Z", host=host, event="instance.running", epoch=1, reason="QEMU runs the guest"),
        Event(at="2026-11-29T03:10:00Z", host=host, event="instance.ended", epoch=1, reason="crashed (signal 9)"),
        Event(at="2026-11-29T03:10:02Z", host=host, event="instance.running", epoch=2, reason="QEMU runs the guest"),
    ]
    yield layout.events_key(name), to_json(told)[0]
