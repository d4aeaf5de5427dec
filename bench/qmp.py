"""Sees from outside when QEMUs answer QMP, on the socket that is kept free for people."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMMANDS = ("qmp_capabilities", "query-status")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """When a QEMU greeted and when it answered `query-status` (`time.monotonic`), and what it said."""

    greeted_at: float
    answered_at: float
    run_state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """When a QEMU answered `query-status`, and when its guest ran (`time.monotonic`)."""

    answered_at: float
    runs_at: float


class NotAnswered(Exception):
    """Some QEMU did not answer in time; the message names its socket."""


@dataclass(slots=True)
class _Talk:
    """One connection: the greeting, then one command after the other."""

    path: Path
    link: socket.socket
    heard: bytes = b""
    greeted_at: float = 0.0
    sent: int = 0

    def feed(self) -> Answer | None:
        """Read what there is.

        Raises:
            OSError: QEMU has gone, for example the one before, on whose socket we were still waiting.
        """
        data = self.link.recv(65536)
        if not data:
            raise ConnectionResetError
        now = time.monotonic()
        self.heard += data
        while b"\n" in self.heard:
            line, _, self.heard = self.heard.partition(b"\n")
            message: dict[str, Any] = json.loads(line)
            if "QMP" in message:
                self.greeted_at = now
            elif "return" not in message:
                continue
            elif self.sent == len(_COMMANDS):
                return Answer(greeted_at=self.greeted_at, answered_at=now, run_state=message["return"]["status"])
            self.link.sendall(json.dumps({"execute": _COMMANDS[self.sent]}).encode())
            self.sent += 1
        return None


def await_answers(paths: Collection[Path], *, timeout_s: float, poll_s: float = 0.0005) -> dict[Path, Answer]:
    """Connect to each socket as soon as it listens, return when all have answered.

    The supervisor's sockets listen before their QEMU exists, so that looking for them now and then costs no accuracy.
    They are looked for every `poll_s` seconds, not at every word that is heard: the watcher shares its processors with
    what it watches.

    Raises:
        NotAnswered: not all within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    missing = set(paths)
    answers: dict[Path, Answer] = {}
    look_at = time.monotonic()
    with selectors.DefaultSelector() as selector:
        try:
            while len(answers) < len(paths):
                if missing and time.monotonic() >= look_at:
                    for path in list(missing):
                        if (talk := _connect(path)) is not None:
                            missing.remove(path)
                            selector.register(talk.link, selectors.EVENT_READ, talk)
                    look_at = time.monotonic() + poll_s
                for key, _ in selector.select(max(0.0, look_at - time.monotonic()) if missing else 1.0):
                    talk = key.data
                    try:
                        answer = talk.feed()
                    except OSError:
                        missing.add(talk.path)
                    else:
                        if answer is None:
                            continue
                        answers[talk.path] = answer
                    selector.unregister(talk.link)
                    talk.link.close()
                if time.monotonic() > deadline:
                    late = min(set(paths) - answers.keys())
                    raise NotAnswered(f"{late} and {len(paths) - len(answers) - 1} more: no answer in {timeout_s} s")
        finally:
            for key in list(selector.get_map().values()):
                key.data.link.close()
    return answers


def await_run(path: Path, *, let_it: bool, timeout_s: float, poll_s: float = 0.0005) -> Run:
    """Connect as soon as the socket listens, return when the guest runs: QEMU tells everybody by RESUME.

    Args:
        path: of the socket.
        let_it: let the guest run (`cont`) once QEMU has answered; otherwise the supervisor does.
        timeout_s: for all of it.
        poll_s: how often the socket is looked for.

    Raises:
        NotAnswered: not within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        talk = _connect(path)
        # Of the QEMU before, on whose socket we were still waiting, nothing is heard but its end.
        run = None if talk is None else _run_of(talk, let_it=let_it, timeout_s=timeout_s)
        if run is not None:
            return run
        time.sleep(poll_s)
    raise NotAnswered(f"{path}: its guest does not run within {timeout_s} s")


def _run_of(talk: _Talk, *, let_it: bool, timeout_s: float) -> Run | None:
    """Ask, and listen until the guest runs; None when the connection ends before."""
    answered_at = 0.0
    with talk.link as link, suppress(OSError):
        link.settimeout(timeout_s)
        for line in link.makefile("rb"):
            now = time.monotonic()
            message: dict[str, Any] = json.loads(line)
            runs = message.get("event") == "RESUME"
            if "return" in message and talk.sent == len(_COMMANDS) and not answered_at:
                answered_at = now
                runs = runs or message["return"]["status"] == "running"
                if let_it and not runs:
                    link.sendall(b'{"execute": "cont"}')
            elif ("QMP" in message or "return" in message) and talk.sent < len(_COMMANDS):
                link.sendall(json.dumps({"execute": _COMMANDS[talk.sent]}).encode())
                talk.sent += 1
            if runs:
                return Run(answered_at=answered_at or now, runs_at=now)
    return None


def _connect(path: Path) -> _Talk | None:
    if not path.exists():
        return None
    link = socket.socket(socket.AF_UNIX)
    with suppress(FileNotFoundError, ConnectionRefusedError):
        link.connect(str(path))
        return _Talk(path, link)
    link.close()
    return None
