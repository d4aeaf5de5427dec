"""Whether a NIC is plugged in: a table of what the host's interfaces may look like."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.nics import BRIDGE, ELSEWHERE, TUN, Attachment, Link, Plug, look

NIC = Attachment(nic="nic0", tap="tap7", index=7, bridge="br0")
BR0 = Link(index=3, name="br0", kind=BRIDGE)
BR1 = Link(index=4, name="br1", kind=BRIDGE)
ETH0 = Link(index=2, name="eth0", master=3)
TAP = Link(index=7, name="tap7", kind=TUN, master=3)


def seen(*links: Link, nic: Attachment = NIC) -> Plug | None:
    return look(nic, {link.index: link for link in links})


def test_as_it_was_started() -> None:
    """A tap that is up, in its bridge, which is up: nothing is to be said."""
    assert seen(BR0, ETH0, TAP) == Plug(nic="nic0", plugged=True)


@pytest.mark.parametrize(
    ("links", "words", "into"),
    [
        ([ETH0, replace(TAP, master=0)], "there is no bridge br0; it is plugged in again once there is", None),
        ([BR0, replace(TAP, master=0)], "tap7 was taken out of br0; it is plugged in again", (7, "br0")),
        ([BR0, replace(TAP, master=0, up=False)], "taken out of br0", (7, "br0")),
        ([replace(ETH0, name="br0"), replace(TAP, master=0)], "there is no bridge br0", None),
        ([BR0, replace(TAP, up=False)], "tap7 is down; ip link set tap7 up", None),
        ([replace(BR0, up=False), TAP], "br0 is down; ip link set br0 up", None),
        ([BR0], "tap7 was deleted or moved away; a restart makes a new one", None),
        ([BR0, replace(TAP, index=8)], "tap7 was deleted or moved away", None),
    ],
    ids=["no bridge", "taken out", "taken out and down", "another thing of that name", "down", "bridge down", "gone",
         "another one of that name"],
)  # fmt: skip
def test_no_network(links: list[Link], words: str, into: tuple[int, str] | None) -> None:
    """The cause and the way out are told; it is plugged in again only where nothing has it and its bridge is there."""
    found = seen(*links)
    assert found is not None
    assert (found.plugged, found.into) == (False, into)
    assert found.notice is not None
    assert found.notice.startswith("its nic0 (tap7) has no network: ")
    assert words in found.notice


def test_what_a_person_put_elsewhere_stays_there() -> None:
    """Another bridge on purpose: told, and never taken away; whatever else has it as a port as well."""
    assert seen(BR0, BR1, replace(TAP, master=4)) == Plug(
        nic="nic0", plugged=True, notice="its nic0 (tap7) is in br1, not in br0"
    )
    other = seen(BR0, Link(index=9, name="ovs-system", kind="openvswitch"), replace(TAP, master=9))
    assert other == Plug(nic="nic0", plugged=True, notice="its nic0 (tap7) is in ovs-system, not in br0")
    unseen = seen(BR0, replace(TAP, master=9))
    assert unseen == Plug(nic="nic0", plugged=True)


def test_renamed_it_is_the_same() -> None:
    """An interface is known by its index; its name is for people."""
    assert seen(BR0, replace(TAP, name="web1")) == Plug(nic="nic0", plugged=True)
    found = seen(BR0, replace(TAP, name="web1", master=0))
    assert found is not None
    assert found.into == (7, "br0")


def test_out_of_sight_nothing_is_said() -> None:
    """A tap of another network namespace: an interface of that name here would be a stranger's."""
    assert seen(BR0, TAP, nic=replace(NIC, index=ELSEWHERE)) is None


def test_of_an_earlier_release_there_is_the_name_only() -> None:
    """Its record has no index: a tap of that name counts, nothing else does."""
    old = replace(NIC, index=None)
    assert seen(BR0, TAP, nic=old) == Plug(nic="nic0", plugged=True)
    assert seen(BR0, replace(TAP, kind="veth"), nic=old) is None
    assert seen(BR0, nic=old) is None
    found = seen(BR0, replace(TAP, master=0), nic=old)
    assert found is not None
    assert found.into == (7, "br0")


def test_without_a_known_bridge_it_is_told() -> None:
    """No key, no record and no setting names one: nobody can say where it belongs."""
    nameless = replace(NIC, bridge=None)
    assert seen(BR0, TAP, nic=nameless) == Plug(nic="nic0", plugged=True)
    found = seen(BR0, replace(TAP, master=0), nic=nameless)
    assert found is not None
    assert (found.plugged, found.into) == (False, None)
    assert found.notice == "its nic0 (tap7) has no network: tap7 is no port of a bridge"
