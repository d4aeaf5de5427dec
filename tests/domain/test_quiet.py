"""When a guest runs at once, and when more keys may follow (decision 0003). The cases are what people do with keys."""

from __future__ import annotations

from itertools import permutations

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import NOT_PLACED, Placed, Placement
from kvmsupervisor.domain.quiet import Quiet, is_complete
from kvmsupervisor.domain.spec import RawValue, Wish

NOW = 100.0
SETTLE_S = 0.5

VALUES = {
    "host": "a",
    "ram": "64",
    "mac": "52:54:00:12:34:56",
    "cpus": "2",
    "power": "on",
    "description": "for people",
}


class Keys:
    """One instance's keys, and what its supervisor makes of each write."""

    def __init__(self) -> None:
        self.now = NOW
        self._keys: dict[bytes, RawValue] = {}
        self._placed = NOT_PLACED
        self._revision = 0
        self._known: Wish | None = None
        self._quiet = Quiet(SETTLE_S)

    def put(self, **keys: str) -> None:
        """One transaction."""
        self._revision += 1
        self._keys |= {name.encode(): RawValue(value.encode(), self._revision) for name, value in keys.items()}

    def drop(self, name: str) -> None:
        self._revision += 1
        del self._keys[name.encode()]

    def place(self) -> None:
        """A supervisor writes a placement for the `host` that is there."""
        self._revision += 1
        of = self._keys[b"host"].mod_revision
        self._placed = Placed(
            self._revision, Placement(host=HostName("b"), why="failover", since="2026-01-01T00:00:00Z", of=of)
        )

    @property
    def wish(self) -> Wish:
        return parse_wish(InstanceId("1"), self._keys, self._placed)

    def waits(self) -> float:
        """Tell the supervisor; how long its guest waits from now on, seconds."""
        wish = self.wish
        self._quiet.heard(self._known, wish, self.now)
        self._known = wish
        return max(0.0, self._quiet.at - self.now)


@pytest.fixture
def keys() -> Keys:
    return Keys()


def test_one_transaction_is_complete(keys: Keys) -> None:
    keys.put(**VALUES)
    assert keys.waits() == 0


@pytest.mark.parametrize("seen_each", [True, False], ids=["each is seen", "seen at the end"])
@pytest.mark.parametrize("order", list(permutations(["host", "ram", "mac", "cpus"])), ids=" ".join)
def test_keys_that_come_one_by_one(keys: Keys, order: tuple[str, ...], seen_each: bool) -> None:
    """`host` last: at once. Any other key last: the guest waits, from that key on."""
    waits = 0.0
    for name in order:
        keys.put(**{name: VALUES[name]})
        if seen_each or name == order[-1]:
            waits = keys.waits()
        keys.now += 0.01
    assert waits == (0 if order[-1] == "host" else SETTLE_S)


def test_a_wait_ends_when_host_is_written_again(keys: Keys) -> None:
    for name in ("host", "ram"):
        keys.put(**{name: VALUES[name]})
    assert keys.waits() == SETTLE_S
    keys.put(host="a")
    assert keys.waits() == 0


def test_what_host_was_followed_by_waits_again(keys: Keys) -> None:
    """A guest whose `host` was not last, after all, waits if it has not run yet."""
    keys.put(ram="64")
    keys.put(host="a")
    assert keys.waits() == 0
    keys.put(mac=VALUES["mac"])
    assert keys.waits() == SETTLE_S


def test_a_key_that_shapes_no_machine_begins_no_wait(keys: Keys) -> None:
    keys.put(host="a", ram="64")
    keys.waits()
    keys.put(description="the shop")
    assert keys.waits() == 0


def test_it_does_not_end_a_wait_either(keys: Keys) -> None:
    keys.put(host="a")
    keys.put(ram="64")
    assert keys.waits() == SETTLE_S
    keys.put(description="the shop")
    assert keys.waits() == SETTLE_S


def test_several_keys_in_one_transaction_behind_others(keys: Keys) -> None:
    """`kvmsupervisor set web1 ram=128 cpus=2`: keys that come one by one do not come in transactions of several."""
    keys.put(host="a")
    assert keys.waits() == 0
    keys.put(ram="128", cpus="2")
    assert keys.waits() == 0


def test_a_later_edit_of_a_stopped_machine(keys: Keys) -> None:
    """It waits from the edit on. The `power=on` that follows later waits for nothing."""
    keys.put(host="a", ram="64", power="off")
    assert keys.waits() == 0
    keys.now += 3600
    keys.put(ram="128")
    assert keys.waits() == SETTLE_S
    keys.now += 0.2
    keys.put(power="on")
    assert keys.waits() == pytest.approx(SETTLE_S - 0.2)
    keys.now += 60
    keys.put(power="on")
    assert keys.waits() == 0


def test_a_deletion_may_be_one_of_several(keys: Keys) -> None:
    keys.put(host="a", ram="64", mac=VALUES["mac"])
    assert keys.waits() == 0
    keys.drop("mac")
    assert keys.waits() == SETTLE_S


def test_a_move_waits_for_nothing(keys: Keys) -> None:
    keys.put(host="a")
    keys.put(ram="64")
    keys.waits()
    keys.now += 3600
    keys.put(host="b")
    assert keys.waits() == 0


def test_a_takeover_waits_for_nothing(keys: Keys) -> None:
    """The host that takes it over hears of these keys for the first time, but they are not being written."""
    keys.put(host="a")
    keys.put(ram="64")
    assert not is_complete(keys.wish)
    keys.place()
    assert keys.waits() == 0


def test_a_placement_that_has_ended_is_no_word(keys: Keys) -> None:
    keys.put(host="a")
    keys.place()
    keys.put(host="b")
    keys.put(ram="64")
    assert not is_complete(keys.wish)
