"""What keys and settings say reaches other programs as arguments, never as options."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmsupervisor import setting_values
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.spec import RawValue, Spec
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.values import Unfit
from kvmsupervisor.domain.wishes import parse_wish
from kvmsupervisor.domain.words import escaped, is_name, json_option, option
from tests.domain.test_argv import VM, argv
from tests.domain.test_lock import LOCK

_SOUND = {
    "ram": "64",
    "mac": "52:54:00:00:00:01",
    "bridge": "B",
    "rbd": "P/I",
    "disk/1": "P/J",
    "nic/1/mac": "52:54:00:00:00:02",
    "nic/1/bridge": "C",
    "spice_port": "1",
    "spice_addr": "::1",
    "spice_password": "secret",
    "machine": "M",
    "cpu": "C",
    "cpus": "2",
    "shutdown_timeout": "3",
    "memory_limit": "1G",
    "cloud-config": "http://h/x",
}
_hostile = st.text(st.sampled_from("-,=:@\\/.ab%\"'{}[] é\n\0+S"), max_size=12) | st.sampled_from(
    ["-S", "--log-file=x/y", "--mon-host=v1:192.0.2.1:6789/x", "-x/y", "x/-y", "-q35", "-host", "q35,accel=tcg", "a\nb"]
)


def _spec(texts: dict[str, str]) -> Spec | None:
    return parse_wish(VM, {name.encode(): RawValue(text.encode(), 1) for name, text in texts.items()}).spec


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(_SOUND)), _hostile, max_size=4))
def test_no_key_makes_an_option_of_qemu(texts: dict[str, str]) -> None:
    """Law: of all keys but `extra_flags`, no text becomes a word that begins with a hyphen, or holds a line's end."""
    usual = _spec(_SOUND)
    assert usual is not None
    ours = {word for word in argv(usual, spice_password="/r/p") if word.startswith("-")}
    spec = _spec(_SOUND | texts)
    if spec is not None:
        words = argv(spec, spice_password="/r/p")
        assert {word for word in words if word.startswith("-")} <= ours
        assert not any(set(word) & set("\n\0") for word in words)


@pytest.mark.parametrize("key", ["rbd", "disk/1", "cpu", "machine"])
@pytest.mark.parametrize("text", ["-x", "--log-file=x/y", "--mon-host=v1:192.0.2.1/x", "-x/y", "p/-y"])
def test_a_name_never_begins_with_a_hyphen(key: str, text: str) -> None:
    """Law: it is refused in the key, before any program sees it."""
    assert _spec(_SOUND | {key: text}) is None


@pytest.mark.parametrize("parse", [setting_values.ceph_user, setting_values.program])
@pytest.mark.parametrize("text", ["-x", "--id", "a\nb"])
def test_no_setting_is_an_option(parse: object, text: str) -> None:
    """Law: the same of settings."""
    assert callable(parse)
    with pytest.raises(Unfit):
        parse(text)


@pytest.mark.parametrize("name", ["-x", "../x", "a/b", "a\0", 'a"b', "", "a b", "x" * 256])
def test_what_others_wrote_into_etcd_is_no_argument(name: str) -> None:
    """Law: an incarnation becomes a cgroup's name and a machine type an argument: no other text is taken for one."""
    assert not is_name(name)
    assert Lock.from_json(json.dumps({**json.loads(LOCK.to_json()), "incarnation": name}).encode()) is None
    status = Status(id=VM, host="h", phase=Phase.RUNNING, reason="", since="", machine=name, machine_key="q35")
    found = Status.from_json(status.to_json())
    assert found is not None
    assert (found.machine, found.machine_key) == (None, None)


@given(st.text(max_size=30))
def test_the_three_forms(value: str) -> None:
    """Law: each begins with what we wrote, and the value can be had back from it."""
    assert option("--a", value).partition("=") == ("--a", "=", value)
    assert escaped(value).replace(",,", ",") == value
    assert json.loads(json_option({"a": value})) == {"a": value}
