"""The loop of the simulation: one seed, one order; virtual time; lives that are frozen and killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.simulation.loop import LIFE, START_S, Life, SimLoop, Spinning, context_of, run


def order_of(seed: object, *, tasks: int = 6) -> list[str]:
    """In which order some tasks take their steps."""
    seen: list[str] = []

    async def work(name: str) -> None:
        for number in range(3):
            seen.append(f"{name}{number}")
            await asyncio.sleep(0)

    async def main(loop: SimLoop) -> None:
        async with asyncio.TaskGroup() as group:
            for name in "abcdefgh"[:tasks]:
                group.create_task(work(name))

    run(main, seed)
    return seen


def test_one_seed_is_one_order() -> None:
    """The same seed draws the same steps, others draw other ones."""
    assert order_of(1) == order_of(1)
    assert len({tuple(order_of(seed)) for seed in range(20)}) > 15


def test_steps_of_one_task_keep_their_order() -> None:
    seen = order_of(3)
    for name in "abcdef":
        assert [one for one in seen if one[0] == name] == [f"{name}{number}" for number in range(3)]


def test_callbacks_keep_their_order() -> None:
    """As asyncio promises of `call_soon`."""
    seen: list[int] = []

    async def main(loop: SimLoop) -> None:
        for number in range(50):
            loop.call_soon(seen.append, number)
        await asyncio.sleep(1.0)

    run(main)
    assert seen == list(range(50))


def test_time_is_virtual() -> None:
    """An hour takes no time, and each timer sees its own instant."""
    seen: list[float] = []

    async def main(loop: SimLoop) -> None:
        for after in (3600.0, 0.5, 2.0):
            loop.call_later(after, lambda: seen.append(loop.time()))
        await asyncio.sleep(3601.0)

    run(main)
    assert [round(at - START_S, 3) for at in seen] == [0.5, 2.0, 3600.0]


def test_threads_run_in_place() -> None:
    async def main(loop: SimLoop) -> int:
        return await asyncio.to_thread(lambda: 6 * 7)

    assert run(main) == 42


def test_cancelling_a_set_of_tasks_is_in_the_order_of_their_making() -> None:
    """Python cancels them in the order of their addresses."""

    def once() -> list[int]:
        seen: list[int] = []

        async def wait(number: int) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                seen.append(number)

        async def main(loop: SimLoop) -> None:
            tasks = {asyncio.create_task(wait(number)) for number in range(20)}
            await asyncio.sleep(1.0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        run(main, 5)
        return seen

    assert once() == once()


async def beat(seen: list[float], loop: SimLoop) -> None:
    while True:
        await asyncio.sleep(1.0)
        seen.append(round(loop.time() - START_S))


def lived(act: Callable[[SimLoop, Life], None]) -> list[float]:
    """The seconds at which a life beats that lives ten of them, in which `act` happens after the third."""
    seen: list[float] = []

    async def main(loop: SimLoop) -> None:
        life = Life("one")
        loop.create_task(beat(seen, loop), context=context_of(life))
        await asyncio.sleep(3.5)
        act(loop, life)
        await asyncio.sleep(7.0)

    run(main)
    return seen


def test_a_frozen_life_goes_on_where_it_was() -> None:
    def freeze(loop: SimLoop, life: Life) -> None:
        life.frozen = True
        loop.call_later(4.0, setattr, life, "frozen", False)

    assert lived(freeze)[:5] == [1, 2, 3, 8, 9]


def test_a_dead_life_does_nothing_more() -> None:
    assert lived(lambda loop, life: setattr(life, "dead", True)) == [1, 2, 3]


def test_nothing_of_a_dead_life_is_cleaned_up() -> None:
    """SIGKILL: no `finally` runs while the history lasts."""
    seen: list[str] = []

    async def tidy() -> None:
        try:
            await asyncio.sleep(100.0)
        finally:
            seen.append(LIFE.get().name)

    async def main(loop: SimLoop) -> list[str]:
        life = Life("one")
        task: asyncio.Task[Any] = loop.create_task(tidy(), context=context_of(life))
        await asyncio.sleep(1.0)
        life.dead = True
        task.cancel()
        await asyncio.sleep(200.0)
        return list(seen)

    assert run(main) == []


def test_a_life_that_was_dead_before_it_did_anything_is_torn_down() -> None:
    """A supervisor may be killed before its first step. What it will never do was looked through for ever."""
    seen: list[str] = []

    async def main(loop: SimLoop) -> None:
        life = Life("one")
        life.dead = True
        loop.call_soon(seen.append, "stillborn", context=context_of(life))
        await asyncio.sleep(1.0)
        assert seen == []

    run(main)


def test_who_spins_is_told() -> None:
    async def main(loop: SimLoop) -> None:
        while True:  # noqa: ASYNC110 - that is the point
            await asyncio.sleep(0)

    with pytest.raises(Spinning):
        run(main)


def test_an_exception_that_is_never_fetched_is_told() -> None:
    async def fail() -> None:
        raise ValueError("lost")

    async def main(loop: SimLoop) -> list[str]:
        asyncio.create_task(fail())  # noqa: RUF006 - that it is let go of is the point
        await asyncio.sleep(1.0)
        return loop.errors

    (error,) = run(main)
    assert "lost" in error


def test_a_life_may_end_before_it_begins() -> None:
    """Nothing of it was ever in line, and the end of the history is the end all the same (seed 504)."""

    async def main(loop: SimLoop) -> None:
        life = Life("stillborn")
        life.dead = True
        loop.create_task(asyncio.sleep(1.0), context=context_of(life))
        await asyncio.sleep(1.0)

    run(main)
