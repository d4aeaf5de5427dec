"""Law 11 with real etcds, supervisors and QEMUs: a restored, emptied or swapped etcd ends no guest and doubles none.

Machines on Ceph, on files and diskless: some of each kind in the suite; one, two and twenty of each in the soak runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.request import urlopen
from uuid import uuid4

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.status import Phase, Status
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.etcd import EtcdCluster, EtcdMember, EtcdServer

FILE_DISK = "-blockdev driver=null-co,node-name=disk"
"""What no storage can fence, as a file."""

BRISK: dict[str, Any] = {
    "KVM_SESSION_TTL": "3",
    "KVM_SHUTDOWN_TIMEOUT": "0",
    "KVM_TAKEOVER_WAIT": "5",
    "KVM_QEMU_USER": "",
    "KVM_EXTRA_FLAGS": "any",
}

MIXED = ("rbd", "file", "diskless", "rbd")

CELLS = [
    pytest.param((kind,) * count, id=f"{count} {kind}", marks=pytest.mark.soak)
    for kind in ("rbd", "file", "diskless")
    for count in (1, 2, 20)
]

fleets = pytest.mark.parametrize("kinds", [pytest.param(MIXED, id="4 mixed"), *CELLS])

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def keys(request: pytest.FixtureRequest) -> Iterator[Keys]:
    """The keys of an etcd of this test's own; a parameter says of which release."""
    with EtcdServer(program=getattr(request, "param", "etcd")) as etcd:
        yield Keys(etcd)


class Fleet:
    """Machines named `1`, `2` and so on.

    Args:
        kinds: of their disks, in that order.
        tiny: flags of a machine without a guest.
        ceph: where images are made for those on Ceph; not asked for without one.
    """

    def __init__(self, kinds: tuple[str, ...], tiny: str, ceph: Callable[[], Ceph]) -> None:
        self.ids = [str(number) for number in range(1, len(kinds) + 1)]
        self.settings = dict(BRISK)
        self._wishes: dict[str, dict[str, str]] = {}
        for one, kind in zip(self.ids, kinds, strict=True):
            wishes = self._wishes[one] = {"ram": "16", "extra_flags": tiny}
            if kind == "file":
                wishes["extra_flags"] += f" {FILE_DISK}"
            elif kind == "rbd":
                # Removed by nobody: the cluster lives in memory, and no longer than the tests.
                wishes["rbd"] = f"{POOL}/{uuid4().hex[:8]}-{one}"
                ceph().rbd_create(wishes["rbd"])
                self.settings |= {"CEPH_CONF": str(ceph().conf), "CEPH_ID": "vm"}

    def create(self, keys: Keys, *ids: str, host: str = "alpha") -> None:
        """Write their keys, all at once."""
        write(keys, {one: {"host": host, **self._wishes[one]} for one in ids})


@pytest.fixture
def fleet(kinds: tuple[str, ...], tiny: str, request: pytest.FixtureRequest) -> Fleet:
    """The machines of one test."""

    def ceph() -> Ceph:
        found: Ceph = request.getfixturevalue("ceph_with_client")
        return found

    return Fleet(kinds, tiny, ceph)


@pytest.fixture(scope="session")
def ceph_with_client(ceph: Ceph) -> Ceph:
    """The cluster of this worker, with the client of the hosts."""
    ceph.new_client("vm", CLIENT_CAPS)
    return ceph


def write(keys: Keys, wishes: Mapping[str, Mapping[str, str]]) -> None:
    """Write keys of several instances at once."""
    keys.together(
        {
            keys.layout.wish_key(InstanceId(one), name): value.encode()
            for one, told in wishes.items()
            for name, value in told.items()
        }
    )


def save(etcd: EtcdCluster, folder: Path) -> Path:
    snapshot = folder / "snapshot.db"
    etcd.ctl("snapshot", "save", str(snapshot), endpoint=etcd.endpoints[0])
    return snapshot


