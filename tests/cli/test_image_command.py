"""`image`: entries that are checked before they are written, users that are known before one is removed, a fetch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.main import cli
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph
from tests.support.images import RAW

SUM = "0123456789abcdef" * 4
URL = "https://user:pa55@images.example/debian.qcow2?token=s3cret"


def entry(world: World, name: str = "debian") -> str | None:
    found = world.etcd.data.get(world.layout.image_key(name))
    return None if found is None else found.decode()


def add(world: World, *more: str, name: str = "debian", url: str = URL, digest: str = SUM) -> tuple[int, str]:
    done = world.run("image", "add", name, url, "--sha256", digest, *more)
    return done.exit_code, done.output


@pytest.fixture
def used(world: World) -> World:
    """An image that two instances name, one of which runs."""
    world.host("alpha")
    add(world)
    world.running("web1", rbd="rbd/web1 from=debian")
    world.keys("web2", host="alpha", ram="1G")
    world.etcd.write(b"/kvm/web2/disk/1", "file:web2.raw from=debian")
    return world


def test_an_image_is_added(world: World) -> None:
    """Law: one key, in the form that hosts read; the same twice is no change, another needs --force."""
    assert add(world) == (0, "image debian added: from=debian names it in a disk's key\n")
    assert entry(world) == f"{URL} sha256={SUM}"
    code, said = add(world)
    assert (code, "the same" in said) == (0, True)
    code, said = add(world, url="https://h/a.img", digest=SUM.upper())
    assert code == 1
    code, said = add(world, "--format", "qcow2", url="https://h/a.img", digest=SUM.upper())
    assert code == 1
    assert "a new version is better added by a name of its own" in said
    assert "pa55" not in said
    assert "s3cret" not in said
    code, said = add(world, "--format", "qcow2", "--force", url="https://h/a.img", digest=SUM.upper())
    assert (code, said.split(":")[0]) == (0, "image debian changed")
    assert entry(world) == f"https://h/a.img sha256={SUM} format=qcow2"


@pytest.mark.parametrize(
    ("name", "url", "digest", "wanted"),
    [
        ("debian", "https://h/a.img", SUM, "add format=qcow2 or format=raw"),
        ("debian", "https://h/a.raw.xz", SUM, "is packed"),
        ("debian", "/tmp/a.raw", SUM, "it is a URL"),
        ("debian", "https://h/a.raw", "12", "64 hexadecimal digits"),
        ("../a", "https://h/a.raw", SUM, "is no name"),
        ("a/b", "https://h/a.raw", SUM, "is no name"),
    ],
)
def test_bad_images_are_not_added(world: World, name: str, url: str, digest: str, wanted: str) -> None:
    """Law: what no host could use is not written, and the message says what would be right."""
    code, said = add(world, name=name, url=url, digest=digest)
    assert code in {1, 2}
    assert wanted in said
    assert world.etcd.revision == 1


def test_images_are_listed(used: World) -> None:
    """Law: each entry with who names it, without secrets; one that cannot be used with why not."""
    used.etcd.write(used.layout.image_key("broken"), "https://u:pw@h/a.img sha256=1")
    said = used.run("image", "list").output
    assert "pa55" not in said
    assert "s3cret" not in said
    assert "pw@" not in said
    rows = used.rows("image", "list")
    assert rows["debian"][:2] == ["qcow2", SUM[:12]]
    assert rows["debian"][-1] == "web1 (rbd), web2 (disk/1)"
    assert "64 hexadecimal digits" in rows["broken"][0]
    found = {one["name"]: one for one in used.json("image", "list")}
    assert found["debian"]["users"] == ["web1 (rbd)", "web2 (disk/1)"]
    assert found["debian"]["sha256"] == SUM
    assert found["broken"]["sha256"] is None


def test_what_uses_an_image_is_known_before_it_is_removed(used: World) -> None:
    """Law: a key that names it keeps it; --force removes it, and says what waits then."""
    done = used.run("image", "remove", "debian")
    assert done.exit_code == 1
    assert "web1 (rbd), web2 (disk/1) name it" in done.output
    assert entry(used) is not None
    done = used.run("image", "remove", "debian", "--force")
    assert done.exit_code == 0
    assert "still named by web1 (rbd), web2 (disk/1)" in done.output
    assert entry(used) is None
    done = used.run("image", "remove", "debian")
    assert (done.exit_code, "there is no image debian" in done.output) == (1, True)


def test_an_image_that_nobody_names_is_removed(world: World) -> None:
    """Law: as soon as no key names it; a writer in between is told."""
    add(world)
    done = world.run("image", "remove", "debian")
    assert (done.exit_code, done.output) == (0, "image debian removed\n")
    assert entry(world) is None


def test_it_is_removed_from_ceph_unless_a_disk_is_a_clone(world: World, ceph: Ceph, tmp_path: Path) -> None:
    """Law: clones keep their image, whatever is forced; the key stays then, too."""
    ceph.new_client("vm", CLIENT_CAPS)
    world.environ |= {"CEPH_CONF": str(ceph.conf), "CEPH_ID": "vm"}
    digest = hashlib.sha256(str(tmp_path).encode()).hexdigest()
    name = f"{POOL}/kvm-image-{digest}-raw"
    add(world, url="https://h/a.raw", digest=digest)
    ceph.rbd_create(name)
    ceph.rbd("snap", "create", "--no-progress", f"{name}@image")
    ceph.rbd("snap", "protect", f"{name}@image")
    ceph.rbd("clone", f"{name}@image", f"{name}.clone")
    done = world.run("image", "remove", "debian", "--pool", POOL, "--force")
    assert done.exit_code == 1
    assert f"has clones, which need it: {name}.clone" in done.output
    assert entry(world) is not None
    done = world.run("image", "remove", "debian", "--pool", "lake")
    assert (done.exit_code, "no such pool" in done.output) == (1, True)
    ceph.rbd("rm", "--no-progress", f"{name}.clone")
    done = world.run("image", "remove", "debian", "--pool", POOL)
    assert done.exit_code == 0
    assert f"removed from the pool {POOL}: kvm-image-{digest}-raw" in done.output
    assert entry(world) is None
    add(world, url="https://h/a.raw", digest=digest)
    assert "it is not in the pool" in world.run("image", "remove", "debian", "--pool", POOL).output


def test_an_image_is_fetched(world: World, tmp_path: Path) -> None:
    """Law: it is in this host's folder afterwards, whole, in each format that was asked for; a second time at once."""
    images = tmp_path / "images"
    images.mkdir(mode=0o700)
    (tmp_path / "a.raw").write_bytes(RAW)
    world.environ |= {"KVM_IMAGE_DIR": str(images), "KVM_MEDIA_ROOT": str(tmp_path), "KVM_QEMU_USER": ""}
    digest = hashlib.sha256(RAW).hexdigest()
    add(world, url=f"file://{tmp_path}/a.raw", digest=digest)
    done = world.run("image", "fetch", "debian", "--as", "qcow2")
    assert done.exit_code == 0, done.output
    assert f"image debian is in {images / digest}\n" in done.output
    assert (images / digest).read_bytes() == RAW
    assert (images / f"{digest}-raw.qcow2").exists()
    (tmp_path / "a.raw").unlink()
    assert world.run("image", "fetch", "debian").output == f"image debian is in {images / digest}\n"
    add(world, name="gone", url=f"file://{tmp_path}/gone.raw")
    done = world.run("image", "fetch", "gone")
    assert (done.exit_code, "image gone: the file cannot be opened" in done.output) == (1, True)
    assert world.run("image", "fetch", "nothing").exit_code == 1


