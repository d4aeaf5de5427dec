"""A whole host with systemd, on pure cgroup v2, the real image in its Docker: a guest lives through new containers."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from tests.support.cluster import eventually
from tests.support.docker import PRIVILEGED
from tests.support.guest import heart_flags
from tests.support.heartbeat import Heartbeats
from tests.support.imagehost import ImageHost

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

RUN = "--volume=/run/kvmsupervisor:/run/kvmsupervisor"
MOUNTS = {
    "systemd": [
        "--volume=/run/dbus/system_bus_socket:/run/dbus/system_bus_socket",
        "--volume=/run/systemd:/run/systemd",
    ],
    "cgroup": ["--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup"],
}
"""By the kind of home: what gives it, and it alone."""


def kill9_init(host: ImageHost, name: str) -> None:
    host.run("kill", "-9", host.docker("inspect", "--format={{.State.Pid}}", name).strip())


def restart_docker(host: ImageHost, _: str) -> None:
    # systemd refuses a fourth start within a minute, and the tests before this one have had some.
    host.run("systemctl", "reset-failed", "docker", "containerd")
    host.run("systemctl", "restart", "docker", "containerd")


ENDS: dict[str, Callable[[ImageHost, str], object]] = {
    "stop": lambda host, name: host.docker("stop", "--time=15", name),
    "kill": lambda host, name: host.docker("kill", name),
    "rm": lambda host, name: host.docker("rm", "--force", name),
    "kill-9-of-init": kill9_init,
    "restart-of-docker": restart_docker,
}


def home_of(host: ImageHost, pid: int) -> str:
    """Its cgroup in v2's tree; of others, which are not the host's, the machine below may have some."""
    (line,) = [one for one in host.run("cat", f"/proc/{pid}/cgroup").stdout.splitlines() if one.startswith("0::")]
    return line


@pytest.mark.parametrize("home", MOUNTS)
def test_a_real_guest_lives_on_in_its_home(image_host: ImageHost, heart: Guest, home: str) -> None:
    """Law: in a scope of systemd's, or in a folder of v2's own tree, a guest outlives every end of its container.

    Each next container adopts it with its process and its epoch, within a second of its start.
    """
    host = image_host
    options = ["--network=host", "--pid=host", *PRIVILEGED, RUN, *MOUNTS[home]]
    settings = {"KVM_CGROUP": home}
    host.supervise("first", options, settings)
    assert host.wait_event("first", "supervisor.started")["homes"] == home
    assert host.metric("guests_survive") == 1
    flags = heart_flags(heart, tag="one", heartbeat_s=0.2)
    host.put("one", ram=96, extra_flags=flags, shutdown_timeout=0, host="booted")
    before, lock = host.wait_running("one"), host.lock("one")
    assert before.pid is not None
    assert lock is not None
    if home == "systemd":
        scope = f"kvm-one-{lock.incarnation}.scope"
        shown = host.run("systemctl", "show", scope, "--property=Slice,ActiveState,ControlGroup").stdout.split()
        assert {"Slice=machine.slice", "ActiveState=active"} <= set(shown), shown
        assert home_of(host, before.pid) == f"0::/machine.slice/{scope}"
    else:
        assert home_of(host, before.pid) == f"0::/kvmsupervisor/one@{lock.incarnation}"
    told, name = [], "first"
    with Heartbeats({"one": host.console_of("one")}) as hearts:
        eventually("heartbeats", lambda: len(hearts.beats("one")) > 5)
        for end, ending in ENDS.items():
            ended_at = time.monotonic()
            ending(host, name)
            gone_at = time.monotonic()
            eventually("a heartbeat without a supervisor", lambda since=gone_at: hearts.all_beat(since))  # type: ignore[misc]
            host.docker("rm", "--force", name, check=False)
            name = f"after-{end}"
            host.supervise(name, options, settings)
            adopted = host.adoption_s(name)
            now = time.monotonic()
            eventually("a heartbeat after it", lambda since=now: hearts.all_beat(since))  # type: ignore[misc]
            told.append(f"{home}, {end}: largest gap {hearts.gap(ended_at, now):.2f} s; adopted after {adopted:.2f} s")
            after = host.wait_running("one")
            assert (after.pid, after.epoch, after.restarts) == (before.pid, 1, 0), end
            assert host.lock("one") == lock
    hearts.assert_unbroken()
    print("\n".join(told))  # noqa: T201
