"""The view: hosts at the left, the ping at the right, below what happens. 80 columns and 24 lines do.

`draw` is pure; `Screen` keeps it on a terminal.
"""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tests.cluster_demo.board import Board, Step
from tests.cluster_demo.picture import GuestFacts, HostFacts, Picture, Said
from tests.cluster_demo.pings import EVERY_S, Pings
from tests.cluster_demo.scenes import Stage
from tests.cluster_demo.terms import GUESTS, WEB

FRAMES_PER_S = 4
"""A person reads seconds; a frame costs a hundredth of one."""

UPPER_LINES = 12
"""Of the two panels above, with their borders: three lines for each host, and one."""

READ_S = 5.0
"""How long a finished scene stands where nobody presses Return."""

SCENES = 5


def draw(board: Board, picture: Picture, pings: Pings, says: Said | None, now: float) -> Layout:
    """The whole view.

    Args:
        board: the scene.
        picture: the cluster.
        pings: of the guest `web`.
        says: what that guest last said.
        now: seconds of the stage's clock.
    """
    whole, upper = Layout(), Layout(size=UPPER_LINES)
    hosts = Layout(_panel("three hosts, one etcd, one Ceph", _hosts(picture, board.program)))
    upper.split_row(hosts, Layout(_ping_panel(pings, says, now)))
    whole.split_column(upper, Layout(_scene_panel(board, now)))
    return whole


def _panel(title: str, *lines: RenderableType, below: str = "") -> Panel:
    return Panel(
        Group(*lines), title=title, title_align="left", subtitle=below or None, subtitle_align="right", padding=(0, 1)
    )


# --- hosts ----------------------------------------------------------------------------------------------------


def _hosts(picture: Picture, program: str) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for host in picture.hosts.values():
        text.append(f"{host.name:6}", "bold")
        state, style = _state(host)
        text.append(f"{state:13}", style)
        if host.free_mib is not None:
            text.append(f"{host.free_mib:>5} MiB free", "dim")
        text.append("\n")
        lines = [_guest(one, alive=host.session is not None) for one in host.guests]
        for line in [*lines, *[Text("  -" if not lines else "", "dim")] * len(GUESTS)][: len(GUESTS)]:
            text.append(line)
            text.append("\n")
    if program:
        text.append(f"try: {program}", "dim")
    return text


def _state(host: HostFacts) -> tuple[str, str]:
    if host.session is None:
        return "no session", "bold red"
    if host.drain:
        return ("drained", "yellow") if host.progress is not None and host.progress.drained else ("drains", "yellow")
    return "has session", "green"


def _guest(guest: GuestFacts, *, alive: bool) -> Text:
    if not alive:
        return Text(f"  {guest.name:5}not known; it has the lock", "red")
    lock, status = guest.lock, guest.status
    if lock is not None and lock.to is not None:
        return Text(f"  {guest.name:5}sent to {lock.to.host}, runs", "yellow")
    if lock is not None and status is not None and status.host == lock.host and status.up:
        away = f" (home: {guest.wanted})" if guest.placement is not None and guest.wanted != lock.host else ""
        return Text(f"  {guest.name:5}runs{away}", "green")
    state = "" if lock is None else str(lock.state)
    return Text(f"  {guest.name:5}{state}", "yellow")


# --- the ping -------------------------------------------------------------------------------------------------


def _ping_panel(pings: Pings, says: Said | None, now: float) -> Panel:
    marks = pings.marks(36 * 5)
    drawn = Text()
    for mark in marks:
        drawn.append(mark, {"|": "green", "x": "bold red"}.get(mark, "dim"))
    tally = pings.tally(now)
    lines: list[RenderableType] = [drawn if marks else Text("not pinged yet", "dim"), Text()]
    if marks:
        lines.append(Text(f"answered {pings.answers}, lost {tally.lost} (x)", "bold red" if tally.lost else ""))
        lines.append(Text(f"longest gap {tally.gap_s:.1f} s, now {pings.silent_s(now):.1f} s"))
    if says is not None:
        lines.append(Text(f"{WEB.name}: {says}", "cyan"))
    return _panel(f"ping {WEB.name}, {1 / EVERY_S:.0f} in a second", *lines)


# --- the scene ------------------------------------------------------------------------------------------------


def _scene_panel(board: Board, now: float) -> Panel:
    lines: list[RenderableType] = [Text(board.sentence, "bold")]
    if board.command:
        lines.append(Text(f"$ {board.command}", "bold cyan", no_wrap=True, overflow="ellipsis"))
        said = list(board.said)[-2 if board.steps else -4 :]
        lines += [Text(f"  {line}", "dim", no_wrap=True, overflow="ellipsis") for line in said]
    if board.steps:
        lines.append(_steps(board.steps, now))
    if board.look:
        lines.append(Text(f"Look at: {board.look}", "yellow"))
    title = f"{board.number} of {SCENES}: {board.title}" if board.number else "cluster-demo"
    return _panel(title, *lines, below=board.prompt or "Ctrl-C: end all")


def _steps(steps: Sequence[Step], now: float) -> Table:
    """What was waited for, and in yellow what is."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column()
    for step in steps:
        over = step.seconds is not None
        took = step.seconds if step.seconds is not None else now - step.begun
        words = step.title if over or not step.why else f"{step.title}: {step.why}"
        style = "green" if over else "bold yellow"
        grid.add_row(Text(f"{took:.1f} s", style), Text(words, style))
    return grid


# --- a terminal -----------------------------------------------------------------------------------------------


class Screen:
    """The view on a terminal, drawn some times in a second by a thread of its own; `on_screen` makes it."""

    def __init__(self, board: Board, *, person: bool) -> None:
        self._board = board
        self._person = person

    def pause(self, then: str) -> None:
        """Until somebody presses Return; where there is nobody, for a while."""
        if not self._person:
            self._board.prompt = f"next: {then}"
            time.sleep(READ_S)
            return
        self._board.prompt = f"Return: {then} | Ctrl-C: end all"
        # What was typed before is no answer to this.
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
        while True:
            ready, _, _ = select.select([sys.stdin], [], [], 1.0)
            if ready:
                sys.stdin.readline()
                return


@contextmanager
def on_screen(board: Board, stage: Stage, *, person: bool) -> Iterator[Screen]:
    """Show the view until the end; the terminal is as it was then.

    Args:
        board: the scene.
        stage: the cluster.
        person: whether somebody is there to press Return.
    """

    def frame() -> RenderableType:
        picture = stage.look()
        lock = picture.guests[WEB.name].lock
        alive = lock is not None and picture.hosts[lock.host].session is not None
        says = stage.says(WEB.name, lock.host) if lock is not None and alive else None
        return draw(board, picture, stage.pings, says, stage.now())

    with (
        _without_echo(),
        Live(
            get_renderable=frame, console=Console(), screen=True, refresh_per_second=FRAMES_PER_S, redirect_stderr=True
        ),
    ):
        yield Screen(board, person=person)


@contextmanager
def _without_echo() -> Iterator[None]:
    """What is typed does not stand in the view."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, ValueError, OSError):
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
