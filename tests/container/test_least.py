"""The least that a container needs, as the pages have it: it is enough, and nothing of it can be left out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.capabilities import TO_BE_ANOTHER, Capability
from kvmsupervisor.domain.uids import DEFAULT_UIDS
from tests.support.boxed import Boxes, begin
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph
from tests.support.cluster import Keys, eventually
from tests.support.docker import IMAGE, Docker
from tests.support.heartbeat import Heartbeats
from tests.support.imagehost import BRIDGE, ETCD, ImageHost
from tests.support.pages import documented, options_of
from tests.support.place import Place

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

LEAST = options_of(documented("container.md", "The least that it needs"))
TREE = "--volume=/sys/fs/cgroup:/sys/fs/cgroup"
BUS = ["--volume=/run/dbus/system_bus_socket:/run/dbus/system_bus_socket", "--volume=/run/systemd:/run/systemd"]
BRIDGED = ["--cap-add=NET_ADMIN", "--device=/dev/net/tun"]
"""What only NICs need."""


def without(*words: str) -> list[str]:
    assert set(words) <= set(LEAST), words
    return [word for word in LEAST if word not in words]


@pytest.fixture
def storage(image_host: ImageHost) -> Iterator[Ceph]:
    """Ceph on that host, its client's configuration and key where the pages have them."""

    def on_that_host(*argv: str) -> list[str]:
        return ["nsenter", "-t", str(image_host.leader), "-n", "--", *argv]

    with Ceph(Place(around=on_that_host)) as ceph:
        keyring = ceph.new_client("kvm", CLIENT_CAPS)
        host = next(line for line in ceph.conf.read_text().splitlines() if line.startswith("mon host"))
        fsid = next(line for line in ceph.conf.read_text().splitlines() if line.startswith("fsid"))
        image_host.write("/etc/ceph/ceph.conf", f"[global]\n{fsid}\n{host}\n")
        image_host.write("/etc/ceph/ceph.client.kvm.keyring", keyring.read_text(), mode=0o600)
        yield ceph


@pytest.mark.parametrize("home", ["cgroup", "systemd"])
def test_it_is_enough(image_host: ImageHost, storage: Ceph, guest: Guest, home: str) -> None:
    """Law: bridge, RBD, a home of either kind and QEMU's own user; the guest outlives `docker kill` and is adopted."""
    host = image_host
    options = LEAST if home == "cgroup" else [*without(TREE, "--cgroupns=host"), *BUS]
    settings = {"BRIDGE_IF": BRIDGE, "CEPH_ID": "kvm", "KVM_CGROUP": home}
    storage.rbd_create(f"{POOL}/{home}")
    host.supervise("first", options, settings)
    assert host.wait_event("first", "supervisor.started")["homes"] == home
    assert (host.metric("guests_survive"), host.metric("qemu_privileged")) == (1, 0)
    flags = guest.extra_flags(tag="one", heartbeat_s=0.2, dhcp=True)
    # Not its first disk: that one it would boot from.
    nic, disk = {"mac": "52:54:00:91:07:01"}, {"disk/1": f"{POOL}/{home}"}
    host.put("one", ram=96, extra_flags=flags, shutdown_timeout=0, host="booted", **nic, **disk)
    before = host.wait_running("one")
    lock = host.lock("one")
    assert lock is not None
    assert lock.clients
    state = dict(
        line.split(":\t", 1)
        for line in host.run("cat", f"/proc/{before.pid}/status").stdout.splitlines()
        if ":\t" in line
    )
    (uid,) = set(state["Uid"].split())
    assert DEFAULT_UIDS.first <= int(uid) <= DEFAULT_UIDS.last
    assert (state["CapPrm"], state["CapEff"], state["CapAmb"], state["NoNewPrivs"]) == (
        "0" * 16,
        "0" * 16,
        "0" * 16,
        "1",
    )
    # Its user does not reach etcd, and root does.
    eventually("the rule", lambda: host.metric(r'wall\{wall="etcd"\}') == 1)
    port = ETCD.rpartition(":")[2]
    reach = ("python3", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}))")
    assert host.run("setpriv", f"--reuid={uid}", "--clear-groups", *reach, check=False).returncode != 0
    assert host.run(*reach, check=False).returncode == 0
    (tap,) = host.run("ls", f"/sys/class/net/{BRIDGE}/brif").stdout.split()

    def sent() -> int:
        return int(host.run("cat", f"/sys/class/net/{tap}/statistics/rx_packets").stdout)

    with Heartbeats({"one": host.console_of("one")}) as hearts:
        eventually("heartbeats", lambda: len(hearts.beats("one")) > 5)
        eventually("a frame", lambda: sent() > 0)
        ended_at = time.monotonic()
        host.docker("kill", "first")
        so_far, gone_at = sent(), time.monotonic()
        eventually("a heartbeat without a supervisor", lambda: hearts.all_beat(gone_at))
        eventually("a frame without a supervisor", lambda: sent() > so_far)
        host.docker("rm", "--force", "first")
        host.supervise("second", options, settings)
        host.wait_event("second", "instance.adopted")
        now = time.monotonic()
        eventually("a heartbeat after it", lambda: hearts.all_beat(now))
    hearts.assert_unbroken()
    after = host.wait_running("one")
    assert (after.pid, after.epoch, after.restarts) == (before.pid, 1, 0)
    assert host.lock("one") == lock
    print(f"{home}: largest gap {hearts.gap(ended_at, now):.2f} s")  # noqa: T201
    # A QEMU that does not end by itself is killed; the next one is another.
    host.run("kill", "-STOP", str(before.pid))
    host.put("one", restart_request=1)
    eventually("another", lambda: host.wait_running("one").pid != before.pid)


