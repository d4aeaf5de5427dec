"""`console`: real people's terminals, a real socket and log as QEMU has them, and a process that stands for QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvmsupervisor.adapters.console import ConsoleLog, Keyboard
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.cli.console.session import Mode, Session
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World
from tests.support.cluster import eventually
from tests.support.processes import freeze, starttime_of
from tests.support.terminal import DEADLINE_S, Person, at_terminal

WEB1 = InstanceId("web1")


class Qemu:
    """What `console` sees of QEMU: a process on record, the console's socket and its log.

    It serves one client at a time, as QEMU does, and writes everything to the log first.
    """

    def __init__(self, run_dir: Path, *, epoch: int = 1) -> None:
        self.directory = RunDir(run_dir).instance(WEB1)
        self.directory.create()
        self.typed = b""
        self.served = 0
        self.reads = threading.Event()
        self.reads.set()
        self._client: socket.socket | None = None
        self._lock = threading.Lock()
        self._process = subprocess.Popen(["sleep", "1000"])
        self.directory.console_socket.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.directory.console_socket))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.directory.write_incarnation(
            Incarnation(
                instance=WEB1,
                incarnation=f"i{epoch}",
                epoch=epoch,
                boot_id="b",
                argv=(),
                spec={},
                storage=Storage.NONE,
                accelerator="tcg",
                restart_request=None,
                revision=1,
                log_offset=0,
                spawned_at=0.0,
                pid=self._process.pid,
                starttime=starttime_of(self._process.pid),
            )
        )

    def write(self, text: str) -> None:
        """The guest writes."""
        with self.directory.console_log.open("ab") as log:
            log.write(text.encode())
        with self._lock:
            if self._client is not None:
                with contextlib.suppress(OSError):
                    self._client.sendall(text.encode())

    def end(self, last_words: str = "") -> None:
        """QEMU's process ends, and its sockets with it; the supervisor writes its last output, and drops the record."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self.reads.set()
            self._listener.shutdown(socket.SHUT_RDWR)
            with self._lock:
                if self._client is not None:
                    with contextlib.suppress(OSError):
                        self._client.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._listener.close()
            self.write(last_words)
            self.directory.drop_incarnation()

    def hears(self, text: str) -> None:
        """Wait until this was typed."""
        eventually(f"{text!r}", lambda: text.encode() in self.typed, DEADLINE_S)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                with self._lock:
                    self._client = client
                self.served += 1
                with contextlib.suppress(OSError):
                    while self.reads.wait() and (data := client.recv(4096)):
                        self.typed += data
                with self._lock:
                    self._client = None


Sit = Callable[..., AbstractContextManager[Person]]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: a socket's path has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def qemu(run_dir: Path) -> Iterator[Qemu]:
    """A QEMU that has written a line and a prompt."""
    qemu = Qemu(run_dir)
    qemu.write("HELLO from web1\r\nlogin: ")
    yield qemu
    qemu.end()


@pytest.fixture
def environ(run_dir: Path) -> dict[str, str]:
    """Of the program; its etcd is away, which no console minds."""
    return {
        "PATH": os.environ["PATH"],
        "TERM": "xterm",
        "KVM_RUN_DIR": str(run_dir),
        "KVM_HOSTNAME": "alpha",
        "KVM_CONFIG": "/dev/null",
        "ETCD_ENDPOINTS": "http://127.0.0.1:1",
    }


@pytest.fixture
def sit(environ: dict[str, str]) -> Sit:
    """Somebody sits down at `console web1`."""
    return lambda *args: at_terminal("console", "web1", *args, environ=environ)


def at_keyboard(person: Person, qemu: Qemu) -> None:
    """Wait until the person has what was written, and QEMU the person."""
    person.sees("login: ")
    eventually("the connection", lambda: qemu.served, DEADLINE_S)


def test_a_person_reads_types_and_detaches(qemu: Qemu, sit: Sit) -> None:
    """Law: scroll-back, then all that comes; keys go to the guest, Ctrl-C too; Ctrl-] q ends it, terminal as before."""
    with sit() as person:
        at_keyboard(person, qemu)
        assert "Ctrl-] is the escape" in person.seen
        assert person.is_raw
        person.types("root\r\x03\x04")
        qemu.hears("root\r\x03\x04")
        qemu.write("password: ")
        person.sees("password: ")
        person.types("\x1dq")
        assert person.ends() == 0
        assert person.is_as_before
    assert person.seen.count("HELLO from web1") == 1
    assert qemu.typed == b"root\r\x03\x04"


