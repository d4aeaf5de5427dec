"""Real QEMUs with a disk on a real Ceph cluster, paused, and a guest of one sector that writes for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from kvmsupervisor.adapters.qmp import Monitor
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.spec import RbdDisk, Spec
from tests.support.ceph import Ceph
from tests.support.processes import freeze

LIMIT_S = 60.0

WRITES_PER_S = 100
"""A limit that QEMU holds a guest to; the guest itself stays below it."""

SECTOR = 512
COUNTER = 0x100

# 16 bit code at 0x7c00. At each tick of the firmware's clock, 18 a second, it adds one to a counter in its own sector
# and writes that to the next one. Without a pause the firmware would wait for the limit, with all of a processor.
#         xor ax,ax; mov ds,ax; mov es,ax
#   next: sti; hlt; inc word [0x7d00]; mov ax,0x0301; mov cx,2; mov dx,0x80; mov bx,0x7c00; int 0x13; jmp next
_CODE = bytes.fromhex("31c0 8ed8 8ec0 fb f4 ff06007d b80103 b90200 ba8000 bb007c cd13 ebea")
WRITER = _CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"

SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")

UNPRIVILEGED = (
    *("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"),
    *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
)
"""How a test that is root starts QEMU as somebody else."""


def make_writer_image(ceph: Ceph, image: RbdDisk, folder: Path) -> None:
    """An image of 1 MiB from which the writer boots."""
    file = folder / f"{image.image}.img"
    with file.open("wb") as out:
        out.write(WRITER)
        out.truncate(1 << 20)
    features = ("--image-feature", "layering", "--image-feature", "exclusive-lock")
    ceph.rbd("import", "--no-progress", *features, str(file), str(image))


def count(ceph: Ceph, image: RbdDisk) -> int:
    """How far the writer came, as the image says; 0 before it has written. It takes 0.1 s of a processor."""
    with tempfile.TemporaryDirectory(prefix="kvs") as folder:
        ceph.rbd("export", "--no-progress", str(image), f"{folder}/image")
        with Path(folder, "image").open("rb") as file:
            file.seek(SECTOR + COUNTER)
            return int.from_bytes(file.read(2), "little")


class RbdQemu:
    """One QEMU, started with `-S`. As a context manager it answers QMP, and is gone at the end."""

    def __init__(
        self, ceph: Ceph, image: RbdDisk, *, side: hardware.Ceph | None = None, prefix: Sequence[str] = ()
    ) -> None:
        self.events: list[str] = []
        self._side = side or hardware.Ceph(user="vm", conf=str(ceph.conf))
        self._image = image
        self._prefix = tuple(prefix)
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvs")))
            directory = InstanceDir(folder)
            self.log = folder / "log"
            with directory.listen(directory.qmp_socket) as listener, self.log.open("wb") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *self.argv(listener.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[listener.fileno(), *([] if self._side.key is None else [self._side.key])],
                )
            stack.push_async_callback(self.kill)
            self._monitor = await Monitor.connect(
                str(directory.qmp_socket), on_event=self._on_event, on_lost=self._changed.set, timeout_s=LIMIT_S
            )
            stack.push_async_callback(self._monitor.close)
            # The greeting comes before the disks are open, an answer after.
            await self.status()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def argv(self, qmp_fd: int) -> list[str]:
        """Its command line."""
        return [
            *self._prefix,
            *("qemu-system-x86_64", "-S", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35,accel=tcg", "-m", "64", *SANDBOX),
            *("-chardev", f"socket,id=q0,fd={qmp_fd},server=on,wait=off", "-mon", "chardev=q0,mode=control"),
            *hardware.ceph_key(self._side),
            *hardware.disks(Spec(ram_mib=64, rbd=replace(self._image, iops=WRITES_PER_S)), self._side, ()),
        ]

    async def status(self) -> str:
        """QMP's run state."""
        answer = await self._monitor.execute("query-status", timeout_s=LIMIT_S)
        return str(answer["status"])

    async def cont(self) -> None:
        """Let the guest run."""
        await self._monitor.execute("cont", timeout_s=LIMIT_S)

    async def quit(self) -> None:
        """Have it end in order; returns when it is gone."""
        await self._monitor.execute("quit", timeout_s=LIMIT_S)
        await self.process.wait()

    async def until_event(self, name: str) -> None:
        """Wait for an event, unless it came already."""
        async with asyncio.timeout(LIMIT_S):
            while name not in self.events:
                self._changed.clear()
                await self._changed.wait()

    def freeze(self) -> None:
        """SIGSTOP: like a host that is suspended."""
        freeze(self.process.pid)

    def thaw(self) -> None:
        """End `freeze`."""
        os.kill(self.process.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    def _on_event(self, name: str, _data: Mapping[str, Any]) -> None:
        self.events.append(name)
        self._changed.set()