def test_without_a_bridge_it_needs_no_network_rights(boxes: Boxes, keys: Keys, guest: Guest) -> None:
    """Law: the same without what only NICs need, in v1's hierarchies, too; /dev/kvm is opened to QEMU's own user.

    A guest under KVM is not tried: on some development machines the device opens, and no QEMU can use it.
    """
    named_by_the_box = ("--volume=/run/kvm", "--volume=/etc/ceph", "--network=")
    options = [word for word in without(*BRIDGED) if not word.startswith(named_by_the_box)]
    box = boxes(options=options, privileges=(), KVM_ACCEL="kvm").start()
    assert box.events("supervisor.started")[-1]["accelerator"] == "kvm"
    assert box.metric("guests_survive") == 1
    box.end("kill")
    box.settings["KVM_ACCEL"] = "tcg"
    box.start()
    (before,) = begin(box, keys, {"one": guest.extra_flags(tag="one")}).values()
    box.end("kill")
    box.start()
    box.adopted(1)
    assert box.wait_running("one") == {"one": before}


@pytest.mark.parametrize("less", TO_BE_ANOTHER, ids=lambda one: one.name)
def test_each_capability_that_is_missing_is_named(docker: Docker, less: Capability) -> None:
    """Law: it ends with 1 before anything is begun, and says which, what for, and what to do."""
    done = docker.run("run", "--rm", *_offline(without(f"--cap-add={less.name}")), IMAGE, check=False)
    assert done.returncode == 1, done.stdout
    assert f"CAP_{less.name} ({less.why})" in done.stderr
    assert f"--cap-add={less.name};" in done.stderr


def _offline(options: Sequence[str]) -> list[str]:
    """Where nothing is needed of the host's network, and nothing is left on the host."""
    return [*(word for word in options if not word.startswith(("--volume=", "--network="))), "--network=none"]


