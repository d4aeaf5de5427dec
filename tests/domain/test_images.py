"""The image library: what its keys may say, what `from=` may say, and which disks it is for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain import records
from kvmsupervisor.domain.ceph import parse_children, parse_id, parse_metadata, parse_names, parse_snapshots
from kvmsupervisor.domain.images import (
    aside_of,
    image_name,
    note_of,
    origin,
    parent_of,
    parse_image,
    refusal,
    remark,
    snapshot_of,
)
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import DiskFormat, FileDisk
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.pending import pending
from kvmsupervisor.domain.spec import RawValue, RbdDisk, Wish, spec_from_object, spec_to_object
from kvmsupervisor.domain.storage import made, origins_of, sized
from kvmsupervisor.domain.values import Unfit

SUM = "0123456789abcdef" * 4
G = 1 << 30
ONE = InstanceId("one")


def wish(**keys: str) -> Wish:
    return parse_wish(ONE, {name.encode(): RawValue(text.encode(), 1) for name, text in keys.items()})


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (f"https://h/a.qcow2 sha256={SUM}", DiskFormat.QCOW2),
        (f"https://h/a.RAW?x=1 sha256={SUM.upper()}", DiskFormat.RAW),
        (f"file:///a/b.img  format=qcow2\nsha256={SUM}", DiskFormat.QCOW2),
        (f"http://h/a.qcow2 sha256={SUM} format=raw", DiskFormat.RAW),
    ],
)
def test_entries(value: str, form: DiskFormat) -> None:
    """Law: a URL, a sum, and a format where the ending does not tell it; the key's word wins over the ending."""
    found = parse_image("debian", value)
    assert (found.name, found.sha256, found.format) == ("debian", SUM, form)
    assert found.url == value.split(maxsplit=1)[0]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("", "it is a URL"),
        ("debian.qcow2", "it is a URL"),
        (f"sha256={SUM}", "it is a URL"),
        ("https://h/a.qcow2", "behind the URL stands sha256="),
        ("https://h/a.qcow2 sha256=1234", "behind the URL stands sha256="),
        (f"https://h/a.qcow2 sha256={SUM[:-1]}g", "behind the URL stands sha256="),
        (f"https://h/a.qcow2 sha256={SUM} sha256={SUM}", "given once"),
        (f"https://h/a.qcow2 sha256={SUM} size=3G", "'size' is neither"),
        (f"https://h/a.img sha256={SUM}", "add format=qcow2 or format=raw"),
        (f"https://h/a sha256={SUM}", "add format=qcow2 or format=raw"),
        (f"https://h/a.qcow2 sha256={SUM} format=vmdk", "'vmdk' is neither"),
        (f"https://h/a.raw.xz sha256={SUM} format=raw", "is packed (.xz)"),
        (f"ftp://h/a.raw sha256={SUM}", "it is a URL"),
    ],
)
def test_bad_entries(value: str, wanted: str) -> None:
    """Law: each says what would be right."""
    with pytest.raises(Unfit) as caught:
        parse_image("debian", value)
    assert wanted in str(caught.value)


@given(st.text(max_size=60))
def test_an_entry_tells_no_secret(text: str) -> None:
    """Law: whatever stands there, it is an entry or an `Unfit` that repeats nothing of the URL."""
    said = ""
    try:
        assert len(parse_image("x", f"https://user:pa55word@h/{text}").sha256) == 64
    except Unfit as unfit:
        said = str(unfit)
    assert "pa55word" not in said


@pytest.mark.parametrize("name", ["", ".images", "a/b", "../a", "a..b", "-a", "a b", "ä", "a" * 64, "a\n", "a@b"])
def test_names_that_lead_elsewhere(name: str) -> None:
    """Law: the name of an image is one plain word."""
    with pytest.raises(Unfit):
        image_name(name)


@given(st.text(max_size=30))
def test_an_origin_is_a_name_or_a_snapshot(text: str) -> None:
    """Law: whatever passes is one or the other, and no part of it begins with a hyphen or leads elsewhere."""
    try:
        found = origin(text)
    except Unfit:
        return
    snapshot = snapshot_of(found)
    if snapshot is None:
        assert image_name(found) == text
    else:
        assert str(snapshot) == text
        assert not any(
            part.startswith("-") for part in (snapshot.pool, snapshot.namespace, snapshot.image, snapshot.snap)
        )


@pytest.mark.parametrize(
    "bad", ["a/b", "a@b", "a/b@", "a/b@c@d", "-a/b@c", "a/b@-c", "a/b/c/d@e", "a//c@d", "", "../x", "a\0/b@c"]
)
def test_bad_origins(bad: str) -> None:
    """Law: a source that is neither is a problem of its key."""
    with pytest.raises(Unfit):
        origin(bad)