def wait(host: Host, ids: list[str], wanted: Callable[[Status], bool]) -> None:
    for one in ids:
        host.wait_for(one, wanted)


def as_it_was(lock: Lock | None) -> Lock | None:
    """A lock, whatever the history is in which it was written: after a change of history that is another one."""
    return None if lock is None else replace(lock, history=None)


def runs(status: Status) -> bool:
    return status.reason == "runs" and not status.held and status.pid is not None


def changed(host: Host) -> None:
    """The host has noticed, read everything anew and said so."""
    eventually("another history to be noticed", lambda: host.metric("history_changes_total") == 1)
    eventually("the host to speak", lambda: host.events("history.spoken"))
    host.wait_ready()


def holds(host: Host, ids: list[str]) -> None:
    """These are held, and no others; metric, status and both commands say so."""
    wait(host, ids, lambda status: status.held)
    eventually("the metric", lambda: host.metric("removals_held") == len(ids))
    for one in ids:
        host.keys.wait_status(one, lambda status: status.held)
    checked, shown = host.cli("check").stdout, host.cli("confirm-removal").stdout
    assert f"holds the removal of {len(ids)} instances: {', '.join(ids)}" in shown.replace("\n", " ")
    for one in ids:
        assert f"{one}: host was 'alpha', now " in shown or f"{one}: power was 'on', now 'off'" in shown, shown
    assert checked.count("confirm-removal alpha") >= len(ids), checked


BUMP = 1_000_000
"""Of `--bump-revision`, as etcd's own page has it for a busy cluster."""


@pytest.mark.parametrize(
    ("keys", "how"),
    [("etcd", "older"), ("etcd", "written past"), ("etcd-trixie", "bumped")],
    indirect=["keys"],
    ids=["older revision", "written past", "bumped"],
)
@fleets
def test_an_older_backup(keys: Keys, hosts: Hosts, fleet: Fleet, tmp_path: Path, how: str) -> None:
    """Same processes, locks written again as they were; what the backup would end is held until a person decides.

    In the backup the machines are, in turn, switched off, not there yet, moved to another host, and as they are.
    """
    etcd, member = keys.etcd, keys.etcd.members[0]
    host = hosts(**fleet.settings).start()
    off, new, moved, same = (fleet.ids[number::4] for number in range(4))
    old = [*off, *moved, *same]
    fleet.create(keys, *old)
    before = host.wait_running(*old)
    write(keys, {**{one: {"power": "off"} for one in off}, **{one: {"host": "beta"} for one in moved}})
    wait(host, off, lambda status: status.phase is Phase.STOPPED)
    wait(host, moved, lambda status: status.awaited_host == "beta")
    snapshot = save(etcd, tmp_path)
    write(keys, {one: {"power": "on", "host": host.name, "restart_request": "now"} for one in old})
    fleet.create(keys, *new)
    for one in old:
        host.wait_for(one, lambda status, pid=before[one].pid: runs(status) and status.pid != pid)  # type: ignore[misc]
    wait(host, new, runs)
    qemus = {one: host.qemu(one) for one in fleet.ids}
    locks = {one: keys.lock(one) for one in fleet.ids}
    seen = keys.revision
    member.restore(snapshot, bump=BUMP if how == "bumped" else 0)
    if how == "written past":
        # Nobody is connected meanwhile: by another port, then by the one that is known.
        port, member.client_port = member.client_port, member.metrics_port + 1
        etcd.repair()
        while keys.revision < seen + 10:
            keys.write("/elsewhere", "x")
        member.kill()
        member.client_port = port
    eventually("not to be ready", lambda: not host.ready)
    etcd.repair()
    changed(host)
    for one in fleet.ids:
        eventually(f"the lock of {one}", lambda one=one: as_it_was(keys.lock(one)) == as_it_was(locks[one]))  # type: ignore[misc]
    holds(host, sorted([*off, *new, *moved], key=int))
    assert {one: host.qemu(one) for one in fleet.ids} == qemus
    # A person drops the moves, and confirms the rest.
    write(keys, {one: {"host": host.name} for one in moved})
    wait(host, [*moved, *same], runs)
    assert host.cli("confirm-removal", "--yes").returncode == 0
    for one in new:
        host.wait_forgotten(one)
    wait(host, off, lambda status: status.phase is Phase.STOPPED)
    assert {qemu.instance: qemu for qemu in host.qemus()} == {one: qemus[one] for one in (*moved, *same)}
    assert host.metric("removals_held") == 0


