"""A machine that changes while it runs, in virtual time: what is done in which order, and what each cut leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.nics import BRIDGE, TUN, Link
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.machine.changes import GUEST_S, SILENT_S
from tests.fakes.guard import FakeGuard
from tests.fakes.qemu import FakeQemu
from tests.instance.test_failpoints import Cut, cut_at, go_on
from tests.support.host import LAYOUT, ONE, Host

__all__ = ["cut_at"]

MAC = "52:54:00:00:00:02"


async def settled(host: Host, qemu: FakeQemu) -> None:
    """Wait until nothing is pending, and nothing is left of what was begun; the machine was not restarted."""
    await host.until(lambda: host.status.pending == () and host.status.reason == "runs")
    record = host.run_dir.instance(ONE).read_incarnation()
    assert record is not None
    assert (record.coming, record.going) == ((), ())
    plugged = qemu.plugged
    assert {f"{name}-dev" for name in plugged.nodes} <= plugged.devices.keys()
    assert {f"nic{name.removeprefix('net')}" for name in plugged.netdevs} <= plugged.devices.keys()
    assert len(host.qemus.all) == 1
    assert host.lock is not None
    assert host.lock.storage is record.storage


def images(host: Host) -> tuple[str, ...]:
    assert host.lock is not None
    return host.lock.images


def storage(host: Host) -> Storage:
    assert host.lock is not None
    return host.lock.storage


async def with_image(host: Host, **more: str) -> FakeQemu:
    host.wish(rbd="rbd/vm", **more)
    host.begin()
    return await host.runs()


async def test_a_disk_comes_and_goes(host: Host) -> None:
    """Law 3: its client, and its image, are in the lock before the guest sees it; later neither is."""
    qemu = await with_image(host)
    host.put(**{"disk/3": "rbd/data iops=100"})
    await settled(host, qemu)
    assert qemu.plugged.seen == ["+disk3-dev"]
    assert qemu.commands.index("blockdev-add") < qemu.commands.index("device_add")
    assert images(host) == ("rbd/vm", "rbd/data")
    host.drop("disk/3")
    await settled(host, qemu)
    assert qemu.plugged.seen == ["+disk3-dev", "-disk3-dev"]
    assert images(host) == ("rbd/vm",)
    assert (qemu.plugged.nodes, qemu.plugged.objects & {"disk3-limit"}) == ({"disk0"}, set())


async def test_the_lock_comes_before_the_guest(host: Host) -> None:
    """Law 3: where etcd refuses, the guest does not get the disk, and QEMU does not keep it open."""
    qemu = await with_image(host)
    writes = host.store.writes_begun
    host.store.faults = {writes: "lost request"}
    host.put(**{"disk/1": "rbd/data"})
    await host.until(lambda: not host.store.faults)
    assert qemu.plugged.seen == []
    assert qemu.plugged.nodes == {"disk0"}
    await settled(host, qemu)
    assert qemu.plugged.seen == ["+disk1-dev"]


async def test_a_disk_that_is_in_use_is_waited_for(host: Host) -> None:
    """Law 3: an image that somebody else has open is not given, and not kept open; the reason says who has it."""
    qemu = await with_image(host)
    host.fencing.elsewhere["rbd/data"] = {"192.0.2.7:0/7"}
    host.put(**{"disk/1": "rbd/data"})
    await host.until(lambda: "open elsewhere" in host.status.reason)
    assert host.status.reason.startswith("runs; disk/1: its guest does not get it yet: ")
    assert host.status.pending == ("disk/1",)
    assert (qemu.plugged.seen, qemu.plugged.nodes) == ([], {"disk0"})
    host.fencing.elsewhere.clear()
    await settled(host, qemu)


@pytest.mark.parametrize(
    "cut",
    ["object-add", "blockdev-add", "device_add", "device_del", "blockdev-del", "object-del", "qom-list",
     "query-named-block-nodes"],
)  # fmt: skip
async def test_a_change_that_is_cut_off_is_gone_on_with(host: Host, cut: str) -> None:
    """Law: wherever QEMU's answer is lost, it ends as the keys want it, and nothing is left over."""
    qemu = await with_image(host)
    host.qemus.lose_answer_to = cut
    host.put(**{"disk/1": "rbd/data iops=7"})
    await host.clock.advance(3 * SILENT_S)
    await settled(host, qemu)
    assert qemu.plugged.devices.keys() >= {"disk1-dev"}
    host.drop("disk/1")
    await host.clock.advance(3 * SILENT_S)
    await settled(host, qemu)
    assert host.qemus.lose_answer_to is None
    assert "disk1-dev" not in qemu.plugged.devices
    assert (qemu.plugged.nodes, qemu.plugged.objects & {"disk1-limit"}) == ({"disk0"}, set())


