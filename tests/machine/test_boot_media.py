"""A guest's boot media: when user data is fetched, kept, refused; what lies in the run directory, cut off or not."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from kvmsupervisor.adapters import medium
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.machine import boot_media as media
from kvmsupervisor.machine.boot_media import (
    CONFIG_DRIVE,
    IGNITION,
    LEDGER,
    SEED,
    USER_DATA,
    Media,
    MediaTrouble,
    discard,
    furnish,
    keep,
)
from tests.support.web import Site, ok, raw, site

WEB1 = InstanceId("web1")
MACHINE = UUID("0c8b3f0e-9a3c-4ef4-a1f2-0d3f6f2f7a55")
OLD, NEW = b"#cloud-config\nhostname: old\n", b"#!/bin/sh\necho new\n"
IGNITION_DATA = b'{"ignition": {"version": "3.4.0"}}\n'
GONE = raw(b"HTTP/1.1 503 Gone away\r\n\r\n")


async def made(url: str, directory: Path, *, instance: InstanceId = WEB1) -> Media:
    return await furnish(url, directory=directory, instance=instance, uuid=MACHINE, file_root=None)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def state(directory: Path) -> dict[str, tuple[int, int]]:
    """What changes with every write."""
    found = {path.name: path.stat() for path in directory.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def on_medium(path: Path) -> bytes:
    """The user data on a medium, as `isoinfo` reads it."""
    name = "/user-data" if path.name == SEED else "/openstack/latest/user_data"
    command = ["isoinfo", "-R", "-i", str(path), "-x", name]
    return subprocess.run(command, check=True, capture_output=True, timeout=30).stdout


# --- a first boot ---------------------------------------------------------------------------------------------


async def test_user_data_for_cloud_init_becomes_two_media(tmp_path: Path) -> None:
    """Law: NoCloud and config-drive, in this order, both with the data as it came; no Ignition, nothing to say."""
    async with site(a=ok(OLD)) as server:
        found = await made(server.url("/a"), tmp_path)
    assert found == Media(cdroms=(tmp_path / "seed.iso", tmp_path / "config-2.iso"), ignition=None, notice=None)
    assert [on_medium(path) for path in found.cdroms] == [OLD, OLD]
    assert names(tmp_path) == {SEED, CONFIG_DRIVE, USER_DATA, LEDGER}


async def test_ignition_becomes_a_file(tmp_path: Path) -> None:
    """Law: Ignition goes by fw_cfg, byte for byte, without media."""
    async with site(a=ok(IGNITION_DATA)) as server:
        found = await made(server.url("/a"), tmp_path)
    assert found == Media(cdroms=(), ignition=tmp_path / "ignition.json", notice=None)
    assert (tmp_path / IGNITION).read_bytes() == IGNITION_DATA
    assert names(tmp_path) == {IGNITION, USER_DATA, LEDGER}


async def test_user_data_of_a_key_becomes_the_same(tmp_path: Path) -> None:
    """Law: what a key holds is on the media as if it came from a URL; the copy is no URL's, and goes with the key."""
    for data, expected in ((OLD, {SEED, CONFIG_DRIVE}), (IGNITION_DATA, {IGNITION})):
        found = await keep(data, directory=tmp_path, instance=WEB1, uuid=MACHINE)
        assert names(tmp_path) == {*expected, USER_DATA, LEDGER}
        assert [on_medium(path) for path in found.cdroms] == [OLD] * len(found.cdroms)
    async with site(a=GONE) as server:
        with pytest.raises(MediaTrouble):
            await made(server.url("/a"), tmp_path)
    discard(tmp_path)
    assert names(tmp_path) == set()


async def test_only_we_read_media(tmp_path: Path) -> None:
    """Law: all files are for their owner alone: QEMU gets them open."""
    async with site(a=ok(OLD), i=ok(IGNITION_DATA)) as server:
        for path in ("/a", "/i"):
            await made(server.url(path), tmp_path)
            for name in names(tmp_path):
                assert mode(tmp_path / name) == 0o600, name


async def test_without_user_data_a_first_boot_waits(tmp_path: Path) -> None:
    """Law: no start without the user data that it was to have; key, URL without secrets, found and wanted are said."""
    async with site(a=GONE, b=ok(b"hello")) as server:
        for path, message in (
            ("/a?token=secret", "/a?…: status 503 'Gone away'; see whether the URL is right"),
            ("/b", "/b: found text of 5 bytes with an unknown beginning; user data begins with #cloud-config"),
        ):
            with pytest.raises(MediaTrouble) as caught:
                await made(server.url(path, user="me:secret@"), tmp_path)
            assert str(caught.value).startswith(f"cloud-config http://…@127.0.0.1:{server.port}{message}")
            assert "secret" not in str(caught.value)
    assert names(tmp_path) == set()