@pytest.mark.parametrize("keys", ["\x1d\x1d", "\x1d."])
def test_the_escape_twice_detaches(qemu: Qemu, sit: Sit, keys: str) -> None:
    """Law: who presses Ctrl-] again because nothing happened is let out, as with virsh."""
    with sit() as person:
        at_keyboard(person, qemu)
        person.types(keys)
        assert person.ends() == 0
        assert person.is_as_before


def test_the_escape_itself_can_be_sent(qemu: Qemu, sit: Sit) -> None:
    """Law: Ctrl-] s is Ctrl-] for the guest; any other key after it does nothing, and is not sent either."""
    with sit() as person:
        at_keyboard(person, qemu)
        person.types("a\x1dsb\x1dxc")
        qemu.hears("c")
        assert qemu.typed == b"a\x1dbc"


def test_two_readers_and_one_keyboard(qemu: Qemu, sit: Sit) -> None:
    """Law: both see everything; one types; the other is told who, and takes it over; the first goes on reading."""
    with sit() as first:
        at_keyboard(first, qemu)
        with sit() as second:
            second.sees(f"(process {first.process.pid}")
            second.sees("has the keyboard; Ctrl-] t takes it")
            qemu.write("both\r\n")
            first.sees("both")
            second.sees("both")
            second.types("lost")
            first.types("first")
            qemu.hears("first")

            second.types("\x1dt")
            second.sees("the keyboard is yours")
            first.sees(f"(process {second.process.pid}")
            first.sees("has taken the keyboard; you go on reading")
            second.types("second")
            qemu.hears("second")
            first.types("late")
            qemu.write("still\r\n")
            first.sees("still")

            second.types("\x1dq")
            assert second.ends() == 0
            first.sees("the keyboard is free")
            first.types("\x1dt")
            first.sees("the keyboard is yours")
            first.types("again")
            qemu.hears("again")
            assert qemu.typed == b"firstsecondagain"


def test_a_killed_holder_leaves_the_keyboard(qemu: Qemu, sit: Sit) -> None:
    """Law: nobody is locked out by somebody who is gone, or who stands still and is ended."""
    with sit() as first:
        at_keyboard(first, qemu)
        with sit() as second:
            second.sees("has the keyboard")
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            second.types("\x1dt")
            second.sees("the keyboard is yours")
            second.types("x")
            qemu.hears("x")


def test_a_holder_that_stands_still(qemu: Qemu, sit: Sit) -> None:
    """Law: a stopped program that has the keyboard is named, and how to be rid of it; the wait has an end."""
    with sit() as first:
        at_keyboard(first, qemu)
        freeze(first.process.pid)
        with sit("--take") as second:
            second.sees(f"(process {first.process.pid}")
            second.sees("has the keyboard and does not let go; end that process")
            first.process.send_signal(signal.SIGCONT)
            first.types("x")
            qemu.hears("x")
            assert first.is_raw
            second.types("\x1dt")
            second.sees("the keyboard is yours")


def test_read_only(qemu: Qemu, sit: Sit) -> None:
    """Law: a reader that wants no keyboard takes none, and says so to one who types."""
    with sit("--read-only") as reader:
        reader.sees("login: ")
        reader.types("x")
        reader.sees("read-only: nothing is sent")
        reader.types("\x1dt")
        reader.sees("this is a --read-only session")
        with sit() as person:
            at_keyboard(person, qemu)
            assert "has the keyboard" not in person.seen
        reader.types("\x1dq")
        assert reader.ends() == 0
    assert qemu.typed == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_restores_the_terminal(qemu: Qemu, sit: Sit, number: signal.Signals, code: int) -> None:
    """Law: whatever ends the session, the shell gets its terminal back, and the code says which."""
    with sit() as person:
        at_keyboard(person, qemu)
        assert person.is_raw
        person.process.send_signal(number)
        assert person.ends() == code
        assert person.is_as_before
    assert "Traceback" not in person.seen