@pytest.mark.parametrize("word", ["ignores", "refuses"])
async def test_a_guest_that_does_not_let_go(host: Host, word: str) -> None:
    """§2: that is told and stays pending; it is not asked for ever, but noticed when it lets go, and asked anew."""
    qemu = await with_image(host, **{"disk/1": "rbd/data"})
    qemu.plugged.guest = word
    host.drop("disk/1")
    await host.until(lambda: "disk/1: its guest" in host.status.reason)
    await host.clock.advance(GUEST_S * 10)
    assert host.status.pending == ("disk/1",)
    assert qemu.commands.count("device_del") == 1
    host.put(description="touched")
    await host.clock.advance(1.0)
    assert qemu.commands.count("device_del") == 2
    if word == "refuses":
        qemu.plugged.guest = "heeds"
        host.put(description="touched again")
    else:
        qemu.plugged.let_go("disk1-dev")
    await settled(host, qemu)
    assert qemu.plugged.nodes == {"disk0"}


async def test_a_key_that_is_there_again(host: Host) -> None:
    """Law: while the guest was asked in vain the key may be written back; what it lets go of later is given again."""
    qemu = await with_image(host, **{"disk/1": "rbd/data"})
    qemu.plugged.guest = "ignores"
    host.drop("disk/1")
    await host.until(lambda: "disk1-dev" in qemu.plugged.asked)
    host.put(**{"disk/1": "rbd/data"})
    await host.clock.advance(GUEST_S * 2)
    assert (host.status.pending, host.status.reason) == ((), "runs")
    qemu.plugged.let_go("disk1-dev")
    await settled(host, qemu)
    assert qemu.plugged.seen == ["-disk1-dev", "+disk1-dev"]


@pytest.mark.parametrize("word", ["heeds", "ignores"])
async def test_a_successor_goes_on(host: Host, word: str) -> None:
    """Law 8: what is going when a supervisor ends is on record; its successor asks QEMU what became of it."""
    qemu = await with_image(host, **{"disk/1": "rbd/data"})
    qemu.plugged.guest = "ignores"
    host.drop("disk/1")
    await host.until(lambda: "disk1-dev" in qemu.plugged.asked)
    await host.die()
    if word == "heeds":
        qemu.plugged.let_go("disk1-dev")
    host.begin()
    if word == "ignores":
        await host.until(lambda: "its guest is asked" in host.status.reason)
        qemu.plugged.let_go("disk1-dev")
    await settled(host, qemu)
    assert qemu.plugged.nodes == {"disk0"}


async def test_nothing_is_taken_for_a_restored_backup(host: Host) -> None:
    """Law 11: keys that are gone in another history take nothing from a guest; at the next start it goes without."""
    qemu = await with_image(host)
    host.put(**{"disk/1": "rbd/data"})
    await settled(host, qemu)
    record = host.run_dir.instance(ONE).read_incarnation()
    assert record is not None
    await host.die()
    host.run_dir.instance(ONE).write_incarnation(replace(record, history="former"))
    host.begin()
    host.drop("disk/1")
    await host.until(lambda: host.status.pending == ("disk/1",))
    await host.clock.advance(60.0)
    assert "device_del" not in qemu.commands


async def test_a_file_pins_before_the_guest_has_it(host: Host) -> None:
    """Law 7: the lock says that storage cannot fence it before the guest may write; and no more once it is gone."""
    host.local_disks.folder.mkdir()
    qemu = await with_image(host)
    assert storage(host) is Storage.RBD
    host.put(**{"disk/1": "file:a.raw size=1M"})
    await settled(host, qemu)
    assert storage(host) is Storage.UNFENCEABLE
    assert host.status.files == {"file:a.raw": "a"}
    assert qemu.plugged.sets == {97470001}
    host.drop("disk/1")
    await settled(host, qemu)
    assert storage(host) is Storage.RBD
    assert qemu.plugged.sets == set()


async def test_the_guard_comes_before_the_guest(host: Host) -> None:
    """Law 7: where a guard is to watch such a machine, its guest gets no file before it does; later it is let off."""
    host.local_disks.folder.mkdir()
    host.guard = guard = FakeGuard()
    qemu = await with_image(host)
    host.qemus.on_record = lambda qemu: qemu.environment["KVMSUPERVISOR_INCARNATION"] in guard.charges
    guard.trouble = "no answer"
    host.put(**{"disk/1": "file:a.raw size=1M"})
    await host.until(lambda: "no guard watches it yet" in host.status.reason)
    assert (qemu.plugged.seen, storage(host)) == ([], Storage.RBD)
    guard.trouble = None
    await settled(host, qemu)
    assert storage(host) is Storage.UNFENCEABLE
    host.drop("disk/1")
    await settled(host, qemu)
    assert guard.charges.keys() == set()


