"""Fetches user data from its URL, within limits for the whole of it.

HTTP is h11 on asyncio's streams; the supervisor loads h11 for its own server anyway. So the time limit covers name
resolution, handshakes and slow bodies, and cancelling closes the connection at once. Proxies are not used. TLS trusts
the system's store, and `ca_file` beside it.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urljoin, urlunsplit

import h11

from kvmsupervisor import __version__
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

HAPPY_EYEBALLS_S = 0.25
"""How long to wait before trying the next address of a name in parallel, as RFC 8305 recommends."""

DEFAULT_PORTS = {"http": 80, "https": 443}

METADATA = frozenset(
    map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "168.63.129.16", "100.100.100.200", "192.0.0.192"))
)
"""Addresses of cloud metadata services that are not link-local: Amazon's and Google's by IPv6, Azure's, Alibaba's and
Oracle's (from their pages on metadata). They answer any program on the host, with credentials in some clouds."""

EMBEDDING = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")))
"""IPv6 networks whose addresses end in the IPv4 address that they lead to: RFC 4291 2.5.5.1, RFC 6052 2.1, RFC 8215."""


class FetchFailed(Exception):
    """The fetch failed. Try again later, or change the URL. The message says what was found and what would be right.

    The message contains no user, no password and no query of any URL.
    """


@frozen(kw_only=True)
class _Rules:
    file_root: Path | None
    limit_bytes: int
    max_redirects: int
    ca_file: Path | None
    follow_inward: bool
    is_inward: Callable[[str], bool]


@frozen
class _Redirect:
    location: str


def is_inward(address: str) -> bool:
    """Whether an address is this host's own, or of a service that answers to hosts only, such as a cloud's metadata.

    These are loopback, link-local (169.254.0.0/16, fe80::/10), unspecified (which Linux treats as loopback), multicast
    and `METADATA`. An IPv4 address inside an IPv6 address is judged, too.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    return any(
        one.is_loopback or one.is_link_local or one.is_unspecified or one.is_multicast or one in METADATA
        for one in (found, *_embedded(found))
    )


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to: mapped, translated (NAT64), or tunnelled (6to4, Teredo)."""
    if isinstance(address, ipaddress.IPv6Address):
        for found in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())):
            if found is not None:
                yield found
        if any(address in network for network in EMBEDDING):
            yield ipaddress.IPv4Address(address.packed[-4:])


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
        file_root=file_root,
        limit_bytes=limit_bytes,
        max_redirects=max_redirects,
        ca_file=ca_file,
        follow_inward=follow_inward,
        is_inward=is_inward,
    )
    try:
        first = media_url(url)
    except Unfit as error:
        raise FetchFailed(f"found no URL of user data; {error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            if first.scheme == "file":
                return await asyncio.to_thread(_read_file, first, rules)
            return await _follow(first, rules)
    except TimeoutError as error:
        raise FetchFailed(f"not complete within {timeout_s:g} s; see whether its server is well") from error


# --- http and https -------------------------------------------------------------------------------------------


async def _follow(first: SplitResult, rules: _Rules) -> bytes:
    at = first
    # The URL itself may lead anywhere: a person has written it.
    inward = True
    for _ in range(rules.max_redirects + 1):
        where = "" if at == first else f"redirected to {shown_url(urlunsplit(at))}: "
        try:
            # Only the origin that user and password were written for gets them.
            credentials = first if _origin(at) == _origin(first) else at
            found, peer = await _get(at, credentials, rules, inward=inward)
            if at == first:
                inward = rules.follow_inward or rules.is_inward(peer)
            if isinstance(found, bytes):
                return found
            at = _next(at, found.location)
        except FetchFailed as error:
            raise FetchFailed(f"{where}{error}") from error.__cause__
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
    at: SplitResult, credentials: SplitResult, rules: _Rules, *, inward: bool
) -> tuple[bytes | _Redirect, str]:
    """One answer, and the address of the server that gave it."""
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
        connection = h11.Connection(our_role=h11.CLIENT)
        writer.write((connection.send(_request(at, credentials)) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        return await _reply(connection, reader, rules.limit_bytes), writer.get_extra_info("peername")[0]
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


def _request(at: SplitResult, credentials: SplitResult) -> h11.Request:
    headers = [
        ("Host", at.netloc.rpartition("@")[2]),
        ("User-Agent", f"kvmsupervisor/{__version__}"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    for url in (at, credentials):
        if url.username is not None:
            pair = unquote_to_bytes(url.username) + b":" + unquote_to_bytes(url.password or "")
            headers.append(("Authorization", f"Basic {base64.b64encode(pair).decode()}"))
            break
    return h11.Request(method="GET", target=urlunsplit(("", "", at.path or "/", at.query, "")), headers=headers)


async def _reply(connection: h11.Connection, reader: asyncio.StreamReader, limit_bytes: int) -> bytes | _Redirect:
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            received = await reader.read(READ_BYTES)
            if not received and connection.their_state is h11.SEND_RESPONSE and not connection.trailing_data[0]:
                raise FetchFailed("the connection was closed without an answer; see whether its server is well")
            connection.receive_data(received)
        elif isinstance(event, h11.Response):
            location = _judge(event, limit_bytes)
            if location is not None:
                return _Redirect(location)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > limit_bytes:
                raise _too_long(limit_bytes)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)


def _judge(response: h11.Response, limit_bytes: int) -> str | None:
    """The location of a redirect; None when the body is the content."""
    headers = {name: value.decode("latin-1") for name, value in response.headers}
    status = response.status_code
    if status in {301, 302, 303, 307, 308}:
        if b"location" not in headers:
            raise FetchFailed(f"status {status}, a redirect that does not say where to; see to its server")
        return headers[b"location"]
    if status != 200:
        reason = response.reason.decode("latin-1")
        wanted = "the URL's user and password are right" if status in {401, 403} else "the URL is right"
        raise FetchFailed(f"status {status}{f' {show(reason)}' if reason else ''}; see whether {wanted}")
    # h11 has checked that this is a number.
    if int(headers.get(b"content-length", "0")) > limit_bytes:
        raise _too_long(limit_bytes)
    return None


def _too_long(limit_bytes: int) -> FetchFailed:
    return FetchFailed(f"more than {limit_bytes} bytes; user data is shorter: let the guest fetch what is long itself")


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


def _read_file(url: SplitResult, rules: _Rules) -> bytes:
    """Read a regular file below the allowed folder. Blocks."""
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
        with itself.open("rb") as file:
            data = file.read(rules.limit_bytes + 1)
    except OSError as error:
        raise FetchFailed(f"the file cannot be read ({error.strerror})") from error
    finally:
        os.close(named)
    if len(data) > rules.limit_bytes:
        raise _too_long(rules.limit_bytes)
    return data
