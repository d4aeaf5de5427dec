"""How many of Ceph's tools work at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvmsupervisor.adapters.ceph.slots import Slots


class Tool:
    """Something that holds a slot until it is told to end."""

    def __init__(self, slots: Slots) -> None:
        self.works = False
        self.end = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(slots))

    async def _run(self, slots: Slots) -> None:
        async with slots.one():
            self.works = True
            await self.end.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_no_more_than_there_are_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the next one begins when one has ended, in order; one that is cancelled while it waits takes no place."""
    slots, later = Slots(2, hold_s=60), list[asyncio.TimerHandle]()
    loop = asyncio.get_running_loop()
    real = loop.call_later

    def call_later(*args: Any) -> asyncio.TimerHandle:
        later.append(real(*args))
        return later[-1]

    monkeypatch.setattr(loop, "call_later", call_later)
    tools = [Tool(slots) for _ in range(5)]
    await settle()
    assert [tool.works for tool in tools] == [True, True, False, False, False]
    tools[2].task.cancel()
    await settle()
    tools[0].end.set()
    await settle()
    assert [tool.works for tool in tools] == [True, True, False, True, False]
    tools[1].task.cancel()
    await settle()
    assert tools[4].works
    for tool in tools:
        tool.end.set()
    await asyncio.wait([tool.task for tool in tools])
    # All places are there again, and no more: not later either.
    assert [handle.cancelled() for handle in later] == [True] * 4
    tools = [Tool(slots) for _ in range(3)]
    await settle()
    assert [tool.works for tool in tools] == [True, True, False]
    for tool in tools:
        tool.end.set()
    await asyncio.wait([tool.task for tool in tools])


async def test_who_waits_for_the_cluster_holds_nobody_up() -> None:
    """Law: a tool that takes long gives its place up, once, whether it ends later or not."""
    slots = Slots(1, hold_s=0.0)
    first = Tool(slots)
    second = Tool(slots)
    while not second.works:  # noqa: ASYNC110 - there is nothing else to wait for
        await asyncio.sleep(0)
    assert not first.task.done()
    for tool in (first, second):
        tool.end.set()
        await tool.task
    assert slots._free._value == 1


def test_one_for_each_loop() -> None:
    """Law: what several loops use one after the other, as tests do, waits in none of the former."""
    slots = Slots(1, hold_s=60)

    async def two() -> None:
        tools = [Tool(slots), Tool(slots)]
        await settle()
        for tool in tools:
            tool.end.set()
        await asyncio.wait([tool.task for tool in tools])

    asyncio.run(two())
    asyncio.run(two())
