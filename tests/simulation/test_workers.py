"""Histories in several processes: one that dies is told of, with what it played, and the others go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.simulation.run import Played
from tests.simulation.workers import Lost, Plays, play_all

SEEDS = list(range(1, 21))
DEADLY = 7


def told_by(seed: int) -> Played:
    """A history of its own: who has played it."""
    return Played(acts=[], steps=seed, digest=str(os.getpid()))


def dying(die: Callable[[], bool]) -> Plays:
    """Plays all seeds but one, at which its process is killed as by the kernel without memory, while `die` says so."""

    def plays(seed: int) -> Played:
        if seed == DEADLY and die():
            os.kill(os.getpid(), signal.SIGKILL)
        return told_by(seed)

    return plays


def all_of(plays: Plays, *, fresh_after: int = 1000) -> tuple[dict[int, Played | Lost], list[str]]:
    told: list[str] = []
    came = list(play_all(plays, SEEDS, workers=2, tell=told.append, fresh_after=fresh_after))
    assert [seed for seed, _ in came] == SEEDS
    return dict(came), told


def test_all_are_played_in_their_order_by_two() -> None:
    came, told = all_of(told_by)
    assert [one.steps for one in came.values() if isinstance(one, Played)] == SEEDS
    players = {one.digest for one in came.values() if isinstance(one, Played)}
    assert 1 <= len(players) <= 2
    assert str(os.getpid()) not in players
    assert told == []


def test_a_seed_whose_process_died_is_played_again_alone(tmp_path: Path) -> None:
    """It may have died of what had been played before, or of something else on the machine."""
    mark = tmp_path / "died"

    def once() -> bool:
        if mark.exists():
            return False
        mark.touch()
        return True

    came, told = all_of(dying(once))
    again = came[DEADLY]
    assert isinstance(again, Played)
    assert sum(isinstance(one, Played) and one.digest == again.digest for one in came.values()) == 1
    (said,) = told
    assert said.startswith(f"the process that played seed {DEADLY} died: SIGKILL")


def test_one_at_which_two_processes_died_is_told_and_the_others_go_on() -> None:
    came, told = all_of(dying(lambda: True))
    lost = came.pop(DEADLY)
    assert isinstance(lost, Lost)
    assert lost.how.count("SIGKILL") == 2
    assert len(told) == 2
    assert all(isinstance(one, Played) for one in came.values())


def test_one_that_raises_is_told_with_what_it_raised() -> None:
    def plays(seed: int) -> Played:
        if seed == DEADLY:
            raise RuntimeError("stuck")
        return told_by(seed)

    came, told = all_of(plays)
    lost = came[DEADLY]
    assert isinstance(lost, Lost)
    assert "RuntimeError: stuck" in lost.how
    assert told == []


def test_processes_are_replaced() -> None:
    came, _ = all_of(told_by, fresh_after=3)
    players = [one.digest for one in came.values() if isinstance(one, Played)]
    assert max(players.count(one) for one in players) <= 3


def test_who_wants_no_more_leaves_no_process() -> None:
    """As when a person interrupts it."""
    history = play_all(told_by, SEEDS, workers=2, tell=print)
    _, first = next(history)
    assert isinstance(first, Played)
    history.close()  # type: ignore[attr-defined]
    assert not Path("/proc", first.digest).exists()
