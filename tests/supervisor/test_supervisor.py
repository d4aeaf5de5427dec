"""One host's supervisor in virtual time: who is told what, removals that are held, errors that stay contained."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.cluster.removal_approval import CONFIRMATION_POLL_S
from kvmsupervisor.cluster.wishes import Wishes
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.supervisor import host as host_module
from kvmsupervisor.supervisor.host import Host
from kvmsupervisor.supervisor.supervisor import Supervisor
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemu, FakeQemus
from tests.fakes.storage import FakeDisks, FakeStorage
from tests.support.outside import outside

ME = "a"
CONFIRMATION = f"/kvmsupervisor/confirm-removal/{ME}"


class Bench:
    """A supervisor over a fake etcd and fake QEMUs; `begin`, `end`, and `begin` again for its successor."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.etcd = FakeEtcd(self.clock.now)
        self.qemus = FakeQemus(self.clock)
        self.path = Path(tempfile.mkdtemp(prefix="kvs"))
        self.more: dict[str, str] = {}
        self.supervisor: Supervisor
        self.host: Host
        self.memory_mib: int | None = None
        self.storage: FakeStorage | None = None
        self.machine: str | None = None
        self._task: asyncio.Task[bool] | None = None
        self.client = self.etcd

    def _connect(self) -> FakeEtcd:
        # Its own client: closing it leaves the store open.
        self.client = self.etcd.peer()
        return self.client

    def _started(self, host: Host) -> None:
        self.host = host

    def settings(self) -> Settings:
        environ = {
            "ETCD_ENDPOINTS": "http://127.0.0.1:1",
            "KVM_HOSTNAME": ME,
            "KVM_RUN_DIR": str(self.path),
            "KVM_LISTEN": "off",
            "KVM_ACCEL": "tcg",
            "KVM_CGROUP": "none",
            "KVM_START_PARALLEL": "64",
        }
        return load_settings(environ | self.more, default_config=self.path / "none.toml")

    async def begin(self, *, virtual_s: float = 5.0, connect: Callable[[], FakeEtcd] | None = None) -> None:
        world = outside(
            self.qemus,
            connect or self._connect,
            memory_mib=self.memory_mib,
            fencing=self.storage,
            disks=None if self.storage is None else FakeDisks(),
            machine=self.machine,
        )
        self.supervisor = Supervisor(self.settings(), world)
        self._task = asyncio.create_task(self.supervisor.run(self._started))
        await self.clock.advance(virtual_s)

    @property
    def again(self) -> bool:
        """Whether the supervisor has ended by itself, for another one to go on."""
        assert self._task is not None
        return self._task.done() and self._task.result()

    async def end(self) -> None:
        assert self._task is not None
        task, self._task = self._task, None
        self.supervisor.stop()
        while not task.done():
            await self.clock.advance(1.0)
        await task

    async def close(self) -> None:
        try:
            if self._task is not None:
                await self.end()
        finally:
            shutil.rmtree(self.path)

    def create(self, *names: str, host: str = ME) -> None:
        for name in names:
            self.etcd.write(f"/kvm/{name}/ram", "64")
            self.etcd.write(f"/kvm/{name}/host", host)

    def there(self, host: str) -> None:
        """Another host has a session."""
        self.etcd.write(f"/kvmsupervisor/hosts/{host}", "{}")

    def remove(self, *names: str) -> None:
        """All keys at once, the locks too."""
        self.etcd.erase(*(key for key in self.etcd.data if key.split("/")[1] == "kvm" and key.split("/")[2] in names))

    async def running(self, *names: str) -> dict[str, FakeQemu]:
        """Create instances and let them run."""
        self.create(*names)
        await self.clock.advance_until(lambda: len(self.of(*names)) == len(names), 60.0)
        await self.clock.advance(1.0)
        return self.of(*names)

    def of(self, *names: str) -> dict[str, FakeQemu]:
        return {qemu.instance: qemu for qemu in self.qemus.running if qemu.instance in names}

    def status(self, name: str) -> Status | None:
        return next((status for status in self.host.http_view.instances() if status.id == name), None)

    @property
    def phases(self) -> dict[str, Phase]:
        return {status.id: status.phase for status in self.host.http_view.instances()}

    def metric(self, line: str) -> float:
        text = self.host.http_view.metrics("")[0].decode()
        (value,) = [row.rpartition(" ")[2] for row in text.splitlines() if row.rpartition(" ")[0] == line]
        return float(value)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.close()


