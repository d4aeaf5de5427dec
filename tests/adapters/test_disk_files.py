"""Files that are disks: made whole or not at all, opened for what they are, and never waited for without an end."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsupervisor.adapters.disk_files import (
    UNDER_WAY,
    DiskFile,
    FileLocked,
    FileTrouble,
    NoFile,
    Threads,
    make_folder,
    open_disk,
    room,
)
from kvmsupervisor.domain.local_disk import FileDisk

MIB = 1 << 20


def opened(folder: Path, disk: FileDisk) -> DiskFile:
    """Open it, and close it again."""
    found = open_disk(folder, disk)
    os.close(found.fd)
    return found


@pytest.mark.parametrize("name", ["a.raw", "a.qcow2"])
def test_made_and_opened_again(tmp_path: Path, name: str) -> None:
    """It is there afterwards, alone, closed to others, with its size; the second time it is the same file."""
    make_folder(tmp_path / "x" / "disks")
    folder = tmp_path / "x" / "disks"
    assert opened(folder, FileDisk(name, size=3 * MIB)).size == 3 * MIB
    before = (folder / name).stat()
    assert (stat.S_IMODE(before.st_mode), before.st_nlink) == (0o600, 1)
    assert opened(folder, FileDisk(name, size=5 * MIB)).size == 3 * MIB
    assert (folder / name).stat().st_ino == before.st_ino
    assert os.listdir(folder) == [name]  # noqa: PTH208


def test_what_was_there_is_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is faster with a file of that name: that one is the disk."""
    real = os.link

    def late(*args: object, **more: object) -> None:
        (tmp_path / "a.raw").write_bytes(b"theirs".ljust(MIB, b"\0"))
        real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", late)
    opened(tmp_path, FileDisk("a.raw", size=2 * MIB))
    assert (tmp_path / "a.raw").read_bytes()[:6] == b"theirs"


def test_missing(tmp_path: Path) -> None:
    """Without a size nothing is made; without the folder neither."""
    with pytest.raises(NoFile, match="there is no file"):
        open_disk(tmp_path, FileDisk("a.raw"))
    with pytest.raises(FileTrouble, match="mount its file system"):
        open_disk(tmp_path / "none", FileDisk("a.raw", size=MIB))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def no_nameless_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system is NFS, or another one that makes no file without a name."""
    real = os.open

    def refuse(path: Path, flags: int, *more: int, **named: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(request.param, "no")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("no_nameless_files")
@pytest.mark.parametrize("name", ["a.raw", "a.qcow2"])
def test_a_file_system_without_nameless_files(tmp_path: Path, name: str) -> None:
    """It is made under another name first, of which nothing is left; it is this supervisor's alone."""
    assert opened(tmp_path, FileDisk(name, size=MIB)).size == MIB
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a disk that others may open is refused, whatever chmod(2) says; one that they may not is taken as it is."""
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: None)
    path = tmp_path / "a.raw"
    path.write_bytes(b"x")
    for mode in (0o644, 0o620, 0o604):
        path.chmod(mode)
        with pytest.raises(FileTrouble, match=r"keeps neither owners nor modes.*umask=077"):
            open_disk(tmp_path, FileDisk("a.raw"))
    path.chmod(0o700)
    assert opened(tmp_path, FileDisk("a.raw")).size == 512

    def refuse(fd: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "fchmod", refuse)
    assert opened(tmp_path, FileDisk("a.raw")).size == 512
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="mode 0600"):
        open_disk(tmp_path, FileDisk("a.raw"))


@pytest.mark.usefixtures("no_nameless_files")
@pytest.mark.parametrize("cut", ["fsync", "ftruncate", "fchmod", "link", "unlink"])
def test_a_making_with_names_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """Law: at each step that a kill can come before, there is no disk or a whole one, and the next start has it."""

    class Killed(BaseException):
        """Nothing of the process goes on."""

    disk = FileDisk("a.raw", size=MIB)
    with monkeypatch.context() as during:

        def kill(*_: object, **__: object) -> None:
            # Its descriptors are closed, and nothing else is done.
            during.setattr(os, "unlink", kill)
            raise Killed

        during.setattr(os, cut, kill)
        with pytest.raises(Killed):
            open_disk(tmp_path, disk)
    made = tmp_path / "a.raw"
    assert (tmp_path / UNDER_WAY.format("a.raw")).exists()
    assert not made.exists() or made.stat().st_size == MIB
    assert opened(tmp_path, disk).size == MIB
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]


@pytest.mark.usefixtures("no_nameless_files")
def test_a_making_with_names_takes_nobodys_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a file that a person puts there meanwhile is the disk; a file system that cannot promise that is refused."""
    real = os.link

    def late(*args: object, **more: object) -> None:
        (tmp_path / "a.raw").write_bytes(b"theirs".ljust(MIB, b"\0"))
        real(*args, **more)  # type: ignore[arg-type]

    def never(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    with monkeypatch.context() as during:
        during.setattr(os, "link", late)
        opened(tmp_path, FileDisk("a.raw", size=2 * MIB))
    assert (tmp_path / "a.raw").read_bytes()[:6] == b"theirs"
    with monkeypatch.context() as during:
        during.setattr(os, "link", never)
        with pytest.raises(FileTrouble, match="qemu-img create"):
            open_disk(tmp_path, FileDisk("b.raw", size=MIB))
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]


