"""Law 13 on the real QEMU: a live move loses no write of an emulated guest, with the memory that it is given here."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.hardware import ODD_KIB
from tests.support.cluster import eventually
from tests.support.firmware import assemble

COUNTS = """
.code16
.intel_syntax noprefix
.org 0xf000
begin:
    cli
    xor ebx, ebx
round:
    mov ax, 0x2000 # 64 pages, each with the number of this round or of the last one
    mov cx, 64
page:
    mov es, ax
    cmp es:[0], ebx
    jne lost
    lea edx, [ebx + 1]
    mov es:[0], edx
    add ax, 0x100
    dec cx
    jnz page
    inc ebx
    test ebx, 0x7fff
    jnz round
    mov dx, 0x3f8
    mov al, '.'
    out dx, al
    jmp round
lost:
    mov dx, 0x3f8
    mov al, 'X'
    out dx, al
    hlt
    jmp lost
.org 0xfff0
    jmp 0xf000:0xf000
.org 0x10000
"""

BANDWIDTH = 1 << 20
SHORT_MS, LONG_MS = 5, 2000
"""How long the guest may be stopped: first less than its 64 pages take, so that they are sent again and again."""


class Side:
    """One QEMU of the two, its monitor and its guest's words."""

    def __init__(self, folder: Path, name: str, firmware: Path, *more: str) -> None:
        self.console, self._path = folder / f"{name}.console", folder / f"{name}.qmp"
        size = f"size={(96 << 10) + ODD_KIB}K"
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-m", size, "-bios", str(firmware)),
                *("-nodefaults", "-display", "none", "-serial", f"file:{self.console}"),
                *("-qmp", f"unix:{self._path},server=on,wait=off", *more),
            ]
        )
        self._socket = socket.socket(socket.AF_UNIX)

    def connect(self) -> None:
        eventually("its monitor", self._connected)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.ask("qmp_capabilities")

    def _connected(self) -> bool:
        return self._socket.connect_ex(str(self._path)) == 0

    def ask(self, command: str, **arguments: object) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}))
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "event" not in answer:
                return answer["return"]

    def says(self) -> str:
        return self.console.read_text() if self.console.exists() else ""


@contextmanager
def side(folder: Path, name: str, firmware: Path, *more: str) -> Iterator[Side]:
    made = Side(folder, name, firmware, *more)
    try:
        made.connect()
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        made._socket.close()


@pytest.mark.soak
def test_an_emulated_guest_loses_no_write(tmp_path: Path) -> None:
    """Memory that is sent while it is written: each of 64 pages has its last number at the target."""
    firmware = assemble(COUNTS, tmp_path, "counts")
    with (
        side(tmp_path, "source", firmware) as source,
        side(tmp_path, "target", firmware, "-incoming", "defer") as target,
    ):
        eventually("the guest to count", lambda: "." in source.says())
        there = f"unix:{tmp_path}/move"
        target.ask("migrate-incoming", uri=there)
        source.ask("migrate-set-parameters", **{"max-bandwidth": BANDWIDTH, "downtime-limit": SHORT_MS})
        source.ask("migrate", uri=there)
        begun = time.monotonic()

        def sent() -> bool:
            told = source.ask("query-migrate")
            if told["status"] == "active" and told["ram"]["dirty-sync-count"] > 8 and time.monotonic() - begun > 1:
                source.ask("migrate-set-parameters", **{"downtime-limit": LONG_MS})
            return bool(told["status"] == "completed")

        eventually("the guest to be sent", sent)
        eventually("the guest to go on", target.says)
        assert "X" not in target.says(), "a write is lost"
