"""What people see: the real program on a real (pseudo) terminal."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.support.etcd import EtcdServer
from tests.support.processes import stat_of
from tests.support.readable import readable

DEADLINE_S = 30.0
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


class Terminal:
    """A program on a pseudo terminal, read until it says something."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.seen = ""
        self._master = master

    def read_until(self, words: str) -> str:
        """Read until `words` were printed."""
        deadline = time.monotonic() + DEADLINE_S
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen
            assert self._read(), f"it ended without saying {words!r}: {self.seen!r}"
        return self.seen

    def wait_asleep(self) -> None:
        """Wait until it waits for what is typed.

        Python shows its prompt before that, and what interrupts it in between is heard with the next key only.
        """
        deadline = time.monotonic() + DEADLINE_S
        while (stat := stat_of(self.process.pid)) is None or stat.state != "S":
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.001)

    def type(self, text: str) -> None:
        """Type."""
        os.write(self._master, text.encode())

    def end(self) -> int:
        """Read to the end; return the exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=DEADLINE_S)

    def _read(self) -> bool:
        assert readable(self._master, DEADLINE_S), self.seen
        try:
            data = os.read(self._master, 65536)
        except OSError:
            # EIO: the program has closed its side.
            return False
        self.seen += data.decode()
        return bool(data)


Start = Callable[..., AbstractContextManager[Terminal]]


@pytest.fixture
def on_terminal(etcd_server: EtcdServer, etcd_prefix: str) -> Start:
    """Run the program on a terminal of 100 columns."""
    etcd_server.ctl("put", f"{etcd_prefix}/1/ram", "1G")
    etcd_server.ctl("put", f"{etcd_prefix}/1/host", "beta")
    etcd_server.ctl(
        "put", f"{etcd_prefix}supervisor/hosts/beta", '{"host":"beta","version":"1","url":"","boot_id":"b"}'
    )

    @contextmanager
    def start(*args: str, **environ: str) -> Iterator[Terminal]:
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        env = {
            "PATH": os.environ["PATH"],
            "TERM": "xterm",
            "KVM_HOSTNAME": "alpha",
            "KVM_PREFIX": etcd_prefix,
            "ETCD_ENDPOINTS": etcd_server.endpoint,
            **environ,
        }
        argv = [sys.executable, "-m", "kvmsupervisor", *args]
        process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True)
        os.close(slave)
        try:
            yield Terminal(process, master)
        finally:
            process.kill()
            process.wait()
            os.close(master)

    return start


def test_tables_are_coloured_unless_no_color_is_set(on_terminal: Start) -> None:
    """Colours on a terminal; none with NO_COLOR, and the words are the same."""
    with on_terminal("list") as coloured:
        assert coloured.end() == 0
    with on_terminal("list", NO_COLOR="1") as plain:
        assert plain.end() == 0
    assert COLOUR.search(coloured.seen)
    assert not COLOUR.search(plain.seen)
    assert "host beta has not said anything yet" in coloured.seen
    assert "host beta has not said anything yet" in plain.seen


def test_show_on_a_terminal_has_every_block(on_terminal: Start) -> None:
    """The blocks of `show`, whether or not there is something in them."""
    with on_terminal("show", "1", NO_COLOR="1") as shown:
        assert shown.end() == 0
    for words in ("1 on beta: waiting", "Wishes", "Lock", "free", "Session of host beta"):
        assert words in shown.seen


def test_delete_asks_and_no_is_no(on_terminal: Start, etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """`n`: exit code 1, nothing removed. `y`: removed."""
    with on_terminal("delete", "1") as refused:
        refused.read_until("[y/N]")
        refused.type("n\n")
        assert refused.end() == 1
    assert etcd_server.ctl("get", f"{etcd_prefix}/1/ram")
    with on_terminal("delete", "1") as done:
        done.read_until("[y/N]")
        done.type("y\n")
        assert done.end() == 0
    assert not etcd_server.ctl("get", f"{etcd_prefix}/1/ram")


def test_ctrl_c_at_a_question_exits_130(on_terminal: Start, etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """Interrupted while asked: exit code 130, nothing removed."""
    with on_terminal("delete", "1") as asked:
        asked.read_until("[y/N]")
        asked.wait_asleep()
        asked.process.send_signal(signal.SIGINT)
        assert asked.end() == 130
    assert "Traceback" not in asked.seen
    assert etcd_server.ctl("get", f"{etcd_prefix}/1/ram")


def test_ctrl_c_while_waiting_exits_130(on_terminal: Start) -> None:
    """Interrupted in the middle of a wait: exit code 130, no traceback, the cursor is back."""
    with on_terminal("start", "1", "--wait") as waiting:
        waiting.read_until("host beta has not said anything yet")
        waiting.process.send_signal(signal.SIGINT)
        assert waiting.end() == 130
    assert "Traceback" not in waiting.seen
    assert waiting.seen.rindex("\x1b[?25h") > waiting.seen.rindex("\x1b[?25l")
