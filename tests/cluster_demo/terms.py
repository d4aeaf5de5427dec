"""The terms of the demo: which hosts and guests there are, and what is shorter than in life."""

from __future__ import annotations

from dataclasses import dataclass

HOSTS = ("alpha", "beta", "gamma")

TTL_S, USUAL_TTL_S = 5, 15
"""`KVM_SESSION_TTL`, here and by default."""

WATCH_S, USUAL_WATCH_S = 12, 30
"""After which Ceph forgets a client that died, here and by default. Clients tell of themselves every 5 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPlan:
    """A guest as its keys make it.

    Attributes:
        name: its id, and the name of its image in Ceph.
        host: where it begins.
        hosts: where else it may run, in order.
        mac: of its NIC.
        address: that it gives itself.
    """

    name: str
    host: str
    hosts: tuple[str, ...]
    mac: str
    address: str


WEB = GuestPlan(
    name="web",
    host="alpha",
    hosts=("gamma", "alpha", "beta"),
    mac="52:54:00:97:00:65",
    address="10.97.0.101",
)
DB = GuestPlan(
    name="db",
    host="beta",
    hosts=("alpha", "gamma", "beta"),
    mac="52:54:00:97:00:66",
    address="10.97.0.102",
)
GUESTS = (WEB, DB)
"""The first one is pinged. Their lists of hosts differ, so that a host's guests do not all go to one other."""
