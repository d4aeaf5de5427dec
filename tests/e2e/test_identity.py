"""A real host whose settings are wrong for one run, and right again: name, prefix, run directory, etcd (law 12)."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping

import pytest

from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.status import Phase, Status
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.etcd import EtcdServer

SETTINGS = ("KVM_HOSTNAME", "KVM_PREFIX", "KVM_FACTS_PREFIX", "LOCK", "KVM_RUN_DIR", "ETCD_ENDPOINTS")

SAMPLE = [list(SETTINGS), random.Random(12).sample(SETTINGS, len(SETTINGS))]
"""Orders of all that may be wrong. Sampled: all 720 would take hours, and what one wrong run leaves behind (a session,
a file, keys in another etcd) meets every other one in them."""


@pytest.fixture
def other_etcd() -> Iterator[EtcdServer]:
    """An empty one, as at a mistyped endpoint."""
    with EtcdServer() as server:
        yield server


class Walk:
    """One host with two guests and one machine that is off, through wrong settings and back."""

    def __init__(self, keys: Keys, host: Host, tiny: str, other_etcd: EtcdServer) -> None:
        self.keys = keys
        self.host = host
        prefix = keys.layout.prefix
        self.wrong = {
            "KVM_HOSTNAME": "betta",
            "KVM_PREFIX": f"{prefix}x",
            "KVM_FACTS_PREFIX": f"{prefix}-facts",
            "LOCK": f"{prefix}-locks/%i",
            "KVM_RUN_DIR": str(host.folder / "r2"),
            "ETCD_ENDPOINTS": other_etcd.endpoint,
        }
        keys.machines(host.name, "1", "2", ram=16, extra_flags=tiny)
        keys.machines(host.name, "off", ram=16, extra_flags=tiny, power="off")
        self.qemus = host.start().wait_running("1", "2")
        self.before = self.told()

    def told(self) -> dict[str, tuple[Phase, str, int | None, int, int]]:
        """What the statuses say that a person would look at."""
        return {one: seen_of(status) for one, status in self.host.instances().items()}

    def locks(self) -> dict[str, Lock | None]:
        return {one: self.keys.lock(one) for one in ("1", "2", "off")}

    def intact(self) -> bool:
        """Nothing has ended, nothing was begun, nothing was deleted."""
        return (
            {qemu.instance: qemu for qemu in self.host.qemus()} == self.qemus
            and all(qemu.alive for qemu in self.qemus.values())
            and all(self.host.record(one).exists() for one in self.qemus)
        )

    def one_wrong_run(self, *settings: str) -> None:
        """A run with these settings wrong, until it has said all it has to say; then one that is right."""
        host, locks = self.host, self.locks()
        host.stop()
        with changed(host.settings, {name: self.wrong[name] for name in settings}):
            host.start(ready=False)
            self.said(settings)
            assert self.intact(), settings
            host.stop()
        assert self.locks() == locks, settings
        host.start()
        assert host.wait_running("1", "2") == self.qemus, settings
        eventually("all statuses to be as before", lambda: self.told() == self.before)
        assert self.intact()
        assert self.locks() == locks
        for one in self.before:
            self.keys.wait_status(one, lambda status, one=one: seen_of(status) == self.before[one])  # type: ignore[misc]

    def said(self, settings: tuple[str, ...]) -> None:
        """Wait until the wrong run has told of what lives, and why it does nothing."""
        identity = [name for name in settings if name in SETTINGS[:4]]
        if identity and "KVM_RUN_DIR" not in settings:
            for one in self.qemus:
                status = self.host.wait_for(one, lambda s: s.phase is Phase.RUNNING and s.run_state == "running")
                assert status.pid == self.qemus[one].pid
                assert f"{identity[0]}={self.wrong[identity[0]]}" in status.reason
                assert "`kvmsupervisor confirm-identity`" in status.reason
            assert self.host.metric("identity_mismatch") == 1
            code, body = self.host._fetch("/readyz")
            assert code == 503
            assert identity[0] in body
        elif settings == ("KVM_RUN_DIR",):
            for one in self.qemus:
                status = self.host.wait_for(one, lambda s, one=one: str(self.qemus[one].pid) in s.reason)  # type: ignore[misc]
                assert (status.phase, status.pid) == (Phase.WAITING, self.qemus[one].pid)
                assert f"its record was kept in {self.host.run_dir}/{one}" in status.reason
        elif settings == ("ETCD_ENDPOINTS",):
            for one in self.qemus:
                self.host.wait_for(one, lambda s: s.held and s.phase is Phase.RUNNING)


def seen_of(status: Status) -> tuple[Phase, str, int | None, int, int]:
    return status.phase, status.reason, status.pid, status.epoch, status.restarts


@contextlib.contextmanager
def changed(settings: dict[str, str], to: Mapping[str, str]) -> Iterator[None]:
    """With other values, or more of them, for a while."""
    before = dict(settings)
    settings.update(to)
    try:
        yield
    finally:
        settings.clear()
        settings.update(before)


@pytest.fixture
def walk(keys: Keys, hosts: Hosts, tiny: str, other_etcd: EtcdServer) -> Walk:
    # Another run directory has another lease: its successor waits for that to run out.
    return Walk(keys, hosts(KVM_SESSION_TTL="2"), tiny, other_etcd)


@pytest.mark.parametrize("order", SAMPLE, ids=[" ".join(order) for order in SAMPLE])
def test_each_setting_wrong_for_one_run(walk: Walk, order: list[str]) -> None:
    """Law 12: whatever is wrong, in whatever order: nothing ends or is deleted, and all is as before afterwards.

    On the last release another host name had every guest killed, another prefix every record deleted.
    """
    for name in order:
        walk.one_wrong_run(name)


def test_another_clusters_settings(walk: Walk) -> None:
    """Law 12: the file of a host of another cluster was copied: everything is wrong at once."""
    walk.one_wrong_run("KVM_HOSTNAME", "KVM_PREFIX", "ETCD_ENDPOINTS")
    walk.one_wrong_run("KVM_HOSTNAME", "LOCK", "KVM_FACTS_PREFIX")


def test_a_host_that_was_renamed(walk: Walk) -> None:
    """Law 12: the new name in the keys, and a person's word on the host: the same guests, their locks renamed."""
    host, keys = walk.host, walk.keys
    host.stop()
    host.settings["KVM_HOSTNAME"] = "beta"
    host.start(ready=False)
    host.wait_for("1", lambda s: "KVM_HOSTNAME=beta" in s.reason)
    refused = host.cli("confirm-identity", "--yes")
    assert refused.returncode == 1
    assert f"write beta into {keys.layout.prefix}/1/host; found alpha" in refused.stderr
    assert "no session" not in host.cli("check").stderr
    for one in ("1", "2", "off"):
        keys.put(one, host="beta")
    said = host.cli("confirm-identity", "--yes")
    assert said.returncode == 0, said.stderr
    assert "started under KVM_HOSTNAME=alpha: 1, 2" in said.stdout
    for one in ("1", "2"):
        keys.wait_status(one, lambda s: (s.host, s.phase, s.reason) == ("beta", Phase.RUNNING, "runs"))
    host.url = str(host.events("supervisor.started")[-1]["url"])
    host.wait_ready()
    assert walk.intact()
    for one, qemu in walk.qemus.items():
        lock = keys.lock(one)
        assert lock is not None
        assert (lock.host, lock.pid, lock.epoch) == ("beta", qemu.pid, 1)
    # It is the host's name now, for the next supervisor, too.
    host.stop()
    host.start()
    assert host.wait_running("1", "2") == walk.qemus


