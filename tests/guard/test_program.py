"""The guard: whom it kills and when, and the process itself, spoken to as its supervisor does (law 7)."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.adapters import guard_channel
from kvmsupervisor.guard.program import IDLE_S, PROTOCOL, STEP_S, Charge, Watch
from tests.support.processes import freeze, starttime_of

PROGRAM = Path(__file__).parents[2] / "kvmsupervisor" / "guard" / "program.py"
LIMIT_S = 30.0
LATE = 1e9
"""An instant that no test lives to see, CLOCK_BOOTTIME."""


def charge(name: str = "a") -> Charge:
    return Charge(name, -1, "/nonexistent")


# --- the arithmetic, in virtual time --------------------------------------------------------------------------


def test_nobody_is_due_before_the_deadline_and_all_are_at_it() -> None:
    """Law 7: a machine lives until the session's end as it was told last, and no longer; one told later moves it."""
    watch = Watch()
    assert watch.due(1e12) == []
    watch.until = 100.0
    a, b = charge("a"), charge("b")
    watch.add(a)
    watch.add(b)
    assert watch.due(99.9) == []
    watch.until = 110.0
    assert watch.due(100.0) == []
    assert watch.due(110.0) == [a, b]
    a.killed = True
    assert watch.due(111.0) == [b]


def test_a_machine_that_comes_too_late_is_due_at_once() -> None:
    """Law 7: what is put under guard after the deadline does not live."""
    watch = Watch()
    watch.until = 100.0
    watch.add(late := charge())
    assert watch.due(100.0) == [late]


def test_a_guard_without_machines_ends_after_a_while() -> None:
    """Law: it lives while somebody may need it: a machine, or one that is being started again."""
    watch = Watch()
    watch.begin(10.0)
    assert not watch.is_idle(10.0)
    assert watch.wait_s(10.0) == IDLE_S
    assert watch.is_idle(10.0 + IDLE_S)
    watch.add(one := charge())
    assert not watch.is_idle(1e12)
    watch.ended(one, 50.0)
    assert not watch.is_idle(50.0)
    assert watch.is_idle(50.0 + IDLE_S)


def test_the_same_machine_twice_is_one() -> None:
    """Law: a supervisor that names a machine again, as a successor does, has it watched once."""
    watch = Watch()
    assert watch.add(first := charge()) is None
    assert watch.add(charge()) is first
    assert len(watch.charges) == 1


@given(st.lists(st.tuples(st.sampled_from(["extend", "add", "pass"]), st.floats(0, 10)), max_size=30))
def test_it_wakes_up_in_time(events: list[tuple[str, float]]) -> None:
    """Law 7: however deadlines and machines come, a sleep ends at the deadline, and at most a step after a suspend."""
    watch, now = Watch(), 1000.0
    watch.begin(now)
    for number, (event, seconds) in enumerate(events):
        match event:
            case "extend":
                watch.until = now + seconds
            case "add":
                watch.add(charge(str(number)))
            case _:
                now += seconds
        assert bool(watch.due(now)) == (watch.until is not None and now >= watch.until and bool(watch.charges))
        wait_s = watch.wait_s(now)
        assert 0 <= wait_s <= (STEP_S if watch.charges else IDLE_S)
        if watch.charges and watch.until is not None and now < watch.until:
            assert now + wait_s <= watch.until


def test_both_sides_speak_the_same() -> None:
    """Law: the guard imports nothing of ours, so what both know is written twice."""
    assert guard_channel.PROTOCOL == PROTOCOL


