"""The network interfaces of this host: lists them once, then follows every change by rtnetlink.

Costs nothing while nothing changes, whatever the number of interfaces. Keeps only what `domain.nics` needs.

Sources: netlink(7), rtnetlink(7); include/uapi/linux/netlink.h, rtnetlink.h, if_link.h; bridge ports: the ioctls
SIOCBRADDIF and SIOCBRDELIF (include/uapi/linux/sockios.h, net/bridge/br_ioctl.c), which qemu-bridge-helper uses, too.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Never

import structlog

from kvmsupervisor.domain.nics import Link

log = structlog.get_logger(__name__)

GROUP_LINK = 1
"""RTMGRP_LINK: the group for changes of interfaces."""

NEW_LINK, DEL_LINK, GET_LINK = 16, 17, 18
ERROR, DONE = 2, 3
REQUEST, DUMP = 0x001, 0x300
EXT_MASK, SKIP_STATS = 29, 1 << 3
NAME, MASTER, LINK_INFO, INFO_KIND = 3, 10, 18, 1
NEST = 0x3FFF
"""Mask for the type of an attribute, without its flags."""

IFF_UP = 1
SIOCBRADDIF, SIOCBRDELIF = 0x89A2, 0x89A3

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_IFREQ = struct.Struct("=16si20x")

MESSAGE_BYTES = 64 << 10
"""The size of one read. The kernel sends at most 32 KiB of a list at a time (net/netlink/af_netlink.c)."""

AGAIN_S = 1.0
"""Pause before all interfaces are listed again, after the socket overflowed or the kernel refused. Arbitrary: a second
without news does no harm, and a host whose interfaces change so fast should not be listed in a loop."""

Changed = Callable[[Set[int]], None]
"""Called with the indexes of changed interfaces, in the event loop."""


class Links:
    """All interfaces of our network namespace.

    Attributes:
        all: the interfaces by index; None while they are not known.
    """

    def __init__(self, on_change: Changed) -> None:
        self.all: Mapping[int, Link] | None = None
        self._on_change = on_change
        self._trouble: str | None = None

    async def run(self) -> Never:
        """Follow the interfaces, for ever."""
        while True:
            try:
                with _open() as kernel:
                    await self._follow(kernel)
            except OSError as error:
                # ENOBUFS: changes were lost, so all interfaces are listed again.
                if error.errno != errno.ENOBUFS and str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning("links.untold", reason=f"the kernel does not tell of network interfaces: {error}")
                await asyncio.sleep(AGAIN_S)

    async def _follow(self, kernel: socket.socket) -> None:
        """List all interfaces, then apply every change; the kernel sends both on this socket, in order."""
        loop = asyncio.get_running_loop()
        listed: dict[int, Link] = {}
        kernel.send(_list_request())
        done = False
        while not done:
            for kind, payload in _messages(await loop.sock_recv(kernel, MESSAGE_BYTES)):
                done |= kind == DONE
                _apply(listed, kind, payload)
        before, self.all = self.all or {}, listed
        self._trouble = None
        self._tell({index for index in before.keys() | listed.keys() if before.get(index) != listed.get(index)})
        while True:
            changed: set[int] = set()
            for kind, payload in _messages(await loop.sock_recv(kernel, MESSAGE_BYTES)):
                changed |= _apply(listed, kind, payload)
            self._tell(changed)
            # Reading what has arrived never waits, so a flood would not let other tasks run.
            await asyncio.sleep(0)

    def _tell(self, changed: Set[int]) -> None:
        if changed:
            self._on_change(changed)

    async def plug(self, tap: int, bridge: str) -> None:
        """Make an interface a port of a bridge, unless it already is a port of another one, which it stays.

        Runs in a thread: the kernel may have to wait for other programs that change interfaces.

        Args:
            tap: the interface's index.
            bridge: the bridge's name.

        Raises:
            OSError: the kernel refuses.
        """
        await asyncio.to_thread(_plug, tap, bridge)

    async def move(self, tap: int, bridge: str) -> None:
        """Make an interface a port of a bridge, whatever bridge it was in. Cut off in between it is in none.

        Args:
            tap: the interface's index.
            bridge: the bridge's name.

        Raises:
            OSError: the kernel refuses.
        """
        link = (self.all or {}).get(tap)
        master = None if link is None else (self.all or {}).get(link.master)
        if master is None or master.name != bridge:
            await asyncio.to_thread(_move, tap, None if master is None else master.name, bridge)


def index_of(name: str) -> int | None:
    """The index of an interface of our network namespace; None when there is no interface of that name."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _plug(tap: int, bridge: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, SIOCBRADDIF, _IFREQ.pack(bridge.encode(), tap))
        except OSError as error:
            # It is a port of another bridge already, and stays there.
            if error.errno != errno.EBUSY:
                raise


def _move(tap: int, former: str | None, bridge: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        # Before it leaves the one, so that it stays there where there is no other.
        socket.if_nametoindex(bridge)
        if former is not None:
            fcntl.ioctl(any_socket, SIOCBRDELIF, _IFREQ.pack(former.encode(), tap))
        fcntl.ioctl(any_socket, SIOCBRADDIF, _IFREQ.pack(bridge.encode(), tap))


def _open() -> socket.socket:
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    try:
        kernel.bind((0, GROUP_LINK))
    except OSError:
        kernel.close()
        raise
    return kernel


def _list_request() -> bytes:
    """The request for all interfaces, without their counters."""
    mask = _ATTRIBUTE.pack(8, EXT_MASK) + struct.pack("=I", SKIP_STATS)
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + mask
    return _HEADER.pack(_HEADER.size + len(body), GET_LINK, REQUEST | DUMP, 1, 0) + body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages of one read: their types, and their payloads behind the header.

    Raises:
        OSError: the kernel reports an error.
    """
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        payload = data[offset + _HEADER.size : offset + length]
        if kind == ERROR and (number := -int.from_bytes(payload[:4], sys.byteorder, signed=True)):
            raise OSError(number, f"rtnetlink refuses: {errno.errorcode.get(number, number)}")
        yield kind, payload
        offset += _aligned(length)


def _apply(links: dict[int, Link], kind: int, payload: bytes) -> set[int]:
    """Apply one message; return the index of the interface that it changed, if any."""
    if kind not in {NEW_LINK, DEL_LINK} or len(payload) < _LINK.size:
        return set()
    family, _, index, flags, _ = _LINK.unpack_from(payload)
    if family != socket.AF_UNSPEC:
        # A bridge reports its ports with the same types.
        return set()
    if kind == DEL_LINK:
        return set() if links.pop(index, None) is None else {index}
    found = dict(_attributes(payload[_LINK.size :]))
    link = Link(
        index=index,
        name=found.get(NAME, b"").rstrip(b"\0").decode(errors="replace"),
        kind=dict(_attributes(found.get(LINK_INFO, b""))).get(INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
        master=int.from_bytes(found.get(MASTER, b""), sys.byteorder),
        up=bool(flags & IFF_UP),
    )
    if links.get(index) == link:
        return set()
    links[index] = link
    return {index}


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & NEST, data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
