"""The guest of the chaos tests: a program of 4 KiB that writes records to the disk that it booted from.

No Linux: it would take 3 s and 96 MiB for each start on an emulated processor, cache what it reads, and a process of
busybox for each sector. The firmware's disk calls have no cache and no queue, a start takes a tenth of a second and
16 MiB, and nothing but the two programs of binutils is needed to make it (`writer.S`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvmsupervisor.domain.spec import RbdDisk
from tests.chaos import records
from tests.support.ceph import FEATURES, Ceph

SOURCE = Path(__file__).with_name("writer.S")

PROGRAM_SECTORS = 8
PAUSE_TICKS = 2
"""Between two records: nine a second."""

LOG_RECORDS = records.REGION // records.RECORD.size
"""Of one log: enough for a quarter of an hour. Then its writer takes another slot, too."""

_NAMES = {
    "PROGRAM_SECTORS": PROGRAM_SECTORS,
    "PAUSE_TICKS": PAUSE_TICKS,
    "SLOTS": records.SLOTS,
    "TABLE_SECTOR": records.TABLE_SECTOR,
    "REGION_SECTORS": records.REGION_SECTORS,
    "MAGIC": int.from_bytes(records.MAGIC, "little"),
    "RECORD_SIZE": records.RECORD.size,
    "RECORDS_PER_SECTOR": records.SECTOR // records.RECORD.size,
    "OWNER_SIZE": records.OWNER_SIZE,
    "OWNER_AT": records.OWNER_AT,
    "PREVIOUS_OWNER_AT": records.PREVIOUS_OWNER_AT,
    "SEQUENCE_AT": records.SEQUENCE_AT,
    "PREVIOUS_AT": records.PREVIOUS_AT,
    "UPTIME_AT": records.UPTIME_AT,
    "INDEX_AT": records.INDEX_AT,
}

_WRAPPER = """\
#!/bin/sh
# QEMU for the chaos tests: gives each guest the name of its incarnation. In `extra_flags` that option would count as a
# file of the host's, which no storage can fence. It stays one process, so pid, session, descriptors and privileges are
# those that the supervisor gave; asked for anything else (`-machine help`) it is QEMU.
exec {qemu} "$@" ${{KVMSUPERVISOR_INCARNATION:+-fw_cfg "name=opt/owner,string=$KVMSUPERVISOR_INCARNATION"}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosGuest:
    """A guest that is ready to be put onto disks.

    Attributes:
        image: the file of a disk of `records.IMAGE_SIZE`, with nothing on it but the program.
    """

    image: Path

    ram_mib = 16
    """All that it needs."""

    def options(self, owner: str) -> list[str]:
        """What QEMU needs besides the disk, its first one: the owner's name. `qemu_wrapper` gives it by itself."""
        return ["-fw_cfg", f"name=opt/owner,string={owner}"]

    def make_disk(self, ceph: Ceph, image: RbdDisk) -> None:
        """Make the image from which it boots. Each log is an object of its own, which is there once it is written."""
        features = [word for feature in FEATURES.split(",") for word in ("--image-feature", feature)]
        size = ("--object-size", f"{records.REGION}B")
        ceph.rbd("import", "--no-progress", *features, *size, str(self.image), image.name)


def build(folder: Path, *, log_records: int = LOG_RECORDS) -> ChaosGuest:
    """Make the guest in `folder`, in a tenth of a second.

    Args:
        folder: where it is made; whatever was made there before is replaced.
        log_records: how many records make a log full, whole sectors of them.
    """
    numbers = {**_NAMES, "LOG_RECORDS": log_records}
    names = "".join(f".equ {name}, {value}\n" for name, value in numbers.items())
    assembled, program, image = folder / "writer.o", folder / "writer.bin", folder / "writer.img"
    _run("as", "--32", "-o", str(assembled), "-", text=names + SOURCE.read_text())
    _run(
        "ld", "-m", "elf_i386", "-Ttext=0x7c00", "-e", "0x7c00", "--oformat=binary", "-o", str(program), str(assembled)
    )
    content = program.read_bytes()
    assert len(content) == PROGRAM_SECTORS * records.SECTOR, len(content)
    with image.open("wb") as file:
        file.write(content)
        file.truncate(records.IMAGE_SIZE)
    return ChaosGuest(image=image)


_FLOOD = """
.code16
.intel_syntax noprefix
    mov dx, 0x3f8
    mov al, 'x'
1:  out dx, al
    jmp 1b
    .org 510
    .word 0xaa55
"""


def build_flood(folder: Path) -> Path:
    """A disk from which a guest boots that writes to its serial port without end."""
    assembled, image = folder / "flood.o", folder / "flood.img"
    _run("as", "--32", "-o", str(assembled), "-", text=_FLOOD)
    _run("ld", "-m", "elf_i386", "-Ttext=0x7c00", "-e", "0x7c00", "--oformat=binary", "-o", str(image), str(assembled))
    # The firmware boots from no disk that is smaller than a cylinder.
    os.truncate(image, 1 << 20)
    return image


def _run(program: str, *args: str, text: str | None = None) -> None:
    assert shutil.which(program) is not None, f"{program} is missing: tools/install-system dev (binutils)"
    done = subprocess.run([program, *args], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def qemu_wrapper(folder: Path, qemu: str = "qemu-system-x86_64") -> Path:
    """Make the program that takes QEMU's place (`KVM_QEMU`); any user can run it if `folder` can be entered."""
    path = folder / "qemu"
    path.write_text(_WRAPPER.format(qemu=shlex.quote(shutil.which(qemu) or qemu)))
    path.chmod(0o755)
    return path
