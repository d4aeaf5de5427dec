"""How histories of a store are told apart, and what a lock of another one is worth (law 11)."""

from __future__ import annotations

import pytest

from kvmsupervisor.domain.history import (
    EPOCHS_PER_HISTORY,
    KEPT,
    Era,
    HistoryFile,
    HistoryName,
    Verdict,
    Witness,
    Witnesses,
    digest_of,
    is_older,
    judge_now,
    spoken_in,
)
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage

SEEN = Witness(key="/a", revision=10, digest=digest_of(b"x"))


def test_the_newest_keys_are_kept() -> None:
    """Each key once, as it was observed last, whatever the order; keys that are no text are passed over."""
    witnesses = Witnesses()
    assert not witnesses
    for revision in range(1, 200):
        assert witnesses.saw(f"/{revision % 50}".encode(), revision, b"x")
    assert not witnesses.saw(b"/49", 1, b"older")
    assert not witnesses.saw(b"\xff", 999, b"no text")
    assert [one.revision for one in witnesses.newest()] == list(range(199, 199 - KEPT, -1))
    assert witnesses.saw(b"/9", 500, None)
    assert witnesses.newest()[0] == Witness(key="/9", revision=500, digest="")
    assert Witnesses(witnesses.newest()).newest() == witnesses.newest()


@pytest.mark.parametrize(
    ("revision", "value", "verdict"),
    [
        (10, b"x", Verdict.SAME),
        (10, b"y", Verdict.OTHER),
        (9, b"x", Verdict.OTHER),
        (11, b"x", Verdict.UNPROVEN),
        (None, None, Verdict.UNPROVEN),
    ],
)
def test_what_a_key_says_after_a_compaction(revision: int | None, value: bytes | None, verdict: Verdict) -> None:
    """A key never goes back to an older revision; what was written or deleted since says nothing."""
    assert judge_now(SEEN, revision, value) is verdict


@pytest.mark.parametrize("record", [HistoryName(id="a", hosts=("x",)), HistoryFile(id="a", witnesses=(SEEN,))])
def test_records_are_read_as_they_were_written(record: HistoryName | HistoryFile) -> None:
    """A newer version, and what is none, is not read."""
    assert type(record).from_json(record.to_json()) == record
    assert (
        type(record).from_json(record.to_json().replace(b'"version":1', b'"version":2').replace(b": 1", b": 2")) is None
    )
    for nonsense in (b"", b"[]", b"5", b"{"):
        assert type(record).from_json(nonsense) is None


def lock(epoch: int, incarnation: str) -> Lock:
    return Lock(host=HostName("h"), boot_id="b", epoch=epoch, state=LockState.RUNNING, incarnation=incarnation)


def test_of_two_incarnations_exactly_one_is_older() -> None:
    """The epoch decides; where a backup has brought about two that are equal, the name does, on both hosts alike."""
    for mine, other in (((3, "a"), (2, "z")), ((3, "b"), (3, "a"))):
        assert is_older(lock(*other), epoch=mine[0], incarnation=mine[1])
        assert not is_older(lock(*mine), epoch=other[0], incarnation=other[1])
    assert not is_older(lock(3, "a"), epoch=3, incarnation="a")


def test_who_waits_for_whom() -> None:
    """What storage can fence waits for a while; what it cannot, for ever; nobody for nobody."""
    era = Era(number=2, awaited=("b",), until=10.0)
    assert era.keeps_waiting(Storage.UNFENCEABLE, 1e9)
    assert era.keeps_waiting(Storage.RBD, 9.0)
    assert not era.keeps_waiting(Storage.RBD, 10.0)
    assert not Era(number=2).keeps_waiting(Storage.UNFENCEABLE, 0.0)
    assert era.epoch_floor == 2 * EPOCHS_PER_HISTORY
    assert spoken_in({"a": "n", "b": "", "c": "m"}, "n") == {"a"}


def test_what_is_another_clusters() -> None:
    """What came with the change, and from a host that was never seen in this cluster."""
    era = Era(foreign=True, since=10, members=frozenset({"b"}))
    assert era.is_strange("x", 10)
    assert not era.is_strange("x", 11)
    assert not era.is_strange("b", 10)
    assert not Era(since=10).is_strange("x", 10)
