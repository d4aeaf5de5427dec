"""A supervisor is killed, or gets an error of etcd's, at each step of a live move; the next one goes on.

Whatever is cut off: one guest runs in the end, there never were two, and every lock follows the last as the law says.
"""

from __future__ import annotations

import signal

import pytest

from kvmsupervisor.domain.status import Phase
from tests.chaos.armed import FAIL, FOLDER, FREEZE, KILL, REST, Points
from tests.e2e.test_live_move import LISTEN
from tests.e2e.test_two_hosts import watched
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.lock_history import check_lock_history

SOURCE = (
    *("before CALL", "connected to the target", "before ANNOUNCE", "before SEND", "sending", "before SWITCH"),
    *("switching", "before GIVE", "handing over", "handed over"),
)
TARGET = (
    *("before OFFER", "before RECEIVE", "before TELL", "clients of the arrival known", "before ARRIVE", "arriving"),
    *("arrival on record", "before SETTLE"),
)
STEPS = [*(("alpha", name) for name in SOURCE), *(("beta", name) for name in TARGET)]


def armed(hosts: Hosts, name: str, **more: str) -> tuple[Host, Points]:
    """A host whose supervisor has failpoints."""
    host = hosts(name, KVM_SHUTDOWN_TIMEOUT="1", **LISTEN)
    folder = host.folder / "points"
    folder.mkdir()
    host.settings |= {FOLDER: str(folder), **more}
    host.entry = "tests.chaos.armed"
    host.start()
    return host, Points(folder)


@pytest.mark.parametrize("way", [KILL, FAIL])
@pytest.mark.parametrize("step", STEPS, ids=[name for _, name in STEPS])
def test_cut_off(keys: Keys, hosts: Hosts, tiny: str, step: tuple[str, str], way: str) -> None:
    """Law 13: each step may be cut anywhere."""
    where, name = step
    (alpha, at_alpha), (beta, at_beta) = (armed(hosts, host) for host in ("alpha", "beta"))
    host, points = (alpha, at_alpha) if where == "alpha" else (beta, at_beta)
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        alpha.wait_running("1")
        points.arm(name, way)
        keys.put("1", host="beta")
        eventually(f"{name} is come to", lambda: points.was_met)
        if way == KILL:
            eventually("its end", lambda: not host.running)
            host.start()
        beta.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.run_state == "running" and s.pid is not None)
        eventually("one QEMU", lambda: len(alpha.qemus()) == 0 and len(beta.qemus()) == 1)
    check_lock_history(keys, "1")


@pytest.mark.parametrize("way", [KILL, FAIL])
@pytest.mark.parametrize("name", ["before CANCEL", "before CALL_OFF"])
def test_cut_off_on_the_way_back(keys: Keys, hosts: Hosts, tiny: str, name: str, way: str) -> None:
    """Law 13: so may those by which it is called off: it runs on where it was."""
    more = {"KVM_MIGRATION_BANDWIDTH": "1"}
    alpha, at_alpha = armed(hosts, "alpha")
    alpha.stop()
    alpha.settings |= more
    alpha.start()
    beta, _ = armed(hosts, "beta")
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=3072, extra_flags=tiny)
        (before,) = alpha.wait_running("1").values()
        keys.put("1", host="beta")
        eventually("the transfer", lambda: (lock := keys.lock("1")) and lock.to)
        at_alpha.arm(name, way)
        keys.put("1", host="alpha")
        eventually(f"{name} is come to", lambda: at_alpha.was_met)
        if way == KILL:
            eventually("its end", lambda: not alpha.running)
            alpha.start()
        alpha.wait_running("1")
        beta.wait_forgotten("1")
        assert before.alive
        assert beta.qemus() == []
    check_lock_history(keys, "1")


def hit(host: Host, points: Points, name: str, way: str) -> None:
    """Arm a point for a supervisor that is frozen, let it go on, and come to that."""
    points.arm(name, way)
    host.thaw()
    eventually(f"{name} is come to", lambda: points.was_met)
    if way == KILL:
        eventually("its end", lambda: not host.running)
        host.start()


@pytest.mark.parametrize("way", [KILL, FAIL])
def test_cut_off_where_a_guest_that_was_sent_goes_back(keys: Keys, hosts: Hosts, tiny: str, way: str) -> None:
    """Law 13: all of it has arrived, and etcd refuses the hand-over, as `host` was written back: it goes on here."""
    (alpha, at_alpha), (beta, _) = (armed(hosts, name) for name in ("alpha", "beta"))
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        (before,) = alpha.wait_running("1").values()
        at_alpha.arm("before GIVE", FREEZE)
        keys.put("1", host="beta")
        eventually("all is sent", lambda: at_alpha.was_met)
        keys.put("1", host="alpha")
        hit(alpha, at_alpha, "before GO_BACK", way)
        alpha.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.run_state == "running")
        eventually("nobody waits there", lambda: beta.qemus() == [])
        assert before.alive
    check_lock_history(keys, "1")


@pytest.mark.parametrize("way", [KILL, FAIL])
def test_cut_off_where_a_target_takes_no_more(keys: Keys, hosts: Hosts, tiny: str, way: str) -> None:
    """Law 13: the target's QEMU hangs while the rest is sent, so the connection is cut: the guest goes on here."""
    alpha, at_alpha = armed(hosts, "alpha", **{REST: "1"})
    beta, _ = armed(hosts, "beta")
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        (before,) = alpha.wait_running("1").values()
        at_alpha.arm("switching", FREEZE)
        keys.put("1", host="beta")
        eventually("its guest is stopped", lambda: at_alpha.was_met)
        (hangs,) = beta.qemus()
        hangs.signal(signal.SIGSTOP)
        hit(alpha, at_alpha, "before CUT", way)
        keys.put("1", host="alpha")
        alpha.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.run_state == "running")
        assert before.alive
        hangs.signal(signal.SIGCONT)
        eventually("nobody waits there", lambda: beta.qemus() == [])
    check_lock_history(keys, "1")