# --- the process ----------------------------------------------------------------------------------------------


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Machine:
    """A process that does nothing, instead of a QEMU."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "3600"])
        self.pidfd = os.pidfd_open(self.process.pid)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_killed(self) -> None:
        assert self.process.wait(LIMIT_S) == -signal.SIGKILL

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.pidfd)


class Guard:
    """A guard's process, and the socket that it was started with."""

    def __init__(self, folder: Path, version: str = "1", *, log: int | None = None) -> None:
        self.folder = folder
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.settimeout(LIMIT_S)
        files = [str(folder / "lock"), str(folder / "sock")]
        words = [sys.executable, "-I", "-S", str(PROGRAM), str(theirs.fileno()), *files, version]
        with theirs:
            self.process = subprocess.Popen(
                words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        self.pidfd = os.pidfd_open(self.process.pid)

    def ask(self, request: str, *descriptors: int) -> str:
        return ask(self.link, request, *descriptors)

    def watch(self, name: str, machine: Machine) -> None:
        assert self.ask(f"watch {name} {self.folder}/{name} x.json", machine.pidfd) == "ok"

    def take(self, *former: int, until: float = LATE) -> None:
        assert self.ask(f"until {until!r}") == "ok"
        assert self.ask("take", *former) == "ok"

    def note(self, name: str) -> dict[str, object] | None:
        path = self.folder / f"{name} x.json"
        return json.loads(path.read_text()) if path.exists() else None

    def again(self) -> socket.socket:
        """Connect as a successor does."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.settimeout(LIMIT_S)
        peer.connect(str(self.folder / "sock"))
        return peer

    def close(self) -> None:
        self.link.close()
        self.process.kill()
        self.process.wait()
        os.close(self.pidfd)


def ask(peer: socket.socket, request: str, *descriptors: int) -> str:
    socket.send_fds(peer, [request.encode()], list(descriptors))
    return peer.recv(65536).decode()


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    made = [Machine() for _ in range(2)]
    yield made
    for machine in made:
        machine.close()


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    made = Guard(tmp_path)
    yield made
    made.close()


def test_it_kills_whom_it_watches_and_says_so(guard: Guard, machines: list[Machine]) -> None:
    """Law 7: at the deadline, without anybody who tells it; nobody else is touched. It writes down whom, and when."""
    guard.watch("a", machines[0])
    guard.take(until=now() + 0.3)
    guard.link.close()
    machines[0].wait_killed()
    assert machines[1].alive
    with guard.again() as successor:
        # It answers one after the other: what it did before is written.
        assert ask(successor, "hello").startswith("guard")
        note = guard.note("a")
        assert note is not None
        assert (note["version"], note["incarnation"]) == (1, "a")
        # Nor is anybody spared who comes too late.
        assert ask(successor, f"watch b {guard.folder}/b x.json", machines[1].pidfd) == "ok"
    machines[1].wait_killed()


def test_what_was_told_in_time_counts_however_late_it_is_heard(guard: Guard, machines: list[Machine]) -> None:
    """Law 1: a guard that was frozen past the deadline hears first that the session was renewed meanwhile."""
    guard.watch("a", machines[0])
    guard.take(until=(deadline := now() + 0.5))
    freeze(guard.process.pid)
    socket.send_fds(guard.link, [f"until {LATE}".encode()], [])
    while now() < deadline:
        time.sleep(0.05)
    os.kill(guard.process.pid, signal.SIGCONT)
    assert guard.link.recv(100) == b"ok"
    assert guard.ask("hello").endswith(" a")
    assert machines[0].alive
    # And without such word it kills as soon as it goes on.
    assert guard.ask(f"until {now() + 0.3!r}") == "ok"
    machines[0].wait_killed()


def test_a_candidate_harms_nobody(guard: Guard, machines: list[Machine]) -> None:
    """Law: a guard that is not yet one lets the deadline pass, and ends when whoever started it is gone."""
    guard.watch("a", machines[0])
    assert guard.ask("take").startswith("no ")
    assert guard.ask(f"until {now() - 1!r}") == "ok"
    assert guard.ask("hello").endswith(" a")
    guard.link.close()
    assert guard.process.wait(LIMIT_S) == 0
    assert machines[0].alive
    assert list(guard.folder.iterdir()) == []


def test_it_takes_the_place_of_a_frozen_one(guard: Guard, machines: list[Machine]) -> None:
    """Law 8: the next guard watches before the former one ends, which it does in whatever state; one has the lock."""
    guard.watch("a", machines[0])
    guard.take()
    freeze(guard.process.pid)
    following = Guard(guard.folder, version="2")
    try:
        following.watch("a", machines[0])
        assert following.ask(f"until {LATE}") == "ok"
        # Not told of the former one, it does not get in.
        assert "lock" in following.ask("take")
        assert following.ask("take", guard.pidfd) == "ok"
        assert guard.process.wait(LIMIT_S) == -signal.SIGKILL
        pid, starttime = (guard.folder / "lock").read_text().split()
        assert int(pid) == following.process.pid
        assert int(starttime) == starttime_of(int(pid))
        with following.again() as peer:
            assert ask(peer, "hello").split()[:3] == ["guard", "1", "2"]
            assert ask(peer, f"until {now()!r}") == "ok"
        machines[0].wait_killed()
    finally:
        following.close()


def test_its_memory_is_locked_and_small(guard: Guard) -> None:
    """DESIGN §9: all that it may ever need is there, and it is little."""
    assert guard.ask("hello") == "guard 1 1 0"
    said = dict(line.split(":", 1) for line in Path(f"/proc/{guard.process.pid}/status").read_text().splitlines())
    locked, size = (int(said[name].split()[0]) for name in ("VmLck", "VmSize"))
    # But for the kernel's own pages ([vdso], [vvar]).
    assert size - 64 <= locked <= 24 * 1024


def test_it_answers_nonsense_and_goes_on(guard: Guard, machines: list[Machine]) -> None:
    """Law: no request ends it, and none is half done."""
    for nonsense in (" ", "fly", "until", "until soon", "until nan", "until inf", "watch", "watch a", "watch a b"):
        assert guard.ask(nonsense).startswith("no "), nonsense
    assert guard.ask("watch a", machines[0].pidfd).startswith("no ")
    socket.send_fds(guard.link, [b"\xff"], [])
    assert guard.link.recv(1000).startswith(b"no ")
    guard.take()
    assert guard.ask("take").startswith("no ")
    assert guard.ask("hello") == "guard 1 1 0"


def test_a_machine_that_ends_by_itself_is_let_go_of(guard: Guard, machines: list[Machine]) -> None:
    """Law: no note is written of it; and its descriptor is not kept."""
    guard.watch("a", machines[0])
    guard.watch("b", machines[1])
    # Named twice, as by a successor.
    guard.watch("b", machines[1])
    guard.take(until=(deadline := now() + 0.5))
    machines[0].process.terminate()
    machines[0].process.wait()
    while "a" in guard.ask("hello").split()[4:]:
        assert now() < deadline + LIMIT_S
    machines[1].wait_killed()
    assert guard.ask("hello").startswith("guard")
    assert guard.note("a") is None
    assert guard.note("b") is not None


def test_a_note_that_cannot_be_written_is_in_nobodys_way(guard: Guard, machines: list[Machine]) -> None:
    """Law 7: no file keeps a machine alive."""
    assert guard.ask("watch a /nonexistent/a.json", machines[0].pidfd) == "ok"
    guard.watch("b", machines[1])
    guard.take(until=now())
    for machine in machines:
        machine.wait_killed()
    assert guard.ask("hello").startswith("guard")


def test_a_full_log_is_in_nobodys_way(tmp_path: Path, machines: list[Machine]) -> None:
    """Law 7: a guard whose log takes no line kills all the same, and leaves its notes where there is room for them."""
    full = os.open("/dev/full", os.O_WRONLY)
    guard = Guard(tmp_path, log=full)
    os.close(full)
    try:
        assert guard.ask("watch a /nonexistent/a.json", machines[0].pidfd) == "ok"
        guard.watch("b", machines[1])
        guard.take(until=now())
        for machine in machines:
            machine.wait_killed()
        assert guard.ask("hello").startswith("guard")
        assert guard.note("b") is not None
    finally:
        guard.close()


def test_nobody_else_can_speak_to_it(guard: Guard) -> None:
    """Law: QEMU, which runs as another user, cannot have its deadline moved."""
    guard.take()
    assert (guard.folder / "sock").stat().st_mode & 0o777 == 0o600


def test_it_ends_with_the_last_machine(guard: Guard, machines: list[Machine]) -> None:
    """Law: nothing stays behind on a host whose machines have ended."""
    guard.watch("a", machines[0])
    guard.take(until=now())
    machines[0].wait_killed()
    guard.link.close()
    ended = select.poll()
    ended.register(guard.pidfd, select.POLLIN)
    assert ended.poll(1000 * LIMIT_S)
    assert guard.process.wait() == 0
