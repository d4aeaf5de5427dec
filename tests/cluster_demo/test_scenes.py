"""The scenes on a made-up cluster, in virtual time: what they promise comes true, or they say what did not."""

from __future__ import annotations

import pytest

from tests.cluster_demo.board import Board, table
from tests.cluster_demo.made_up import Faults, MadeUp
from tests.cluster_demo.scenes import DEADLINE_S, Broken, Play
from tests.cluster_demo.terms import HOSTS


def play(faults: Faults | None = None) -> tuple[MadeUp, Board, list[str], list[str]]:
    """Play all; the stage, the board, what was told, and where it paused."""
    stage, told, pauses = MadeUp(faults or Faults()), list[str](), list[str]()
    board = Board(stage.now, told.append)
    Play(stage, board, pauses.append).run()
    return stage, board, told, pauses


def test_all_scenes() -> None:
    """Each comes to what it promises; between two of them somebody is asked."""
    stage, board, told, pauses = play()
    assert stage.done == ["guest", "etcd", "ceph", *(f"host {name}" for name in HOSTS), "guests.yaml"]
    assert [one.title for one in board.results][1:] == pauses
    assert len(board.results) == 5
    up, move, drain, plug, back = board.results
    assert (up.tally.lost, move.tally.lost, drain.tally.lost, back.tally.lost) == (0, 0, 0, 0)
    assert plug.tally.gap_s > 9
    assert "It stood still for 31 ms" in move.seen
    assert "web runs on gamma, db on alpha" in plug.seen
    commands = [line.strip() for line in told if line.strip().startswith("$ ")]
    assert commands == [
        "$ kvmsupervisor apply -f guests.yaml --yes",
        "$ kvmsupervisor move web beta --wait",
        "$ kvmsupervisor drain beta --wait",
        "$ kvmsupervisor undrain beta --return",
        "$ kvmsupervisor undrain beta --return",
    ]
    lines = table(board.results)
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 80


def test_the_wait_for_a_takeover_says_why() -> None:
    """Each part of it, with the setting here and by default."""
    _, _, told, _ = play()
    said = "\n".join(told)
    for words in (
        "beta's session ends: 5 s after its last renewal (KVM_SESSION_TTL; 15 by default)",
        "Ceph forgets the dead within 12 s (30 by default)",
        "the old client is shut out",
        "web boots and answers",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (Faults(cold=True), "web did not come from alpha while it ran: it booted"),
        (Faults(restarted=True), "web was restarted: boot 1, "),
        (Faults(unfenced=True), "can still write: not in Ceph's blocklist"),
        (Faults(never_taken=True), f"no another host with web's lock within {DEADLINE_S:g} s"),
        (Faults(fresh_disk=True), "'s disk does not go on: boot 1"),
        (Faults(ended="the supervisor of beta ended by itself"), "the supervisor of beta ended by itself (waiting for"),
        (Faults(refused="move"), "`kvmsupervisor move web beta --wait` ended with 1: move: done"),
        (Faults(refused="drain"), "`kvmsupervisor drain beta --wait` ended with 1: drain: done"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_promise_is_told(faults: Faults, said: str) -> None:
    """No scene passes where what it shows did not happen."""
    with pytest.raises(Broken) as found:
        play(faults)
    assert said in str(found.value)
