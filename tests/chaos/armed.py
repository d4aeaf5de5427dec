"""A supervisor with failpoints: it tells which it comes to, and is killed, frozen or gets an error at one.

The product has no switch for it: this program sets what `kvmsupervisor.failpoints` tells. What is armed, and what was
reached, are files of the folder that `CHAOS_POINTS` names.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

FOLDER = "CHAOS_POINTS"
"""The variable with the folder."""

REST = "CHAOS_REST_S"
"""The variable with how long the rest of a guest may be sent; without it, as long as in the product."""

KILL, FREEZE, FAIL = WAYS = ("kill", "freeze", "fail")
"""What happens at a point: SIGKILL, SIGSTOP, or an error of etcd's."""


class Points:
    """The failpoints of one host: the run arms one, its supervisors come to them.

    Args:
        folder: where both sides write; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._armed, self._reached, self._met = folder / "armed", folder / "reached", folder / "met"
        self._told: set[str] = set()

    # --- the run ----------------------------------------------------------------------------------------------

    def arm(self, name: str, way: str) -> None:
        """Have the next supervisor that comes to the point be hit there."""
        self._met.unlink(missing_ok=True)
        draft = self._armed.with_suffix(".new")
        draft.write_text(f"{way} {name}")
        draft.rename(self._armed)

    def disarm(self) -> bool:
        """Nothing is armed any more; return whether the point was met."""
        self._armed.unlink(missing_ok=True)
        return self._met.exists()

    @property
    def was_met(self) -> bool:
        """Whether a supervisor was hit at the point that was armed last."""
        return self._met.exists()

    @property
    def reached(self) -> frozenset[str]:
        """All points that a supervisor of this host ever came to."""
        with suppress(FileNotFoundError):
            return frozenset(self._reached.read_text().splitlines())
        return frozenset()

    # --- a supervisor -----------------------------------------------------------------------------------------

    def come_to(self, name: str) -> Awaitable[None] | None:
        """What `failpoints.reached` is: called at each point."""
        if name not in self._told:
            self._told.add(name)
            with self._reached.open("a") as file:
                file.write(f"{name}\n")
        try:
            way, _, armed = self._armed.read_text().partition(" ")
        except FileNotFoundError:
            return None
        if armed != name:
            return None
        self._armed.unlink(missing_ok=True)
        self._met.touch()
        if way == FAIL:
            return _fail(name)
        os.kill(os.getpid(), signal.SIGKILL if way == KILL else signal.SIGSTOP)
        return None


async def _fail(name: str) -> None:
    from kvmsupervisor.adapters.etcd import Unavailable  # noqa: PLC0415 - after the arguments were read, as in the product

    await asyncio.sleep(0)
    raise Unavailable(f"failpoint {name!r}")


def main() -> None:
    """Run the command, with failpoints."""
    from kvmsupervisor import failpoints  # noqa: PLC0415 - the run imports this module, and has no use for these
    from kvmsupervisor.cli.main import main as command_line  # noqa: PLC0415
    from kvmsupervisor.instance import moves  # noqa: PLC0415

    moves.REST_S = float(os.environ.get(REST, moves.REST_S))
    failpoints.reached = Points(Path(os.environ[FOLDER])).come_to
    command_line()