@fleets
def test_lost_data(keys: Keys, hosts: Hosts, fleet: Fleet) -> None:
    """All are held, one alone, too, and by a successor; where keys are written again nothing has happened."""
    host = hosts(**fleet.settings).start()
    fleet.create(keys, *fleet.ids)
    wait(host, fleet.ids, runs)
    qemus, locks = {one: host.qemu(one) for one in fleet.ids}, {one: keys.lock(one) for one in fleet.ids}
    keys.etcd.members[0].lose_data()
    keys.etcd.repair()
    changed(host)
    wait(host, fleet.ids, lambda status: status.held)
    host.kill9()
    host.start()
    holds(host, fleet.ids)
    for one in fleet.ids:
        eventually(f"the lock of {one}", lambda one=one: as_it_was(keys.lock(one)) == as_it_was(locks[one]))  # type: ignore[misc]
    kept, gone = fleet.ids[::2], fleet.ids[1::2]
    fleet.create(keys, *kept)
    wait(host, kept, runs)
    if gone:
        assert host.cli("confirm-removal", "--yes").returncode == 0
    for one in gone:
        host.wait_forgotten(one)
    assert {qemu.instance: qemu for qemu in host.qemus()} == {one: qemus[one] for one in kept}
    assert host.metric("removals_held") == 0


def reads(member: EtcdMember) -> int:
    """How many reads it has answered."""
    with urlopen(f"http://127.0.0.1:{member.metrics_port}/metrics") as reply:
        told = reply.read().decode()
    return sum(map(int, re.findall(r'^grpc_server_handled_total\{.*grpc_method="Range".* (\d+)$', told, re.MULTILINE)))


@fleets
def test_one_member_restored_alone(fleet: Fleet, etcd_cluster: EtcdCluster, tmp_path: Path) -> None:
    """It answers at an address that is known, with an older history: it is left, and nothing has happened."""
    keys = Keys(etcd_cluster)
    # Longer than the others are away, on whatever machine.
    with Host(keys, **{**fleet.settings, "KVM_TAKEOVER_WAIT": "300"}) as host:
        host.start()
        snapshot = save(etcd_cluster, tmp_path)
        fleet.create(keys, *fleet.ids)
        wait(host, fleet.ids, runs)
        qemus, locks = {one: host.qemu(one) for one in fleet.ids}, {one: keys.lock(one) for one in fleet.ids}
        first, *others = etcd_cluster.members
        first.restore(snapshot)
        first.start()
        first.wait_ready()
        keys.endpoint = others[0].endpoint
        before = reads(first)
        for member in others:
            member.kill()
        eventually("the restored one to be asked", lambda: reads(first) > before)
        assert not host.ready
        for member in others:
            member.start()
        for member in others:
            member.wait_ready()
        host.wait_ready()
        revision = keys.put("1", description="x")
        eventually("the host to follow", lambda: host.metric("watch_revision") >= revision)
        assert host.metric("history_changes_total") == 0
        assert host.metric("removals_held") == 0
        assert {one: host.qemu(one) for one in fleet.ids} == qemus
        assert {one: as_it_was(keys.lock(one)) for one in fleet.ids} == {
            one: as_it_was(lock) for one, lock in locks.items()
        }


