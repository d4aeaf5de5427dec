"""The connection between two supervisors over which a guest is moved: authenticated, encrypted, and cut when stuck.

QEMU opens no port, needs no address and no file for it: it gets one end of a socket pair, and a thread here carries
what goes through between the other end and the connection (`Relay`). OpenSSL works outside of Python's lock.

Both sides know a secret key of this one move, which the target has put into its offer. TLS without certificates (an
anonymous Diffie-Hellman exchange) keeps what is carried secret from who listens; then each side shows by a MAC over
what is unique to this TLS connection that it knows the key, so nobody can stand in between. SCRAM does the same with
`tls-unique` (RFC 5802, section 6; RFC 5929, section 3). TLS 1.2: 1.3 has neither anonymous suites nor `tls-unique`.

Sources: tcp(7) for TCP_USER_TIMEOUT; RFC 7919 for the group ffdhe2048.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

SUITE = "ADH-AES256-GCM-SHA384:@SECLEVEL=0"
"""Level 0 allows suites without certificates; the cipher itself is TLS 1.2's strongest."""

_FFDHE2048 = b"""-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""

SILENCE_S = 10.0
"""After so long without an acknowledgement the connection counts as broken (TCP_USER_TIMEOUT). QEMU itself waits for
ever. Arbitrary: longer than a link that is switched over, shorter than people's patience with a stopped guest."""

GREETING_LIMIT = 4096
"""The most bytes of a message before it is known who sends it."""

MESSAGE_LIMIT = 64 << 20
"""The most bytes of one message: a guest's boot media, in base64, are the largest part."""

BLOCK = 256 << 10
"""How much is carried at once. Arbitrary: 16 records of TLS, and little beside the guests' memory."""

KEY_BYTES = 32


class TransferFailed(Exception):
    """The other side cannot be reached, is not who it should be, or has hung up. The message says which."""


