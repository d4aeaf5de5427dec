"""The library of one host: fetched once, gone on with, checked, bounded, never half; and other formats of an image."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import struct
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from kvmsupervisor.adapters import fetch, image_files
from kvmsupervisor.domain.local_disk import DiskFormat
from kvmsupervisor.machine.images import DiskTrouble
from kvmsupervisor.machine.jobs import Hopeless
from kvmsupervisor.machine.library import Limits, NoRoom, Sources
from tests.fakes.images import Stock
from tests.support.images import RAW, Parts, chunked_for_ever, disk_of, image, qcow2_of
from tests.support.web import Site, drip, raw, redirect, site

RAW_FORM, QCOW2 = DiskFormat.RAW, DiskFormat.QCOW2


@pytest.fixture
async def server() -> AsyncIterator[Site]:
    async with site() as made:
        yield made


@pytest.fixture
def parts(server: Site) -> Parts:
    return Parts(server, RAW)


async def got(stock: Stock, *args: object, said: list[str] | None = None) -> bytes:
    """Get an image; what its file holds."""
    stored = await stock.library.get(*args, (said if said is not None else []).append)  # type: ignore[arg-type, call-arg]
    try:
        return os.pread(stored.fd, 1 << 30, 0)
    finally:
        stored.close()


async def refused(stock: Stock, *args: object) -> str:
    with pytest.raises(DiskTrouble) as caught:
        await got(stock, *args)
    return str(caught.value)


def names(stock: Stock) -> list[str]:
    return sorted(path.name for path in stock.images.iterdir())


async def test_it_is_fetched_once_and_kept(tmp_path: Path, parts: Parts) -> None:
    """Law: several that want it at the same instant fetch it once; its file is read-only, its folder root's alone."""
    stock, said = Stock(tmp_path), list[str]()
    entry = image(parts.url, RAW)
    found = await asyncio.gather(*(got(stock, entry, RAW_FORM, said=said) for _ in range(5)))
    assert set(found) == {RAW}
    assert await got(stock, entry, RAW_FORM) == RAW
    assert parts.offsets == [0]
    assert names(stock) == [entry.sha256]
    assert stat.S_IMODE((stock.images / entry.sha256).stat().st_mode) == 0o444
    assert stat.S_IMODE(stock.images.stat().st_mode) == 0o700
    assert any(step.startswith("fetched 3") and " of 3 MiB from http://127.0.0.1" in step for step in said), said
    assert len(said) <= 5 * 25


async def test_a_cut_is_gone_on_with(tmp_path: Path, parts: Parts) -> None:
    """Law: a fetch that was cut off goes on where it was, also with another supervisor; no half has the name."""
    entry = image(parts.url, RAW)
    parts.cut_at = 2 << 20
    assert "breaks off" in await refused(Stock(tmp_path), entry, RAW_FORM)
    assert names(Stock(tmp_path)) == [f"{entry.sha256}.part"]
    first = (tmp_path / "images" / f"{entry.sha256}.part").stat().st_size
    parts.cut_at, parts.hold_at = None, len(RAW) - 1000
    parts.held.clear()
    killed = Stock(tmp_path)
    begun = asyncio.ensure_future(got(killed, entry, RAW_FORM))
    async with asyncio.timeout(20):
        while len(parts.offsets) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await killed.jobs.close()
    await asyncio.wait({begun})
    assert begun.cancelled()
    assert names(killed) == [f"{entry.sha256}.part"]
    parts.held.set()
    assert await got(Stock(tmp_path), entry, RAW_FORM) == RAW
    assert parts.offsets[:2] == [0, first]
    assert parts.offsets[2] >= first >= 1 << 20


async def test_another_program_fetches_it(tmp_path: Path, parts: Parts) -> None:
    """Law: two supervisors, or one and a person, never write to one part."""
    entry, stock = image(parts.url, RAW), Stock(tmp_path)
    image_files.make_folder(stock.images)
    fd = image_files.open_part(stock.images, entry.sha256, anew=False)
    assert "another program of this host is fetching it" in await refused(stock, entry, RAW_FORM)
    os.close(fd)
    assert await got(Stock(tmp_path), entry, RAW_FORM) == RAW


async def test_what_is_there_already_is_not_fetched(tmp_path: Path, parts: Parts) -> None:
    """Law: cut off between the last byte and the name, nothing is asked of the server again."""
    entry, stock = image(parts.url, RAW), Stock(tmp_path)
    stock.images.mkdir(mode=0o700)
    (stock.images / f"{entry.sha256}.part").write_bytes(RAW)
    assert await got(stock, entry, RAW_FORM) == RAW
    assert parts.offsets == []


@pytest.mark.parametrize("left", [RAW[: 1 << 20] + bytes(100), bytes(5 << 20), RAW[:-7] + b"garbage"])
@pytest.mark.parametrize("ranges", [True, False])
async def test_what_is_there_is_no_beginning_of_it(tmp_path: Path, parts: Parts, left: bytes, *, ranges: bool) -> None:
    """Law: after a power cut, or where the server has another file now, it is fetched anew by itself."""
    entry, stock = image(parts.url, RAW), Stock(tmp_path)
    parts.ranges = ranges
    stock.images.mkdir(mode=0o700)
    (stock.images / f"{entry.sha256}.part").write_bytes(left)
    assert await got(stock, entry, RAW_FORM) == RAW
    assert names(stock) == [entry.sha256]


