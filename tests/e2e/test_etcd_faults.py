"""etcd goes away in every way there is: no QEMU is restarted for it, and no wish is lost."""

from __future__ import annotations

import contextlib

import pytest

from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually
from tests.support.etcd import EtcdCluster, EtcdMember, EtcdServer, EtcdStartError

BRIEF = {"KVM_SESSION_TTL": "3", "KVM_SHUTDOWN_TIMEOUT": "1"}


class Machines:
    """The machines of one host, of which none may be another process than before."""

    def __init__(self, keys: Keys, host: Host, tiny: str) -> None:
        self._keys, self._host, self._tiny = keys, host, tiny
        self._qemus: dict[str, Qemu] = {}

    def wish_for_another(self) -> None:
        """Wish for one more."""
        one = str(len(self._qemus))
        self._keys.put(one, ram=16, extra_flags=self._tiny, host=self._host.name)
        self._qemus[one] = self._host.wait_running(one)[one]

    def check(self) -> None:
        """All run, and are what they were; nobody else runs."""
        assert self._host.wait_running(*self._qemus) == self._qemus
        assert sorted(self._host.qemus(), key=lambda qemu: qemu.instance) == list(self._qemus.values())


def leads(cluster: EtcdCluster) -> EtcdMember | None:
    with contextlib.suppress(EtcdStartError):
        return cluster.leader()
    return None


@pytest.mark.timeout(400)
def test_members_fail(etcd_cluster: EtcdCluster, hosts: Hosts, tiny: str) -> None:
    """Leader killed, every member frozen in its turn, all restarted, history compacted behind a frozen supervisor."""
    keys = Keys(etcd_cluster)
    host = hosts(keys=keys, **BRIEF).start()
    machines = Machines(keys, host, tiny)

    def ask_another_than(member: EtcdMember) -> None:
        """Let etcdctl, which waits for nobody, ask a member of those that go on, once they have elected a leader."""
        keys.endpoint = next(other for other in etcd_cluster.members if other is not member).endpoint
        eventually("a leader", lambda: leads(etcd_cluster))

    machines.wish_for_another()
    machines.wish_for_another()

    leader = etcd_cluster.leader()
    leader.kill()
    ask_another_than(leader)
    machines.wish_for_another()
    machines.check()
    etcd_cluster.repair()

    for member in etcd_cluster.members:
        member.freeze()
        ask_another_than(member)
        machines.wish_for_another()
        member.thaw()
        etcd_cluster.wait_ready()
        machines.check()

    etcd_cluster.kill()
    etcd_cluster.start()
    etcd_cluster.wait_ready()
    keys.endpoint = None
    machines.wish_for_another()
    machines.check()

    host.wait_ready()
    host.freeze()
    keys.put("late", ram=16, extra_flags=tiny, host=host.name)
    keys.put("early", ram=16, extra_flags=tiny, host=host.name)
    keys.delete("early")
    etcd_cluster.ctl("compact", str(keys.revision))
    # Its stream may still hold what was sent before: without it, it has to go back to a history that is gone.
    etcd_cluster.kill()
    etcd_cluster.start()
    etcd_cluster.wait_ready()
    host.thaw()
    late = host.wait_running("late")["late"]
    host.wait_ready()
    assert host.status("early") is None
    keys.delete("late")
    host.wait_forgotten("late")
    assert not late.alive
    machines.check()
    assert host.events("mirror.compacted")
    assert not host.events("instance.ended", level="warning")
    assert not host.events("instance.error")


def test_away_at_the_start(etcd_alone: EtcdServer, hosts: Hosts, tiny: str) -> None:
    """What runs is found and shown as running before etcd says anything; it is adopted once etcd has."""
    keys = Keys(etcd_alone)
    host = hosts(keys=keys, **BRIEF).start()
    keys.machines(host.name, "1", "2", "3", ram=16, extra_flags=tiny)
    before = host.wait_running("1", "2", "3")
    host.kill9()
    etcd_alone.kill()
    # Not one that ended meanwhile: that has to wait for its lock to be read.
    before["3"].kill()
    host.start(ready=False)
    for one in ("1", "2"):
        status = host.wait_for(one, Phase.RUNNING)
        assert status.pid == before[one].pid
    status = host.wait_for("3", lambda s: "ended while no supervisor watched" in s.reason)
    assert status.phase is Phase.WAITING
    assert status.pid is None
    assert host.metric("etcd_up") == 0
    assert host.metric("adopted_total") == 0
    etcd_alone.start()
    etcd_alone.wait_ready()
    host.wait_ready()
    eventually("the adoption", lambda: host.metric("adopted_total") == 2)
    assert host.wait_running("1", "2") == {one: before[one] for one in ("1", "2")}
    host.wait_running("3")
    assert len(host.qemus()) == 3


def test_away_for_longer_than_the_session(etcd_alone: EtcdServer, hosts: Hosts, tiny: str) -> None:
    """Nothing is killed for a lost session. A QEMU that crashed meanwhile is started again when it is back."""
    keys = Keys(etcd_alone)
    host = hosts(keys=keys, **BRIEF).start()
    keys.machines(host.name, "1", "2", ram=16, extra_flags=tiny)
    before = host.wait_running("1", "2")
    session = keys.session(host.name)
    assert session is not None
    etcd_alone.kill()
    eventually("the session to be lost", lambda: host.events("session.lost"))
    assert host.metric("session_remaining_seconds") == 0
    before["2"].kill()
    host.wait_for("2", lambda s: s.pid is None and s.phase is Phase.WAITING)
    status = host.wait_for("1", lambda s: "etcd is away" in s.reason)
    assert (status.phase, status.pid) == (Phase.RUNNING, before["1"].pid)
    assert before["1"].alive
    etcd_alone.start()
    etcd_alone.wait_ready()
    host.wait_ready()
    assert host.wait_running("1") == {"1": before["1"]}
    status = host.wait_for("2", Phase.RUNNING)
    assert status.last_exit == "crashed (signal 9)"
    assert keys.session(host.name) is not None
    eventually("its status in etcd", lambda: keys.status("1") == host.status("1"))
