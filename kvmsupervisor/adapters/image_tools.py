"""Programs that make one file of another: `qemu-img convert` and `cp`. Files are open descriptors, formats are said.

`qemu-img` reads what came from outside, so it runs as QEMU's user, with no capability, a bounded memory and a bounded
file; it opens nothing by name but its two descriptors. `cp` shares the blocks where the file system can (reflinks), and
otherwise leaves holes where there are zeros. Each is killed when its caller is cancelled, at its deadline, and by the
kernel when this process was killed. Sources: qemu-img(1), cp(1), setpriv(1), prlimit(1).
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Sequence

from kvmsupervisor.aio import end_tool
from kvmsupervisor.domain.local_disk import DiskFormat
from kvmsupervisor.domain.words import json_option

MEMORY_BYTES = 4 << 30
"""Address space of `qemu-img`: ten times what it takes for an image of a terabyte, as its threads reserve more."""

SPARE_BYTES = 1 << 30
"""What its file may have beyond the disk's size: tables of a qcow2 image, one eight thousandth of it."""

START_S, SLOWEST = 60.0, 4 << 20
"""How long a tool may take: so many seconds, and one more for each so many bytes. Arbitrary: a busy hard disk."""

WORDS = 300
"""Characters of a tool's complaint that are told."""

_PERCENT = re.compile(rb"\(([0-9]{1,3})\.[0-9]+/100%\)")


class ToolFailed(Exception):
    """A tool failed. The message says which, and its words."""


async def convert(
    source: int,
    of: DiskFormat,
    target: int,
    to: DiskFormat,
    *,
    size: int,
    become: Sequence[str],
    progress: Callable[[int], None],
) -> None:
    """Fill an empty disk with what another one has. The target has its size, its format, and nothing but zeros.

    Args:
        source: a descriptor, whose file `become`'s user may read.
        of: its format.
        target: a descriptor, whose file that user may write.
        to: its format.
        size: bytes of the disk.
        become: a prefix that makes a command another user's; empty for our own.
        progress: is told how much is done, percent.

    Raises:
        ToolFailed: it could not.
    """
    fsize = size + size // 1024 + SPARE_BYTES
    await _run(
        *(*become[:1], "--pdeathsig", "KILL", *become[1:]) if become else (_path_of("setpriv"), "--pdeathsig", "KILL"),
        *(_path_of("prlimit"), "--core=0:0", f"--as={MEMORY_BYTES}", f"--fsize={fsize}", "--"),
        *(_path_of("qemu-img"), "convert", "-p", "-n", "--target-is-zero", "-O", to.value),
        *(_node(of, source), _path(target)),
        fds=(source, target),
        limit_s=START_S + size / SLOWEST,
        progress=progress,
    )


async def snapshot(disk: int, what: str, name: str, *, size: int) -> None:
    """Take an internal snapshot of a qcow2 image that nobody has open, take one away, or roll back to one.

    The file is the supervisor's own, so the tool runs as its user, without capabilities.

    Args:
        disk: a descriptor of the file, locked by the caller.
        what: `-c` takes it, `-d` takes it away, `-a` rolls back to it.
        name: of the snapshot.
        size: bytes of the disk.

    Raises:
        ToolFailed: it could not.
    """
    await _run(
        *(_path_of("setpriv"), "--pdeathsig", "KILL", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
        *(_path_of("prlimit"), "--core=0:0", f"--as={MEMORY_BYTES}", "--"),
        *(_path_of("qemu-img"), "snapshot", what, name, _node(DiskFormat.QCOW2, disk)),
        fds=(disk,),
        limit_s=START_S + size / SLOWEST,
    )


def _node(kind: DiskFormat, fd: int) -> str:
    node: dict[str, object] = {"driver": kind.value}
    if kind is DiskFormat.QCOW2:
        # Should its header name one after all, it is not followed.
        node["backing"] = None
    file = {"driver": "file", "filename": _path(fd)}
    return f"json:{json_option({**node, 'file': file})}"


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


async def copy(source: int, target: int, *, size: int) -> None:
    """Make an empty file the same as another one.

    Args:
        source: a descriptor.
        target: a descriptor.
        size: bytes of the source.

    Raises:
        ToolFailed: it could not.
    """
    await _run(
        *(_path_of("setpriv"), "--pdeathsig", "KILL", _path_of("cp"), "--reflink=auto", "--sparse=always"),
        *("--", _path(source), _path(target)),
        fds=(source, target),
        limit_s=START_S + size / SLOWEST,
    )


async def _run(
    *words: str, fds: Sequence[int], limit_s: float, progress: Callable[[int], None] = lambda _: None
) -> None:
    name = next(word.rpartition("/")[2] for word in words if word.endswith(("/qemu-img", "/cp")))
    try:
        tool = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=fds,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except OSError as error:
        raise ToolFailed(f"{name} cannot be started: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(limit_s):
            complaints, _ = await asyncio.gather(_end_of(tool.stderr), _follow(tool.stdout, progress))
            status = await tool.wait()
    except TimeoutError:
        raise ToolFailed(f"{name} took longer than {limit_s:.0f} s") from None
    finally:
        await end_tool(tool)
    if status != 0:
        said = complaints.decode(errors="replace").strip().rpartition("\n")[2] or f"exit status {status}"
        raise ToolFailed(f"{name}: {said[:WORDS]}")


async def _end_of(stream: asyncio.StreamReader | None) -> bytes:
    """The end of what a tool complains of, however much that is."""
    assert stream is not None
    kept = b""
    while data := await stream.read(4096):
        kept = (kept + data)[-4096:]
    return kept


async def _follow(stream: asyncio.StreamReader | None, progress: Callable[[int], None]) -> None:
    assert stream is not None
    while data := await stream.read(4096):
        if found := _PERCENT.findall(data):
            progress(min(100, int(found[-1])))


def _path_of(program: str) -> str:
    """Where a program is.

    Raises:
        ToolFailed: it is not installed.
    """
    path = shutil.which(program)
    if path is None:
        package = {"qemu-img": "qemu-utils", "cp": "coreutils"}.get(program, "util-linux")
        raise ToolFailed(f"there is no program {program} in PATH; it is in {package}")
    return path