@fleets
def test_another_clusters_endpoint(keys: Keys, hosts: Hosts, fleet: Fleet, tiny: str) -> None:
    """A wrong endpoint for one run, and right again: its machine of that id and ours do not know of each other."""
    with EtcdServer() as other:
        theirs = Keys(other)
        with Host(theirs, "gamma", **BRISK) as gamma:
            gamma.start()
            theirs.machines("gamma", "1", ram=16, extra_flags=f"{tiny} {FILE_DISK}")
            their_qemus = gamma.wait_running("1")
            their_lock = theirs.lock("1")
            host = hosts(**fleet.settings).start()
            fleet.create(keys, *fleet.ids)
            wait(host, fleet.ids, runs)
            qemus, locks = {one: host.qemu(one) for one in fleet.ids}, {one: keys.lock(one) for one in fleet.ids}
            host.stop()
            host.settings["ETCD_ENDPOINTS"] = other.endpoint
            host.start()
            changed(host)
            host.wait_for("1", lambda status: status.held and "another history" in status.reason)
            wait(host, fleet.ids, lambda status: status.held)
            assert host.metric("removals_held") == len(fleet.ids)
            assert theirs.session("alpha")
            for one in fleet.ids[1:]:
                assert as_it_was(theirs.lock(one)) == as_it_was(locks[one])
            assert theirs.lock("1") == their_lock
            assert gamma.wait_running("1") == their_qemus
            host.stop()
            host.settings["ETCD_ENDPOINTS"] = ",".join(keys.etcd.endpoints)
            host.start()
            wait(host, fleet.ids, runs)
            assert {one: host.qemu(one) for one in fleet.ids} == qemus
            assert {one: as_it_was(keys.lock(one)) for one in fleet.ids} == {
                one: as_it_was(lock) for one, lock in locks.items()
            }
            assert keys.get(keys.layout.session_key(HostName("alpha")))
            assert theirs.get(theirs.layout.status_key(InstanceId("1")))


@contextmanager
def counting(instance: str, *hosts: Host) -> Iterator[Counter[int]]:
    """Count, all the time, how often there were how many QEMUs of the instance on all hosts together."""
    seen: Counter[int] = Counter()
    stop = Event()

    def look() -> None:
        while not stop.wait(0.02):
            seen[sum(qemu.instance == instance for host in hosts for qemu in host.qemus())] += 1

    thread = Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_a_machine_that_moved_since_the_backup(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """Its disk cannot be fenced, and keys and lock say that it is the first host's: one QEMU, at every moment."""
    alpha, beta = (hosts(name, **BRISK).start() for name in ("alpha", "beta"))
    keys.machines("alpha", "1", ram=16, extra_flags=f"{tiny} {FILE_DISK}")
    keys.machines("alpha", "diskless", ram=16, extra_flags=tiny)
    alpha.wait_running("1", "diskless")
    snapshot = save(keys.etcd, tmp_path)
    write(keys, {one: {"host": "beta"} for one in ("1", "diskless")})
    qemus = beta.wait_running("1", "diskless")
    alpha.wait_forgotten("1")
    alpha.wait_forgotten("diskless")
    with counting("1", alpha, beta) as seen:
        beta.freeze()
        keys.etcd.members[0].restore(snapshot)
        keys.etcd.repair()
        eventually("alpha to notice", lambda: alpha.metric("history_changes_total") == 1)
        alpha.wait_for("1", lambda status: "beta has said there what runs" in status.reason)
        # What nobody has to fence is taken once alpha has waited for as long as a takeover does.
        alpha.wait_running("diskless")
        assert [qemu.instance for qemu in alpha.qemus()] == ["diskless"]
        beta.thaw()
        changed(beta)
        alpha.wait_for("1", lambda status: "beta holds its lock" in status.reason)
        eventually("the status key", lambda: (found := keys.status("1")) and found.host == "beta")
        eventually("one of the two to go", lambda: not qemus["diskless"].alive)
    assert set(seen) == {1}
    assert beta.wait_running("1") == {"1": qemus["1"]}