def lock_of(host: str, storage: Storage = Storage.UNFENCEABLE) -> bytes:
    return Lock(
        host=HostName(host), boot_id="b", epoch=3, state=LockState.RUNNING, incarnation="y", pid=1, starttime=1,
        storage=storage,
    ).to_json()  # fmt: skip


# --- whose instances ------------------------------------------------------------------------------------------


async def test_what_is_ours_runs_and_what_is_not_is_left_alone(bench: Bench) -> None:
    """Level-triggered: keys that stood before and keys that come later are the same; other hosts' are none of ours."""
    bench.create("1")
    bench.create("9", host="b")
    await bench.begin()
    await bench.running("2")
    assert bench.of("1", "2", "9").keys() == {"1", "2"}
    assert bench.phases == {"1": Phase.RUNNING, "2": Phase.RUNNING}
    assert bench.host.http_view.ready()[0]


async def test_a_host_whose_name_is_in_anothers_lock_does_not_spin(bench: Bench) -> None:
    """A lock that merely contains our name ("a" is in every one of them) is another host's."""
    bench.create("1", host="ab")
    bench.etcd.write("/kvm/1/lock", lock_of("ab"))
    bench.create("2", host="ab")
    await bench.begin()
    with capture_logs() as logs:
        bench.etcd.write("/kvm/1/lock", lock_of("ba"))
        await bench.clock.advance(60.0)
    assert not [line for line in logs if line["event"] == "instance.forgotten"]
    assert bench.phases == {}


async def test_a_lock_of_ours_without_a_wish_is_released(bench: Bench) -> None:
    """Law 9: a lock left over from our own dead process goes, also when the instance is another host's by now."""
    bench.there("b")
    bench.create("1", host="b")
    bench.etcd.write("/kvm/1/lock", lock_of(ME))
    bench.etcd.write("/kvm/2/lock", lock_of(ME))
    await bench.begin()
    assert not [key for key in bench.etcd.data if key.endswith("/lock")]
    assert bench.phases == {}


@pytest.mark.parametrize("garbage", [b"", b"a", b"\xff" * 10, b"[" * 70_000, b"a" * 70_000])
async def test_garbage_hurts_nobody(bench: Bench, garbage: bytes) -> None:
    """No bytes under the prefix, in a status or in a host's session hinder the others."""
    for key in ("/kvm/1/lock", "/kvm/1/host", "/kvm//x", "/kvm/../host", "/kvm/1/2/3", b"/kvm/\xff/host"):
        bench.etcd.write(key, garbage)
    bench.etcd.write("/kvmsupervisor/instances/2", garbage)
    bench.etcd.write("/kvmsupervisor/hosts/b", garbage)
    bench.etcd.write(CONFIRMATION, garbage)
    await bench.begin()
    await bench.running("2")
    assert bench.phases["2"] is Phase.RUNNING
    assert [host.host for host in bench.host.http_view.hosts()] == [ME]
    bench.host.http_view.metrics("")


async def test_keys_removed_for_good_leave_nothing(bench: Bench) -> None:
    """`etcdctl del --prefix`: shut down gracefully, lock and status deleted, folder and metrics gone."""
    await bench.begin()
    qemus = await bench.running("1", "2")
    bench.remove("1")
    await bench.clock.advance(10.0)
    assert qemus["1"].presses
    assert not qemus["1"].alive
    assert not [key for key in bench.etcd.data if "/1" in key]
    assert list(RunDir(bench.path).instances()) == ["2"]
    assert 'instance="1"' not in bench.host.http_view.metrics("")[0].decode()
    assert bench.of("1", "2").keys() == {"2"}