def test_qemu_starts_again(qemu: Qemu, run_dir: Path, sit: Sit) -> None:
    """Law: the session tells of QEMU's end, waits, and goes on with the next one, keyboard and all."""
    with sit() as person:
        at_keyboard(person, qemu)
        qemu.end("last words\r\n")
        person.sees("QEMU has ended, waiting for the next one")
        assert person.seen.index("last words") < person.seen.index("QEMU has ended")
        person.types("into the void")
        person.sees("QEMU does not run: nothing is sent")
        again = Qemu(run_dir, epoch=2)
        try:
            person.sees("QEMU was started again")
            assert "epoch 2" in person.seen
            eventually("the connection", lambda: again.served, DEADLINE_S)
            again.write("HELLO again\r\n")
            person.sees("HELLO again")
            person.types("x")
            again.hears("x")
            assert again.typed == b"x"
        finally:
            again.end()


def test_an_instance_that_is_removed(qemu: Qemu, run_dir: Path, sit: Sit) -> None:
    """Law: with its folder gone there is nothing to wait for."""
    with sit() as person:
        at_keyboard(person, qemu)
        qemu.end()
        person.sees("waiting for the next one")
        shutil.rmtree(run_dir / WEB1)
        person.sees("web1 is not on this host any more")
        assert person.ends() == 0
        assert person.is_as_before


def test_rotation_loses_nothing(qemu: Qemu, sit: Sit) -> None:
    """Law: the log is copied and truncated under its readers, who miss no line and see none twice."""
    with sit("--read-only") as reader:
        reader.sees("login: ")
        for number in range(6):
            # Long, as logs that are rotated are: the new one is shorter than the old one was.
            qemu.write(f"{'.' * 4000}\r\nline {number}\r\n")
            if number:
                # Between two rotations a minute passes. What is written just before one is seen all the same: the
                # first time round nobody waits for the reader.
                reader.sees(f"line {number}\r\n")
            log = qemu.directory.console_log
            shutil.copyfile(log, log.with_name("console.log.1"))
            os.truncate(log, 0)
            qemu.write(f"more {number}\r\n")
            reader.sees(f"more {number}")
        for number in range(6):
            assert reader.seen.count(f"line {number}\r\n") == 1
            assert reader.seen.count(f"more {number}\r\n") == 1


def test_a_guest_that_does_not_read_holds_nobody(qemu: Qemu, sit: Sit) -> None:
    """Law: more keys than the guest takes are dropped, with a word; the escape still works."""
    with sit() as person:
        at_keyboard(person, qemu)
        qemu.reads.clear()
        person.types("x")
        for _ in range(200):
            # A paste, as much at a time as a terminal takes.
            person.types("y" * 4000)
            person.looks(0.01)
            if "nothing more is sent" in person.seen:
                break
        person.sees("the guest does not read its console: nothing more is sent")
        person.types("\x1dq")
        assert person.ends() == 0


def test_scroll_back_asks_the_terminal_nothing(qemu: Qemu, sit: Sit) -> None:
    """Law: what a program asked its terminal once is not asked again: the answer would be typed into the guest."""
    qemu.write("".join(f"line {n}\r\n" for n in range(50)) + "\x1b[6n\x1b]0;title\x07\x1b[31mred\x1b[m\r\n$ ")
    with sit("--lines", "3") as person:
        person.sees("$ ")
        assert "line 48\r\nline 49\r\nred\r\n$ " not in person.seen  # four lines
        assert "line 49\r\nred\r\n$ " in person.seen
        assert "\x1b" not in person.seen
        qemu.write("\x1b[32mlive\x1b[m")
        person.sees("\x1b[32mlive\x1b[m")


# --- without a terminal ---------------------------------------------------------------------------------------


def piped(environ: dict[str, str], *args: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    argv = [sys.executable, "-m", "kvmsupervisor", "console", "web1", *args]
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environ, start_new_session=True)


def test_a_pipe(qemu: Qemu, environ: dict[str, str]) -> None:
    """Law: all of standard input is sent, Ctrl-] too; then the output goes on until QEMU ends."""
    text = b"poweroff \x1d\n" + b"z" * 200_000
    process = piped(environ, "--lines", "1")
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    eventually("the end of the input", lambda: len(qemu.typed) == len(text), DEADLINE_S)
    assert process.poll() is None
    qemu.end("GOODBYE\r\n")
    process.stdin = None
    out, err = process.communicate(timeout=DEADLINE_S)
    assert qemu.typed == text
    assert out == b"login: GOODBYE\r\n"
    assert process.returncode == 0
    assert b"QEMU has ended" in err


