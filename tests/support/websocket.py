"""A WebSocket client of tests, on a plain socket, by wsproto."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from typing import Any, Self

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)


class Rejected(Exception):
    """The server answers with a reply of HTTP.

    Attributes:
        status: of it.
        body: of it.
    """

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status} {body!r}")
        self.status = status
        self.body = body


class Ended(Exception):
    """The server has ended it.

    Attributes:
        code: of the end; 1006 without one.
        reason: of it.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Client:
    """A WebSocket that is open.

    Args:
        end: connected with the server; closed with this.
        target: path and query.
        headers: of the request, beside those of every WebSocket.
        timeout_s: how long anything may take.

    Raises:
        Rejected: it does not come to be.
    """

    def __init__(
        self, end: socket.socket, target: str, headers: Iterable[tuple[str, str]] = (), *, timeout_s: float = 30.0
    ) -> None:
        end.settimeout(timeout_s)
        self.end = end
        self.seen = bytearray()
        self.told: list[dict[str, Any]] = []
        self._ws = WSConnection(ConnectionType.CLIENT)
        host, port = end.getpeername()[:2]
        named = [(name.encode(), value.encode()) for name, value in headers]
        request = Request(host=f"{host}:{port}", target=target, extra_headers=named)
        end.sendall(self._ws.send(request))
        rejected, body = 0, b""
        self._left: list[Any] = []
        while True:
            events = self._read()
            while events:
                match events.pop(0):
                    case AcceptConnection():
                        # The first messages may have come with it.
                        self._left = events
                        return
                    case RejectConnection(status_code=code, has_body=has_body):
                        rejected = code
                        if not has_body:
                            raise Rejected(code, b"")
                    case RejectData(data=data, body_finished=finished):
                        body += data
                        if finished:
                            raise Rejected(rejected, body)

    @classmethod
    def connect(cls, port: int, target: str, headers: Iterable[tuple[str, str]] = ()) -> Self:
        """The same, on loopback."""
        with contextlib.ExitStack() as undo:
            end = undo.enter_context(socket.create_connection(("127.0.0.1", port)))
            made = cls(end, target, headers)
            undo.pop_all()
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()

    def _read(self) -> list[Any]:
        if left := self._left:
            self._left = []
            return left
        data = self.end.recv(1 << 16)
        self._ws.receive_data(data or None)
        return list(self._ws.events())

    def send(self, message: bytes | str) -> None:
        """Send a message."""
        event = BytesMessage(data=message) if isinstance(message, bytes) else TextMessage(data=message)
        self.end.sendall(self._ws.send(event))

    def more(self) -> None:
        """Take what comes next: bytes into `seen`, texts into `told`.

        Raises:
            Ended: that was the end.
        """
        for event in self._read():
            match event:
                case BytesMessage(data=data):
                    self.seen += data
                case TextMessage(data=text):
                    self.told.append(json.loads(text))
                case Ping():
                    self.end.sendall(self._ws.send(event.response()))
                case CloseConnection(code=code, reason=reason):
                    raise Ended(int(code), reason or "")

    def until(self, text: bytes) -> None:
        """Take what comes until it has shown `text`."""
        while text not in self.seen:
            self.more()

    def hears(self, **wanted: object) -> dict[str, Any]:
        """Take what comes until a text has all these."""
        while True:
            while self.told:
                told = self.told.pop(0)
                if wanted.items() <= told.items():
                    return told
            self.more()

    def the_end(self) -> Ended:
        """Take what comes until it ends."""
        try:
            while True:
                self.more()
        except Ended as ended:
            return ended
