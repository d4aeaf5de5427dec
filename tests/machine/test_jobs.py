"""Work in the background: done once whoever asks, told once, not begun anew at once where it failed."""

from __future__ import annotations

import asyncio

import pytest

from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.jobs import Hopeless, Jobs, Say, Underway


async def test_it_is_done_once_and_told_once() -> None:
    """Law: while it goes on each who asks hears how far it is; what it came to is told once, then it is forgotten."""
    jobs, go, begun = Jobs(), asyncio.Event(), list[str]()

    async def work(say: Say) -> int:
        begun.append("begun")
        say("half")
        await go.wait()
        return 7

    for _ in range(3):
        with pytest.raises(Underway):
            jobs.ask("one", work)
        await asyncio.sleep(0)
    with pytest.raises(Underway, match="half"):
        jobs.ask("one", work)
    go.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert jobs.ask("one", work) == 7
    assert begun == ["begun"]
    with pytest.raises(Underway):
        jobs.ask("one", work)
    await jobs.close()


@pytest.mark.parametrize("error", [DiskTrouble("no"), Hopeless("no"), ValueError("a bug")])
async def test_a_failure_is_the_answer_for_a_while(error: Exception) -> None:
    """Law: it is told to all who ask, also where it is an error of ours, and is not begun anew at once."""
    jobs, begun = Jobs(), list[str]()

    async def work(say: Say) -> None:
        begun.append("begun")
        raise error

    with pytest.raises(Underway):
        jobs.ask("one", work)
    for _ in range(3):
        await asyncio.sleep(0)
        with pytest.raises(type(error)):
            jobs.ask("one", work)
    assert begun == ["begun"]
    await jobs.close()


class Brief(DiskTrouble):
    """A failure that is tried again at once."""

    hold_s = 0.0


async def test_a_new_try_says_why_the_last_one_failed() -> None:
    """Law: what people read of it does not change at each try, and is not written to etcd twice for each."""
    jobs, go = Jobs(), asyncio.Event()

    async def work(say: Say) -> None:
        if go.is_set():
            say("half")
            await asyncio.Event().wait()
        raise Brief("no room")

    for said in ("begins", "no room", "no room"):
        with pytest.raises(Underway, match=said):
            jobs.ask("one", work)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    go.set()
    for said in ("no room", "half"):
        with pytest.raises(Underway, match=said):
            jobs.ask("one", work)
        await asyncio.sleep(0)
    await jobs.close()


async def test_work_that_is_part_of_other_work() -> None:
    """Law: who joins hears how far it is, and being cancelled does not take it from others."""
    jobs, go = Jobs(), asyncio.Event()

    async def inner(say: Say) -> str:
        say("inner")
        await go.wait()
        return "done"

    async def outer(say: Say) -> str:
        return await jobs.join("inner", inner, say)

    heard: list[str] = []
    leaves = asyncio.ensure_future(jobs.join("inner", inner, heard.append))
    with pytest.raises(Underway):
        jobs.ask("outer", outer)
    for _ in range(3):
        await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait({leaves})
    with pytest.raises(Underway):
        jobs.ask("outer", outer)
    go.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert jobs.ask("outer", outer) == "done"


async def test_the_end() -> None:
    """Law: nothing of it goes on when its host ends."""
    jobs, ended = Jobs(), asyncio.Event()

    async def work(say: Say) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(Underway):
        jobs.ask("one", work)
    await asyncio.sleep(0)
    await jobs.close()
    assert ended.is_set()
