"""What Ceph's tools print, read; whatever they print hurts nobody."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.ceph import (
    Trouble,
    client_address,
    keyring_paths,
    last_words,
    parse_added,
    parse_blocklist,
    parse_info,
    parse_keyring,
    parse_locks,
    parse_read_policy,
    parse_watchers,
    trouble,
)
from kvmsupervisor.domain.records import Unfit

PARSERS: tuple[Callable[[bytes], object], ...] = (
    *(parse_info, parse_watchers, parse_locks, parse_read_policy, parse_blocklist),
)

# Printed by Ceph 16.2.
INFO = b'{"name":"vm1","id":"1016","size":8388608,"order":22,"format":2,"features":["layering","exclusive-lock"]}\n'
STATUS = b'{"watchers":[{"address":"127.0.0.1:0/196779820","client":4267,"cookie":140064453656736}]}\n'
LOCKS = b'[{"id":"auto 140031301784736","locker":"client.4285","address":"127.0.0.1:0/1768140858"}]\n'
BLOCKLIST = (
    b'\n[{"addr":"[fd00::1]:0/12345","until":"2026-11-24T23:58:08.400000+0000"},'
    b'{"addr":"127.0.0.1:0/0","until":"2026-12-24T22:58:12.400000+0000"}][]'
)
NO_KEYRING = """\
2026-11-24T22:59:06.613+0000 7fbbf42aa380 -1 auth: unable to find a keyring on /x/client.nobody.keyring: (2) No such file or directory
rbd: couldn't connect to the cluster!
"""  # noqa: E501
WRONG_KEY = """\
2026-11-24T22:59:06.653+0000 7f30a029b6c0 -1 monclient(hunting): handle_auth_bad_method server allowed_methods [] but i only support [2]
rbd: couldn't connect to the cluster!
"""  # noqa: E501


def test_what_the_tools_print_is_understood() -> None:
    """Law: sizes, features and addresses as they stand there."""
    assert parse_info(INFO).size == 8 << 20
    assert parse_info(INFO).has_exclusive_lock
    assert parse_watchers(STATUS) == {"127.0.0.1:0/196779820"}
    assert parse_watchers(b'{"watchers":[]}') == frozenset()
    (lock,) = parse_locks(LOCKS)
    assert (lock.name, lock.locker, lock.client) == ("auto 140031301784736", "client.4285", "127.0.0.1:0/1768140858")
    assert lock.is_exclusive
    (other,) = parse_locks(LOCKS.replace(b"auto 140031301784736", b"--x"))
    assert not other.is_exclusive
    assert parse_locks(b"[]") == ()
    assert parse_blocklist(b"\n[][]") == {}


def test_an_entry_for_a_whole_host_proves_nothing_of_one_client() -> None:
    """FENCING: only the exact nonce counts, so an entry of port and nonce 0 is left out."""
    assert parse_blocklist(BLOCKLIST) == {"[fd00::1]:0/12345": datetime(2026, 11, 24, 23, 58, 8, 400000, tzinfo=UTC)}


def test_from_where_an_image_is_read() -> None:
    """Law 5: as librbd says; one that has no such setting reads from primaries."""
    said = b'[{"name":"rbd_cache","value":"true","source":"config"},{"name":"%s","value":"balance","source":"image"}]'
    assert parse_read_policy(said % b"rbd_read_from_replica_policy") == "balance"
    assert parse_read_policy(said % b"rbd_readahead_max_bytes") == "default"
    with pytest.raises(Unfit, match="not a word"):
        parse_read_policy(b'[{"name":"rbd_read_from_replica_policy","value":1}]')


def test_until_when() -> None:
    """Law 4: both tools name a time with its zone; without one it would be anybody's."""
    said = "blocklisting 192.0.2.1:0/7 until 2027-11-24T23:12:44.078854+0000 (3.1536e+07 sec)\n"
    assert parse_added(said) == datetime(2027, 11, 24, 23, 12, 44, 78854, tzinfo=UTC)
    for odd in ("", "until tomorrow", said.replace("+0000", ""), said.replace("2027-11", "never")):
        with pytest.raises(Unfit):
            parse_added(odd)
    with pytest.raises(Unfit, match="is no time"):
        parse_blocklist(b'[{"addr":"127.0.0.1:0/5","until":"soon"}]')


