"""What a running machine can become: which steps there are, in which order, and what the guest sees afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain import live
from kvmsupervisor.domain.live import Kind, Step, has_ceph_key, key_of, reaches_ceph, seen_now, steps
from kvmsupervisor.domain.local_disk import FileDisk
from kvmsupervisor.domain.move_checks import seen_by_guest
from kvmsupervisor.domain.spec import Disk, Nic, RbdDisk, Spec
from tests.domain.test_argv import argv

ARGV = ("qemu", "-object", '{"qom-type":"secret","id":"ceph0"}', "-blockdev", '{"node-name":"disk0","driver":"rbd"}')
A, B = Disk(1, RbdDisk("p", "a")), Disk(2, file=FileDisk("b.raw"))
N, M = Nic(1, "52:54:00:00:00:01", "br0"), Nic(2, "52:54:00:00:00:02", ":user")
BASE = Spec(ram_mib=256, cpus=1, pluggable=True, mac="52:54:00:00:00:00", bridge="br0", rbd=RbdDisk("p", "i"))
GROWS = replace(BASE, ram_max_mib=1024, cpus_max=4)


def told(running: Spec, wanted: Spec, *, takes: bool = True, reached: tuple[str, ...] = ARGV) -> list[tuple[str, str]]:
    return [(step.kind.name, step.key) for step in steps(running, wanted, argv=reached, takes=takes)]


@pytest.mark.parametrize(
    ("running", "wanted", "expected"),
    [
        (BASE, BASE, []),
        (BASE, replace(BASE, disks=(A, B)), [("PLUG", "disk/1"), ("PLUG", "disk/2")]),
        (replace(BASE, disks=(A, B)), BASE, [("UNPLUG", "disk/1"), ("UNPLUG", "disk/2")]),
        # Another image: the place has to be free first.
        (replace(BASE, disks=(A,)), replace(BASE, disks=(Disk(1, RbdDisk("p", "z")),)), [("UNPLUG", "disk/1")]),
        # From one place to another: it is in no two at once.
        (replace(BASE, disks=(A,)), replace(BASE, disks=(replace(A, number=3, key="disk/3"),)), [("UNPLUG", "disk/1")]),
        # What an option would need a restart for takes no disk away.
        (replace(BASE, disks=(A,)), replace(BASE, disks=(Disk(1, RbdDisk("p", "a", discard=True)),)), []),
        (replace(BASE, disks=(A,)), replace(BASE, disks=(Disk(1, RbdDisk("p", "a", size=1 << 30)),)), []),
        (replace(BASE, disks=(A,)), replace(BASE, disks=(Disk(1, RbdDisk("p", "a", iops=5)),)), [("LIMIT", "disk/1")]),
        (BASE, replace(BASE, rbd=RbdDisk("p", "i", iops=5)), [("LIMIT", "rbd")]),
        (BASE, replace(BASE, rbd=RbdDisk("p", "z")), []),
        (BASE, replace(BASE, rbd=None), []),
        (BASE, replace(BASE, nics=(N, M)), [("PLUG", "nic/1/mac")]),
        (replace(BASE, nics=(N, M)), BASE, [("UNPLUG", "nic/1/mac"), ("UNPLUG", "nic/2/mac")]),
        (BASE, replace(BASE, mac=None), []),
        (BASE, replace(BASE, bridge="br1", link_down=True), [("BRIDGE", "bridge"), ("LINK", "link")]),
        (BASE, replace(BASE, bridge=":user"), []),
        (replace(BASE, nics=(N,)), replace(BASE, nics=(replace(N, bridge="br1"),)), [("BRIDGE", "nic/1/bridge")]),
        (
            replace(BASE, nics=(N,)),
            replace(BASE, nics=(replace(N, mac="52:54:00:00:00:09"),)),
            [("UNPLUG", "nic/1/mac")],
        ),
        (GROWS, replace(GROWS, cpus=4, ram_mib=1024), [("PROCESSORS", "cpus"), ("MEMORY", "ram")]),
        (GROWS, replace(GROWS, cpus=5, ram_mib=1025, cpus_max=5, ram_max_mib=1025), []),
        (replace(GROWS, cpus=2), GROWS, []),
        (BASE, replace(BASE, cpus=2, ram_mib=512), []),
        # Not below what it was started with.
        (live.with_memory(GROWS, 512), replace(GROWS, ram_mib=256), [("MEMORY", "ram")]),
        (live.with_memory(GROWS, 512), replace(GROWS, ram_mib=255), []),
    ],
)
def test_steps(running: Spec, wanted: Spec, expected: list[tuple[str, str]]) -> None:
    """Law: what leaves comes first; whatever is no step waits for a restart."""
    assert told(running, wanted) == expected


def test_what_a_machine_has_no_way_to() -> None:
    """Law: without the bus nothing comes or goes; without a start with Ceph no image comes; a backup takes nothing."""
    older = replace(BASE, pluggable=False)
    assert told(older, replace(older, disks=(A,), nics=(N,))) == []
    assert told(replace(older, disks=(A,)), older) == [("UNPLUG", "disk/1")], "it has the bus by its disk"
    assert told(BASE, replace(BASE, disks=(A, B)), reached=("qemu",)) == [("PLUG", "disk/2")]
    assert told(replace(BASE, disks=(A,)), replace(BASE, disks=(B,)), takes=False) == [("PLUG", "disk/2")]
    other = replace(GROWS, bridge="br1", link_down=True, rbd=RbdDisk("p", "i", iops=3), cpus=2, ram_mib=512)
    assert told(GROWS, other, takes=False) == [("PROCESSORS", "cpus"), ("MEMORY", "ram")]
    assert told(live.with_memory(GROWS, 512), GROWS, takes=False) == []


def test_names() -> None:
    """Law: a device is known by its name alone, also to who finds nothing but a record."""
    spec = replace(BASE, disks=(A, B), nics=(N,))
    (step,) = (one for one in steps(BASE, spec, argv=ARGV, takes=True) if one.disk == B)
    assert step == Step(kind=Kind.PLUG, device="disk2", key="disk/2", disk=B)
    assert (live.disk_of(spec, "disk2"), live.nic_of(spec, "nic1"), live.disk_of(spec, "nic1")) == (B, N, None)
    assert [key_of(name) for name in ("disk15", "nic3")] == ["disk/15", "nic/3/mac"]
    assert (reaches_ceph(ARGV), has_ceph_key(ARGV), reaches_ceph(("q",)), has_ceph_key(("q",))) == (
        True,
        True,
        False,
        False,
    )


CHANGED = [
    live.with_disk(GROWS, A),
    live.with_disk(live.with_disk(GROWS, B), A),
    live.with_nic(live.with_disk(GROWS, B), N),
    live.without_disk(live.with_disk(GROWS, A), 1),
    live.without_nic(live.with_nic(GROWS, N), 1),
    live.with_nic(GROWS, replace(N, mac="52:54:00:00:00:0a", down=True)),
    live.with_memory(live.with_processors(GROWS, 3), 600),
    live.with_limit(live.with_disk(GROWS, A), Disk(1, RbdDisk("p", "a", iops=9))),
    live.with_limit(live.with_disk(GROWS, B), Disk(2, file=FileDisk("b.raw", iops=9))),
    live.with_limit(GROWS, Disk(0, RbdDisk("p", "i", iops=9))),
]


@pytest.mark.parametrize("before", [GROWS, replace(GROWS, disks=(A, B), nics=(N,)), replace(GROWS, disks=(B,))])
@pytest.mark.parametrize("now", CHANGED)
def test_a_changed_machine_is_seen_as_one_that_is_started_so(before: Spec, now: Spec) -> None:
    """Law 13: the source tells what the target's command line will say, word for word, whatever it was started with."""
    started = argv(before, files=tuple(range(30, 30 + len(before.files))))
    now = replace(now, plugged_cpus=now.cpus - before.cpus)
    assert seen_now(seen_by_guest(started, ()), now) == seen_by_guest(
        argv(now, files=tuple(range(30, 30 + len(now.files)))), ()
    )


def test_what_was_not_changed_is_told_as_it_was_started() -> None:
    """Law 13: by an earlier release maybe, whose words differ: that has to be seen, not hidden."""
    started = [word.replace(",mac=", ",extra=1,mac=") for word in argv(replace(BASE, nics=(N,), disks=(A,)))]
    seen = seen_by_guest(started, ("-x",))
    assert seen_now(seen, replace(BASE, nics=(N,), disks=(A,))) == seen
    without_bus = seen_by_guest(argv(replace(BASE, pluggable=False)), ())
    assert seen_now(without_bus, replace(BASE, pluggable=False)) == without_bus
