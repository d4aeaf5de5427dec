"""What keys and settings say reaches other programs as arguments, never as options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.config import values as setting_values
from kvmsupervisor.domain.hardware import Handed, Nvram, Ovmf
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.parse_keys import NUMBERED_KEYS, parse_wish
from kvmsupervisor.domain.spec import RawValue, Spec, Wish
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.values import Unfit, shell_words
from kvmsupervisor.domain.words import escaped, is_name, json_option, option
from tests.domain.test_argv import HOST, VM, argv, parts
from tests.domain.test_lock import LOCK

_SOUND = {
    "host": "h",
    "hosts": "h i",
    "ram": "64",
    "ram_max": "128",
    "mac": "52:54:00:00:00:01",
    "bridge": "B",
    "link": "down",
    "rbd": "P/I discard iops=7",
    "disk/1": "P/J ro",
    "nic/1/mac": "52:54:00:00:00:02",
    "nic/1/bridge": "C",
    "nic/1/link": "down",
    "spice_port": "1",
    "spice_addr": "::1",
    "spice_password": "secret",
    "cloud-config": "http://h/x",
    "cpus": "2",
    "cpus_max": "3",
    "snapshot/before": "before the upgrade",
    "rollback_request": "before:1",
    "cdrom": "file:a.iso boot",
    "cpu": "C",
    "machine": "M",
    "firmware": "uefi",
    "hugepages": "2M",
    "display": "std",
    "cpu_shares": "2",
    "memory_limit": "1G",
    "priority": "-3",
    "power": "on",
    "restart": "never",
    "restart_request": "today",
    "shutdown_timeout": "3",
}
"""A value of every key but `extra_flags`, which is QEMU's own options, and those that others stand in for."""

_INSTEAD = {"bridge": ":user", "forward": "tcp:192.0.2.1:2222:22 udp:2222:22", "user-data": "#!/bin/sh"}
_SOUND_TOO = {name: text for name, text in _SOUND.items() if name != "cloud-config"} | _INSTEAD

TEXTS = {"snapshot/before", "rollback_request", "restart_request", "spice_password", "priority"}
"""What may begin with a hyphen: it is no word of any command line."""

_hostile = st.text(st.sampled_from("-,=:@\\/.ab%\"'{}[] é\n\0\x7f+S"), max_size=12) | st.sampled_from(
    ["-S", "--log-file=x/y", "--mon-host=v1:192.0.2.1:6789/x", "-x/y", "x/-y", "-q35", "-host", "q35,accel=tcg", "a\nb"]
)


def _wish(texts: dict[str, str]) -> Wish:
    return parse_wish(VM, {name.encode(): RawValue(text.encode(), 1) for name, text in texts.items()})


def _spec(texts: dict[str, str]) -> Spec | None:
    return _wish(texts).spec


def _words(spec: Spec) -> tuple[str, ...]:
    ready = {"spice_password": 21, "nvram": Nvram(file=Handed(22, "/n")), "media": (Handed(23, "/m"),), "ignition": 24}
    return argv(spec, replace(HOST, ovmf=Ovmf(code="/c", variables="/v")), **ready)


def _names(word: str) -> Iterator[str]:
    """The names of the parameters in one option's argument, as QEMU takes it apart; of JSON those at every depth."""
    if word.startswith("{"):
        found = [json.loads(word)]
        while found:
            one = found.pop()
            if isinstance(one, dict):
                yield from one
                found += one.values()
        return
    first, *rest = parts(word)
    yield from (part.partition("=")[0] for part in ([first, *rest] if "=" in first else rest))


def _shape(spec: Spec) -> set[tuple[str, str]]:
    """Every option of the command line, and with it the name of every parameter."""
    words = _words(spec)[1:]
    options = {(word, "") for word in words if word.startswith("-")}
    # A CPU's features are the user's own, in letters that QEMU's other options have no use for.
    given = {
        (o, name) for o, word in pairwise(words) if o[0] == "-" != word[0] and o != "-cpu" for name in _names(word)
    }
    return options | given


def _sound_shapes() -> set[tuple[str, str]]:
    usual = [
        _SOUND,
        _SOUND | {"rbd": "P/I", "disk/1": "P/J discard"},
        _SOUND_TOO,
        {n: _SOUND[n] for n in _SOUND if n != "firmware"},
    ]
    usual += [{name: text for name, text in _SOUND.items() if name not in {"spice_password", "hugepages"}}]
    specs = [_spec(texts) for texts in usual]
    return {one for spec in specs if spec is not None for one in _shape(spec)}


def test_every_key_is_in_these_tests() -> None:
    """Law: a key that is added is tried with hostile texts, too."""
    numbered = {name.replace("<n>", "1").replace("<name>", "before") for name in NUMBERED_KEYS}
    assert _SOUND.keys() | _SOUND_TOO.keys() | {"extra_flags"} == {*WISH_KEYS, *numbered}
    assert all(_spec(texts) is not None for texts in (_SOUND, _SOUND_TOO))


@given(
    st.sampled_from([_SOUND, _SOUND_TOO]), st.dictionaries(st.sampled_from(sorted(_SOUND_TOO)), _hostile, max_size=4)
)
def test_no_key_makes_an_option_of_qemu(sound: dict[str, str], texts: dict[str, str]) -> None:
    """Law: whatever is let through, the command line has no option, no parameter and no control character more."""
    spec = _spec(sound | texts)
    if spec is not None:
        assert _shape(spec) <= _sound_shapes()
        assert all(word.isprintable() for word in _words(spec))


@pytest.mark.parametrize("key", sorted(_SOUND.keys() - TEXTS))
@pytest.mark.parametrize("text", ["-", "-x", "--log-file=x", "-x/y", "a\0b", "a\x1bb", "\x7f"])
def test_what_is_refused_is_named(key: str, text: str) -> None:
    """Law: no key takes a hyphen at its beginning or a control character, and the problem names that key."""
    assert [problem.key for problem in _wish(_SOUND | {key: text}).problems] == [key]


@pytest.mark.parametrize("key", sorted(_SOUND.keys() - TEXTS - {"hosts"}))
def test_no_value_has_two_lines(key: str) -> None:
    """Law: the same of a line's end; names of hosts may stand in lines of their own."""
    assert [problem.key for problem in _wish(_SOUND | {key: f"{_SOUND[key]}\n{_SOUND[key]}"}).problems] == [key]


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


_shell_texts = st.text(st.sampled_from(" \t\r\n'\"\\ab-=,é\x0b\u00a0#$"), max_size=20)


@given(_shell_texts)
def test_words_are_those_of_a_shell(text: str) -> None:
    """Law: the words are those that Python's shlex makes of it, and what it refuses is refused."""
    try:
        expected = tuple(shlex.split(text, comments=False, posix=True))
    except ValueError:
        with pytest.raises(Unfit, match="it lacks"):
            shell_words(text)
    else:
        assert shell_words(text) == expected
