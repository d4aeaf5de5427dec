"""How people reach a guest that runs, in a clause: its addresses, or the ports of its host that lead to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from kvmsupervisor.cli.views import ADDRESSES, addresses_of
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.status import Status
from kvmsupervisor.domain.user_network import Forward
from kvmsupervisor.domain.values import some

SSH = 22


ADDRESS_WAIT_S = 30.0
"""How long a guest that runs is waited for until its address is known. Arbitrary: a cloud image with KVM has one after
10 s to 20 s; one that is never heard of (no agent, another machine's DHCP server) must not take long."""

HeardOf = Callable[[Collection[str]], Mapping[str, str]]
"""Tells the addresses of NICs that this machine has heard of, each with what tells of it."""


def has_address(spec: Spec | None) -> bool:
    """Whether its guest may get an address by which others reach it."""
    return spec is not None and bool(spec.bridged_nics)


def addresses(spec: Spec | None, status: Status, heard_of: HeardOf) -> str | None:
    """The guest's addresses in one clause: as its agent tells, or else as this machine has heard; None when unknown."""
    if spec is not None and not has_address(spec):
        return None
    told = addresses_of(status.agent)
    if told is not None or spec is None:
        return told
    heard = heard_of({nic.mac for nic in spec.bridged_nics})
    return some([f"{address} ({by})" for address, by in heard.items()], ADDRESSES) or None


def clause(spec: Spec | None, status: Status, heard_of: HeardOf) -> str:
    """What follows `running on …`; empty when nothing is known."""
    known = addresses(spec, status, heard_of)
    said = [] if known is None else [f"its addresses: {known}"]
    if spec is not None and spec.forward:
        said += [f"on {status.host}: {', '.join(_way(one, status.host) for one in spec.forward)}"]
    return "".join(f"; {one}" for one in said)


def _way(one: Forward, host: str) -> str:
    address = host if one.address == "0.0.0.0" else one.address
    if (one.protocol, one.guest_port) == ("tcp", SSH):
        return f"ssh -p {one.port} USER@{address}"
    return f"{one.protocol} port {one.port} of {address} leads to its port {one.guest_port}"
