"""What code finds in Ceph that has broken out of a guest's device models: `ceph_doors.c`, inside a real QEMU, tries.

It has what its QEMU has: the key of its client. With the one client of all guests every door opens; with a client of
its own, as `config/ceph-client create` makes it, none.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvmsupervisor.adapters.ceph import Ceph, CephAccess
from kvmsupervisor.adapters.handed import sealed
from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.spec import RbdDisk
from tests.support.ceph import CLIENT_CAPS, POOL
from tests.support.ceph import Ceph as Cluster
from tests.support.rbd_qemu import LIMIT_S, RbdQemu

MAKE_CLIENT = Path(__file__).resolve().parents[2] / "config" / "ceph-client"
VICTIM = "192.0.2.9:0/4711"


@frozen
class Door:
    """One thing to try: a function of ceph_doors.c, where, on what, and a word for it."""

    name: str
    namespace: str = "-"
    thing: str = "-"
    word: str = "-"

    def __str__(self) -> str:
        return f"{self.name} {self.namespace} {self.thing} {self.word}"


def doors(victim: str, shared: str) -> list[Door]:
    """What is tried.

    Args:
        victim: the id of another guest's image, in the namespace `web2`, that is called `disk`.
        shared: the id of another guest's image in the pool's nameless namespace, that is called `old`.
    """
    found = [
        *(Door(name, "web2", "disk") for name in ("open_image", "look_at_image", "write_image", "snap_image")),
        *(Door(name, "-", "old") for name in ("open_image", "look_at_image", "write_image", "snap_image")),
        *(Door("make_image", place, "mine") for place in ("web2", "web", "web10", "kvm-images", "-")),
        *(Door("list_objects", place) for place in ("web2", "-")),
        # The library is read by every guest, and written by none.
        *(Door(name, "kvm-images", "parent") for name in ("open_image", "write_image", "snap_image")),
        Door("call", "-", "rbd_namespace", "namespace_list"),
        Door("call", "-", "rbd_directory", "dir_list"),
        Door("call", "web2", "rbd_directory", "dir_list"),
        Door("shut_out", word=VICTIM),
        *(Door("command", word=word) for word in ("auth_ls", "config-key_ls")),
    ]
    for place, image in (("web2", victim), ("-", shared)):
        header, data = f"rbd_header.{image}", f"rbd_data.{image}.0000000000000000"
        found += [
            Door("watch", place, header),
            Door("notify", place, header),
            Door("take_lock", place, header, "mine"),
            Door("break_lock", place, header, "client.4711"),
            Door("read_object", place, data),
            Door("write_object", place, data),
            Door("remove_object", place, data),
            Door("call", place, header, "metadata_list"),
        ]
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The doors, compiled."""
    assert shutil.which("gcc") is not None, "gcc is missing: tools/install-system dev"
    made = tmp_path_factory.mktemp("doors") / "ceph_doors.so"
    source = Path(__file__).with_name("ceph_doors.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture(scope="module")
def ceph() -> Iterator[Cluster]:
    """A cluster of its own: its images and clients have names that other tests use, too."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def others(ceph: Cluster) -> list[Door]:
    """The images of other guests and the library's, and the doors to them."""
    environment = {"PATH": os.environ["PATH"], "CEPH_CONF": str(ceph.conf)}
    for guest in ("web1", "web2", "web", "web10"):
        words = (MAKE_CLIENT, "create", f"kvm-{guest}", f"{POOL}/{guest}")
        made = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        (ceph.folder / f"client.kvm-{guest}.keyring").write_text(made.stdout)
    ceph.new_client("vm", CLIENT_CAPS)
    ceph.rbd("namespace", "create", f"{POOL}/kvm-images")
    ids = []
    for name in ("web1/disk", "web2/disk", "old", "kvm-images/parent"):
        ceph.rbd_create(f"{POOL}/{name}")
        ids.append(json.loads(ceph.rbd("info", f"{POOL}/{name}", "--format", "json"))["id"])
    return doors(ids[1], ids[2])


async def opened(ceph: Cluster, library: Path, client: str, tried: Sequence[Door]) -> set[Door]:
    """Which doors open to a QEMU with this client's key."""
    key = await Ceph(CephAccess(user=client, conf=str(ceph.conf))).key()
    # What was written to is read by the next one.
    ceph.rbd("bench", f"{POOL}/web2/disk", *("--io-type", "write", "--io-size", "4K", "--io-total", "4K"))
    ceph.rbd("bench", f"{POOL}/old", *("--io-type", "write", "--io-size", "4K", "--io-total", "4K"))
    held = sealed("ceph-key", key.encode())
    side = hardware.Ceph(user=client, conf=str(ceph.conf), key=held)
    lines = "\n".join(map(str, tried))
    preloaded = {"LD_PRELOAD": library, "DOORS": lines, "CLIENT": client, "CONF": ceph.conf, "KEY": key, "POOL": POOL}
    prefix = ("env", *(f"{name}={value}" for name, value in preloaded.items()))
    async with RbdQemu(ceph, RbdDisk(POOL, "disk", namespace="web1"), side=side, prefix=prefix) as qemu:
        os.close(held)
        async with asyncio.timeout(LIMIT_S):
            while "door end" not in (said := qemu.log.read_text()):  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.05)
    answers = dict(line.rsplit(" ", 1) for line in said.splitlines() if line.startswith("door "))
    assert answers.pop("door connect -") == "0", said
    assert answers.keys() - {"door end -"} == {f"door {door}" for door in tried}, said
    return {door for door in tried if answers[f"door {door}"] == "0"}


async def test_a_client_of_its_own_opens_nobody_elses_doors(ceph: Cluster, library: Path, others: list[Door]) -> None:
    """Law: what opens with the one client of all opens with no guest's own, and its own image is open to it."""
    own = Door("open_image", "web1", "disk")
    library_read = Door("look_at_image", "kvm-images", "parent")
    free = await opened(ceph, library, "vm", [*others, own])
    # An administrator's commands are not the hosts' client's either.
    assert {str(door) for door in set(others) - free} == {str(door) for door in others if door.name == "command"}
    assert VICTIM in ceph.blocklist()
    ceph.ceph("osd", "blocklist", "rm", VICTIM)
    for name in ("web2/mine", "web/mine", "web10/mine", "kvm-images/mine", "mine"):
        ceph.rbd("rm", "--no-progress", f"{POOL}/{name}")
    ceph.rbd("snap", "rm", "--no-progress", f"{POOL}/web2/disk@stranger")
    found = await opened(ceph, library, "kvm-web1", [*others, own, library_read])
    assert found == {own, library_read}, "\n".join(map(str, found))
    assert VICTIM not in ceph.blocklist()
