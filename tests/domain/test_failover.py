"""Who may take an orphan over, and who comes first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.failover import candidates, place
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import Placed, Placement
from kvmsupervisor.domain.spec import Power, Problem, RawValue, Spec, Wish

ME = HostName("c")
WISH = Wish(
    instance=InstanceId("1"), host="a", host_revision=3, hosts=("a", "b", "c", "d"), spec=Spec(ram_mib=64), revision=3,
    keys=3,
)  # fmt: skip
LOCK = Lock(
    host=HostName("a"), boot_id="x", epoch=1, state=LockState.RUNNING, incarnation="i", storage=Storage.RBD
)  # fmt: skip


def placed(on: str, *, of: int = 3, **changes: object) -> Wish:
    wish = replace(WISH, placed=Placed(9, Placement(host=HostName(on), why="failover", since="", of=of)))
    return replace(wish, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wish", "lock", "live", "expected"),
    [
        pytest.param(WISH, LOCK, "bcd", 1, id="in the order of the key"),
        pytest.param(WISH, LOCK, "cd", 0, id="of those that live"),
        pytest.param(replace(WISH, hosts=("a", "b")), LOCK, "bc", None, id="only who is named"),
        pytest.param(replace(WISH, hosts=("*",)), LOCK, "c", 0, id="a star is any"),
        pytest.param(replace(WISH, hosts=("c", "*")), LOCK, "bcd", 0, id="those named before it come first"),
        pytest.param(replace(WISH, hosts=("*", "c")), LOCK, "bcde", 3, id="and those behind it last"),
        pytest.param(replace(WISH, hosts=()), LOCK, "bc", None, id="without the key nobody"),
        pytest.param(WISH, LOCK, "abcd", None, id="not while the holder lives"),
        pytest.param(replace(WISH, host="b"), LOCK, "bcd", None, id="nor while another host was named that lives"),
        pytest.param(replace(WISH, host="b"), LOCK, "cd", 0, id="a dead one does not count"),
        pytest.param(WISH, replace(LOCK, host=HostName("b")), "bcd", None, id="nor while somebody else holds it"),
        pytest.param(replace(WISH, host="c"), LOCK, "c", None, id="what is ours already goes its own way"),
        pytest.param(placed("b"), LOCK, "bcd", None, id="law 10: where it is placed somebody lives"),
        pytest.param(placed("b"), replace(LOCK, host=HostName("b")), "cd", 0, id="law 10: who lost it is gone, too"),
        pytest.param(
            placed("b"), replace(LOCK, host=HostName("b")), "acd", 1, id="law 10: its host is a candidate in turn"
        ),
        pytest.param(placed("b", hosts=("c",)), replace(LOCK, host=HostName("b")), "ac", 0, id="law 10: or comes last"),
        pytest.param(placed("b", host="c", hosts=("b",)), replace(LOCK, host=HostName("b")), "c", 0, id="law 10: home"),
        pytest.param(placed("c"), LOCK, "c", None, id="law 10: what is placed here goes its own way"),
        pytest.param(placed("b", of=2), LOCK, "bcd", 1, id="law 10: one that has ended says nothing"),
        pytest.param(
            replace(WISH, placed=Placed(9), problems=(Problem("placement", "x", "y"),)),
            LOCK,
            "c",
            None,
            id="law 10: nothing on the ground of a damaged one",
        ),
        pytest.param(replace(WISH, host=None), LOCK, "c", None, id="what nobody shall run stays so"),
        pytest.param(replace(WISH, power=Power.OFF), LOCK, "c", None, id="what is off stays off"),
        pytest.param(replace(WISH, spec=None, problems=(Problem("ram", "x", "y"),)), LOCK, "c", None, id="bad keys"),
        pytest.param(WISH, None, "c", None, id="a free lock is nobody's loss"),
        pytest.param(WISH, replace(LOCK, storage=Storage.UNFENCEABLE), "c", None, id="law 7: pinned"),
        pytest.param(WISH, replace(LOCK, storage=Storage.NONE), "c", 0, id="law 7: nothing to lose"),
        pytest.param(WISH, replace(LOCK, facts="/kvmsupervisor"), "c", 0, id="law 12: seen from here"),
        pytest.param(WISH, replace(LOCK, facts="/other"), "c", None, id="law 12: whose session is elsewhere may live"),
    ],
)
def test_place(wish: Wish, lock: Lock | None, live: str, expected: int | None) -> None:
    """Law: the live candidates in the order of the key; nothing that somebody has, or that storage cannot fence."""
    has_session = live.__contains__
    assert place(wish, lock, me=ME, facts="/kvmsupervisor", has_session=has_session, everyone=live) == expected


def test_a_star_shares_out() -> None:
    """Law: all hosts see one order of those that a star stands for, and each machine has an order of its own."""
    everyone = tuple("abcdefgh")
    orders = {candidates(replace(WISH, instance=InstanceId(f"vm{n}"), hosts=("*",)), everyone) for n in range(50)}
    assert len({order[0] for order in orders}) > 4
    assert all(sorted(order) == list(everyone) for order in orders)
    assert candidates(replace(WISH, hosts=("*",)), everyone) == candidates(replace(WISH, hosts=("*",)), everyone[::-1])


def test_unknown_sessions_are_no_reason() -> None:
    """Law 4: who is not known to be gone is not gone."""
    assert place(WISH, LOCK, me=ME, facts="/kvmsupervisor", has_session=lambda host: None) is None


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("b", ("b",)),
        ("b c", ("b", "c")),
        ("b,c ,\td", ("b", "c", "d")),
        (",", None),
        ("b b", None),
        ("b/c", None),
        (" ".join(f"n{n}" for n in range(17)), None),
    ],
)
def test_the_key(text: str, hosts: tuple[str, ...] | None) -> None:
    """Law: host names in order, each once; anything else is a problem of that key, and names nobody."""
    wish = parse_wish(InstanceId("1"), {b"ram": RawValue(b"64", 1), b"hosts": RawValue(text.encode(), 2)})
    assert wish.hosts == (hosts or ())
    assert [problem.key for problem in wish.problems] == ([] if hosts else ["hosts"])
