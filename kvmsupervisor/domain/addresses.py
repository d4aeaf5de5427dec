"""Addresses that are a host's own, or answer to hosts only. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

METADATA = frozenset(
    map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "168.63.129.16", "100.100.100.200", "192.0.0.192"))
)
"""Addresses of cloud metadata services that are not link-local: Amazon's and Google's by IPv6, Azure's, Alibaba's and
Oracle's (from their pages on metadata). They answer any program on the host, with credentials in some clouds."""

EMBEDDING = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")))
"""IPv6 networks whose addresses end in the IPv4 address that they lead to: RFC 4291 2.5.5.1, RFC 6052 2.1, RFC 8215."""


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
