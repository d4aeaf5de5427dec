"""A world of its own ends with its first process, whatever ends that: no process, file or mount is left."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster_demo.apart import SHOW_AGAIN
from tests.cluster_demo.leftovers import await_end, bearing, mounts_of
from tests.support.checkout import ROOT

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="PID and mount namespaces take root")

LIMIT_S = 60.0

PROGRAM = """
import subprocess, sys, time
from tests.cluster_demo.apart import run_apart, write_desk

def main(folder):
    (folder / "file").write_text("x")
    write_desk(folder, {"ETCD_ENDPOINTS": "http://127.0.0.1:1"})
    # Of another session, and deaf: no signal of a terminal ends it.
    deaf = "trap '' INT TERM HUP; echo deaf; sleep 1000"
    child = subprocess.Popen(["sh", "-c", deaf], start_new_session=True, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    print(folder, flush=True)
    match sys.argv[1]:
        case "returns":
            return 7
        case "raises":
            raise ValueError("oh")
        case "waits":
            try:
                time.sleep(1000)
            finally:
                print("in order", flush=True)
        case "hangs":
            while True:
                try:
                    time.sleep(1000)
                except BaseException:
                    print("goes on", flush=True)

sys.exit(run_apart(main))
"""


@contextmanager
def world(how: str, *, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", PROGRAM, how]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def folder_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    folder = process.stdout.readline().strip()
    assert bearing(folder), "no process bears its name: this test would see none that is left"
    return folder


@pytest.mark.parametrize(("how", "status"), [("returns", 7), ("raises", 1)])
def test_it_ends_by_itself(how: str, status: int) -> None:
    """What `main` returns is the exit status; an error of its own is shown."""
    with world(how) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    folder = out.strip()
    assert process.returncode == status, err
    assert ("ValueError: oh" in err) == (how == "raises")
    assert not bearing(folder)
    assert not Path(folder).exists()
    assert mounts_of(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number: signal.Signals) -> None:
    """What is to be undone is; then all is gone."""
    with world("waits") as process:
        folder = folder_of(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (128 + number, "in order\n"), err
    assert not bearing(folder)
    assert not Path(folder).exists()


def test_a_second_signal_ends_it_by_force() -> None:
    """One that hangs in its end."""
    with world("hangs") as process:
        folder = folder_of(process)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "goes on\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 128 + signal.SIGKILL
    assert not bearing(folder)


def test_a_kill_of_the_parent_leaves_no_process() -> None:
    """SIGKILL runs no `finally`: the kernel ends what is left. An empty folder stays, as nobody could remove it."""
    with world("waits") as process:
        folder = folder_of(process)
        process.kill()
        process.wait(LIMIT_S)
    await_end(folder)
    assert [file.name for file in Path(folder).iterdir()] == ["kvmsupervisor"]
    shutil.rmtree(folder)


def test_people_reach_it_from_another_terminal() -> None:
    """The program in the folder's place outside runs where the demo does, with its settings."""
    with world("waits") as process:
        folder = folder_of(process)
        assert not (Path(folder) / "file").exists()
        asked = [f"{folder}/kvmsupervisor", "list"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        process.terminate()
        process.wait(LIMIT_S)
    assert found.returncode == 3, found.stderr
    assert "127.0.0.1:1" in found.stderr


def test_a_terminal_is_as_it_was() -> None:
    """One that was killed while it had the screen: the cursor and what stood there before are back."""
    master, slave = pty.openpty()
    try:
        with world("hangs", stdout=slave) as process:
            seen = b""
            for wanted in (b"/tmp/", b"goes on"):
                while wanted not in seen:
                    seen += os.read(master, 4096)
                process.send_signal(signal.SIGINT)
            process.wait(LIMIT_S)
        while SHOW_AGAIN.encode() not in seen:
            seen += os.read(master, 4096)
    finally:
        os.close(master)
        os.close(slave)
