"""QEMU's own network: what `forward` may say, and how a mistake is told."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.spec import RawValue, Wish
from kvmsupervisor.domain.user_network import MOST, Forward, forwards
from kvmsupervisor.domain.values import Unfit

SSH = Forward("tcp", "127.0.0.1", 2222, 22)


def wish(**texts: str) -> Wish:
    keys = {"ram": "64", "mac": "52:54:00:00:00:01", "bridge": ":user"} | texts
    return parse_wish(InstanceId("vm"), {k.encode(): RawValue(v.encode(), 1) for k, v in keys.items() if v})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tcp:2222:22", [SSH]),
        ("tcp:127.0.0.1:2222:22", [SSH]),
        (
            "tcp:0.0.0.0:1024:1\tudp:1024:65535",
            [Forward("tcp", "0.0.0.0", 1024, 1), Forward("udp", "127.0.0.1", 1024, 65535)],
        ),
        ("tcp:127.0.0.1:8080:80 tcp:127.0.0.2:8080:80", [Forward("tcp", f"127.0.0.{n}", 8080, 80) for n in (1, 2)]),
    ],
)
def test_what_is_sound(text: str, found: list[Forward]) -> None:
    """Law: without an address it is loopback; what a forward prints is what was meant, and read as the same."""
    assert list(forwards(text)) == found
    assert list(forwards(" ".join(map(str, found)))) == found
    spec = wish(forward=text).spec
    assert spec is not None
    assert list(spec.forward) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("22", "such as tcp:127.0.0.1:2222:22"),
        ("2222:22", "did you mean tcp:127.0.0.1:2222:22?"),
        ("tcp::2222-:22", "did you mean tcp:127.0.0.1:2222:22?"),
        ("0.0.0.0:8080:80", "did you mean tcp:0.0.0.0:8080:80?"),
        ("TCP:2222:22", "'TCP:2222:22' is not"),
        ("sctp:2222:22", "'sctp:2222:22' is not"),
        ("tcp:2222:22,udp:1:1", "several separated by white space"),
        ("tcp:2222", "'tcp:2222' is not"),
        ("tcp:0:22", "from 1024 to 65535, because QEMU has no privilege; 'tcp:0:22' has 0"),
        ("tcp:22:22", "has 22"),
        ("tcp:65536:22", "has 65536"),
        ("tcp:2222:0", "the guest's port is from 1 to 65535"),
        ("tcp:2222:65536", "'tcp:2222:65536' has 65536"),
        ("tcp:[::1]:2222:22", "an IPv6 address, on which QEMU does not listen"),
        ("tcp:::1:2222:22", "an IPv6 address"),
        ("tcp:localhost:2222:22", "'tcp:localhost:2222:22' has 'localhost'"),
        ("tcp::2222:22", "has ''"),
        ("tcp:127.1:2222:22", "has '127.1'"),
        ("tcp:2222:22 tcp:0.0.0.0:2222:23", "tcp 2222 leads to two"),
        ("tcp:\N{FULLWIDTH DIGIT TWO}222:22", "is not"),
        (" ".join(f"tcp:{3000 + n}:22" for n in range(MOST + 1)), f"at most {MOST}"),
    ],
)
def test_what_is_not(text: str, said: str) -> None:
    """Law: it is refused, with what was found, what is wrong and what would be right."""
    with pytest.raises(Unfit) as caught:
        forwards(text)
    assert said in str(caught.value)
    (problem,) = wish(forward=text).problems
    assert problem.key == "forward"


@pytest.mark.parametrize(
    ("texts", "key", "said"),
    [
        ({"bridge": "br0", "forward": "tcp:2222:22"}, "forward", "it is for bridge=:user"),
        ({"bridge": "", "forward": "tcp:2222:22"}, "forward", "it is for bridge=:user"),
        ({"bridge": ":USER", "forward": "tcp:2222:22"}, "bridge", "is written :user"),
        ({"bridge": "user:"}, "bridge", "is written :user"),
        ({"bridge": ":slirp"}, "bridge", "no white space"),
        ({"mac": ""}, "mac", "mac=auto"),
        ({"mac": "auto"}, "mac", "choose one for mac=auto"),
    ],
)
def test_what_belongs_together(texts: dict[str, str], key: str, said: str) -> None:
    """Law: a forward needs that network, and the network a NIC; one mistake is one problem."""
    (problem,) = wish(**texts).problems
    assert (problem.key, said in problem.wanted) == (key, True), problem
