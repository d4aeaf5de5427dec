"""Single mode with QEMU's own options: one container, one QEMU, its terminal, its status, its lock if it has one."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from kvmsupervisor.cli.demo.guest import MINIMUM_RAM_MIB, Guest
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Keys, eventually
from tests.support.firmware import RAM_MIB, Puppet
from tests.support.lock_history import check_lock_history
from tests.support.net import Lan
from tests.support.single import Containers, holder
from tests.support.terminal import at_terminal

SMALL = ("-accel", "tcg", "-m", "16", "-display", "none", "-nodefaults")
"""A machine that nobody looks at."""


@pytest.fixture
def hlt(tiny: str) -> tuple[str, ...]:
    """Options of a machine that runs, and uses no CPU."""
    return (*SMALL, *tiny.split())


def test_its_terminal_is_the_guests_and_a_signal_is_the_power_button(containers: Containers, puppet: Puppet) -> None:
    """Law: standard output is QEMU's; SIGTERM asks the guest, which shuts down; QEMU's 0 is the container's."""
    options = ("-accel", "tcg", "-m", str(RAM_MIB), "-nodefaults", "-nographic", "-serial", "stdio")
    container = containers(*options, "-machine", "q35", *puppet.options(tag="plain")).begin()
    eventually("the guest", lambda: "HELLO from plain" in container.log)
    assert container.stop() == 0
    assert "power button: GOODBYE from plain" in container.log
    assert container.qemus() == []


