"""Wishes: each key by itself, and what is said about bad ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.parse_keys import (
    DISKS,
    NICS,
    NUMBERED_KEYS,
    RESERVED_FLAGS,
    SECRET_KEYS,
    UNKNOWN_KEYS_NAMED,
    VALUE_LIMIT,
    parse_wish,
)
from kvmsupervisor.domain.spec import (
    Disk,
    Display,
    HugePages,
    Nic,
    Power,
    RawValue,
    RbdDisk,
    RestartPolicy,
    Spec,
    Wish,
)
from kvmsupervisor.domain.values import show, strange
from tests.support.spec import FULL

DOCS = Path(__file__).parents[2] / "docs" / "instances.md"


def wish(**keys: str | bytes) -> Wish:
    """Parse keys given as `name=value`; the first has revision 10, the next one 11, and so on."""
    return parse_wish(
        InstanceId("vm"),
        {
            name.encode(): RawValue(value.encode() if isinstance(value, str) else value, revision)
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
    assert problem.key == key
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
    keys: dict[str, str | bytes] = {
        "host": "node1",
        "ram": "2G",
        "mac": "52-54-00-12-34-56",
        "bridge": "br0",
        "nic/2/mac": "52-54-00-12-34-57",
        "nic/2/bridge": "br1",
        "nic/7/mac": "52:54:00:12:34:58",
        "rbd": "/rbd/vm1 discard",
        "disk/1": "rbd/vm2 ro",
        "disk/15": "/p/i iops=500\tdiscard",
        "display": "virtio",
        "spice_port": "5901",
        "spice_addr": "0:0::1",
        "spice_password": " hush hush\n",
        "extra_flags": "-device virtio-rng-pci",
        "cloud-config": "https://h/user-data",
        "cpus": "4",
        "cpu": "qemu64,+aes",
        "machine": "pc-q35-7.2",
        "firmware": "uefi",
        "hugepages": "2M",
        "cpu_shares": "2048",
        "memory_limit": "4G",
        "priority": "-7",
        "power": "off",
        "restart": "on-failure",
        "restart_request": "2024-05-01",
        "shutdown_timeout": "2.5",
        "description": "\0\N{SNOWMAN}",
        "x-owner": b"\xff",
    }
    found = wish(**keys)
    assert found == Wish(
        instance=InstanceId("vm"),
        host="node1",
        host_revision=10,
        power=Power.OFF,
        power_revision=34,
        restart=RestartPolicy.ON_FAILURE,
        restart_request="2024-05-01",
        shutdown_timeout_s=2.5,
        priority=-7,
        spec=FULL,
        problems=(),
        revision=39,
        keys=30,
    )
    assert found.spec is not None
    assert found.spec.spice_password is not None
    assert found.spec.spice_password.text == "hush hush"


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
        ("rbd", "rbd/ns/vm1/x"),
        ("rbd", "rbd//vm1"),
        ("rbd", "rbd/-ns/vm1"),
        ("rbd", "rbd/vm1@snap"),
        ("rbd", "rbd/vm 1"),
        ("rbd", "rbd/vm1 rw"),
        ("rbd", "rbd/vm1 ro ro"),
        ("rbd", "rbd/vm1 ro=1"),
        ("rbd", "rbd/vm1 discard="),
        ("rbd", "rbd/vm1 iops"),
        ("rbd", "rbd/vm1 iops="),
        ("rbd", "rbd/vm1 iops=0"),
        ("rbd", "rbd/vm1 iops=1 iops=1"),
        ("disk/1", "rbd/vm1 ro discard x"),
        ("disk/1", "vm1"),
        ("rbd", "rbd/vm\x1b1"),
        ("spice_port", "0"),
        ("spice_port", "65536"),
        ("spice_port", "5900.5"),
        ("spice_addr", "localhost"),
        ("spice_addr", "127.0.0.1:5900"),
        ("spice_addr", "[::1]"),
        ("spice_addr", "10.0.0.0/8"),
        ("spice_addr", "::1%a\0b"),
        ("spice_addr", "::1%a,b=c"),
        ("spice_addr", "::1%a b"),
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
        ("display", "VGA"),
        ("display", "cirrus"),
        ("hugepages", "2m"),
        ("hugepages", "4K"),
        ("hugepages", "on"),
        ("cpu_shares", "1"),
        ("cpu_shares", "262145"),
        ("memory_limit", "1.5G"),
        ("priority", "1001"),
        ("priority", "-1001"),
        ("priority", "+1"),
        ("priority", "1.0"),
        ("priority", "--1"),
        ("power", "ON"),
        ("restart", "sometimes"),
        ("restart_request", "x" * 257),
        ("shutdown_timeout", "inf"),
        ("shutdown_timeout", "nan"),
        ("shutdown_timeout", "1e3"),
        ("shutdown_timeout", "-1"),
        ("shutdown_timeout", "86400.1"),
        ("cloud-config", "ftp://h/x"),
        ("cloud-config", "http:///x"),
        ("cloud-config", "http://[/x"),
        ("cloud-config", "http://h:99999/x"),
        ("cloud-config", "file:relative"),
        ("cloud-config", "file://h/x"),
        ("cloud-config", "http://h/a b"),
    ],
)
def test_bad_values(key: str, value: str) -> None:
    """Law: a value outside the table's rule is one problem of its key."""
    held = strange(value)
    told = "" if held is None else f", which holds {held}"
    assert problem_of(key, value).startswith(f"{key}: found {show(value)}{told}; ")