async def test_a_watch_that_lags_brings_nothing_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch still shows the lock that was just deleted: the instance stays forgotten, its status deleted."""
    await bench.begin()
    await bench.running("1")
    shown = Wishes.lock_of
    stale = bench.host._wishes.lock_of(InstanceId("1"))
    assert stale is not None
    monkeypatch.setattr(Wishes, "lock_of", lambda self, name: shown(self, name) or stale)
    bench.remove("1")
    await bench.clock.advance(10.0)
    assert bench.phases == {}
    assert not [key for key in bench.etcd.data if "/1" in key]


async def test_keys_that_come_back_run_again(bench: Bench) -> None:
    """Level-triggered: an instance that was forgotten is met anew."""
    await bench.begin()
    first = (await bench.running("1"))["1"]
    bench.remove("1")
    await bench.clock.advance(10.0)
    assert bench.phases == {}
    assert (await bench.running("1"))["1"] is not first


# --- one supervisor after the other ---------------------------------------------------------------------------


async def test_a_stop_leaves_machines_and_a_start_adopts_them(bench: Bench) -> None:
    """Law 8: a normal stop touches no QEMU; the next supervisor has the same pids, locks and statuses."""
    await bench.begin()
    qemus = await bench.running("1", "2", "3")
    locks = {key: value for key, value in bench.etcd.data.items() if key.endswith("/lock")}
    before = {status.id: status for status in bench.host.http_view.instances()}
    await bench.end()
    assert bench.of("1", "2", "3") == qemus
    await bench.clock.advance(3600.0)
    await bench.begin()
    assert bench.of("1", "2", "3") == qemus
    assert len(bench.qemus.all) == 3
    assert locks.items() <= bench.etcd.data.items()
    assert {status.id: status for status in bench.host.http_view.instances()} == before
    assert bench.metric("kvmsupervisor_adopted_total") == 3.0


@pytest.mark.parametrize("lock", ["/kvm/%i/lock", "/locks/%i"])
@pytest.mark.parametrize("slow", ["/kvm/", "/locks/"])
async def test_nothing_is_decided_before_keys_and_locks_were_listed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, lock: str, slow: str
) -> None:
    """Laws 6 and 8: where `LOCK` lies elsewhere, one list alone means nothing: no guest is shut down for it."""
    bench.more["LOCK"] = lock
    await bench.begin()
    qemus = await bench.running("1", "2")
    await bench.end()
    listing = FakeEtcd.list

    async def slow_list(self: FakeEtcd, prefix: str, *, page: int = 10_000) -> object:
        if prefix == slow:
            await bench.clock.sleep(30.0)
        return await listing(self, prefix, page=page)

    monkeypatch.setattr(FakeEtcd, "list", slow_list)
    await bench.begin(virtual_s=60.0)
    assert bench.of("1", "2") == qemus
    assert [qemu.presses for qemu in qemus.values()] == [[], []]
    assert bench.phases == {"1": Phase.RUNNING, "2": Phase.RUNNING}


async def test_an_empty_etcd_is_an_answer_too(bench: Bench) -> None:
    """Keys that were all removed while no supervisor looked: what runs here is told, although nothing was listed."""
    await bench.begin()
    qemus = await bench.running("1", "2")
    await bench.end()
    bench.remove("1", "2")
    await bench.begin(virtual_s=30.0)
    assert [qemu.alive for qemu in qemus.values()] == [False, False]
    assert bench.phases == {}


async def test_etcd_away_at_the_start_changes_nothing(bench: Bench) -> None:
    """Law 6: adopting needs no etcd, and an hour without it kills nothing."""
    await bench.begin()
    qemus = await bench.running("1")
    await bench.end()

    def away() -> FakeEtcd:
        client = bench.etcd.peer()
        client.away()
        return client

    await bench.begin(virtual_s=3600.0, connect=away)
    assert bench.of("1") == qemus
    assert not bench.host.http_view.ready()[0]
    status = bench.status("1")
    assert status is not None
    assert "its keys have not been read yet" in status.reason


@pytest.mark.parametrize("file", ["incarnation.json", "memory.json"])
@pytest.mark.parametrize("content", ['{"version": 99}', "{", ""])
async def test_records_that_cannot_be_read_stop_nobody_else(bench: Bench, file: str, content: str) -> None:
    """A record of a newer release is left alone, named in the log, and its instance not touched; the others run."""
    folder = RunDir(bench.path).instance(InstanceId("1"))
    folder.create()
    (folder.path / file).write_text(content)
    bench.create("1")
    with capture_logs() as logs:
        await bench.begin()
        await bench.running("2")
    named = [line for line in logs if line["event"] == "instance.unreadable"]
    assert [line["instance"] for line in named] == ["1"]
    assert file in named[0]["reason"]
    assert (folder.path / file).read_text() == content
    assert bench.of("1", "2").keys() == {"2"}


# --- mass removal (§4) ----------------------------------------------------------------------------------------


async def test_a_mass_removal_is_held_and_confirmed(bench: Bench) -> None:
    """§4: more than half and more than two at once wait for a word, which names them; only that word counts."""
    await bench.begin()
    qemus = await bench.running("1", "2", "3", "4")
    bench.etcd.write(CONFIRMATION, json.dumps(["1", "2", "3"]))
    bench.remove("1", "2", "3")
    await bench.clock.advance(3600.0)
    assert bench.of("1", "2", "3", "4") == qemus
    assert [qemu.presses for qemu in qemus.values()] == [[]] * 4
    assert bench.metric("kvmsupervisor_removals_held") == 3.0
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.held) == (Phase.RUNNING, True)
    assert "confirm-removal" in status.reason
    for nonsense in (b"", b"5", b"[[", b"[" * 70_000, b"\xff", b"{}"):
        bench.etcd.write(CONFIRMATION, nonsense)
        await bench.clock.advance(2 * CONFIRMATION_POLL_S)
    assert bench.of("1", "2", "3", "4") == qemus
    bench.etcd.write(CONFIRMATION, json.dumps(["1", "2"]))
    await bench.clock.advance(30.0)
    assert bench.of("1", "2", "3", "4").keys() == {"3", "4"}
    assert CONFIRMATION not in bench.etcd.data
    assert bench.metric("kvmsupervisor_removals_held") == 1.0


async def test_keys_that_return_end_the_hold(bench: Bench) -> None:
    """§4: a removal that was taken back is none; the machines never noticed."""
    await bench.begin()
    qemus = await bench.running("1", "2", "3")
    bench.remove("1", "2", "3")
    await bench.clock.advance(60.0)
    bench.create("1", "2", "3")
    await bench.clock.advance(60.0)
    assert bench.of("1", "2", "3") == qemus
    assert bench.metric("kvmsupervisor_removals_held") == 0.0
    assert all(status.held is False for status in bench.host.http_view.instances())


async def test_a_hold_survives_the_supervisor(bench: Bench) -> None:
    """§4: keys that vanished while no supervisor looked, or during a hold, are judged by its successor."""
    await bench.begin()
    qemus = await bench.running("1", "2", "3")
    await bench.end()
    bench.remove("1", "2", "3")
    await bench.begin(virtual_s=3600.0)
    assert bench.of("1", "2", "3") == qemus
    bench.etcd.write(CONFIRMATION, json.dumps(["1", "2", "3"]))
    await bench.clock.advance(30.0)
    assert bench.of("1", "2", "3") == {}


ORDERS: dict[str, Callable[[Bench, str], None]] = {
    "another host": lambda bench, name: bench.etcd.write(f"/kvm/{name}/host", "b"),
    "power off": lambda bench, name: bench.etcd.write(f"/kvm/{name}/power", "off"),
}


@pytest.mark.parametrize("order", ORDERS)
async def test_an_order_is_no_removal(bench: Bench, order: str) -> None:
    """§4: draining a host or switching all off is done at once: somebody wrote it."""
    bench.there("b")
    await bench.begin()
    await bench.running("1", "2", "3", "4")
    for name in "1234":
        ORDERS[order](bench, name)
    await bench.clock.advance(30.0)
    assert bench.of("1", "2", "3", "4") == {}


async def test_only_machines_that_run_count(bench: Bench) -> None:
    """§4: what does not run has no guest to lose: among 50 that are off, the loss of the three that run is held."""
    await bench.begin()
    off = [str(number) for number in range(100, 150)]
    for name in off:
        bench.etcd.write(f"/kvm/{name}/power", "off")
    bench.create(*off)
    qemus = await bench.running("1", "2", "3")
    bench.remove(*off)
    await bench.clock.advance(60.0)
    assert bench.metric("kvmsupervisor_removals_held") == 0.0
    assert not any(bench.status(name) for name in off)
    bench.remove("1", "2", "3")
    await bench.clock.advance(60.0)
    assert bench.of("1", "2", "3") == qemus
    assert bench.metric("kvmsupervisor_removals_held") == 3.0
    assert [status.stood for status in bench.host.http_view.instances()] == [{"host": ME, "ram": "64"}] * 3


async def test_running_machines_are_held_among_many_that_are_off(bench: Bench) -> None:
    """§4: the same while those that are off stay."""
    await bench.begin()
    off = [str(number) for number in range(100, 150)]
    for name in off:
        bench.etcd.write(f"/kvm/{name}/power", "off")
    bench.create(*off)
    qemus = await bench.running("1", "2", "3")
    bench.remove("1", "2", "3")
    await bench.clock.advance(60.0)
    assert bench.of("1", "2", "3") == qemus


async def test_few_removals_are_not_held(bench: Bench) -> None:
    """§4: up to half, or two, go without a word."""
    await bench.begin()
    await bench.running("1", "2", "3", "4")
    bench.remove("1", "2")
    await bench.clock.advance(30.0)
    assert bench.of("1", "2", "3", "4").keys() == {"3", "4"}
    await bench.clock.advance(30.0)
    bench.remove("3", "4")
    await bench.clock.advance(30.0)
    assert bench.phases == {}


# --- containment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", [RuntimeError, asyncio.CancelledError])
async def test_a_bug_in_one_instance_leaves_the_others_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, bug: type[BaseException]
) -> None:
    """One broad except: logged with traceback, counted, tried again after a growing pause; its QEMU runs on.

    A cancellation that nobody asked for is a bug like others: libraries give up by it.
    """
    await bench.begin()
    qemus = await bench.running("1", "2")
    observe = Worker._observe
    broken = True

    def stumbles(self: Worker) -> object:
        if broken and self.id == "1":
            raise bug("a bug")
        return observe(self)

    monkeypatch.setattr(Worker, "_observe", stumbles)
    with capture_logs() as logs:
        for name in ("1", "2"):
            bench.etcd.write(f"/kvm/{name}/power", "off")
        await bench.clock.advance(10.0)
    errors = [line for line in logs if line["event"] == "instance.error"]
    assert [line["pause_s"] for line in errors] == [1.0, 2.0, 4.0, 8.0]
    assert {line["instance"] for line in errors} == {"1"}
    assert bench.metric('kvmsupervisor_internal_errors_total{host="a",instance="1"}') == 4.0
    assert [qemus[name].alive for name in "12"] == [True, False]
    broken = False
    await bench.clock.advance(60.0)
    assert not qemus["1"].alive


async def test_a_bug_does_not_keep_the_supervisor_from_stopping(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancellation always propagates, out of an instance's pause too."""

    def stumbles(self: Worker) -> object:
        raise RuntimeError("a bug")

    bench.create("1")
    monkeypatch.setattr(Worker, "_observe", stumbles)
    await bench.begin()
    await bench.end()


