"""The clock, the machine's names, and the clock of the tests."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from kvmsupervisor.adapters import clock as clock_module
from kvmsupervisor.adapters.clock import Clock, boot_id, machine_id
from tests.fakes.clock import FakeClock, settle


def test_now_is_boottime() -> None:
    """Deadlines go on in suspend."""
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= Clock().now() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_wall_is_rfc3339_in_utc() -> None:
    """People and programs read it."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", Clock().wall())


async def test_wait_tells_the_event_from_the_instant() -> None:
    """True for the event, also when the time is up as well; False for the instant."""
    clock, event = Clock(), asyncio.Event()
    assert not await clock.wait(event, clock.now() + 0.001)
    asyncio.get_running_loop().call_soon(event.set)
    assert await clock.wait(event, None)
    assert await clock.wait(event, clock.now() - 1)


async def test_waits_look_at_the_clock_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspend, in which asyncio's clock stood still, delays a wait by one re-check at most."""
    monkeypatch.setattr(clock_module, "RECHECK_S", 0.001)

    class Suspended(Clock):
        looks = 0

        def now(self) -> float:
            self.looks += 1
            return 0.0 if self.looks < 4 else 4000.0

    assert not await Suspended().wait(asyncio.Event(), 3600.0)
    await Suspended().sleep_until(3600.0)


async def test_sleeping_until_the_past_yields_to_others() -> None:
    """A loop whose next step is always due does not starve the rest."""
    ran: list[int] = []
    asyncio.get_running_loop().call_soon(ran.append, 1)
    await Clock().sleep_until(0.0)
    assert ran


def test_boot_id_is_the_kernels() -> None:
    """The same within a boot."""
    assert re.fullmatch(r"[0-9a-f-]{36}", boot_id())
    assert boot_id() == boot_id()


@pytest.mark.parametrize(
    ("uuid", "etc", "expected"),
    [
        ("4C4C4544-0042-3510-8056-B4C04F4D3132\n", "a" * 32, "4c4c4544-0042-3510-8056-b4c04f4d3132"),
        ("00000000-0000-0000-0000-000000000000\n", "a" * 32 + "\n", "a" * 32),
        ("03000200-0400-0500-0006-000700080009\n", None, ""),
        (None, "uninitialized\n", ""),
        (None, "", ""),
        (None, None, ""),
    ],
)
def test_machine_id_prefers_dmi_and_skips_placeholders(
    tmp_path: Path, uuid: str | None, etc: str | None, expected: str
) -> None:
    """Two machines must not share a name because of a sloppy firmware or image."""
    paths = tmp_path / "product_uuid", tmp_path / "machine-id"
    for path, text in zip(paths, (uuid, etc), strict=True):
        if text is not None:
            path.write_text(text)
    assert machine_id(*paths) == expected


async def test_virtual_sleepers_wake_in_order_each_at_its_instant() -> None:
    """What one sleeper does is seen by the next; sleepers started on the way count as well."""
    clock, seen = FakeClock(start=0.0), []

    async def sleeper(name: str, *delays: float) -> None:
        for delay in delays:
            await clock.sleep(delay)
            seen.append((name, clock.now()))

    tasks = [asyncio.create_task(sleeper("a", 2, 2)), asyncio.create_task(sleeper("b", 1, 2, 10))]
    await clock.advance(5)
    assert seen == [("b", 1), ("a", 2), ("b", 3), ("a", 4)]
    assert clock.now() == 5
    await clock.advance_until(tasks[1].done, 60)
    assert clock.now() == 13


async def test_virtual_wait_and_cancellation() -> None:
    """`wait` holds the same promises as the real one; a cancelled sleeper leaves no timer that fires."""
    clock, event = FakeClock(), asyncio.Event()
    task = asyncio.create_task(clock.wait(event, clock.now() + 5))
    await clock.advance(5)
    assert task.result() is False
    task = asyncio.create_task(clock.wait(event, clock.now() + 5))
    await settle()
    event.set()
    await settle()
    assert task.result() is True
    sleeper = asyncio.create_task(clock.sleep(3))
    await settle()
    sleeper.cancel()
    await clock.advance(10)
    assert sleeper.cancelled()
    with pytest.raises(AssertionError, match="still not so"):
        await clock.advance_until(lambda: False, 1)


async def test_a_jump_wakes_nobody_until_the_next_advance() -> None:
    """A frozen process sees the time, its tasks do not run."""
    clock = FakeClock(start=0.0)
    task = asyncio.create_task(clock.sleep(1))
    await settle()
    clock.jump(100)
    await settle()
    assert not task.done()
    await clock.advance(0)
    assert task.done()
