"""Disks that are files: what their keys may say, what that comes to, and what pins a machine to its host."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.hardware import OWN_DEFAULTS
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import FileDisk, disk_size, file_name, size_text, too_small
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.pending import pending
from kvmsupervisor.domain.spec import Disk, RawValue, RbdDisk, Spec, Wish, spec_from_object, spec_to_object
from kvmsupervisor.domain.storage import files_elsewhere, images_of, names_of, pinning, sized, storage_of
from kvmsupervisor.domain.values import Unfit

G = 1 << 30


def wish(**keys: str) -> Wish:
    return parse_wish(InstanceId("vm"), {name.encode(): RawValue(text.encode(), 1) for name, text in keys.items()})


def machine(*files: FileDisk) -> Spec:
    return Spec(ram_mib=64, disks=tuple(Disk(number, file=file) for number, file in enumerate(files)))


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("file:a.qcow2", FileDisk("a.qcow2")),
        ("file:root-1_x.y+z.raw size=20G", FileDisk("root-1_x.y+z.raw", size=20 * G)),
        ("file:a.raw  discard\n iops=5 size=512MiB", FileDisk("a.raw", size=G // 2, discard=True, iops=5)),
        ("file:a.raw ro", FileDisk("a.raw", ro=True)),
        (f"file:{'a' * 122}.qcow2", FileDisk("a" * 122 + ".qcow2")),
    ],
)
def test_files(text: str, disk: FileDisk) -> None:
    """Law: a file is a disk like others, the first one's general key included."""
    found = wish(ram="64", **{"disk/0": text, "disk/3": "p/i"})
    assert found.problems == ()
    assert found.spec is not None
    assert found.spec.disks == (Disk(0, file=disk), Disk(3, RbdDisk("p", "i")))
    assert [one.key for one in found.spec.all_disks] == ["disk/0", "disk/3"]
    assert spec_from_object(json.loads(json.dumps(spec_to_object(found.spec)))) == found.spec


@pytest.mark.parametrize(
    "name",
    [
        *("", ".qcow2", "a", "a.img", "a.QCOW2", "a.qcow2.bak", "a/b.raw", "../a.raw", "a..raw", "-a.raw", ".a.raw"),
        *("a\0.raw", "ä.raw", "a b.raw", "a\n.raw", "/etc/a.raw", "a.raw\n", f"{'a' * 123}.qcow2", "//h/a.raw"),
    ],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    """Law: no name leaves the folder, hides, looks like an option, or leaves its format to be guessed."""
    with pytest.raises(Unfit, match="KVM_DISK_DIR"):
        file_name(name)


@given(st.text(max_size=20))
def test_a_name_is_one_file_of_the_folder(text: str) -> None:
    """Law: whatever passes is one plain name."""
    try:
        name = file_name(f"{text}.raw")
    except Unfit:
        return
    assert "/" not in name
    assert ".." not in name
    assert name[0] not in ".-"
    assert name.isascii()
    assert name.isprintable()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("file:a.raw size=20", "the unit M, G or T"),
        ("file:a.raw size=0G", "the unit M, G or T"),
        ("file:a.raw size=65T", "the unit M, G or T"),
        ("file:a.raw size=1.5G", "the unit M, G or T"),
        ("file:a.raw size=1G size=2G", "given once"),
        ("file:a.raw ro size=1G", "neither made nor grown"),
        ("file:a.raw rw", "'rw' is none of them"),
        ("file:a.raw discard=on", "'discard' is none of them"),
        ("file:a.raw iops=0", "iops"),
    ],
)
def test_bad_values(value: str, wanted: str) -> None:
    """Law: the problem names the key, and what would be right."""
    (problem,) = wish(ram="64", **{"disk/1": value}).problems
    assert problem.key == "disk/1"
    assert wanted in problem.wanted


def test_the_first_disk_has_two_keys() -> None:
    """Law: `disk/0` is what `rbd` is, one of the two; an image by either is the same machine, by the key as written."""
    by_rbd, by_number = wish(ram="64", rbd="/p/i ro").spec, wish(ram="64", **{"disk/0": "p/i ro"}).spec
    assert by_rbd is not None
    assert by_number is not None
    assert by_rbd == by_number
    assert pending(by_rbd, by_number) == ()
    assert [disk.key for spec in (by_rbd, by_number) for disk in spec.all_disks] == ["rbd", "disk/0"]
    (problem,) = wish(ram="64", rbd="/p/i", **{"disk/0": "file:a.raw"}).problems
    assert problem.key == "disk/0"
    assert "delete one of the two keys" in problem.wanted
    (problem,) = wish(ram="64", rbd="file:a.raw").problems
    assert "disk/0" in problem.wanted
    (problem,) = wish(ram="64", **{"disk/1": "file:a.raw", "disk/2": "file:a.raw ro"}).problems
    assert problem.key == "disk/2"