@pytest.mark.guest
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="who runs a guest on a bridge is root")
def test_qemus_own_bridge_works(containers: Containers, lan: Lan, guest: Guest) -> None:
    """Law: BRIDGE_IF is allowed to QEMU's helper, which QEMU starts by itself: nothing confines it."""
    options = ("-accel", "tcg", "-m", str(MINIMUM_RAM_MIB), "-nodefaults", "-nographic", "-serial", "stdio")
    nic = ("-netdev", f"bridge,id=n0,br={lan.bridge}", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:91:07:02")
    container = containers(*options, *nic, *guest.options(tag="net", dhcp=True), BRIDGE_IF=lan.bridge)
    plain = container.around
    container.around = lambda *argv: lan.around(*plain(*argv))
    container.begin()
    found = eventually("an address", lambda: re.search(r"DHCP (\S+)", container.log))
    lan.ping(found[1])
    assert f"allow {lan.bridge}" in lan.inside.bridge_conf.read_text()
    assert container.stop() == 0


def test_the_exit_status_is_qemus(containers: Containers, hlt: tuple[str, ...], tmp_path: Path) -> None:
    """Law: QEMU's exit code, 128 + N for a signal, 1 with a message when there is no such program."""
    failing = containers("-nonsense").begin()
    assert failing.wait_ended() == 1
    assert "-nonsense: invalid option" in failing.log

    asked = containers("--version").begin()
    assert asked.wait_ended() == 0
    assert "QEMU emulator version" in asked.log

    script = tmp_path / "qemu"
    script.write_text("#!/bin/sh\nexit 42\n")
    script.chmod(0o755)
    assert containers("-m", "16", KVM_QEMU=str(script)).begin().wait_ended() == 42

    killed = containers(*hlt).begin()
    (qemu,) = eventually("its QEMU", killed.qemus)
    qemu.kill()
    assert killed.wait_ended() == 128 + signal.SIGKILL

    missing = containers("-m", "16", KVM_QEMU="/nowhere/qemu").begin()
    assert missing.wait_ended() == 1
    assert "cannot start /nowhere/qemu" in missing.log
    assert "Traceback" not in missing.log


def test_options_are_passed_word_by_word(containers: Containers, tmp_path: Path) -> None:
    """Law: what QEMU gets ends with the container's arguments, as they are; folder and environment stay, too."""
    script = tmp_path / "qemu"
    script.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\necho "$PWD $EXTRA"\n')
    script.chmod(0o755)
    words = ("-m", "16", "-drive", "file=a b.img,format=raw", "--", "-name", "x$y", "")
    container = containers(*words, KVM_QEMU=str(script), EXTRA="of its own").begin()
    assert container.wait_ended() == 0
    lines = container.log.splitlines()
    assert lines[0] == "<-readconfig>"
    assert lines[2:-1] == [f"<{word}>" for word in words]
    assert lines[-1] == f"{Path.cwd()} of its own"


def test_a_deaf_guest_is_ended_in_time_and_a_second_signal_hurries(
    containers: Containers, hlt: tuple[str, ...]
) -> None:
    """Law: QEMU ends after KVM_SHUTDOWN_TIMEOUT, or at once with the second signal."""
    slow = containers(*hlt, KVM_SHUTDOWN_TIMEOUT="1").begin()
    hurried = containers(*hlt, KVM_SHUTDOWN_TIMEOUT="3600", KVM_LOG_LEVEL="info").begin()
    for one in (slow, hurried):
        eventually("its QEMU", one.qemus)
    assert slow.stop() == 0
    assert "did not shut down in time" in slow.log
    hurried.signal(signal.SIGINT)
    hurried.signal(signal.SIGTERM)

    # Two that come at once may count as one.
    def insist() -> bool:
        hurried.signal(signal.SIGTERM)
        return not hurried.running

    eventually("the end", insist)
    assert hurried.wait_ended() in {0, 128 + signal.SIGKILL}
    assert slow.qemus() == hurried.qemus() == []


def test_qemus_own_monitor_stays_and_the_terminal_is_given_back(containers: Containers) -> None:
    """Law: our QMP takes nothing away: Ctrl-A x ends a -nographic QEMU, as ever; killed, the terminal is sane."""
    environ = containers().environment
    options = ("-accel", "tcg", "-m", "16", "-nographic", "-net", "none")
    with at_terminal("exec", "--", *options, environ=environ) as person:
        eventually("QEMU to have the terminal", lambda: person.looks(0.05) and person.is_raw)
        person.types("\x01c")
        person.sees("(qemu)")
        person.types("\x01x")
        assert person.ends() == 0
        assert person.is_as_before
    container = containers()
    with at_terminal("exec", "--", *options, environ=container.environment) as person:
        eventually("QEMU to have the terminal", lambda: person.looks(0.05) and person.is_raw)
        (qemu,) = container.qemus()
        qemu.kill()
        assert person.ends() == 128 + signal.SIGKILL
        assert person.is_as_before


def test_a_lock_is_held_while_it_lives(keys: Keys, containers: Containers, hlt: tuple[str, ...]) -> None:
    """Laws 2, 3 and 9: on record before the guest runs, under a name of its own; released once QEMU is gone."""
    container = containers.locked(*hlt, KVM_SHUTDOWN_TIMEOUT="0").begin()
    qemu = container.wait_running()["1"]
    lock = keys.lock("1")
    assert lock is not None
    assert (lock.host, lock.state, lock.pid) == (holder("alpha", "1"), LockState.RUNNING, qemu.pid)
    assert (lock.storage, lock.incarnation) == (Storage.UNFENCEABLE, qemu.incarnation)
    assert keys.session(lock.host) is not None
    assert "-S" in qemu.argv
    status = keys.wait_status("1", lambda status: status.phase is Phase.RUNNING)
    assert (status.host, status.pid, status.epoch) == (lock.host, qemu.pid, 1)
    assert container.stop() == 0
    assert keys.lock("1") is None
    assert keys.session(lock.host) is None
    assert [one.state for one in check_lock_history(keys, "1")] == [LockState.STARTING, LockState.RUNNING]


def test_a_lock_needs_all_that_it_is_made_of(containers: Containers) -> None:
    """Law: a slip never runs a VM without the lock that was asked for."""
    for settings, words in (
        ({"LOCK": "/kvm/%i/lock"}, "INSTANCE"),
        ({"LOCK": "kvm"}, "begins with '/'"),
        ({"LOCK": f"{containers.keys.layout.prefix}/1/host"}, "not the key of a wish"),
    ):
        container = containers("-m", "16", **settings).begin()
        assert container.wait_ended() == 1, container.log
        assert words in container.log
    container = containers.locked("-m", "16")
    del container.settings["ETCD_ENDPOINTS"]
    assert container.begin().wait_ended() == 1
    assert "ETCD_ENDPOINTS: found nothing; LOCK is set and needs it" in container.log
    container = containers.locked("-daemonize").begin()
    assert container.wait_ended() == 1
    assert "-daemonize cannot be used with LOCK" in container.log


def test_two_race_for_one_lock(keys: Keys, containers: Containers, hlt: tuple[str, ...]) -> None:
    """Law: one runs; the other waits and says for whom, or with --no-wait ends with 1; it runs when the first ended."""
    pair = [containers.locked(*hlt, name=name, KVM_SHUTDOWN_TIMEOUT="0") for name in ("alpha", "beta")]
    for one in pair:
        one.begin()
    eventually("one to run", lambda: any(one.qemus() for one in pair))
    first, second = sorted(pair, key=lambda one: not one.qemus())
    qemu = first.wait_running()["1"]
    eventually("the other to say so", lambda: f"{holder(first.name, '1')} holds its lock" in second.log)
    assert second.qemus() == []
    refused = containers("exec", "--no-wait", "--", *hlt, LOCK=keys.layout.lock_key(InstanceId("1")), name="gamma")
    assert refused.begin().wait_ended() == 1
    assert "holds its lock" in refused.log
    assert qemu.alive
    assert first.stop() == 0
    second.wait_running()
    assert second.stop() == 0
    assert len(check_lock_history(keys, "1")) == 4


def test_one_host_runs_it_once(containers: Containers, hlt: tuple[str, ...]) -> None:
    """Law: a second container of the same host and lock is refused by the first one's session, or by its folder."""
    first = containers.locked(*hlt, KVM_SHUTDOWN_TIMEOUT="0").begin()
    qemu = first.wait_running()["1"]
    elsewhere = containers.locked(*hlt).begin()
    assert elsewhere.wait_ended() == 1
    assert holder("alpha", "1") in elsewhere.log
    beside = containers.locked(*hlt, run_dir=first.run_dir).begin()
    assert beside.wait_ended() == 1
    assert f"held by process {first.pid}" in beside.log
    assert qemu.alive
    assert "Traceback" not in elsewhere.log + beside.log


def test_a_crash_leaves_what_the_next_one_proves(keys: Keys, containers: Containers, hlt: tuple[str, ...]) -> None:
    """Law 9: the same host's next container waits while the QEMU lives, and goes on at once when it is gone."""
    first = containers.locked(*hlt).begin()
    qemu = first.wait_running()["1"]
    first.kill9()
    second = containers.locked(*hlt, run_dir=first.run_dir, KVM_SHUTDOWN_TIMEOUT="0").begin()
    eventually("it to wait", lambda: f"QEMU {qemu.pid} of this instance lives" in second.log)
    assert qemu.alive
    qemu.kill()
    assert second.wait_running()["1"].pid != qemu.pid
    assert second.stop() == 0
    check_lock_history(keys, "1")


def test_only_a_lock_that_is_read_kills(keys: Keys, containers: Containers, hlt: tuple[str, ...]) -> None:
    """Law 6: deleted, it is written again; naming another, it kills."""
    container = containers.locked(*hlt).begin()
    qemu = container.wait_running()["1"]
    key = keys.layout.lock_key(InstanceId("1"))
    keys.etcd.ctl("del", key)
    eventually("the lock to be back", lambda: keys.lock("1") is not None)
    lock = keys.lock("1")
    assert lock is not None
    assert (lock.pid, lock.epoch) == (qemu.pid, 1)
    other = Lock(host=HostName("beta"), boot_id="b", epoch=2, state=LockState.STARTING, incarnation="other")
    keys.write(key, other.to_json().decode())
    assert container.wait_ended() == 128 + signal.SIGKILL
    assert not qemu.alive
    assert keys.lock("1") == other
    assert "epoch 2" in container.log


def test_etcd_away_kills_nothing(containers: Containers, keys: Keys, hlt: tuple[str, ...]) -> None:
    """Law 6, and the end all the same: without etcd the lock stays, and the container ends with QEMU's status."""
    container = containers.locked(*hlt, KVM_SHUTDOWN_TIMEOUT="0", KVM_SESSION_TTL="2").begin()
    qemu = container.wait_running()["1"]
    keys.etcd.kill()
    try:
        eventually("the session to be lost", lambda: container.events("session.lost"))
        assert qemu.alive
        assert container.stop() == 0
        assert container.events("lock.not_released")
    finally:
        keys.etcd.repair()
    assert keys.lock("1") is not None
