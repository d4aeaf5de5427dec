"""The promise of an upgrade: what each release wrote is read by this one, and what a later one wrote is left alone.

`tests/fixtures/release-*` holds what releases wrote, recorded by `tools/record-release` and never edited. Here it is
laid out as that release would have left it on this machine, and a supervisor of today is started over it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.pending import pending
from kvmsupervisor.domain.spec import RawValue, spec_from_object
from kvmsupervisor.domain.status import Phase, Status
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually
from tests.support.releases import RELEASES, Release, places, process_fields, recorded, wishes

KINDS: dict[str, Any] = {
    "incarnation.json": Incarnation,
    "memory.json": InstanceState,
    "lock.json": Lock,
    "status.json": Status,
    "session.json": HostSession,
}

# --- what is read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_every_value_is_read_whole(release: str) -> None:
    """Law: each record says to this release what it said to its own: no field is lost or read as another."""
    for name, kind in KINDS.items():
        found = places(release, name)
        assert found, name
        for place in found:
            data = recorded(release, place)
            read = kind.from_json(data)
            assert read is not None, place
            again = json.loads(read.to_json())
            assert json.loads(data).items() <= again.items(), place


@pytest.mark.parametrize("release", RELEASES)
def test_the_machine_on_record_is_the_one_that_its_keys_still_mean(release: str) -> None:
    """Law: an upgrade alone makes no change pending: defaults and the meaning of keys stay."""
    for place in places(release, "incarnation.json"):
        record = Incarnation.from_json(recorded(release, place))
        raw = {name.encode(): RawValue(value.encode(), 1) for name, value in wishes(release, record.instance).items()}
        wish = parse_wish(InstanceId(record.instance), raw)
        assert wish.problems == ()
        assert wish.spec is not None
        read = spec_from_object(record.spec)
        assert read is not None
        assert pending(read, wish.spec) == ()


# --- what is adopted ------------------------------------------------------------------------------------------


class Left:
    """What a release has left on a host: keys, records, a living QEMU, a session. No supervisor runs.

    Attributes:
        qemu: of the instance `runs`; that of `ended` has ended.
        lock: the value of its lock.
    """

    def __init__(self, release: str, host: Host, keys: Keys, *, newer: str = "") -> None:
        """Lay it out; the version of the record named `newer` is one that this release does not know."""
        left = Release(release, host, newer=newer)
        left.put("runs")
        revision = left.put("ended")
        self.process, argv = left.spawn("runs")
        host.ask("runs", "cont")
        self.qemu = host.qemu("runs")
        left.on_record("runs", argv, self.qemu)
        saved = json.loads(recorded(release, "ended/memory.json"))
        left.write("ended/memory.json", ended=saved["ended"] | {"host_revision": revision})
        self.lock = left.say("runs", **process_fields(self.qemu))
        keys.write(keys.layout.status_key(InstanceId("ended")), left.value("ended/status.json").decode())
        left.session()


class Leave:
    """Lays out what releases have left, and reaps it."""

    def __init__(self, hosts: Hosts, keys: Keys) -> None:
        self._hosts, self._keys = hosts, keys
        self._left: list[Left] = []

    def __call__(self, release: str, *, newer: str = "") -> tuple[Host, Left]:
        host = self._hosts(KVM_SESSION_TTL="2" if newer else "15")
        left = Left(release, host, self._keys, newer=newer)
        self._left.append(left)
        return host, left

    def close(self) -> None:
        for left in self._left:
            left.process.kill()
            left.process.wait()


@pytest.fixture
def leave(hosts: Hosts, keys: Keys) -> Iterator[Leave]:
    leave = Leave(hosts, keys)
    try:
        yield leave
    finally:
        leave.close()


@pytest.mark.parametrize("release", RELEASES)
def test_what_a_release_left_is_adopted(leave: Leave, keys: Keys, release: str) -> None:
    """Law 8: same process, same lock, nothing pending, its history remembered; what had ended stays ended.

    The session is gone on with, so that no other host sees this one go.
    """
    host, left = leave(release)
    session = keys.get(keys.layout.session_key(HostName(host.name)))
    host.start()
    assert host.wait_running("runs") == {"runs": left.qemu}
    eventually("the adoption", lambda: host.metric("adopted_total") == 1)
    status = host.status("runs")
    assert status is not None
    assert (status.pid, status.epoch, status.pending, status.problems) == (left.qemu.pid, 2, (), ())
    assert (status.restarts, status.last_exit) == (1, "crashed (signal 9)")
    assert keys.get(keys.layout.lock_key(InstanceId("runs"))) == left.lock
    ended = host.wait_for("ended", Phase.STOPPED)
    assert ended.last_exit == "host-quit"
    assert "`restart` is never" in ended.reason
    assert len(host.qemus()) == 1
    assert len(host.events("session.resumed")) == 1
    assert session is not None
    # It can be worked with: its power button (nobody hears it), then its end.
    keys.delete("runs", "host")
    host.wait_forgotten("runs")
    assert not left.qemu.alive
    assert keys.lock("runs") is None


# --- what is left alone ---------------------------------------------------------------------------------------


def untouched(host: Host, qemu: Qemu) -> bool:
    return host.qemus() == [qemu] and host.run_state(qemu) == "running"


@pytest.mark.parametrize("file", ["incarnation.json", "memory.json"])
def test_a_newer_record_is_left_alone_with_its_process(leave: Leave, keys: Keys, file: str) -> None:
    """Law: neither the process nor the record nor the lock is touched, and the log says which file, and why."""
    host, left = leave(RELEASES[-1], newer=f"runs/{file}")
    before = (host.run_dir / "runs" / file).read_bytes()
    host.start()
    host.wait_for("ended", Phase.STOPPED)
    (line,) = host.events("instance.unreadable", instance="runs")
    assert file in line["reason"]
    assert "its version is 2, this release reads 1" in line["reason"]
    keys.put("runs", restart_request="second", power="off")
    keys.put("ended", power="off")
    host.wait_for("ended", lambda status: "power" in status.reason)
    assert untouched(host, left.qemu)
    assert (host.run_dir / "runs" / file).read_bytes() == before
    assert keys.get(keys.layout.lock_key(InstanceId("runs"))) == left.lock
    host.stop()
    assert untouched(host, left.qemu)


def test_a_newer_lock_is_left_alone_with_its_process(leave: Leave, keys: Keys) -> None:
    """Law 2: a lock that cannot be read is a stranger's: it is kept, nothing is started; nor is anything killed for it.

    Law 3.6: a process is killed when its lock is read to have another epoch, and this one's epoch is not known.
    """
    host, left = leave(RELEASES[-1], newer="runs/lock.json")
    host.start()
    host.wait_for("runs", lambda status: "its lock was written by a newer release" in status.reason)
    assert untouched(host, left.qemu)
    assert keys.get(keys.layout.lock_key(InstanceId("runs"))) == left.lock


def test_a_newer_session_file_is_left_alone_and_costs_a_wait(leave: Leave) -> None:
    """Law: the old session is waited out, not taken; the file stays; the machine is adopted all the same."""
    host, left = leave(RELEASES[-1], newer="_session.json")
    before = (host.run_dir / "_session.json").read_bytes()
    host.start()
    assert host.wait_running("runs") == {"runs": left.qemu}
    (line,) = host.events("session.file_newer")
    assert line["version"] == 2
    assert (host.run_dir / "_session.json").read_bytes() == before
    assert untouched(host, left.qemu)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("state", ["migrating", "given", "sold"])
def test_a_lock_in_the_hands_of_a_newer_release_is_left_alone(
    leave: Leave, keys: Keys, release: str, state: str
) -> None:
    """Law 13: in the midst of a move that this release does not know nothing is stopped, taken or written."""
    host, left = leave(release)
    key = keys.layout.lock_key(InstanceId("runs"))
    newer = json.dumps(json.loads(left.lock) | {"version": 9, "state": state, "host": "beta"})
    keys.write(key, newer)
    host.start()
    said = host.wait_for("runs", lambda status: "newer release" in status.reason)
    assert (said.phase, said.pid) == (Phase.RUNNING, left.qemu.pid)
    keys.put("runs", power="off")
    keys.put("runs", host="beta")
    host.wait_for("runs", lambda status: status.awaited_host == "beta" and "newer release" in status.reason)
    assert left.qemu.alive
    assert host.run_state(left.qemu) == "running"
    assert keys.get(key) == newer.encode()
