"""What live moves did to users of other systems, tried here. Each test names the report."""

from __future__ import annotations

import time

from kvmsupervisor.domain.lock import LockState
from kvmsupervisor.domain.status import Phase
from tests.e2e.test_live_move import pair, slow_move
from tests.e2e.test_two_hosts import watched
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import free_port
from tests.support.lock_history import check_lock_history


def test_a_network_that_is_silent_for_some_seconds(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """harvester/tests#2006: five seconds of silence in a transfer rebooted the guest. Here it goes on."""
    alpha, beta = slow_move(keys, hosts, tiny)
    (before,) = alpha.qemus()
    with watched(alpha, beta):
        beta.freeze()
        time.sleep(5)  # what is tried is just that time
        assert before.alive
        beta.thaw()
        beta.wait_running("1")
    assert len(alpha.events("move.given")) == 1
    assert alpha.events("instance.ended")[0]["reason"].startswith("killed by its supervisor: its lock has gone to beta")


def test_a_guest_that_ends_on_its_way(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """xcp-ng/xcp#141: a guest that was shut down on its way could never be started again, for what was left there."""
    alpha, beta = slow_move(keys, hosts, tiny)
    with watched(alpha, beta):
        alpha.ask("1", "quit")
        (after,) = beta.wait_running("1").values()
        assert "-incoming" not in after.argv
        eventually("one QEMU", lambda: len(beta.qemus()) == 1)
        alpha.wait_forgotten("1")
    check_lock_history(keys, "1")


def test_power_off_on_its_way(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """kubevirt#9585: what was begun could not be taken back. Here `power=off` ends the move, then the guest."""
    alpha, beta = slow_move(keys, hosts, tiny)
    keys.put("1", power="off")
    eventually("the end of it", lambda: keys.lock("1") is None)
    assert alpha.qemus() == []
    eventually("nobody waits there", lambda: beta.qemus() == [])


def test_a_source_that_dies_once_it_is_done(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """kubevirt#13112: a source that died after the hand-over made the good target be deleted. Here nobody minds."""
    alpha, beta = pair(hosts, KVM_SESSION_TTL="2")
    keys.machines("alpha", "1", ram=16, extra_flags=tiny)
    (before,) = alpha.wait_running("1").values()
    keys.put("1", host="beta")

    def is_given() -> bool:
        lock = keys.lock("1")
        return lock is not None and lock.host == "beta"

    eventually("the hand-over", is_given, poll_s=0.001)
    alpha.kill9()
    before.kill()
    (after,) = beta.wait_running("1").values()
    eventually("alpha's session is over", lambda: keys.session("alpha") is None)
    time.sleep(1)
    assert after.alive
    assert beta.status("1").phase is Phase.RUNNING  # type: ignore[union-attr]


def test_several_moves_in_a_row(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """incus#3487: the second of two moves in a row failed."""
    alpha, beta = pair(hosts)
    with watched(alpha, beta):
        keys.machines("alpha", "1", ram=16, extra_flags=tiny)
        alpha.wait_running("1")
        for turn in range(6):
            here, there = (alpha, beta) if turn % 2 == 0 else (beta, alpha)
            moved = here.cli("move", "1", there.name, "--wait")
            assert moved.returncode == 0, moved.stderr
            there.wait_running("1")
    locks = check_lock_history(keys, "1")
    assert sum(lock.state is LockState.GIVEN for lock in locks) == 6


def test_user_data_comes_along_byte_for_byte(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """kubevirt#1865, #665, cloudstack#11425: the medium with user data was missing there, or another one."""
    alpha, beta = pair(hosts)
    data = "#cloud-config\nhostname: moved\n"
    keys.machines("alpha", "1", ram=16, extra_flags=tiny, **{"user-data": data})
    alpha.wait_running("1")
    names = ("seed.iso", "config-2.iso")
    before = [(alpha.run_dir / "1" / name).read_bytes() for name in names]
    # What is changed now counts from the next restart on.
    keys.put("1", **{"user-data": data + "# later\n"})
    keys.put("1", host="beta")
    beta.wait_running("1")
    assert len(alpha.events("move.given")) == 1
    assert [(beta.run_dir / "1" / name).read_bytes() for name in names] == before
    assert "user-data" in beta.wait_for("1", lambda s: s.phase is Phase.RUNNING).pending


def test_a_display_port_that_is_taken_there(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """harvester#7965: refused late, tried again for ever, and nobody told why. Here it runs on, and is told."""
    alpha, beta = pair(hosts)
    port = free_port()
    keys.machines("alpha", "1", ram=64, extra_flags=tiny, spice_port=port)
    (before,) = alpha.wait_running("1").values()
    keys.put("1", host="beta")
    # Both hosts of this test have the same addresses.
    said = alpha.wait_for("1", lambda s: f"{port}" in s.reason)
    assert "beta does not take it" in said.reason
    assert said.phase is Phase.RUNNING
    assert before.alive
    assert beta.qemus() == []