async def test_only_so_many_start_at_once(bench: Bench) -> None:
    """Start slots: the others wait their turn, and say so; in the end all run."""
    bench.more["KVM_START_PARALLEL"] = "2"
    starting: list[int] = []

    def slow(qemu: FakeQemu) -> None:
        qemu.frozen = True
        starting.append(sum(one.frozen and one.alive for one in bench.qemus.all))

        def thaw() -> None:
            qemu.frozen = False

        bench.clock.call_at(bench.clock.now() + 3.0, thaw)

    bench.qemus.prepare = slow
    names = [str(number) for number in range(1, 8)]
    bench.create(*names)
    await bench.begin(virtual_s=1.0)
    assert "waits for its turn" in " ".join(status.reason for status in bench.host.http_view.instances())
    await bench.clock.advance(60.0)
    assert len(bench.of(*names)) == 7
    assert max(starting) == 2


async def test_qemus_that_never_answer_keep_nobody_else_from_starting(bench: Bench) -> None:
    """A silent QEMU gives its start slot back long before its own time is up; its memory stays promised to it."""
    bench.more |= {"KVM_START_PARALLEL": "4", "KVM_START_TIMEOUT": "60"}

    def freeze(qemu: FakeQemu) -> None:
        qemu.frozen = qemu.instance.startswith("silent")

    bench.qemus.prepare = freeze
    silent, well = [f"silent{number}" for number in range(4)], [f"well{number}" for number in range(8)]
    await bench.begin()
    bench.create(*silent)
    await bench.clock.advance_until(lambda: len(bench.qemus.alive) == 4, 10.0)
    bench.create(*well)
    await bench.clock.advance_until(lambda: len(bench.of(*well)) == 8, 15.0)
    # They are not given up for it.
    assert sum(qemu.frozen for qemu in bench.qemus.alive) == 4
    await bench.clock.advance(60.0)
    assert len(bench.of(*well)) == 8


