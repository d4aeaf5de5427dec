"""The demo as people run it: a process of its own, with real etcd, supervisor, QEMU and guest."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.guest import CACHE

pytestmark = pytest.mark.usefixtures("guest")  # so that it is built before a demo's time runs

LIMIT_S = 110.0


@dataclass(slots=True)
class Running:
    """A demo that runs, with what it has printed."""

    process: asyncio.subprocess.Process
    seen: str = ""

    async def until(self, text: str) -> None:
        """Read what it prints, up to a line that has `text` in it."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            line = ""
            while text not in line:
                line = (await self.process.stdout.readline()).decode()
                assert line, f"ended before it printed {text!r}:\n{self.seen}"
                self.seen += line

    async def ended(self) -> int:
        """Read the rest; return its exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            self.seen += (await self.process.stdout.read()).decode()
            return await self.process.wait()


@pytest.fixture
def place() -> Iterator[Path]:
    """The folder that the demo takes for /tmp. Its name is short, for sockets lie in it."""
    folder = Path(f"/tmp/k{secrets.token_hex(3)}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@asynccontextmanager
async def demo(
    place: Path, *more: str, code: str | None = None, path: str = os.environ["PATH"]
) -> AsyncIterator[Running]:
    """Run the demo, and assert that it leaves nothing behind: no process, no file."""
    program = ["-c", code] if code is not None else ["-m", "kvmsupervisor", "demo", *more]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        *(["--cache", str(CACHE)] if code is None else []),
        # It must stay out of what surrounds it: this would make any supervisor refuse to start.
        env={**os.environ, "PATH": path, "TMPDIR": str(place), "KVM_NONSENSE": "1", "PYTHONUNBUFFERED": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Running(process)
        assert process.returncode is not None
        assert below(place) == []
        assert bearing(place) == []
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for left in bearing(place):
            left.kill()


def below(place: Path) -> list[Path]:
    """What lies in `place`."""
    return list(place.iterdir())


def bearing(place: Path) -> list[psutil.Process]:
    """The processes that have `place` in their command line or environment."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        words = [*(process.info["cmdline"] or ()), *(process.info["environ"] or {}).values()]
        if process.pid != os.getpid() and any(str(place) in word for word in words):
            found.append(process)
    return found


@pytest.mark.guest
async def test_the_demo_shows_a_guest_that_boots_and_shuts_it_down(place: Path) -> None:
    """With KVM_DEMO_ONCE=1: exit code 0, the guest's own words, its answer by SSH, `list`, a graceful end."""
    async with demo(place, "--once") as running:
        assert await running.ended() == 0, running.seen
    words = [
        "Linux version",
        "HELLO from hello",
        "GNU/Linux",
        "PHASE",
        "running",
        "GOODBYE from hello",
        "guest-shutdown",
        "gone",
    ]
    places = [running.seen.find(word) for word in words]
    assert -1 not in places, running.seen
    assert places == sorted(places), running.seen


@pytest.mark.guest
async def test_ctrl_c_ends_a_demo_that_stays_and_its_guests_survive_a_supervisor(place: Path) -> None:
    """A killed supervisor gets a successor, which adopts the guest; then Ctrl-C, and exit code 0."""
    async with demo(place) as running:
        await running.until("Ctrl-C shuts the guest down")
        supervisors = [found for found in bearing(place) if found.info["cmdline"][-2:] == ["kvmsupervisor", "run"]]
        qemu = [found for found in bearing(place) if "qemu" in found.info["cmdline"][0]]
        assert (len(supervisors), len(qemu)) == (1, 1)
        supervisors[0].kill()
        await running.until("supervisor  host demo")
        await running.until("running     hello")
        assert qemu[0].is_running()
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0, running.seen
    assert running.seen.count("HELLO from hello") == 1


@pytest.mark.parametrize("step", ["guest  ", "ssh  ", "supervisor  ", "keys  ", "Linux version"])
@pytest.mark.guest
async def test_a_demo_that_is_cut_off_early_leaves_nothing_behind(place: Path, step: str) -> None:
    """At every step; the exit code says that the guest did not get to its hello."""
    async with demo(place) as running:
        await running.until(step)
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 1
    assert "ended before the guest said hello" in running.seen


@pytest.mark.guest
async def test_a_second_ctrl_c_ends_the_demo_by_force(place: Path, tmp_path: Path) -> None:
    """A guest that hangs is not waited for; what had to be killed is said. Without SSH one logs in on the console."""
    (tmp_path / "ssh-keygen").write_text("#!/bin/sh\necho no luck today\nexit 7\n")
    (tmp_path / "ssh-keygen").chmod(0o755)
    async with demo(place, path=f"{tmp_path}:{os.environ['PATH']}") as running:
        await running.until("without SSH: ssh-keygen ended with exit code 7: no luck today")
        await running.until("Ctrl-C shuts the guest down")
        reader, writer = await asyncio.open_unix_connection(below(place)[0] / "run" / "hello" / "console.sock")
        async with asyncio.timeout(LIMIT_S):
            writer.write(b"\n")
            await reader.readuntil(b"login: ")
            writer.write(b"root\n")
            await reader.readuntil(b"hello:/root# ")
            # What waits for the power button.
            writer.write(b"killall -STOP dd && echo $((6 * 7)) asleep\n")
        await running.until("42 asleep")
        writer.close()
        running.process.send_signal(signal.SIGINT)
        await running.until("shut down")
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 1
    assert "had to be killed: qemu" in running.seen


async def test_a_supervisor_that_does_not_start_is_shown_with_its_log(place: Path) -> None:
    """The error names the step; the demo's exit code is 1."""
    code = (
        "import asyncio, sys; from pathlib import Path; from kvmsupervisor.cli.demo.command import run_demo\n"
        f"command = [sys.executable, '-c', 'raise SystemExit(\"no luck today\")']\n"
        f"cache = Path({str(CACHE)!r})\n"
        "sys.exit(asyncio.run(run_demo(once=True, cache=cache, supervisor=command)))"
    )
    async with demo(place, code=code) as running:
        assert await running.ended() == 1
    assert "demo: supervisor: ended with exit code 1, waiting for its session" in running.seen
    assert "no luck today" in running.seen