async def test_a_wrong_checksum(tmp_path: Path, parts: Parts) -> None:
    """Law: another content is refused, with both sums; it is not fetched again and again; a new URL counts at once."""
    entry, stock = image(parts.url, b"another"), Stock(tmp_path)
    told = await refused(stock, entry, RAW_FORM)
    assert "wrong checksum" in told
    assert hashlib.sha256(RAW).hexdigest() in told
    assert f"its key says sha256={entry.sha256}" in told
    with pytest.raises(Hopeless):
        await got(stock, entry, RAW_FORM)
    assert parts.offsets == [0]
    assert not (stock.images / entry.sha256).exists()
    right = image(parts.url + "?right", RAW)
    assert await got(stock, right, RAW_FORM) == RAW


SHORT = partial(fetch.download, patience_s=0.3)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 3145728\r\n\r\n"


async def test_servers_that_do_not_do_as_they_should(tmp_path: Path, server: Site) -> None:
    """Law: one that drips, lies about its length, redirects inside or never ends holds nobody, and is named."""
    limits = Limits(size_bytes=16 << 20, keep_bytes=0)
    server.answers |= {
        "/drip": drip(HEAD, RAW[:1000]),
        "/silent": drip(b""),
        "/more": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + RAW),
        "/less": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + RAW),
        "/huge": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999\r\n\r\n" + RAW),
        "/endless": chunked_for_ever(bytes(1 << 20)),
        "/away": redirect("http://169.254.169.254/latest"),
        "/odd": raw(b"HTTP/1.1 206 Partial\r\nContent-Length: 3\r\n\r\nabc"),
    }
    said = {
        "/drip": "less than 1024 KiB came within",
        "/silent": "less than 1024 KiB came within",
        "/more": "breaks off",
        "/less": "wrong checksum",
        "/huge": "KVM_IMAGE_MAX_BYTES",
        "/endless": "KVM_IMAGE_MAX_BYTES",
        "/away": "169.254.169.254",
        "/odd": "status 206",
    }
    for path, wanted in said.items():
        download = SHORT if path in {"/drip", "/silent"} else fetch.download
        if path == "/away":
            # As from another host, to which loopback is inside.
            download = partial(download, is_inward=lambda address: address.startswith("169."))
        stock = Stock(tmp_path / path[1:], limits=limits, download=download)
        told = await refused(stock, image(server.url(path), RAW), RAW_FORM)
        assert wanted in told, path
        assert "image debian: " in told
        assert not any(len(name) == 64 for name in names(stock)), path


async def test_too_little_room(tmp_path: Path, parts: Parts) -> None:
    """Law: what would leave the machines too little room is not begun, and one whose size is not told is given up."""
    stock = Stock(tmp_path, limits=Limits(size_bytes=1 << 30, keep_bytes=1 << 60))
    told = await refused(stock, image(parts.url, RAW), RAW_FORM)
    assert "needs 3 MiB in" in told
    assert "make room there" in told
    assert parts.offsets == [0]
    assert (stock.images / names(stock)[0]).stat().st_size == 0


async def test_a_folder_that_is_not_there(tmp_path: Path, parts: Parts) -> None:
    """Law: a folder that people named is not made, and none is used that others may enter."""
    stock = Stock(tmp_path)
    stock.library._is_own = False
    assert "KVM_IMAGE_DIR" in await refused(stock, image(parts.url, RAW), RAW_FORM)
    stock.images.mkdir(mode=0o755)
    assert "chmod 700" in await refused(Stock(tmp_path), image(parts.url + "?2", RAW), RAW_FORM)
    assert parts.offsets == []


async def test_a_file_of_the_host(tmp_path: Path) -> None:
    """Law: file: works below KVM_MEDIA_ROOT, and nowhere else."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.raw").write_bytes(RAW)
    stock = Stock(tmp_path, sources=Sources(file_root=tmp_path / "in"))
    assert await got(stock, image(f"file://{tmp_path}/in/a.raw", RAW), RAW_FORM) == RAW
    (tmp_path / "out.raw").write_bytes(RAW + b"1")
    assert "a file outside of" in await refused(stock, image(f"file://{tmp_path}/out.raw", RAW + b"1"), RAW_FORM)


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "compat=0.10"), ("-o", "cluster_size=2M")])
async def test_both_formats_of_an_image(tmp_path: Path, parts: Parts, options: tuple[str, ...]) -> None:
    """Law: an image is fetched once, and becomes what a disk's ending says; zeros take no room."""
    parts.data = qcow2_of(tmp_path, RAW, *options)
    entry, stock = image(parts.url, parts.data, of=QCOW2), Stock(tmp_path)
    assert await got(stock, entry, RAW_FORM) == RAW
    assert await got(stock, entry, QCOW2) == parts.data
    assert parts.offsets == [0]
    assert names(stock) == sorted([entry.sha256, f"{entry.content}.raw"])
    assert (stock.images / f"{entry.content}.raw").stat().st_blocks * 512 < len(RAW) / 2