async def test_guests_that_do_not_fit_wait_for_memory(bench: Bench) -> None:
    """Law: memory is promised to guests in the order of their priority; who does not fit waits, and says for what."""
    bench.memory_mib = 612
    bench.more["KVM_MEMORY_RESERVE"] = "100M"
    await bench.begin()
    for name, ram, priority in (("low", "300", "1"), ("high", "300", "2"), ("small", "64", "0")):
        bench.etcd.write(f"/kvm/{name}/ram", ram)
        bench.etcd.write(f"/kvm/{name}/priority", priority)
    # One after the other: who is first has the memory, whatever the priority.
    bench.etcd.write("/kvm/low/host", ME)
    await bench.clock.advance(5.0)
    bench.etcd.write("/kvm/high/host", ME)
    bench.etcd.write("/kvm/small/host", ME)
    await bench.clock.advance(60.0)
    assert bench.of("low", "high", "small").keys() == {"low", "small"}
    status = bench.status("high")
    assert status is not None
    assert (status.phase, status.reason) == (
        Phase.WAITING,
        "waits for memory of this host: it needs 364 MiB, and of 512 MiB for guests 492 MiB are promised to 2 others",
    )
    bench.etcd.write("/kvm/low/power", "off")
    await bench.clock.advance_until(lambda: bench.of("high"), 60.0)
    assert bench.of("low", "high", "small").keys() == {"high", "small"}


