"""The clock, and the ids of this machine and of its present boot.

Deadlines use `CLOCK_BOOTTIME`, which goes on while the machine is suspended, as leases in etcd do (clock_gettime(2)).
asyncio's own clock is `CLOCK_MONOTONIC`, which stops during a suspend.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

RECHECK_S = 60.0
"""How long a wait relies on asyncio's clock: a suspend delays the wait by this much at most. Arbitrary: one wake-up a
minute costs nothing, and exact deadlines (of a session) are compared with `now()`, not waited for."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PRODUCT_UUID = Path("/sys/class/dmi/id/product_uuid")
_MACHINE_ID = Path("/etc/machine-id")

_PLACEHOLDER_UUIDS = frozenset(
    {
        "00000000-0000-0000-0000-000000000000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        # A placeholder of firmware vendors; the same on many boards.
        "03000200-0400-0500-0006-000700080009",
    }
)


class Clock:
    """The machine's clock. Tests use `tests.fakes.clock.FakeClock` instead."""

    def now(self) -> float:
        """Seconds of `CLOCK_BOOTTIME`."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> str:
        """The time of day, RFC 3339 in UTC, for people. No decision uses it."""
        return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def wall_after(self, seconds: float) -> str:
        """The time of day in that many seconds, in the format of `wall`."""
        return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")

    async def sleep_until(self, instant: float) -> None:
        """Return when `now()` has reached `instant`; yields to the loop at least once."""
        await asyncio.sleep(0)
        while (left := instant - self.now()) > 0:  # noqa: ASYNC110 - a suspend delays each sleep
            await asyncio.sleep(min(left, RECHECK_S))

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        await self.sleep_until(self.now() + seconds)

    async def wait(self, event: asyncio.Event, until: float | None = None) -> bool:
        """Wait for `event`, or until `now()` has reached `until` (None: without limit).

        The event stays set: the caller clears it, before it looks at what the event stands for.

        Returns:
            True when the event was set, False when the time was up first.
        """
        while not event.is_set():
            if until is None:
                return await event.wait()
            left = until - self.now()
            if left <= 0:
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, RECHECK_S)):
                    return await event.wait()
        return True


def boot_id(path: Path = _BOOT_ID) -> str:
    """The kernel's id of its present boot (random(4))."""
    return path.read_text(encoding="ascii").strip()


def machine_id(product_uuid: Path = _PRODUCT_UUID, etc_machine_id: Path = _MACHINE_ID) -> str:
    """The id of this machine across boots, in lower case; empty when there is none.

    The DMI product UUID comes first, because /etc/machine-id (machine-id(5)) may be the container image's.
    """
    for path in (product_uuid, etc_machine_id):
        try:
            found = path.read_text(encoding="ascii").strip().lower()
        except (OSError, UnicodeDecodeError):
            continue
        # systemd writes "uninitialized" there during an installation's first boot.
        if found and found not in _PLACEHOLDER_UUIDS and found != "uninitialized":
            return found
    return ""
