"""What another user of the host can do with the files of a supervisor and of its QEMUs: nothing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsupervisor.adapters.console import Keyboard
from kvmsupervisor.domain.status import Phase
from tests.e2e.test_media import Shop, shop
from tests.support.cluster import Host, Hosts, Keys
from tests.support.etcd import free_port

__all__ = ["shop"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

STRANGER = 54_321
"""A user and a group that nobody has."""

WALK = (
    f"""
import fcntl, json, os, socket, stat, sys
os.setgroups([]), os.setgid({STRANGER}), os.setuid({STRANGER})
"""
    """
found = []
def attempt(what, path, act):
    try:
        act()
    except OSError:
        return
    found.append(f"{what} {path}")
def opened(path, flags):
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        attempt("lock", path, lambda: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB))
    finally:
        os.close(fd)
def made(folder):
    os.close(os.open(f"{folder}/stranger", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(f"{folder}/stranger")
def connected(path):
    with socket.socket(socket.AF_UNIX, kind) as one:
        one.connect(path)
seen = 0
for top in sys.argv[1:]:
    for folder, _, names in os.walk(top):
        attempt("make a file in", folder, lambda: made(folder))
        for name in names:
            path, seen = f"{folder}/{name}", seen + 1
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
                    attempt("connect to", path, lambda: connected(path))
            else:
                attempt("read", path, lambda: opened(path, os.O_RDONLY))
                attempt("write", path, lambda: opened(path, os.O_WRONLY))
print(json.dumps([seen, found]))
"""
)


def as_stranger(*folders: Path) -> tuple[int, list[str]]:
    """Walk there as a user who has no right to anything: how many files there are, and what can be done with them."""
    done = subprocess.run(
        # It becomes that user by itself: Python may lie where only root can start it.
        [sys.executable, "-I", "-c", WALK, *folders],
        capture_output=True,
        text=True,
        check=True,
    )
    seen, found = json.loads(done.stdout)
    return seen, found


def test_the_walk_finds_what_is_open() -> None:
    """The tests below can fail: each kind of thing that is open to others is found."""
    folder = Path("/tmp") / f"kvs-open-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "log").touch()
        (folder / "log").chmod(0o646)
        folder.chmod(0o757)
        assert as_stranger(folder) == (
            1,
            [
                f"make a file in {folder}",
                *(f"{what} {folder}/log" for what in ("lock", "read", "lock", "write")),
            ],
        )
    finally:
        shutil.rmtree(folder)


def with_umask(umask: int) -> Callable[..., list[str]]:
    return lambda *argv: ["/bin/sh", "-c", f'umask {umask:03o}; exec "$@"', "sh", *argv]


def files(host: Host) -> list[Path]:
    return [host.run_dir, Path(host.settings["KVM_STATE_DIR"])]


@pytest.fixture
def host(hosts: Hosts) -> Host:
    return hosts(KVM_QEMU_USER="nobody", KVM_UNFENCED="guard", KVM_SHUTDOWN_TIMEOUT="0")


def machine(host: Host) -> str:
    """`extra_flags` of one that needs no CPU time and no file that only root can read."""
    firmware = host.folder / "hlt.bin"
    firmware.write_bytes(b"\xf4" * 65536)
    return f"-bios {firmware}"


def begin(keys: Keys, host: Host, shop: Shop) -> None:
    """Machines that need every kind of file that there is without Ceph, and somebody who types."""
    shop.files["/a"], shop.files["/b"] = b"#cloud-config\n", b'{"ignition": {"version": "3.4.0"}}\n'
    shop.open()
    disk = host.folder / "disk"
    disk.write_bytes(bytes(65536))
    disk.chmod(0o666)
    flags = f"{machine(host)} -drive file={disk},format=raw,if=none,id=d9"
    spice = {"spice_port": free_port(), "spice_password": "secret-of-a"}
    keys.put("a", ram=16, extra_flags=flags, **spice, **{"cloud-config": shop.url("/a")}, host=host.name)
    keys.put("b", ram=64, firmware="uefi", **{"cloud-config": shop.url("/b")}, host=host.name)
    host.wait_running("a", "b")
    # Its firmware would look for something to boot all the time.
    host.ask("b", "stop")
    host.wait_for("a", lambda s: s.phase is Phase.RUNNING and s.guarded is True)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nothing_is_open_to_others(keys: Keys, host: Host, shop: Shop, umask: int) -> None:
    """Law: whatever the umask, no other user reads, writes, locks or connects to anything, and QEMU's user runs."""
    host.around = with_umask(umask)
    host.start()
    begin(keys, host, shop)
    keyboard = Keyboard(host.run_dir / "a", who="test", wake=lambda: None)
    assert keyboard.take()
    keyboard.want()
    names = {path.name for folder in files(host) for path in folder.rglob("*")}
    assert {"_supervisor.lock", "_guard.lock", "_guard.sock", "console.lock", "console.want", "nvram.fd"} <= names
    assert {"console.log", "qmp.sock", "incarnation.json", "media.json", "_session.json"} <= names
    seen, found = as_stranger(*files(host))
    keyboard.release()
    assert seen > 20
    assert found == []


def test_what_an_earlier_release_left_open_is_closed(keys: Keys, host: Host) -> None:
    """Law: when a supervisor starts it takes from others what they could do; no link leads it to another file."""
    host.start()
    keys.machines(host.name, "a", ram=16, extra_flags=machine(host))
    qemu = host.wait_running("a")
    host.kill9()
    folder = host.run_dir / "a"
    for name in ("console.lock", "console.log.1", "qemu.log.1"):
        (folder / name).touch()
    os.chown(folder / "console.log.1", STRANGER + 1, STRANGER + 1)
    for path in host.run_dir.rglob("*"):
        if not path.is_dir():
            path.chmod(0o666 if path.is_file() else 0o777)
    elsewhere = host.folder / "elsewhere"
    elsewhere.touch(mode=0o644)
    (folder / "link").symlink_to(elsewhere)
    assert as_stranger(host.run_dir)[1]
    host.start()
    assert host.wait_running("a") == qemu
    assert as_stranger(host.run_dir)[1] == []
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o644
