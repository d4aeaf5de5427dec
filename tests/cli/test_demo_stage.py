"""What the demo starts it can also end, find and name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from kvmsupervisor.cli.demo.stage import (
    Child,
    ChildEnded,
    DemoError,
    clean_environment,
    clear_away,
    follow_lines,
    free_ports,
    make_folder,
    while_alive,
)

LIMIT_S = 30.0
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
)


@contextlib.asynccontextmanager
async def child(folder: Path, code: str) -> AsyncIterator[Child]:
    found = await Child.start("child", [sys.executable, "-c", code], environ=os.environ, folder=folder)
    try:
        yield found
    finally:
        await found.stop(deadline_s=0)


async def test_a_child_that_ignores_politeness_is_killed(tmp_path: Path) -> None:
    """`stop` ends a child in any case, and says whether force was needed."""
    async with child(tmp_path, STUBBORN) as stubborn, asyncio.timeout(LIMIT_S):
        async with aclosing(follow_lines(tmp_path / "child.log")) as lines:
            assert await anext(lines) == "deaf"
        assert stubborn.alive
        assert not await stubborn.stop(deadline_s=0.05)
        assert not stubborn.alive
        assert await stubborn.stop(deadline_s=0)


async def test_a_child_that_ended_a_moment_ago_needs_no_force(tmp_path: Path) -> None:
    """Law: that it was reaped before the event loop heard of it is no error."""
    async with child(tmp_path, "") as short:
        # Reaped by us, or by the thread in which asyncio waits: it does not matter by whom. Blocking is what makes the
        # moment: the loop cannot hear of the end before `stop` is called.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, short.pid, os.WEXITED)  # noqa: ASYNC222 - see above
        assert short.alive
        assert await short.stop(deadline_s=LIMIT_S)


async def test_work_that_needs_a_child_fails_when_the_child_ends(tmp_path: Path) -> None:
    """The error names the child, its exit code, what was being done, and the end of its log."""
    async with child(tmp_path, "print('the reason'); raise SystemExit(7)") as short:
        with pytest.raises(ChildEnded, match=r"(?s)child: ended with exit code 7, waiting.*the reason") as caught:
            await while_alive([short], asyncio.Event().wait(), doing="waiting", deadline_s=LIMIT_S)
        assert (caught.value.child, caught.value.code) == (short, 7)


async def test_work_ends_by_its_deadline_and_with_its_own_result_or_error(tmp_path: Path) -> None:
    """Too late is an error about the child; otherwise the work's own outcome counts."""
    async with child(tmp_path, STUBBORN) as living:

        async def result() -> int:
            return 5

        async def error() -> int:
            raise DemoError("its own")

        assert await while_alive([living], result(), doing="working", deadline_s=LIMIT_S) == 5
        with pytest.raises(DemoError, match="its own"):
            await while_alive([living], error(), doing="working", deadline_s=LIMIT_S)
        with pytest.raises(DemoError, match=r"child: waiting took longer than 0.01 s"):
            await while_alive([living], asyncio.Event().wait(), doing="waiting", deadline_s=0.01)
        assert living.alive


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"etcd cannot be started: /no/etcd: No such file"):
        await Child.start("etcd", ["/no/etcd"], environ={}, folder=tmp_path)


def test_the_last_sweep_finds_what_bears_the_folders_name_and_nothing_else() -> None:
    """In the command line or in the environment: a process that outlives its parent is found, others live on."""
    folder, other = make_folder(), make_folder()
    sleeper = [sys.executable, "-c", "import time; time.sleep(99)"]
    named = [
        subprocess.Popen([*sleeper, f"path={folder}/x"]),
        subprocess.Popen(sleeper, env={**os.environ, "KVM_RUN_DIR": f"{folder}/run"}),
    ]
    spared = subprocess.Popen([*sleeper, str(other)])
    try:
        assert len(clear_away(folder)) == 2
        assert [process.wait() for process in named] == [-signal.SIGKILL] * 2
        assert not folder.exists()
        assert spared.poll() is None
    finally:
        for process in (*named, spared):
            process.kill()
            process.wait()
        clear_away(other)


def test_nothing_that_is_meant_for_others_reaches_the_children() -> None:
    """Variables of another supervisor or etcd would change the demo, and unknown ones stop a supervisor."""
    foreign = {"KVM_DEMO_ONCE": "1", "ETCD_ENDPOINTS": "http://x", "ETCDCTL_API": "2", "LOCK": "/l", "VM_RAM": "1"}
    assert clean_environment({**foreign, "PATH": "/bin", "BLOCK": "1"}) == {"PATH": "/bin", "BLOCK": "1"}


def test_free_ports_differ() -> None:
    assert len(set(free_ports(5))) == 5


async def test_lines_of_a_log_are_followed_from_before_it_exists(tmp_path: Path) -> None:
    """A line counts when it is whole; a log that is cut off is read from its new beginning."""
    log = tmp_path / "console.log"
    async with aclosing(follow_lines(log)) as lines, asyncio.timeout(LIMIT_S):
        first = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0)
        log.write_bytes(b"one\r\ntw")
        assert await first == "one"
        second = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0)
        with log.open("ab") as writer:
            writer.write(b"o\n\xff\n")
        assert await second == "two"
        assert await anext(lines) == "\N{REPLACEMENT CHARACTER}"
        log.write_bytes(b"3\n")
        assert await anext(lines) == "3"
