"""Media for guests: ISO 9660 images with Joliet and Rock Ridge, made with pycdlib, and files that only we may read.

Every function blocks for milliseconds: call it in a thread. pycdlib is imported when the first image is made: a
supervisor without such guests saves its 2.6 MB and 20 ms.

Two images of the same files differ in their bytes: pycdlib writes the present time into an image and takes no other.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

PADDING_BYTES = 150 * 2048
"""Zeros behind the files, as many as genisoimage's `-pad` adds. Programs that detect file systems read up to 70 KB of a
disk, and busybox's findfs gives up on a shorter disk: it did not find a small `cidata`."""

_NO_D_CHARACTER = re.compile(r"[^A-Z0-9_]")
_INTERCHANGE_LEVEL = 3
_JOLIET_LEVEL = 3
_ROCK_RIDGE = "1.09"
_FILE_MODE = 0o100444
_FOLDER_MODE = 0o040555


def image(label: str, files: Mapping[str, bytes]) -> bytes:
    """An ISO 9660 image.

    Args:
        label: the volume's name, at most 16 characters so that Joliet has all of it.
        files: content by path, such as `openstack/latest/user_data`. Linux and Windows see these names. The image also
            has plain ISO names, in upper case with `_` for anything but letters and digits; these must differ, too.
    """
    import pycdlib  # noqa: PLC0415  see above

    iso = pycdlib.PyCdlib()
    iso.new(
        interchange_level=_INTERCHANGE_LEVEL, vol_ident=label, joliet=_JOLIET_LEVEL, rock_ridge=_ROCK_RIDGE
    )  # fmt: skip
    try:
        for folder in _folders(files):
            path = f"/{folder}"
            iso.add_directory(_iso_path(path), rr_name=folder.name, joliet_path=path, file_mode=_FOLDER_MODE)
        for name, data in sorted(files.items()):
            path, rr_name = f"/{name}", PurePosixPath(name).name
            content = io.BytesIO(data)
            iso.add_fp(
                content, len(data), _iso_file(path), rr_name=rr_name, joliet_path=path, file_mode=_FILE_MODE
            )  # fmt: skip
        written = io.BytesIO()
        iso.write_fp(written)
    finally:
        iso.close()
    return written.getvalue() + bytes(PADDING_BYTES)


def _folders(files: Mapping[str, bytes]) -> list[PurePosixPath]:
    found = {parent for name in files for parent in PurePosixPath(name).parents if parent.name}
    return sorted(found, key=lambda folder: (len(folder.parts), folder))


def _iso_path(path: str) -> str:
    """The path in the characters that ISO 9660 allows."""
    return "/".join(_NO_D_CHARACTER.sub("_", part) for part in path.upper().split("/"))


def _iso_file(path: str) -> str:
    """The same for a file, whose name needs exactly one dot, maybe with nothing behind it, and a version."""
    stem, _, extension = path.rpartition("/")[2].partition(".")
    return f"{_iso_path(path.rpartition('/')[0])}/{_iso_path(stem)}.{_iso_path(extension)};1"


def place(path: Path, data: bytes) -> None:
    """Replace a file of ours alone in one step. A program that has the old file open, such as QEMU, keeps it.

    Args:
        path: the file; `<path>.new` beside it is written first.
        data: the whole content.

    Raises:
        OSError: the file cannot be written.
    """
    aside = path.with_name(f"{path.name}.new")
    # A new file: so it is never readable for other users, not even for a moment.
    sweep(path)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        # Zeros at the end become a hole, which takes no memory on a tmpfs.
        file.write(data.rstrip(b"\0"))
        file.truncate(len(data))
        # So that the name never leads to half a file, not even after a power cut. Costs nothing on a tmpfs.
        os.fsync(file.fileno())
    aside.replace(path)


def read(path: Path) -> bytes | None:
    """What `place` wrote; None when there is no file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def discard(path: Path) -> None:
    """Remove a file, and what a `place` that was cut off left beside it; neither has to exist."""
    path.unlink(missing_ok=True)
    sweep(path)


def sweep(path: Path) -> None:
    """Remove only what a `place` that was cut off left beside `path`, if anything."""
    path.with_name(f"{path.name}.new").unlink(missing_ok=True)
