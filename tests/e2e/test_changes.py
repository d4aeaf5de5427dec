"""A guest that is changed while it runs, with real QEMUs, Ceph and a bridge; it says itself what it has."""

from __future__ import annotations

import os
import re
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
from tests.support.ceph import Ceph
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.guest import CACHE
from tests.support.net import Lan

INIT = """#!/bin/sh
# Says what its machine has, whenever that differs, and writes to a disk that it is told.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in /modules/first/* /modules/later/* /modules/memory/*; do insmod "$module"; done 2>/dev/null
echo online >/sys/devices/system/memory/auto_online_blocks
echo "HELLO from $tag"
while :; do
    for cpu in /sys/devices/system/cpu/cpu*/online; do
        read -r on <$cpu && [ "$on" = 0 ] && echo 1 >$cpu
    done 2>/dev/null
    now=""
    for disk in /sys/block/vd*; do
        [ -e $disk ] || continue
        at=$(busybox readlink -f $disk/device/..)
        now="$now ${at##*/}=$(busybox cat $disk/size)"
    done
    for nic in /sys/class/net/e*; do
        [ -e $nic ] || continue
        ifconfig ${nic##*/} up
        at=$(busybox readlink -f $nic/device/..)
        now="$now ${at##*/}=$(busybox cat $nic/address),$(busybox cat $nic/carrier)"
    done 2>/dev/null
    read -r cpus </sys/devices/system/cpu/online
    read -r name memory unit </proc/meminfo
    [ "$now" = "$was" ] && [ "$cpus $memory" = "$had" ] || echo "HAS$now cpus=$cpus mem=$((memory / 1024)) ."
    was=$now had="$cpus $memory"
    if read -r -t 1 word; then
        dd if=/bin/busybox of=/dev/$word bs=64k count=4 conv=fsync 2>/dev/null && echo "WROTE to $word"
    fi
done
"""


@pytest.fixture(scope="session")
def teller(guest: Guest) -> Iterator[str]:
    """`extra_flags` of a guest that tells what it has."""
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    try:
        folder.chmod(0o755)
        (package,) = sorted(CACHE.glob("linux-image-*-cloud-amd64_*.deb"))[-1:]
        subprocess.run(["dpkg", "-x", package, folder / "system"], check=True)
        modules = Modules(next((folder / "system").glob("**/lib/modules/*")))
        files = {f"modules/memory/{n:02}.ko": path.read_bytes() for n, path in enumerate(modules.take(["virtio_mem"]))}
        both = guest.initramfs.read_bytes() + cpio({"tell-init": INIT.encode(), **files}, {})
        shutil.rmtree(folder / "system")
        (folder / "initramfs").write_bytes(both)
        (folder / "initramfs").chmod(0o644)
        *options, words = replace(guest, initramfs=folder / "initramfs").options(tag="guest")
        yield shlex.join([*options, f"{words} rdinit=/tell-init"])
    finally:
        shutil.rmtree(folder)


def has(host: Host, instance: str = "1") -> str:
    """What the guest said last."""
    said: list[str] = re.findall(r"HAS(.*) \.", host.console(instance))
    return said[-1] if said else ""


def memory(host: Host) -> int:
    found = re.search(r"mem=(\d+)", has(host))
    return 0 if found is None else int(found[1])


def settled(host: Host) -> None:
    host.wait_for("1", lambda s: s.pending == () and s.reason == "runs")


@pytest.mark.guest
@pytest.mark.skipif(os.geteuid() != 0, reason="the supervisor of a guest on a bridge runs as root")
def test_disks_nics_memory_and_processors(keys: Keys, lan: Lan, hosts: Hosts, teller: str, tmp_path: Path) -> None:
    """§5: each comes and goes under a guest that runs on, confined; supervisors come and go; a restart has the same."""
    settings: dict[str, Any] = {"KVM_DISK_DIR": str(tmp_path / "disks"), "KVM_QEMU_USER": "nobody"}
    (tmp_path / "disks").mkdir()
    host = hosts(**settings)
    host.around = lan.around
    host.start()
    wishes = {"mac": "52:54:00:91:07:01", "bridge": lan.bridge, "ram_max": "512M", "cpus_max": 2}
    keys.machines(host.name, "1", ram=160, extra_flags=teller, **wishes)
    pid = host.wait_running("1")["1"].pid
    eventually("what it has", lambda: "0000:00:10.0=52:54:00:91:07:01,1" in has(host))
    before = memory(host)

    keys.put("1", **{"disk/2": "file:data.raw size=4M iops=50", "cpus": 2, "ram": 256})
    keys.put("1", **{"nic/3/mac": "52:54:00:91:07:02", "nic/3/bridge": lan.bridge})
    eventually("both", lambda: "0000:01:0a.0=8192" in has(host) and "0000:01:03.0=52:54:00:91:07:02,1" in has(host))
    eventually("more of all", lambda: "cpus=0-1" in has(host) and memory(host) == before + 96)
    settled(host)
    host.say("1", "vda")
    host.hears("1", "WROTE to vda")
    assert (tmp_path / "disks" / "data.raw").read_bytes()[:4] == b"\x7fELF"
    lock = keys.lock("1")
    assert lock is not None
    assert lock.storage is Storage.UNFENCEABLE

    host.kill9()
    keys.put("1", **{"nic/3/link": "down", "disk/2": "file:data.raw size=4M", "ram": 192})
    host.start()
    eventually("its link down", lambda: "0000:01:03.0=52:54:00:91:07:02,0" in has(host))
    eventually("less memory", lambda: memory(host) == before + 32)
    settled(host)
    keys.delete("1", "disk/2")
    eventually("no disk", lambda: "=8192" not in has(host))
    settled(host)
    lock = keys.lock("1")
    assert lock is not None
    assert lock.storage is Storage.NONE
    assert host.wait_running("1")["1"].pid == pid

    keys.put("1", restart_request="now: try it")
    host.wait_for("1", lambda s: s.phase is Phase.RUNNING and s.pid != pid)
    host.hears("1", "HELLO from guest", times=2)
    eventually("the same", lambda: "0000:01:03.0=52:54:00:91:07:02,0 cpus=0-1" in has(host))
    assert abs(memory(host) - before - 32) < 8


