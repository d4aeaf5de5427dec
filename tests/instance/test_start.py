"""The steps of a start in virtual time: what is missing on the host is waited for, and what is remembered of one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.machine import boot_media as media
from kvmsupervisor.machine.boot_media import Media, MediaTrouble
from kvmsupervisor.machine.provisioning import HOST_RETRY_S, MEDIA_RETRY_S
from tests.fakes.clock import settle
from tests.fakes.qemu import FakeQemu
from tests.support.host import LAYOUT, ONE, Host

HOUR_S = 3600.0
MAC = "52:54:00:00:00:01"


class World:
    """What of the host may be missing.

    Attributes:
        bridges: those that are there.
        site: URLs that can be fetched.
        fetched: how often something was fetched, or tried to be.
        slow: a fetch takes until this is set.
    """

    def __init__(self, path: Path) -> None:
        self.bridges = {"br0"}
        self.site: set[str] = set()
        self.fetched: list[str] = []
        self.slow = asyncio.Event()
        self.slow.set()
        self._path = path

    async def furnish(self, url: str, **_: Any) -> Media:
        self.fetched.append(url)
        await self.slow.wait()
        if url not in self.site:
            raise MediaTrouble(f"cloud-config {url}: nobody answers")
        medium = self._path / url.rpartition("/")[2]
        medium.touch()
        return Media(cdroms=(medium,), ignition=None, notice=None)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(media, "furnish", made.furnish)
    return made


@pytest.fixture
def host(host: Host, world: World) -> Host:
    """It has the bridges of the world, br0 by default."""
    host.qemus.network.bridges = world.bridges
    host.side = {"bridge_if": "br0"}
    return host


def media_of(qemu: FakeQemu) -> list[str]:
    """The files behind its media."""
    return [word for word in qemu.argv if ",set=97471" in word]


# --- what is missing on the host ------------------------------------------------------------------------------


async def test_what_is_missing_is_waited_for(host: Host, world: World) -> None:
    """Law: without its bridge a machine waits and says why, once; it starts by itself when that is mended."""
    world.bridges.clear()
    host.wish(mac=MAC)
    with capture_logs() as lines:
        host.begin()
        await host.clock.advance(HOUR_S)
    assert (host.status.phase, host.status.reason) == (Phase.WAITING, "there is no bridge br0")
    assert host.published == host.status
    assert host.qemus.all == []
    told = [line for line in lines if line["event"] == "instance.not_ready"]
    assert [(line["reason"], line["log_level"]) for line in told] == [("there is no bridge br0", "warning")]
    assert len(lines) < 20
    world.bridges.add("br0")
    await host.until(lambda: host.qemus.alive, HOST_RETRY_S)
    await host.runs()


async def test_who_waits_for_the_host_holds_nobody_up(host: Host, world: World) -> None:
    """Law: a machine that waits for something of its host holds no start slot."""
    world.bridges.clear()
    host.wish(mac=MAC)
    host.begin()
    for _ in range(20):
        await host.clock.advance(HOST_RETRY_S / 2)
        assert host.context.admission.state(ONE) is None


async def test_a_second_trouble_is_told_too(host: Host, world: World) -> None:
    """Law: the log tells each trouble when it comes, not each time that it is seen."""
    world.bridges.clear()
    world.site.add("http://h/x")
    host.wish(mac=MAC)
    with capture_logs() as lines:
        host.begin()
        await host.clock.advance(60.0)
        host.put(bridge="br1")
        await host.clock.advance(60.0)
    told = [line["reason"] for line in lines if line["event"] == "instance.not_ready"]
    assert told == ["there is no bridge br0", "there is no bridge br1"]


async def test_an_etcd_without_space_is_told_once_a_minute(host: Host) -> None:
    """Law: what is tried again is told when it begins and while it lasts, and fills no log."""
    host.etcd.fill()
    host.wish()
    with capture_logs() as lines:
        host.begin()
        await host.clock.advance(HOUR_S)
    told = [line for line in lines if line["log_level"] != "debug" and line["event"].startswith("instance.")]
    troubles = [line for line in told if line["event"] == "instance.etcd_trouble"]
    assert 59 <= len(troubles) <= 61
    assert {line["untold"] for line in troubles[1:]} == {5}
    assert len(told) - len(troubles) <= 4
    assert "database space exceeded" in host.status.reason


async def test_waiting_for_the_host_writes_nothing(host: Host, world: World) -> None:
    """Law: §2: while nothing changes nothing is written, whatever is tried again and again."""
    world.bridges.clear()
    host.wish(mac=MAC)
    host.begin()
    await host.clock.advance(60.0)
    before = host.etcd.revision
    await host.clock.advance(HOUR_S)
    assert host.etcd.revision == before


async def test_a_changed_key_ends_the_wait_at_once(host: Host, world: World) -> None:
    """Law: whoever mends the keys does not wait for the host to be looked at again."""
    host.wish(**{"cloud-config": "http://h/typo"})
    world.site.add("http://h/x")
    host.begin()
    await host.clock.advance(1.0)
    assert "nobody answers" in host.status.reason
    before = host.clock.now()
    host.put(**{"cloud-config": "http://h/x"})
    await settle()
    assert len(host.qemus.alive) == 1
    assert host.clock.now() == before


async def test_a_removed_machine_waits_no_longer(host: Host, world: World) -> None:
    """Law: one that waits for its host can be taken away like any other; its lock goes with it."""
    world.bridges.clear()
    host.wish(mac=MAC)
    host.begin()
    await host.clock.advance(60.0)
    host.put(power="off")
    await host.until(lambda: host.status.phase is Phase.STOPPED, 1.0)
    await settle()
    assert host.lock is None
    host.put(power="on")
    world.bridges.add("br0")
    await host.runs()


async def test_a_port_that_is_taken_is_waited_for(host: Host) -> None:
    """Law: a SPICE port that another program has is told and waited for, in one piece with the rest."""
    host.qemus.network.taken.add(5901)
    host.wish(spice_port="5901")
    host.begin()
    await host.clock.advance(60.0)
    assert host.status.phase is Phase.WAITING
    assert "port 5901 on 127.0.0.1 cannot be used" in host.status.reason
    host.qemus.network.taken.clear()
    await host.runs()


# --- what takes its time --------------------------------------------------------------------------------------


async def test_media_are_made_before_the_lock_is_taken(host: Host, world: World) -> None:
    """Law: a slow server keeps neither the lock nor a start slot; both are asked for afterwards."""
    world.slow.clear()
    world.site.add("http://h/x")
    host.wish(**{"cloud-config": "http://h/x"})
    host.begin()
    await host.clock.advance(60.0)
    assert host.status.phase is Phase.STARTING
    assert "media" in host.status.reason
    assert (host.lock, host.store.writes_begun) == (None, 0)
    assert host.context.admission.state(ONE) is None
    world.slow.set()
    qemu = await host.runs()
    assert len(media_of(qemu)) == 1
    assert world.fetched == ["http://h/x"]


async def test_media_that_cannot_be_had_leave_the_lock_alone(host: Host, world: World) -> None:
    """Law: while a server is away no lock is taken, and it is not asked more often than every half minute."""
    host.wish(**{"cloud-config": "http://h/x"})
    host.begin()
    await host.clock.advance(10 * MEDIA_RETRY_S)
    assert (host.status.phase, host.status.reason) == (Phase.WAITING, "cloud-config http://h/x: nobody answers")
    assert (host.lock, host.store.writes_begun) == (None, 0)
    assert len(world.fetched) <= 11
    world.site.add("http://h/x")
    await host.until(lambda: host.qemus.alive, MEDIA_RETRY_S)
    await host.runs()


async def test_media_are_made_anew_for_each_start(host: Host, world: World) -> None:
    """Law: user data is fetched for each start of a machine, once."""
    world.site.add("http://h/x")
    host.wish(**{"cloud-config": "http://h/x"})
    host.begin()
    (await host.runs()).crash()
    await host.runs()
    assert world.fetched == ["http://h/x"] * 2


@pytest.mark.parametrize("change", ["removed", "another"])
async def test_a_machine_has_only_the_media_of_its_own_keys(host: Host, world: World, change: str) -> None:
    """Law: keys that change between the media and the start: QEMU gets what was made for the keys as they stand."""
    world.site |= {"http://h/first", "http://h/second"}
    fill = [InstanceId(f"other-{number}") for number in range(4)]
    host.wish(**{"cloud-config": "http://h/first"})
    host.begin()
    for name in fill:
        host.context.admission.request(name, lambda: None)
    await host.clock.advance(1.0)
    assert world.fetched == ["http://h/first"]
    assert host.qemus.all == []
    if change == "removed":
        host.drop("cloud-config")
        host.put(mac=MAC)
    else:
        host.put(**{"cloud-config": "http://h/second"})
    await host.clock.advance(1.0)
    for name in fill:
        host.context.admission.release(name)
    qemu = await host.runs()
    (*found,) = media_of(qemu)
    assert "first" not in "".join(found)
    assert len(found) == (0 if change == "removed" else 1)
    assert ("-netdev" in qemu.argv) == (change == "removed")


# --- the machine type -----------------------------------------------------------------------------------------


def update_qemu(host: Host, version: str) -> None:
    """As after an update of the package: plain names stand for other versions from now on."""
    types: Any = host.context.provisioner._types
    types._aliases = {"q35": f"pc-q35-{version}", "pc": f"pc-i440fx-{version}"}


def machine_of(qemu: FakeQemu) -> str:
    return qemu.argv[qemu.argv.index("-machine") + 1].partition(",")[0]


async def test_the_machine_type_is_recorded(host: Host) -> None:
    """Law: the status tells the version of the machine that the guest was first started on."""
    host.wish()
    host.begin()
    assert machine_of(await host.runs()) == "pc-q35-7.2"
    await host.told()
    assert host.published is not None
    assert (host.published.machine, host.published.machine_key) == ("pc-q35-7.2", "q35")


async def test_a_restart_keeps_the_machine_type(host: Host) -> None:
    """Law: an update of QEMU is no other hardware to a guest: it keeps its version over crashes and restarts."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    update_qemu(host, "10.0")
    qemu.crash()
    qemu = await host.runs()
    assert machine_of(qemu) == "pc-q35-7.2"
    host.put(power="off")
    await host.until(lambda: qemu.presses)
    qemu.shut_down()
    await host.until(lambda: host.status.phase is Phase.STOPPED)
    host.put(power="on")
    assert machine_of(await host.runs()) == "pc-q35-7.2"


