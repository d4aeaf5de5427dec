"""The socket that the HTTP server listens on, and what to tell the operator when it cannot be opened."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address


class ListenError(Exception):
    """The server cannot listen where its setting says: tell the operator."""


def listen(host: str, port: int, *, backlog: int, setting: str) -> socket.socket:
    """Open the listening socket. Names are refused, not resolved.

    Args:
        host: an IP address; `0.0.0.0` or `::` for all interfaces (`::` takes IPv4 clients too).
        port: TCP port; 0 for any free one.
        backlog: how many clients may wait to be accepted, see listen(2).
        setting: what the address comes from.

    Raises:
        ListenError: the address is malformed, in use, or not this host's.
    """
    shown = f"{setting}={f'[{host}]' if ':' in host else host}:{port}"
    try:
        address = ip_address(host)
    except ValueError:
        raise ListenError(
            f"{shown}: {host!r} is not an IP address (names are not looked up); "
            "right would be 0.0.0.0:9746 for all interfaces, 127.0.0.1:9746 for this host only, or [::]:9746"
        ) from None
    if port not in range(65_536):
        raise ListenError(f"{shown}: found port {port}; right would be 1 to 65535")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        # One socket for both families: `::` then serves IPv4 clients, too, whatever net.ipv6.bindv6only says.
        made = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::", backlog=backlog)
    except OSError as error:
        raise ListenError(f"{shown}: {_advice(error, host, port)}") from error
    # Accepted sockets inherit it (tcp(7)); asyncio sets it only where a socket says that it is TCP, as these do not.
    # Without it the last piece of a reply over TLS waits 40 ms for a delayed acknowledgement.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _advice(error: OSError, host: str, port: int) -> str:
    """The cause, and what would be right."""
    match error.errno:
        case errno.EADDRINUSE:
            return (
                "another program, perhaps another one of ours, listens there; "
                f"`ss -ltnp 'sport = :{port}'` names it. End it, or give a port that is free"
            )
        case errno.EADDRNOTAVAIL:
            return (
                f"no interface of this host has the address {host}; "
                "right would be one that `ip address` shows, or 0.0.0.0 for all"
            )
        case errno.EACCES:
            return "ports below 1024 need CAP_NET_BIND_SERVICE; right would be a higher one, such as 9746"
        case errno.EAFNOSUPPORT:
            return "this host's kernel has no IPv6; right would be 0.0.0.0 or another IPv4 address"
        case _:
            return error.strerror or str(error)
