"""What is kept of a guest's words: what people look for, in bounds, and nothing that could harm them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.agent import ADDRESS_LIMIT, TEXT_LIMIT, GuestAddress, GuestFacts, facts_of
from kvmsupervisor.domain.status import Phase, Status


def interface(name: object, *addresses: object) -> dict[str, Any]:
    return {"name": name, "ip-addresses": [{"ip-address": address, "prefix": 24} for address in addresses]}


def addresses(*interfaces: object) -> list[tuple[str, str]]:
    found = facts_of(info=None, osinfo=None, hostname=None, interfaces=list(interfaces))
    return [(one.interface, one.address) for one in found.addresses]


LO = interface("lo", "127.0.0.1", "::1")
LINK_LOCAL = interface("eth0", "169.254.7.7", "fe80::1%eth0")


def test_what_people_look_for_is_kept() -> None:
    """Law: the answers' members become one flat object; what is missing is None."""
    found = facts_of(
        info={"version": "7.2.1", "supported_commands": []},
        osinfo={"name": "Debian GNU/Linux", "pretty-name": "Debian GNU/Linux 12 (bookworm)"},
        hostname={"host-name": "web1"},
        interfaces=[LO, interface("eth0", "192.0.2.7", "2001:DB8:0::7", "fe80::2")],
    )
    assert found == GuestFacts(
        addresses=(
            GuestAddress(interface="eth0", address="192.0.2.7"),
            GuestAddress(interface="eth0", address="2001:db8::7"),
        ),
        os="Debian GNU/Linux 12 (bookworm)",
        hostname="web1",
        version="7.2.1",
    )
    assert facts_of(info=None, osinfo={"name": "Alpine"}, hostname=None, interfaces=None) == GuestFacts(os="Alpine")


def test_loopback_and_link_local_only_without_others() -> None:
    """Law: the best kind of address that there is, and only that."""
    assert addresses(LO, LINK_LOCAL, interface("eth1", "10.0.0.1")) == [("eth1", "10.0.0.1")]
    assert addresses(LO, LINK_LOCAL) == [("eth0", "169.254.7.7"), ("eth0", "fe80::1")]
    assert addresses(LO) == [("lo", "127.0.0.1"), ("lo", "::1")]
    assert addresses(interface("eth0", "0.0.0.0", "::", "224.0.0.1")) == []


def test_only_text_in_one_line_is_kept() -> None:
    """Law: no control character, no direction mark, no lone surrogate; cut to its limit; nothing left is nothing."""

    def hostname(text: object) -> str | None:
        return facts_of(info=None, osinfo=None, hostname={"host-name": text}, interfaces=None).hostname

    assert hostname("we\x1b[31mb\n1\u202e\ud800\x00") == "we[31mb1"
    assert hostname("ä" * 10_000) == "ä" * TEXT_LIMIT
    assert hostname(" \x07 ") is None
    assert hostname(7) is None
    assert hostname(["web"]) is None


def test_there_is_an_end_to_addresses() -> None:
    """Law: however many a guest tells, a bounded number is kept."""
    many = [interface(f"eth{n}", *(f"10.{n}.0.{m}" for m in range(200))) for n in range(250)]
    assert len(addresses(*many)) == ADDRESS_LIMIT


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["10.0.0.1", "::1", "1.2.3"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "ip-addresses", "ip-address", "host-name", "pretty-name", "version"]), inner
        )
    ),
    max_leaves=12,
)


@given(answer=json_values)
def test_no_answer_breaks_it(answer: Any) -> None:
    """Law: whatever JSON a guest sends, the facts fit a status key, and come back from it as they were."""
    facts = facts_of(info=answer, osinfo=answer, hostname=answer, interfaces=answer)
    status = Status(id="1", host="a", phase=Phase.RUNNING, reason="so", since="", agent=facts)
    assert Status.from_json(status.to_json()) == status
    assert json.dumps(status.to_object()["agent"])


def test_a_status_key_with_another_agent_is_none() -> None:
    """Law: what is half a status is none; one without the field is one."""
    whole = Status(id="1", host="a", phase=Phase.RUNNING, reason="so", since="").to_object()
    assert Status.from_json(json.dumps(whole | {"agent": {"addresses": [{"interface": 1}]}}).encode()) is None
    del whole["agent"]
    found = Status.from_json(json.dumps(whole).encode())
    assert found is not None
    assert found.agent is None
