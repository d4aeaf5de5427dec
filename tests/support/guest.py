"""The guest that tests boot, as a fixture.

Guests always run under TCG here: on some development machines `/dev/kvm` opens, but they hang in the BIOS.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvmsupervisor.cli.demo.guest import Guest, build_guest, cpio

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "guest"


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """The guest, built once for this and all later runs below `.cache/guest` of the checkout.

    It is a copy where any user can read it, as a QEMU of another user has to: the checkout may be in root's home.
    """
    built = build_guest(CACHE)
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    try:
        folder.chmod(0o755)
        for file in (built.kernel, built.initramfs):
            shutil.copy(file, folder)
            (folder / file.name).chmod(0o644)
        yield Guest.at(folder)
    finally:
        shutil.rmtree(folder)


HEART_INIT = """#!/bin/sh
# Nothing but a heartbeat, by builtins of the shell alone: a process for each costs an emulated processor 40 ms.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec </dev/ttyS0 >/dev/ttyS0 2>&1
busybox mkfifo /never
exec 3<>/never
echo "HELLO from $tag"
n=0
while :; do
    n=$((n + 1))
    read -r uptime idle </proc/uptime
    echo "HB $n $uptime"
    read -r -t "$hb" nothing <&3
done
"""


@pytest.fixture(scope="session")
def heart(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """The guest with an init that does nothing but beat, for many of them on few processors.

    It has neither a power button nor ears. `heart_flags` boots it.
    """
    folder = tmp_path_factory.mktemp("heart")
    folder.chmod(0o755)
    both = folder / "initramfs"
    # The kernel unpacks one archive after the other.
    both.write_bytes(guest.initramfs.read_bytes() + cpio({"heart-init": HEART_INIT.encode()}, {}))
    shutil.copy(guest.kernel, folder / "vmlinuz")
    return Guest.at(folder)


def heart_flags(heart: Guest, *, tag: str, heartbeat_s: float) -> str:
    """The text of an `extra_flags` key that boots it."""
    *options, words = heart.options(tag=tag, heartbeat_s=heartbeat_s)
    return shlex.join([*options, f"{words} rdinit=/heart-init"])


AGENT_INIT = """#!/bin/sh
# Starts QEMU's agent once its channel is there, beside the guest's own init.
mount -t devtmpfs dev /dev # the shell wants /dev/null for what runs in the background
{
    until name=$(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name); do sleep 0.2; done 2>/dev/null
    until busybox ip address add 192.0.2.7/24 dev eth0; do sleep 0.2; done 2>/dev/null
    busybox hostname inside
    port=${name%/name}
    qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t / -f /qemu-ga.pid >/dev/null 2>&1
} &
exec /init
"""


MOUNT = """
{
    until [ -b /dev/vda ]; do sleep 0.2; done
    mkdir -p /disk
    mount -t ext4 /dev/vda /disk && echo "MOUNTED" >/dev/ttyS0
    while echo "$((n += 1))" >/disk/count; do sleep 0.1; done
} &
exec /init"""
"""In place of the last line of `AGENT_INIT`: a disk with a file system is mounted, and written to without end."""


@pytest.fixture(scope="session")
def agent_options(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """QEMU options that boot the guest with QEMU's own agent in it, and a NIC that has the address 192.0.2.7.

    It mounts its first disk where that has an ext4 file system, and writes there.
    """
    program = shutil.which("qemu-ga")
    assert program is not None, "qemu-ga is missing: tools/install-system dev"
    needs = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=60).stdout
    files = {
        "agent-init": AGENT_INIT.replace("\nexec /init", MOUNT).encode(),
        "bin/qemu-ga": Path(program).read_bytes(),
        "etc/os-release": b'ID=small\nPRETTY_NAME="Small Linux 1.0"\n',
    }
    for library in re.findall(r"(/\S+) \(0x", needs):
        files[library.lstrip("/")] = Path(library).read_bytes()
    both = tmp_path_factory.mktemp("agent-guest") / "initramfs"
    # The kernel unpacks one archive after the other.
    both.write_bytes(guest.initramfs.read_bytes() + cpio(files, {}))
    *options, words = replace(guest, initramfs=both).options(tag="inside")
    return [*options, f"{words} rdinit=/agent-init", "-device", "virtio-net-pci,mac=52:54:00:00:00:07"]


WRITER_INIT = """#!/bin/sh
# Writes a MiB after the other to its first disk, each of them flushed, round and round, and says so.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in /modules/first/* /modules/later/*; do insmod "$module"; done 2>/dev/null
until [ -b /dev/vda ]; do sleep 0.1; done
# Another place after each boot, so that there is something to allocate.
read -r boot </proc/sys/kernel/random/boot_id
start=$((0x${boot%%-*}))
echo "HELLO from $tag"
n=0
while :; do
    read -r sectors </sys/block/vda/size
    n=$((n + 1))
    at=$(((start + n) % (sectors / 2048)))
    dd if=/bin/busybox of=/dev/vda bs=1M count=1 seek=$at conv=fsync 2>/dev/null || echo "FAILED $n"
    echo "WROTE $n, has $((sectors / 2048))"
    sleep "$hb"
done
"""


FILES_INIT = """#!/bin/sh
# Mounts its first disk (ext4), and writes, renames and removes files there without end; each is flushed, and told of.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in /modules/first/* /modules/later/*; do insmod "$module"; done 2>/dev/null
until [ -b /dev/vda ]; do sleep 0.1; done
mkdir -p /disk
mount -t ext4 -o errors=panic /dev/vda /disk || echo "FAILED to mount"
# Other files after each boot, so that there is something to allocate.
read -r boot </proc/sys/kernel/random/boot_id
start=$((0x${boot%%-*}))
echo "HELLO from $tag"
n=0
while :; do
    n=$((n + 1))
    at=$(((start + n) % 400))
    dd if=/bin/busybox of=/disk/new bs=1M count=1 conv=fsync 2>/dev/null || echo "FAILED $n"
    mv /disk/new "/disk/$at"
    rm -f "/disk/$(((at + 200) % 400))"
    echo "WROTE $n"
    sleep "$hb"
done
"""


@pytest.fixture(scope="session")
def writer(guest: Guest) -> Iterator[Guest]:
    """The guest with an init that writes to its first disk all the time; `writer_flags` boots it.

    `writer_flags` with `files` lets it write to files there instead.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    try:
        folder.chmod(0o755)
        both = guest.initramfs.read_bytes() + cpio(
            {"writer-init": WRITER_INIT.encode(), "files-init": FILES_INIT.encode()}, {}
        )
        (folder / guest.initramfs.name).write_bytes(both)
        (folder / guest.initramfs.name).chmod(0o644)
        shutil.copy(guest.kernel, folder)
        yield Guest.at(folder)
    finally:
        shutil.rmtree(folder)


def writer_flags(writer: Guest, *, tag: str = "guest", every_s: float = 0.2, files: bool = False) -> str:
    """The text of an `extra_flags` key that boots it."""
    *options, words = writer.options(tag=tag, heartbeat_s=every_s)
    return shlex.join([*options, f"{words} rdinit=/{'files' if files else 'writer'}-init"])