def test_disks() -> None:
    """Law: both kinds of disk take size= and from=, in keys and in the record of a machine."""
    found = wish(ram="64", rbd="p/i size=20G from=q/base@v1 discard", **{"disk/1": "file:a.raw from=debian-12"})
    assert found.problems == ()
    spec = found.spec
    assert spec is not None
    assert spec.rbd == RbdDisk("p", "i", discard=True, size=20 * G, origin="q/base@v1")
    assert str(spec.rbd) == "p/i size=20G from=q/base@v1 discard"
    assert spec.disks[0].file == FileDisk("a.raw", origin="debian-12")
    assert origins_of(spec) == {"rbd": "q/base@v1", "disk/1": "debian-12"}
    assert made(spec) == ("p/i",)
    assert spec_from_object(json.loads(json.dumps(spec_to_object(spec)))) == spec


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("file:a.raw from=../x", "the name of an image"),
        ("file:a.raw from=p/i@s", "from=file:NAME; a snapshot is for disks in Ceph"),
        ("file:a.raw from=file:a.raw", "a disk does not begin with itself"),
        ("file:a.raw from=file:../b.raw", "below the host's KVM_DISK_DIR"),
        ("file:a.raw from=file:b.iso", "file:NAME.qcow2 or file:NAME.raw"),
        ("file:a.raw from=file:b.raw copy", "leave copy out"),
        ("rbd/a from=file:b.raw", "a disk in Ceph begins with"),
        ("rbd/a from=debian copy", "copy is for a disk in Ceph that begins with a snapshot"),
        ("rbd/a size=1G copy", "copy is for a disk in Ceph that begins with a snapshot"),
        ("file:a.raw from=", "the name of an image"),
        ("file:a.raw from", "'from' is none of them"),
        ("file:a.raw ro from=debian", "neither made nor grown"),
        ("p/i from=a from=b", "given once"),
        ("p/i from=a/b", "POOL/IMAGE@SNAP"),
        ("p/i ro size=1G", "neither made nor grown"),
        ("p/i size=1", "the unit M, G or T"),
    ],
)
def test_bad_values(value: str, wanted: str) -> None:
    """Law: the problem names the key, and what would be right."""
    (problem,) = wish(ram="64", **{"disk/1": value}).problems
    assert problem.key == "disk/1"
    assert wanted in problem.wanted


def test_what_is_no_matter_of_a_restart() -> None:
    """Law: neither size nor beginning is pending; another image, and another option, are."""

    def of(rbd: str, disk: str) -> Wish:
        return wish(ram="64", rbd=rbd, **{"disk/1": disk})

    before, after = of("p/i", "p/j size=1G").spec, of("p/i size=2G from=a", "p/j from=b").spec
    assert before is not None
    assert after is not None
    assert pending(before, after) == ()
    other = of("p/i ro", "p/k size=1G").spec
    assert other is not None
    assert pending(before, other) == ("rbd", "disk/1")
    assert {node: key for node, (key, _) in sized(before, after).items()} == {"disk0": "rbd"}


def test_which_disk_it_is_for() -> None:
    """Law: a disk that this instance's key has made, and no other; with another word it is told, not refused."""
    note = note_of(ONE, "debian")
    assert refusal("rbd", "p/i", "debian", ONE, note) is None
    assert remark("rbd", "p/i", "debian", note) is None
    assert refusal("rbd", "p/i", "fedora", ONE, note) is None
    assert "began with debian" in (remark("rbd", "p/i", "fedora", note) or "")
    assert remark("rbd", "p/i", "fedora", None) is None
    for other in (None, "", "two debian", "onee debian", "one2"):
        assert (refusal("rbd", "p/i", "debian", ONE, other) or "").startswith("rbd: from=debian is what a new disk")


@given(st.text(min_size=1, max_size=200))
def test_names_in_ceph(name: str) -> None:
    """Law: Ceph takes each name that is made, however long the one is that is aimed at; content and format tell it."""
    assert len(aside_of(name)) + 8 <= 96
    entry = parse_image("x", f"http://h/a.qcow2 sha256={SUM}")
    other = parse_image("x", f"http://h/a.raw sha256={SUM}")
    assert parent_of(entry, "p") != parent_of(other, "p")
    assert len(parent_of(entry, "p").image) <= 96


# --- what Ceph's tools print ----------------------------------------------------------------------------------


def test_what_rbd_prints() -> None:
    """Law: as 16.2 prints it; an image without metadata prints nothing at all."""
    snaps = b'[{"id":4,"name":"image","size":5244416,"protected":"true","timestamp":"Sun Nov 29 06:19:50 2026"}]'
    assert [(name, one.size, one.is_protected) for name, one in parse_snapshots(snaps).items()] == [
        ("image", 5244416, True)
    ]
    assert parse_metadata(b"") == {}
    assert parse_metadata(b'{"kvmsupervisor.made":"one debian"}') == {"kvmsupervisor.made": "one debian"}
    assert parse_names(b'["new","whole"]') == ("new", "whole")
    assert parse_children(b'[{"pool":"rbd","pool_namespace":"n","image":"new"}]') == ("rbd/n/new",)
    assert parse_id(b'{"id":"1014"}') == "1014"


@pytest.mark.parametrize("parse", [parse_snapshots, parse_names, parse_children, parse_id, parse_metadata])
@pytest.mark.parametrize("said", [b"{", b"[1]", b'[{"name":1}]', b"3", b"\xff", b'[{"name":"a","size":"b"}]', b'"a"'])
def test_what_is_not_understood(parse: object, said: bytes) -> None:
    """Law: what a tool says otherwise is refused, not guessed at."""
    with pytest.raises(records.Unfit):
        parse(said)  # type: ignore[operator]
