"""Why a QEMU ended, told apart with real QEMUs, and what follows by its restart policy."""

from __future__ import annotations

import signal
import socket

from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import free_port
from tests.support.firmware import RAM_MIB, Puppet

HELLO = "HELLO from"


def test_a_guest_powers_off(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """`guest-shutdown`; `always` runs it again, the other policies leave it, and give its lock back."""
    host = hosts().start()
    for policy in ("always", "on-failure", "never"):
        keys.put(policy, host=host.name, ram=RAM_MIB, restart=policy, extra_flags=puppet.extra_flags())
    for one, qemu in host.wait_running("always", "on-failure", "never").items():
        host.hears(one, HELLO)
        assert host.qemu(one) == qemu
        host.say(one, "poweroff")

    for one in ("on-failure", "never"):
        status = host.wait_for(one, Phase.STOPPED)
        assert status.last_exit == "guest-shutdown"
        assert "guest-shutdown" in status.reason
        assert status.restarts == 0
        eventually(f"the lock of {one} to go", lambda one=one: keys.lock(one) is None)  # type: ignore[misc]
    status = host.wait_for("always", lambda s: s.phase is Phase.RUNNING and s.restarts == 1)
    assert status.last_exit == "guest-shutdown"
    host.hears("always", HELLO, 2)
    assert host.metric("instance_exits_total", instance="always", reason="guest-shutdown") == 1

    # Whoever asks for it gets it back.
    assert host.cli("restart", "never").returncode == 0
    host.wait_for("never", Phase.RUNNING)
    assert host.status("on-failure") is not None
    assert [qemu.instance for qemu in host.qemus() if qemu.instance == "on-failure"] == []


def test_a_guest_reboots_or_panics(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """A reboot is the guest's own affair: its QEMU lives on. A panic ends it, as `guest-panic`: a failure."""
    host = hosts().start()
    for one in ("reboots", "panics"):
        keys.put(one, host=host.name, ram=RAM_MIB, restart="on-failure", extra_flags=puppet.extra_flags())
    qemus = host.wait_running("reboots", "panics")
    host.hears("reboots", HELLO)
    host.say("reboots", "reboot")
    host.hears("panics", HELLO)
    host.say("panics", "panic")

    status = host.wait_for("panics", lambda s: s.phase is Phase.RUNNING and s.restarts == 1)
    assert status.last_exit == "guest-panic"
    assert host.metric("instance_exits_total", instance="panics", reason="guest-panic") == 1
    host.hears("panics", HELLO, 2)

    host.hears("reboots", HELLO, 2)
    assert host.qemu("reboots") == qemus["reboots"]
    assert host.events("instance.guest_reset", instance="reboots")
    assert host.metric("instance_exits_total", instance="reboots", reason="guest-reset") == 0


def test_a_guest_that_does_not_run_is_not_up(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """§4: paused by a person it is `running`, stays so, and is not up; list and metrics tell it at once."""
    host = hosts().start()
    keys.put("1", ram=16, extra_flags=tiny, host=host.name)
    qemu = host.wait_running("1")["1"]
    host.wait_for("1", lambda status: status.up)
    assert host.metric("instance_up", instance="1") == 1
    host.ask("1", "stop")
    status = host.wait_for("1", lambda status: status.run_state == "paused")
    assert (status.phase, host.metric("instance_up", instance="1")) == (Phase.RUNNING, 0)
    assert host.metric("instance_run_state", instance="1", state="paused") == 1
    # What etcd has may come a moment later.
    eventually("the list", lambda: "running (paused)" in host.cli("list").stdout)
    assert host.cli("check").returncode == 1
    host.ask("1", "cont")
    host.wait_for("1", lambda status: status.up)
    assert host.qemu("1") == qemu


def test_a_guest_powers_off_under_a_qemu_that_is_told_to_live_on(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """§4: a power-off is a power-off, also with `-no-shutdown`; `restart` decides what follows."""
    host = hosts().start()
    flags = f"{puppet.extra_flags()} -no-shutdown"
    for policy in ("always", "on-failure"):
        keys.put(policy, host=host.name, ram=RAM_MIB, restart=policy, extra_flags=flags)
    host.wait_running("always", "on-failure")
    for one in ("always", "on-failure"):
        host.hears(one, HELLO)
        host.say(one, "poweroff")
    status = host.wait_for("on-failure", Phase.STOPPED)
    assert status.last_exit == "guest-shutdown"
    status = host.wait_for("always", lambda s: s.phase is Phase.RUNNING and s.restarts == 1)
    assert status.last_exit == "guest-shutdown"
    assert host.metric("instance_exits_total", instance="always", reason="guest-shutdown") == 1


def test_a_qemu_is_killed(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """`crashed (signal N)` for SIGKILL and SIGSEGV, `host-signal` for a SIGTERM that QEMU ends by itself on."""
    host = hosts().start()
    keys.put("1", ram=16, extra_flags=tiny, host=host.name)
    for number, said in (
        (signal.SIGKILL, "crashed (signal 9)"),
        (signal.SIGSEGV, "crashed (signal 11)"),
        (signal.SIGTERM, "host-signal"),
    ):
        before = host.wait_running("1")["1"]
        before.signal(number)
        status = host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})  # noqa: B023
        assert status.last_exit == said
    assert status.epoch == 4
    assert status.restarts == 3


def test_the_end_that_nobody_watched(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A QEMU that ended while no supervisor ran is noticed by the next one, and started again."""
    host = hosts().start()
    keys.put("1", ram=16, extra_flags=tiny, host=host.name)
    before = host.wait_running("1")["1"]
    host.kill9()
    before.kill()
    host.start()
    status = host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})
    assert status.epoch == 2
    assert status.last_exit is not None
    assert host.metric("adopted_total") == 0


def test_qemu_refuses(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """`failed:` and QEMU's own words, then longer and longer pauses; a port that is taken is waited for.

    What was mended runs, and others are not touched.
    """
    host = hosts().start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        keys.put("option", host=host.name, ram=16, extra_flags="-nonsense")
        keys.put("device", host=host.name, ram=16, extra_flags="-device nosuch")
        # `ram` last: nothing starts without it.
        keys.put("port", host=host.name, extra_flags=tiny, spice_port=port, ram=16)
        keys.put("good", host=host.name, ram=16, extra_flags=tiny)
        for one, words in (
            ("option", "failed: -nonsense: invalid option"),
            ("device", "failed: -device nosuch: 'nosuch' is not a valid device model name"),
        ):
            status = host.wait_for(one, lambda s: s.phase is Phase.BACKOFF and s.restarts > 1)
            assert words in str(status.last_exit)
            assert words in status.reason
            assert str(status.last_exit).startswith("failed: ")
            assert host.metric("instance_exits_total", instance=one, reason="failed") > 1
        # Not tried in vain: the host is known to lack it.
        words = f"port {port} on 127.0.0.1 cannot be used: another program listens there"
        host.wait_for("port", lambda s: s.phase is Phase.WAITING and words in s.reason)
        assert host.metric("instance_starts_total", instance="port") == 0
    good = host.wait_running("good")["good"]
    # Whatever changes the keys ends the pause, which can last for minutes by then.
    for one in ("option", "device"):
        keys.put(one, extra_flags=tiny)
    host.wait_running("option", "device", "port")
    assert host.qemu("good") == good


def test_no_qemu(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A missing program is told by its name, and looked for again and again."""
    host = hosts(KVM_QEMU="/nonexistent/qemu").start()
    keys.put("1", ram=16, extra_flags=tiny, host=host.name)
    status = host.wait_for("1", lambda s: s.phase is Phase.BACKOFF and s.restarts > 1)
    assert status.last_exit == "failed: cannot start /nonexistent/qemu: No such file or directory"
    assert status.pid is None


def test_qemu_repeats_a_secret(keys: Keys, hosts: Hosts) -> None:
    """What QEMU says of an option is told without the secret in it, wherever anybody may read it."""
    host = hosts().start()
    wrong = "-object secret,id=s,data=hunter2hunter2,wrong=1"
    keys.put("1", host=host.name, ram=16, extra_flags=wrong, **{"cloud-config": "nowhere/a?token=letmein"})
    status = host.wait_for("1", Phase.INVALID)
    assert "nowhere/a?…" in str(status.problems)
    keys.delete("1", "cloud-config")
    status = host.wait_for("1", lambda s: s.phase is Phase.BACKOFF and s.restarts > 1)
    assert "data=…,wrong=1" in str(status.last_exit)

    def told_everywhere() -> dict[str, str] | None:
        """What each place says; None while one of them tells of the next start already, not of the end."""
        told = {
            "API": host.page("/api/v1/instances/1"),
            "page": host.page("/"),
            "status key": str(keys.status("1")),
            "log": host.log,
            **{name: host.cli(name, "1").stdout for name in ("show", "argv")},
            "check": host.cli("check").stdout,
        }
        return told if all("data=…" in text for text in told.values()) else None

    told = eventually("the end to be told in each place", told_everywhere)
    for secret in ("hunter2hunter2", "letmein"):
        assert [name for name, text in told.items() if secret in text] == []