async def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Law: the host's own trouble is a reason to wait, too."""
    async with site(a=ok(OLD)) as server:
        with pytest.raises(MediaTrouble, match=r"its media cannot be made: .*media.json.new: No such file"):
            await made(server.url("/a"), tmp_path / "absent")


# --- a later boot ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [OLD, IGNITION_DATA])
async def test_nothing_is_written_while_nothing_changes(tmp_path: Path, data: bytes) -> None:
    """Law: the files that a running QEMU has open stay the same ones; a new password is no change."""
    async with site(a=ok(data)) as server:
        first = await made(server.url("/a", user="me:one@"), tmp_path)
        before = state(tmp_path)
        assert await made(server.url("/a", user="me:two@"), tmp_path) == first
    assert state(tmp_path) == before


async def test_new_user_data_replaces_the_media(tmp_path: Path) -> None:
    """Law: what QEMU has open stays as it is; the next one gets the new data."""
    async with site(a=ok(OLD)) as server:
        (seed, drive) = (await made(server.url("/a"), tmp_path)).cdroms
        with seed.open("rb") as held:
            old = held.read()
            server.answers["/a"] = ok(NEW)
            await made(server.url("/a"), tmp_path)
            held.seek(0)
            assert held.read() == old
    assert (on_medium(seed), on_medium(drive)) == (NEW, NEW)


async def test_another_kind_removes_the_other_files(tmp_path: Path) -> None:
    """Law: no stale medium stays, in either direction."""
    async with site(a=ok(OLD)) as server:
        for data, wanted in ((OLD, {SEED, CONFIG_DRIVE}), (IGNITION_DATA, {IGNITION}), (NEW, {SEED, CONFIG_DRIVE})):
            server.answers["/a"] = ok(data)
            await made(server.url("/a"), tmp_path)
            assert names(tmp_path) == wanted | {USER_DATA, LEDGER}


@pytest.mark.parametrize("answer", [GONE, ok(b"<html>Log in</html>")])
@pytest.mark.parametrize("data", [OLD, IGNITION_DATA])
async def test_the_kept_copy_is_used_and_that_is_said(
    tmp_path: Path, data: bytes, answer: Callable[[asyncio.StreamWriter], object]
) -> None:
    """Law: later boots do not need the server; the notice says why the copy was used, and shows no secret."""
    async with site(a=ok(data)) as server:
        first = await made(server.url("/a", user="me:secret@"), tmp_path)
        before = state(tmp_path)
        server.answers["/a"] = answer  # type: ignore[assignment]
        second = await made(server.url("/a", user="me:secret@"), tmp_path)
    assert (second.cdroms, second.ignition) == (first.cdroms, first.ignition)
    assert second.notice is not None
    assert second.notice.startswith(f"cloud-config http://…@127.0.0.1:{server.port}/a: ")
    assert second.notice.endswith("; until then the copy that the last start had is used")
    assert "secret" not in second.notice
    assert state(tmp_path) == before


async def test_another_urls_copy_is_not_used(tmp_path: Path) -> None:
    """Law: user data of another URL is not what is wished for: wait."""
    async with site(a=ok(OLD), b=GONE) as server:
        await made(server.url("/a"), tmp_path)
        with pytest.raises(MediaTrouble, match="status 503"):
            await made(server.url("/b"), tmp_path)
        server.answers["/a"] = GONE
        assert (await made(server.url("/a"), tmp_path)).notice is not None


async def test_another_url_with_the_same_data_writes_no_media(tmp_path: Path) -> None:
    """Law: only the data counts for the media; the copy then belongs to the new URL."""
    async with site(a=ok(OLD), b=ok(OLD)) as server:
        await made(server.url("/a"), tmp_path)
        before = state(tmp_path)
        await made(server.url("/b"), tmp_path)
        after = state(tmp_path)
        assert {name: after[name] for name in (SEED, CONFIG_DRIVE, USER_DATA)} == {
            name: before[name] for name in (SEED, CONFIG_DRIVE, USER_DATA)
        }
        server.answers |= {"/a": GONE, "/b": GONE}
        assert (await made(server.url("/b"), tmp_path)).notice is not None
        with pytest.raises(MediaTrouble):
            await made(server.url("/a"), tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"recipe": 1}', '{"recipe": "", "sources": []}', "\x00\xff"])
async def test_what_is_missing_or_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    """Law: a file that is gone, a ledger that cannot be read or a copy that was changed is not relied on."""
    async with site(a=ok(OLD)) as server:
        (seed, _) = (await made(server.url("/a"), tmp_path)).cdroms
        seed.unlink()
        (tmp_path / LEDGER).write_text(damage)
        (tmp_path / USER_DATA).write_bytes(b"#!damaged")
        server.answers["/a"] = GONE
        with pytest.raises(MediaTrouble):
            await made(server.url("/a"), tmp_path)
        server.answers["/a"] = ok(OLD)
        await made(server.url("/a"), tmp_path)
    assert on_medium(seed) == OLD
    assert (tmp_path / USER_DATA).read_bytes() == OLD


