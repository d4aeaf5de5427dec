"""What a host says of itself so that guests can move to it live, and a target's offer for one guest. Pure."""

from __future__ import annotations

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Destination
from kvmsupervisor.domain.records import Unfit, compact, parse
from kvmsupervisor.domain.words import is_name

PROTOCOL = 1
"""Version of what two supervisors say to each other in a live move. Both must have the same."""


@frozen(kw_only=True)
class MoveFacts:
    """The part of a host's session that a live move needs; a host without it takes part in none.

    Attributes:
        protocol: see `PROTOCOL`.
        address: where it takes guests, `HOST:PORT`.
        accel: `kvm` or `tcg`.
        qemu: the version of its QEMU, as `7.2.22`; empty where that is not known.
        cpu: the vendor of its processor, as in /proc/cpuinfo.
        flags: the features of its processor, by the kernel's names, sorted.
        firmware: bytes of its UEFI firmware and of the template of variables; empty without.
    """

    protocol: int
    address: str
    accel: str
    qemu: str = ""
    cpu: str = ""
    flags: tuple[str, ...] = ()
    firmware: tuple[int, ...] = ()


@frozen(kw_only=True)
class Offer:
    """The value of `/kvmsupervisor/incoming/<id>`: leased with the target's session.

    Attributes:
        host: the target.
        boot_id: of its boot.
        address: where the source connects to.
        key: known by both sides of this one move, hexadecimal.
        waits: the QEMU that waits there; None before there is one.
    """

    host: HostName
    boot_id: str
    address: str
    key: str
    waits: Destination | None = None
    protocol: int = PROTOCOL

    def to_json(self) -> bytes:
        """The value of the key."""
        return compact(self)

    @classmethod
    def from_json(cls, data: bytes) -> Offer | None:
        """Read an offer; None when it is not one that this release understands."""
        try:
            offer = parse(cls, data)
            bytes.fromhex(offer.key)
        except (Unfit, ValueError):
            return None
        named = offer.waits is None or is_name(offer.waits.incarnation)
        return offer if offer.protocol == PROTOCOL and named and ":" in offer.address else None
