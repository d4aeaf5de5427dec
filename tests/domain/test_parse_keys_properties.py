"""Whatever stands below `/kvm/<id>/`: parsing it hurts nobody."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import FREE_KEY, FREE_KEY_PREFIX, WISH_KEYS
from kvmsupervisor.domain.parse_keys import (
    DISKS,
    NICS,
    SPICE_PASSWORD_LENGTH,
    UNKNOWN_KEYS_NAMED,
    VALUE_LIMIT,
    parse_wish,
)
from kvmsupervisor.domain.spec import (
    Disk,
    Display,
    Firmware,
    HugePages,
    Nic,
    Power,
    RawValue,
    RbdDisk,
    RestartPolicy,
    Secret,
    Spec,
    spec_from_object,
    spec_to_object,
)
from kvmsupervisor.domain.values import show_bytes

VM = InstanceId("vm")

NUMBERED = [f"nic/{number}/{what}" for number in range(1, NICS) for what in ("mac", "bridge")]
NUMBERED += [f"disk/{number}" for number in range(1, DISKS)]
_known = st.sampled_from([name.encode() for name in (*WISH_KEYS, *NUMBERED, FREE_KEY, "x-note")])
_hostile = st.sampled_from(
    [b"", b"..", b"a/b", b"nic/0/mac", b"nic/8/mac", b"disk/16", b"host/", b"/", b"\0", b"ram\n", b"\xff\xfe"]
)
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


@given(_keys)
def test_each_bad_key_is_named(keys: Mapping[bytes, RawValue]) -> None:
    """Law: a key that makes a machine impossible by itself is named when it is among others.

    What is named besides is at odds with another key: two NICs or disks are the same, a limit is below the memory.
    """
    problems = parse_wish(VM, keys).problems
    named = {problem.key for problem in problems}
    at_odds = {"ram", "memory_limit", *(name for name in NUMBERED if not name.endswith("bridge"))}
    unknown = []
    for key, raw in keys.items():
        if key == FREE_KEY.encode() or key.startswith(FREE_KEY_PREFIX.encode()):
            continue
        if key not in {name.encode() for name in (*WISH_KEYS, *NUMBERED)}:
            unknown.append(key)
            continue
        alone = {problem.key for problem in parse_wish(VM, {b"ram": RawValue(b"64", 1), key: raw}).problems}
        # A limit below the memory is at odds with a memory that is there.
        is_without = key == b"memory_limit" and "ram" in named
        assert key.decode() in named or key.decode() not in alone or is_without
        assert key.decode() not in named or key.decode() in alone | at_odds
    for key in sorted(unknown)[:UNKNOWN_KEYS_NAMED]:
        assert show_bytes(key) in problems[-1].found
    assert ("ram" in named) or b"ram" in keys or not keys


_name_chars = st.characters(codec="ascii", categories=["L", "N"])
_words = st.text(_name_chars, min_size=1, max_size=12)
_macs = st.binary(min_size=4, max_size=4).map(lambda tail: f":{tail.hex(':')}")
_images = st.builds(
    RbdDisk,
    pool=_words,
    image=_words,
    ro=st.booleans(),
    discard=st.booleans(),
    iops=st.none() | st.integers(1, 10**9),
)


def _several(number_of: int, one: st.SearchStrategy[Any], key: Callable[[Any], object]) -> st.SearchStrategy[Any]:
    """Tuples of (number, thing), by number, no two things with the same `key`; number 0 is always there."""
    numbers = st.sets(st.integers(1, number_of - 1), max_size=4).map(sorted)
    return numbers.flatmap(
        lambda found: st.lists(one, min_size=len(found) + 1, max_size=len(found) + 1, unique_by=key).map(
            lambda things: tuple(zip((0, *found), things, strict=True))
        )
    )


@st.composite
def _specs(draw: st.DrawFn) -> Spec:
    nics = tuple(
        Nic(number, f"52:{number:02x}{tail}", draw(st.none() | _words))
        for number, tail in draw(_several(NICS, _macs, str))
    )
    disks = draw(_several(DISKS, _images, lambda rbd: rbd.name))
    ram_mib = draw(st.integers(1, 1 << 24))
    has_first_nic, has_first_disk = draw(st.booleans()), draw(st.booleans())
    return Spec(
        ram_mib=ram_mib,
        mac=nics[0].mac if has_first_nic else None,
        bridge=nics[0].bridge,
        nics=nics[1:],
        rbd=disks[0][1] if has_first_disk else None,
        disks=tuple(Disk(number, rbd) for number, rbd in disks[1:]),
        display=draw(st.none() | st.sampled_from([Display.STD, Display.VIRTIO, Display.QXL])),
        spice_port=draw(st.none() | st.integers(1, 65_535)),
        spice_addr=draw(st.none() | st.ip_addresses().map(str)),
        spice_password=draw(st.none() | _passwords.map(Secret.of)),
        extra_flags=draw(
            st.lists(st.text(_name_chars | st.sampled_from("\"' \\$,=é"), max_size=10), max_size=5).map(tuple)
        ),
        cloud_config=draw(st.none() | _words.map("https://h/{}?a=b,c".format)),
        cpus=draw(st.integers(1, 512)),
        cpu=draw(st.none() | _words.filter(lambda word: word != "help")),
        machine=draw(_words.filter(lambda word: word != "help")),
        firmware=draw(st.sampled_from(Firmware)),
        hugepages=draw(st.none() | st.sampled_from([HugePages.M2, HugePages.G1])),
        cpu_shares=draw(st.none() | st.integers(2, 262_144)),
        memory_limit_mib=draw(st.none() | st.integers(ram_mib, 1 << 24)),
    )


_passwords = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=15).filter(
    lambda text: len(text.encode()) <= SPICE_PASSWORD_LENGTH
)
_spaces = st.text(" \t\n", max_size=3)


def _quoted(words: tuple[str, ...]) -> str:
    return " ".join("'" + word.replace("'", "'\"'\"'") + "'" for word in words)


@given(_specs(), st.sampled_from(Power), st.sampled_from(RestartPolicy), st.integers(-1000, 1000), _spaces)
def test_sound_values_round_trip(spec: Spec, power: Power, restart: RestartPolicy, number: int, space: str) -> None:
    """Law: what is written well is read as it was meant, with any white space around it."""
    secret = spec.spice_password
    texts = {
        "ram": f"{spec.ram_mib}",
        "mac": spec.mac,
        "bridge": spec.bridge,
        **{f"{nic.key}mac": nic.mac for nic in spec.nics},
        **{f"{nic.key}bridge": nic.bridge for nic in spec.nics},
        "rbd": spec.rbd and f"/{spec.rbd}",
        **{disk.key: str(disk.rbd) for disk in spec.disks},
        "display": spec.display,
        "spice_port": spec.spice_port and f"{spec.spice_port}",
        "spice_addr": spec.spice_addr,
        "spice_password": secret and secret.text,
        "extra_flags": _quoted(spec.extra_flags) or None,
        "cloud-config": spec.cloud_config,
        "cpus": f"{spec.cpus}",
        "cpu": spec.cpu,
        "machine": spec.machine,
        "firmware": spec.firmware,
        "hugepages": spec.hugepages,
        "cpu_shares": spec.cpu_shares and f"{spec.cpu_shares}",
        "memory_limit": spec.memory_limit_mib and f"{spec.memory_limit_mib}",
        "priority": f"{number}",
        "power": power,
        "restart": restart,
        "shutdown_timeout": f"{abs(number)}",
    }
    keys = {name.encode(): RawValue(f"{space}{text}{space}".encode(), 1) for name, text in texts.items() if text}
    wish = parse_wish(VM, keys)
    assert wish.problems == ()
    assert wish.spec == spec
    assert wish.spec is not None
    assert (wish.spec.spice_password and wish.spec.spice_password.text) == (secret and secret.text)
    assert (wish.power, wish.restart, wish.priority) == (power, restart, number)
    assert wish.shutdown_timeout_s == float(abs(number))
    assert spec_from_object(json.loads(json.dumps(spec_to_object(spec)))) == spec


@given(st.text("hunter2\0\x1b\u202e \N{SNOWMAN}", min_size=4, max_size=100), st.binary(max_size=3))
def test_a_password_is_never_shown(text: str, tail: bytes) -> None:
    """Law: sound or not, no part of a password is in a wish, its problems or its record."""
    keys = {b"ram": RawValue(b"64", 1), b"spice_password": RawValue(b"hunt" + text.encode() + tail, 1)}
    wish = parse_wish(VM, keys)
    shown = repr(wish) + "".join(map(str, wish.problems)) + json.dumps(wish.spec and spec_to_object(wish.spec))
    assert "hunt" not in shown


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
