"""Wishes: each key by itself, what is said about bad ones, and what belongs to a running machine's record."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import (
    Power,
    RawValue,
    RbdDisk,
    RestartPolicy,
    Spec,
    Wish,
    pending,
    spec_from_object,
    spec_to_object,
)
from kvmsupervisor.domain.wishes import RESERVED_FLAGS, UNKNOWN_KEYS_NAMED, VALUE_LIMIT, WISH_KEYS, parse_wish

DOCS = Path(__file__).parents[2] / "docs" / "instances.md"

FULL = Spec(
    ram_mib=2048,
    mac="52:54:00:12:34:56",
    bridge="br0",
    rbd=RbdDisk(pool="rbd", image="vm1"),
    spice_port=5901,
    extra_flags=("-device", "virtio-rng-pci"),
    cpus=4,
    cpu="qemu64,+aes",
    machine="pc-q35-7.2",
)


def wish(**keys: str | bytes) -> Wish:
    """Parse keys given as `name=value` (`__` for a hyphen); the n-th has revision 10 + n."""
    return parse_wish(
        InstanceId("vm"),
        {
            name.replace("__", "-").encode(): RawValue(value.encode() if isinstance(value, str) else value, revision)
            for revision, (name, value) in enumerate(keys.items(), start=10)
        },
    )


def spec_of(**keys: str) -> Spec:
    """The machine of sound keys, `ram` added."""
    found = wish(**{"ram": "64", **keys})
    assert found.problems == ()
    assert found.spec is not None
    return found.spec


def problem_of(key: str, value: str | bytes) -> str:
    """The one problem of one bad key beside a good `ram`."""
    found = wish(**{"ram": b"64", key: value})
    assert found.spec is None
    (problem,) = found.problems
    assert problem.key == key.replace("__", "-")
    return str(problem)


def test_no_keys_are_no_problem() -> None:
    """Law: an instance without keys was removed; nothing is wrong with it and there is nothing to run."""
    assert parse_wish(InstanceId("vm"), {}) == Wish(instance=InstanceId("vm"))


def test_the_least_wish() -> None:
    """Law: `ram` alone makes a machine with the defaults of the table, and no host."""
    found = wish(ram="2048")
    assert found == Wish(instance=InstanceId("vm"), spec=Spec(ram_mib=2048), revision=10, keys=1, power=Power.ON)


def test_every_key_at_once() -> None:
    """Law: every key of the table arrives in the wish, with the revisions that decisions need."""
    found = wish(
        host="node1",
        ram="2G",
        mac="52-54-00-12-34-56",
        bridge="br0",
        rbd="/rbd/vm1",
        spice_port="5901",
        extra_flags="-device virtio-rng-pci",
        cpus="4",
        cpu="qemu64,+aes",
        machine="pc-q35-7.2",
        firmware="bios",
        power="off",
        restart="on-failure",
        restart_request="2024-05-01",
        shutdown_timeout="2.5",
        description="\0\N{SNOWMAN}",
        x__owner=b"\xff",
    )
    assert found == Wish(
        instance=InstanceId("vm"),
        host="node1",
        host_revision=10,
        power=Power.OFF,
        power_revision=21,
        restart=RestartPolicy.ON_FAILURE,
        restart_request="2024-05-01",
        shutdown_timeout_s=2.5,
        spec=FULL,
        problems=(),
        revision=26,
        keys=17,
    )


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("1", 1),
        ("2048", 2048),
        (" 512M\n", 512),
        ("512m", 512),
        ("2G", 2048),
        ("2GiB", 2048),
        ("2 gib", 2048),
        ("1T", 1 << 20),
        ("16T", 1 << 24),
    ],
)
def test_ram(text: str, mib: int) -> None:
    """Law: memory is MiB without a unit, or carries M, G or T of 1024 in any case."""
    assert spec_of(ram=text).ram_mib == mib


@pytest.mark.parametrize("text", ["0", "17T", "-1", "1.5G", "2GB", "2B", "2K", "٣", "1_0", "0x10", "G", "9" * 5000])
def test_bad_ram(text: str) -> None:
    """Law: what is no clear amount of memory within the bounds is refused, however long."""
    assert [problem.key for problem in wish(ram=text).problems] == ["ram"]


def test_ram_is_required() -> None:
    """Law: keys without `ram` are a problem that says so."""
    found = wish(host="node1")
    assert [str(problem) for problem in found.problems] == [
        "ram: found nothing; it is required: how much memory the machine has, such as 2048 (MiB) or 2G"
    ]
    assert (found.host, found.spec) == ("node1", None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("host", "a b"),
        ("host", "-a"),
        ("host", "a/b"),
        ("host", "é"),
        ("host", "a" * 254),
        ("mac", "52:54:00:12:34"),
        ("mac", "52:54-00:12:34:56"),
        ("mac", "5254.0012.3456"),
        ("mac", "01:00:5e:00:00:01"),
        ("mac", "00:00:00:00:00:00"),
        ("mac", "52:54:00:12:34:56,netdev=x"),
        ("bridge", "a/b"),
        ("bridge", "a b"),
        ("bridge", "a:b"),
        ("bridge", "."),
        ("bridge", ".."),
        ("bridge", "sixteen-bytes-xx"),
        ("bridge", "éééééééé"),
        ("bridge", "a\0"),
        ("rbd", "vm1"),
        ("rbd", "/rbd/"),
        ("rbd", "rbd/ns/vm1"),
        ("rbd", "rbd/vm1@snap"),
        ("rbd", "rbd/vm 1"),
        ("rbd", "rbd/vm\x1b1"),
        ("spice_port", "0"),
        ("spice_port", "65536"),
        ("spice_port", "5900.5"),
        ("extra_flags", "-append 'unbalanced"),
        ("extra_flags", "-append back\\"),
        ("extra_flags", "-append a\0b"),
        ("cpus", "0"),
        ("cpus", "513"),
        ("cpus", "+1"),
        ("cpu", "host x"),
        ("cpu", "help"),
        ("machine", "q35,accel=tcg"),
        ("machine", "help"),
        ("firmware", "coreboot"),
        ("power", "ON"),
        ("restart", "sometimes"),
        ("restart_request", "x" * 257),
        ("shutdown_timeout", "inf"),
        ("shutdown_timeout", "nan"),
        ("shutdown_timeout", "1e3"),
        ("shutdown_timeout", "-1"),
        ("shutdown_timeout", "86400.1"),
        ("cloud__config", "ftp://h/x"),
        ("cloud__config", "http:///x"),
        ("cloud__config", "http://[/x"),
        ("cloud__config", "http://h:99999/x"),
        ("cloud__config", "file:relative"),
        ("cloud__config", "file://h/x"),
        ("cloud__config", "http://h/a b"),
    ],
)
def test_bad_values(key: str, value: str) -> None:
    """Law: a value outside the table's rule is one problem of its key."""
    assert "not supported" not in problem_of(key, value)


