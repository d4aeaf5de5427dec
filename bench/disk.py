"""A guest's writes and reads on a local disk, beside the same guest under a plain QEMU with a disk of the same kind."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figure, Sample, Unit
from bench.rig import Rig
from kvmsupervisor.cli.demo.guest import Guest, build_guest, cpio
from kvmsupervisor.domain.names import CONSOLE_SOCKET

MIB, SMALL = 64, 2048
"""How much each round moves, in MiB and in blocks of 4 KiB: on a quiet machine less than a second's worth."""

DONE_S = 600.0
"""How long one round may take. Not a budget: a disk that others use, too, may need minutes for it."""

LEAST_RATIO = 0.95

WORKS = {
    "direct write": f"dd if=/dev/zero of=/dev/vda bs=1M count={MIB} oflag=direct",
    "direct read": f"dd if=/dev/vda of=/dev/null bs=1M count={MIB} iflag=direct",
    "buffered write and flush": f"dd if=/dev/zero of=/dev/vda bs=1M count={MIB} conv=fsync",
    "direct writes of 4 KiB": f"dd if=/dev/zero of=/dev/vda bs=4k count={SMALL} oflag=direct",
}
"""What the guest is told to do, a line each."""

INIT = """#!/bin/sh
# Runs each line that it is told, and says when it is done.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo
for module in /modules/first/* /modules/later/*; do insmod "$module"; done 2>/dev/null
until [ -b /dev/vda ]; do sleep 0.1; done
echo "READY"
while read -r line; do
    $line >/dev/null 2>&1 && echo "DONE" || echo "FAILED"
done
"""


def bytes_a_second(value: float) -> str:
    return f"{value / 1e6:.0f} MB/s"


SPEED: Unit = bytes_a_second


def measure(rig: Rig, *, rounds: int) -> Iterator[Figure]:
    """Both guests live the whole time and work in turn, so that both see the same machine.

    The files are on this checkout's file system: a tmpfs knows no O_DIRECT.
    """
    place = Path(__file__).resolve().parents[1] / ".cache" / "bench"
    place.mkdir(parents=True, exist_ok=True)
    folder = place / rig.folder.name
    folder.mkdir()
    try:
        guest = _guest(rig.folder)
        *options, words = guest.options()
        boot = [*options, f"{words} rdinit=/bench-init"]
        yield from _measure(rig, folder, boot, rounds)
    finally:
        shutil.rmtree(folder)


def _measure(rig: Rig, folder: Path, boot: list[str], rounds: int) -> Iterator[Figure]:
    host = rig.host()
    # In no cgroup of its own, as it would get another share of a busy processor than the plain one.
    host.start(KVM_DISK_DIR=str(folder), KVM_CGROUP="none")
    host.wait_ready()
    rig.keys.put(host.wish(["disk"], ram="256", extra_flags=shlex.join(boot), **{"disk/0": "file:ours.qcow2 size=1G"}))
    host.run_of("disk")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_Console(host.run_dir / "disk" / CONSOLE_SOCKET))
        plain = stack.enter_context(_plain(folder, boot))
        ours.hear("READY")
        plain.hear("READY")
        for name, work in WORKS.items():
            # Once before it counts: what is written first has to be allocated.
            pairs = [_pair(ours, plain, work, ours_first=bool(number % 2)) for number in range(rounds + 1)][1:]
            size = SMALL << 12 if "4 KiB" in name else MIB << 20
            measured = Sample.of(size / mine for mine, _ in pairs)
            ratios = Sample.of(its / mine for mine, its in pairs)
            rig.tell(f"{name}: {ratios.median:.2f}")
            yield Figure(
                what=f"local disk, {name}",
                measured=measured,
                unit=SPEED,
                reference=Sample.of(size / its for _, its in pairs),
                reference_is="plain QEMU, cache=writeback",
                budget=f"≥ {LEAST_RATIO} ×",
                met=ratios.median >= LEAST_RATIO,
                notes=(f"median of the ratios of {rounds} pairs: {ratios.median:.2f}",),
            )
    host.clear()


def _pair(ours: _Console, plain: _Console, work: str, *, ours_first: bool) -> tuple[float, float]:
    """The seconds of both. Each is as often the one behind whose writes the disk has to catch up."""
    if ours_first:
        return ours.run(work), plain.run(work)
    its = plain.run(work)
    return ours.run(work), its


def _guest(folder: Path) -> Guest:
    """The tests' guest, with an init that does what it is told, where any user can read it."""
    built = build_guest(Path(__file__).resolve().parents[1] / ".cache" / "guest")
    folder.chmod(0o755)
    (folder / "initramfs").write_bytes(built.initramfs.read_bytes() + cpio({"bench-init": INIT.encode()}, {}))
    shutil.copy(built.kernel, folder / "vmlinuz")
    return Guest.at(folder)


@dataclass
class _Console:
    """The serial console of a guest.

    Attributes:
        path: of its socket.
    """

    path: Path

    def __enter__(self) -> _Console:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DONE_S)
        self._socket.connect(str(self.path))
        self._heard = b""
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def hear(self, word: str) -> None:
        """Wait until the guest has said it."""
        while word.encode() not in self._heard:
            data = self._socket.recv(4096)
            assert data, f"its console was closed before {word}"
            self._heard += data
            assert b"FAILED" not in self._heard, "the guest cannot do it"
        self._heard = b""

    def run(self, work: str) -> float:
        """Have the guest do something; return the seconds."""
        begun = time.monotonic()
        self._socket.sendall(f"{work}\n".encode())
        self.hear("DONE")
        return time.monotonic() - begun


@contextlib.contextmanager
def _plain(folder: Path, boot: list[str]) -> Iterator[_Console]:
    """The same guest as people start one by hand."""
    disk, path = folder / "plain.qcow2", folder / "console"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1G"], check=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-cpu", "max"),
                *("-m", "256", "-drive", f"file={disk},format=qcow2,if=none,id=d,cache=writeback"),
                *("-device", "virtio-blk-pci,drive=d", "-device", "virtio-rng-pci"),
                *("-chardev", f"socket,id=c,fd={listener.fileno()},server=on,wait=off", "-serial", "chardev:c", *boot),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            # As ours: the kernel's scheduler shares out a busy processor by sessions (sched(7), autogroup).
            start_new_session=True,
        )
    try:
        with _Console(path) as console:
            yield console
    finally:
        process.kill()
        process.wait()
