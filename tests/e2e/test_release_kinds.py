"""What releases left of each kind of machine, and of containers in single mode, is gone on with by this one.

Where a living process of the release would need another machine (a QEMU on a Ceph that is gone), its record is laid out
with a process that has ended: what the release promised to its storage has to be heeded all the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmsupervisor.adapters.cgroup.tree import FOLDER, find_hierarchies
from kvmsupervisor.adapters.clock import boot_id
from kvmsupervisor.adapters.network import open_tap
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import LockState, clients_from_json
from kvmsupervisor.domain.status import Phase
from tests.support.ceph import CLIENT_CAPS, FEATURES, POOL, Ceph
from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import EtcdServer
from tests.support.net import Lan
from tests.support.releases import RELEASES, Release, process_fields, recorded
from tests.support.single import Container, Containers, holder

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the supervisor of a guest on a bridge runs as root")

VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
"""For the firmware that the recorded command lines name."""

GONE = {"pid": 2**22 - 1, "starttime": 1}
"""A process that there is not: beyond the largest pid that Linux gives by default."""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """QEMUs that a test has started by itself: they end with it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for one in started:
        one.kill()
        one.wait()


@pytest.fixture
def cgroups() -> Iterator[list[Path]]:
    """Folders in the host's tree of cgroups: none is left, however the test ends."""
    made: list[Path] = []
    yield made
    for one in made:
        if one.exists():
            one.rmdir()


# --- a machine with everything --------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("release", RELEASES)
def test_a_rich_machine_is_adopted_and_its_things_are_used_again(
    hosts: Hosts, lan: Lan, cgroups: list[Path], processes: list[subprocess.Popen[bytes]], release: str
) -> None:
    """Law 8: taps, media, UEFI variables and cgroup are its own: nothing is pending, and it is the same process.

    Its next start has the same variables, whoever they belonged to, and the copy that was kept of its user data, whose
    server is away. Its cgroup goes with its process.
    """
    lan.inside.run("ip", "link", "add", "br1", "type", "bridge")
    lan.inside.bridge_conf.write_text(f"allow {lan.bridge}\nallow br1\n")
    host = hosts(KVM_CGROUP="cgroup", KVM_QEMU_USER="nobody", KVM_MEDIA_ROOT="/folder-of-the-release")
    host.around, keys = lan.around, host.keys
    left = Release(release, host)
    url = json.loads(recorded(release, "rich/wishes.json"))["cloud-config"]
    left.put("rich", **{"cloud-config": url})
    (host.run_dir / "rich").mkdir(parents=True)
    left.copy("rich", "media.json", "user-data")
    for name in ("seed.iso", "config-2.iso"):
        (host.run_dir / "rich" / name).write_bytes(b"\0" * 2048)
    (host.run_dir / "rich" / "spice-password").write_text("not a secret")
    (name,) = json.loads(recorded(release, "rich/files.json"))["state"]
    variables = host.folder / "state" / name
    variables.parent.mkdir(parents=True)
    variables.write_bytes(VARIABLES.read_bytes()[:-1] + b"\x17")
    (cgroup,) = json.loads(recorded(release, "rich/cgroups.json"))
    assert cgroup.startswith(f"/{FOLDER}/")
    # A new folder of v1's cpuset takes nobody in before it is told its processors; one kind less is no other case.
    hierarchies = [one for one in find_hierarchies() if "cpuset" not in one.controllers]
    cgroups.extend(one.top.joinpath(cgroup.strip("/")) for one in hierarchies)
    with ExitStack() as stack:
        taps = [asyncio.run(open_tap(bridge, helper=lan.inside.helper())) for bridge in (lan.bridge, "br1")]
        for tap in taps:
            stack.callback(tap.close)
        process, argv = left.spawn("rich", taps=[tap.fd for tap in taps], marks="rich/")
    processes.append(process)
    for one in cgroups:
        one.mkdir(parents=True)
        one.joinpath("cgroup.procs").write_text(f"{process.pid}\n")
    host.ask("rich", "cont")
    qemu = host.qemu("rich")
    record = json.loads(left.value("rich/incarnation.json"))
    left.on_record("rich", argv, qemu)
    path = host.run_dir / "rich" / "incarnation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"spec": record["spec"] | {"cloud_config": url}}))
    left.say("rich", **process_fields(qemu))

    host.start()
    assert host.wait_running("rich") == {"rich": qemu}
    status = host.status("rich")
    assert status is not None
    assert (status.pid, status.epoch, status.pending, status.problems) == (qemu.pid, 1, (), ())
    keys.put("rich", restart_request="again")
    after = host.wait_for("rich", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, qemu.pid})
    assert "copy that the last start had" in (after.notice or "")
    assert variables.read_bytes().endswith(b"\x17")
    assert variables.stat().st_uid == 0
    assert any(str(variables) in word for word in host.qemu("rich").argv)
    assert not any(one.exists() for one in cgroups)
    keys.delete("rich", "host")
    host.wait_forgotten("rich")


