"""The CD-ROM drive, with real QEMUs and a guest that has its driver: media come and go under it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.demo.guest import Guest, Modules, cpio
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.status import Phase
from tests.e2e.test_images import Shelf, add
from tests.support.cluster import Host, Hosts, Keys
from tests.support.guest import CACHE

MODULES = ("ata_piix", "sr_mod")
"""Of the old machine type `pc`: Debian's kernel for virtual machines has no driver for SATA."""

INIT = """#!/bin/sh
# Says which medium is in its drive, again and again; `hold` opens that, which locks the tray, and `free` closes it.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in /modules/cdrom/*; do insmod "$module"; done
until [ -b /dev/sr0 ]; do sleep 0.1; done
echo "HELLO from $tag"
while :; do
    if read -r -t 1 word; then
        case $word in
        hold) exec 4</dev/sr0 && echo "HOLDS it" ;;
        free) exec 4<&- && echo "FREES it" ;;
        esac
    fi
    now=$(dd if=/dev/sr0 bs=2048 skip=16 count=1 2>/dev/null | busybox head -c 6)
    [ "${now:-nothing}" = "$was" ] || echo "DRIVE ${now:-nothing}"
    was=${now:-nothing}
done
"""


@pytest.fixture(scope="session")
def reader(guest: Guest) -> Iterator[str]:
    """`extra_flags` of a guest that tells what is in its drive."""
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    try:
        folder.chmod(0o755)
        (package,) = sorted(CACHE.glob("linux-image-*-cloud-amd64_*.deb"))[-1:]
        subprocess.run(["dpkg", "-x", package, folder / "system"], check=True)
        modules = Modules(next((folder / "system").glob("**/lib/modules/*")))
        files = {
            f"modules/cdrom/{number:02}.ko": path.read_bytes() for number, path in enumerate(modules.take(MODULES))
        }
        both = guest.initramfs.read_bytes() + cpio({"cdrom-init": INIT.encode(), **files}, {})
        shutil.rmtree(folder / "system")
        (folder / "initramfs").write_bytes(both)
        (folder / "initramfs").chmod(0o644)
        *options, words = replace(guest, initramfs=folder / "initramfs").options(tag="guest")
        yield shlex.join([*options, f"{words} rdinit=/cdrom-init"])
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with three media that tell what they are."""
    folder = tmp_path / "disks"
    folder.mkdir()
    for name in ("first", "second", "third"):
        (folder / f"{name}.iso").write_bytes(bytes(16 * 2048) + name.encode().ljust(6) + bytes(100_000))
    return folder


@pytest.fixture
def host(hosts: Hosts, media: Path) -> Host:
    user: dict[str, Any] = {"KVM_QEMU_USER": "nobody"} if os.geteuid() == 0 else {}
    return hosts(KVM_DISK_DIR=str(media), **user).start()


def boot(keys: Keys, host: Host, reader: str, cdrom: str) -> int:
    """Start a machine with this drive; its QEMU's pid, once its guest has its driver."""
    keys.machines(host.name, "one", ram=128, machine="pc", extra_flags=reader, cdrom=cdrom)
    pid = host.wait_running("one")["one"].pid
    host.hears("one", "HELLO from guest")
    return pid


def open_media(pid: int) -> set[str]:
    """The media that a QEMU has open."""
    files = (path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink())
    return {file.name for file in files if ".iso" in file.name}


@pytest.mark.guest
def test_media_come_and_go_under_a_guest_that_runs(keys: Keys, host: Host, reader: str, media: Path) -> None:
    """§2, §5: a key changes the medium live; QEMU gets it open, and lets go of the last one; a successor goes on."""
    pid = boot(keys, host, reader, "file:first.iso")
    host.hears("one", "DRIVE first")
    assert not any(str(media) in word for word in host.qemu("one").argv)
    assert open_media(pid) == {"first.iso"}
    assert host.wait_for("one", Phase.RUNNING).cdrom == "file:first.iso"
    lock = keys.lock("one")
    assert lock is not None
    assert lock.storage is Storage.NONE, "a medium is only read: it pins nothing"

    keys.put("one", cdrom="file:second.iso")
    host.hears("one", "DRIVE second")
    host.wait_for("one", lambda s: s.cdrom == "file:second.iso" and s.pending == () and s.reason == "runs")
    assert open_media(pid) == {"second.iso"}

    host.kill9()
    keys.put("one", cdrom="file:third.iso")
    host.start()
    host.hears("one", "DRIVE third")
    host.wait_for("one", lambda s: s.cdrom == "file:third.iso" and s.reason == "runs")
    keys.delete("one", "cdrom")
    host.hears("one", "DRIVE nothing")
    host.wait_for("one", lambda s: s.cdrom == "empty" and s.pending == () and s.reason == "runs")
    assert open_media(pid) == set()
    keys.put("one", cdrom="file:first.iso")
    host.hears("one", "DRIVE first", times=2)
    assert host.wait_running("one")["one"].pid == pid


