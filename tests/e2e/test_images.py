"""Images of the library with real supervisors: files and clones, several hosts at once, restarts, bad entries."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvmsupervisor.domain.images import aside_of, parent_of, parse_image
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.status import Phase
from tests.support.ceph import POOL
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.farm import COUNT_S, Farm
from tests.support.images import RAW
from tests.support.rbd_qemu import WRITER, WRITES_PER_S, count


class Shelf:
    """A folder of image files, and a library's folders."""

    def __init__(self, path: Path) -> None:
        self.root, self.disks, self.images = path / "shelf", path / "disks", path / "images"
        for folder in (self.root, self.disks, self.images):
            folder.mkdir(mode=0o700, parents=True)

    def settings(self) -> dict[str, Any]:
        return {
            "KVM_DISK_DIR": str(self.disks),
            "KVM_IMAGE_DIR": str(self.images),
            "KVM_MEDIA_ROOT": str(self.root),
            "KVM_QEMU_USER": "",
            "KVM_EXTRA_FLAGS": "any",
        }

    def entry(self, data: bytes, name: str = "a.raw") -> str:
        """The value of a key for some bytes."""
        (self.root / name).write_bytes(data)
        return f"file://{self.root}/{name} sha256={hashlib.sha256(data).hexdigest()}"


def add(keys: Keys, name: str, value: str) -> None:
    keys.write(f"{keys.layout.images_prefix}{name}", value)


def test_a_file_of_an_image(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """Law: a machine waits for its image, says why, gets a copy of it, and keeps that for good."""
    shelf = Shelf(tmp_path)
    host = hosts(**shelf.settings()).start()
    disk = {"disk/0": "file:one.raw size=8M from=debian"}
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, **disk)
    waits = host.wait_for("one", lambda s: "there is no image debian" in s.reason)
    assert waits.phase is Phase.WAITING
    assert waits.reason.startswith("disk/0: from=debian: ")
    keys.machines(host.name, "two", ram=16, extra_flags=tiny, **{"disk/0": "file:two.raw size=1M"})
    host.wait_running("two")
    add(keys, "debian", "https://user:pa55@h/x.img sha256=1")
    waits = host.wait_for("one", lambda s: "behind the URL stands sha256=" in s.reason)
    assert f"{keys.layout.images_prefix}debian: " in waits.reason
    assert "pa55" not in waits.reason
    add(keys, "debian", shelf.entry(RAW))
    qemu = host.wait_running("one")["one"]
    path = shelf.disks / "one.raw"
    assert path.read_bytes()[: len(RAW)] == RAW
    eventually("it to have grown", lambda: path.stat().st_size == 8 << 20)
    status = host.wait_for("one", lambda s: s.reason == "runs")
    assert status.pending == ()
    assert status.files == {"file:one.raw": host.name}

    keys.put("one", **{"disk/0": "file:one.raw size=8M from=fedora"})
    assert host.wait_for("one", lambda s: s.revision > status.revision).pending == ()
    with path.open("r+b") as file:
        file.write(b"by its guest")
    host.kill9()
    qemu.kill()
    (shelf.root / "a.raw").unlink()
    host.start()
    host.wait_running("one")
    told = host.wait_for("one", lambda s: "began with debian" in (s.notice or ""))
    assert told.phase is Phase.RUNNING
    assert path.read_bytes().startswith(b"by its guest")

    (shelf.disks / "three.raw").write_bytes(b"precious")
    keys.machines(host.name, "three", ram=16, extra_flags=tiny, **{"disk/0": "file:three.raw from=debian"})
    waits = host.wait_for("three", lambda s: "is there already" in s.reason)
    assert (shelf.disks / "three.raw").read_bytes() == b"precious"
    assert host.metric("internal_errors_total", instance="three") == 0


def test_hosts_of_one_ceph(farm: Farm, tmp_path: Path) -> None:
    """Law: three machines on two hosts that ask at the same instant: one import, three clones, and all write."""
    shelves = {name: Shelf(tmp_path / name) for name in ("alpha", "beta")}
    keys, ceph = farm.keys, farm.ceph
    hosts: dict[str, Host] = {}
    for name, shelf in shelves.items():
        settings = {**shelf.settings(), "KVM_MEDIA_ROOT": str(tmp_path)}
        hosts[name] = farm.host(name, **settings)
    value = shelves["alpha"].entry(WRITER.ljust(1 << 20, b"\0"))
    add(keys, "writer", value)
    where = {"1": "alpha", "2": "beta", "3": "beta"}
    images = {instance: RbdDisk(POOL, f"{farm.image.image}-{instance}") for instance in where}
    wishes = {
        keys.layout.wish_key(instance, name): text.encode()  # type: ignore[arg-type]
        for instance, host in where.items()
        for name, text in {
            "ram": "16",
            "rbd": f"{images[instance].name} size=4M from=writer iops={WRITES_PER_S}",
            "host": host,
        }.items()
    }
    keys.together(wishes)
    for instance, host in where.items():
        hosts[host].wait_running(instance)
        eventually(
            f"{instance} to write",
            lambda one=instance: count(ceph, images[one]) > 0,  # type: ignore[misc]
            poll_s=COUNT_S,
        )
    parent = parent_of(parse_image("writer", value), POOL)
    found: list[str] = json.loads(ceph.rbd("ls", POOL, "--format", "json"))
    assert parent.image in found
    beside = (*map(aside_of, (parent.image, *(image.image for image in images.values()))),)
    assert [name for name in found if name.startswith(beside)] == []
    children = json.loads(ceph.rbd("children", str(parent), "--format", "json"))
    assert {child["image"] for child in children} == {image.image for image in images.values()}
    fetched = [name for name, shelf in shelves.items() if list(shelf.images.iterdir())]
    assert len(fetched) == 1
    assert keys.names(keys.layout.imports_prefix) == []
    status = hosts["alpha"].wait_for("1", lambda s: s.images == (images["1"].name,))

    # Grown while it runs, and left as it is when it starts again, wherever that is.
    keys.put("1", rbd=f"{images['1'].name} size=6M from=writer iops={WRITES_PER_S}")
    eventually(
        "it to be grown", lambda: json.loads(ceph.rbd("info", images["1"].name, "--format", "json"))["size"] == 6 << 20
    )
    before = count(ceph, images["1"])
    keys.put("1", host="beta")
    hosts["beta"].wait_for("1", lambda s: s.phase is Phase.RUNNING and s.epoch > status.epoch)
    eventually("it to go on", lambda: count(ceph, images["1"]) > before, poll_s=COUNT_S)
    keys.delete("1")
    hosts["beta"].wait_forgotten("1")
    keys.machines("beta", "4", ram=16, rbd=f"{images['1'].name} from=writer")
    waits = hosts["beta"].wait_for("4", lambda s: "is there already" in s.reason)
    assert "was made for instance 1" in waits.reason