@pytest.mark.parametrize("key", WISH_KEYS)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "not empty"),
        (b" \n\t", "not empty"),
        (b"a\xff", "(not UTF-8 at byte 1); a value is UTF-8 text"),
        (b"1" * (VALUE_LIMIT + 1), f"more than {VALUE_LIMIT} bytes"),
    ],
)
def test_values_that_suit_no_key(key: str, value: bytes, said: str) -> None:
    """Law: an empty value, one that is not UTF-8 and one that is too long is a problem of any key."""
    found = wish(**{"ram": b"64", key: value})
    assert [problem.key for problem in found.problems] == [key]
    assert said in str(found.problems[0])


@pytest.mark.parametrize(
    "url", ["http://h/x", "https://u:secret@h:8443/x?y", "http://[::1]/x", "file:///x", "file://localhost/x"]
)
def test_media_are_not_supported_yet(url: str) -> None:
    """Law: a sound URL is still a problem, which says that it is this version's; no password is repeated."""
    said = problem_of("cloud__config", url)
    assert "media are not supported by this version" in said
    assert "secret" not in said


def test_uefi_is_not_supported_yet() -> None:
    """Law: `uefi` is a known word, and a problem of this version."""
    assert "not supported by this version" in problem_of("firmware", "uefi")


def test_extra_flags_are_split_like_shell_words() -> None:
    """Law: quotes and backslashes count, nothing is expanded and nothing is a comment."""
    flags = spec_of(extra_flags="""-append "a  b" 'c d'e \\" $HOME *.img #x ''""").extra_flags
    assert flags == ("-append", "a  b", "c de", '"', "$HOME", "*.img", "#x", "")


@pytest.mark.parametrize("flag", RESERVED_FLAGS)
def test_flags_by_which_qemu_would_be_lost(flag: str) -> None:
    """Law: options that would take QEMU out of the supervisor's sight are refused, in both spellings."""
    assert f"leave -{flag} out" in problem_of("extra_flags", f"-m 1 -{flag}")
    assert f"leave --{flag} out" in problem_of("extra_flags", f"--{flag}")


def test_sound_keys_count_beside_bad_ones() -> None:
    """Law: `power=off` beside a bad `ram` still says off; a bad `power` says neither, a bad host names nobody."""
    found = wish(ram="x", power="off", host="node1", restart="never", shutdown_timeout="5")
    assert (found.power, found.host, found.restart, found.shutdown_timeout_s) == (
        Power.OFF,
        "node1",
        RestartPolicy.NEVER,
        5.0,
    )
    bad = wish(ram="1G", power="aus", host="!")
    assert (bad.power, bad.power_revision, bad.host, bad.host_revision) == (None, 11, None, 12)
    assert [problem.key for problem in bad.problems] == ["host", "power"]