def test_all_of_it_can_be_discarded(tmp_path: Path) -> None:
    """Law: without the key nothing of the user data stays; other files do."""
    for name in (SEED, CONFIG_DRIVE, IGNITION, USER_DATA, LEDGER, f"{SEED}.new", "qemu.log"):
        (tmp_path / name).write_bytes(b"x")
    discard(tmp_path)
    discard(tmp_path)
    assert names(tmp_path) == {"qemu.log"}


# --- cut off --------------------------------------------------------------------------------------------------


class CutOff(BaseException):
    """The supervisor is killed: nothing catches it."""


class Knife:
    """Cuts the n-th step on files, before or half way through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.half = False
        place, discard = medium.place, medium.discard

        def cut_place(path: Path, data: bytes) -> None:
            if self._cuts():
                if self.half:
                    path.with_name(f"{path.name}.new").write_bytes(data[: len(data) // 2])
                raise CutOff
            place(path, data)

        def cut_discard(path: Path) -> None:
            if self._cuts():
                raise CutOff
            discard(path)

        monkeypatch.setattr(medium, "place", cut_place)
        monkeypatch.setattr(medium, "discard", cut_discard)

    def _cuts(self) -> bool:
        self.left -= 1
        return self.left == -1


@pytest.fixture
def knife(monkeypatch: pytest.MonkeyPatch) -> Knife:
    # What is cut off runs in the test's own thread, so that no thread has to carry a BaseException.
    async def at_once(function: Callable[[], object]) -> object:
        return function()

    monkeypatch.setattr(media, "_in_thread", at_once)
    return Knife(monkeypatch)


async def serve(server: Site, directory: Path, data: bytes | None) -> Media:
    server.answers["/a"] = GONE if data is None else ok(data)
    return await made(server.url("/a"), directory)


def consistent(directory: Path, found: Media, data: bytes) -> None:
    """The media are those of `data` and nothing else lies about."""
    if data == IGNITION_DATA:
        assert found.ignition is not None
        assert found.ignition.read_bytes() == data
        assert names(directory) == {IGNITION, USER_DATA, LEDGER}
    else:
        assert [on_medium(path) for path in found.cdroms] == [data, data]
        assert names(directory) == {SEED, CONFIG_DRIVE, USER_DATA, LEDGER}


@pytest.mark.parametrize("change", [(OLD, NEW), (OLD, IGNITION_DATA), (IGNITION_DATA, NEW)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("then", ["new", "old", "gone"])
async def test_cut_off_anywhere_the_next_start_is_whole(
    tmp_path: Path, knife: Knife, change: tuple[bytes, bytes], then: str, half: bool
) -> None:
    """Law: cut off at any step of a change, the next start has media of one user data, whichever it then gets.

    Without a server it has a copy: the new one or the old one, never none.
    """
    steps, (old, new) = 0, change
    knife.half = half
    async with site() as server:
        while True:
            directory = tmp_path / str(steps)
            directory.mkdir()
            await serve(server, directory, old)
            knife.left = steps
            try:
                await serve(server, directory, new)
            except CutOff:
                pass
            else:
                break
            finally:
                knife.left = -1
            found = await serve(server, directory, {"new": new, "old": old, "gone": None}[then])
            data = (directory / USER_DATA).read_bytes()
            assert data in {"new": [new], "old": [old], "gone": [old, new]}[then]
            consistent(directory, found, data)
            steps += 1
    assert steps >= 5


async def test_a_first_boot_cut_off_anywhere_begins_again(tmp_path: Path, knife: Knife) -> None:
    """Law: the same where there was nothing before; without a server it may wait."""
    steps = 0
    async with site() as server:
        while True:
            directory = tmp_path / str(steps)
            directory.mkdir()
            knife.left = steps
            try:
                await serve(server, directory, OLD)
            except CutOff:
                pass
            else:
                break
            finally:
                knife.left = -1
            try:
                found = await serve(server, directory, None)
            except MediaTrouble:
                found = await serve(server, directory, OLD)
            consistent(directory, found, OLD)
            steps += 1
    assert steps >= 5


async def test_cancelled_it_ends_when_its_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: when a cancelled `furnish` has ended nothing writes any more, however often it was cancelled."""
    begun, go_on = threading.Event(), threading.Event()
    place = medium.place

    def slow_place(path: Path, data: bytes) -> None:
        begun.set()
        assert go_on.wait(20)
        place(path, data)

    monkeypatch.setattr(medium, "place", slow_place)
    async with site(a=ok(OLD)) as server:
        task = asyncio.ensure_future(made(server.url("/a"), tmp_path))
        assert await asyncio.to_thread(begun.wait, 20)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert names(tmp_path) == {SEED, CONFIG_DRIVE, USER_DATA, LEDGER}
