"""Machines on a real Ceph, two real supervisors, QEMUs whose guests do nothing but write: who writes, and who cannot.

What a guest wrote is read from its image; no list of processes is asked who is right.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import LockState
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Qemu, eventually
from tests.support.farm import Farm


def kill_all(host: Host) -> None:
    """As the host's power fails."""
    host.kill9()
    for qemu in host.qemus():
        qemu.kill()


def test_a_machine_on_ceph(farm: Farm) -> None:
    """Law 3: its guest writes once its client is on record. A crash is fenced, and it writes again without waiting.

    An end in order leaves nothing to fence.
    """
    alpha = farm.host("alpha")
    farm.machine("alpha")
    first = alpha.wait_running("1")["1"]
    assert {farm.address} == farm.ceph.watchers(farm.image.name)
    farm.writes()
    assert not (alpha.run_dir / "1" / "farm.ceph.key").exists()
    dead = farm.address
    first.kill()
    second = eventually(
        "the next one", lambda: next((q for q in alpha.qemus() if q.alive and q.pid != first.pid), None)
    )
    assert isinstance(second, Qemu)
    alpha.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid == second.pid)
    farm.writes()
    assert dead in farm.ceph.blocklist()
    assert alpha.metric("fences_total") == 1
    assert farm.lock().fence == ()
    living = farm.address
    farm.keys.put("1", restart_request="now")
    alpha.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, second.pid})
    farm.writes()
    assert living not in farm.ceph.blocklist()
    assert alpha.metric("fences_total") == 1


def test_a_dead_host(farm: Farm) -> None:
    """Law 4: a lock is taken from a host without session, its clients are fenced first, and the guest writes on."""
    alpha, beta = farm.pair(1)
    farm.machine("beta")
    beta.wait_running("1")
    farm.writes()
    before = farm.lock()
    kill_all(beta)
    farm.keys.put("1", host="alpha")
    alpha.wait_running("1")
    farm.writes()
    lock = farm.lock()
    assert (lock.host, lock.epoch, lock.state) == ("alpha", before.epoch + 1, LockState.RUNNING)
    assert lock.fence == before.clients
    assert set(before.clients) <= farm.ceph.blocklist()
    assert not set(lock.clients) & farm.ceph.blocklist()
    assert alpha.metric("takeovers_total") == 1
    assert alpha.metric("fences_total") == 1


def test_a_host_that_lost_etcd_only(farm: Farm) -> None:
    """Laws 4 and 6: while its guest has the disk open a takeover waits, and says so; in time, its host lets go."""
    alpha, beta = farm.pair(600)
    farm.machine("beta")
    qemu = beta.wait_running("1")["1"]
    own = farm.address
    beta.freeze()
    farm.keys.put("1", host="alpha")
    status = alpha.wait_for("1", lambda s: "but its disks are in use" in s.reason)
    assert own in status.reason
    assert status.phase is Phase.WAITING
    farm.writes()
    assert qemu.alive
    beta.thaw()
    alpha.wait_running("1")
    farm.writes()
    assert not qemu.alive
    assert own not in farm.ceph.blocklist()
    assert alpha.metric("takeovers_total") == 0


def test_a_frozen_host_wakes_up(farm: Farm) -> None:
    """Laws 4 and 6: a host that was frozen with its QEMU finds it fenced, kills it, and says whose the lock is."""
    alpha, beta = farm.pair(1)
    farm.machine("beta")
    old = beta.wait_running("1")["1"]
    farm.writes()
    beta.freeze()
    old.signal(signal.SIGSTOP)
    farm.keys.put("1", host="alpha")
    new = alpha.wait_running("1")["1"]
    farm.writes()
    # First the QEMU alone, which is what could do harm; then the supervisor that looks after it.
    old.signal(signal.SIGCONT)
    eventually("the old guest to be stopped", lambda: beta.run_state(old) == "io-error")
    beta.thaw()
    eventually("the old QEMU to be killed", lambda: not old.alive)
    eventually("beta to say why", lambda: "its lock has gone to alpha" in beta.log)
    beta.wait_forgotten("1")
    assert alpha.wait_running("1") == {"1": new}
    farm.writes()


def test_a_guest_that_somebody_has_shut_out(farm: Farm) -> None:
    """Its lock is its own, so nobody ends it. `cont` does not help, and its reason says what does."""
    alpha = farm.host("alpha")
    farm.machine("alpha")
    first = alpha.wait_running("1")["1"]
    farm.writes()
    address = farm.address
    farm.ceph.ceph("osd", "blocklist", "add", address, "3600")
    status = alpha.wait_for("1", lambda s: "is shut out in Ceph" in s.reason)
    assert address in status.reason
    alpha.ask("1", "cont")
    eventually("its guest to be stopped again", lambda: alpha.run_state(first) == "io-error")
    farm.keys.put("1", restart_request="now:1")
    alpha.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, first.pid})
    farm.writes()
    assert not first.alive