async def test_of_two_that_name_one_image_one_goes_first(host: Host) -> None:
    """Decision 0019: who has the greater id waits while the other one has a lock; nothing is tried for ever."""
    qemu = await with_image(host)
    other = InstanceId("0")
    host.etcd.write(LAYOUT.wish_key(other, "disk/1"), "rbd/data")
    host.etcd.write(LAYOUT.wish_key(other, "ram"), "64")
    assert host.lock is not None
    host.etcd.write(LAYOUT.lock_key(other), host.lock.to_json())
    host.put(**{"disk/1": "rbd/data"})
    await host.until(lambda: "named by the keys of 0, too" in host.status.reason)
    assert "blockdev-add" not in qemu.commands
    host.etcd.erase(LAYOUT.lock_key(other))
    await host.until(lambda: "disk1-dev" in qemu.plugged.devices)


async def test_a_disk_in_ceph_waits_where_qemu_does_not_reach_it(host: Host) -> None:
    """Law: a QEMU that was started without Ceph sees none of it; the key is pending, and nothing is tried."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.put(**{"disk/1": "rbd/data"})
    await host.until(lambda: host.status.pending == ("disk/1",))
    await host.clock.advance(60.0)
    assert "blockdev-add" not in qemu.commands


async def test_a_nic_comes_and_goes(host: Host) -> None:
    """§2: on a tap of its own; its link as its key says; one that QEMU refuses leaves no tap."""
    host.wish(mac="52:54:00:00:00:01", bridge="br0")
    host.begin()
    qemu = await host.runs()
    host.put(**{"nic/2/mac": MAC, "nic/2/bridge": "br1", "nic/2/link": "down"})
    await settled(host, qemu)
    assert qemu.plugged.seen == ["+nic2"]
    assert qemu.plugged.down == {"nic2"}
    record = host.run_dir.instance(ONE).read_incarnation()
    assert record is not None
    assert (record.taps, record.tap_indexes, record.bridges) == (("tap7", "tap8"), (7, 8), ("br0", "br1"))
    host.put(**{"nic/2/link": "up", "link": "down"})
    await settled(host, qemu)
    assert qemu.plugged.down == {"nic0"}
    host.drop("nic/2/mac", "nic/2/bridge", "nic/2/link")
    await settled(host, qemu)
    record = host.run_dir.instance(ONE).read_incarnation()
    assert record is not None
    assert (record.taps, record.bridges) == (("tap7",), ("br0",))
    qemu.refuses["netdev_add"] = "no such thing"
    host.put(**{"nic/1/mac": MAC, "nic/1/bridge": "br1"})
    await host.until(lambda: "no such thing" in host.status.reason)
    assert host.status.pending == ("nic/1/mac", "nic/1/bridge")
    await host.clock.advance(600.0)
    assert qemu.commands.count("getfd") == 4


async def test_a_cable_that_is_out_from_the_start(host: Host) -> None:
    """§2: it is out before the guest runs."""
    host.wish(mac="52:54:00:00:00:01", bridge="br0", link="down")
    host.begin()
    qemu = await host.runs()
    assert qemu.plugged.down == {"nic0"}
    assert qemu.commands.index("set_link") < qemu.commands.index("cont")


async def test_another_bridge(host: Host) -> None:
    """§2: the tap goes into the other bridge, the first NIC's too; the guest keeps its NIC."""
    host.wish(mac="52:54:00:00:00:01", bridge="br0")
    host.begin()
    qemu = await host.runs()
    bridges = (Link(index=1, name="br0", kind=BRIDGE), Link(index=2, name="br1", kind=BRIDGE))
    host.links.set(*bridges, Link(index=7, name="tap7", kind=TUN, master=1))
    host.put(bridge="br1")
    await settled(host, qemu)
    assert host.links.plugged == [(7, "br1")]
    assert qemu.plugged.seen == []


async def test_limits(host: Host) -> None:
    """§2: a limit follows its key, on a disk that began with one, and on one that did not; the first disk's, too."""
    qemu = await with_image(host, **{"disk/1": "rbd/data iops=5"})
    host.put(rbd="rbd/vm iops=9", **{"disk/1": "rbd/data iops=6"})
    await settled(host, qemu)
    assert qemu.plugged.limits == {"disk0-dev": 9, "disk1-limit": 6}
    host.put(rbd="rbd/vm", **{"disk/1": "rbd/data"})
    await settled(host, qemu)
    assert qemu.plugged.limits == {"disk0-dev": 0, "disk1-limit": 0}


