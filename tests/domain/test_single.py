"""Single mode: who holds the lock, what wins over keys, and why something is not begun."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain import values
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.single import (
    holder_of,
    is_same_host,
    name_of,
    overrides_in,
    refusal,
    single_wish,
    unsuitable,
)
from kvmsupervisor.domain.spec import RawValue, RestartPolicy, Wish
from kvmsupervisor.domain.values import Unfit

ME = HostName("alpha")
HOLDER = holder_of(ME, "1", pid_namespace=None)
ONE = InstanceId("1")


def wish(overrides: dict[str, str] | None = None, **keys: str) -> Wish:
    raw = {
        name.replace("_config", "-config").encode(): RawValue(text.encode(), 7 + number)
        for number, (name, text) in enumerate(keys.items())
    }
    return single_wish(ONE, raw, overrides=overrides or {}, host=ME, holder=HOLDER)


def why(found: Wish) -> str | None:
    return refusal(found, holder=HOLDER, host=ME, problems=found.problems, prefix="/kvm")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("/kvm/1/lock", "1"),
        ("/kvm/web.1/lock", "web.1"),
        ("/kvm/1/lock/more", "kvm/1/lock/more"),
        ("/kvm/-/lock", "kvm/-/lock"),
        ("/locks/1", "locks/1"),
        ("/kvmx/1/lock", "kvmx/1/lock"),
        ("/lock", "lock"),
    ],
)
def test_a_lock_names_its_instance_or_itself(key: str, name: str) -> None:
    """Law: `exec -- …` with the lock of an instance is the same holder as `INSTANCE` is."""
    assert name_of(key, prefix="/kvm") == name


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True), st.sampled_from(["1", "locks/1"]))
def test_no_supervisor_has_a_holders_name(host: str, name: str) -> None:
    """Law: a lock in single mode is a stranger's to the supervisor of every host, the same one's too."""
    for namespace in (None, "4026532574"):
        holder = holder_of(HostName(host), name, pid_namespace=namespace)
        with pytest.raises(Unfit):
            values.host_name(holder)
        assert is_same_host(holder, host)
        assert not is_same_host(holder, host + "x")


def test_another_pid_namespace_is_another_holder() -> None:
    """Law: where pids mean nothing to who comes next, his lock is no leftover of ours."""
    names = {holder_of(ME, "1", pid_namespace=namespace) for namespace in (None, "1", "2")}
    assert names == {"alpha/1", "alpha/1@1", "alpha/1@2"}


def test_the_environment_wins_where_it_says_something() -> None:
    """Law: values of the five variables replace keys; an empty one does not, nor do others."""
    environ = {"VM_RAM": "512", "VM_MAC": "", "VM_RBD": "p/i", "SPICE_PORT": " ", "EXTRA_FLAGS": "-S", "VM_CPUS": "9"}
    overrides = overrides_in(environ)
    assert overrides == {"ram": "512", "rbd": "p/i", "extra_flags": "-S"}
    found = wish(overrides, host="alpha", ram="64", spice_port="5900")
    assert found.spec is not None
    assert (found.spec.ram_mib, str(found.spec.rbd), found.spec.spice_port) == (512, "p/i", 5900)
    assert found.spec.extra_flags == ("-S",)
    assert found.revision == 9


def test_the_wish_is_the_holders_and_nothing_is_restarted() -> None:
    """Law: `host` compares with this host's name and becomes the holder's; its revision is the key's (law 2)."""
    found = wish(host="alpha", ram="64", restart="always", cpu_shares="512", memory_limit="1G")
    assert (found.host, found.host_revision, found.restart) == (HOLDER, 7, RestartPolicy.NEVER)
    assert found.spec is not None
    assert (found.spec.cpu_shares, found.spec.memory_limit_mib) == (None, None)
    assert wish(host="beta", ram="64").host == "beta"
    assert wish(host=HOLDER, ram="64").host is None


def test_without_keys_there_is_no_instance() -> None:
    """Law: the environment alone makes none."""
    assert wish({"ram": "64"}).keys == 0


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (wish(), "no key below /kvm/1/"),
        (wish(host="beta", ram="64"), "/kvm/1/host is beta, this host is alpha"),
        (wish(ram="64"), "/kvm/1/host is missing"),
        (wish(host="a b", ram="64"), "host: found 'a b'"),
        (wish(host="alpha"), "ram: found nothing"),
        (wish({"ram": "x"}, host="alpha"), "VM_RAM"),
        (wish(host="alpha", ram="64", power="off"), "/kvm/1/power is off"),
        (wish(host="beta", ram="x"), "is beta"),
    ],
)
def test_a_refusal_names_what_was_found(found: Wish, words: str) -> None:
    """Law: each cause has its sentence."""
    assert words in str(why(found))


def test_every_problem_is_told_and_a_sound_wish_is_begun() -> None:
    """Law: all at once; none without cause."""
    said = str(why(wish(host="alpha", ram="x", mac="y", cpus="z")))
    assert all(f"  {key}: found" in said for key in ("ram", "mac", "cpus"))
    assert why(wish(host="alpha", ram="64")) is None


def test_options_that_would_lose_the_process() -> None:
    """Law: under a lock QEMU is the process that was started; the values of options are not looked at."""
    assert "-daemonize" in str(unsuitable(("-m", "16", "-daemonize")))
    assert "--preconfig" in str(unsuitable(("--preconfig",)))
    assert unsuitable(("-m", "16", "-name", "daemonize")) is None
