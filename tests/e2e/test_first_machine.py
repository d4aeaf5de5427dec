"""A first machine as people make it: one command, no bridge, user data from a file, and a way in."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

import pytest

from kvmsupervisor.cli.demo.guest import Guest, cpio
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import free_port

USER_DATA = "#cloud-config\nhostname: first\n"

NET_INIT = """#!/bin/sh
# Answers at port 22 once the guest has its address.
mount -t devtmpfs dev /dev
{
    until busybox ifconfig eth0 2>/dev/null | busybox grep -q 'inet addr'; do sleep 0.2; done
    while :; do echo "HI from inside" | busybox nc -l -p 22; done
} >/dev/null 2>&1 &
exec /init
"""


@pytest.mark.guest
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start QEMU as another user")
def test_a_first_machine(keys: Keys, hosts: Hosts, guest: Guest, tmp_path: Path) -> None:
    """Law: `create --wait` ends with the way in, which leads there, QEMU confined; the port is its own."""
    host = hosts(KVM_QEMU_USER="nobody").start()
    initramfs = host.folder / "initramfs"
    initramfs.write_bytes(guest.initramfs.read_bytes() + cpio({"net-init": NET_INIT.encode()}, {}))
    *options, words = guest.options(tag="first", dhcp=True)
    options[options.index("-initrd") + 1] = str(initramfs)
    flags = shlex.join([*options, f"{words} rdinit=/net-init"])
    (tmp_path / "user-data").write_text(USER_DATA)
    port = free_port()
    wishes = [f"host={host.name}", "bridge=:user", f"forward=tcp:{port}:22", "mac=auto", "shutdown_timeout=5"]
    made = host.cli(
        "create", "first", "ram=96", *wishes, f"user-data=@{tmp_path}/user-data", f"extra_flags={flags}", "--wait"
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.rstrip().endswith(f"; on {host.name}: ssh -p {port} USER@127.0.0.1")
    assert "hostname: first" not in host.cli("show", "first").stdout

    host.hears("first", "DHCP 10.0.2.15")

    def answer() -> bytes:
        # QEMU takes the connection at once, and the guest answers once its server listens.
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            try:
                return connection.recv(100)
            except OSError:
                return b""

    assert eventually("an answer", answer) == b"HI from inside\n"
    host.say("first", "seed")
    host.hears("first", "SEED end")
    assert "SEED cidata user-data: hostname: first" in host.console("first")

    other = {"ram": 32, "mac": "52:54:00:00:00:02", "bridge": ":user", "forward": f"tcp:{port}:80"}
    keys.machines(host.name, "second", **other, shutdown_timeout=0)
    waits = host.wait_for("second", lambda status: status.phase is Phase.WAITING and "forward" in status.reason)
    assert f"TCP port {port} on 127.0.0.1 belongs to instance first (its forward), and second wants it" in waits.reason

    keys.put("first", **{"user-data": "#cloud-config\nhostname: other\n"})
    host.wait_for("first", lambda status: status.pending == ("user-data",))
    keys.put("first", power="off")
    host.wait_running("second")
