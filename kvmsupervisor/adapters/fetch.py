"""User data, and images of the library, fetched from their URLs within limits.

User data has one deadline for the whole of it. An image is too long for that: it has to go on, so much at least in
each minute, and what is there already is not fetched again.

HTTP is h11 on asyncio's streams; the supervisor loads h11 for its own server anyway. So the time limit covers name
resolution, handshakes and slow bodies, and cancelling closes the connection at once. Proxies are not used. TLS trusts
the system's store, and `ca_file` beside it.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import re
import socket
import ssl
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urljoin, urlunsplit

import h11

from kvmsupervisor import __version__
from kvmsupervisor.domain.addresses import is_inward
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.media import media_url, shown_url
from kvmsupervisor.domain.values import Unfit, show

LIMIT_BYTES = 1 << 20
"""The most bytes of user data. Clouds allow 16 to 64 KiB; Ignition configs with files in them are larger."""

TIMEOUT_S = 30.0
"""The time limit of one fetch. Arbitrary: enough for a megabyte over a slow line, and a start waits no longer."""

MAX_REDIRECTS = 5
"""The most redirects. Arbitrary: real URLs have one or two."""

READ_BYTES = 65_536

LEAST_BYTES, PATIENCE_S = 1 << 20, 60.0
"""How much of an image has to come, within how long. Arbitrary: a modem would do; a server that drips holds nobody."""

FILE_BYTES = 1 << 20
"""How much of a local image is read at once."""

HAPPY_EYEBALLS_S = 0.25
"""How long to wait before trying the next address of a name in parallel, as RFC 8305 recommends."""

DEFAULT_PORTS = {"http": 80, "https": 443}


class FetchFailed(Exception):
    """The fetch failed. Try again later, or change the URL. The message says what was found and what would be right.

    The message contains no user, no password and no query of any URL.
    """


class RangeRefused(FetchFailed):
    """The server has no such part: what is there already is no beginning of what it has. Begin anew."""


class Sink(Protocol):
    """Where an image goes."""

    async def begin(self, at: int, whole: int | None) -> None:
        """Be told that what comes next is byte `at` and those behind it, of `whole` bytes where that is known.

        Raises:
            FetchFailed: there is no room for it.
        """
        ...

    async def take(self, data: bytes) -> None:
        """Take what comes next.

        Raises:
            FetchFailed: it cannot be kept.
        """
        ...


class _Memory:
    """What is short enough to be kept in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    async def begin(self, at: int, whole: int | None) -> None:
        """Nothing to do."""

    async def take(self, data: bytes) -> None:
        self.data += data


@frozen(kw_only=True)
class _Rules:
    what: str
    too_long: str
    file_root: Path | None
    limit_bytes: int
    max_redirects: int
    ca_file: Path | None
    follow_inward: bool
    is_inward: Callable[[str], bool]
    have: int = 0
    came: Callable[[int], None] = lambda _: None

    def excess(self) -> FetchFailed:
        return FetchFailed(f"more than {self.limit_bytes} bytes; {self.too_long}")


@frozen
class _Redirect:
    location: str


async def fetch(
    url: str,
    *,
    file_root: Path | None,
    limit_bytes: int = LIMIT_BYTES,
    timeout_s: float = TIMEOUT_S,
    max_redirects: int = MAX_REDIRECTS,
    ca_file: Path | None = None,
    follow_inward: bool = False,
    is_inward: Callable[[str], bool] = is_inward,
) -> bytes:
    """Return the content of `url`.

    Cancelling closes the connection. At most a thread is left that waits for the resolver or for a file system.

    Args:
        url: http, https, or file below `file_root`. A user and password in it are sent as basic authentication, to the
            URL's own origin only.
        file_root: the folder below which `file:` may read; None: nowhere.
        limit_bytes: the most bytes to accept.
        timeout_s: for everything, redirects included.
        max_redirects: how many to follow; never from https to http, and never to a file.
        ca_file: certificates of authorities, PEM, to trust beside the system's.
        follow_inward: follow redirects to this host's own addresses, too (see `is_inward`). The URL itself may name
            such an address in any case, and then its redirects may, too: a person has written it.
        is_inward: tells which addresses those are.

    Raises:
        FetchFailed: nothing was fetched.
    """
    rules = _Rules(
        what="user data",
        too_long="user data is shorter: let the guest fetch what is long itself",
        file_root=file_root,
        limit_bytes=limit_bytes,
        max_redirects=max_redirects,
        ca_file=ca_file,
        follow_inward=follow_inward,
        is_inward=is_inward,
    )
    into = _Memory()
    try:
        async with asyncio.timeout(timeout_s):
            await _fetch(url, rules, into)
    except TimeoutError as error:
        raise FetchFailed(f"not complete within {timeout_s:g} s; see whether its server is well") from error
    return bytes(into.data)