async def test_memory_and_processors(host: Host) -> None:
    """§2: up to what the machine was started for; what the guest has not taken is pending, and told."""
    host.wish(ram_max="1G", cpus_max="3")
    host.begin()
    qemu = await host.runs()
    host.put(ram="128", cpus="3")
    await settled(host, qemu)
    assert qemu.plugged.cpus == [3, 3]
    assert qemu.plugged.memory == [64 << 20, 64 << 20]
    assert host.context.admission._promised[ONE] == 64 + 128
    qemu.plugged.guest = "ignores"
    host.put(ram="65")
    await host.until(lambda: "ram: its guest has 128 of 65 MiB" in host.status.reason)
    await host.clock.advance(GUEST_S * 3)
    assert "has no driver for more" in host.status.reason
    assert host.status.pending == ("ram",)
    qemu.plugged.take_memory()
    await settled(host, qemu)
    # Whole blocks of 2 MiB.
    assert qemu.plugged.memory == [2 << 20, 2 << 20]
    host.put(ram="2G", ram_max="2G", cpus="1")
    await host.until(lambda: set(host.status.pending) == {"ram", "ram_max", "cpus"})
    assert host.status.reason == "runs"


async def test_keys_that_are_being_written_are_waited_for(host: Host) -> None:
    """Decision 0003: a NIC whose bridge comes a moment after its MAC is not given before that."""
    host.wish(mac="52:54:00:00:00:01", bridge="br0")
    host.begin()
    qemu = await host.runs()
    host.put(**{"nic/1/mac": MAC})
    await host.clock.advance(0.1)
    host.put(**{"nic/1/bridge": "br1"})
    await settled(host, qemu)
    assert host.qemus.network.allowed[-1] == "br1"
    assert LAYOUT.wish_key(ONE, "nic/1/mac") in host.etcd.data


async def test_a_bad_key_changes_nothing(host: Host) -> None:
    """Law: a machine whose keys have a problem runs on as it was, with all it has."""
    qemu = await with_image(host, **{"disk/1": "rbd/data"})
    host.put(**{"disk/1": "nonsense"})
    await host.clock.advance(60.0)
    assert host.status.phase is Phase.RUNNING
    assert "device_del" not in qemu.commands


@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "not wanted"])
@pytest.mark.parametrize(
    "name", ["before CHANGE", "coming, not open", "open, not on record", "on record, not given", "NIC coming"]
)
async def test_cut_off(host: Host, cut_at: Callable[[str], Cut], name: str, wanted: bool) -> None:
    """Law 8: who comes next brings it to the end that the keys want by then, and nothing is left over."""
    qemu = await with_image(host)
    cut = cut_at(name)
    more = {"disk/1": "rbd/data iops=9", "nic/1/mac": MAC, "nic/1/bridge": "br1"}
    host.put(**more)
    await host.until(lambda: cut.reached)
    if not wanted:
        host.drop(*more)
    await go_on(host, cut)
    await settled(host, qemu)
    assert ({"disk1-dev", "nic1"} <= qemu.plugged.devices.keys()) is wanted
    assert images(host) == (("rbd/vm", "rbd/data") if wanted else ("rbd/vm",))


@pytest.mark.parametrize("name", ["going, not asked for", "closed, still on record"])
async def test_cut_off_while_it_goes(host: Host, cut_at: Callable[[str], Cut], name: str) -> None:
    """Law 8: the same of what leaves."""
    qemu = await with_image(host, **{"disk/1": "rbd/data iops=9"})
    cut = cut_at(name)
    host.drop("disk/1")
    await go_on(host, cut)
    await settled(host, qemu)
    assert "disk1-dev" not in qemu.plugged.devices
    assert (images(host), qemu.plugged.nodes) == (("rbd/vm",), {"disk0"})


@pytest.mark.parametrize("has_bus", [True, False])
async def test_a_machine_of_an_earlier_release(host: Host, has_bus: bool) -> None:
    """Law 8: its record does not say all that; it is changed where it has the bus, and otherwise waits for a start."""
    qemu = await with_image(host, **({"disk/1": "rbd/data"} if has_bus else {}))
    await host.die()
    directory = host.run_dir.instance(ONE)
    record = directory.read_incarnation()
    assert record is not None
    unknown = {"pluggable", "plugged_mib", "plugged_cpus", "ram_max_mib", "cpus_max", "link_down"}
    older = {name: value for name, value in record.spec.items() if name not in unknown}
    directory.write_incarnation(replace(record, spec=older))
    host.begin()
    host.put(**{"disk/2": "rbd/more"})
    if has_bus:
        await settled(host, qemu)
        host.drop("disk/1", "disk/2")
        await settled(host, qemu)
        assert qemu.plugged.seen == ["+disk2-dev", "-disk1-dev", "-disk2-dev"]
        host.put(**{"disk/3": "rbd/third"})
        await settled(host, qemu)
    else:
        await host.until(lambda: host.status.pending == ("disk/2",))
        await host.clock.advance(60.0)
        assert (qemu.plugged.seen, host.status.changing) == ([], ())