MISSING = {
    "NET_ADMIN": (["--cap-add=NET_ADMIN"], "the supervisor needs CAP_NET_ADMIN"),
    "tun": (["--device=/dev/net/tun"], "--device /dev/net/tun"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_a_nic_needs_is_named(image_host: ImageHost, what: str) -> None:
    """Law: the instance waits and says what is missing; with all of it, it runs."""
    words, said = MISSING[what]
    host = image_host
    options = without(*words)
    settings: dict[str, object] = {"BRIDGE_IF": BRIDGE}
    host.supervise("first", options, settings)
    host.put("one", ram=16, mac="52:54:00:91:07:01", shutdown_timeout=0, host="booted")
    host.wait_reason("one", said)
    if what == "NET_ADMIN":
        assert "--cap-add=NET_ADMIN" in host.wait_event("first", "bridge.out_of_reach")["reason"]
    host.docker("rm", "--force", "first")
    host.supervise("second", LEAST, settings)
    host.wait_running("one")


def test_without_the_device_kvm_says_so(docker: Docker) -> None:
    """Law: where KVM is demanded it ends with 1, and names the option; otherwise it is why there is none."""
    options = _offline(without("--device=/dev/kvm"))
    done = docker.run("run", "--rm", *options, "--env=KVM_ACCEL=kvm", IMAGE, check=False)
    assert done.returncode == 1
    assert "--device /dev/kvm" in done.stderr


def test_without_the_run_directory_it_says_that_nothing_is_adopted(image_host: ImageHost) -> None:
    """Law: guests that live on where nobody finds them are told of like guests that end."""
    host = image_host
    host.supervise("first", without("--volume=/run/kvmsupervisor:/run/kvmsupervisor"))
    line = host.wait_event("first", "homes.lost_with_container")
    assert "run it with -v /run/kvmsupervisor:/run/kvmsupervisor" in line["reason"]
    assert host.metric("guests_survive") == 0


@pytest.mark.parametrize("less", [TREE, "--cgroupns=host", "--pid=host"])
def test_without_a_home_it_says_that_guests_end(image_host: ImageHost, less: str) -> None:
    """Law: what is missing for a home outside of the container is an error in the log, and a metric of 0."""
    host = image_host
    host.supervise("first", without(less))
    line = host.wait_event("first", "homes.lost_with_container")
    wanted = "-v /sys/fs/cgroup:/sys/fs/cgroup" if less == TREE else less
    assert wanted in line["reason"], line
    assert line["level"] == "error"
    assert host.metric("guests_survive") == 0


SINGLE = options_of(documented("single-mode.md", "The least that it needs"))


def test_single_mode_needs_less(image_host: ImageHost, guest: Guest) -> None:
    """Law: QEMU's own options, a bridge and a lock take one capability; without it the reason is told."""
    host = image_host
    options = ["-accel", "tcg", "-m", "96", "-nodefaults", "-nographic", "-serial", "stdio", *guest.options(tag="one")]
    nic = ["-netdev", f"bridge,br={BRIDGE},id=n0", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:91:07:02"]
    environment = [f"--env=ETCD_ENDPOINTS={ETCD}", "--env=LOCK=/kvm/1/lock", f"--env=BRIDGE_IF={BRIDGE}"]
    folders = [f"--volume={path}:{path}:ro" for path in host.folders]
    started = ["run", "--detach", "--env=KVM_HOSTNAME=booted", *environment, *folders]
    host.docker(
        *started, "--name=lame", *[word for word in SINGLE if word != "--cap-add=NET_ADMIN"], IMAGE, *options, *nic
    )
    assert host.docker("wait", "lame").strip() == "1"
    assert "CAP_NET_ADMIN" in host.log("lame")
    assert "--cap-add=NET_ADMIN" in host.log("lame")
    host.docker(*started, "--name=one", *SINGLE, IMAGE, *options, *nic)
    eventually("the guest", lambda: "HELLO from one" in host.log("one"))
    assert host.run("ls", f"/sys/class/net/{BRIDGE}/brif").stdout.split()
    assert host.lock("1") is not None
    host.docker("stop", "--time=60", "one")
    assert "GOODBYE from one" in host.log("one")
    assert host.docker("wait", "one").strip() == "0"
    assert host.lock("1") is None
