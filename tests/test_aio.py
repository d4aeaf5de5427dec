"""Several things at once: all results, or the first failure and nothing left running."""

from __future__ import annotations

import asyncio

import pytest

from kvmsupervisor.aio import Remembered, StrayCancellation, all_of, both, start_part, until_one_ends


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail() -> int:
    raise ValueError("no")


class Endless:
    """A step that ends by cancellation only."""

    def __init__(self) -> None:
        self.cancelled = False

    async def run(self) -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return 0


async def test_results_in_order() -> None:
    """Law: each result in the place of its step; nothing to do is done at once."""
    assert await all_of([give(1), give(2), give(3)]) == [1, 2, 3]
    assert await all_of([]) == []
    assert await both(give(1), give(2)) == (1, 2)


async def test_the_first_failure_is_that_of_all() -> None:
    """Law: its error is raised as it is, and the others have ended by then."""
    endless = Endless()
    with pytest.raises(ValueError, match="no"):
        await all_of([endless.run(), fail()])
    assert endless.cancelled


async def test_cleaning_up_is_not_cut_short() -> None:
    """Law: when all are cancelled, each ends in its own time, however early another one has ended."""
    cleaned = asyncio.Event()

    async def clean_up() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            cleaned.set()

    task = asyncio.ensure_future(all_of([asyncio.Event().wait(), clean_up()]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()


async def test_a_time_limit_afterwards_is_a_time_limit() -> None:
    """Law: who has seen a failure goes on as before: its next timeout is one, and no cancellation."""
    with pytest.raises(ValueError, match="no"):
        await all_of([give(1), fail()])
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.Event().wait()


async def test_cancelled() -> None:
    """Law: with the whole its steps are cancelled, and have ended when it has."""
    endless = Endless()
    task = asyncio.create_task(all_of([endless.run(), give(1)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert endless.cancelled


async def give_up() -> None:
    """What gRPC does with a stream that it cannot write to."""
    raise asyncio.CancelledError


async def test_a_part_that_nobody_cancelled_fails_its_group() -> None:
    """Law: a group learns of a part that was cancelled by a library; the others end, and the failure is told."""
    endless = Endless()

    async def both_parts() -> None:
        async with asyncio.TaskGroup() as group:
            start_part(group, endless.run)
            start_part(group, give_up)

    with pytest.raises(ExceptionGroup) as failure:
        await both_parts()
    assert [type(error) for error in failure.value.exceptions] == [StrayCancellation]
    assert endless.cancelled


async def test_a_part_that_is_cancelled_at_once_leaves_nothing_behind() -> None:
    """Law: it never begins, and leaves no coroutine that nobody awaits: Python's warning of one fails a test."""
    endless = Endless()
    async with asyncio.TaskGroup() as group:
        start_part(group, endless.run).cancel()
    assert not endless.cancelled


async def test_a_part_that_was_cancelled_ends_as_it_was_told() -> None:
    """Law: no failure, neither of a part that is cancelled nor of one whose group is."""
    endless = Endless()
    async with asyncio.TaskGroup() as group:
        part = start_part(group, endless.run)
        await asyncio.sleep(0)
        part.cancel()
    assert part.cancelled()
    assert endless.cancelled


async def test_until_one_ends() -> None:
    """The others are ended and waited for; who failed is told of, also when another ended in the same turn."""
    told: list[str] = []

    async def lasts() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            told.append("ended")

    async def ends() -> None:
        await asyncio.sleep(0)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("why")

    await until_one_ends(lasts(), ends())
    assert told == ["ended"]
    with pytest.raises(ValueError, match="why"):
        await until_one_ends(ends(), lasts(), fails())
    assert told == ["ended", "ended"]
    waiting = asyncio.create_task(until_one_ends(lasts(), lasts()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert told == ["ended"] * 4


class Answers:
    """Answers by number, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.may = asyncio.Event()

    async def ask(self) -> int:
        self.asked += 1
        number = self.asked
        await self.may.wait()
        if number == 1:
            raise ValueError("the first fails")
        return number


async def test_what_is_remembered() -> None:
    """Law: all that wait get one answer; a failure is told to them and forgotten; an answer is kept until its time."""
    answers, known = Answers(), Remembered[int](60)
    waiting = [asyncio.ensure_future(known.get("a", answers.ask)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    answers.may.set()
    _, *told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(error) for error in told] == ["the first fails"] * 2
    assert await known.get("a", answers.ask) == 2
    assert await known.get("a", answers.ask) == 2
    assert await known.get("b", answers.ask) == 3
    known.forget("a")
    assert await known.get("a", answers.ask) == 4
    never = Remembered[int](0)
    assert [await never.get("a", answers.ask) for _ in range(2)] == [5, 6]