def test_the_last_words_come_late(qemu: Qemu, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Law: QEMU's end is told behind its last output, which the supervisor writes before it drops the record."""
    directory = RunDir(run_dir).instance(WEB1)
    record = directory.read_incarnation()
    assert record is not None
    looks, words = iter([record, record, record]), iter(["GOODBYE\r\n"])

    def recorded() -> Incarnation | None:
        found = next(looks, None)
        if found is None:
            qemu.write(next(words, ""))
        return found

    Session(
        WEB1,
        record,
        recorded=recorded,
        lives=lambda _record: False,
        is_here=lambda: True,
        log=ConsoleLog(directory.console_log),
        keyboard=lambda wake: Keyboard(directory.path, who="test", wake=wake),
        mode=Mode(read_only=True, take=False, lines=1, terminal=False),
    ).run()
    assert capfd.readouterr().out == "login: GOODBYE\r\n"


def test_a_pipe_that_may_not_type(qemu: Qemu, environ: dict[str, str], sit: Sit) -> None:
    """Law: input that could not be sent is refused, not dropped; --read-only reads beside others, --take takes."""
    with sit() as person:
        at_keyboard(person, qemu)
        refused = piped(environ)
        _, err = refused.communicate(b"x", timeout=DEADLINE_S)
        assert refused.returncode == 1
        assert f"(process {person.process.pid}".encode() in err
        reader = piped(environ, "--read-only")
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"HELLO from web1\r\n"
        reader.send_signal(signal.SIGINT)
        reader.communicate(timeout=DEADLINE_S)
        assert reader.returncode == 130

        taker = piped(environ, "--take")
        assert taker.stdin is not None
        taker.stdin.write(b"taken")
        taker.stdin.flush()
        qemu.hears("taken")
        person.sees("has taken the keyboard")
        person.types("\x1dt")
        person.sees("the keyboard is yours")
        _, err = taker.communicate(timeout=DEADLINE_S)
        assert taker.returncode == 1
        assert b"was taken by" in err
    assert qemu.typed == b"taken"


def test_a_reader_of_the_pipe_that_has_seen_enough(qemu: Qemu, environ: dict[str, str]) -> None:
    """Law: `console web1 --read-only | head -1` ends, quietly."""
    with piped(environ, "--read-only") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()

        def ended() -> bool:
            qemu.write("more\r\n")
            return process.poll() is not None

        eventually("the end", ended, DEADLINE_S)
        assert process.returncode == 0
        assert b"Traceback" not in process.stderr.read()


# --- where it is not ------------------------------------------------------------------------------------------


def refusal(world: World, run_dir: Path) -> str:
    world.environ |= {"KVM_RUN_DIR": str(run_dir)}
    result = world.run("console", "web1")
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


def test_no_such_instance(world: World, run_dir: Path) -> None:
    """Law: exit code 1 with a sentence."""
    assert "there is no instance web1" in refusal(world, run_dir)


def test_an_instance_on_another_host(world: World, run_dir: Path) -> None:
    """Law: which host it is, and what to type."""
    world.host("alpha", "beta")
    world.running("web1", "beta")
    assert "ssh -t beta kvmsupervisor console web1" in refusal(world, run_dir)


def test_an_instance_that_does_not_run(world: World, run_dir: Path) -> None:
    """Law: why not, in its host's words; also with a record of a process that is gone."""
    world.host("alpha")
    world.keys("web1", host="alpha", ram="1G")
    world.status("web1", "alpha", Phase.STOPPED, "its key power is off")
    assert "stopped, its key power is off" in refusal(world, run_dir)
    qemu = Qemu(run_dir)
    qemu.end()
    assert "stopped, its key power is off" in refusal(world, run_dir)
    (run_dir / WEB1 / "incarnation.json").write_text(json.dumps({"version": 99}))
    assert "incarnation.json" in refusal(world, run_dir)


def test_an_instance_without_a_host(world: World, run_dir: Path) -> None:
    """Law: what is missing."""
    world.keys("web1", ram="1G")
    assert "no host" in refusal(world, run_dir)


def test_options_that_exclude_each_other(world: World) -> None:
    """Law: exit code 2."""
    assert world.run("console", "web1", "--read-only", "--take").exit_code == 2
