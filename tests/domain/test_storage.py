"""What a machine may write to: anything not known to be harmless cannot be fenced."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.spec import Disk, Firmware, RbdDisk, Spec
from kvmsupervisor.domain.storage import had_open, images_of, nvram_of, storage_of

RBD = RbdDisk(pool="rbd", image="vm1")
READ_ONLY = RbdDisk(pool="rbd", image="vm2", ro=True)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "-no-reboot",
        "--no-reboot -S",
        "-kernel /boot/vmlinuz -initrd /boot/initrd -append 'console=ttyS0 root=/dev/vda'",
        "-cdrom /iso/debian.iso -boot d",
        "-cdrom https://example.org/debian.iso",
        "-netdev user,id=n1,hostfwd=tcp::2222-:22 -device e1000,netdev=n1",
        "-nic tap,ifname=tap0,script=no,downscript=no",
        "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r",
        "-display none -vga std -serial null -monitor none",
    ],
)
def test_harmless_flags(flags: str) -> None:
    """Law: options that open nothing for writing leave a diskless machine without storage, and RBD fenceable."""
    words = tuple(shlex.split(flags))
    assert storage_of(Spec(ram_mib=64, extra_flags=words)) is Storage.NONE
    assert storage_of(Spec(ram_mib=64, rbd=RBD, extra_flags=words)) is Storage.RBD


@pytest.mark.parametrize(
    "flags",
    [
        "disk.img",
        "''",
        "-",
        "--",
        "-hda disk.img",
        "-drive file=x,if=virtio",
        "-blockdev driver=file,filename=x,node-name=n",
        "-virtfs local,path=/srv,mount_tag=t,security_model=none",
        "-fsdev local,id=f,path=/srv",
        "-pflash vars.fd",
        "-device vfio-pci,host=01:00.0",
        "-device usb-host,vendorid=1",
        "-device usb-mtp,rootdir=/srv",
        "-device e1000,driver=vfio-pci,host=01:00.0",
        '-device {"driver":"e1000"}',
        "-device driver=e1000",
        "-object memory-backend-file,id=m,mem-path=/x,size=1M,share=on",
        "-object iothread,id=x,qom-type=memory-backend-file",
        "-nic user,smb=/srv",
        "-netdev tap,id=n,script=/x",
        "-netdev user,id=n,guestfwd=tcp:10.0.2.1:1-cmd:sh",
        "-netdev user,type=vde",
        "-serial file:/srv/log",
        "-monitor unix:/x,server",
        "-qmp unix:/x,server",
        "-cdrom fat:rw:/srv",
        "-cdrom json:{}",
        "-set drive.disk0.file=/x",
        "-global x.y=z",
        "-readconfig /x",
        "-mem-path /x",
        "-no-such-option",
        "-m",
        "-no-reboot disk.img",
        "-m 64 disk.img",
    ],
)
def test_anything_else_cannot_be_fenced(flags: str) -> None:
    """Law 7: what may write, what is unknown and what is incomplete count as storage that cannot be fenced."""
    words = tuple(shlex.split(flags, posix=True)) if "{" not in flags else tuple(flags.split(" "))
    assert storage_of(Spec(ram_mib=64, extra_flags=words)) is Storage.UNFENCEABLE
    assert storage_of(Spec(ram_mib=64, rbd=RBD, extra_flags=words)) is Storage.UNFENCEABLE


def test_the_images_of_a_machine() -> None:
    """Law 3: those that it has open for writing, whose watchers are its clients; its UEFI variables are one of them."""
    other, shared = RbdDisk("p", "data"), RbdDisk("p", "tools", ro=True)
    spec = Spec(ram_mib=64, rbd=RBD, disks=(Disk(1, shared), Disk(3, other)))
    assert images_of(spec) == (RBD, other)
    assert images_of(replace(spec, firmware=Firmware.UEFI)) == (RBD, other, RbdDisk("rbd", "vm1.nvram"))
    assert images_of(Spec(ram_mib=64)) == ()


def test_where_uefi_variables_are() -> None:
    """Law: beside the first disk when that is in Ceph and the machine's own; otherwise on its host."""
    assert nvram_of(Spec(ram_mib=64, rbd=RBD)) is None
    assert nvram_of(Spec(ram_mib=64, firmware=Firmware.UEFI)) is None
    assert nvram_of(Spec(ram_mib=64, firmware=Firmware.UEFI, rbd=replace(RBD, ro=True))) is None
    assert nvram_of(Spec(ram_mib=64, firmware=Firmware.UEFI, rbd=RBD)) == RbdDisk("rbd", "vm1.nvram")


def test_any_disk_that_can_be_written_counts() -> None:
    """Law: one disk that is not read only makes its machine one to be fenced; read-only ones protect nothing."""
    assert storage_of(Spec(ram_mib=64, rbd=READ_ONLY, disks=(Disk(3, READ_ONLY),))) is Storage.NONE
    assert storage_of(Spec(ram_mib=64, rbd=READ_ONLY, disks=(Disk(3, RBD),))) is Storage.RBD
    assert storage_of(Spec(ram_mib=64, disks=(Disk(1, RBD), Disk(2, READ_ONLY)))) is Storage.RBD
    assert storage_of(Spec(ram_mib=64, disks=(Disk(1, READ_ONLY),), extra_flags=("-hda", "x"))) is Storage.UNFENCEABLE


def test_media_and_variables_of_a_host_pin_nothing() -> None:
    """Law: boot media are only read, and UEFI variables in a file are one host's own: neither needs a fence."""
    spec = Spec(ram_mib=64, firmware=Firmware.UEFI, cloud_config="http://h/x")
    assert storage_of(spec) is Storage.NONE


def test_images_have_their_namespace_in_their_name() -> None:
    """Law: one name stands for one image, in keys, in locks and for Ceph's tools; those of a lock are read back."""
    image = RbdDisk("rbd", "disk", namespace="web")
    assert RbdDisk.named(image.name) == image
    assert RbdDisk.named("rbd/disk") == RbdDisk("rbd", "disk")
    assert (image.name, image.place, image.beside("x").name) == ("rbd/web/disk", "rbd/web", "rbd/web/x")
    lock = Lock(
        host=HostName("a"), boot_id="b", epoch=1, state=LockState.RUNNING, incarnation="i",
        images=("rbd/web/disk", "rbd/disk", "odd"),
    )  # fmt: skip
    assert had_open(lock, [image]) == (RbdDisk("rbd", "disk"),)
    assert had_open(lock, [RbdDisk("rbd", "disk")]) == (image,)
