"""`stop --all --local`: the host's own shutdown takes its guests down gracefully, and no wish is touched."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmsupervisor.domain.status import Phase
from tests.support.cluster import ROOT, Host, Hosts, Keys, eventually
from tests.support.firmware import RAM_MIB, Puppet

GOODBYE = "power button: GOODBYE from"


def local(host: Host, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
    return host.cli(verb, "--all", "--local", *more)


def wishes(keys: Keys, instance: str) -> dict[str, bytes | None]:
    names = keys.names(f"{keys.layout.prefix}/{instance}/")
    return {name: keys.get(name) for name in names if not name.endswith("/lock")}


def test_all_guests_are_shut_down_and_no_key_is_touched(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """Law: through the running supervisor: power button for all at once, no restart, wishes as they were, until undone.

    A supervisor that is replaced meanwhile heeds it as well, and starts nothing.
    """
    host = hosts().start()
    for one in ("a", "b"):
        keys.put(one, ram=RAM_MIB, extra_flags=puppet.extra_flags(), host=host.name)
    host.wait_running("a", "b")
    for one in ("a", "b"):
        host.hears(one, "HELLO from")
    before = {one: wishes(keys, one) for one in ("a", "b")}

    done = local(host, "stop")
    assert done.returncode == 0, done.stderr
    # One that heeds the button at once has ended by the first look.
    assert re.search(r"waiting for (2 guests: a, b|1 guests: [ab])\n", done.stdout)
    assert not host.qemus()
    for one in ("a", "b"):
        assert GOODBYE in host.console(one)
        status = host.wait_for(one, Phase.STOPPED)
        assert status.last_exit == "guest-shutdown"
        assert "until its next boot" in status.reason
    eventually("the locks to go", lambda: keys.lock("a") is None and keys.lock("b") is None)

    host.stop()
    host.start()
    assert host.wait_for("a", Phase.STOPPED).pid is None
    keys.put("c", ram=16, host=host.name)
    host.wait_for("c", Phase.STOPPED)
    assert not host.qemus()
    assert {one: wishes(keys, one) for one in ("a", "b")} == before

    assert local(host, "start").returncode == 0
    host.wait_running("a", "b")


def test_without_a_supervisor_and_without_etcd(keys: Keys, hosts: Hosts, puppet: Puppet) -> None:
    """Law: the command itself goes down the ladder, each guest with its own time; the next supervisor starts them."""
    host = hosts().start()
    keys.put("good", ram=RAM_MIB, extra_flags=puppet.extra_flags(), host=host.name)
    deaf = puppet.extra_flags(deaf=True)
    keys.put("deaf", ram=RAM_MIB, extra_flags=deaf, shutdown_timeout=2, restart="never", host=host.name)
    before = host.wait_running("good", "deaf")
    for one in before:
        host.hears(one, "HELLO from")
    host.kill9()

    away = dict(host.environment) | {"ETCD_ENDPOINTS": "http://127.0.0.1:1"}
    argv = [sys.executable, "-m", "kvmsupervisor", "stop", "--all", "--local"]
    done = subprocess.run(argv, cwd=ROOT, env=away, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not host.qemus()
    assert GOODBYE in host.console("good")
    assert GOODBYE not in host.console("deaf")

    assert local(host, "start").returncode == 0
    host.start()
    after = host.wait_running("good", "deaf")
    assert all(after[one] != before[one] for one in before)
    assert keys.lock("good") is not None


def test_what_does_not_end_in_time_is_named(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: the limit of the whole is the caller's; exit code 4, with who still runs. The supervisor goes on with it."""
    host = hosts().start()
    keys.put("slow", ram=16, extra_flags=tiny, shutdown_timeout=3600, host=host.name)
    host.wait_running("slow")
    done = local(host, "stop", "--timeout", "1")
    assert done.returncode == 4
    assert "still running after 1 s: slow" in done.stderr
    assert host.wait_for("slow", Phase.STOPPING).pid is not None
    keys.put("slow", shutdown_timeout=0)
    eventually("it to end", lambda: not host.qemus())


@pytest.mark.parametrize("supervised", [True, False], ids=["supervisor", "alone"])
def test_all_go_down_at_once(keys: Keys, hosts: Hosts, tiny: str, supervised: bool) -> None:
    """Law: nobody waits for another: the last of them is gone while the first ones still have all their time."""
    host = hosts().start()
    for one, timeout_s in (("a", 3600), ("b", 3600), ("c", 0)):
        keys.put(one, ram=16, extra_flags=tiny, shutdown_timeout=timeout_s, host=host.name)
    before = host.wait_running("a", "b", "c")
    if not supervised:
        host.kill9()
    argv = [sys.executable, "-m", "kvmsupervisor", "stop", "--all", "--local"]
    command = subprocess.Popen(argv, cwd=ROOT, env=host.environment, stdout=subprocess.DEVNULL)
    try:
        eventually("the end of c", lambda: not before["c"].alive)
        assert before["a"].alive
        assert before["b"].alive
        assert command.poll() is None
    finally:
        command.kill()
        command.wait()


def test_a_mark_of_an_earlier_boot_means_nothing(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """Law: a run directory that outlives a boot does not keep guests from starting at the next."""
    host = hosts()
    host.run_dir.mkdir(parents=True, exist_ok=True)
    (host.run_dir / "_draining").write_text("11111111-2222-3333-4444-555555555555\n")
    host.start()
    keys.put("one", ram=16, extra_flags=tiny, host=host.name)
    host.wait_running("one")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["stop", "--all"], "need each other"),
        (["start", "--local", "web1"], "need each other"),
        (["stop", "--all", "--local", "web1"], "no ID"),
        (["stop"], "Missing argument"),
    ],
)
def test_half_of_it_is_a_usage_error(hosts: Hosts, args: list[str], said: str) -> None:
    """Law: it is all of this host or what is named; nothing is guessed."""
    done = hosts().cli(*args)
    assert done.returncode == 2
    assert said in done.stderr


def test_in_a_shell_without_the_units_settings(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: another run directory than the supervisor's is not taken for a host without guests."""
    host = hosts().start()
    keys.put("web1", ram=16, extra_flags=tiny, host=host.name)
    host.wait_running("web1")
    other = host.folder / "other"
    for verb in ("stop", "start"):
        shell = {**host.environment, "KVM_RUN_DIR": str(other)}
        argv = [sys.executable, "-m", "kvmsupervisor", verb, "--all", "--local"]
        done = subprocess.run(argv, cwd=ROOT, env=shell, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, done.stdout
        assert "Set KVM_RUN_DIR" in done.stderr
        assert "web1" in done.stderr
        assert str(host.run_dir) in done.stderr
        assert not other.exists()
    assert host.qemus()
