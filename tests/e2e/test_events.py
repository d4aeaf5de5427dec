"""Why did it restart last night? One command says it, on any machine, and after the host has died."""

from __future__ import annotations

import json
import signal

from kvmsupervisor.domain.keys import InstanceId
from tests.support.cluster import Hosts, Keys, eventually


def test_what_happened_outlives_its_host(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """A crash, then the host's death: the history has both, and every event came in its status's transaction."""
    alpha, beta = (hosts(name, KVM_SESSION_TTL="2", KVM_SHUTDOWN_TIMEOUT="1").start() for name in ("alpha", "beta"))
    keys.machines("alpha", "1", ram=16, extra_flags=tiny, hosts="alpha beta")
    alpha.wait_running("1")["1"].signal(signal.SIGKILL)
    keys.wait_status("1", lambda status: status.restarts == 1 and status.up)
    alpha.kill9()
    for qemu in alpha.qemus():
        qemu.kill()
    beta.wait_running("1")
    keys.wait_status("1", lambda status: status.host == "beta" and status.up)
    # On a machine that runs no supervisor, and on the host that has it now.
    elsewhere = hosts("gamma")
    for machine in (elsewhere, beta):
        told = machine.cli("events", "1")
        assert told.returncode == 0
        lines = [line.split(maxsplit=5)[2:] for line in told.stdout.splitlines()[1:]]
        crash = next(number for number, line in enumerate(lines) if line[:3] == ["alpha", "1", "ended"])
        assert lines[crash][3] == "crashed (signal 9)"
        takeover = next(number for number, line in enumerate(lines) if line[2] == "failover.taken")
        assert lines[takeover] == ["beta", "3", "failover.taken", "alpha is gone; its lock is taken over"]
        assert crash < takeover < len(lines) - 1
        assert (lines[-1][0], lines[-1][2]) == ("beta", "running")
    found = json.loads(elsewhere.cli("events", "-o", "json").stdout)
    assert {one["instance"] for one in found} == {"1"}
    # Its file on the first host has the same; a supervisor that is back there has forgotten nothing.
    mine = json.loads(alpha.cli("events", "1", "-o", "json").stdout)
    assert [one["event"] for one in mine if one["host"] == "alpha"].count("instance.ended") == 1

    one = InstanceId("1")
    events_key, status_key = keys.layout.events_key(one), keys.layout.status_key(one)
    written = {change.revision for change in keys.history(events_key)}
    assert written
    assert written <= {change.revision for change in keys.history(status_key)}
    assert all(len(change.value) <= 4096 for change in keys.history(events_key) if change.value is not None)

    # Removed, it leaves no key.
    keys.delete("1")
    eventually("it to be gone", lambda: keys.get(status_key) is None)
    assert keys.get(events_key) is None


def test_a_dead_host_and_what_uses_the_living(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """`hosts` names the locks of a host that is gone; `top` shows what runs, as its supervisor counts it."""
    alpha, beta = (hosts(name, KVM_SESSION_TTL="2").start() for name in ("alpha", "beta"))
    keys.machines("alpha", "pinned", ram=16, extra_flags=f"{tiny} -blockdev driver=null-co,node-name=disk")
    keys.machines("beta", "1", ram=16, extra_flags=tiny)
    alpha.wait_running("pinned")
    beta.wait_running("1")
    keys.wait_status("1", lambda status: status.up)
    alpha.kill9()
    eventually("alpha to have no session", lambda: keys.session("alpha") is None)
    found = {one["host"]: one for one in json.loads(beta.cli("hosts", "-o", "json").stdout)}
    assert (found["alpha"]["state"], found["alpha"]["locks"]) == ("no session", ["pinned"])
    assert (found["beta"]["state"], found["beta"]["running"], found["beta"]["promised_mib"]) == ("up", ["1"], 16)
    assert "it holds the locks of pinned, and may run them" in beta.cli("hosts").stdout
    (used,) = json.loads(beta.cli("top", "--interval", "0.2", "-o", "json").stdout)
    assert (used["instance"], used["host"]) == ("1", "beta")
    assert used["cpu_cores"] >= 0
    assert used["memory_bytes"] > 0
    assert "qemu" not in beta.cli("logs", "1").stderr
    elsewhere = beta.cli("logs", "pinned")
    assert elsewhere.returncode == 1
    assert "alpha, which has no session" in elsewhere.stderr


def test_what_qemu_shouts_stays_a_line(keys: Keys, hosts: Hosts) -> None:
    """Escape sequences, newlines and a hundred kilobytes in QEMU's last words, again and again."""
    alpha = hosts("alpha").start()
    shout = "\x1b[2J\x1b]0;owned\x07\r\n" + "A" * 50_000
    keys.machines("alpha", "loud", ram=16, extra_flags=f"-device '{shout}'")
    keys.wait_status("loud", lambda status: status.restarts >= 3)
    value = keys.get(keys.layout.events_key(InstanceId("loud")))
    assert value is not None
    assert len(value) <= 4096
    for command in (["events", "loud"], ["events", "loud", "-o", "json"], ["logs", "loud"]):
        told = alpha.cli(*command)
        assert "\x1b" not in told.stdout + told.stderr
        assert "\r" not in told.stdout
        assert told.returncode == 0
        assert len(told.stdout) < 60_000
    ended = [
        one for one in json.loads(alpha.cli("events", "loud", "-o", "json").stdout) if one["event"] == "instance.ended"
    ]
    assert {one["end"] for one in ended} == {"failed"}


def test_a_move_takes_its_history_along(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """The next host adds to what the key has; so does the first when the machine comes back."""
    alpha, beta = (hosts(name, KVM_SHUTDOWN_TIMEOUT="0").start() for name in ("alpha", "beta"))
    keys.machines("alpha", "1", ram=16, extra_flags=tiny)
    for host, name in ((alpha, "alpha"), (beta, "beta"), (alpha, "alpha")):
        keys.put("1", host=name)
        host.wait_running("1")
        keys.wait_status("1", lambda status, name=name: status.host == name and status.up)  # type: ignore[misc]
    told = json.loads(hosts("gamma").cli("events", "1", "-o", "json").stdout)
    runs = [(one["host"], one["epoch"]) for one in told if one["event"] == "instance.running"]
    assert runs == [("alpha", 1), ("beta", 2), ("alpha", 3)]
    assert [one["host"] for one in told if one["event"] == "instance.ended"] == ["alpha", "beta"]
    # On the first host its file is woven into that: nothing is there twice, and only the file knows that it let go.
    mine = json.loads(alpha.cli("events", "1", "-o", "json").stdout)
    assert [one for one in mine if one["event"] != "instance.forgotten"] == told