def test_failover(farm: Farm) -> None:
    """Law 4, and the key `hosts`: the power of a host fails, and its machine writes again on another, by itself."""
    alpha, beta = farm.pair(60)
    farm.machine("beta", hosts="beta alpha")
    beta.wait_running("1")
    farm.writes()
    before = farm.lock()
    begin = time.monotonic()
    kill_all(beta)
    alpha.wait_running("1")
    farm.writes()
    print(f"killed to writing again: {time.monotonic() - begin:.1f} s")  # noqa: T201 - a figure for docs/ceph.md
    lock = farm.lock()
    assert (lock.host, set(lock.fence)) == ("alpha", set(before.clients))
    # Its keys stay as people wrote them (law 10).
    assert farm.keys.get(farm.keys.layout.wish_key(InstanceId("1"), "host")) == b"beta"
    assert alpha.wait_for("1", lambda s: s.placed_for == "beta").host == "alpha"
    assert set(before.clients) <= farm.ceph.blocklist()
    # Back again, beta finds nothing that is its own.
    beta.start()
    farm.writes()
    assert beta.qemus() == []
    assert alpha.metric("takeovers_total") == 1


def test_without_ceph_nothing_is_taken(farm: Farm) -> None:
    """Law 4: while Ceph does not answer there is no takeover and no start, and it is said; then it goes on."""
    # Ceph's tools give up by themselves then. That they are killed if they do not, tests/cluster/test_fencing.py holds.
    alpha = farm.host("alpha", KVM_TAKEOVER_WAIT="0", CEPH_ARGS="--client-mount-timeout=2")
    beta = farm.host("beta")
    farm.machine("beta")
    beta.wait_running("1")
    kill_all(beta)
    farm.ceph.stop_mon()
    try:
        farm.keys.put("1", host="alpha")
        alpha.wait_for("1", lambda s: "Ceph does not answer" in s.reason)
        assert farm.lock().host == "beta"
        assert alpha.qemus() == []
    finally:
        farm.ceph.cont_mon()
    alpha.wait_running("1")
    farm.writes()


def test_what_is_wrong_with_a_disk(farm: Farm, tiny: str) -> None:
    """Law 5: an image that is missing or leaves no trace, a pool that is not there: told, waited for, others go on."""
    alpha = farm.host("alpha")
    bare = f"{farm.image.name}-bare"
    farm.ceph.rbd_create(bare, features="layering")
    farm.keys.machines("alpha", "missing", ram=16, rbd=f"{farm.image.name}-missing")
    farm.keys.machines("alpha", "pool", ram=16, rbd="nopool/x")
    farm.keys.machines("alpha", "bare", ram=16, rbd=bare)
    farm.keys.machines("alpha", "fine", ram=16, rbd=farm.image.name)
    farm.keys.machines("alpha", "diskless", ram=16, extra_flags=tiny)
    alpha.wait_running("fine", "diskless")
    for instance, said in (
        ("missing", "there is no such image"),
        ("pool", "there is no such pool"),
        ("bare", f"rbd feature enable {bare} exclusive-lock"),
    ):
        status = alpha.wait_for(instance, lambda s, said=said: said in s.reason)  # type: ignore[misc]
        assert status.phase is Phase.WAITING
        assert farm.keys.lock(instance) is None


def test_a_wrong_key(farm: Farm, tmp_path: Path, tiny: str) -> None:
    """A keyring of another cluster is told of, and starts nothing that needs it; others go on."""
    conf = tmp_path / "ceph.conf"
    lines = [line for line in farm.ceph.conf.read_text().splitlines() if not line.startswith("keyring")]
    conf.write_text("\n".join([*lines, f"keyring = {tmp_path}/keyring", ""]))
    (tmp_path / "keyring").write_text("[client.vm]\nkey = AQBkV3RmAAAAABAAjkRe1kqUoEmW2o0UmbOczA==\n")
    alpha = farm.host("alpha", CEPH_CONF=str(conf))
    farm.machine("alpha")
    farm.keys.machines("alpha", "diskless", ram=16, extra_flags=tiny)
    status = alpha.wait_for("1", lambda s: "its key is wrong" in s.reason)
    assert status.phase is Phase.WAITING
    assert farm.keys.lock("1") is None
    alpha.wait_running("diskless")


def test_an_unprivileged_qemu(farm: Farm, tmp_path: Path) -> None:
    """DESIGN §5: QEMU runs as nobody, has no keyring that it can read and no key on its command line; yet it writes."""
    conf = Path("/tmp") / f"kvs-{farm.image.image}.conf"
    try:
        shutil.copy(farm.ceph.conf, conf)
        conf.chmod(0o644)
        alpha = farm.host("alpha", CEPH_CONF=str(conf), KVM_QEMU_USER="nobody")
        farm.machine("alpha")
        qemu = alpha.wait_running("1")["1"]
        farm.writes()
        assert "Uid:\t0" not in Path(f"/proc/{qemu.pid}/status").read_text()
        key = farm.ceph.ceph("auth", "get-key", "client.vm").strip()
        assert not any(key in word for word in qemu.argv)
        assert "secret" in " ".join(qemu.argv)
    finally:
        conf.unlink(missing_ok=True)