@pytest.mark.guest
def test_a_changed_machine_is_on_record_and_moves(keys: Keys, hosts: Hosts, ceph: Ceph, teller: str) -> None:
    """Laws 3, 13: a disk's client is in the lock before the guest has it; there and here it is the same machine."""
    more: dict[str, Any] = {"CEPH_CONF": str(ceph.conf), "KVM_MIGRATION_LISTEN": "127.0.0.1:0"}
    alpha, beta = (hosts(name, **more).start() for name in ("alpha", "beta"))
    ceph.rbd_create("rbd/vm")
    keys.machines("alpha", "1", ram=160, extra_flags=teller, rbd="rbd/vm", ram_max="512M", cpus_max=2)
    alpha.wait_running("1")
    alpha.hears("1", "HELLO from guest")
    keys.put("1", **{"disk/1": "rbd/data size=4M", "cpus": 2, "ram": 256})
    eventually("a disk", lambda: "0000:01:09.0=8192" in has(alpha) and "cpus=0-1" in has(alpha))
    settled(alpha)
    lock = keys.lock("1")
    assert lock is not None
    assert {*lock.clients} == ceph.watchers("rbd/vm") | ceph.watchers("rbd/data")
    assert lock.images == ("rbd/vm", "rbd/data")
    moved = alpha.cli("move", "1", "beta", "--wait")
    assert moved.returncode == 0, moved.stderr
    assert len(alpha.events("move.given")) == 1
    beta.wait_running("1")
    beta.say("1", "vdb")
    beta.hears("1", "WROTE to vdb")
    keys.delete("1", "disk/1")
    beta.hears("1", "HAS 0000:00:11.0=16384 cpus=0-1")
    settled(beta)
    lock = keys.lock("1")
    assert lock is not None
    assert {*lock.clients} == ceph.watchers("rbd/vm")
    assert ceph.watchers("rbd/data") == set()
    keys.put("1", ram=320, **{"disk/3": "rbd/data"})
    beta.hears("1", "0000:01:0b.0=8192 cpus=0-1")
    settled(beta)
    assert "HELLO" not in beta.console("1")


def test_a_guest_that_does_nothing(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """§5: what needs a guest's part is told and pending; a reset is a guest's word for all that it was asked for."""
    (tmp_path / "disks").mkdir()
    host = hosts(KVM_DISK_DIR=str(tmp_path / "disks")).start()
    keys.machines(host.name, "1", ram=16, ram_max=64, extra_flags=tiny)
    pid = host.wait_running("1")["1"].pid
    keys.put("1", **{"disk/1": "file:a.raw size=1M", "disk/2": "file:b.qcow2 size=1M iops=10"})
    host.wait_for("1", lambda s: s.pending == () and len(s.files or {}) == 2)
    keys.delete("1", "disk/1")
    keys.put("1", ram=32)
    told = host.wait_for("1", lambda s: "let go of disk1" in s.reason and "has 16 of 32 MiB" in s.reason)
    assert set(told.pending) == set(told.changing) == {"disk/1", "ram"}
    asked = subprocess.run(["flock", "-n", str(tmp_path / "disks" / "a.raw"), "true"], check=False)
    assert asked.returncode == 1, "QEMU still has it"
    keys.put("1", restart_request="reset: let go")
    host.wait_for("1", lambda s: s.pending == ("ram",) and s.files == {"file:b.qcow2": host.name})
    subprocess.run(["flock", "-n", str(tmp_path / "disks" / "a.raw"), "true"], check=True)
    assert host.wait_running("1")["1"].pid == pid