def test_a_host_that_shuts_down_under_a_wrong_name(walk: Walk) -> None:
    """Law 12: `stop --all --local` reaches what lives, with or without a supervisor, whatever the settings say."""
    host = walk.host
    for one in walk.qemus:
        walk.keys.put(one, shutdown_timeout=1)
    eventually("the news", lambda: all(s.revision > 0 for s in host.instances().values()))
    host.stop()
    host.settings |= {name: walk.wrong[name] for name in ("KVM_HOSTNAME", "KVM_PREFIX")}
    stopped = host.cli("stop", "--all", "--local")
    assert stopped.returncode == 0, stopped.stderr
    assert not [qemu for qemu in walk.qemus.values() if qemu.alive]


def test_an_empty_host_that_looks_for_sessions_elsewhere(walk: Walk, hosts: Hosts) -> None:
    """Law 12: with another facts prefix it sees locks, but no session: it takes no instance for a dead host's.

    Until 0.1.0 it fenced such guests where they ran: what `hosts` or `host` gave to it.
    """
    walk.keys.put("1", hosts="beta")
    walk.keys.put("2", host="beta", shutdown_timeout=0)
    beta = hosts("beta")
    with changed(beta.settings, {"KVM_FACTS_PREFIX": walk.wrong["KVM_FACTS_PREFIX"]}):
        beta.start()
        status = beta.wait_for("2", lambda s: "KVM_FACTS_PREFIX" in s.reason)
        assert status.phase is Phase.WAITING
        assert f"alpha took its lock (epoch 1) with KVM_FACTS_PREFIX={walk.keys.layout.facts}" in status.reason
        assert walk.intact()
        beta.stop()
    beta.start()
    beta.wait_running("2")
    assert walk.qemus["1"].alive


def of_a_newer_release(host: Host, one: str) -> None:
    host.rewrite(one, version=2)


def damaged(host: Host, one: str) -> None:
    host.record(one).write_bytes(host.record(one).read_bytes()[:100])


@pytest.mark.parametrize("spoil", [of_a_newer_release, damaged])
def test_a_record_that_cannot_be_read(walk: Walk, spoil: Callable[[Host, str], None]) -> None:
    """Its instance does not vanish: API, status, metrics and `list` tell of its QEMU, and of the way out."""
    host, qemu = walk.host, walk.qemus["1"]
    content = host.record("1").read_bytes()
    host.stop()
    spoil(host, "1")
    host.start()
    status = host.wait_for("1", lambda s: s.pid == qemu.pid)
    assert status.phase is Phase.RUNNING
    assert str(host.record("1")) in status.reason
    assert host.metric("instance_phase", host=host.name, instance="1", phase="running") == 1
    walk.keys.wait_status("1", lambda s: s.reason == status.reason)
    assert "incarnation.json" in host.cli("list").stdout
    assert walk.intact()
    host.record("1").write_bytes(content)
    host.wait_for("1", lambda s: s.reason == "runs")
    assert walk.intact()
