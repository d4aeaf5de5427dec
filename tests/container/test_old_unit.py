"""What the original's users have in their units, on a whole host: their lines as they were."""

from __future__ import annotations

import re

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from tests.support.cluster import eventually
from tests.support.docker import IMAGE
from tests.support.imagehost import BRIDGE, ETCD, ImageHost

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

# The container's options, environment and the order of all are the original's. What is added: the guest's folder, no
# KVM, no health check that asks for a supervisor, more time to shut down.
UNIT = """\
[Unit]
Description=KVM guest %i
[Service]
ExecStartPre=-/sbin/modprobe kvm
ExecStartPre=-/sbin/modprobe tun
ExecStart=/usr/bin/docker run --rm --name kvm-%i --no-healthcheck --volume FOLDER:FOLDER \\
    --privileged --net=host --pid=host --ipc=host \\
    -e ETCD_ENDPOINTS=http://127.0.0.1:2379,http://localhost:2379 -e LOCK=/kvm/%i/lock -e BRIDGE_IF=BRIDGE \\
    IMAGE \\
    -accel tcg -m 96 -vga none -nographic -netdev bridge,br=BRIDGE,id=net0 \\
    -device virtio-net-pci,netdev=net0,mac=52:54:00:91:07:03 OPTIONS
ExecStop=/usr/bin/docker stop --time=60 kvm-%i
Restart=always
RestartSec=1s
TimeoutStartSec=120
TimeoutStopSec=80
"""


def journal(host: ImageHost, unit: str) -> str:
    return host.run("journalctl", "--output=cat", "-u", unit).stdout


def test_the_originals_own_lines_work(image_host: ImageHost, guest: Guest) -> None:
    """Law: a unit of old runs its guest under its lock and on its bridge, twice over, and shuts it down."""
    host = image_host
    *files, words = guest.options(tag="old")
    options = " ".join([*files, f'"{words}"'])
    told = {"FOLDER": str(guest.kernel.parent), "BRIDGE": BRIDGE, "OPTIONS": options, "IMAGE": IMAGE}
    text = re.sub("FOLDER|BRIDGE(?!_)|OPTIONS|IMAGE", lambda found: told[found[0]], UNIT)
    host.write("/etc/systemd/system/kvm@.service", text)
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", "kvm@1")
    try:
        eventually("the guest", lambda: "HELLO from old" in journal(host, "kvm@1"))
        lock = host.lock("1")
        assert lock is not None
        assert lock.pid is not None
        assert host.run("ls", f"/sys/class/net/{BRIDGE}/brif").stdout.split()
        # What systemd is there for.
        host.run("kill", "-9", str(lock.pid))
        eventually("the next one", lambda: journal(host, "kvm@1").count("HELLO from old") == 2)
        again = host.lock("1")
        assert again is not None
        assert again.pid != lock.pid
        host.run("systemctl", "stop", "kvm@1", timeout_s=100)
        eventually("its word", lambda: "GOODBYE from old" in journal(host, "kvm@1"))
        assert host.lock("1") is None
    finally:
        host.run("systemctl", "kill", "--signal=KILL", "kvm@1", check=False)
        host.run("systemctl", "stop", "kvm@1", check=False)


def test_the_same_options_without_arguments_supervise(image_host: ImageHost, guest: Guest) -> None:
    """Law: the original's options, and no arguments, run the supervisor; it says that its guests end with it."""
    host = image_host
    folder = guest.kernel.parent
    host.docker(
        *("run", "--detach", "--name=plain", f"--volume={folder}:{folder}:ro", "-e", "KVM_ACCEL=tcg"),
        *("--privileged", "--net=host", "--pid=host", "--ipc=host"),
        *("-e", f"ETCD_ENDPOINTS={ETCD}", "-e", f"BRIDGE_IF={BRIDGE}", IMAGE),
    )
    me = host.run("hostname").stdout.strip()
    mac = "52:54:00:91:07:04"
    host.put("1", ram=96, mac=mac, extra_flags=guest.extra_flags(tag="one"), shutdown_timeout=0, host=me)
    host.wait_running("1")
    assert host.run("ls", f"/sys/class/net/{BRIDGE}/brif").stdout.split()
    assert host.metric("guests_survive") == 0
    (line,) = host.events("plain", "homes.lost_with_container")
    assert "-v /run/dbus/system_bus_socket:/run/dbus/system_bus_socket" in line["reason"]
