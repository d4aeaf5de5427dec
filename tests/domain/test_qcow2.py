"""Headers of qcow2 images: what leads elsewhere is refused, whatever the bytes are; what is made is whole."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.qcow2 import HEADER_BYTES, Refused, empty, virtual_size

G = 1 << 30
IMAGE = empty(G)[:HEADER_BYTES]
END = struct.pack(">II", 0, 0)


def changed(at: int, value: bytes, image: bytes = IMAGE) -> bytes:
    return image[:at] + value + image[at + len(value) :]


def extension(kind: int, data: bytes) -> bytes:
    """`IMAGE` with one extension behind its header."""
    return changed(104, struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0") + END)


@given(st.integers(1, 64 << 20))
def test_what_is_made_is_read(mib: int) -> None:
    """Law: every size that a key can have makes an image of that size, in whole clusters."""
    image = empty(mib << 20)
    assert virtual_size(image[:HEADER_BYTES]) == mib << 20
    assert len(image) % 65536 == 0


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "no qcow2 image"),
        (b"QFI\xfb", "no qcow2 image"),
        (changed(0, b"QFI\xfc"), "no qcow2 image"),
        (b"\0" * 512, "no qcow2 image"),
        (changed(4, struct.pack(">I", 1)), "version 1"),
        (changed(4, struct.pack(">I", 4)), "version 4"),
        (changed(8, struct.pack(">QI", 512, 11)), "backing file"),
        (changed(8, struct.pack(">Q", 1 << 63)), "backing file"),
        (changed(20, struct.pack(">I", 8)), "makes no sense"),
        (changed(20, struct.pack(">I", 63)), "makes no sense"),
        (changed(32, struct.pack(">I", 1)), "encrypted"),
        (changed(72, struct.pack(">Q", 1 << 2)), "another file"),
        (changed(72, struct.pack(">Q", 1 << 1)), "corrupt"),
        (changed(72, struct.pack(">Q", 1 << 5)), "not known here"),
        (changed(100, struct.pack(">I", 1 << 31)), "makes no sense"),
        (changed(100, struct.pack(">I", 0)), "makes no sense"),
        (extension(0x44415441, b"/etc/passwd"), "another file"),
        (extension(0x0537BE77, bytes(16)), "encrypted"),
        (changed(104, struct.pack(">II", 1, (1 << 32) - 1)), "makes no sense"),
        (IMAGE[:90], "makes no sense"),
    ],
)
def test_what_is_refused(image: bytes, why: str) -> None:
    """Law: whatever could have QEMU open another file, or cannot be read, is refused with a reason."""
    with pytest.raises(Refused, match=why):
        virtual_size(image)


@pytest.mark.parametrize("kind", [0xE2792ACA, 0x6803F857, 0x23852875, 7])
def test_extensions_that_lead_nowhere(kind: int) -> None:
    """Law: a name of a format, of features, bitmaps, and what nobody knows, are let be."""
    assert virtual_size(extension(kind, b"qcow2")) == G


def test_version_two() -> None:
    """Law: it has a shorter header, and no features."""
    image = changed(4, struct.pack(">I", 2), changed(72, bytes(40)))
    assert virtual_size(image) == G
    named = changed(72, struct.pack(">II", 0x44415441, 4) + b"file" + bytes(4), image)
    with pytest.raises(Refused, match="another file"):
        virtual_size(named)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    """Law: it answers, or refuses; it never fails, and never says yes to a backing file."""
    for image in (data, IMAGE[:8] + data, IMAGE[:104] + data, changed(8, data)):
        try:
            virtual_size(image)
        except Refused:
            continue
        assert image[:4] == b"QFI\xfb"
        assert image[8:16] == bytes(8)
        assert image[32:36] == bytes(4)