async def test_a_raw_image_as_qcow2(tmp_path: Path, parts: Parts) -> None:
    """Law: the other way round too, whatever its size is."""
    parts.data = RAW + b"odd"
    entry, stock = image(parts.url, parts.data), Stock(tmp_path)
    (await stock.library.get(entry, QCOW2, lambda _: None)).close()
    found = disk_of(stock.images / f"{entry.content}.qcow2", QCOW2)
    assert found.rstrip(b"\0") == parts.data
    assert len(found) % 512 == 0


async def test_a_header_in_a_raw_image_is_just_bytes(tmp_path: Path, parts: Parts) -> None:
    """Law: what the format says counts, and nothing in the file."""
    parts.data = qcow2_of(tmp_path, RAW)
    assert await got(Stock(tmp_path), image(parts.url, parts.data), RAW_FORM) == parts.data


def _bad(folder: Path, kind: str) -> bytes:
    """A qcow2 image that leads elsewhere, or to too much."""
    secret, made = folder / "secret", folder / "bad.qcow2"
    secret.write_bytes(b"s" * 65536)
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    match kind:
        case "backing":
            subprocess.run([*create, "-b", str(secret), "-F", "raw", str(made)], check=True, timeout=60)
        case "data":
            data = ["-o", f"data_file={folder / 'data'},data_file_raw=on", str(made), "64K"]
            subprocess.run([*create, *data], check=True, timeout=60)
        case "huge":
            subprocess.run([*create, str(made), "10T"], check=True, timeout=60)
        case "none":
            made.write_bytes(RAW)
        case "empty":
            made.write_bytes(b"")
        case "senseless":
            subprocess.run([*create, str(made), "64K"], check=True, timeout=60)
            data_ = bytearray(made.read_bytes())
            struct.pack_into(">I", data_, 20, 63)
            made.write_bytes(data_)
    return made.read_bytes()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("backing", "needs a backing file"),
        ("data", "keeps its data in another file"),
        ("huge", "it is a disk of 10T, and this host takes up to 1G (KVM_IMAGE_MAX_BYTES)"),
        ("none", "is no qcow2 image"),
        ("empty", "is no qcow2 image"),
        ("senseless", "header that makes no sense"),
    ],
)
async def test_images_that_lead_elsewhere(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch, kind: str, wanted: str
) -> None:
    """Law: a header is judged before any tool sees the file; such a file never gets its name."""
    parts.data = _bad(tmp_path, kind) or b" "
    parts.data = b" " if kind == "empty" else parts.data
    monkeypatch.setenv("PATH", "/nowhere")
    stock, entry = Stock(tmp_path), image(parts.url, parts.data, of=QCOW2)
    for form in (RAW_FORM, QCOW2):
        assert wanted in await refused(stock, entry, form)
    assert not any(len(name) == 64 for name in names(stock))


async def test_it_is_given_up_when_there_is_no_room_left(tmp_path: Path) -> None:
    """Law: what writes more than it should, such as clusters that are all one, is ended before machines are stopped."""
    stock, ended = Stock(tmp_path), asyncio.Event()

    async def room(folder: Path) -> int:
        return -1

    async def writes() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    stock.library.room = room  # type: ignore[method-assign]
    with pytest.raises(NoRoom, match="make room there"):
        await stock.library.with_room(tmp_path, writes())
    assert ended.is_set()


async def test_what_no_key_names_goes(tmp_path: Path, parts: Parts) -> None:
    """Law: with the next fetch the files of images go that no key names any more; what is not ours stays."""
    entry, stock = image(parts.url, RAW), Stock(tmp_path)
    stock.images.mkdir(mode=0o700)
    old, kept = "a" * 64, image("http://h/b.raw", b"kept", name="kept")
    for name in (old, f"{old}-raw.qcow2", f"{old}.part", kept.sha256, f"{kept.sha256}.part", "mine.raw"):
        (stock.images / name).write_bytes(b"")
    stock.keys["kept"] = kept
    assert await got(stock, entry, RAW_FORM) == RAW
    assert names(stock) == sorted([kept.sha256, f"{kept.sha256}.part", "mine.raw", entry.sha256])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_converter_without_rights(tmp_path: Path, parts: Parts) -> None:
    """Law: what reads a file from outside runs as QEMU's user, and the result is the supervisor's own."""
    from kvmsupervisor.adapters.users import qemu_users  # noqa: PLC0415

    parts.data = qcow2_of(tmp_path, RAW)
    stock = Stock(tmp_path)
    stock.library._user = qemu_users(None, None).of_tools
    entry = image(parts.url, parts.data, of=QCOW2)
    assert await got(stock, entry, RAW_FORM) == RAW
    found = (stock.images / f"{entry.content}.raw").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o444)
