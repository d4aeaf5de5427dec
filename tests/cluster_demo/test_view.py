"""The view on a terminal of 80 columns and 24 lines, which has to do."""

from __future__ import annotations

import io

from rich.console import Console

from tests.cluster_demo.board import Board
from tests.cluster_demo.made_up import TAKE_S, MadeUp
from tests.cluster_demo.picture import LAYOUT, Said
from tests.cluster_demo.scenes import Play
from tests.cluster_demo.view import draw


def screen(board: Board, stage: MadeUp, says: Said | None = None) -> str:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    console.print(draw(board, stage.look(), stage.pings, says, stage.now()))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    lines = shown.rstrip("\n").splitlines()
    assert len(lines) == 24
    assert {len(line) for line in lines} == {80}
    return shown


class Watched(Board):
    """Takes a picture of the view at each step, as it begins, and a second later."""

    def __init__(self, stage: MadeUp) -> None:
        super().__init__(stage.now, self._look)
        self.stage = stage
        self.shown: list[str] = []

    def _look(self, _line: str) -> None:
        self.shown.append(screen(self, self.stage, Said(1, 61, 17)))


def test_nothing_yet() -> None:
    """Before the first key is written."""
    stage = MadeUp()
    shown = screen(Board(stage.now, program="/tmp/kvs12345678/kvmsupervisor"), stage)
    assert shown.count("no session") == 3
    assert "try: /tmp/kvs12345678/kvmsupervisor" in shown
    assert "not pinged yet" in shown


def test_all_that_is_told_fits() -> None:
    """In each scene the sentence, the command and what to look at stand in the view, not cut off."""
    stage = MadeUp()
    board = Watched(stage)
    Play(stage, board, lambda _then: None).run()
    shown = "\n".join(board.shown)
    for words in (
        "alpha has session    864 MiB free",
        "web  runs (home: beta)",
        "beta  drains",
        "$ kvmsupervisor move web beta --wait",
        "web: boot 1, up 61 s, wrote 17",
        "4 of 5: beta's plug is pulled",
        "what is waited for, and why; each wait counts.",
        "the same boot. It stood still for 31 ms",
    ):
        assert words in shown, words


def test_a_step_counts_and_says_why() -> None:
    """While it is waited for; afterwards it says how long it took."""
    stage = MadeUp()
    board = Board(stage.now)
    board.scene(4, "beta's plug is pulled")
    with board.step("its session ends", "5 s after its last renewal"):
        stage.sleep(1.5)
        assert "1.5 s  its session ends: 5 s after its last renewal" in screen(board, stage)
        stage.sleep(2)
    stage.sleep(5)
    shown = screen(board, stage)
    assert "3.5 s  its session ends " in shown
    assert "renewal" not in shown


def test_a_host_that_is_gone_runs_nothing_that_is_known() -> None:
    """Its guests are not said to run."""
    stage = MadeUp()
    stage.command(("apply", "-f"), lambda _line: None)
    stage.start_host("alpha")
    stage.sleep(TAKE_S)
    assert "web  runs" in screen(Board(stage.now), stage)
    del stage.keys[f"{LAYOUT.hosts_prefix}alpha"]
    shown = screen(Board(stage.now), stage)
    assert "web  not known; it has the lock" in shown
    assert "web  runs" not in shown


def test_long_words_do_not_break_the_frame() -> None:
    """A command's line and its output are cut, a sentence is folded."""
    stage = MadeUp()
    board = Board(stage.now)
    board.scene(1, "x" * 200)
    board.say("word " * 60, look="look " * 40)
    board.runs("kvmsupervisor " + "y" * 300)
    for _ in range(20):
        board.hears("z" * 300)
    board.prompt = "Return: " + "p" * 200
    assert "Return: p" in screen(board, stage)