def test_values_are_shown_short_and_visible() -> None:
    """Law: what was found is repeated in quotes, control characters visible, cut at about 80 characters."""
    assert "found '\\x1b[31mred'" in problem_of("power", "\x1b[31mred")
    assert "\\u202e" in problem_of("power", "\u202ex")
    long = problem_of("power", "x" * 300)
    assert "…' (300 characters)" in long
    assert len(long) < 150
    assert len(problem_of("power", "\0" * 300)) < 150
    assert len(problem_of("power", b"\xff" * 300)) < 150


def test_unknown_keys_are_one_problem() -> None:
    """Law: unknown keys, nested ones too, are one problem that quotes the first twenty and counts the others."""
    keys = {f"k{number:04}".encode(): RawValue(b"", 1) for number in range(10_000)}
    found = parse_wish(InstanceId("vm"), {**keys, b"ram": RawValue(b"64", 1), b"nic/0/mac": RawValue(b"", 1)})
    (problem,) = found.problems
    assert problem.key == "unknown keys"
    assert problem.found.count("'") == 2 * UNKNOWN_KEYS_NAMED
    assert problem.found.startswith("'k0000', ")
    assert problem.found.endswith("and 9981 more")
    assert found.keys == 10_002


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("memory", "ram"),
        ("RAM", "ram"),
        ("cloud_config", "cloud-config"),
        ("extra-flags", "extra_flags"),
        ("sipce_port", "spice_port"),
        ("disk", "rbd"),
        ("desciption", "description"),
    ],
)
def test_near_misses(name: str, meant: str) -> None:
    """Law: a key that was probably meant is named."""
    (problem,) = wish(ram="64", **{name: "1"}).problems
    assert problem.key == "unknown key"
    assert problem.found == f"'{name}' (did you mean {meant}?)"


def test_far_misses_suggest_nothing() -> None:
    """Law: a name like no other is quoted without a guess, an undecodable and an empty one too."""
    found = parse_wish(InstanceId("vm"), {b"": RawValue(b"", 1), b"\xff": RawValue(b"", 1), b"foo": RawValue(b"", 1)})
    assert found.problems[-1].found == "'', 'foo', b'\\xff' (not UTF-8 at byte 0)"


def test_pending_names_keys_as_people_write_them() -> None:
    """Law: what differs is named by its key, each field of the machine alone and all of them together."""
    other = Spec(
        ram_mib=1,
        mac="52:54:00:00:00:01",
        bridge="br1",
        rbd=RbdDisk(pool="rbd", image="vm2"),
        spice_port=1,
        extra_flags=(),
        cpus=1,
        cpu="host",
        machine="pc",
    )
    keys = ("ram", "mac", "bridge", "rbd", "spice_port", "extra_flags", "cpus", "cpu", "machine")
    assert pending(FULL, FULL) == ()
    assert pending(FULL, other) == keys
    assert set(keys) < set(WISH_KEYS)
    assert pending(FULL, replace(FULL, ram_mib=1, cpu=None)) == ("ram", "cpu")


@pytest.mark.parametrize("spec", [FULL, Spec(ram_mib=64)])
def test_record_round_trip(spec: Spec) -> None:
    """Law: a machine survives JSON, and fields of a newer release are left out."""
    found = json.loads(json.dumps(spec_to_object(spec)))
    assert spec_from_object(found) == spec
    assert spec_from_object(found | {"firmware": "uefi"}) == spec


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        {"ram_mib": "64"},
        {"ram_mib": True},
        {"ram_mib": None},
        {"ram_mib": 64, "rbd": "nothing"},
        {"ram_mib": 64, "rbd": {"pool": "p"}},
        {"ram_mib": 64, "extra_flags": "-S"},
        {"ram_mib": 64, "extra_flags": [1]},
        {"ram_mib": 64, "cpus": None},
        {"ram_mib": 64, "machine": None},
        {"ram_mib": 64, "mac": 7},
    ],
)
def test_what_is_no_record(found: object) -> None:
    """Law: anything else read back is None, never an exception."""
    assert spec_from_object(found) is None


def test_the_page_tells_every_key() -> None:
    """Law: docs/instances.md has a row for each wish and no other, and its example is sound."""
    text = DOCS.read_text()
    rows = re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE)
    assert rows == [*WISH_KEYS, "description"]
    example = re.findall(r"^etcdctl put /kvm/web1/(\S+) '?([^'\n]+)'?$", text, flags=re.MULTILINE)
    assert len(example) >= 8
    assert wish(**dict(example)).problems == ()
    assert all(f"`-{flag}`" in text for flag in RESERVED_FLAGS)
