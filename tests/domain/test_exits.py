"""Why a QEMU process ended: each kind told apart, in words for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.exits import SHUTDOWN_REASONS, Exit, ExitClass, WaitStatus, classify, last_error

CLEAN = WaitStatus(code=0)
LOG = ["qemu-system-x86_64: warning: TCG doesn't support requested feature", "qemu-system-x86_64: -m x: bad size"]


@pytest.mark.parametrize(("shutdown", "kind"), SHUTDOWN_REASONS.items())
def test_qemus_own_word_counts(shutdown: str, kind: ExitClass) -> None:
    """Law: a SHUTDOWN reason that this release knows names the end, and is what people read."""
    assert classify(shutdown=shutdown, status=CLEAN, log_tail=[]) == Exit(kind, kind.value)


def test_a_signal_outranks_what_was_announced() -> None:
    """Law: killed is killed, even when a shutdown had been announced before."""
    end = classify(shutdown="guest-shutdown", status=WaitStatus(signal=9), log_tail=LOG)
    assert end == Exit(ExitClass.CRASHED, "crashed (signal 9)")


@pytest.mark.parametrize("status", [WaitStatus(signal=9), WaitStatus()])
def test_what_its_guard_killed_is_no_mystery(status: WaitStatus) -> None:
    """Law 7: killed by its guard is said to be so, also when nobody saw how it ended."""
    end = classify(shutdown=None, status=status, log_tail=LOG, guard_killed_at="2026-01-01T00:00:00Z")
    assert end.kind is ExitClass.GUARD
    assert end.text.startswith("killed by its guard at 2026-01-01T00:00:00Z, because its host's session had run out")
    assert not end.is_clean


@pytest.mark.parametrize("status", [WaitStatus(signal=11), WaitStatus(code=1), CLEAN])
def test_an_end_of_its_own_is_not_its_guards(status: WaitStatus) -> None:
    """Law: what ended otherwise, before the guard's signal came, ended otherwise."""
    end = classify(shutdown=None, status=status, log_tail=[], guard_killed_at="2026-01-01T00:00:00Z")
    assert end == classify(shutdown=None, status=status, log_tail=[])


def test_a_failed_start_says_qemus_own_last_line() -> None:
    """Law: `failed: <QEMU's own last error line>`, without the program's name and without warnings."""
    log = [*LOG, "qemu-system-x86_64: warning: something harmless", "  "]
    end = classify(shutdown=None, status=WaitStatus(code=1), log_tail=log)
    assert end == Exit(ExitClass.FAILED, "failed: -m x: bad size")


def test_a_failure_without_a_word_is_told_by_its_status() -> None:
    """Law: no reason is ever empty."""
    end = classify(shutdown=None, status=WaitStatus(code=7), log_tail=[])
    assert end.kind is ExitClass.FAILED
    assert "exit status 7" in end.text


@pytest.mark.parametrize("shutdown", [None, "a-cause-of-a-newer-qemu"])
def test_what_nobody_explains_is_unknown(shutdown: str | None) -> None:
    """Law: a cause that this release does not know is neither clean nor lost: it is quoted."""
    end = classify(shutdown=shutdown, status=CLEAN, log_tail=[])
    assert end.kind is ExitClass.UNKNOWN
    assert (shutdown or "no SHUTDOWN event") in end.text


def test_an_end_that_nobody_saw_has_its_last_words() -> None:
    """Law: the end of a process that died between two supervisors is told from its log, and is no success."""
    end = classify(shutdown=None, status=WaitStatus(), log_tail=LOG)
    assert end == Exit(ExitClass.UNKNOWN, "ended while no supervisor watched; last words: -m x: bad size")
    assert not end.is_clean


def test_only_a_guests_own_shutdown_is_clean() -> None:
    """Law: `restart=on-failure` restarts whatever the guest did not mean."""
    assert {kind for kind in ExitClass if Exit(kind, "").is_clean} == {ExitClass.GUEST_SHUTDOWN}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], None),
        (["", "  "], None),
        (["qemu-system-x86_64: a", "qemu-system-x86_64: b"], "b"),
        (["/usr/bin/qemu-system-x86_64: a: b"], "a: b"),
        (["qemu-system-x86_64: error", "qemu-system-x86_64: warning: w"], "error"),
        (["qemu-system-x86_64: warning: only this"], "warning: only this"),
        (["libspice: address already in use"], "libspice: address already in use"),
        (
            [
                "qemu-system-x86_64: warning: Spice: ../server/reds.cpp:2585:reds_init_socket: bind failed",
                "qemu-system-x86_64: warning: Spice: ../server/reds.cpp:3442:init: Failed to open SPICE sockets",
                "qemu-system-x86_64: failed to initialize spice server",
            ],
            "failed to initialize spice server: bind failed",
        ),
    ],
)
def test_the_line_that_tells_most(lines: list[str], told: str | None) -> None:
    """Law: the last line that is no warning, else the last; the program's name is no news."""
    assert last_error(lines) == told


@given(
    st.none() | st.text(),
    st.builds(WaitStatus, code=st.none() | st.integers(0, 255), signal=st.none() | st.integers(1, 64)),
    st.lists(st.text()),
)
def test_every_end_has_a_kind_and_words(shutdown: str | None, status: WaitStatus, log_tail: list[str]) -> None:
    """Law: classifying is total, whatever QEMU wrote."""
    end = classify(shutdown=shutdown, status=status, log_tail=log_tail)
    assert end.text
    assert (end.kind is ExitClass.CRASHED) == (status.signal is not None)


def test_who_aborts_has_said_why() -> None:
    """Law: the last words count when QEMU ended itself (SIGABRT); one that was killed said them of other things."""
    words = ["qemu-system-x86_64: kvm.c:3183: kvm_buf_set_msrs: Assertion `ret == n' failed."]
    told = {number: classify(shutdown=None, status=WaitStatus(signal=number), log_tail=words).text for number in (6, 9)}
    assert told == {
        6: "crashed (signal 6): kvm.c:3183: kvm_buf_set_msrs: Assertion `ret == n' failed.",
        9: "crashed (signal 9)",
    }
