"""Guests are asked, and waited for, before anything is forced; what needs a restart waits for one."""

from __future__ import annotations

import re
from datetime import datetime

from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.firmware import RAM_MIB, Puppet

GOODBYE = "power button: GOODBYE from"


def put_guest(keys: Keys, host: Host, instance: str, flags: str, **more: object) -> None:
    """Wish for a machine that boots; `host` comes last, so that it is started once."""
    keys.put(instance, ram=RAM_MIB, extra_flags=flags, **more, host=host.name)


def test_guests_are_shut_down_by_acpi(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """`power=off`, the removal of `host` and of all keys press the power button; a restart request does so once.

    A guest that is deaf is told to end when `shutdown_timeout` has passed, not before.
    """
    host = hosts().start()
    put_guest(keys, host, "off", puppet.extra_flags())
    put_guest(keys, host, "again", puppet.extra_flags())
    put_guest(keys, host, "deaf", puppet.extra_flags(deaf=True), shutdown_timeout=6)
    before = host.wait_running("off", "again", "deaf")
    for one in before:
        host.hears(one, "HELLO from")

    keys.put("off", power="off")
    keys.put("deaf", power="off")
    keys.put("again", restart_request="please")

    status = host.wait_for("off", Phase.STOPPED)
    assert status.last_exit == "guest-shutdown"
    assert status.reason == "`power` is off"
    assert GOODBYE in host.console("off")
    eventually("the lock to go", lambda: keys.lock("off") is None)

    status = host.wait_for("again", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before["again"].pid})
    assert status.last_exit == "guest-shutdown"
    assert status.restarts == 0
    again = host.qemu("again")
    assert host.console("again").count(GOODBYE) == 1
    host.hears("again", "HELLO from", 2)

    status = host.wait_for("deaf", Phase.STOPPED)
    assert status.last_exit == "host-quit"
    asked = _first(host, "deaf", "is asked to shut down")
    forced = _first(host, "deaf", "did not shut down within 6 s")
    # Of one clock, and a promise to the guest: not earlier.
    assert (forced - asked).total_seconds() >= 5.9
    assert GOODBYE not in host.console("deaf")

    # The same request is not heeded twice, and keys that are gone still mean a graceful end.
    revision = keys.put("again", restart_request="please")
    host.wait_for("again", lambda s: s.revision >= revision)
    assert host.qemu("again") == again
    keys.delete("again")
    host.wait_forgotten("again")
    assert not again.alive
    assert host.events("instance.ended", instance="again")[-1]["reason"] == "guest-shutdown"
    assert keys.lock("again") is None


def test_what_is_done_at_once_asks_no_guest(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """A deaf guest is reset once, in its process, also when its supervisor is replaced; then restarted, and stopped."""
    host = hosts().start()
    put_guest(keys, host, "deaf", puppet.extra_flags(deaf=True), shutdown_timeout=3600)
    first = host.wait_running("deaf")["deaf"]
    host.hears("deaf", "HELLO from")

    keys.put("deaf", restart_request="reset:1")
    host.hears("deaf", "HELLO from", 2)
    assert host.qemu("deaf") == first
    host.kill9()
    host.start()
    revision = keys.put("deaf", description="seen by the next supervisor")
    host.wait_for("deaf", lambda s: s.revision >= revision and s.phase is Phase.RUNNING)
    assert host.qemu("deaf") == first
    assert host.console("deaf").count("HELLO from") == 2

    keys.put("deaf", restart_request="now:1")
    status = host.wait_for("deaf", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, first.pid})
    assert (status.last_exit, status.restarts) == ("host-quit", 0)
    host.hears("deaf", "HELLO from", 3)

    keys.put("deaf", power="off")
    host.wait_for("deaf", Phase.STOPPING)
    keys.put("deaf", power="off-now")
    assert host.wait_for("deaf", Phase.STOPPED).last_exit == "host-quit"
    assert GOODBYE not in host.console("deaf")
    eventually("the lock to go", lambda: keys.lock("deaf") is None)


def _first(host: Host, instance: str, reason: str) -> datetime:
    """When this reason was first told of the instance."""
    lines = host.events(instance=instance)
    told = next(line for line in lines if re.search(reason, str(line.get("reason"))))
    return datetime.fromisoformat(told["timestamp"])


def test_a_change_waits_for_a_restart(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A change of the machine is shown as pending, everywhere, and is there after the next start; not by surprise."""
    host = hosts(KVM_SHUTDOWN_TIMEOUT="1").start()
    keys.put("1", ram=16, extra_flags=tiny, host=host.name)
    before = host.wait_running("1")["1"]
    keys.put("1", ram=24, cpus=2)
    status = host.wait_for("1", lambda s: len(s.pending) == 2)
    assert status.pending == ("ram", "cpus")
    assert host.metric("instance_pending_changes", instance="1") == 2
    assert keys.wait_status("1", lambda s: s.pending == ("ram", "cpus")).pid == before.pid

    host.kill9()
    host.start()
    assert host.wait_for("1", lambda s: bool(s.pending)).pending == ("ram", "cpus")
    assert host.wait_running("1")["1"] == before

    # What is taken back is pending no longer.
    keys.put("1", cpus=1)
    host.wait_for("1", lambda s: s.pending == ("ram",))
    assert host.qemu("1") == before

    keys.put("1", restart_request="now")
    host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})
    after = host.qemu("1")
    assert after.argv[after.argv.index("-m") + 1] == "size=24704K"
    assert host.wait_for("1", lambda s: not s.pending).restarts == 0


def test_the_last_shutdown_timeout_counts(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """The time that a machine's keys gave it also holds for the stop that their removal means."""
    host = hosts().start()
    keys.put("1", ram=16, extra_flags=tiny, shutdown_timeout=1, host=host.name)
    before = host.wait_running("1")["1"]
    keys.delete("1")
    host.wait_forgotten("1")
    assert not before.alive
    reasons = [str(line.get("reason")) for line in host.events("instance.stopping", instance="1")]
    assert any("within 1 s" in reason for reason in reasons)


def test_power_off_and_on(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """`power=off` rests and keeps its place; `power=on`, and the commands for it, start it again."""
    host = hosts(KVM_SHUTDOWN_TIMEOUT="1").start()
    keys.put("1", ram=16, extra_flags=tiny, host=host.name)
    before = host.wait_running("1")["1"]
    done = host.cli("stop", "1", "--wait")
    assert done.returncode == 0, done.stderr
    assert not before.alive
    status = host.wait_for("1", Phase.STOPPED)
    assert (status.pid, status.incarnation) == (None, None)
    assert keys.wait_status("1", lambda s: s.phase is Phase.STOPPED).epoch == status.epoch
    # Invalid keys of a machine that shall not run anyway do not bring it back.
    keys.put("1", ram="garbage")
    host.wait_for("1", lambda s: bool(s.problems) and s.phase is Phase.STOPPED)
    keys.put("1", ram=16)
    done = host.cli("start", "1", "--wait")
    assert done.returncode == 0, done.stderr
    after = host.wait_running("1")["1"]
    assert after.pid != before.pid
    lock = keys.lock("1")
    assert lock is not None
    assert lock.epoch == status.epoch + 1
