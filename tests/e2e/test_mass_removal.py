"""Most machines of a host lose their keys at once: they run on until a person says that it is meant."""

from __future__ import annotations

from typing import Any

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from tests.support.cluster import Host, Hosts, Keys, Qemu, eventually

SIX = [str(number) for number in range(1, 7)]


@pytest.fixture
def host(hosts: Hosts) -> Host:
    return hosts(KVM_SHUTDOWN_TIMEOUT="1", KVM_SESSION_TTL="3").start()


@pytest.fixture
def six(keys: Keys, host: Host, tiny: str) -> dict[str, Qemu]:
    """Six machines that run."""
    keys.machines(host.name, *SIX, ram=16, extra_flags=tiny)
    return host.wait_running(*SIX)


def slip(keys: Keys) -> None:
    """`etcdctl del --prefix /kvm/`."""
    keys.etcd.ctl("del", "--prefix", keys.layout.wishes_prefix)


def check_held(keys: Keys, host: Host, six: dict[str, Qemu]) -> None:
    """Every view says so, and all run on, their locks written again."""
    for one in SIX:
        host.wait_for(one, lambda s: s.held and s.pid is not None and "confirm-removal" in s.reason)
        assert keys.wait_status(one, lambda s: s.held).pid == six[one].pid
        eventually(f"the lock of {one}", lambda one=one: keys.lock(one))  # type: ignore[misc]
    assert host.metric("removals_held") == 6
    assert host.events("removal.held")[-1]["instances"] == SIX
    assert host.wait_running(*SIX) == six


def test_held_until_confirmed(keys: Keys, host: Host, six: dict[str, Qemu]) -> None:
    """The word of a person lets them go, gracefully, and leaves nothing of them. A stray word does not."""
    slip(keys)
    check_held(keys, host, six)
    refused = host.cli("confirm-removal")
    assert refused.returncode != 0, "without a terminal it needs --yes"
    check_held(keys, host, six)
    done = host.cli("confirm-removal", "--yes")
    assert done.returncode == 0, done.stderr
    for one in SIX:
        host.wait_forgotten(one)
    assert host.qemus() == []
    eventually("all keys to go", lambda: keys.names(keys.layout.wishes_prefix) == [])
    eventually("all statuses to go", lambda: keys.names(keys.layout.statuses_prefix) == [])
    eventually("the word to go", lambda: keys.names(keys.layout.confirmations_prefix) == [])
    assert host.metric("removals_held") == 0


def test_keys_put_back(keys: Keys, host: Host, six: dict[str, Qemu], tiny: str) -> None:
    """The hold ends without a restart when the keys are back; those that stay away stay held."""
    slip(keys)
    check_held(keys, host, six)
    keys.machines(host.name, *SIX[:4], ram=16, extra_flags=tiny)
    for one in SIX[:4]:
        host.wait_for(one, lambda s: not s.held)
    assert host.metric("removals_held") == 2
    assert host.wait_running(*SIX) == six
    host.kill9()
    host.start()
    for one in SIX[4:]:
        host.wait_for(one, lambda s: s.held)
    assert host.wait_running(*SIX) == six


def test_a_few_are_not_held(keys: Keys, host: Host, six: dict[str, Qemu]) -> None:
    """Two of six is everyday work."""
    prefix = keys.layout.instance_prefix
    keys.together(
        {}, delete=[f"{prefix(InstanceId(one))}{name}" for one in "12" for name in ("host", "ram", "extra_flags")]
    )
    for one in "12":
        host.wait_forgotten(one)
    rest: dict[str, Any] = {one: six[one] for one in SIX[2:]}
    assert host.wait_running(*rest) == rest
    assert host.metric("removals_held") == 0


def test_moving_away_is_no_removal(keys: Keys, host: Host, six: dict[str, Qemu]) -> None:
    """All get another `host`, or `power=off`: that is an order."""
    keys.write(keys.layout.session_key(HostName("beta")), "{}")
    for one in SIX[:3]:
        keys.put(one, power="off")
    keys.machines("beta", *SIX[3:], ram=16)
    for one in SIX[3:]:
        host.wait_forgotten(one)
    eventually("the others to end", lambda: host.qemus() == [])
    assert host.metric("removals_held") == 0


def test_an_emptied_prefix_at_the_start(keys: Keys, host: Host, six: dict[str, Qemu]) -> None:
    """The keys went while no supervisor ran: held as well, through another restart too."""
    host.stop()
    slip(keys)
    for _ in range(2):
        host.start()
        check_held(keys, host, six)
        host.kill9()
