"""The key `cdrom`: what it may say, what QEMU gets of it, and what waits for a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvmsupervisor.domain.cdrom import Cdrom, cdrom, medium_of
from kvmsupervisor.domain.hardware import CDROM_SETS, Handed
from kvmsupervisor.domain.images import parse_image
from kvmsupervisor.domain.local_disk import DiskFormat
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.pending import pending
from kvmsupervisor.domain.spec import Spec, spec_from_object, spec_to_object
from kvmsupervisor.domain.storage import library_images_of, storage_of
from kvmsupervisor.domain.values import Unfit
from tests.domain.test_argv import TINY, argv, parts, values_of


@pytest.mark.parametrize(
    ("text", "wanted", "file", "image"),
    [
        ("file:debian-13.iso", Cdrom("file:debian-13.iso"), "debian-13.iso", None),
        ("virtio-win", Cdrom("virtio-win"), None, "virtio-win"),
        ("empty", Cdrom("empty"), None, None),
        ("file:a.iso  boot\nforce", Cdrom("file:a.iso", boot=True), "a.iso", None),
    ],
)
def test_media(text: str, wanted: Cdrom, file: str | None, image: str | None) -> None:
    """Law: a file of the host, an image of the library, or nothing; a record keeps it."""
    found = cdrom(text)
    assert (found, found.file, found.image) == (wanted, file, image)
    assert found.force is ("force" in text)
    assert medium_of(found) == (None if text == "empty" else text.split(maxsplit=1)[0])
    spec = Spec(ram_mib=64, cdrom=found)
    assert spec_from_object(json.loads(json.dumps(spec_to_object(spec)))) == spec


@pytest.mark.parametrize(
    "text",
    [
        *("file:a", "file:a.img", "file:a.qcow2", "file:.iso", "file:.a.iso", "file:-a.iso", "file:a..iso"),
        *("file:../a.iso", "file:/a.iso", "file:b/a.iso", "file:a.ISO", f"file:{'a' * 125}.iso", "file:ä.iso"),
        *("../x", "a/b", "pool/image@snap", "https://h/a.iso", "?", "-x", "a.iso ro", "a.iso boot boot", "empty x"),
    ],
)
def test_no_media(text: str) -> None:
    """Law: what could lead out of the folder, or is no name of the library, is refused."""
    with pytest.raises(Unfit):
        cdrom(text)


@pytest.mark.parametrize(("machine", "bus"), [("pc-q35-7.2", ["bus=ide.5"]), ("pc-i440fx-7.2", [])])
@pytest.mark.parametrize(("boot", "index"), [(True, "bootindex=9"), (False, "bootindex=11")])
def test_the_drive(machine: str, bus: list[str], index: str, *, boot: bool) -> None:
    """Law: an open file, never a name; behind the first disk in the boot order, or before it."""
    spec = replace(TINY, cdrom=Cdrom("file:a.iso", boot=boot))
    words = argv(spec, cdrom=Handed(31, "file:a.iso"), machine=machine)
    assert f"fd=31,set={CDROM_SETS},opaque=file:a.iso" in values_of(words, "-add-fd")
    (node,) = [json.loads(one) for one in values_of(words, "-blockdev")]
    assert (node["driver"], node["read-only"], node["file"]["read-only"]) == ("raw", True, True)
    (drive,) = [parts(one) for one in values_of(words, "-device") if one.startswith("ide-cd")]
    assert drive == ["ide-cd", "id=cdrom0", index, *bus, f"drive={node['node-name']}"]
    empty = argv(spec, machine=machine)
    (drive,) = [parts(one) for one in values_of(empty, "-device") if one.startswith("ide-cd")]
    assert drive == ["ide-cd", "id=cdrom0", index, *bus]
    assert values_of(empty, "-blockdev") == []
    assert not any("ide-cd" in one for one in argv(TINY))


@pytest.mark.parametrize(
    ("before", "after", "is_pending"),
    [
        (None, "file:a.iso", True),
        (None, "empty", True),
        ("file:a.iso", "file:b.iso", False),
        ("file:a.iso", "file:a.iso force", False),
        ("file:a.iso", None, False),
        ("file:a.iso", "file:a.iso boot", True),
        ("file:a.iso boot", "empty", True),
    ],
)
def test_what_waits_for_a_restart(before: str | None, after: str | None, *, is_pending: bool) -> None:
    """Law: a drive does, and its place in the boot order; a medium never."""
    old, new = (replace(TINY, cdrom=None if text is None else cdrom(text)) for text in (before, after))
    assert pending(old, new) == (("cdrom",) if is_pending else ())


def test_a_medium_pins_nothing_and_is_an_image_in_use() -> None:
    """Law 7: it is only read. An image of the library that is one is known before it is removed."""
    spec = replace(TINY, cdrom=Cdrom("virtio-win"))
    assert storage_of(spec) is Storage.NONE
    assert library_images_of(spec) == {"cdrom": "virtio-win"}
    assert library_images_of(replace(TINY, cdrom=Cdrom("file:a.iso"))) == {}


def test_the_url_of_a_medium_tells_its_format() -> None:
    """Law: what ends in .iso holds its bytes."""
    assert parse_image("a", f"https://h/a.iso sha256={'0' * 64}").format is DiskFormat.RAW