def test_without_exclusive_lock() -> None:
    """Law 5: the feature is looked for by its name."""
    assert not parse_info(INFO.replace(b"exclusive-lock", b"exclusive-lock-transition")).has_exclusive_lock


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0/7", "127.0.0.1:0/7"),
        ("v1:10.1.2.3:0/4294967295", "10.1.2.3:0/4294967295"),
        ("v2:10.1.2.3:0/12", "10.1.2.3:0/12"),
        ("any:10.1.2.3:6800/12", "10.1.2.3:6800/12"),
        ("[fd00::1]:0/5", "[fd00::1]:0/5"),
        ("v2:[FD00:0:0:0:0:0:0:1]:0/5", "[fd00::1]:0/5"),
    ],
)
def test_an_address_has_one_form(text: str, address: str) -> None:
    """Law: the same client is the same text, whatever the protocol; IPv6 has brackets."""
    assert client_address(text) == address
    assert client_address(address) == address


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:0/0", "127.0.0.1:0/00", "10.0.0.0/8", "127.0.0.1/7", "fd00::1:0/5",
     "127.0.0.1:0/4294967296", "127.0.0.1:65536/1", "999.0.0.1:0/5", "[fd00:::1]:0/5", "127.0.0.1:0/7 ", "-1:0/7",
     "v1:v2:127.0.0.1:0/7", "127.0.0.1:0/-7", "127.0.0.1:0/٧", "[fe80::1%eth0]:0/5", "[v2:1.2.3.4:0/7,v1:1.2.3.4:0/7]"],
)  # fmt: skip
def test_what_is_not_exactly_one_client_is_refused(text: str) -> None:
    """FENCING: a bare IP, a range or nonce 0 would hit everything on that host, OSDs included."""
    with pytest.raises(Unfit):
        client_address(text)


@given(
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.integers(0, 65535), st.integers(1, 2**32 - 1),
    st.sampled_from(["", "v1:", "v2:", "any:"]),
)  # fmt: skip
def test_every_client_has_an_address(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, nonce: int, kind: str
) -> None:
    """Law: whatever Ceph may print for a client is read, and reading it again changes nothing."""
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    found = client_address(f"{kind}{host}:{port}/{nonce}")
    assert client_address(found) == found
    assert found.endswith(f":{port}/{nonce}")


@given(st.text(st.sampled_from("0123456789.:/[]v,anyfd x\n"), max_size=30))
def test_no_text_becomes_more_than_one_client(text: str) -> None:
    """Law: what is accepted names one nonce, and has nothing that a tool would take for an option."""
    try:
        found = client_address(text)
    except Unfit:
        return
    assert found.rpartition("/")[2] not in {"", "0"}
    assert found[0].isdigit() or found[0] == "["


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=10), st.just("127.0.0.1:0/5")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["watchers", "address", "addr", "until", "features", "size", "x"]), inner, max_size=4
        ),
    ),
    max_leaves=12,
)


@given(st.one_of(st.binary(max_size=60), JSON.map(lambda found: json.dumps(found).encode())))
def test_no_output_hurts(data: bytes) -> None:
    """Law: whatever a tool prints is read as a whole or refused as a whole; each address is one client's."""
    for parse in PARSERS:
        try:
            found: Any = parse(data)
        except Unfit as error:
            assert len(str(error)) < 400  # noqa: PT017 - both outcomes are right
            continue
        if parse not in {parse_info, parse_read_policy}:
            assert all(client_address(address) == address for address in found)


@pytest.mark.parametrize("parse", PARSERS)
def test_deep_output_hurts_nobody(parse: Callable[[bytes], object]) -> None:
    """Law: nesting beyond the interpreter's depth is refused like any other nonsense."""
    with pytest.raises(Unfit):
        parse(b"[" * 100_000)


def test_a_watcher_that_is_not_understood_is_not_left_out() -> None:
    """Law 3: an address more or less decides who may write; one odd entry makes the whole unfit."""
    odd = b'{"watchers":[{"address":"127.0.0.1:0/1"},{"address":"elsewhere"}]}'
    with pytest.raises(Unfit, match="elsewhere"):
        parse_watchers(odd)
    with pytest.raises(Unfit, match="no list of watchers"):
        parse_watchers(b"{}")


