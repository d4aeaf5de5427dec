"""docs/migrating.md, its commands as they stand there, on a real etcd that serves v2 and v3."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.ceph import POOL, Ceph
from tests.support.cluster import ROOT, Host, Hosts, Keys, eventually
from tests.support.etcd import EtcdServer

PAGE = ROOT / "docs" / "migrating.md"
OLD_UNIT = """
etcdctl --endpoints "$OLD" mk /kvm/1/host alpha
trap 'kill $!; wait $!; etcdctl --endpoints "$OLD" rm /kvm/1/host' TERM
qemu-system-x86_64 -accel tcg -m 16 -display none -nodefaults -bios "$BIOS" -vga qxl \
    -drive "file=rbd:rbd/1:conf=$CEPH_CONF,format=raw,if=virtio,cache=writeback" &
wait $!
"""
"""What one unit per guest did: the mutex made in v2, QEMU on the image, at the stop a signal, the mutex deleted."""


def old(etcd: EtcdServer, *args: str) -> str:
    """Run etcdctl as the old units did, API 2."""
    done = subprocess.run(
        ["etcdctl", "--endpoints", etcd.endpoint, *args],
        env={"PATH": os.environ["PATH"], "ETCDCTL_API": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_keys_get_from_v2_to_v3_and_the_guest_to_the_supervisor(tiny: str, tmp_path: Path) -> None:
    """Law: the page's loop copies every wish but `host`; nothing runs until `host` is set; then it does, once."""
    with EtcdServer(args=("--enable-v2",)) as etcd:
        flags = f"-bios {tiny.removeprefix('-bios ')}"
        wishes = {"ram": "16", "mac": "52:54:00:00:00:01", "rbd": "/rbd/one", "extra_flags": flags, "x-note": "a  b"}
        for name, value in wishes.items():
            old(etcd, "set", f"/kvm/1/{name}", "--", value)
        old(etcd, "set", "/kvm/1/host", "alpha")
        old(etcd, "set", "/kvm/2/ram", "32")
        (script,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
        subprocess.run(
            ["bash", "-euc", script],
            env={"PATH": os.environ["PATH"], "OLD": etcd.endpoint, "NEW": etcd.endpoint},
            check=True,
        )
        keys = Keys(etcd)
        for name, value in wishes.items():
            assert (keys.get(f"/kvm/1/{name}") or b"").decode().strip() == value
        assert keys.get("/kvm/2/ram") == b"32\n"
        assert keys.get("/kvm/1/host") is None

        # Disk and NIC are for hosts that have Ceph and a bridge.
        keys.delete("1", "mac", "rbd")
        keys.put("1", shutdown_timeout=0)
        hosts = Hosts(keys)
        try:
            host = hosts().start()
            assert not host.qemus()
            assert "not found" in old(etcd, "get", "/kvm/2/host")
            done = host.cli("set", "1", "host=alpha", "--wait")
            assert done.returncode == 0, done.stderr
            assert len(host.qemus()) == 1

            # And back.
            assert host.cli("stop", "1", "--wait").returncode == 0
            assert host.cli("set", "1", "--unset", "host").returncode == 0
            eventually("nothing to be left", lambda: not host.qemus() and keys.lock("1") is None)
        finally:
            hosts.close()


# --- one guest, command by command ----------------------------------------------------------------------------


def commands(section: str) -> list[tuple[str, list[str]]]:
    """The commands of one section for a person's own shell, each with the lines that the page says it prints."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            word = line.strip()
            if re.match(r"\w*\$ ", word):
                found.append((word.partition("$ ")[2], []))
            elif word:
                found[-1][1].append(word)
    return found


def run(command: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command of the page as a person's shell does."""
    argv = ["bash", "-c", command]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=90)


def said(command: str, environment: Mapping[str, str]) -> str:
    """What it prints, whatever it thinks of it."""
    done = run(command, environment)
    return done.stdout + done.stderr


@pytest.fixture
def old_image(ceph: Ceph) -> Iterator[None]:
    """Image 1, as it was made long ago."""
    ceph.rbd_create(f"{POOL}/1", features="layering")
    yield
    ceph.rbd("rm", f"{POOL}/1")


def test_one_guest_goes_over_by_the_commands_of_the_page(
    ceph: Ceph, old_image: None, tiny: str, tmp_path: Path
) -> None:
    """Law: while the old unit runs it nothing else does, and each command says so; then they say that it is gone.

    The image gets its missing feature, and the guest runs once, in the supervisor's hands.
    """
    program = tmp_path / "kvmsupervisor"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m kvmsupervisor "$@"\n')
    program.chmod(0o755)
    with EtcdServer(args=("--enable-v2",)) as etcd:
        keys = Keys(etcd)
        with Host(keys, CEPH_CONF=str(ceph.conf), KVM_QEMU_USER="", KVM_EXTRA_FLAGS="any") as host:
            host.start()
            bios = tiny.removeprefix("-bios ")
            more = {"OLD": etcd.endpoint, "NEW": etcd.endpoint, "BIOS": bios}
            shell = host.environment | more | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
            unit = subprocess.Popen(["bash", "-c", OLD_UNIT], env=shell | {"ETCDCTL_API": "2"})
            try:
                eventually("the old QEMU on the image", lambda: ceph.watchers(f"{POOL}/1"))
                keys.put("1", ram=16, rbd="/rbd/1", extra_flags=f"-bios {bios}", shutdown_timeout=0)
                steps = commands("2. Each guest")
                looks = [one for one in steps if "systemctl" not in one[0] and "kvmsupervisor" not in one[0]]
                assert [one[0].split()[-2:] for one in looks] == [["get", "/kvm/1/host"], ["status", "rbd/1"]]
                assert said(looks[0][0], shell).strip() == "alpha"
                assert "watcher=" in said(looks[1][0], shell)
                assert not host.qemus()
                # `systemctl disable --now`, by what it does.
                unit.terminate()
                assert unit.wait(60) != 0
            finally:
                unit.kill()
                unit.wait()
            for command, expected in looks:
                told = said(command, shell)
                for line in expected:
                    # The number behind it is the store's.
                    assert re.sub(r" \[\d+\]$", "", line) in told, told
            (feature,) = re.findall(r"`(rbd feature enable [^`]+)`", PAGE.read_text())
            assert said(feature, shell) == ""
            for command, _ in steps:
                if command.startswith("kvmsupervisor"):
                    done = subprocess.run(
                        ["bash", "-c", command], env=shell, capture_output=True, text=True, check=False
                    )
                    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            assert len(host.qemus()) == 1
            assert len(ceph.watchers(f"{POOL}/1")) == 1
            # And back, as the page has it.
            (back,) = re.findall(r"^## 3. Back\n(.*?)(?=^## )", PAGE.read_text(), re.MULTILINE | re.DOTALL)
            for command in re.findall(r"`(kvmsupervisor [^`]+)`", back):
                done = run(command, shell)
                assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            eventually("the lock to go", lambda: keys.lock("1") is None)
            assert not host.qemus()
            assert not ceph.watchers(f"{POOL}/1")
