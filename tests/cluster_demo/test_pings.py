"""What `ping` prints, counted."""

from __future__ import annotations

from tests.cluster_demo.pings import EVERY_S, GRACE, Pings, Tally


def answer(seq: int) -> str:
    return f"64 bytes from 10.97.0.101: icmp_seq={seq} ttl=64 time=0.296 ms\n"


def heard(*lines: str) -> Pings:
    """Each line at its number times a second."""
    pings = Pings()
    for at, line in enumerate(lines):
        pings.hear(line, float(at))
    return pings


def all_of(numbers: range) -> list[str]:
    return [answer(seq) for seq in numbers]


def test_nothing_is_lost_before_the_first_answer() -> None:
    """A guest that boots is not pinged yet."""
    pings = heard("PING 10.97.0.101 (10.97.0.101) 56(84) bytes of data.\n")
    assert (pings.marks(10), pings.tally(9.0), pings.silent_s(9.0)) == ("", Tally(sent=0, lost=0, gap_s=0.0), 0.0)
    unreachable = "From 10.97.0.10 icmp_seq=1 Destination Host Unreachable\n"
    pings = heard(unreachable, "no answer yet for icmp_seq=2\n", *all_of(range(3, 13)))
    assert pings.marks(20) == "|" * 10
    assert pings.tally(11.0) == Tally(sent=10, lost=0, gap_s=1.0)


def test_a_lost_request_is_one_whose_answer_never_came() -> None:
    """One that comes late is none; the newest may be under way."""
    pings = heard(*all_of(range(1, 4)), "no answer yet for icmp_seq=4\n", "no answer yet for icmp_seq=5\n")
    assert pings.marks(9) == "|||.."
    assert pings.tally(4.0) == Tally(sent=3, lost=0, gap_s=2.0)
    pings = heard(
        *all_of(range(1, 4)), "no answer yet for icmp_seq=4\n", "no answer yet for icmp_seq=5\n", answer(5),
        *all_of(range(6, 6 + GRACE)),
    )  # fmt: skip
    assert pings.marks(99) == "|||x" + "|" * (GRACE + 1)
    assert pings.tally(10.0) == Tally(sent=5 + GRACE, lost=1, gap_s=3.0)
    assert pings.answers == 4 + GRACE


def test_only_those_behind_a_number_count() -> None:
    """Each scene counts its own; the gap in which it begins is its own, too."""
    pings = heard(*all_of(range(1, 4)), *["\n"] * 6, *all_of(range(10, 30)))
    assert pings.tally(99.0, since=3).gap_s == 7.0
    assert pings.tally(99.0, since=3).lost == 6
    assert pings.tally(99.0, since=10) == Tally(sent=19, lost=0, gap_s=1.0)
    assert pings.tally(99.0, since=29) == Tally(sent=0, lost=0, gap_s=0.0)


def test_a_gap_that_lasts_counts() -> None:
    """While nothing answers, the gap grows with the clock."""
    pings = heard(*all_of(range(1, 9)), *(f"no answer yet for icmp_seq={seq}\n" for seq in range(9, 29)))
    assert pings.tally(40.0) == Tally(sent=8 + 20 - GRACE, lost=20 - GRACE, gap_s=33.0)
    assert pings.silent_s(40.0) == 33.0
    assert pings.marks(22) == "||" + "x" * (20 - GRACE) + "." * GRACE
    assert not pings.answered_since(8)
    pings.hear(answer(30), 41.0)
    assert pings.answered_since(28)


def test_a_duplicate_is_no_second_answer() -> None:
    """Two ports of a bridge may pass one packet on for a moment."""
    pings = heard(answer(1), answer(2), answer(2).replace("ms", "ms (DUP!)"), *all_of(range(3, 12)))
    assert pings.answers == 11
    assert pings.tally(12.0).sent == 11
    assert EVERY_S * GRACE == 1.0
