"""The addresses that this machine has heard of for NICs: leases of a dnsmasq, and the kernel's neighbours.

Both are texts that anybody may read, and that guests can bring about: bounded, and for people only.

Sources: proc(5), /proc/net/arp; include/uapi/linux/if_arp.h (flags); dnsmasq(8), `--dhcp-leasefile`.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

LEASES = (Path("/var/lib/misc/dnsmasq.leases"), Path("/var/lib/dnsmasq/dnsmasq.leases"))
"""Where dnsmasq keeps leases without `--dhcp-leasefile`: Debian's, and Fedora's."""

ARP = Path("/proc/net/arp")
"""IPv4 neighbours of our network namespace."""

COMPLETE = 0x2
"""ATF_COM: the neighbour has answered."""

READ_LIMIT = 1 << 20
"""Bytes that are read of a file. Arbitrary: a line has about 80, and a network as large as that has another server."""

BY_LEASE, BY_NEIGHBOUR = "DHCP lease", "neighbour"


def heard_of(macs: Collection[str], *, leases: Sequence[Path] = LEASES, arp: Path = ARP) -> Mapping[str, str]:
    """The addresses of these NICs, each with what tells of it.

    Args:
        macs: lower case, with colons.
        leases: files of dnsmasq.
        arp: the kernel's table.
    """
    found: dict[str, str] = {}
    for path in leases:
        found |= {address: BY_LEASE for mac, address in _leases(_lines(path)) if mac in macs}
    for mac, address in _neighbours(_lines(arp)):
        if mac in macs:
            found.setdefault(address, BY_NEIGHBOUR)
    return found


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            return file.read(READ_LIMIT).decode(errors="replace").splitlines()
    except OSError:
        return []


def _leases(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Lines of `EXPIRY MAC ADDRESS NAME CLIENT`; those of IPv6 have no MAC. An expiry of 0 never comes."""
    now = time.time()
    for line in lines:
        expiry, mac, address, *_ = [*line.split(), "", "", ""]
        if expiry.isdecimal() and len(expiry) < 20 and (int(expiry) == 0 or int(expiry) > now) and _is_address(address):
            yield mac.lower(), address


def _neighbours(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Lines of `ADDRESS TYPE FLAGS MAC MASK DEVICE`, below a heading."""
    for line in lines:
        address, _, flags, mac, *_ = [*line.split(), "", "", "", ""]
        if flags.startswith("0x") and _is_complete(flags) and _is_address(address):
            yield mac.lower(), address


def _is_complete(flags: str) -> bool:
    try:
        return bool(int(flags, 16) & COMPLETE)
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False