async def test_another_machine_is_looked_up_anew(host: Host) -> None:
    """Law: whoever writes another `machine` gets the version that stands for it now; so does writing the former."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    update_qemu(host, "10.0")
    for key, expected in (("pc", "pc-i440fx-10.0"), ("pc-q35-5.2", "pc-q35-5.2"), ("q35", "pc-q35-10.0")):
        host.put(machine=key)
        await settle()
        assert host.status.pending == ("machine",)
        qemu.crash()
        qemu = await host.runs()
        assert machine_of(qemu) == expected
        assert (host.status.machine, host.status.machine_key) == (expected, key)


async def test_a_move_keeps_the_machine_type(host: Host, other: Host) -> None:
    """Law: a host with a newer QEMU starts the guest on the version that it was installed on."""
    host.wish()
    host.begin()
    await host.runs()
    await host.told()
    host.put(host="b")
    other.begin()
    update_qemu(other, "10.0")
    second = await other.runs()
    assert machine_of(second) == "pc-q35-7.2"
    assert host.gone
    await other.told()
    assert other.published is not None
    assert (other.published.host, other.published.machine) == ("b", "pc-q35-7.2")


async def test_a_takeover_keeps_the_machine_type(host: Host, other: Host) -> None:
    """Law: the same when the former host is gone and could say nothing any more."""
    host.wish()
    host.begin()
    await host.runs()
    await host.told()
    await host.die()
    host.sessions = other.sessions = {"b"}
    host.etcd.erase(host.session.key)
    other.put(host="b")
    other.begin()
    update_qemu(other, "10.0")
    await other.until(lambda: other.running)
    assert machine_of(host.qemus.all[-1]) == "pc-q35-7.2"
    assert len(host.qemus.all) == 2


@pytest.mark.parametrize("meanwhile", ["runs", "ends", "stopped"])
async def test_a_successor_keeps_the_machine_type(host: Host, meanwhile: str) -> None:
    """Law: a new supervisor, of a container with a newer QEMU, starts the guest on the version on record."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    if meanwhile == "stopped":
        host.put(power="off")
        await host.until(lambda: qemu.presses)
        qemu.shut_down()
        await host.until(lambda: host.status.phase is Phase.STOPPED)
    await host.told()
    await host.die()
    if meanwhile == "ends":
        qemu.crash()
    host.begin()
    # As the supervisor does when it has read the status keys.
    assert host.published is not None
    host.instance.report.recall(host.published)
    update_qemu(host, "10.0")
    if meanwhile == "runs":
        await host.runs()
        qemu.crash()
    await host.clock.advance(1.0)
    host.put(power="on")
    await host.until(lambda: host.running, 60.0)
    assert len(host.qemus.all) == 2
    assert machine_of(host.qemus.all[-1]) == "pc-q35-7.2"
    await host.told()
    assert host.published is not None
    assert host.published.machine == "pc-q35-7.2"


