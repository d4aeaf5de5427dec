"""Single mode from keys: `INSTANCE` names the one instance of a container, beside supervisors on the same keys."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import LockState
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.firmware import RAM_MIB, Puppet
from tests.support.lock_history import check_lock_history
from tests.support.single import Container, Containers, holder
from tests.support.terminal import at_terminal


def test_an_instance_runs_and_is_shut_down_by_a_signal(keys: Keys, containers: Containers, puppet: Puppet) -> None:
    """Law: from its keys, under its lock; SIGTERM presses the power button; lock and session go, the status says so."""
    keys.put("1", ram=RAM_MIB, extra_flags=puppet.extra_flags(tag="one"), host="alpha")
    container = containers.instance("1").begin()
    qemu = container.wait_running()["1"]
    console = container.folder_of("1") / "console.log"
    eventually("the guest", lambda: "HELLO from one" in console.read_text(errors="replace"))
    with at_terminal("console", "1", environ=container.environment) as person:
        person.sees("HELLO from one")
        person.types("\x1dq")
        assert person.ends() == 0
    listed = container.cli("check", "1")
    assert listed.returncode == 0, listed.stdout
    lock = keys.lock("1")
    assert lock is not None
    assert (lock.host, lock.state) == (holder("alpha", "1"), LockState.RUNNING)
    status = keys.wait_status("1", lambda status: status.phase is Phase.RUNNING)
    assert (status.host, status.pid) == (lock.host, qemu.pid)
    assert container.stop() == 0
    assert "power button: GOODBYE from one" in console.read_text(errors="replace")
    assert keys.lock("1") is None
    assert keys.session(lock.host) is None
    status = keys.wait_status("1", lambda status: status.phase is Phase.STOPPED)
    assert "told to stop (SIGTERM)" in status.reason
    assert status.last_exit == "guest-shutdown"
    check_lock_history(keys, "1")


def test_what_cannot_run_here_is_told_and_ends_with_1(keys: Keys, containers: Containers) -> None:
    """Law: no keys, another host, no host, every problem at once, power off: exit status 1, and nothing was done."""
    keys.put("away", ram=16, host="beta")
    keys.put("nobody", ram=16)
    keys.put("bad", ram="lots", spice_port=0, host="alpha")
    keys.put("off", ram=16, power="off", host="alpha")
    expected = {
        "none": ["there is no instance none"],
        "away": ["host is beta, this host is alpha"],
        "nobody": ["host is missing", "this host is alpha"],
        "bad": ["ram: found 'lots'", "VM_RAM", "spice_port: found '0'"],
        "off": ["power is off"],
        "no/id": ["INSTANCE", "is no id"],
    }
    for instance, words in expected.items():
        container = containers.instance(instance).begin()
        assert container.wait_ended() == 1, container.log
        for one in words:
            assert one in container.log
        assert "Traceback" not in container.log
    assert keys.names(f"{keys.layout.facts}/") == []
    unreachable = containers.instance("off", ETCD_ENDPOINTS="http://127.0.0.1:1").begin()
    assert unreachable.wait_ended() == 3


def test_the_environment_wins_over_keys(keys: Keys, containers: Containers, tiny: str) -> None:
    """Law: VM_RAM, VM_MAC, VM_RBD, SPICE_PORT and EXTRA_FLAGS; those that are empty do not; a bad one is named."""
    keys.put("1", ram="lots", mac="nonsense", extra_flags="-nonsense", host="alpha")
    container = containers.instance(
        "1", VM_RAM="24", VM_MAC="", SPICE_PORT=" ", EXTRA_FLAGS=f"{tiny} -name 'of mine'", KVM_SHUTDOWN_TIMEOUT="0"
    ).begin()
    assert container.wait_ended() == 1
    assert "mac: found 'nonsense'" in container.log
    assert "VM_MAC" in container.log
    keys.delete("1", "mac")
    container.begin()
    qemu = container.wait_running()["1"]
    assert qemu.argv[qemu.argv.index("-m") + 1] == "size=24704K"
    assert qemu.argv[-2:] == ("-name", "of mine")
    assert container.stop() == 0
    wrong = containers.instance("1", VM_RBD="no image", SPICE_PORT="70000", VM_RAM="24", EXTRA_FLAGS=tiny).begin()
    assert wrong.wait_ended() == 1
    assert "rbd: found 'no image'" in wrong.log
    assert "SPICE_PORT" in wrong.log


def test_its_end_is_the_containers(keys: Keys, containers: Containers, tiny: str) -> None:
    """Law: nothing is restarted in here: a killed QEMU is 137, one that fails at once is its own 1; the lock goes."""
    keys.put("1", ram=16, extra_flags=tiny, restart="always", host="alpha")
    container = containers.instance("1").begin()
    container.wait_running()["1"].kill()
    assert container.wait_ended() == 128 + signal.SIGKILL
    assert keys.lock("1") is None
    assert "crashed (signal 9)" in container.log

    # The next one begins anew, whatever the last one came to.
    container = containers.instance("1", KVM_SHUTDOWN_TIMEOUT="3600").begin()
    container.wait_running()
    container.signal(signal.SIGTERM)
    eventually("it to ask the guest", lambda: "is asked to shut down" in container.log)
    container.signal(signal.SIGINT)
    assert container.wait_ended() == 0
    assert keys.lock("1") is None

    keys.put("1", extra_flags="-device nonsense")
    container = containers.instance("1").begin()
    assert container.wait_ended() == 1
    assert "nonsense" in container.log
    assert keys.lock("1") is None
    check_lock_history(keys, "1")


def test_keys_that_change_end_it(keys: Keys, containers: Containers, tiny: str) -> None:
    """Law: `power=off`, and another `host`, shut it down and end the container; a restart is its starter's to do.

    Another `host` does once somebody is there to run it.
    """
    keys.put("1", ram=16, extra_flags=tiny, host="alpha")
    container = containers.instance("1", KVM_SHUTDOWN_TIMEOUT="0").begin()
    container.wait_running()
    keys.put("1", power="off")
    assert container.wait_ended() == 0
    keys.put("1", power="on")
    container.begin().wait_running()
    keys.put("1", restart_request="now")
    assert container.wait_ended() == 0
    container.begin().wait_running()
    # A bad value alone ends nothing.
    revision = keys.put("1", ram="lots")
    keys.wait_status("1", lambda status: bool(status.problems) and status.revision >= revision)
    assert container.running
    # Another host: once that has a session, or a container there that waits for the lock.
    keys.put("1", host="beta")
    keys.wait_status("1", lambda status: status.awaited_host == "beta")
    assert container.running
    keys.write(keys.layout.session_key(HostName(holder("beta", "1"))), "{}")
    assert container.wait_ended() == 0
    assert keys.lock("1") is None
    assert container.begin().wait_ended() == 1
    assert "host is beta" in container.log


def test_beside_a_supervisor_of_its_host_it_runs_once(
    keys: Keys, hosts: Hosts, containers: Containers, tiny: str
) -> None:
    """Law: under the same KVM_HOSTNAME, whoever has the lock runs it; the other waits, says for whom, and is next."""
    # With a disk that cannot be fenced: nobody takes it from a host that seems to be gone.
    keys.put("1", ram=16, extra_flags=f"{tiny} -blockdev driver=null-co,node-name=disk", host="alpha")
    container = containers.instance("1", KVM_SHUTDOWN_TIMEOUT="0").begin()
    single = container.wait_running()["1"]
    host = hosts("alpha", run_dir=container.run_dir, KVM_SHUTDOWN_TIMEOUT="0", KVM_SESSION_TTL="2").start()
    held = f"{holder('alpha', '1')} holds its lock (epoch 1)"
    host.wait_for("1", lambda s: s.phase is Phase.WAITING and s.reason.startswith(held))
    assert host.qemus() == []
    assert single.alive
    # What the container says of it stands in the status key.
    assert keys.wait_status("1", lambda status: status.phase is Phase.RUNNING).pid == single.pid

    assert container.stop() == 0
    taken = host.wait_running("1")["1"]
    assert not single.alive
    container.begin()
    eventually("the container to wait", lambda: "alpha holds its lock (epoch 2)" in container.log)
    assert container.qemus() == []
    assert taken.alive

    # A wait is given up by a signal, at once; no QEMU has run.
    assert container.stop() == 128 + signal.SIGTERM
    host.kill9()
    container.begin()
    eventually("the container to wait", lambda: "alpha holds its lock (epoch 2) and has no session" in container.log)
    assert taken.alive
    host.start()
    assert host.wait_running("1")["1"] == taken
    lock = keys.lock("1")
    assert lock is not None
    assert lock.host == "alpha"
    assert container.running
    check_lock_history(keys, "1")


def test_a_crash_is_adopted_where_the_run_directory_outlives_it(keys: Keys, containers: Containers, tiny: str) -> None:
    """Law 8: a QEMU that outlived its container's first process is the next one's; no second is started."""
    keys.put("1", ram=16, extra_flags=tiny, host="alpha")
    container = containers.instance("1", KVM_SHUTDOWN_TIMEOUT="0").begin()
    qemu = container.wait_running()["1"]
    container.kill9()
    container.begin()
    eventually("its adoption", lambda: container.events("instance.adopted"))
    assert container.qemus() == [qemu]
    # A QEMU that died with its container is no end of the next one.
    container.kill9()
    qemu.kill()
    container.begin()
    second = container.wait_running()["1"]
    assert container.events("single.leftover_buried")
    assert keys.wait_status("1", lambda status: status.phase is Phase.RUNNING and status.pid == second.pid).epoch == 2
    assert container.stop() == 0
    assert not second.alive
    assert keys.lock("1") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace of its own takes root")
def test_without_the_hosts_pids_a_crash_is_a_dead_hosts(
    keys: Keys, hosts: Hosts, containers: Containers, tiny: str
) -> None:
    """Law: where pids mean nothing to the next container, its lock is a stranger's: only storage, or a person, decides.

    In there the program is process 1, which dies of no signal that it does not handle.
    """
    keys.put("1", ram=16, extra_flags=f"{tiny} -blockdev driver=null-co,node-name=disk", host="alpha")

    def apart() -> Container:
        made = containers.instance("1", KVM_SESSION_TTL="2", KVM_SHUTDOWN_TIMEOUT="0", KVM_ACCEL="tcg")
        plain = made.around
        made.around = lambda *argv: ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *plain(*argv)]
        return made.begin()

    def runs() -> str | None:
        lock = keys.lock("1")
        return None if lock is None or lock.state is not LockState.RUNNING else lock.host

    first = apart()
    name = eventually("the first to run", runs)
    assert re.fullmatch(r"alpha/1@[0-9]+", name)
    # Both namespaces at one time, so that their numbers differ.
    second = apart()
    eventually("it to wait", lambda: f"{name} holds its lock (epoch 1)" in second.log)
    first.kill9()
    host = hosts("alpha", KVM_SESSION_TTL="2").start()
    eventually("it to wait", lambda: f"{name} holds its lock (epoch 1) and has no session" in second.log)
    host.wait_for("1", lambda status: "has no session" in status.reason)
    assert host.stop() == 0
    keys.etcd.ctl("del", keys.layout.lock_key(InstanceId("1")))
    keys.etcd.ctl("del", keys.layout.status_key(InstanceId("1")))
    other = eventually("the second to run", runs)
    assert other != name
    (child,) = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert second.wait_ended() == 0
    assert keys.lock("1") is None


def test_a_lock_may_be_filled_in_already(keys: Keys, containers: Containers, tiny: str) -> None:
    """Law: `LOCK` is the template, or the key that systemd made of it; it may lie anywhere."""
    keys.put("1", ram=16, extra_flags=tiny, host="alpha")
    locks = f"{keys.layout.prefix}locks"
    for lock in (keys.layout.lock_key(InstanceId("1")), f"{locks}/%i", f"{locks}/other"):
        container = containers.instance("1", LOCK=lock, KVM_SHUTDOWN_TIMEOUT="0").begin()
        eventually("the lock", lambda: keys.get(lock.replace("%i", "1")))  # noqa: B023 - called here
        eventually("its QEMU", lambda: container.events("instance.started"))  # noqa: B023
        assert container.stop() == 0
        assert keys.get(lock.replace("%i", "1")) is None