async def download(
    url: str,
    into: Sink,
    *,
    have: int,
    limit_bytes: int,
    file_root: Path | None,
    ca_file: Path | None = None,
    follow_inward: bool = False,
    is_inward: Callable[[str], bool] = is_inward,
    patience_s: float = PATIENCE_S,
    least_bytes: int = LEAST_BYTES,
) -> None:
    """Hand over what is at `url`, without the part that is there already where its server can do that.

    What comes is not checked: neither that it is whole, which a server need not say, nor that it goes with what is
    there.

    Args:
        url: see `fetch`, as for all that is not named here.
        into: where it goes.
        have: how many bytes are there already.
        limit_bytes: the most that all of it may have.
        file_root: see `fetch`.
        ca_file: see `fetch`.
        follow_inward: see `fetch`.
        is_inward: see `fetch`.
        patience_s: how long it may take until an answer begins, and then each `least_bytes`.
        least_bytes: how much has to come within that time.

    Raises:
        RangeRefused: there is no such part.
        FetchFailed: it could not be had, or not all of it.
    """
    loop = asyncio.get_running_loop()
    came = 0

    def count(more: int) -> None:
        nonlocal came
        came += more
        if came >= least_bytes:
            came = 0
            limit.reschedule(loop.time() + patience_s)

    rules = _Rules(
        what="an image",
        too_long="that is what KVM_IMAGE_MAX_BYTES allows on this host: raise it, or give a smaller image",
        file_root=file_root,
        limit_bytes=limit_bytes,
        max_redirects=MAX_REDIRECTS,
        ca_file=ca_file,
        follow_inward=follow_inward,
        is_inward=is_inward,
        have=have,
        came=count,
    )
    try:
        async with asyncio.timeout(patience_s) as limit:
            await _fetch(url, rules, into)
    except TimeoutError as error:
        raise FetchFailed(
            f"less than {least_bytes >> 10} KiB came within {patience_s:g} s; see whether its server is well"
        ) from error


async def _fetch(url: str, rules: _Rules, into: Sink) -> None:
    try:
        first = media_url(url)
    except Unfit as error:
        raise FetchFailed(f"found no URL of {rules.what}; {error}") from error
    if first.scheme == "file":
        await _read_file(first, rules, into)
    else:
        await _follow(first, rules, into)


# --- http and https -------------------------------------------------------------------------------------------


async def _follow(first: SplitResult, rules: _Rules, into: Sink) -> None:
    at = first
    # The URL itself may lead anywhere: a person has written it.
    inward = True
    for _ in range(rules.max_redirects + 1):
        where = "" if at == first else f"redirected to {shown_url(urlunsplit(at))}: "
        try:
            # Only the origin that user and password were written for gets them.
            credentials = first if _origin(at) == _origin(first) else at
            found, peer = await _get(at, credentials, rules, into, inward=inward)
            if at == first:
                inward = rules.follow_inward or rules.is_inward(peer)
            if found is None:
                return
            at = _next(at, found.location)
        except FetchFailed as error:
            raise type(error)(f"{where}{error}") from error.__cause__
    raise FetchFailed(f"more than {rules.max_redirects} redirects; give the URL that they lead to, if they end")


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or DEFAULT_PORTS.get(url.scheme)