def _context(*, is_server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is the MAC that tells who is there
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(SUITE)
    if is_server:
        group = os.memfd_create("ffdhe2048", os.MFD_CLOEXEC)
        try:
            os.write(group, _FFDHE2048)
            context.load_dh_params(f"/proc/self/fd/{group}")
        finally:
            os.close(group)
    return context


class Connection:
    """An established connection; made by `call` and by a `Listener`. One side at a time reads or writes.

    Its methods that wait run in threads; cancelling one closes the connection.

    Attributes:
        instance: the guest that it is about.
        greeting: what the source has said first.
    """

    def __init__(self, tls: ssl.SSLSocket, instance: str) -> None:
        self._tls = tls
        self.instance = instance

    async def send(self, message: Mapping[str, Any], *, timeout_s: float) -> None:
        """Send one message.

        Raises:
            TransferFailed: the other side has hung up, or does not read.
        """
        await self._wait(lambda: _send(self._tls, message), timeout_s)

    async def receive(self, *, timeout_s: float) -> dict[str, Any]:
        """The next message of the other side.

        Raises:
            TransferFailed: it has hung up, is silent, or what it sends is no message.
        """
        found: dict[str, Any] = await self._wait(lambda: _receive(self._tls, MESSAGE_LIMIT), timeout_s)
        return found

    async def _wait(self, work: Callable[[], Any], timeout_s: float) -> Any:
        self._tls.settimeout(timeout_s)
        try:
            return await asyncio.to_thread(work)
        except (OSError, ValueError) as error:
            raise TransferFailed(_said(error)) from error
        except asyncio.CancelledError:
            self.close()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether the other side has not hung up, as far as is known. Between two messages it sends nothing."""
        with contextlib.suppress(OSError, ValueError):
            poller = select.poll()
            poller.register(self._tls.fileno(), select.POLLIN | select.POLLRDHUP)
            return not poller.poll(0)
        return False

    def carry(self, on_end: Callable[[], None]) -> Relay:
        """Carry what a QEMU sends and receives from now on; there are no more messages.

        `on_end` is called in the event loop, once, when the connection is over.
        """
        return Relay(self._tls, on_end)

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._tls.shutdown(socket.SHUT_RDWR)
        self._tls.close()


class Relay:
    """Carries bytes between a QEMU and a connection, in a thread of its own, until either side ends.

    Attributes:
        qemus_end: to be given to QEMU, and closed afterwards.
        carried: bytes so far, of both directions.
        trouble: why it ended; None while it goes on, and where a side has hung up.
    """

    def __init__(self, tls: ssl.SSLSocket, on_end: Callable[[], None]) -> None:
        self.qemus_end, self._local = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._tls = tls
        self.carried = 0
        self.trouble: str | None = None
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        self._over = False
        for end in (self._local, tls):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether nothing is carried any more."""
        return self._over

    def cut(self) -> None:
        """Cut the connection, on both sides. QEMU notices at once, also in a phase in which it answers nobody."""
        for end in (self._local, self._tls):
            with contextlib.suppress(OSError, ValueError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            _Pump(self._local, self._tls, self._count).run()
        except (OSError, ValueError) as error:
            self.trouble = _said(error)
        finally:
            self._over = True
            self.cut()
            self._local.close()
            self._tls.close()
            with contextlib.suppress(RuntimeError):  # the loop has ended before
                self._loop.call_soon_threadsafe(self._on_end)

    def _count(self, amount: int) -> None:
        self.carried += amount


class _Pump:
    """Both directions between a plain socket and a TLS one, neither of which blocks, until either side has ended.

    What one side has sent before it ended is delivered first, unless the other side takes nothing of it for `STUCK_S`.
    """

    STUCK_S = 5.0
    PAUSE_S = 0.05

    def __init__(self, local: socket.socket, tls: ssl.SSLSocket, count: Callable[[int], None]) -> None:
        self._local, self._tls, self._count = local, tls, count
        self._out = self._in = memoryview(b"")
        self._ended = False

    def run(self) -> None:
        poller = select.poll()
        stuck_since: float | None = None
        while True:
            moved = self._move()
            if self._ended and not self._out and not self._in:
                return
            if moved:
                stuck_since = None
                continue
            # Whatever is asked for, an end and an error are told as well.
            local = (0 if self._out else select.POLLIN) | (select.POLLOUT if self._in else 0)
            tls = (0 if self._in else select.POLLIN) | (select.POLLOUT if self._out else 0)
            poller.register(self._local.fileno(), local | select.POLLRDHUP)
            poller.register(self._tls.fileno(), tls | select.POLLRDHUP)
            told = poller.poll(1000)
            if any(mask & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, mask in told):
                # It is told again and again, as long as the other side does not take what is left.
                now = time.monotonic()
                stuck_since = now if stuck_since is None else stuck_since
                if now >= stuck_since + self.STUCK_S:
                    raise OSError("one side has hung up, and the other one takes no more")
                time.sleep(self.PAUSE_S)

    def _move(self) -> bool:
        """Carry what can be carried now; False when there is nothing."""
        moved = False
        if not self._out and not self._ended and (read := self._read(self._local)) is not None:
            self._out, moved = memoryview(read), True
            self._ended |= not read
        if not self._in and not self._ended and (read := self._read(self._tls)) is not None:
            self._in, moved = memoryview(read), True
            self._ended |= not read
        if self._out and (sent := self._write(self._tls, self._out)):
            self._out, moved = self._out[sent:], True
        if self._in and (sent := self._write(self._local, self._in)):
            self._in, moved = self._in[sent:], True
        return moved

    @staticmethod
    def _read(end: socket.socket) -> bytes | None:
        """What has come, empty at the end; None when nothing has."""
        try:
            return end.recv(BLOCK)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def _write(self, end: socket.socket, data: memoryview) -> int:
        try:
            sent = end.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        self._count(sent)
        return sent


async def call(host: str, port: int, *, instance: str, key: bytes, timeout_s: float) -> Connection:
    """Connect to a target that knows `key`, about one guest.

    Raises:
        TransferFailed: nobody listens there, or who does has another key.
    """

    def connect() -> Connection:
        plain = socket.create_connection((host, port), timeout=timeout_s)
        with contextlib.ExitStack() as undo:
            undo.callback(plain.close)
            _set_up(plain)
            tls = _context(is_server=False).wrap_socket(plain)
            undo.callback(tls.close)
            _send(tls, {"instance": instance, "proof": _proof(tls, key, b"source")})
            answer = _receive(tls, GREETING_LIMIT)
            if not hmac.compare_digest(str(answer.get("proof")), _proof(tls, key, b"target")):
                raise ValueError("it does not know the key of this move")
            undo.pop_all()
        return Connection(tls, instance)

    try:
        return await asyncio.to_thread(connect)
    except (OSError, ValueError) as error:
        raise TransferFailed(f"{host}:{port}: {_said(error)}") from error


class Listener:
    """Takes connections of sources. Who does not know the key of a move that is offered here is not heard.

    Args:
        address: to listen on, and `port`; 0 for any.
        key_of: the key of the move of an instance that is offered here; None without.
        on_call: called in the event loop with each connection.

    Raises:
        OSError: it cannot be listened there.
    """

    GREETING_S = 5.0
    AT_ONCE = 8
    """How many are greeted at the same time: strangers cannot keep all of this host's threads."""

    def __init__(
        self,
        address: str,
        port: int,
        *,
        key_of: Callable[[str], bytes | None],
        on_call: Callable[[Connection], None],
    ) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, port), family=family, backlog=self.AT_ONCE)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._context = _context(is_server=True)
        self._key_of = key_of
        self._on_call = on_call

    async def run(self) -> None:
        """Take connections, for ever."""
        loop = asyncio.get_running_loop()
        free = asyncio.Semaphore(self.AT_ONCE)
        async with asyncio.TaskGroup() as greeted:
            while True:
                plain, _ = await loop.sock_accept(self._socket)
                await free.acquire()
                greeted.create_task(self._take(plain)).add_done_callback(lambda _: free.release())

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    async def _take(self, plain: socket.socket) -> None:
        try:
            connection = await asyncio.to_thread(self._greet, plain)
        except (OSError, ValueError, TransferFailed):
            plain.close()
        else:
            self._on_call(connection)

    def _greet(self, plain: socket.socket) -> Connection:
        plain.settimeout(self.GREETING_S)
        _set_up(plain)
        tls = self._context.wrap_socket(plain, server_side=True)
        with contextlib.ExitStack() as undo:
            undo.callback(tls.close)
            said = _receive(tls, GREETING_LIMIT)
            instance = str(said.get("instance"))
            key = self._key_of(instance)
            if key is None or not hmac.compare_digest(str(said.get("proof")), _proof(tls, key, b"source")):
                raise TransferFailed("a stranger")
            _send(tls, {"proof": _proof(tls, key, b"target")})
            undo.pop_all()
        return Connection(tls, instance)