# --- a machine on Ceph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_the_clients_on_record_are_shut_out_before_the_next_start(
    hosts: Hosts, keys: Keys, ceph: Ceph, release: str
) -> None:
    """Law 4: a QEMU of the release that is found dead is fenced by the addresses that it wrote; its images are its own.

    Variables of UEFI are taken where that release has put them.
    """
    ceph.new_client("vm", CLIENT_CAPS)
    images = json.loads(recorded(release, "disk/images.json"))
    for image in images:
        if image.endswith(".nvram"):
            ceph.rbd("import", "--image-feature", FEATURES, str(VARIABLES), f"{POOL}/{image}")
        else:
            ceph.rbd_create(f"{POOL}/{image}")
    host = hosts(KVM_QEMU_USER="", KVM_EXTRA_FLAGS="any", CEPH_CONF=str(ceph.conf), CEPH_ID="vm")
    left = Release(release, host)
    left.put("disk")
    left.write("disk/incarnation.json", **GONE)
    left.write("disk/memory.json")
    lock = json.loads(left.say("disk", **GONE))
    host.start()
    status = host.wait_for("disk", lambda s: s.phase is Phase.RUNNING and s.pid is not None)
    assert status.epoch == lock["epoch"] + 1
    assert set(lock["clients"]) <= ceph.blocklist()
    assert status.problems == ()
    for image in images:
        assert ceph.watchers(f"{POOL}/{image}"), image
    keys.delete("disk", "host")
    host.wait_forgotten("disk")
    for image in images:
        ceph.rbd("rm", f"{POOL}/{image}")


@pytest.mark.parametrize("release", RELEASES)
def test_a_living_guest_on_ceph_is_vouched_for(hosts: Hosts, keys: Keys, ceph: Ceph, tiny: str, release: str) -> None:
    """Law 4: adopted from a release that did not repeat its clients; the next host may know them without a restart."""
    ceph.new_client("vm", CLIENT_CAPS)
    image = f"{POOL}/vouched"
    ceph.rbd_create(image)
    host = hosts(KVM_QEMU_USER="", KVM_EXTRA_FLAGS="any", CEPH_CONF=str(ceph.conf), CEPH_ID="vm").start()
    keys.machines("alpha", "vouched", ram=16, shutdown_timeout=0, rbd=image, extra_flags=tiny)
    qemu = host.wait_running("vouched")["vouched"]
    host.kill9()
    # What that release writes of a QEMU lacks what came since.
    path = host.run_dir / "vouched" / "incarnation.json"
    known = json.loads(recorded(release, "disk/incarnation.json")).keys()
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in known}))
    key = keys.layout.clients_key(InstanceId("vouched"))
    keys._ctl("del", key)
    host.start()
    told = eventually("its word", lambda: keys.get(key))
    assert clients_from_json(told) == ceph.watchers(image) != frozenset()
    assert host.wait_running("vouched")["vouched"] == qemu
    keys.delete("vouched")
    host.wait_forgotten("vouched")
    ceph.rbd("rm", image)


