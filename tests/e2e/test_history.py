"""Law 11 with real etcds, supervisors and QEMUs: a restored, emptied or swapped etcd ends no guest and doubles none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually
from tests.support.etcd import EtcdCluster, EtcdServer

DISK = "-blockdev driver=null-co,node-name=disk"
BRISK: dict[str, Any] = {"KVM_SESSION_TTL": "3", "KVM_SHUTDOWN_TIMEOUT": "0", "KVM_TAKEOVER_WAIT": "5"}


@pytest.fixture
def keys(etcd_alone: EtcdServer) -> Keys:
    """The keys of an etcd of this test's own."""
    return Keys(etcd_alone)


@pytest.fixture
def disk(tiny: str) -> str:
    """`extra_flags` of a machine that writes to what no storage can fence."""
    return f"{tiny} {DISK}"


def save(etcd: EtcdCluster, folder: Path) -> Path:
    snapshot = folder / "snapshot.db"
    etcd.ctl("snapshot", "save", str(snapshot), endpoint=etcd.endpoints[0])
    return snapshot


def again(host: Host, one: str, before: dict[str, Qemu]) -> Qemu:
    """Have a machine started again, so that its epoch grows."""
    host.keys.put(one, restart_request=str(time.time()))
    # Its old process may be gone while the status still tells of it.
    host.wait_for(one, lambda status: status.phase is Phase.RUNNING and status.pid not in {None, before[one].pid})
    return host.qemu(one)


def changed(host: Host) -> None:
    """The host has noticed, read everything anew and said so."""
    eventually("another history to be noticed", lambda: host.metric("history_changes_total") == 1)
    eventually("the host to speak", lambda: host.events("history.spoken"))
    host.wait_ready()


@pytest.mark.parametrize("past", [False, True], ids=["older revision", "written past"])
def test_an_older_backup(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path, past: bool) -> None:
    """Same processes, locks written again with their epochs; a machine made since the backup is held."""
    etcd, member = keys.etcd, keys.etcd.members[0]
    host = hosts(**BRISK).start()
    keys.machines(host.name, "1", ram=16, extra_flags=tiny)
    keys.machines(host.name, "2", ram=16, extra_flags=f"{tiny} {DISK}")
    before = host.wait_running("1", "2")
    snapshot = save(etcd, tmp_path)
    qemus = {one: again(host, one, before) for one in before}
    keys.machines(host.name, "3", ram=16, extra_flags=tiny)
    qemus |= host.wait_running("3")
    locks = {one: keys.lock(one) for one in qemus}
    seen = keys.revision
    member.restore(snapshot)
    if past:
        # Nobody is connected meanwhile: by another port, then by the one that is known.
        port, member.client_port = member.client_port, member.metrics_port + 1
        etcd.repair()
        while keys.revision < seen + 10:
            keys.write("/elsewhere", "x")
        member.kill()
        member.client_port = port
    etcd.repair()
    changed(host)
    for one, lock in locks.items():
        eventually(f"the lock of {one}", lambda one=one, lock=lock: keys.lock(one) == lock)  # type: ignore[misc]
    assert host.metric("removals_held") == 1
    assert host.wait_running(*qemus) == qemus
    shown = host.cli("confirm-removal", "--yes")
    assert "3: host was 'alpha', now removed" in shown.stdout, shown
    host.wait_forgotten("3")
    assert {one: host.wait_running(one)[one] for one in "12"} == {one: qemus[one] for one in "12"}


def test_lost_data(etcd_alone: EtcdServer, keys: Keys, hosts: Hosts, disk: str) -> None:
    """One machine alone is held, too; with its keys written again nothing has happened."""
    host = hosts(**BRISK).start()
    keys.machines(host.name, "1", ram=16, extra_flags=disk)
    qemus = host.wait_running("1")
    etcd_alone.member.lose_data()
    etcd_alone.repair()
    changed(host)
    host.wait_for("1", lambda status: status.held)
    assert "held" in host.cli("check").stdout
    host.kill9()
    host.start()
    host.wait_for("1", lambda status: status.held)
    keys.machines(host.name, "1", ram=16, extra_flags=disk)
    host.wait_for("1", lambda status: not status.held and status.reason == "runs")
    assert host.wait_running("1") == qemus