def test_viewers_need_something_to_look_at() -> None:
    """Law: a port for viewers beside `display=none` is a problem; each alone is not."""
    assert [str(one) for one in wish(ram="64", display="none", spice_port="5901").problems] == [
        "display: found 'none', and spice_port beside it; that port is of viewers, who look at a display: write "
        "another one, or delete spice_port"
    ]
    for keys in ({"display": "none"}, {"spice_port": "5901"}, {"display": "std", "spice_port": "5901"}):
        assert wish(ram="64", **keys).problems == ()


def test_the_screen_of_a_machine() -> None:
    """Law: without the key it is qxl where there is a port for viewers, and none elsewhere."""
    screens = {
        (): Display.NONE,
        (("spice_port", "1"),): Display.QXL,
        (("display", "std"),): Display.STD,
        (("display", "virtio"), ("spice_port", "1")): Display.VIRTIO,
    }
    for keys, screen in screens.items():
        spec = wish(ram="64", **dict(keys)).spec
        assert spec is not None
        assert spec.screen is screen


@pytest.mark.parametrize("key", [*WISH_KEYS, "nic/1/mac", "disk/15"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "not empty"),
        (b" \n\t", "not empty"),
        (b"a\xff", "; a value is UTF-8 text"),
        (b"1" * (VALUE_LIMIT + 1), f"more than {VALUE_LIMIT} bytes"),
    ],
)
def test_values_that_suit_no_key(key: str, value: bytes, said: str) -> None:
    """Law: an empty value, one that is not UTF-8 and one that is too long is a problem of any key."""
    found = wish(**{"ram": b"64", key: value})
    assert [problem.key for problem in found.problems] == [key]
    assert said in str(found.problems[0])
    if key not in SECRET_KEYS and value == b"a\xff":
        assert found.problems[0].found == "b'a\\xff' (not UTF-8 at byte 1)"


@pytest.mark.parametrize(
    "url", ["http://h/x", "https://u:secret@h:8443/x?y", "http://[::1]/x", "file:///x", "file://localhost/x"]
)
def test_user_data(url: str) -> None:
    """Law: a URL that can be fetched is a sound value, kept as it is."""
    assert spec_of(**{"cloud-config": url}).cloud_config == url


def test_a_url_with_a_password_is_shown_without_it() -> None:
    """Law: problems are public: what stands before the @ of a URL is not repeated."""
    said = problem_of("cloud-config", "ftp://user:secret@h/x")
    assert "//…@h/x" in said
    assert "secret" not in said
    assert "user" not in said


# --- numbered keys --------------------------------------------------------------------------------------------


def test_the_bounds_of_numbered_keys() -> None:
    """Law: NICs count from 1 to 7 and disks from 1 to 15 beside the first; the order is that of the numbers."""
    found = spec_of(
        **{f"disk/{number}": f"p/i{number}" for number in range(DISKS - 1, 0, -1)},
        **{f"nic/{number}/mac": f"52:54:00:00:00:0{number}" for number in range(NICS - 1, 0, -1)},
    )
    assert found.nics == tuple(Nic(number, f"52:54:00:00:00:0{number}") for number in range(1, NICS))
    assert found.disks == tuple(Disk(number, RbdDisk("p", f"i{number}")) for number in range(1, DISKS))


@pytest.mark.parametrize(
    "key",
    [
        *("nic/0/mac", "nic/8/mac", "nic/01/mac", "nic/1", "nic/1/", "nic/1/mtu", "nic/-1/mac", "nic/1/mac/x"),
        *("disk/16", "disk/01", "disk/1/", "disk/x", "disk/+1", "disk/1\n"),
        *("nic/\N{ARABIC-INDIC DIGIT ONE}/mac", "disk/\N{ARABIC-INDIC DIGIT ONE}"),
    ],
)
def test_numbers_out_of_bounds_are_unknown_keys(key: str) -> None:
    """Law: each disk and NIC has exactly one name; any other is an unknown key, and the bounds are told."""
    (problem,) = wish(**{"ram": "64", key: "p/i"}).problems
    assert problem.key == "unknown key"
    assert f"NICs to {NICS - 1}, disks to {DISKS - 1}" in problem.wanted