@pytest.mark.guest
def test_a_guest_that_uses_its_medium_is_asked_and_only_a_persons_word_forces_it(
    keys: Keys, host: Host, reader: str
) -> None:
    """§2: a locked tray holds a change up, the reason says so, and it follows once the guest lets go, or by `force`."""
    boot(keys, host, reader, "file:first.iso")
    host.hears("one", "DRIVE first")
    host.say("one", "hold")
    host.hears("one", "HOLDS it")
    keys.put("one", cdrom="file:second.iso")
    held = host.wait_for("one", lambda s: "locked the tray" in s.reason)
    assert held.pending == ("cdrom",)
    assert held.cdrom == "file:first.iso"
    assert "kvmsupervisor set one cdrom='file:second.iso force'" in held.reason
    assert "DRIVE second" not in host.console("one")
    host.say("one", "free")
    host.wait_for("one", lambda s: s.cdrom == "file:second.iso" and s.reason == "runs")
    host.hears("one", "DRIVE second")

    host.say("one", "hold")
    host.hears("one", "HOLDS it", times=2)
    keys.delete("one", "cdrom")
    host.wait_for("one", lambda s: "cdrom='empty force'" in s.reason)
    keys.put("one", cdrom="empty force")
    host.wait_for("one", lambda s: s.cdrom == "empty" and s.pending == () and s.reason == "runs")


def test_what_is_not_there_is_waited_for_without_harm(keys: Keys, host: Host, tiny: str, media: Path) -> None:
    """§2: a first start waits for its medium; a machine that has run starts without, and gets it once it is there."""
    late = {"cdrom": "file:late.iso", "extra_flags": tiny, "ram": 16}
    keys.machines(host.name, "one", **late)
    waits = host.wait_for("one", lambda s: s.phase is Phase.WAITING and "late.iso" in s.reason)
    assert waits.reason.startswith(f"cdrom: there is no file {media}/late.iso on this host")
    shutil.copy(media / "first.iso", media / "late.iso")
    pid = host.wait_running("one")["one"].pid
    assert open_media(pid) == {"late.iso"}
    keys.machines(host.name, "two", **late)
    assert open_media(host.wait_running("two")["two"].pid) == {"late.iso"}

    for name in ("../late.iso", "sub/late.iso", "late.qcow2", "late.iso extra"):
        keys.put("one", cdrom=f"file:{name}")
        status = host.wait_for("one", lambda s: any(p.startswith("cdrom: ") for p in s.problems))
        assert status.cdrom == "file:late.iso"
        keys.put("one", cdrom="file:late.iso")
        host.wait_for("one", lambda s: not s.problems)
    (media / "link.iso").symlink_to("/etc/passwd")
    keys.put("one", cdrom="file:link.iso")
    status = host.wait_for("one", lambda s: "symbolic link" in s.reason)
    assert status.cdrom == "file:late.iso"
    keys.put("one", cdrom="file:late.iso")
    host.wait_for("one", lambda s: s.reason == "runs")

    (media / "late.iso").unlink()
    host.wait_running("one")["one"].kill()
    status = host.wait_for(
        "one", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, pid} and s.reason != "runs"
    )
    assert (
        status.reason
        == f"runs; cdrom: there is no file {media}/late.iso on this host: put it there, or give cdrom another medium"
    )
    assert status.cdrom == "empty"
    shutil.copy(media / "first.iso", media / "late.iso")
    host.wait_for("one", lambda s: s.cdrom == "file:late.iso" and s.reason == "runs")
    assert open_media(host.qemu("one").pid) == {"late.iso"}


def test_a_machine_without_a_drive_gets_one_when_it_starts_again(keys: Keys, host: Host, tiny: str) -> None:
    """§2: a drive is pending, as it needs a restart."""
    keys.machines(host.name, "one", ram=16, extra_flags=tiny)
    host.wait_running("one")
    keys.put("one", cdrom="file:first.iso boot")
    status = host.wait_for("one", lambda s: s.pending == ("cdrom",))
    assert status.cdrom is None
    keys.put("one", restart_request="now:1")
    host.wait_for("one", lambda s: s.cdrom == "file:first.iso" and s.pending == () and s.phase is Phase.RUNNING)
    keys.put("one", cdrom="file:second.iso")
    status = host.wait_for("one", lambda s: s.cdrom == "file:second.iso")
    assert status.pending == ("cdrom",), "that it is the first to boot from takes another start"


def test_an_image_of_the_library(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """§2: a first start waits until its medium is fetched; the guest reads what the library keeps."""
    shelf = Shelf(tmp_path)
    host = hosts(**shelf.settings()).start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, cdrom="tools")
    waits = host.wait_for("one", lambda s: "there is no image tools" in s.reason)
    assert waits.phase is Phase.WAITING
    assert waits.reason.startswith("cdrom: ")
    add(keys, "tools", shelf.entry(bytes(100_000), "a.iso"))
    qemu = host.wait_running("one")["one"]
    (kept,) = shelf.images.iterdir()
    assert kept.name in {path.readlink().name for path in Path(f"/proc/{qemu.pid}/fd").iterdir() if path.is_symlink()}
    assert list(shelf.disks.iterdir()) == []
    keys.put("one", cdrom="others")
    status = host.wait_for("one", lambda s: "there is no image others" in s.reason)
    assert status.cdrom == "tools"
    add(keys, "others", shelf.entry(bytes(200_000), "b.iso"))
    host.wait_for("one", lambda s: s.cdrom == "others" and s.reason == "runs")
    assert host.wait_running("one")["one"] == qemu
