"""The stream: what changes on the board, as server-sent events, to each viewer from where it was.

A viewer is a number: the turn up to which it was told. When it can take more, it gets all that it lacks at that moment.
So a slow viewer costs no memory, and gets of a row that changed often the last state only.

Source of the format: HTML standard, 9.2 (server-sent events).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from kvmsupervisor.adapters.web import Subscription
from kvmsupervisor.web.board import Board, News
from kvmsupervisor.web.frame import State

VIEWERS = 250
"""The most viewers. Arbitrary: a team has fewer tabs open."""

RETRY_MS = 2000
"""After which a browser that lost the stream comes again."""

BEAT_S = 20.0
"""How often a stream with nothing to tell says that it lives: proxies end what is silent for a minute, as a rule."""

BEAT = b": still here\n\n"

PIECE = 1 << 16
"""Bytes of an event that are made at once: a whole list has many times as many, and is not to lie in memory for each
viewer. Arbitrary; the server hands over pieces of this size."""


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Full(Exception):
    """There are as many viewers as there may be."""


class Stream:
    """All viewers.

    Args:
        board: what they see.
        state: tells what is known of etcd.
    """

    def __init__(self, board: Board, state: Callable[[], State]) -> None:
        self._board = board
        self._state = state
        self._viewers: set[_Viewer] = set()

    @property
    def viewers(self) -> int:
        """How many there are."""
        return len(self._viewers)

    def since(self, mark: str) -> _From:
        """A feed for a viewer who has everything up to a mark.

        Raises:
            Full: there is no room for one more.
        """
        if len(self._viewers) >= VIEWERS:
            raise Full
        return _From(self, self._board.turn_of(mark))

    def tell(self) -> None:
        """There may be news: each viewer who can take more takes it."""
        for viewer in list(self._viewers):
            viewer.wake()

    def beat(self) -> None:
        """Say to each viewer that the stream lives."""
        for viewer in list(self._viewers):
            viewer.beat = True
            viewer.wake()

    def end(self) -> None:
        """End all streams: who may still look comes again, from where it was."""
        for viewer in list(self._viewers):
            viewer.over = True
            viewer.wake()

    def add(self, viewer: _Viewer) -> None:
        """One more."""
        self._viewers.add(viewer)

    def remove(self, viewer: _Viewer) -> None:
        """One less."""
        self._viewers.discard(viewer)

    def state(self) -> State:
        """What is known of etcd."""
        return self._state()

    @property
    def board(self) -> Board:
        """What they see."""
        return self._board


class _From:
    """The stream from one turn on; implements `Feed`."""

    def __init__(self, stream: Stream, turn: int | None) -> None:
        self._stream = stream
        self._turn = turn

    def open(self, wake: Callable[[], None]) -> Subscription:
        return _Viewer(self._stream, self._turn, wake)


class _Viewer:
    """One viewer; implements `Subscription`."""

    def __init__(self, stream: Stream, turn: int | None, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.beat = False
        self.over = False
        self._stream = stream
        self._turn = turn
        self._run = stream.board.run
        self._state: State | None = None
        self._pieces: Iterator[bytes] = iter(())
        stream.add(self)

    def take(self) -> bytes:
        if self.over:
            return b""
        if piece := next(self._pieces, b""):
            return piece
        board = self._stream.board
        beat, self.beat = self.beat, False
        if self._run != board.run:
            # Another history of etcd: what this viewer has is worth nothing.
            self._turn, self._run = None, board.run
        if self._turn is None or self._turn < board.turn:
            self._pieces = _pieces(board.news(self._turn), board.mark)
            self._turn = board.turn
            return next(self._pieces)
        if (state := self._stream.state()) != self._state:
            self._state = state
            return _written("state", state.to_object())
        return BEAT if beat else b""

    def close(self) -> None:
        self._stream.remove(self)


def _pieces(news: News, mark: str) -> Iterator[bytes]:
    """The event, piece by piece."""
    kind, rest = ("reset", "") if news.whole else ("change", f',"gone":{json.dumps(list(news.gone))}')
    revision = mark.partition("-")[0]
    part = bytearray(f'event: {kind}\nid: {mark}\ndata: {{"revision":{revision},"rows":['.encode())
    for number, row in enumerate(news.rows):
        part += b"," * bool(number) + _ENCODER.encode(row.to_object()).encode()
        if len(part) >= PIECE:
            yield bytes(part)
            part.clear()
    yield bytes(part) + f"]{rest}}}\n\n".encode()


def _written(kind: str, found: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(found)}\n\n".encode()