# --- containers in single mode --------------------------------------------------------------------------------


@pytest.fixture
def alone(etcd_alone: EtcdServer) -> Iterator[Containers]:
    """Containers of a cluster of their own: the name of their folder is made of the prefix, too."""
    containers = Containers(Keys(etcd_alone))
    try:
        yield containers
    finally:
        for container in containers.made:
            print(f"--- log ---\n{container.log}")  # noqa: T201
            container.close()


def folder_of(release: str, scene: str, container: Container) -> Path:
    """The container's folder, by the name that the release gave it."""
    names = json.loads(recorded(release, f"{scene}/files.json"))["run"]
    (name,) = {name.partition("/")[0] for name in names}
    return container.run_dir / str(name)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("lives", [True, False], ids=["alive", "dead"])
def test_a_container_goes_on_with_what_the_last_one_left(
    alone: Containers, processes: list[subprocess.Popen[bytes]], release: str, lives: bool
) -> None:
    """Law 8: under the name and in the folder of the release: a living QEMU is adopted, else its lock is taken."""
    container = alone.instance("alone")
    left = Release(release, container, run_dir=folder_of(release, "alone", container))
    left.put("alone")
    me = holder("alpha", "alone")
    fields = GONE
    if lives:
        process, argv = left.spawn("alone", marks="alone/")
        processes.append(process)
        (qemu,) = container.qemus()
        fields = process_fields(qemu)
        left.write("alone/incarnation.json", argv=list(argv), **fields)
    else:
        left.write("alone/incarnation.json", **fields)
    left.write("alone/memory.json")
    left.say("alone", host=me, **fields)
    container.begin()
    (after,) = container.wait_running("alone").values()
    lock = eventually("its lock", lambda: container.keys.lock("alone"))
    assert (lock.host, lock.epoch) == (me, 1 if lives else 2)
    assert lives is (fields["pid"] == after.pid)
    assert len(container.qemus()) == 1
    assert list(container.run_dir.iterdir()) == [folder_of(release, "alone", container)]


@pytest.mark.parametrize("file", ["incarnation.json", "memory.json"])
def test_a_newer_record_ends_a_container_before_it_does_anything(alone: Containers, file: str) -> None:
    """Law: exit status 1 with the file and the versions; the record stays as it is, and so does the lock."""
    release = RELEASES[-1]
    container = alone.instance("alone")
    folder = folder_of(release, "alone", container)
    left = Release(release, container, run_dir=folder, newer=f"alone/{file}")
    left.put("alone")
    left.write("alone/incarnation.json", **GONE)
    left.write("alone/memory.json")
    lock = left.say("alone", host=holder("alpha", "alone"), **GONE)
    before = (folder / "alone" / file).read_bytes()
    container.begin()
    assert container.wait_ended() == 1
    assert f"{folder / 'alone' / file}: its version is 2, this release reads 1" in container.log
    assert "Traceback" not in container.log
    assert (folder / "alone" / file).read_bytes() == before
    assert container.keys.get(container.keys.layout.lock_key(InstanceId("alone"))) == lock


@pytest.mark.parametrize("release", RELEASES)
def test_the_lock_of_a_container_with_options_is_taken_by_the_next(alone: Containers, tiny: str, release: str) -> None:
    """Law 2: its QEMU is proven gone by what the lock says of it, so the same host's next container goes on at once."""
    words = ("-accel", "tcg", "-m", "16", "-display", "none", "-nodefaults", *shlex.split(tiny))
    container = alone.locked(*words, instance="options")
    me = holder("alpha", "options")
    Release(release, container).say("options", host=me, **GONE)
    container.begin()
    container.wait_running("options")
    lock = container.keys.lock("options")
    assert lock is not None
    assert (lock.host, lock.epoch, lock.state, lock.boot_id) == (me, 2, LockState.RUNNING, boot_id())
    assert folder_of(release, "options", container).is_dir()