def test_a_nic_needs_its_mac() -> None:
    """Law: a bridge without a MAC is a problem of a further NIC: its number would name nothing."""
    (problem,) = wish(**{"ram": "64", "nic/3/bridge": "br0"}).problems
    assert (problem.key, problem.found) == ("nic/3/mac", "nothing")
    assert spec_of(bridge="br0").all_nics == ()


@pytest.mark.parametrize(
    ("keys", "blamed", "other"),
    [
        ({"mac": "52:54:00:00:00:01", "nic/1/mac": "52-54-00-00-00-01"}, "nic/1/mac", "mac"),
        ({"nic/1/mac": "5A:54:00:00:00:01", "nic/2/mac": "5a:54:00:00:00:01"}, "nic/2/mac", "nic/1/mac"),
        ({"rbd": "/p/i", "disk/1": "p/i ro"}, "disk/1", "rbd"),
        ({"disk/2": "p/i", "disk/10": "p/i"}, "disk/10", "disk/2"),
    ],
)
def test_what_may_not_be_there_twice(keys: dict[str, str], blamed: str, other: str) -> None:
    """Law: two NICs with one address, and two disks that are one image, are a problem that names both keys."""
    (problem,) = wish(**{"ram": "64", **keys}).problems
    assert problem.key == blamed
    assert f"which {other} has, too" in problem.found


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("/p/i", RbdDisk("p", "i")),
        ("p/i ro", RbdDisk("p", "i", ro=True)),
        ("p/i  discard\n iops=1", RbdDisk("p", "i", discard=True, iops=1)),
        ("p,=:/i{}\"'\\", RbdDisk("p,=:", "i{}\"'\\")),
    ],
)
def test_disks(text: str, disk: RbdDisk) -> None:
    """Law: behind the image stand its options; any other character belongs to its name."""
    assert spec_of(rbd=text).rbd == disk
    assert spec_of(**{"disk/5": text}).disks == (Disk(5, disk),)


def test_huge_pages_may_be_switched_off() -> None:
    """Law: `off` is what a missing key says."""
    assert spec_of(hugepages="off") == spec_of()
    assert spec_of(hugepages="1G").hugepages is HugePages.G1


@pytest.mark.parametrize(
    ("keys", "sound"),
    [
        ({"ram": "2G", "memory_limit": "2047"}, False),
        ({"ram": "2G", "memory_limit": "2048"}, True),
        ({"ram": "2G", "memory_limit": "1", "hugepages": "2M"}, True),
    ],
)
def test_a_limit_leaves_room_for_the_guest(keys: dict[str, str], sound: bool) -> None:
    """Law: a limit below the guest's own memory is a problem, unless that is made of huge pages, which do not count."""
    problems = wish(**keys).problems
    assert [problem.key for problem in problems] == ([] if sound else ["memory_limit"])


# --- the password ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"hunter2\xff",
        b"\xffhunter2",
        b"hunter2\0",
        b"hunter2\x1b[31m",
        b"hunter2" * 10,
        b"hunter2" * 20_000,
        "hunter2\N{SNOWMAN}".encode() * 8,
    ],
)
def test_a_bad_password_is_shown_nowhere(value: bytes) -> None:
    """Law: whatever is wrong with the password, no part of it is repeated."""
    found = wish(ram=b"64", spice_password=value)
    (problem,) = found.problems
    assert problem.key == "spice_password"
    for said in (str(problem), repr(found)):
        assert "hunter" not in said
        assert "\\x" not in said


def test_a_good_password_is_shown_nowhere() -> None:
    """Law: neither the wish nor a problem beside it repeats the password."""
    found = wish(ram="64", spice_password="hunter2", cpus="x")
    assert "hunter2" not in repr(found)
    assert "hunter2" not in repr(spec_of(spice_password="hunter2"))


# --- words of QEMU's ------------------------------------------------------------------------------------------


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
        ("disk", "disk/0"),
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


def test_the_page_tells_every_key() -> None:
    """Law: docs/instances.md has a row for each wish and no other, and its example is sound."""
    text = DOCS.read_text()
    table = text.partition("\n| key ")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)
    assert rows == [*WISH_KEYS, *NUMBERED_KEYS, "description"]
    example = re.findall(r"^etcdctl put /kvm/web1/(\S+) '?([^'\n]+)'?$", text, flags=re.MULTILINE)
    assert len(example) >= 8
    assert wish(**dict(example)).problems == ()
    assert all(f"`-{flag}`" in text for flag in RESERVED_FLAGS)