def test_a_disk_grows(farm: Farm) -> None:
    """An image that was grown is larger for the running guest, once any key of the instance was written."""
    alpha = farm.host("alpha")
    farm.ceph.rbd_create(f"{farm.image.name}-data")
    farm.machine("alpha", **{"disk/1": f"{farm.image.name}-data iops=1000"})
    qemu = alpha.wait_running("1")["1"]
    farm.writes()
    for name in (farm.image.name, f"{farm.image.name}-data"):
        farm.ceph.rbd("resize", "--no-progress", "--size", "16M", name)
    farm.keys.put("1", **{"x-grown": "today"})

    def sizes() -> list[int]:
        return [disk["inserted"]["image"]["virtual-size"] for disk in alpha.ask(qemu.instance, "query-block")["return"]]

    eventually("the disks to be larger", lambda: sizes() == [16 << 20, 16 << 20])
    farm.writes()
    assert alpha.wait_running("1")["1"] == qemu


def test_uefi_variables_are_in_ceph(farm: Farm) -> None:
    """The variables of a machine whose first disk is in Ceph lie beside it, so that they go where it goes."""
    alpha = farm.host("alpha")
    farm.machine("alpha", ram=64, firmware="uefi")
    alpha.wait_running("1")
    assert len(farm.ceph.watchers(f"{farm.image.name}.nvram")) == 1
    assert set(farm.lock().clients) == farm.ceph.watchers(farm.image.name) | farm.ceph.watchers(
        f"{farm.image.name}.nvram"
    )
    assert not (alpha.folder / "state" / "1").exists()


def test_a_machine_that_was_killed_and_moved(farm: Farm) -> None:
    """Laws 4 and 9: who lets go of a lock shuts out what its dead QEMU left, so that nobody waits for its watch."""
    alpha, beta = farm.pair(60)
    farm.machine("alpha")
    dead = alpha.wait_running("1")["1"]
    farm.writes()
    address = farm.address
    alpha.freeze()
    dead.kill()
    farm.keys.put("1", host="beta")
    alpha.thaw()
    beta.wait_running("1")
    farm.writes()
    assert address in farm.ceph.blocklist()
    assert "is open elsewhere" not in beta.log
    alpha.wait_forgotten("1")


def test_a_machine_that_is_not_wanted_before_its_guest_ran(farm: Farm) -> None:
    """Law 3: a QEMU that is given up before its guest ran closes its disks: the next one finds nobody there."""
    alpha, beta = farm.host("alpha", KVM_SETTLE="60"), farm.host("beta")
    farm.machine("alpha")
    paused = eventually("a QEMU", lambda: next(iter(alpha.qemus()), None))
    assert isinstance(paused, Qemu)
    eventually("its watch", lambda: farm.ceph.watchers(farm.image.name))
    farm.keys.put("1", host="beta")
    beta.wait_running("1")
    farm.writes()
    assert not paused.alive
    assert "is open elsewhere" not in beta.log


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_how_long_a_machine_is_away(farm: Farm) -> None:
    """Law 4 with default settings (session 15 s, Ceph's watch 30 s): prints the figures of docs/reliability.md."""
    farm.ceph.ceph("tell", "osd.0", "config", "set", "osd_client_watch_timeout", "30")
    pair = {name: farm.host(name, KVM_SESSION_TTL="15") for name in ("alpha", "beta")}
    farm.machine("alpha", hosts="alpha beta")
    here, there = "alpha", "beta"
    figures: dict[str, list[float]] = {"QEMU killed": [], "host killed": []}
    for _ in range(3):
        qemu = pair[here].wait_running("1")["1"]
        farm.writes()
        begin = time.monotonic()
        qemu.kill()
        farm.writes()
        figures["QEMU killed"].append(time.monotonic() - begin)
        # A watch is told of every 5 s: it is forgotten 25 to 30 s after the death.
        pair[here].wait_for("1", lambda s, old=qemu.pid: s.phase is Phase.RUNNING and s.pid not in {None, old})  # type: ignore[misc]
        begin = time.monotonic()
        kill_all(pair[here])
        farm.writes()
        figures["host killed"].append(time.monotonic() - begin)
        pair[there].wait_running("1")
        pair[here].start()
        here, there = there, here
    for what, seconds in figures.items():
        print(f"{what}, to the next write: {', '.join(f'{one:.1f}' for one in seconds)} s")  # noqa: T201 - figures