def test_pending() -> None:
    """Law: a size is no change that waits for a restart; another file, and another option, are."""
    before = machine(FileDisk("a.raw"), FileDisk("b.raw", size=G))
    assert pending(before, machine(FileDisk("a.raw", size=G), FileDisk("b.raw", size=2 * G))) == ()
    assert pending(before, machine(FileDisk("a.raw", discard=True), FileDisk("c.raw"))) == ("disk/0", "disk/1")
    assert pending(before, replace(before, disks=(), rbd=RbdDisk("p", "i"))) == ("rbd", "disk/0", "disk/1")


@pytest.mark.parametrize(("text", "size"), [("1M", 1 << 20), ("20g", 20 * G), ("64T", 64 << 40), ("7GiB", 7 * G)])
def test_sizes(text: str, size: int) -> None:
    """Law: they are read with their unit, and shown as they can be written again."""
    assert disk_size(text) == size
    assert disk_size(size_text(size)) == size
    assert size_text(G + 512) == "1073742336 bytes"


def test_never_smaller() -> None:
    """Law: a size below what is there is named with what would be right."""
    assert too_small("disk/1", FileDisk("a.raw", size=G), G) is None
    assert too_small("disk/1", FileDisk("a.raw"), G) is None
    said = too_small("disk/1", FileDisk("a.raw", size=G), 2 * G)
    assert said is not None
    assert "write size=2G" in said
    said = too_small("disk/1", FileDisk("a.raw", size=G), G + 512)
    assert said is not None
    assert said.endswith("leave size= out")


def test_what_pins() -> None:
    """Law 7: a file that is written to pins its machine, one that is only read does not."""
    read_only = machine(FileDisk("a.raw", ro=True))
    assert (storage_of(read_only), pinning(read_only), names_of(read_only)) == (Storage.NONE, {}, ())
    both = replace(machine(FileDisk("a.raw", ro=True), FileDisk("b.raw")), rbd=RbdDisk("p", "i"))
    assert storage_of(both) is Storage.UNFENCEABLE
    assert images_of(both) == (RbdDisk("p", "i"),)
    assert names_of(both) == ("p/i", "file:b.raw")


def test_what_grows() -> None:
    """Law: only the same file grows under a machine that runs, and only one that is written to."""
    running = machine(FileDisk("a.raw"), FileDisk("b.raw", size=G), FileDisk("c.raw", ro=True))
    assert sized(running, None) == {}
    assert sized(running, running) == {"disk1": ("disk/1", FileDisk("b.raw", size=G))}
    wanted = machine(FileDisk("a.raw", size=G), FileDisk("x.raw", size=G), FileDisk("c.raw", size=G))
    assert sized(running, wanted) == {"disk0": ("disk/0", FileDisk("a.raw", size=G))}


def test_qemu_opens_no_file_by_name() -> None:
    """§5: it gets a descriptor, is told the format, follows no header, and locks what it has."""
    spec = machine(FileDisk("a.qcow2", discard=True, iops=9), FileDisk("b.raw", ro=True))
    words = list(hardware.disks(spec, OWN_DEFAULTS, (11, 12)))
    assert [value for option, value in pairwise(words) if option == "-add-fd"] == [
        "fd=11,set=97470000,opaque=disk/0",
        "fd=12,set=97470001,opaque=disk/1",
    ]
    first, second = (json.loads(value) for option, value in pairwise(words) if option == "-blockdev")
    assert (first["driver"], first["throttle-group"], first["discard"]) == ("throttle", "disk0-limit", "unmap")
    assert first["file"] == {
        "driver": "qcow2",
        "backing": None,
        "read-only": False,
        "discard": "unmap",
        "file": {
            "driver": "file",
            "filename": "/dev/fdset/97470000",
            "locking": "on",
            "read-only": False,
            "discard": "unmap",
        },
    }
    assert second == {
        "node-name": "disk1",
        "driver": "raw",
        "read-only": True,
        "file": {"driver": "file", "filename": "/dev/fdset/97470001", "locking": "on", "read-only": True},
    }


def test_whose_host_has_them() -> None:
    """Law: a file that the machine ran with on another host is named, others are not."""
    spec = machine(FileDisk("a.raw"), FileDisk("b.raw"), FileDisk("c.raw", ro=True))
    files = {"file:a.raw": "alpha", "file:c.raw": "alpha"}
    assert files_elsewhere(spec, files, "beta") == {"disk/0": "alpha"}
    assert files_elsewhere(spec, files, "alpha") == {}
    assert files_elsewhere(spec, None, "beta") == {}