async def test_a_successor_counts_the_memory_of_what_it_adopts(bench: Bench) -> None:
    """Law: what runs already is promised its memory before anybody else."""
    bench.memory_mib = 400
    bench.more["KVM_MEMORY_RESERVE"] = "100M"
    await bench.begin()
    await bench.running("1", "2")
    await bench.end()
    bench.create("0")
    await bench.begin()
    await bench.clock.advance(60.0)
    assert bench.of("0", "1", "2").keys() == {"1", "2"}
    status = bench.status("0")
    assert status is not None
    assert "256 MiB are promised to 2 others" in status.reason


async def test_the_first_statuses_are_written_once_the_supervisor_stops(bench: Bench) -> None:
    """A normal stop leaves statuses as they were last seen."""
    await bench.begin()
    await bench.running("1")
    bench.etcd.write("/kvm/1/ram", "128")
    await settle()
    await bench.end()
    written = Status.from_json(bench.etcd.data["/kvmsupervisor/instances/1"])
    assert written is not None
    assert written.pending == ("ram",)


async def test_locks_outside_the_wishes_are_followed_where_they_concern_this_host(bench: Bench) -> None:
    """Our guest's, and one that only names us, which is released; what happens to others' is not heard of."""
    bench.more = {"LOCK": "/locks/%i"}
    bench.etcd.write("/locks/left", lock_of(ME, Storage.NONE))
    bench.etcd.write("/locks/1", lock_of("ab", Storage.NONE))
    bench.there("ab")
    bench.create("1")
    await bench.begin()
    assert "/locks/left" not in bench.etcd.data
    assert bench.phases == {"1": Phase.WAITING}
    bench.etcd.erase("/locks/1")
    await bench.clock.advance_until(lambda: bench.of("1"), 60.0)
    await bench.clock.advance(30.0)
    calls = Counter(bench.etcd.calls)
    wishes = bench.host._wishes
    for number in range(100):
        bench.etcd.write(f"/locks/other{number}", lock_of("ab"))
    await bench.clock.advance(0.0)
    assert bench.etcd.calls == calls
    assert wishes.lock_known_at(InstanceId("other7")) is None
    assert wishes.in_step
    # Another host has fenced us and taken it: law 6.
    bench.etcd.write("/locks/1", replace_holder(bench.etcd.data["/locks/1"], "ab"))
    await bench.clock.advance_until(lambda: not bench.of("1"), 60.0)


def replace_holder(value: bytes, host: str) -> bytes:
    lock = Lock.from_json(value)
    assert lock is not None
    return replace(lock, host=HostName(host), boot_id="b", epoch=lock.epoch + 1, incarnation="other").to_json()


async def test_news_of_many_hosts_is_looked_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand hosts that come at the same time make an instance look a few times, not a thousand times."""
    await bench.begin()
    looks: list[int] = []
    more = asyncio.Event()

    def look() -> None:
        looks.append(1)
        more.set()

    monkeypatch.setattr(bench.host, "notify_all", look)
    bench.there("ab")
    await bench.clock.advance(1.0)
    assert len(looks) == 1
    monkeypatch.setattr(host_module, "PAUSE_PER_HOST_S", host_module.MOST_PAUSE_S)
    for number in range(20):
        bench.there(f"n{number}")
        await bench.clock.advance(0.0)
    assert len(looks) == 1
    more.clear()
    async with asyncio.timeout(60.0):
        await more.wait()
    assert len(looks) == 2
