"""Whether a guest's NICs are plugged in, by the network interfaces of the host. Pure.

A tap is a port of its bridge from the start of its QEMU. It is unplugged when the bridge is deleted (even if it
is made again at once, as network managers do), when the tap is taken out, or when either of the two is down.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmsupervisor.domain.frozen import frozen

BRIDGE, TUN = "bridge", "tun"
"""Kinds of interfaces, as the kernel calls them (IFLA_INFO_KIND); a tap is of the second."""

ELSEWHERE = 0
"""The index of a tap in another network namespace than the supervisor's: nothing is known of it."""


@frozen(kw_only=True)
class Link:
    """One network interface of the host.

    Attributes:
        index: its number, which no other interface ever gets.
        name: its name, which may change.
        kind: `BRIDGE`, `TUN`, …; empty for hardware.
        master: index of the interface that it is a port of; 0: of none.
        up: whether it was set up.
    """

    index: int
    name: str
    kind: str = ""
    master: int = 0
    up: bool = True


@frozen(kw_only=True)
class Attachment:
    """How a NIC of a guest that was started is attached to its host.

    Attributes:
        nic: `nic0` for the key `mac`, `nic1` for `nic/1/mac`, …
        tap: name of its interface on the host.
        index: of that interface, or `ELSEWHERE`; None when it is not on record: then its name is used.
        bridge: the bridge at its start; None when that is not known.
    """

    nic: str
    tap: str
    index: int | None = None
    bridge: str | None = None


@frozen(kw_only=True)
class Plug:
    """Where a NIC is plugged in.

    Attributes:
        nic: its name, see `Attachment`.
        plugged: whether frames can pass between it and a bridge.
        notice: a clause for people with the cause and the way out, or None.
        into: index of its tap and name of its bridge, when it is to be plugged in again; else None.
    """

    nic: str
    plugged: bool
    notice: str | None = None
    into: tuple[int, str] | None = None


def look(port: Attachment, links: Mapping[int, Link]) -> Plug | None:
    """Where a NIC is plugged in; None when its tap is not visible here, maybe in another network namespace.

    Args:
        port: of a QEMU that lives.
        links: all interfaces of the host, by index.
    """
    if port.index == ELSEWHERE:
        return None
    called = f"its {port.nic} ({port.tap})"
    tap = _tap(port, links)
    if tap is None:
        if port.index is None:
            return None
        return Plug(
            nic=port.nic,
            plugged=False,
            notice=f"{called} has no network: {port.tap} was deleted or moved away; a restart makes a new one",
        )
    if tap.master:
        master = links.get(tap.master)
        if master is not None and not master.up:
            notice = f"{called} has no network: {master.name} is down; ip link set {master.name} up"
        elif not tap.up:
            notice = _down(called, tap)
        else:
            elsewhere = master is not None and port.bridge is not None and master.name != port.bridge
            said = f"{called} is in {master.name}, not in {port.bridge}" if master and elsewhere else None
            return Plug(nic=port.nic, plugged=True, notice=said)
        return Plug(nic=port.nic, plugged=False, notice=notice)
    return _unplugged(port, called, tap, links)


def _unplugged(port: Attachment, called: str, tap: Link, links: Mapping[int, Link]) -> Plug:
    """A tap that is no port of any interface."""
    if port.bridge is None:
        return Plug(nic=port.nic, plugged=False, notice=f"{called} has no network: {tap.name} is no port of a bridge")
    there = any(link.name == port.bridge and link.kind == BRIDGE for link in links.values())
    if not there:
        notice = f"{called} has no network: there is no bridge {port.bridge}; it is plugged in again once there is"
        return Plug(nic=port.nic, plugged=False, notice=notice)
    said = f"{called} has no network: {tap.name} was taken out of {port.bridge}; it is plugged in again"
    return Plug(nic=port.nic, plugged=False, notice=said, into=(tap.index, port.bridge))


def _tap(port: Attachment, links: Mapping[int, Link]) -> Link | None:
    if port.index is not None:
        return links.get(port.index)
    # Another interface may have the same name: only a tap counts.
    return next((link for link in links.values() if (link.name, link.kind) == (port.tap, TUN)), None)


def _down(called: str, tap: Link) -> str:
    return f"{called} has no network: {tap.name} is down; ip link set {tap.name} up"