@contextmanager
def counting(*hosts: Host) -> Iterator[Counter[int]]:
    """Count, all the time, how often there were how many QEMUs on all hosts together."""
    seen: Counter[int] = Counter()
    stop = Event()

    def look() -> None:
        while not stop.wait(0.02):
            seen[sum(len(host.qemus()) for host in hosts)] += 1

    thread = Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_a_machine_that_moved_since_the_backup(
    etcd_alone: EtcdServer, keys: Keys, hosts: Hosts, disk: str, tmp_path: Path
) -> None:
    """Its disk cannot be fenced, and keys and lock say that it is the first host's: one QEMU, at every moment."""
    alpha, beta = (hosts(name, **BRISK).start() for name in ("alpha", "beta"))
    keys.machines("alpha", "1", ram=16, extra_flags=disk)
    alpha.wait_running("1")
    snapshot = save(etcd_alone, tmp_path)
    keys.put("1", host="beta")
    qemus = beta.wait_running("1")
    alpha.wait_forgotten("1")
    with counting(alpha, beta) as seen:
        beta.freeze()
        etcd_alone.member.restore(snapshot)
        etcd_alone.repair()
        eventually("alpha to notice", lambda: alpha.metric("history_changes_total") == 1)
        alpha.wait_for("1", lambda status: "beta has said there what runs" in status.reason)
        # Longer than a takeover waits.
        time.sleep(6)
        assert alpha.qemus() == []
        beta.thaw()
        changed(beta)
        alpha.wait_for("1", lambda status: "beta holds its lock" in status.reason)
        eventually("the status key", lambda: (found := keys.status("1")) and found.host == "beta")
    assert set(seen) == {1}
    assert beta.wait_running("1") == qemus


def test_one_member_restored_alone(etcd_cluster: EtcdCluster, tmp_path: Path, tiny: str) -> None:
    """It answers at an address that is known, with an older history: it is left, and the others are asked."""
    keys = Keys(etcd_cluster)
    with Host(keys, **BRISK) as host:
        host.start()
        snapshot = save(etcd_cluster, tmp_path)
        keys.machines(host.name, "1", ram=16, extra_flags=tiny)
        qemus = host.wait_running("1")
        first, *others = etcd_cluster.members
        first.restore(snapshot)
        first.start()
        first.wait_ready()
        for member in others:
            # Whoever was asked is gone for a moment: the restored one gets its turn.
            member.restart()
            member.wait_ready()
            time.sleep(1)
        keys.endpoint = others[0].endpoint
        # Of this write: the status that follows it is not among the wishes, and has a later one.
        revision = keys.put("1", description="x")
        eventually("the host to follow", lambda: host.metric("watch_revision") >= revision)
        host.wait_ready()
        assert host.metric("history_changes_total") == 0
        assert host.wait_running("1") == qemus


def test_another_clusters_endpoint(keys: Keys, hosts: Hosts, disk: str, tiny: str) -> None:
    """A wrong endpoint for one run, and right again: its machine of that id and ours do not know of each other."""
    with EtcdServer() as other:
        theirs = Keys(other)
        with Host(theirs, "gamma", **BRISK) as gamma:
            gamma.start()
            theirs.machines("gamma", "1", ram=16, extra_flags=disk)
            their_qemus = gamma.wait_running("1")
            their_lock = theirs.lock("1")
            host = hosts(**BRISK).start()
            keys.machines(host.name, "1", ram=16, extra_flags=disk)
            keys.machines(host.name, "2", ram=16, extra_flags=tiny)
            qemus = host.wait_running("1", "2")
            lock = keys.lock("1")
            host.stop()
            host.settings["ETCD_ENDPOINTS"] = other.endpoint
            host.start()
            host.wait_for("1", lambda status: status.held and "another history" in status.reason)
            host.wait_for("2", lambda status: status.held)
            assert theirs.session("alpha")
            time.sleep(2)
            assert theirs.lock("1") == their_lock
            assert gamma.wait_running("1") == their_qemus
            host.stop()
            host.settings["ETCD_ENDPOINTS"] = ",".join(keys.etcd.endpoints)
            host.start()
            for one in qemus:
                host.wait_for(one, lambda status: not status.held and status.reason == "runs")
            assert host.wait_running("1", "2") == qemus
            assert keys.lock("1") == lock
            assert keys.get(keys.layout.session_key(HostName("alpha")))
            assert theirs.get(theirs.layout.status_key(InstanceId("1")))