def test_names_are_completed(used: World) -> None:
    """Law: names of the library, and none that a shell would expand."""
    used.etcd.write(b"/kvm/.images/$(reboot)", f"https://h/a.raw sha256={SUM}")
    tools = Tools(environ=used.environ, connect=lambda settings: used.etcd.peer())
    completer = ShellComplete(cli, {"obj": tools}, "kvmsupervisor", "_KVMSUPERVISOR_COMPLETE")
    assert [item.value for item in completer.get_completions(["image", "remove"], "")] == ["debian"]
    assert [item.value for item in completer.get_completions(["image"], "re")] == ["remove"]


def test_check_knows_the_library(used: World) -> None:
    """Law: the library is no stray key; bad entries are found, and disks still to be made of what is missing."""
    used.status("web2", "alpha", Phase.WAITING, "disk/1: from=debian: fetched 5 %")
    assert not any(finding["key"].startswith("/kvm/.images") for finding in used.json("check"))
    used.etcd.write(used.layout.image_key("debian"), "https://u:pw@h/a.img sha256=1")
    (found,) = (one for one in used.json("check") if one["key"] == "/kvm/.images/debian")
    assert "64 hexadecimal digits" in found["wanted"]
    assert "pw" not in str(found)
    used.run("image", "remove", "debian", "--force")
    used.run("set", "web2", "cdrom=tools")
    (found,) = (one for one in used.json("check") if one["key"] == "cdrom")
    assert "tools" in found["found"]
    (found,) = (one for one in used.json("check") if one["key"] == "disk/1")
    assert found["instances"] == ["web2"]
    assert "image add debian" in found["wanted"]
