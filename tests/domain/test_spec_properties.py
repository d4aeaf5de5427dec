"""Whatever stands below `/kvm/<id>/`: parsing it hurts nobody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Power, RawValue, RbdDisk, RestartPolicy, Spec, spec_from_object, spec_to_object
from kvmsupervisor.domain.values import show_bytes
from kvmsupervisor.domain.wishes import (
    FREE_KEY,
    FREE_KEY_PREFIX,
    UNKNOWN_KEYS_NAMED,
    VALUE_LIMIT,
    WISH_KEYS,
    parse_wish,
)

VM = InstanceId("vm")

# Time says nothing on a busy machine, and building megabytes is what this is about.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

_known = st.sampled_from([name.encode() for name in (*WISH_KEYS, FREE_KEY, "x-note")])
_hostile = st.sampled_from([b"", b"..", b"a/b", b"nic/0/mac", b"host/", b"/", b"\0", b"ram\n", b"\xff\xfe"])
_names = st.one_of(_known, _known, _hostile, st.binary(max_size=100))
_sound = st.sampled_from(
    [b"64", b"2G", b"on", b"off", b"node1", b"52:54:00:00:00:01", b"br0", b"/rbd/a", b"q35", b"never", b"-S"]
)
_large = st.sampled_from([VALUE_LIMIT, VALUE_LIMIT + 1, 1 << 20]).flatmap(
    lambda size: st.sampled_from([b"1", b"a ", b"\xff", b"'", b"\0"]).map(lambda unit: unit * size)
)
_values = st.one_of(_sound, st.binary(max_size=50), st.text(max_size=50).map(str.encode), _large)
_raws = st.builds(RawValue, _values, st.integers(min_value=1, max_value=2**63 - 1))
_keys = st.dictionaries(_names, _raws, max_size=12)


@patient
@given(_keys)
def test_no_bytes_hurt(keys: Mapping[bytes, RawValue]) -> None:
    """Law: any keys make a wish, the same each time; it has a machine exactly when nothing is wrong."""
    wish = parse_wish(VM, keys)
    assert wish == parse_wish(VM, dict(reversed(list(keys.items()))))
    assert wish.instance == VM
    assert wish.keys == len(keys)
    assert wish.revision == max((raw.mod_revision for raw in keys.values()), default=0)
    if keys:
        assert (wish.spec is None) == bool(wish.problems)
    else:
        assert (wish.spec, wish.problems) == (None, ())
    for problem in wish.problems:
        assert str(problem).isprintable()
        assert problem.key != "unknown keys" or len(str(problem)) < 250 * UNKNOWN_KEYS_NAMED + 500
        assert problem.key.startswith("unknown") or len(str(problem)) < 500


@patient
@given(_keys)
def test_each_bad_key_is_named(keys: Mapping[bytes, RawValue]) -> None:
    """Law: a key that makes a machine impossible by itself is named when it is among others."""
    problems = parse_wish(VM, keys).problems
    named = {problem.key for problem in problems}
    unknown = []
    for key, raw in keys.items():
        if key == FREE_KEY.encode() or key.startswith(FREE_KEY_PREFIX.encode()):
            continue
        if key not in {name.encode() for name in WISH_KEYS}:
            unknown.append(key)
            continue
        alone = parse_wish(VM, {b"ram": RawValue(b"64", 1), key: raw}).problems
        assert (key.decode() in named) == bool(alone)
    for key in sorted(unknown)[:UNKNOWN_KEYS_NAMED]:
        assert show_bytes(key) in problems[-1].found
    assert ("ram" in named) or b"ram" in keys or not keys


_name_chars = st.characters(codec="ascii", categories=["L", "N"])
_words = st.text(_name_chars, min_size=1, max_size=12)
_specs = st.builds(
    Spec,
    ram_mib=st.integers(1, 1 << 24),
    mac=st.none() | st.binary(min_size=5, max_size=5).map(lambda tail: f"52:{tail.hex(':')}"),
    bridge=st.none() | _words,
    rbd=st.none() | st.builds(RbdDisk, pool=_words, image=_words),
    spice_port=st.none() | st.integers(1, 65_535),
    extra_flags=st.lists(st.text(_name_chars | st.sampled_from("\"' \\$,=é"), max_size=10), max_size=5).map(tuple),
    cpus=st.integers(1, 512),
    cpu=st.none() | _words.filter(lambda word: word != "help"),
    machine=_words.filter(lambda word: word != "help"),
)
_spaces = st.text(" \t\n", max_size=3)


def _quoted(words: tuple[str, ...]) -> str:
    return " ".join("'" + word.replace("'", "'\"'\"'") + "'" for word in words)


@patient
@given(_specs, st.sampled_from(Power), st.sampled_from(RestartPolicy), st.integers(0, 86_400), _spaces)
def test_sound_values_round_trip(spec: Spec, power: Power, restart: RestartPolicy, timeout_s: int, space: str) -> None:
    """Law: what is written well is read as it was meant, with any white space around it."""
    texts = {
        "ram": f"{spec.ram_mib}",
        "mac": spec.mac,
        "bridge": spec.bridge,
        "rbd": spec.rbd and f"/{spec.rbd}",
        "spice_port": spec.spice_port and f"{spec.spice_port}",
        "extra_flags": _quoted(spec.extra_flags) or None,
        "cpus": f"{spec.cpus}",
        "cpu": spec.cpu,
        "machine": spec.machine,
        "power": power,
        "restart": restart,
        "shutdown_timeout": f"{timeout_s}",
    }
    keys = {name.encode(): RawValue(f"{space}{text}{space}".encode(), 1) for name, text in texts.items() if text}
    wish = parse_wish(VM, keys)
    assert wish.problems == ()
    assert wish.spec == spec
    assert (wish.power, wish.restart, wish.shutdown_timeout_s) == (power, restart, float(timeout_s))
    assert spec_from_object(spec_to_object(spec)) == spec


def _calls(function: Callable[[], object]) -> int:
    """How many Python and C functions are called: a measure of work that no other process disturbs."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def test_work_grows_no_faster_than_keys() -> None:
    """Law: ten times as many unknown keys are at most about ten times the work."""

    def unknown(number: int) -> dict[bytes, RawValue]:
        return {b"key%d" % n: RawValue(b"x", 1) for n in range(number)}

    few, many = unknown(1_000), unknown(10_000)
    assert _calls(lambda: parse_wish(VM, many)) < 12 * _calls(lambda: parse_wish(VM, few))
