"""What a guest says of itself through its agent, made safe: the guest is a stranger, and people read it.

Source: the QEMU Guest Agent Protocol Reference (qemu.org, docs/interop/qemu-ga-ref): `guest-info`, `guest-get-osinfo`,
`guest-get-host-name`, `guest-network-get-interfaces`.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

from kvmsupervisor.domain.frozen import frozen

TEXT_LIMIT = 128
"""Characters kept of each text. Arbitrary: Debian's pretty name has 33, a host's name has at most 64 on Linux."""

ADDRESS_LIMIT = 32
"""Addresses kept. Arbitrary: a machine with more (a router, a container host) is not recognised by its addresses."""

LOOKED_AT_LIMIT = 256
"""Interfaces, and addresses of each, that are looked at all. Arbitrary, above what machines have."""


@frozen(kw_only=True)
class GuestAddress:
    """One address of the guest.

    Attributes:
        interface: the guest's name for it.
        address: IPv4 or IPv6, in its usual spelling.
    """

    interface: str
    address: str


@frozen(kw_only=True)
class GuestFacts:
    """What the guest says. All of it may be a lie; none of it can break a line or fill a store.

    Attributes:
        addresses: without loopback and link-local ones, unless there are no others; in the guest's order.
        os: the system's name for people, None when the guest does not say.
        hostname: the guest's own, None when the guest does not say.
        version: of the agent, None when the guest does not say.
    """

    addresses: tuple[GuestAddress, ...] = ()
    os: str | None = None
    hostname: str | None = None
    version: str | None = None


def facts_of(*, info: object, osinfo: object, hostname: object, interfaces: object) -> GuestFacts:
    """Make facts of the agent's answers, each the parsed `return` of its command, or None without one."""
    return GuestFacts(
        addresses=_addresses(interfaces),
        os=_text(_member(osinfo, "pretty-name")) or _text(_member(osinfo, "name")),
        hostname=_text(_member(hostname, "host-name")),
        version=_text(_member(info, "version")),
    )


def _member(found: object, name: str) -> object:
    return found.get(name) if isinstance(found, dict) else None


def _text(found: object) -> str | None:
    """A text as one line of bounded length; None when it is empty, or no text."""
    if not isinstance(found, str):
        return None
    # Cut first: a guest could send a quarter of a megabyte. Direction marks and lone surrogates are not
    # printable either.
    kept = "".join(char for char in found[: 4 * TEXT_LIMIT] if char.isprintable()).strip()
    return kept[:TEXT_LIMIT].rstrip() or None


def _items(found: object) -> list[object]:
    return found[:LOOKED_AT_LIMIT] if isinstance(found, list) else []


def _addresses(interfaces: object) -> tuple[GuestAddress, ...]:
    """The addresses to show: those of the best kind."""
    kinds: tuple[list[GuestAddress], ...] = ([], [], [])
    for name, address in _all_addresses(interfaces):
        kind = kinds[2 if address.is_loopback else 1 if address.is_link_local else 0]
        if len(kind) < ADDRESS_LIMIT:
            kind.append(GuestAddress(interface=name, address=str(address)))
    return tuple(next((kind for kind in kinds if kind), []))


def _all_addresses(interfaces: object) -> Iterator[tuple[str, IPv4Address | IPv6Address]]:
    for interface in _items(interfaces):
        name = _text(_member(interface, "name"))
        if name is None:
            continue
        for entry in _items(_member(interface, "ip-addresses")):
            text = _member(entry, "ip-address")
            if not isinstance(text, str):
                continue
            try:
                # Without the scope of a link-local address (`fe80::1%eth0`): the interface is named already.
                address = ip_address(text.partition("%")[0])
            except ValueError:
                continue
            if not (address.is_unspecified or address.is_multicast):
                yield name, address
