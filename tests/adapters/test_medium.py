"""Images and files for QEMU, read back by a program that did not write them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvmsupervisor.adapters import medium

FILES = {"user-data": b"#cloud-config\n" + bytes(5_000), "meta-data": b"a: b\n", "a/b c/meta_data.json": b"{}"}


def isoinfo(*args: str) -> bytes:
    done = subprocess.run(["isoinfo", *args], check=True, capture_output=True, timeout=30)
    return done.stdout


@pytest.mark.parametrize("extension", ["-R", "-J"])
@pytest.mark.parametrize("label", ["cidata", "config-2"])
def test_another_reader_finds_label_and_files(tmp_path: Path, label: str, extension: str) -> None:
    """Law: `isoinfo` finds the label as it was given, and each file under its own name, by Rock Ridge and Joliet."""
    path = tmp_path / "x.iso"
    medium.place(path, medium.image(label, FILES))
    assert f"Volume id: {label}\n" in isoinfo("-d", "-i", str(path)).decode()
    names = isoinfo(extension, "-f", "-i", str(path)).decode().split("\n")
    assert {name for name in names if name} == {"/a", "/a/b c", *(f"/{name}" for name in FILES)}
    for name, data in FILES.items():
        assert isoinfo(extension, "-x", f"/{name}", "-i", str(path)) == data


def test_plain_iso_names_are_those_that_every_reader_takes(tmp_path: Path) -> None:
    """Law: without extensions the names are upper case, with letters, digits and `_`."""
    path = tmp_path / "x.iso"
    path.write_bytes(medium.image("cidata", FILES))
    names = isoinfo("-f", "-i", str(path)).decode().split()
    assert set(names) == {"/A", "/A/B_C", "/A/B_C/META_DATA.JSON;1", "/META_DATA.;1", "/USER_DATA.;1"}


def test_the_library_is_loaded_when_it_is_needed() -> None:
    """Law: a supervisor without media does not pay for pycdlib."""
    program = "import sys, kvmsupervisor.machine.boot_media; sys.exit('pycdlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_padding_takes_no_room(tmp_path: Path) -> None:
    """Law: a file has all its bytes, and zeros at its end cost no memory."""
    for data in (medium.image("cidata", FILES), bytes(1_000_000), b"", b"x"):
        medium.place(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data
        assert (tmp_path / "a").stat().st_blocks * 512 <= len(data.rstrip(b"\0")) + 4096


def mode(path: Path) -> str:
    return stat.filemode(path.stat().st_mode)


def test_only_we_may_read_a_file(tmp_path: Path) -> None:
    """Law: 0600, whatever the umask is: QEMU gets it open."""
    before = os.umask(0)
    try:
        medium.place(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == "-rw-------"


def test_who_has_a_file_open_keeps_it(tmp_path: Path) -> None:
    """Law: replaced by rename only, over what one who was cut off left behind; a link there is not followed."""
    path, victim = tmp_path / "seed.iso", tmp_path / "victim"
    victim.write_bytes(b"mine")
    medium.place(path, b"old")
    with path.open("rb") as qemu:
        (tmp_path / "seed.iso.new").symlink_to(victim)
        medium.place(path, b"new")
        assert qemu.read() == b"old"
    assert path.read_bytes() == b"new"
    assert victim.read_bytes() == b"mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["seed.iso", "victim"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    """Law: an error is an OSError with the file's name, and what was there stays."""
    path = tmp_path / "absent" / "seed.iso"
    with pytest.raises(FileNotFoundError) as caught:
        medium.place(path, b"x")
    assert caught.value.filename == str(tmp_path / "absent" / "seed.iso.new")


def test_files_are_read_and_removed_if_they_are_there(tmp_path: Path) -> None:
    """Law: absence is no error; what a cut-off writer left goes too."""
    path = tmp_path / "a"
    assert medium.read(path) is None
    medium.discard(path)
    medium.place(path, b"x")
    (tmp_path / "a.new").write_bytes(b"half")
    assert medium.read(path) == b"x"
    medium.discard(path)
    assert list(tmp_path.iterdir()) == []