async def test_a_version_that_was_not_known_is_looked_up_later(host: Host) -> None:
    """Law: a QEMU that could not tell its versions once leaves no plain name on record for good."""
    host.wish()
    host.begin()
    types: Any = host.context.provisioner._types
    types._aliases = {"nothing": "known"}
    qemu = await host.runs()
    assert machine_of(qemu) == "q35"
    update_qemu(host, "7.2")
    qemu.crash()
    assert machine_of(await host.runs()) == "pc-q35-7.2"
    assert host.status.machine == "pc-q35-7.2"


# --- secrets --------------------------------------------------------------------------------------------------


async def test_the_password_is_nowhere_to_be_read(host: Host) -> None:
    """Law: no record, status, lock, file, log line, argument or variable has the SPICE password."""
    with capture_logs() as lines:
        host.wish(spice_port="5901", spice_password="hunter2")
        host.begin()
        qemu = await host.runs()
        host.put(spice_password="hunter3\x1b")
        await host.told()
        assert host.status.problems
        host.put(spice_password="hunter4")
        await host.told()
        assert host.status.pending == ("spice_password",)
        await host.die()
        host.begin()
        await host.runs()
        await host.told()
    assert "hunter" not in repr(lines)
    assert "hunter" not in repr((qemu.argv, qemu.environment))
    facts = {key: value for key, value in host.etcd.data.items() if key != LAYOUT.wish_key(ONE, "spice_password")}
    assert LAYOUT.status_key(ONE) in facts
    assert LAYOUT.lock_key(ONE) in facts
    assert b"hunter" not in b"".join(facts.values())
    assert all(b"hunter" not in getattr(op, "value", b"") for op in host.etcd.writes)
    holding = [path.name for path in files_of(host.path) if b"hunter" in path.read_bytes()]
    assert holding == []


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_a_changed_password_is_pending_for_a_successor_too(host: Host) -> None:
    """Law: the record's digest tells an adopted machine's password from another one, and from the same."""
    host.wish(spice_port="5901", spice_password="hunter2")
    host.begin()
    await host.runs()
    await host.die()
    host.begin()
    await host.runs()
    assert not host.status.pending
    host.put(spice_password="hunter3")
    await settle()
    assert host.status.pending == ("spice_password",)