@pytest.mark.parametrize(
    ("status", "stderr", "kind", "words"),
    [
        (2, "rbd: error opening image keyring: (2) No such file or directory\n", Trouble.NO_IMAGE, "rbd: error"),
        (2, "rbd: error opening pool 'x': (2) No such file or directory\n", Trouble.NO_POOL, "rbd: error opening pool"),
        (2, NO_KEYRING, Trouble.REFUSED, "rbd: couldn't connect"),
        (13, WRONG_KEY, Trouble.REFUSED, "rbd: couldn't connect"),
        (1, "rbd: error opening image vm1: (1) Operation not permitted\n", Trouble.REFUSED, "rbd: error opening image"),
        (13, "Error EACCES: access denied\n", Trouble.REFUSED, "Error EACCES"),
        (13, "[errno 13] RADOS permission denied (error connecting to the cluster)\n", Trouble.REFUSED, "[errno 13]"),
        (1, "global_init: unable to open config file from search list /x\n", Trouble.REFUSED, "global_init: unable"),
        (1, "timed out\n", Trouble.AWAY, "timed out"),
        (110, "rbd: couldn't connect to the cluster!\n", Trouble.AWAY, "rbd: couldn't connect"),
        (17, "rbd: rename error: (17) File exists\n", Trouble.EXISTS, "rbd: rename error"),
        (16, "rbd: error: image still has watchers\n", Trouble.BUSY, "rbd: error: image still"),
        (22, "no valid command found; 2 closest matches:\nosd blacklist add|rm <addr>\n", Trouble.OLD, "osd blacklist"),
        (22, "Error EINVAL: invalid command\n", Trouble.OTHER, "Error EINVAL"),
        (5, "", Trouble.OTHER, ""),
    ],
)  # fmt: skip
def test_troubles_are_told_apart(status: int, stderr: str, kind: Trouble, words: str) -> None:
    """Law: by what helps, and the words for people are the tool's own last ones, without time and thread."""
    assert trouble(status, stderr)[0] is kind
    assert last_words(stderr).startswith(words)


def test_the_cause_is_told_and_not_what_follows_from_it() -> None:
    """Law: whoever reads "couldn't connect" learns why."""
    assert trouble(2, NO_KEYRING)[1] == "its keyring is not there, or not to be read"
    assert trouble(13, WRONG_KEY + "RADOS permission denied")[1].startswith("its key is wrong")


def test_the_cause_is_told_without_the_log_of_the_tool() -> None:
    """Law: a tool that ends at once may take its log with it; its last line and status tell what is to be mended."""
    absent = "[errno 2] RADOS object not found (error connecting to the cluster)\n"
    assert trouble(1, absent) == trouble(2, "rbd: couldn't connect to the cluster!\n")
    assert trouble(1, absent)[1].startswith("its keyring is not there")
    assert trouble(13, "rbd: couldn't connect to the cluster!\n")[1].startswith("its key is wrong")


@given(st.integers(-64, 255), st.text(max_size=200))
def test_any_complaint_is_some_trouble(status: int, stderr: str) -> None:
    """Law: whatever a tool complains about has a kind, and a short line."""
    assert trouble(status, stderr)[0] in Trouble
    assert len(last_words(stderr)) <= 300


KEY = "AQB+FgZrUhUVKRAA/0QT+i4tqGb/QTOa0U8Ddg=="


@pytest.mark.parametrize(
    "text",
    [f"[client.vm]\n\tkey = {KEY}\n", f"[client.x]\nkey = AAAA\n[client.vm]\nkey={KEY}\n\tcaps mon = \"allow r\"\n",
     f"# ours\n[ client.vm ]\r\n  key  =  {KEY}  \r\n"],
)  # fmt: skip
def test_a_key_is_found_in_its_section(text: str) -> None:
    """Law: the key of this client, not of another in the same file."""
    assert parse_keyring(text, "client.vm") == KEY


@pytest.mark.parametrize("text", ["", f"key = {KEY}\n", f"[client.vm2]\nkey = {KEY}\n", "[client.vm]\nkey = s3cret!\n",
                                  "[client.vm]\nkey = AAAA\n", "[client.vm]\nkey =\n"])  # fmt: skip
def test_a_missing_or_broken_key_is_named_and_not_shown(text: str) -> None:
    """Law: errors go to logs; what may be half a key does not."""
    with pytest.raises(Unfit, match=r"\[client\.vm\]") as refused:
        parse_keyring(text, "client.vm")
    assert "s3cret" not in str(refused.value)
    assert "AAAA" not in str(refused.value)


def test_the_places_of_keyrings() -> None:
    """Law: in Ceph's order, whatever separates them."""
    assert keyring_paths("/etc/ceph/a.keyring,/etc/ceph/keyring,\n") == ("/etc/ceph/a.keyring", "/etc/ceph/keyring")
    assert keyring_paths("\n") == ()
