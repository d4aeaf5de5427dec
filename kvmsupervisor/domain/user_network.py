"""QEMU's own user-mode network (`bridge=:user`), and the ports of the host that lead into its guest. Pure.

Source: qemu-system-x86_64(1), `-netdev user` and its option `hostfwd`.
"""

from __future__ import annotations

import ipaddress
import re

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.values import Unfit, interface_name, show

USER = ":user"
"""The value of `bridge` for that network. No interface has a colon in its name."""

LOOPBACK = "127.0.0.1"
"""Where the host listens when `forward` names no address: nobody but the host itself reaches the guest then."""

LEAST_PORT = 1024
"""The first port of the host that needs no privilege (Linux's default), for QEMU has none."""

MOST = 32
"""Most forwards of one machine. Arbitrary: more ports than a first machine has services."""

_WANTED = (
    "it is tcp:ADDRESS:PORT:GUESTPORT or udp:…, several separated by white space, such as tcp:127.0.0.1:2222:22 for "
    f"the guest's SSH at port 2222 of the host; without ADDRESS: it is {LOOPBACK}"
)
_FORWARD = re.compile(r"(tcp|udp):(?:([^,]*):)?([0-9]{1,6}):([0-9]{1,6})")
_ELSEWHERE = re.compile(r"(?:(tcp|udp):)?([0-9.]*:)?([0-9]{1,5})[:-]:?([0-9]{1,5})")
"""As Docker (`2222:22`) and QEMU (`tcp::2222-:22`) write it."""


@frozen
class Forward:
    """One port of the host that leads to a port of the guest.

    Attributes:
        protocol: `tcp` or `udp`.
        address: IPv4 address of the host; `0.0.0.0` for all.
        port: of the host.
        guest_port: of the guest.
    """

    protocol: str
    address: str
    port: int
    guest_port: int

    @property
    def server(self) -> tuple[str, str, int]:
        """Where the host listens: protocol, address and port."""
        return self.protocol, self.address, self.port

    def __str__(self) -> str:
        return f"{self.protocol}:{self.address}:{self.port}:{self.guest_port}"


def bridge_name(text: str) -> str:
    """The value of `bridge`: a bridge of the host, or `:user`."""
    if text == USER:
        return text
    if text.lower().strip(":") == "user" and ":" in text:
        raise Unfit(f"QEMU's own user-mode network is written {USER}")
    return interface_name(text)


def forwards(text: str) -> tuple[Forward, ...]:
    """The value of `forward`."""
    found = tuple(_forward(word) for word in text.split())
    if len(found) > MOST:
        raise Unfit(f"there are at most {MOST} of them; found {len(found)}")
    for place, one in enumerate(found):
        if any(overlap(one.server, other.server) for other in found[:place]):
            raise Unfit(f"each port of the host leads to one port of the guest; {one.protocol} {one.port} leads to two")
    return found


def overlap(one: tuple[str, str, int], other: tuple[str, str, int]) -> bool:
    """Whether two servers, each as (protocol, address, port), cannot listen at one time."""
    anywhere = not {"0.0.0.0", "::"}.isdisjoint({one[1], other[1]})
    return (one[0], one[2]) == (other[0], other[2]) and (anywhere or one[1] == other[1])


def _forward(word: str) -> Forward:
    match = _FORWARD.fullmatch(word)
    if match is None:
        raise Unfit(f"{_WANTED}; {show(word)} is not{_meant(word)}")
    protocol, address, port, guest_port = match[1], match[2], int(match[3]), int(match[4])
    if not LEAST_PORT <= port <= 65_535:
        raise Unfit(
            f"the host's port is from {LEAST_PORT} to 65535, because QEMU has no privilege; {show(word)} has {port}"
        )
    if not 1 <= guest_port <= 65_535:
        raise Unfit(f"the guest's port is from 1 to 65535; {show(word)} has {guest_port}")
    return Forward(protocol, LOOPBACK if address is None else _ipv4(address, word), port, guest_port)


def _ipv4(text: str, word: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        held = "an IPv6 address, on which QEMU does not listen" if text.count(":") > 1 else show(text)
        raise Unfit(
            f"the address is an IPv4 address of the host, such as {LOOPBACK}, or 0.0.0.0 for every one; "
            f"{show(word)} has {held}"
        ) from None


def _meant(word: str) -> str:
    match = _ELSEWHERE.fullmatch(word)
    if match is None:
        return ""
    protocol, address = match[1] or "tcp", (match[2] or "").rstrip(":")
    return f"; did you mean {protocol}:{address or LOOPBACK}:{match[3]}:{match[4]}?"