def _next(at: SplitResult, location: str) -> SplitResult:
    try:
        following = media_url(urljoin(urlunsplit(at), location))
    except (Unfit, ValueError) as error:
        raise FetchFailed("a redirect to what is no http or https URL; give the URL of the file itself") from error
    allowed = {"https"} if at.scheme == "https" else {"http", "https"}
    if following.scheme not in allowed:
        raise FetchFailed(f"a redirect from {at.scheme} to {following.scheme}; give the URL of the file itself")
    return following


async def _get(
    at: SplitResult, credentials: SplitResult, rules: _Rules, into: Sink, *, inward: bool
) -> tuple[_Redirect | None, str]:
    """One answer, where it leads elsewhere, and the address that gave it."""
    tls = await asyncio.to_thread(_tls, rules.ca_file) if at.scheme == "https" else None
    port = at.port or DEFAULT_PORTS[at.scheme]
    try:
        reader, writer = await asyncio.open_connection(
            at.hostname if inward else await _outward(at.hostname or "", port, rules),
            port,
            ssl=tls,
            server_hostname=at.hostname if tls is not None else None,
            happy_eyeballs_delay=HAPPY_EYEBALLS_S,
        )
    except ssl.SSLCertVerificationError as error:
        wanted = "have its authority in the system's store or in KVM_MEDIA_CACERT, and its name in the certificate"
        raise FetchFailed(f"the server's certificate is not trusted ({error.verify_message}); {wanted}") from error
    except (OSError, UnicodeError) as error:
        wanted = "see whether host and port are right and its server runs"
        raise FetchFailed(f"cannot connect to {at.hostname} port {port} ({_said(error)}); {wanted}") from error
    try:
        # Now: once its server has closed a TLS connection, asyncio knows the peer no more.
        peer = writer.get_extra_info("peername")
        if peer is None:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        connection = h11.Connection(our_role=h11.CLIENT)
        request = _request(at, credentials, rules.have)
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        return await _reply(connection, reader, rules, into), peer[0]
    except h11.RemoteProtocolError as error:
        found = f"an answer that breaks off or is no HTTP ({show(str(error))})"
        raise FetchFailed(f"{found}; see whether its server is well") from error
    except OSError as error:
        raise FetchFailed(f"the connection broke ({_said(error)}); see whether its server is well") from error
    finally:
        writer.transport.abort()


