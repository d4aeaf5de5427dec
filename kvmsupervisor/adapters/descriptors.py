"""A connection between two processes of one host that carries messages, and descriptors with them.

Sources: unix(7) (SOCK_SEQPACKET, SCM_RIGHTS, SO_PEERCRED).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from array import array
from collections.abc import Callable
from pathlib import Path

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.folders import make_folder

BACKLOG = 16
"""How many may wait to be accepted. Arbitrary: one process on the host connects, once for each console."""

REST_S = 1.0
"""How long nobody is let in when this process can open nothing more. Arbitrary."""

_CREDENTIALS = struct.Struct("3i")
"""`struct ucred`: pid, uid, gid."""


class Lost(Exception):
    """There is no connection (any more). The message says why."""


@frozen
class PeerProcess:
    """The process at the other end, as the kernel knows it from when it connected."""

    pid: int
    uid: int
    gid: int


class Carrier:
    """One connection. One task receives, and one sends.

    Args:
        end: our end of it, which is closed with the carrier.
        limit: bytes of a message; longer ones are no messages.
    """

    def __init__(self, end: socket.socket, *, limit: int) -> None:
        end.setblocking(False)
        self._end = end
        self._limit = limit

    @classmethod
    def connect(cls, path: Path, *, limit: int) -> Carrier:
        """Connect to who listens at `path`. Does not wait.

        Raises:
            OSError: nobody listens, or this process may not connect.
        """
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with contextlib.ExitStack() as undo:
            undo.callback(end.close)
            end.setblocking(False)
            end.connect(str(path))
            undo.pop_all()
        return cls(end, limit=limit)

    @property
    def peer(self) -> PeerProcess:
        """Who connected."""
        found = self._end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return PeerProcess(*_CREDENTIALS.unpack(found))

    async def send(self, message: bytes, *, fd: int | None = None, timeout_s: float) -> None:
        """Send a message, and a copy of a descriptor with it.

        Raises:
            Lost: the other side is gone, or does not read.
        """
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(BlockingIOError):
                        self._end.sendmsg([message], rights)
                        return
                    loop = asyncio.get_running_loop()
                    await _ready(self._end, loop.add_writer, loop.remove_writer)
        except TimeoutError as error:
            raise Lost(f"nothing was read for {timeout_s:g} s") from error
        except OSError as error:
            raise Lost(error.strerror or str(error)) from error

    async def receive(self, *, takes_fd: bool = False) -> tuple[bytes, int | None]:
        """The next message, and the descriptor that came with it, which is the caller's to close.

        Args:
            takes_fd: whether one is wanted. Without, the kernel gives none to this process, whatever is sent.

        Raises:
            Lost: the other side is gone, or has sent what is too long.
        """
        room = socket.CMSG_SPACE(array("i").itemsize) if takes_fd else 0
        while True:
            try:
                data, ancillary, flags, _ = self._end.recvmsg(self._limit, room, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await _ready(self._end, loop.add_reader, loop.remove_reader)
                continue
            except OSError as error:
                raise Lost(error.strerror or str(error)) from error
            fd = _only(ancillary)
            if data and not flags & socket.MSG_TRUNC:
                return data, fd
            if fd is not None:
                os.close(fd)
            raise Lost("the other side has closed it" if not data else f"a message of more than {self._limit} bytes")

    def close(self) -> None:
        """End the connection. Closing twice is no error."""
        self._end.close()


def _only(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    fds = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for surplus in fds[1:]:
        os.close(surplus)
    return fds[0] if fds else None


async def _ready(end: socket.socket, add: Callable[..., object], remove: Callable[[int], object]) -> None:
    """Wait until a socket can be read, or written."""
    ready = asyncio.get_running_loop().create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    number = end.fileno()
    add(number, tell)
    try:
        await ready
    finally:
        remove(number)


class Door:
    """A socket in the file system at which others connect.

    Args:
        folder: it is in, made for it alone.
        name: of the socket.
        gid: the group that may connect; None for nobody but our own user.
        limit: bytes of a message.
        on_call: called with each connection, in the event loop.

    Attributes:
        path: of the socket.
    """

    def __init__(
        self, folder: Path, name: str, *, gid: int | None, limit: int, on_call: Callable[[Carrier], None]
    ) -> None:
        self.path = folder / name
        self._gid = gid
        self._limit = limit
        self._on_call = on_call
        self._listener: socket.socket | None = None
        self._resting: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Listen.

        Raises:
            OSError: that cannot be done.
        """
        folder = self.path.parent
        make_folder(folder, mode=0o700)
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with contextlib.ExitStack() as undo:
            undo.callback(listener.close)
            # Before `bind`, so that the path never has another mode (unix_bind in the kernel).
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(self.path))
            if self._gid is not None:
                os.chown(self.path, -1, self._gid)
                self.path.chmod(0o660)
                os.chown(folder, -1, self._gid)
            folder.chmod(0o700 if self._gid is None else 0o710)
            listener.setblocking(False)
            listener.listen(BACKLOG)
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)
            undo.pop_all()
        self._listener = listener

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            end, _ = self._listener.accept()
        except BlockingIOError:
            return  # who called has left
        except OSError:
            # There is no free descriptor. The loop would call again at once, and for ever.
            self._rest()
            return
        self._on_call(Carrier(end, limit=self._limit))

    def _rest(self) -> None:
        assert self._listener is not None
        loop, number = asyncio.get_running_loop(), self._listener.fileno()
        loop.remove_reader(number)
        self._resting = loop.call_later(REST_S, lambda: loop.add_reader(number, self._accept))

    def close(self) -> None:
        """Listen no more."""
        if self._resting is not None:
            self._resting.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)