def listen(
    address: str,
    port: int,
    *,
    key_of: Callable[[str], bytes | None],
    on_call: Callable[[Connection], None],
) -> Listener:
    """Take connections of sources; see `Listener`."""
    return Listener(address, port, key_of=key_of, on_call=on_call)


def _set_up(plain: socket.socket) -> None:
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_S * 1000))
    # A side that only waits is found out by probes.
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)


def _proof(tls: ssl.SSLSocket, key: bytes, side: bytes) -> str:
    """What only who knows the key can say, of this connection and no other."""
    unique = tls.get_channel_binding("tls-unique")
    if not unique or len(key) < KEY_BYTES:
        raise ValueError("the connection has nothing unique, or the key is too short")
    return hmac.new(key, b"kvmsupervisor move 1 " + side + b"\0" + unique, hashlib.sha256).hexdigest()


def _send(tls: ssl.SSLSocket, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode()
    tls.sendall(struct.pack(">I", len(data)) + data)


def _receive(tls: ssl.SSLSocket, limit: int) -> dict[str, Any]:
    (length,) = struct.unpack(">I", _exactly(tls, 4))
    if length > limit:
        raise ValueError(f"a message of {length} bytes")
    found = json.loads(_exactly(tls, length))
    match found:
        case dict():
            return found
        case _:
            raise ValueError("what came is no message")


def _exactly(tls: ssl.SSLSocket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        read = tls.recv(min(BLOCK, length - len(data)))
        if not read:
            raise ConnectionResetError("the other side has hung up")
        data += read
    return bytes(data)


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "the other side is silent"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
