"""One real QEMU process, from the first record to the last: paused, run, adopted, ended, each end with its reason."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.process import Hidden
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain.argv import Channels, Provision
from kvmsupervisor.domain.exits import Exit, ExitClass
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.run_state import NEVER_RAN
from kvmsupervisor.domain.spec import Spec, spec_to_object
from kvmsupervisor.domain.view import Process
from kvmsupervisor.machine import identity as process_identity
from kvmsupervisor.machine import monitor
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.machine import Machine
from kvmsupervisor.machine.spawn import Quarters
from kvmsupervisor.machine.system import REAL
from tests.support.processes import freeze, stat_of
from tests.support.readable import readable

LIMIT_S = 15.0
BOOT = "boot-1"
SPEC = Spec(ram_mib=16)


NAME = str(uuid4())
"""Incarnations are found by name among all processes of the machine: another test run has others."""


def living_of(machine: Machine, lock: Lock) -> int | None:
    """The pid of the living QEMU of instance `1` that a lock names, although there is no record here."""
    processes, name = machine._processes, lock.incarnation
    return process_identity.pid_of(processes, "1", name, pid=lock.pid, starttime=lock.starttime)


def record(name: str = NAME) -> Incarnation:
    return Incarnation(
        instance="1", incarnation=name, epoch=1, boot_id=BOOT, argv=(), spec=spec_to_object(SPEC),
        storage=Storage.NONE, accelerator="tcg", restart_request=None, revision=7, log_offset=0, spawned_at=1.0,
    )  # fmt: skip


def plain(channels: Channels) -> Provision:
    """Nothing but the sockets that every machine has."""
    return Provision(run_dir="/nonexistent", channels=channels)


def tiny(*more: str) -> Callable[[Provision], list[str]]:
    """A machine without anything, paused."""

    def build(provision: Provision) -> list[str]:
        main, spare = provision.channels.qmp, provision.channels.spare
        return [
            *("qemu-system-x86_64", "-S", "-machine", "none", "-nodefaults", "-display", "none"),
            *("-chardev", f"socket,id=q0,fd={main},server=on,wait=off", "-mon", "chardev=q0,mode=control"),
            *("-chardev", f"socket,id=q1,fd={spare},server=on,wait=off", "-mon", "chardev=q1,mode=control"),
            *more,
        ]

    return build


def environment_of(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")


def flags_of(pid: int | None, name: str) -> list[int]:
    """The flags of each of its descriptors of files with that in their name."""
    process = Path(f"/proc/{pid}")
    numbers = [file.name for file in (process / "fd").iterdir() if name in str(file.readlink())]
    return [int((process / "fdinfo" / number).read_text().split()[3], 8) for number in numbers]


def await_zombie(pid: int) -> None:
    for _ in range(5000):
        if (stat := stat_of(pid)) is not None and not stat.alive:
            return
        select.select([], [], [], 0.002)
    raise AssertionError(f"process {pid} does not end")


class Bench:
    """Machines of one run directory; whatever they left running is killed at the end."""

    def __init__(self, path: Path) -> None:
        self.directory = InstanceDir(path / "1")
        self.prefix = "/kvm"
        self.resets: list[str] = []
        self.changed = asyncio.Event()
        self.logs = GuestLogs(clock=Clock())
        self.machine = self.make()

    def make(self) -> Machine:
        return Machine(
            system=REAL,
            prefix=self.prefix,
            directory=self.directory,
            clock=Clock(),
            notify=self.changed.set,
            on_reset=lambda: self.resets.append("reset"),
            logs=self.logs.of(self.directory),
            log=structlog.get_logger(),
        )

    @property
    def view(self) -> Process:
        view = self.machine.view()
        assert view is not None
        return view

    async def until(self, true: Callable[[Process], object]) -> Process:
        """Wait for news until it is so; connect to QMP whenever there is none."""
        async with asyncio.timeout(LIMIT_S):
            while not true(self.view):
                self.changed.clear()
                if true(self.view):
                    break
                await self.changed.wait()
        return self.view

    async def up(self, *more: str) -> Process:
        """Spawn and connect."""
        self.machine.spawn(record(), SPEC, plain, tiny(*more), Quarters())
        return await self.connected()

    async def connected(self) -> Process:
        async with asyncio.timeout(LIMIT_S):
            while not self.view.connected and self.view.exit is None:
                await self.machine.connect()
                await asyncio.sleep(0)
        return self.view

    async def exit(self) -> Exit:
        view = await self.until(lambda view: view.exit)
        assert view.exit is not None
        return view.exit

    async def successor(self) -> bool:
        """Let go of the process, and have another supervisor's machine adopt it."""
        await self.machine.detach()
        written = self.directory.read_incarnation()
        assert written is not None
        self.machine = self.make()
        return self.machine.adopt(written, boot_id=BOOT)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    path = Path(tempfile.mkdtemp(prefix="kvs"))
    made = Bench(path)
    yield made
    await made.machine.kill("the test is over")
    await made.machine.detach()
    written = made.directory.read_incarnation()
    if written is not None and written.pid is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.waitpid(written.pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
    shutil.rmtree(path)


# --- from spawn to cont (law 3) -------------------------------------------------------------------------------


async def test_it_starts_paused_and_runs_when_told(bench: Bench) -> None:
    """Law 3: on record before it exists, with its pid after; paused until `cont`."""
    assert bench.machine.view() is None
    bench.machine.spawn(record(), SPEC, plain, tiny(), Quarters())
    written = bench.directory.read_incarnation()
    assert written is not None
    assert written == bench.machine.record
    assert (written.pid, written.argv[0]) == (bench.machine.pid, "qemu-system-x86_64")
    assert bench.machine.never_ran
    view = await bench.connected()
    assert (view.connected, view.run_state, view.spec, view.exit) == (True, NEVER_RAN, SPEC, None)
    assert await bench.machine.resume()
    assert (bench.view.run_state, bench.machine.never_ran) == ("running", False)
    await bench.machine.probe()
    assert bench.view.run_state == "running"


async def test_its_logs_take_all_before_its_guest_runs(bench: Bench) -> None:
    """Whoever lets the guest run, `resume` or a live move: QEMU appends to no log by then, for that would be lost."""

    def build(provision: Provision) -> list[str]:
        log = ("-add-fd", f"fd={provision.channels.console_log},set=7")
        return [*tiny(*log, "-chardev", "null,id=c,logfile=/dev/fdset/7,logappend=on")(provision)]

    bench.machine.spawn(record(), SPEC, plain, build, Quarters())
    await bench.connected()
    flags = flags_of(bench.machine.pid, "memfd:console.log")
    assert len(flags) > 1, "QEMU has not opened it a second time"
    assert not any(one & os.O_APPEND for one in flags), flags


async def test_its_environment_names_it_and_holds_no_secrets(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 8: prefix, id and incarnation; of ours only what QEMU may need."""
    monkeypatch.setenv("ETCD_PASSWORD", "secret")
    await bench.up()
    environment = environment_of(bench.machine.pid)
    for mark in ("PREFIX=/kvm", "INSTANCE=1", f"INCARNATION={NAME}"):
        assert f"KVMSUPERVISOR_{mark}" in environment
    assert not any("secret" in variable for variable in environment)


async def test_a_running_guest_that_somebody_resumed_is_seen(bench: Bench) -> None:
    """Level-triggered: what QEMU says of its run state counts, whoever caused it."""
    await bench.up()
    reader, writer = await asyncio.open_unix_connection(str(bench.directory.spare_socket))
    writer.write(b'{"execute":"qmp_capabilities"}\n{"execute":"cont"}\n')
    await bench.until(lambda view: view.run_state == "running")
    writer.write(b'{"execute":"stop"}\n')
    await bench.until(lambda view: view.probe_at == 0.0)
    await bench.machine.probe()
    assert bench.view.run_state == "paused"
    writer.write(b'{"execute":"system_reset"}\n')
    async with asyncio.timeout(LIMIT_S):
        while b'"RESET"' not in await reader.readline():
            pass
    # QEMU itself calls it prelaunch now.
    await bench.machine.probe()
    assert (bench.view.run_state, bench.view.never_ran) == ("paused", False)
    assert bench.machine.record is not None
    assert bench.machine.record.paused
    writer.close()
    await writer.wait_closed()
    assert not reader.at_eof()


# --- its end --------------------------------------------------------------------------------------------------


async def test_a_kill_from_outside_is_a_crash(bench: Bench) -> None:
    """§4: `crashed (signal 9)`; noticed by the pidfd; nobody asked for it."""
    await bench.up()
    assert bench.machine.pid is not None
    os.kill(bench.machine.pid, signal.SIGKILL)
    assert await bench.exit() == Exit(ExitClass.CRASHED, "crashed (signal 9)")
    assert bench.machine.pid is None
    assert not bench.view.asked


async def test_a_signal_that_qemu_heeds_is_told_by_it(bench: Bench) -> None:
    """§4: `host-signal`, from the last event, which is heard before the end is named."""
    await bench.up()
    assert bench.machine.pid is not None
    os.kill(bench.machine.pid, signal.SIGTERM)
    assert await bench.exit() == Exit(ExitClass.HOST_SIGNAL, "host-signal")


async def test_quit_and_the_button(bench: Bench) -> None:
    """§4: both are asked for; a machine without a guest hears no button."""
    await bench.up()
    await bench.machine.press_power_button()
    assert bench.view.exit is None
    stopping = bench.view.stopping
    assert stopping is not None
    assert stopping.pressed_at is not None
    await bench.machine.press_power_button()
    # Its time counts from the first press.
    again = bench.view.stopping
    assert again is not None
    assert again.asked_at == stopping.asked_at == stopping.pressed_at
    await bench.machine.quit()
    assert await bench.exit() == Exit(ExitClass.HOST_QUIT, "host-quit")
    assert bench.view.asked


async def test_quit_without_qmp_is_sigterm(bench: Bench) -> None:
    """§4: without a monitor QEMU is told to end by a signal that it heeds."""
    bench.machine.spawn(record(), SPEC, plain, tiny(), Quarters())
    await asyncio.sleep(0)
    async with asyncio.timeout(LIMIT_S):
        # Before it has set up its handlers, SIGTERM would simply kill it; then it listens on QMP, too.
        reader, writer = await asyncio.open_unix_connection(str(bench.directory.spare_socket))
        await reader.readline()
        writer.write(b'{"execute":"qmp_capabilities"}\n')
        await reader.readline()
    await bench.machine.quit()
    end = await bench.exit()
    writer.close()
    # The other end died with QEMU, perhaps before it had read all.
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert end.kind is ExitClass.UNKNOWN
    assert "status 0" in end.text


async def test_a_qemu_that_never_ran_is_let_close_its_disks(bench: Bench) -> None:
    """Law 3: given up before its guest ran it ends in order, so that storage names it no more; a running one is killed.

    One that is frozen is killed all the same.
    """
    machine = bench.machine
    await bench.up()
    await machine.kill("its keys changed")
    assert machine.wait_status.code == 0
    await machine.drop_record()
    await bench.up()
    assert machine.pid is not None
    freeze(machine.pid)
    await machine.kill("its keys changed")
    assert machine.wait_status.signal == signal.SIGKILL
    await machine.drop_record()
    await bench.up()
    assert await machine.resume()
    await machine.kill("its lock has gone to b")
    assert machine.wait_status.signal == signal.SIGKILL


async def test_being_killed_by_us_has_our_reason(bench: Bench) -> None:
    """§4: an end on purpose says why; one that was given up is a failure."""
    await bench.up()
    await bench.machine.kill("its lock has gone to b")
    assert bench.view.exit == Exit(ExitClass.HOST_SIGNAL, "killed by its supervisor: its lock has gone to b")
    assert bench.view.asked
    await bench.machine.drop_record()
    await bench.up()
    await bench.machine.give_up("no answer for 60 s")
    assert bench.view.exit == Exit(ExitClass.FAILED, "failed: no answer for 60 s")
    assert not bench.view.asked


async def test_qemu_refuses_its_options_in_its_own_words(bench: Bench) -> None:
    """§4: `failed: <QEMU's own last error line>`, not that of the incarnation before."""
    for number, name in enumerate(("nonsense", "rubbish")):
        bench.machine.spawn(record(f"{NAME}-{number}"), SPEC, plain, tiny("-device", name), Quarters())
        end = await bench.exit()
        assert end.kind is ExitClass.FAILED
        assert end.text == f"failed: -device {name}: '{name}' is not a valid device model name"
        await bench.machine.drop_record()


async def test_a_program_that_is_not_there(bench: Bench) -> None:
    """A QEMU that cannot be started at all has ended, with the reason; its record goes like any other."""
    bench.machine.spawn(record(), SPEC, plain, lambda provision: ["/nonexistent/qemu"], Quarters())
    assert bench.view.exit == Exit(
        ExitClass.FAILED, "failed: cannot start /nonexistent/qemu: No such file or directory"
    )
    await bench.machine.drop_record()
    assert bench.machine.view() is None
    assert bench.directory.read_incarnation() is None


async def test_what_cannot_be_put_on_record_is_not_started(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 8: without space for the record there is no process, and the next attempt begins from nothing."""

    def no_space(self: InstanceDir, written: Incarnation) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(InstanceDir, "write_incarnation", no_space)
        with pytest.raises(OSError, match="No space left"):
            bench.machine.spawn(record(), SPEC, plain, tiny(), Quarters())
    assert bench.machine.view() is None
    assert (await bench.up()).connected


async def test_nothing_is_left_after_the_burial(bench: Bench) -> None:
    """A process whose exit was recorded has no record any more; its log stays; the next one begins from nothing."""
    await bench.up()
    await bench.machine.kill("enough")
    await bench.machine.drop_record()
    assert bench.machine.view() is None
    assert bench.directory.read_incarnation() is None
    assert bench.directory.qemu_log.exists()
    view = await bench.up()
    assert (view.exit, view.asked, view.stopping, view.run_state) == (None, False, None, NEVER_RAN)


async def test_a_guests_reset_is_news_and_no_end(bench: Bench) -> None:
    """§4: `guest-reset`: QEMU lives on; a reset by the host is none of the guest's."""
    await bench.up()
    bench.machine._on_event("RESET", {"guest": True, "reason": "guest-reset"})
    bench.machine._on_event("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
    assert bench.resets == ["reset"]
    assert bench.view.exit is None


# --- one supervisor after the other (law 8) -------------------------------------------------------------------


async def test_a_successor_has_the_same_process(bench: Bench) -> None:
    """Law 8: same pid; what is known of it is asked of QMP, not assumed."""
    await bench.up()
    await bench.machine.resume()
    pid = bench.machine.pid
    assert await bench.successor()
    assert (bench.machine.pid, bench.view.run_state, bench.view.spec) == (pid, None, SPEC)
    assert not bench.machine.never_ran
    view = await bench.connected()
    assert view.run_state == "running"
    await bench.machine.kill("done")
    assert bench.view.exit is not None


async def test_a_paused_one_is_found_paused(bench: Bench) -> None:
    """Laws 3 and 8: a predecessor that was cut off before `cont` left a guest that never ran."""
    await bench.up()
    assert await bench.successor()
    assert (await bench.connected()).run_state == NEVER_RAN


async def test_one_without_a_pid_is_found_by_its_environment(bench: Bench) -> None:
    """Law 8: cut off between spawning and noting the pid; the successor notes it."""
    await bench.up()
    written = bench.directory.read_incarnation()
    assert written is not None
    bench.directory.write_incarnation(replace(written, pid=None, starttime=None))
    assert await bench.successor()
    assert bench.machine.record == written
    assert bench.directory.read_incarnation() == written


async def test_one_that_was_never_started_is_no_failure(bench: Bench) -> None:
    """Law 8: cut off before spawning: there is nothing, and nobody is to blame."""
    bench.directory.create()
    bench.directory.write_incarnation(record())
    assert not await bench.successor()
    assert bench.view.exit is not None
    assert "was not started" in bench.view.exit.text
    assert bench.view.asked


async def test_another_process_under_its_pid_is_not_it(bench: Bench) -> None:
    """Law 8: a recycled pid is left alone, whatever its environment says; ours has ended."""
    await bench.up()
    written = bench.directory.read_incarnation()
    assert written is not None
    assert written.pid is not None
    assert written.starttime is not None
    early = replace(written, starttime=written.starttime - 1)
    for changed in (early, replace(early, incarnation="y")):
        bench.directory.write_incarnation(changed)
        assert not await bench.successor()
        assert bench.view.exit is not None
        assert bench.view.exit.kind is ExitClass.UNKNOWN
        await bench.machine.kill("it is not ours")
    bench.directory.write_incarnation(written)
    assert await bench.successor()


async def test_a_living_process_is_never_taken_for_gone(bench: Bench) -> None:
    """Law 12: pid and start time agree, the environment does not: nobody knows, so its record stays."""
    await bench.up()
    written = bench.directory.read_incarnation()
    assert written is not None
    bench.directory.write_incarnation(replace(written, incarnation="y"))
    with pytest.raises(Hidden, match=f"process {written.pid} lives with the start time on record"):
        await bench.successor()
    assert bench.directory.has_record
    bench.directory.write_incarnation(written)
    assert await bench.successor()


async def test_the_prefix_does_not_tell_who_it_is(bench: Bench) -> None:
    """Law 12: a supervisor with another prefix finds the same process: by its record, without a pid, by its lock."""
    pid = (await bench.up()).incarnation.pid
    written = bench.directory.read_incarnation()
    assert written is not None
    bench.prefix = "/vms"
    assert await bench.successor()
    assert bench.machine.pid == pid
    bench.directory.write_incarnation(replace(written, pid=None, starttime=None))
    assert await bench.successor()
    assert bench.machine.pid == pid
    lock = Lock(host=HostName("a"), boot_id=BOOT, epoch=1, state=LockState.STARTING, incarnation=NAME)
    assert living_of(bench.machine, lock) == pid


async def test_a_record_of_another_boot_is_of_the_past(bench: Bench) -> None:
    """Law 8: after a reboot nothing of it lives, whatever has its pid now."""
    bench.directory.create()
    bench.directory.write_incarnation(replace(record(), boot_id="boot-0", pid=os.getpid(), starttime=1))
    assert not await bench.successor()
    assert bench.view.exit == Exit(ExitClass.UNKNOWN, "ended with the host's last boot")
    assert bench.view.asked


async def test_an_end_between_two_supervisors_is_told_from_the_log(bench: Bench) -> None:
    """Law 8 and §4: nobody saw how it ended; its last words are what is known."""
    await bench.up()
    await bench.machine.kill("in secret")
    await bench.machine.detach()
    bench.logs.writer.close()
    with bench.directory.qemu_log.open("ab") as log:
        log.write(b"qemu-system-x86_64: out of luck\n")
    assert not await bench.successor()
    assert bench.view.exit is not None
    assert bench.view.exit.text == "ended while no supervisor watched; last words: out of luck"
    assert not bench.view.asked


async def test_a_qemu_without_a_record_is_found_by_the_lock(bench: Bench) -> None:
    """A lock of ours whose process lives although nothing is on record: by pid, or by the environment."""
    await bench.up()
    written = bench.machine.record
    assert written is not None
    lock = Lock(
        host=HostName("a"), boot_id=BOOT, epoch=1, state=LockState.RUNNING, incarnation=NAME,
        pid=written.pid, starttime=written.starttime,
    )  # fmt: skip
    other = bench.make()
    assert living_of(other, lock) == written.pid
    assert living_of(other, replace(lock, pid=None, starttime=None)) == written.pid
    assert living_of(other, replace(lock, pid=None, starttime=None, incarnation="y")) is None
    await bench.machine.kill("gone")
    assert living_of(other, lock) is None
    assert living_of(other, replace(lock, pid=None, starttime=None)) is None


# --- a QEMU that does not answer ------------------------------------------------------------------------------


async def test_a_frozen_qemu_is_silent_until_it_answers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that is stopped is told as silent since its last question; the first answer ends that."""
    await bench.up()
    await bench.machine.resume()
    monkeypatch.setattr(monitor, "ANSWER_S", 0.05)
    assert bench.machine.pid is not None
    freeze(bench.machine.pid)
    await bench.machine.probe()
    since = bench.view.silent_since
    assert since is not None
    await bench.machine.probe()
    assert (bench.view.silent_since, bench.view.connected, bench.view.exit) == (since, True, None)
    monkeypatch.setattr(monitor, "ANSWER_S", LIMIT_S)
    os.kill(bench.machine.pid, signal.SIGCONT)
    await bench.machine.probe()
    assert (bench.view.silent_since, bench.view.run_state) == (None, "running")


async def test_a_frozen_qemu_can_be_adopted_and_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws 8 and §4: it is ours by pid and environment; QMP is silent, and what it runs counts as unknown."""
    await bench.up()
    assert bench.machine.pid is not None
    freeze(bench.machine.pid)
    monkeypatch.setattr(monitor, "ANSWER_S", 0.05)
    assert await bench.successor()
    await bench.machine.connect()
    view = bench.view
    assert (view.connected, view.run_state) == (False, None)
    assert view.silent_since is not None
    assert view.connect_at > 0
    await bench.machine.kill("enough")
    assert bench.view.exit is not None


async def test_a_cont_without_an_answer_may_have_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3: from the moment that `cont` is sent, "never ran" is over, until QEMU says so again."""
    await bench.up()
    assert bench.machine.pid is not None
    freeze(bench.machine.pid)
    monkeypatch.setattr(monitor, "ANSWER_S", 0.05)
    assert not await bench.machine.resume()
    assert not bench.machine.never_ran
    assert bench.view.probe_at == 0.0
    monkeypatch.setattr(monitor, "ANSWER_S", LIMIT_S)
    os.kill(bench.machine.pid, signal.SIGCONT)
    await bench.machine.probe()
    assert bench.view.run_state == "running"


async def test_letting_go_in_the_middle_of_its_end(bench: Bench) -> None:
    """A supervisor that stops while QEMU ends leaves the record: its successor records the exit."""
    await bench.up()
    assert bench.machine.pid is not None
    os.kill(bench.machine.pid, signal.SIGKILL)
    # In this very turn of the loop: the machine has not looked yet.
    await_zombie(bench.machine.pid)
    assert not await bench.successor()
    assert bench.view.exit is not None


async def test_an_end_that_is_noticed_while_it_is_let_go_of(bench: Bench) -> None:
    """Law: a machine that was let go of leaves no task behind, at whatever instant its QEMU ends."""
    failed: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
    await bench.up()
    pidfd = bench.machine.pidfd
    assert pidfd is not None
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    readable(pidfd, LIMIT_S)
    # The loop has had no turn: it notices the end in one of those that letting go takes.
    await bench.machine.detach()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    gc.collect()
    assert failed == []