async def _outward(host: str, port: int, rules: _Rules) -> str:
    """One address of a host to which a redirect leads. To connect to an address means that the name cannot change.

    Raises:
        FetchFailed: one of the host's addresses is this host's own.
        OSError: the host has no address.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(one[4][0]) for one in found]
    for address in addresses:
        if rules.is_inward(address):
            raise FetchFailed(
                f"a redirect to {address}, which is this host's own or answers to hosts only; give the URL of the file "
                "itself, or set KVM_MEDIA_INWARD_REDIRECTS=1"
            )
    return addresses[0]


def _request(at: SplitResult, credentials: SplitResult, have: int) -> h11.Request:
    headers = [
        ("Host", at.netloc.rpartition("@")[2]),
        ("User-Agent", f"kvmsupervisor/{__version__}"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    if have:
        headers.append(("Range", f"bytes={have}-"))
    for url in (at, credentials):
        if url.username is not None:
            pair = unquote_to_bytes(url.username) + b":" + unquote_to_bytes(url.password or "")
            headers.append(("Authorization", f"Basic {base64.b64encode(pair).decode()}"))
            break
    return h11.Request(method="GET", target=urlunsplit(("", "", at.path or "/", at.query, "")), headers=headers)


async def _reply(
    connection: h11.Connection, reader: asyncio.StreamReader, rules: _Rules, into: Sink
) -> _Redirect | None:
    at = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            received = await reader.read(READ_BYTES)
            if not received and connection.their_state is h11.SEND_RESPONSE and not connection.trailing_data[0]:
                raise FetchFailed("the connection was closed without an answer; see whether its server is well")
            connection.receive_data(received)
        elif isinstance(event, h11.Response):
            found = _judge(event, rules)
            if isinstance(found, _Redirect):
                return found
            at = found.at
            await into.begin(at, found.whole)
        elif isinstance(event, h11.Data):
            at += len(event.data)
            if at > rules.limit_bytes:
                raise rules.excess()
            await into.take(bytes(event.data))
            rules.came(len(event.data))
        elif isinstance(event, h11.EndOfMessage):
            return None


@frozen
class _Body:
    at: int
    whole: int | None


_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")


def _judge(response: h11.Response, rules: _Rules) -> _Redirect | _Body:
    """Which part of what is wanted comes, or where to look instead."""
    headers = {name: value.decode("latin-1") for name, value in response.headers}
    status = response.status_code
    if status in {301, 302, 303, 307, 308}:
        if b"location" not in headers:
            raise FetchFailed(f"status {status}, a redirect that does not say where to; see to its server")
        return _Redirect(headers[b"location"])
    if status == 416 and rules.have:
        raise RangeRefused("its server has no more than what is here already")
    # h11 has seen to it that this is a number.
    length = int(headers[b"content-length"]) if b"content-length" in headers else None
    if status == 206 and rules.have:
        part = _RANGE.fullmatch(headers.get(b"content-range", ""))
        if part is None or int(part[1]) != rules.have:
            raise RangeRefused("its server sends another part than it was asked for")
        found = _Body(rules.have, None if part[2] == "*" else int(part[2]))
    elif status == 200:
        found = _Body(0, length)
    else:
        reason = response.reason.decode("latin-1")
        wanted = "the URL's user and password are right" if status in {401, 403} else "the URL is right"
        raise FetchFailed(f"status {status}{f' {show(reason)}' if reason else ''}; see whether {wanted}")
    if max(found.whole or 0, found.at + (length or 0)) > rules.limit_bytes:
        raise rules.excess()
    return found


def _said(error: OSError | UnicodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    """The authorities to trust. Read again only when the files have changed, because that takes 50 ms and 2 MB."""
    paths = ssl.get_default_verify_paths()
    try:
        stamps = tuple(
            Path(path).stat().st_mtime_ns for path in (paths.cafile, paths.capath, ca_file) if path is not None
        )
        return _context(ca_file, stamps)
    except OSError as error:
        raise FetchFailed(f"the authorities in {ca_file or 'the system'} cannot be read ({_said(error)})") from error


@lru_cache(maxsize=1)
def _context(ca_file: Path | None, _stamps: tuple[int, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context


# --- file -----------------------------------------------------------------------------------------------------


async def _read_file(url: SplitResult, rules: _Rules, into: Sink) -> None:
    """Read a regular file below the allowed folder."""
    fd = await asyncio.to_thread(_open_file, url, rules)
    try:
        at, whole = rules.have, os.fstat(fd).st_size
        if whole > rules.limit_bytes:
            raise rules.excess()
        if at > whole:
            raise RangeRefused("the file has no more than what is here already")
        await into.begin(at, whole)
        while data := await asyncio.to_thread(os.pread, fd, FILE_BYTES, at):
            at += len(data)
            if at > rules.limit_bytes:
                raise rules.excess()
            await into.take(data)
            rules.came(len(data))
    except OSError as error:
        raise FetchFailed(f"the file cannot be read ({error.strerror})") from error
    finally:
        os.close(fd)


def _open_file(url: SplitResult, rules: _Rules) -> int:
    """Open it; what a path leads to is judged before anything is opened. Blocks."""
    if rules.file_root is None:
        raise FetchFailed("file: is not allowed on this host; set KVM_MEDIA_ROOT to the folder that it may read")
    path = unquote(url.path)
    try:
        # O_PATH does not open the file yet, so its type can be checked without waking a device or waiting for a pipe.
        named = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise FetchFailed(f"the file cannot be opened ({error.strerror})") from error
    except ValueError as error:
        # Our own words: Python's change with its version.
        raise FetchFailed("the file cannot be opened (embedded null byte)") from error
    try:
        itself = Path(f"/proc/self/fd/{named}")
        if not itself.readlink().is_relative_to(os.path.realpath(rules.file_root)):
            raise FetchFailed(f"a file outside of {rules.file_root}; put it below that folder (links do not help)")
        if not stat.S_ISREG(os.fstat(named).st_mode):
            raise FetchFailed("what is no regular file; name a regular file")
        return os.open(itself, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FetchFailed(f"the file cannot be read ({error.strerror})") from error
    finally:
        os.close(named)