@pytest.mark.usefixtures("no_nameless_files")
def test_two_that_make_one_file_with_names(tmp_path: Path) -> None:
    """Law: while one makes it the other touches nothing, and is told to come again."""
    aside = tmp_path / UNDER_WAY.format("a.raw")
    aside.write_bytes(b"half")
    with aside.open("rb") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        with pytest.raises(FileLocked):
            open_disk(tmp_path, FileDisk("a.raw", size=MIB))
        assert aside.read_bytes() == b"half"
    assert opened(tmp_path, FileDisk("a.raw", size=MIB)).size == MIB


def make_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def make_second_name(path: Path) -> None:
    path.write_bytes(bytes(MIB))
    path.with_suffix(".other").hardlink_to(path)


BAD: dict[str, Callable[[Path], None]] = {
    "symbolic link": make_link,
    "2 names": make_second_name,
    "no plain file": os.mkfifo,
    "no plain file ": Path.mkdir,
}


@pytest.mark.parametrize("why", BAD)
def test_what_is_no_plain_file(tmp_path: Path, why: str) -> None:
    """Neither opened nor changed, and a size makes nothing in its place."""
    BAD[why](tmp_path / "a.raw")
    before = (tmp_path / "a.raw").lstat()
    with pytest.raises(FileTrouble, match=why.strip()):
        open_disk(tmp_path, FileDisk("a.raw", size=MIB))
    after = (tmp_path / "a.raw").lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


def test_locks(tmp_path: Path) -> None:
    """One writes, or several read; the lock ends with the last copy of the descriptor, not with ours."""
    disk, reader = FileDisk("a.raw", size=MIB), FileDisk("a.raw", ro=True)
    first = open_disk(tmp_path, disk)
    copy = os.dup(first.fd)
    os.close(first.fd)
    for other in (disk, reader):
        with pytest.raises(FileLocked, match="in use by another program"):
            open_disk(tmp_path, other)
    os.close(copy)
    readers = [open_disk(tmp_path, reader) for _ in range(2)]
    assert fcntl.fcntl(readers[0].fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(FileLocked):
        open_disk(tmp_path, disk)
    for one in readers:
        os.close(one.fd)


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    """Guests are strangers to each other: mode 0600 from the first start on."""
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    (tmp_path / "a.raw").chmod(0o666)
    assert opened(tmp_path, FileDisk("a.raw")).size == 1024
    assert stat.S_IMODE((tmp_path / "a.raw").stat().st_mode) == 0o600


def test_room(tmp_path: Path) -> None:
    assert room(tmp_path, as_root=True) >= room(tmp_path, as_root=False) > 0


async def test_what_hangs_holds_up_nobody_else() -> None:
    """It is given up, not begun again while it hangs; what it brings in the end is let go of."""
    threads, goes_on = Threads(), threading.Event()
    late: list[int] = []
    let_go = asyncio.Event()

    def undo(result: int) -> None:
        late.append(result)
        let_go.set()

    def hang() -> int:
        goes_on.wait()
        return 7

    with pytest.raises(FileTrouble, match="does not answer"):
        await threads.call("one", hang, deadline_s=0.01, undo=undo)
    with pytest.raises(FileTrouble, match="does not answer"):
        await threads.call("one", lambda: 1)
    assert await threads.call("two", lambda: 2) == 2
    goes_on.set()
    await let_go.wait()
    assert late == [7]
    assert await threads.call("one", lambda: 3) == 3


async def test_what_fails_is_told() -> None:
    threads = Threads()

    def fail() -> None:
        raise FileTrouble("so it is")

    with pytest.raises(FileTrouble, match="so it is"):
        await threads.call("one", fail)
    assert await threads.call("one", lambda: 1) == 1
