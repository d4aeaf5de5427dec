"""Local disks with real QEMUs and a guest that writes all the time: made, adopted, grown, filled, killed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.guest import writer_flags

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """An empty folder for disks."""
    folder = tmp_path / "disks"
    folder.mkdir()
    return folder


@pytest.fixture
def small(disks: Path) -> Iterator[Path]:
    """The same, on a file system of 64 MiB of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "disks", str(disks)], check=True, timeout=60)
    yield disks
    subprocess.run(["umount", "-l", str(disks)], check=True, timeout=60)


def written(host: Host, instance: str = "one") -> int:
    """How often the guest has said that it wrote."""
    return host.console(instance).count("WROTE ")


def writes(host: Host, instance: str = "one") -> None:
    """Wait until the guest has written again, twice."""
    before = written(host, instance)
    eventually(f"{instance} to write", lambda: written(host, instance) >= before + 2)


LEAKS = 3
"""Exit code of `qemu-img check` where nothing is wrong but clusters that are counted and not used."""


def check(image: Path, *, leaks: bool = False) -> None:
    """QEMU's own checker finds nothing; with `leaks` nothing worse than clusters that are lost to the image.

    QEMU counts a cluster before it points to it, so that a cut between the two costs room, and never data.
    """
    found = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(image)], capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode in ({0, LEAKS} if leaks else {0}), found.stdout + found.stderr


def make_file_system(image: Path) -> None:
    """A qcow2 image of 1 GiB with an empty ext4."""
    raw = image.with_suffix(".new")
    with raw.open("wb") as file:
        file.truncate(1 << 30)
    run("mkfs.ext4", "-q", "-F", raw)
    run("qemu-img", "convert", "-O", "qcow2", raw, image)
    raw.unlink()


def check_file_system(image: Path, scratch: Path) -> None:
    """The guest's file system, once its journal is replayed as the next boot does it, has no damage."""
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, scratch)
    run("e2fsck", "-E", "journal_only", "-p", scratch)
    run("e2fsck", "-f", "-n", scratch)


def run(*argv: str | Path) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def off(keys: Keys, host: Host, instance: str = "one") -> None:
    keys.put(instance, power="off-now")
    host.wait_for(instance, Phase.STOPPED)


@pytest.mark.guest
def test_a_disk_is_made_adopted_and_grown(keys: Keys, hosts: Hosts, writer: Guest, disks: Path) -> None:
    """Law 7, §5: it is made, QEMU's user has no right to it, another supervisor goes on with it, and it grows live."""
    user: dict[str, Any] = {"KVM_QEMU_USER": "nobody"} if os.geteuid() == 0 else {}
    host = hosts(KVM_DISK_DIR=str(disks), **user).start()
    flags = writer_flags(writer)
    keys.machines(host.name, "one", ram=128, extra_flags=flags, **{"disk/0": "file:a.qcow2 size=64M discard"})
    qemu = host.wait_running("one")["one"]
    writes(host)
    found = (disks / "a.qcow2").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), 0o600)
    lock = keys.lock("one")
    assert lock is not None
    assert lock.storage is Storage.UNFENCEABLE
    assert not any(str(disks) in word for word in qemu.argv)

    host.kill9()
    host.start()
    assert host.wait_running("one")["one"] == qemu
    writes(host)
    keys.put("one", **{"disk/0": "file:a.qcow2 size=96M discard"})
    host.hears("one", "has 96")
    status = host.wait_for("one", lambda s: s.reason == "runs")
    assert status.pending == ()
    keys.put("one", **{"disk/0": "file:a.qcow2 size=32M"})
    status = host.wait_for("one", lambda s: "size=32M" in s.reason)
    assert "less than the 96M" in status.reason
    assert host.wait_running("one")["one"] == qemu
    keys.put("one", **{"disk/0": "file:a.qcow2"})
    host.wait_for("one", lambda s: s.reason == "runs")
    off(keys, host)
    check(disks / "a.qcow2")
    keys.delete("one")
    host.wait_forgotten("one")
    assert (disks / "a.qcow2").exists()


def test_two_machines_and_one_file(keys: Keys, hosts: Hosts, tiny: str, disks: Path) -> None:
    """Never two writers: not of one supervisor, not of two that know nothing of each other, and no tool beside them."""
    host = hosts(KVM_DISK_DIR=str(disks)).start()
    disk = {"disk/0": "file:a.raw size=8M"}
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, **disk)
    qemu = host.wait_running("one")["one"]
    keys.machines(host.name, "two", ram=16, extra_flags=tiny, **{"disk/3": "file:a.raw ro"})
    waits = host.wait_for("two", lambda s: s.phase is Phase.WAITING and "one" in s.reason)
    assert "file:a.raw" in waits.reason
    keys.machines(host.name, "three", ram=16, extra_flags=tiny, **disk)
    waits = host.wait_for("three", lambda s: s.phase is Phase.WAITING and "one" in s.reason)
    assert "three" in host.wait_for("one", lambda s: "named by the keys" in s.reason).reason
    assert host.qemus() == [qemu]
    resize = ["qemu-img", "resize", "-f", "raw", str(disks / "a.raw"), "9M"]
    found = subprocess.run(resize, capture_output=True, text=True, check=False, timeout=60)
    assert "lock" in found.stderr

    other = Keys(keys.etcd, f"{keys.layout.prefix}other")
    stranger = hosts("beta", keys=other, KVM_DISK_DIR=str(disks)).start()
    other.machines(stranger.name, "four", ram=16, extra_flags=tiny, **disk)
    waits = stranger.wait_for("four", lambda s: "in use by another program" in s.reason)
    assert waits.phase is Phase.WAITING
    host.kill9()
    waits = stranger.wait_for("four", lambda s: s.phase is Phase.WAITING)
    qemu.kill()
    stranger.wait_running("four")
    host.start()
    waits = host.wait_for("one", lambda s: "in use by another program" in s.reason)
    assert waits.phase is Phase.WAITING