async def test_a_stopped_machine_that_moves_keeps_what_is_on_record(host: Host, other: Host) -> None:
    """Law: moved while it is off, a guest keeps its machine type, and its epochs go on."""
    host.wish()
    host.begin()
    qemu = await host.runs()
    host.put(power="off")
    await host.until(lambda: qemu.presses)
    await host.until(lambda: host.status.phase is Phase.STOPPED)
    await host.told()
    assert host.published is not None
    assert host.published.machine == "pc-q35-7.2"
    host.put(host="b")
    await host.until(lambda: host.gone)
    other.begin()
    update_qemu(other, "10.0")
    await other.told()
    await other.told()
    other.put(power="on")
    qemu = await other.runs()
    assert (machine_of(qemu), other.status.epoch) == ("pc-q35-7.2", 2)


async def wait_without_ceph(host: Host) -> int:
    """Let it wait for Ceph until its status says so; return how often etcd was read by then."""
    host.disks.trouble = "Ceph does not answer"
    host.wish(rbd="/rbd/vm")
    host.begin()
    await host.until(lambda: host.published)
    await host.clock.advance(60.0)
    return host.store.calls["read"]


async def test_who_waited_reads_nothing_again(host: Host) -> None:
    """Cost: the status in etcd is the one that this host has written, so no other host has had the machine."""
    reads = await wait_without_ceph(host)
    host.disks.trouble = None
    await host.runs()
    assert host.store.calls["read"] == reads


async def test_another_hosts_status_is_heeded_that_came_while_it_waited(host: Host) -> None:
    """Law 2: the epochs go on after those of a host that had the machine meanwhile."""
    await wait_without_ceph(host)
    theirs = replace(host.status, host=HostName("b"), phase=Phase.STOPPED, epoch=7)
    host.etcd.write(LAYOUT.status_key(ONE), theirs.to_json())
    host.disks.trouble = None
    await host.runs()
    assert host.lock is not None
    assert host.lock.epoch == 8
