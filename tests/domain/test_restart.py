"""What follows an end: the policy, the pause, and what is remembered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.exits import Exit, ExitClass
from kvmsupervisor.domain.incarnation import InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.restart import after, pauses, rests
from kvmsupervisor.domain.spec import RestartPolicy, Spec, Wish
from kvmsupervisor.domain.timing import RESET_AFTER_S, RESTART_CAP_S

FRESH = InstanceState(boot_id="boot-1")
WISH = Wish(
    instance=InstanceId("1"), host=HostName("a"), host_revision=5, power_revision=6, spec=Spec(ram_mib=64), keys=2
)
CLEAN = Exit(ExitClass.GUEST_SHUTDOWN, "guest-shutdown")
CRASH = Exit(ExitClass.CRASHED, "crashed (signal 9)")
ENDS = st.sampled_from([Exit(kind, kind.value) for kind in ExitClass])


def ended(
    saved: InstanceState = FRESH,
    end: Exit = CRASH,
    wish: Wish | None = WISH,
    *,
    asked: bool = False,
    ran: bool = True,
    lived_s: float = 1.0,
    now: float = 1000.0,
    jitter: float = 0.5,
) -> InstanceState:
    return after(saved, end, wish, asked=asked, ran=ran, spawned_at=now - lived_s, now=now, jitter=jitter)


def under(policy: RestartPolicy) -> Wish:
    return replace(WISH, restart=policy)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=14))
def test_a_crash_loop_backs_off_with_full_jitter(jitters: list[float]) -> None:
    """Law (§4): the first restart at once; then anywhere below a ceiling that doubles from 1 s to 5 min."""
    saved = FRESH
    for number, jitter in enumerate(jitters):
        saved = ended(saved, jitter=jitter)
        ceiling = 0.0 if number == 0 else min(RESTART_CAP_S, 2.0 ** (number - 1))
        assert saved.pause_s == jitter * ceiling
        assert saved.not_before == 1000.0 + saved.pause_s
        assert saved.restarts == number + 1


def test_ten_minutes_of_running_reset_the_pause() -> None:
    """Law (§4): a machine that ran for 600 s has recovered, one that ran a second less has not."""
    tired = replace(FRESH, attempt=9, restarts=9)
    recovered = ended(tired, lived_s=RESET_AFTER_S)
    assert (recovered.attempt, recovered.pause_s) == (1, 0.0)
    assert recovered.restarts == 10
    assert ended(tired, lived_s=RESET_AFTER_S - 1).attempt == 10


@pytest.mark.parametrize(
    ("policy", "end", "stays_down"),
    [
        (RestartPolicy.ALWAYS, CLEAN, False),
        (RestartPolicy.ALWAYS, CRASH, False),
        (RestartPolicy.ON_FAILURE, CLEAN, True),
        (RestartPolicy.ON_FAILURE, CRASH, False),
        (RestartPolicy.NEVER, CLEAN, True),
        (RestartPolicy.NEVER, CRASH, True),
    ],
)
def test_the_policy_decides_what_follows(policy: RestartPolicy, end: Exit, stays_down: bool) -> None:
    """Law (§2): `restart` says what follows when QEMU or the guest ends by itself."""
    saved = ended(end=end, wish=under(policy))
    assert (saved.ended is not None) == stays_down
    assert saved.last_exit == end.text
    if saved.ended is not None:
        assert rests(saved.ended, under(policy))
        assert saved.restarts == 0


def test_the_end_that_was_asked_for_is_no_failure() -> None:
    """Law: a stop or restart by an operator clears the pause, counts as none, and leaves the policy out."""
    tired = replace(FRESH, attempt=9, not_before=2000.0, pause_s=100.0, restarts=9)
    saved = ended(tired, wish=under(RestartPolicy.NEVER), asked=True)
    assert saved == replace(FRESH, restarts=9, last_exit=CRASH.text)


def test_the_end_of_a_machine_that_never_ran_is_not_worth_telling() -> None:
    """Law: a QEMU that was discarded before its guest ran leaves the last real end in place."""
    before = replace(FRESH, last_exit="guest-panic")
    assert ended(before, asked=True, ran=False).last_exit == "guest-panic"


def test_without_a_wish_the_default_policy_counts() -> None:
    """Law: unread keys are no reason to stay down."""
    assert ended(wish=None, end=CLEAN).ended is None


@pytest.mark.parametrize(
    "order",
    [
        {"host_revision": 8},
        {"power_revision": 8},
        {"restart_request": "now"},
        {"restart": RestartPolicy.ALWAYS},
    ],
)
def test_a_fresh_order_wakes_what_rests(order: dict[str, object]) -> None:
    """Law: writing `host`, `power` or `restart_request` anew, or another policy, runs it again."""
    saved = ended(wish=under(RestartPolicy.NEVER))
    assert saved.ended is not None
    assert not rests(saved.ended, replace(under(RestartPolicy.NEVER), **order))  # type: ignore[arg-type]


def test_other_changes_let_it_rest() -> None:
    """Law: more memory is no order to start, nor is taking a restart request back."""
    asked_once = replace(under(RestartPolicy.NEVER), restart_request="r1")
    saved = ended(wish=asked_once)
    assert saved.ended is not None
    assert rests(saved.ended, replace(asked_once, spec=Spec(ram_mib=128), revision=99))
    assert rests(saved.ended, replace(asked_once, restart_request=None))


@given(
    st.lists(st.tuples(ENDS, st.booleans(), st.floats(0, 2000), st.floats(0, 1, exclude_max=True)), max_size=10),
    st.sampled_from(RestartPolicy),
)
def test_no_row_of_ends_makes_a_pause_out_of_bounds(
    row: list[tuple[Exit, bool, float, float]], policy: RestartPolicy
) -> None:
    """Law: whatever happened, the next start is due within five minutes, or waits for an order."""
    saved, now = FRESH, 1000.0
    for end, asked, lived_s, jitter in row:
        now += lived_s
        saved = ended(saved, end, under(policy), asked=asked, lived_s=lived_s, now=now, jitter=jitter)
        assert 0.0 <= saved.pause_s <= RESTART_CAP_S
        assert saved.not_before in {0.0, now + saved.pause_s}
        assert saved.ended is None or (saved.attempt, saved.pause_s) == (0, 0.0)


def test_changed_keys_end_the_pause() -> None:
    """A pause holds for the keys under which the process ended: writing one, or deleting one, ends it."""
    wish = Wish(instance=InstanceId("1"), revision=7, keys=3)
    saved = replace(FRESH, not_before=100.0, pause_s=60.0, revision=7, keys=3)
    assert pauses(saved, wish, 99.0)
    assert not pauses(saved, wish, 100.0)
    assert not pauses(saved, replace(wish, revision=8), 99.0)
    assert not pauses(saved, replace(wish, keys=2), 99.0)
    # Of an end under keys that nobody had read, nothing can be told.
    assert pauses(replace(saved, revision=0, keys=0), wish, 99.0)