@needs_root
@pytest.mark.guest
def test_a_full_file_system(keys: Keys, hosts: Hosts, writer: Guest, small: Path) -> None:
    """The guest waits and has lost nothing; it goes on by itself when there is room, and with another supervisor."""
    host = hosts(KVM_DISK_DIR=str(small)).start()
    filler = small / "filler"
    filler.write_bytes(bytes(48 << 20))
    flags = writer_flags(writer)
    keys.machines(host.name, "one", ram=128, extra_flags=flags, **{"disk/0": "file:a.qcow2 size=40M"})
    qemu = host.wait_running("one")["one"]
    status = host.wait_for("one", lambda s: str(small) in s.reason)
    assert "is full" in status.reason
    assert "disk/0" in status.reason
    assert host.run_state(qemu) == "io-error"
    before = written(host)
    host.kill9()
    host.start()
    host.wait_for("one", lambda s: str(small) in s.reason)
    assert host.run_state(qemu) == "io-error"
    filler.unlink()
    host.wait_for("one", lambda s: s.reason == "runs")
    eventually("it to write again", lambda: written(host) >= before + 2)
    assert "FAILED" not in host.console("one")
    # What a person has stopped stays stopped, room or none.
    host.ask("one", "stop")
    host.wait_for("one", lambda s: "it is paused" in s.reason)
    assert host.wait_running("one")["one"] == qemu
    off(keys, host)
    check(small / "a.qcow2")


@pytest.mark.guest
@pytest.mark.parametrize(
    "rounds", [2, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])], ids=["few", "many"]
)
def test_qemu_is_killed_while_its_guest_writes(
    keys: Keys, hosts: Hosts, writer: Guest, disks: Path, rounds: int
) -> None:
    """Whenever that is, its image has no error, its file system no damage, and the guest starts and writes again."""
    host = hosts(KVM_DISK_DIR=str(disks)).start()
    make_file_system(disks / "a.qcow2")
    flags = writer_flags(writer, every_s=0, files=True)
    keys.machines(host.name, "one", ram=128, extra_flags=flags, **{"disk/0": "file:a.qcow2"})
    for _ in range(rounds):
        qemu = host.wait_running("one")["one"]
        writes(host)
        told = keys.put("one", restart="never")
        host.wait_for("one", lambda s, told=told: s.revision >= told)  # type: ignore[misc]
        qemu.kill()
        host.wait_for("one", Phase.STOPPED)
        check(disks / "a.qcow2", leaks=True)
        check_file_system(disks / "a.qcow2", disks.parent / "scratch")
        assert "FAILED" not in host.console("one")
        keys.put("one", restart="always", restart_request=str(qemu.pid))
    writes(host)


BAD = {
    "file:link.qcow2": "symbolic link",
    "file:twice.raw": "hard links",
    "file:pipe.raw": "no plain file",
    "file:backed.qcow2": "backing file",
    "file:text.qcow2": "no qcow2 image",
    "file:none.raw": "there is no file",
    "file:large.raw size=1M": "less than the 2M",
}


def test_files_that_are_refused(keys: Keys, hosts: Hosts, tiny: str, disks: Path) -> None:
    """Each with the key and the cause; no QEMU is started, and nothing is changed."""
    (disks / "text.qcow2").write_text("text")
    (disks / "link.qcow2").symlink_to("/etc/passwd")
    (disks / "twice.raw").write_bytes(bytes(1 << 20))
    (disks / "other").hardlink_to(disks / "twice.raw")
    (disks / "large.raw").write_bytes(bytes(2 << 20))
    os.mkfifo(disks / "pipe.raw")
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", str(disks / "backed.qcow2")]
    subprocess.run(make, check=True, timeout=60)
    host = hosts(KVM_DISK_DIR=str(disks)).start()
    names = {value: f"m{number}" for number, value in enumerate(BAD)}
    for value, one in names.items():
        keys.machines(host.name, one, ram=16, extra_flags=tiny, **{"disk/2": value})
    for value, one in names.items():
        reason = host.wait_for(one, lambda s: s.phase is Phase.WAITING and "disk/2" in s.reason).reason
        assert re.search(BAD[value], reason), (value, reason)
    assert host.qemus() == []


def test_a_header_in_a_raw_file_is_bytes(keys: Keys, hosts: Hosts, tiny: str, disks: Path) -> None:
    """What the name says holds: what a guest has written at the beginning of its disk leads nowhere."""
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", str(disks / "a.raw"), "64M"]
    subprocess.run(make, check=True, timeout=60)
    size = -(-(disks / "a.raw").stat().st_size // 512) * 512
    host = hosts(KVM_DISK_DIR=str(disks)).start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, **{"disk/0": "file:a.raw"})
    host.wait_running("one")
    (block,) = host.ask("one", "query-block")["return"]
    assert (block["inserted"]["drv"], block["inserted"]["image"]["virtual-size"]) == ("raw", size)
