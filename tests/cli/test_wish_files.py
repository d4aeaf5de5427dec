"""`export` and `apply`: wishes as files, which are people's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmsupervisor.cli.wish_files.difference import LEFT, differences
from kvmsupervisor.cli.wish_files.reading import MOST_BYTES, Faulty, read_files, written
from kvmsupervisor.cli.wish_files.schema import CLOSED
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.parse_keys import is_known
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World

SHOP = """\
# The shop's machines.
.x-web: &web
  ram: 2G
  bridge: br0
  restart: on-failure
  x-team: shop

web1:
  <<: *web
  host: alpha
  mac: 52:54:00:12:34:56
  power: on
  rbd: rbd/web1
---
web2:
  ram: 0512M   # less than the others
  host: alpha
  x-team: shop
  extra_flags: "-device virtio-rng-pci"
"""

WEB1 = {
    "host": "alpha", "ram": "2G", "bridge": "br0", "restart": "on-failure", "x-team": "shop",
    "mac": "52:54:00:12:34:56", "power": "on", "rbd": "rbd/web1",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(SHOP)
    return path


def keys_of(world: World, instance: str) -> dict[str, str]:
    """Its wishes, without its lock."""
    prefix = f"/kvm/{instance}/"
    found = {key.removeprefix(prefix): one for key, one in world.etcd.data.items() if key.startswith(prefix)}
    return {name: value.decode() for name, value in found.items() if name != "lock"}


# --- reading --------------------------------------------------------------------------------------------------


def test_values_are_the_text_that_stands_there(file: Path) -> None:
    """Law: YAML's numbers, truths and numbers of the base 60 are text; merges, documents and templates as usual."""
    wanted = read_files([str(file)])
    web2 = {"ram": "0512M", "host": "alpha", "x-team": "shop", "extra_flags": "-device virtio-rng-pci"}
    assert wanted.instances == {"web1": WEB1, "web2": web2}
    assert wanted.places[InstanceId("web2")] == f"{file}:15"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("web1:\n  ram: 1G\n  ram: 2G\n", 3, "'ram' stands at FILE:2 already"),
        ("web1: {ram: 1G}\nweb1: {ram: 2G}\n", 2, "'web1' stands at FILE:1 already"),
        ("web1: {ram: 1G}\n---\nweb1: {ram: 2G}\n", 3, "web1 stands at FILE:1 already"),
        ("web1:\n  ram:\n", 2, "ram has no value"),
        ("web1:\n  ram: null\n", 2, "ram has no value"),
        ("web1:\n  ram: ' '\n", 2, "ram has no value"),
        ("web1:\n  nic: {1: {mac: x}}\n", 2, "a key is written whole, such as nic/1/mac"),
        ("web1:\n  hosts: [beta, gamma]\n", 2, "hosts is a list"),
        ("web1:\n  ram: !vault x\n", 2, "ram has the tag !vault"),
        ("web1:\n  ram: !!binary AAAA\n", 2, "ram has the tag"),
        ("web1: 5\n", 1, "an instance is a mapping"),
        ("web1: {}\n", 1, "web1 has no keys"),
        ("- web1\n", 1, "a file is a mapping"),
        ("just words\n", 1, "a file is a mapping"),
        ("/kvm/web1: {ram: 1G}\n", 1, "is no id"),
        (".hosts: {alpha: {drain: live}}\n", 1, "is no id"),
        ("web1:\n ram: 1G\n  host: x\n", 3, "this is no YAML"),
        ("web1: *nobody\n", 1, "this is no YAML"),
        ("web1:\n\tram: 1G\n", 2, "this is no YAML"),
        ("? [a, b]\n: {ram: 1G}\n", 1, "a file is a mapping"),
        ("web1: &a\n  <<: *a\n  ram: 1G\n", 2, "it merges itself"),
        (".images: [debian]\n", 1, ".images is a mapping"),
        ("web1: {user-data: '@'}\n", 1, "names no file"),
        ("web1: {user-data: '@-'}\n", 1, "names no file"),
        ("web1: {user-data: '@not-there'}\n", 1, "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    """Law: file, line, what stands there, and what would be right; nothing is guessed."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(Faulty) as faulty:
        read_files([str(path)])
    told = str(faulty.value).replace(str(path), "FILE")
    assert told.startswith(f"FILE:{line}: ")
    assert said in told


def test_all_faults_of_all_files_are_told(tmp_path: Path) -> None:
    """Law: a person mends everything at once."""
    (tmp_path / "a.yaml").write_text("web1: {ram: }\nweb2: 5\n")
    (tmp_path / "b.yml").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("not read: 1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Faulty) as faulty:
        read_files([str(tmp_path), str(tmp_path / "none"), str(tmp_path / "empty")])
    told = str(faulty.value).splitlines()
    assert len(told) == 5, told
    assert told[-1].endswith("no file in this folder ends in .yaml or .yml")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 5000, "nested too deeply"),
        (b"a" * (MOST_BYTES + 1), "more than 16 MiB"),
        (b"web1: {ram: \x1b[2J}\n", "this is no YAML"),
        ("web1: {ram: 1\N{RIGHT-TO-LEFT OVERRIDE}G}\n".encode(), None),
        (b"\xef\xbb\xbfweb1: {ram: 1G}\n", None),
        (b"", None),
        (b"---\n---\n# nothing\n", None),
    ],
)
def test_hostile_files(data: bytes, said: str | None) -> None:
    """Law: no file takes the program down, or its memory."""
    if said is None:
        read_files(["-"], lambda most: data[:most])
        return
    with pytest.raises(Faulty, match=said):
        read_files(["-"], lambda most: data[:most])


def test_many_merges_are_no_bomb() -> None:
    """Law: merges of merges of merges make no more than they hold."""
    lines = [".x-0: &a0 {ram: 1G}"]
    lines += [f".x-{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 60)]
    text = "\n".join([*lines, "web1: {<<: *a59, host: alpha}"])
    assert read_files(["-"], lambda most: text.encode()).instances == {"web1": {"ram": "1G", "host": "alpha"}}


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
LETTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(LETTERS, min_size=1, max_size=60).map(str.strip).filter(bool).filter(lambda one: one[0] != "@")


@example({"host": "0\x850", "ram": "a\rb", "cpu": "a\u2028b\nc", "mac": "12:40:37:27:57:41"}, "a")
@given(st.dictionaries(st.sampled_from(WISH_KEYS), TEXTS, min_size=1, max_size=6), NAMES)
def test_what_is_written_is_read_again(keys: dict[str, str], name: str) -> None:
    """Law: whatever text a value is, a reader of the file has the same text."""
    data = written(name, keys.items()).encode()
    assert read_files(["-"], lambda most: data).instances == {name: keys}


# --- the difference -------------------------------------------------------------------------------------------


def test_differences() -> None:
    """Law: keys in the order in which they are explained; orders and secrets stay where a file does not name them."""
    present = {"ram": " 2G\n", "spice_port": "5900", "mac": "52:54:00:00:00:01", **dict.fromkeys(LEFT, "x")}
    wanted = {"ram": "2G", "mac": "auto", "nic/1/mac": "auto", "cpus": "2", "x-a": "1", "host": "beta"}
    assert [str(one) for one in differences(present, wanted)] == [
        "~ host: x → beta", "- spice_port: 5900", "+ cpus: 2", "+ nic/1/mac: auto", "+ x-a: 1",
    ]  # fmt: skip


def test_secrets_are_not_shown() -> None:
    """Law: what nobody shows is not in a difference either."""
    told = [
        str(one) for one in differences({}, {"spice_password": "s3cret", "user-data": "#cloud-config\npw: s3cret\n"})
    ]
    assert "s3cret" not in " ".join(told)
    assert len(told) == 2


# --- apply ----------------------------------------------------------------------------------------------------


def test_a_file_is_applied_once(world: World, file: Path) -> None:
    """Law: shown, asked, written, one transaction for each; the second time nothing differs and nothing is written."""
    world.host("alpha")
    asked = world.run("apply", "-f", str(file), input_text="n\n", asked=True)
    assert asked.exit_code == 1
    assert "web1: new\n  + host: alpha\n" in asked.stdout
    assert keys_of(world, "web1") == {}
    done = world.run("apply", "-f", str(file), input_text="y\n", asked=True)
    assert done.exit_code == 0, done.output
    assert keys_of(world, "web1") == WEB1
    assert keys_of(world, "web2")["ram"] == "0512M"
    revision = world.etcd.revision
    again = world.run("apply", "-f", str(file), "--yes")
    assert (again.exit_code, again.stdout) == (0, "")
    assert "2 are as the files say" in again.stderr
    assert world.etcd.revision == revision
    assert file.read_text() == SHOP


def test_a_dry_run_writes_nothing(world: World, file: Path) -> None:
    """Law: it needs no answer, and changes no key."""
    world.host("alpha")
    before = world.etcd.revision
    told = world.run("apply", "-f", str(file), "--dry-run")
    assert told.exit_code == 0
    assert "web2: new" in told.stdout
    assert world.etcd.revision == before


def test_an_instance_becomes_what_its_file_says(world: World, tmp_path: Path) -> None:
    """Law: keys come, change and go; lock, orders and secrets stay; other instances are not touched."""
    world.running("web1", ram="1G", spice_port="5900", power="off", spice_password="s3cret", restart_request="r1")
    world.running("web2")
    other, lock = keys_of(world, "web2"), world.etcd.data["/kvm/web1/lock"]
    (tmp_path / "web1.yaml").write_text("web1: {ram: 4G, cpus: 2}\n")
    done = world.run("apply", "-f", str(tmp_path), "--yes")
    assert "web1: changed\n  ~ ram: 1G → 4G\n  - spice_port: 5900\n  + cpus: 2\n" in done.stdout
    left = {"host": "alpha", "power": "off", "spice_password": "s3cret", "restart_request": "r1"}
    assert keys_of(world, "web1") == {"ram": "4G", "cpus": "2", **left}
    assert (keys_of(world, "web2"), world.etcd.data["/kvm/web1/lock"]) == (other, lock)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("web1: {host: alpha, ram: lots}", "web1: ram: found 'lots'"),
        ("web1: {host: alpha, rma: 1G}", "did you mean ram?"),
        ("web1: {host: alpha, ram: 1G, lock: mine}", "lock"),
        ("web1: {host: alpah, ram: 1G}", "did you mean alpha?"),
        (".images: {debian: not-a-url}", ".images: debian: "),
    ],
)
def test_one_bad_part_keeps_all_from_being_written(world: World, tmp_path: Path, text: str, said: str) -> None:
    """Law: all is looked at before anything is written; the line and the mistake are named."""
    world.host("alpha")
    before = world.etcd.revision
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text("web9: {host: alpha, ram: 1G}")
    for more in ("--yes", "--dry-run"):
        refused = world.run("apply", "-f", str(tmp_path), more)
        assert refused.exit_code == 1
        assert "nothing was written" in refused.stderr
        assert said in refused.stderr
    assert world.etcd.revision == before


def test_no_file_writes_a_lock(world: World, tmp_path: Path) -> None:
    """Law: not even with --force."""
    world.running("web1")
    lock = world.etcd.data["/kvm/web1/lock"]
    (tmp_path / "a.yaml").write_text("web1: {host: alpha, ram: 2G, lock: mine}")
    refused = world.run("apply", "-f", str(tmp_path), "--yes", "--force")
    assert refused.exit_code == 1
    assert "is the lock of web1" in refused.stderr
    assert world.etcd.data["/kvm/web1/lock"] == lock


def test_prune_needs_a_label(world: World, file: Path) -> None:
    """Law: what has the label and is in no file goes, after a question; nothing else; files without it are refused."""
    world.host("alpha")
    for name, team in (("web3", "shop"), ("db1", "data")):
        world.keys(name, host="alpha", ram="1G", **{"x-team": team})
    world.keys("old", host="alpha", ram="1G")
    assert world.run("apply", "-f", str(file), "--prune", "--yes").exit_code == 2
    assert world.run("apply", "-f", str(file), "-l", "x-team=shop", "--yes").exit_code == 2
    wrong = world.run("apply", "-f", str(file), "--prune", "-l", "x-team=data", "--yes")
    assert wrong.exit_code == 1
    assert "has not x-team=data" in wrong.stderr
    done = world.run("apply", "-f", str(file), "--prune", "-l", "x-team=shop", "--yes")
    assert done.exit_code == 0, done.output
    assert "web3: removed; its guest is shut down" in done.stdout
    assert keys_of(world, "web3") == {}
    assert keys_of(world, "db1")
    assert keys_of(world, "old")


@pytest.mark.parametrize("text", ["", "# nothing\n", ".x-web: {ram: 1G}\n"])
def test_files_without_an_instance_prune_nothing(world: World, tmp_path: Path, text: str) -> None:
    """Law: a template that came to nothing, or an empty folder, removes no machine."""
    world.keys("web3", host="alpha", ram="1G", **{"x-team": "shop"})
    (tmp_path / "shop.yaml").write_text(text)
    (tmp_path / "none").mkdir()
    for name in ("shop.yaml", "none"):
        refused = world.run("apply", "-f", str(tmp_path / name), "--prune", "-l", "x-team=shop", "--yes")
        assert refused.exit_code == 1
        assert "nothing was written" in refused.stderr
    assert keys_of(world, "web3")


def test_without_a_terminal_the_word_is_needed(world: World, file: Path) -> None:
    """Law: a job that forgets --yes changes nothing."""
    world.host("alpha")
    assert world.run("apply", "-f", str(file)).exit_code == 2
    assert keys_of(world, "web1") == {}


def test_addresses_are_chosen_once(world: World, tmp_path: Path) -> None:
    """Law: `mac: auto` writes an address, which the next time stays."""
    world.host("alpha")
    (tmp_path / "a.yaml").write_text("web1: {host: alpha, ram: 1G, mac: auto, bridge: br0}")
    assert world.run("apply", "-f", str(tmp_path), "--yes").exit_code == 0
    mac = world.value("web1", "mac")
    assert mac is not None
    assert re.fullmatch("[0-9a-f]2(:[0-9a-f]{2}){5}", mac)
    assert "1 is as the files say" in world.run("apply", "-f", str(tmp_path), "--yes").stderr
    assert world.value("web1", "mac") == mac


def test_user_data_lies_beside_its_file(world: World, tmp_path: Path) -> None:
    """Law: `@FILE` is meant as seen from the file where it stands."""
    world.host("alpha")
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "web1").write_text("#cloud-config\nhostname: one\n")
    (tmp_path / "a.yaml").write_text("web1: {host: alpha, ram: 1G, user-data: '@seeds/web1'}")
    done = world.run("apply", "-f", str(tmp_path / "a.yaml"), "--yes")
    assert done.exit_code == 0, done.output
    assert "hostname" not in done.output
    assert world.value("web1", "user-data") == "#cloud-config\nhostname: one\n"


def test_the_image_library_is_written_first(world: World, tmp_path: Path) -> None:
    """Law: an image and the disk that is made of it are one file; images that no file names stay."""
    world.host("alpha")
    entry = f"https://example.org/debian.qcow2 sha256={'a' * 64}"
    world.etcd.write("/kvm/.images/old", entry)
    disk = "disk/0: 'file:web1.qcow2 from=debian size=9G'"
    (tmp_path / "a.yaml").write_text(f".images: {{debian: {entry}}}\nweb1: {{host: alpha, ram: 1G, {disk}}}\n")
    done = world.run("apply", "-f", str(tmp_path), "--yes")
    assert done.exit_code == 0, done.output
    assert done.stdout.index("image debian is written") < done.stdout.index("web1 is written")
    assert world.etcd.data["/kvm/.images/debian"].decode() == entry
    assert "/kvm/.images/old" in world.etcd.data
    assert "2 are as the files say" in world.run("apply", "-f", str(tmp_path), "--yes").stderr


def test_another_writer_is_not_written_over(
    world: World, tmp_path: Path, acting: Callable[[Callable[[str], None]], None]
) -> None:
    """Law: who was removed between the question and the write stays removed, and the others are written."""
    world.running("web1")
    world.running("web2")
    (tmp_path / "a.yaml").write_text("web1: {ram: 4G}\nweb2: {ram: 4G}\n")
    writes = iter(["first"])

    def remove(call: str) -> None:
        if call == "txn" and next(writes, None) is not None:
            world.etcd.erase("/kvm/web1/host", "/kvm/web1/ram")

    acting(remove)
    done = world.run("apply", "-f", str(tmp_path), "--yes")
    assert done.exit_code == 1
    assert keys_of(world, "web1") == {}
    assert keys_of(world, "web2")["ram"] == "4G"


# --- export ---------------------------------------------------------------------------------------------------


def test_what_is_exported_is_as_it_is(world: World, tmp_path: Path) -> None:
    """Law: a file of all that there is differs in nothing, and secrets are in it for --secrets only."""
    world.running("web2", description="on\nand on", **{"x-note": "0123", "spice_password": "s3cret"})
    world.running("web10", **{"user-data": "#cloud-config\nhostname: ten\n", "restart_request": "r"})
    world.etcd.write("/kvm/.images/debian", f"https://example.org/d.raw sha256={'a' * 64}")
    world.etcd.write("/kvmsupervisor/placements/web2", "{}")
    told = world.run("export")
    assert told.exit_code == 0
    assert "s3cret" not in told.stdout
    assert "restart_request" not in told.stdout
    assert "spice_password left out" in told.stderr
    assert told.stdout.index(".images") < told.stdout.index("web2:") < told.stdout.index("web10:")
    for more in ((), ("--secrets",)):
        (tmp_path / "all.yaml").write_text(world.run("export", *more).stdout)
        again = world.run("apply", "-f", str(tmp_path / "all.yaml"), "--dry-run")
        assert (again.exit_code, again.stdout) == (0, ""), again.output
    assert "s3cret" in world.run("export", "web2", "--secrets").stdout


def test_what_is_no_text_is_told(world: World) -> None:
    """Law: nothing is lost in silence."""
    world.running("web1")
    world.etcd.write("/kvm/web1/x-raw", b"\xff\xfe")
    told = world.run("export", "web1")
    assert told.exit_code == 1
    assert "web1/x-raw" in told.stderr
    assert "ram: 1G" in told.stdout


def test_export_chooses(world: World) -> None:
    """Law: ids, patterns and labels, as elsewhere; nobody by that name is told."""
    for name, team in (("web1", "shop"), ("web2", "shop"), ("db1", "data")):
        world.keys(name, host="alpha", ram="1G", **{"x-team": team})
    world.status("gone", "alpha", Phase.STOPPED)
    assert "db1" not in world.run("export", "web*").stdout
    assert "db1" not in world.run("export", "-l", "x-team=shop").stdout
    assert "gone" not in world.run("export").stdout
    assert world.run("export", "wbe1").exit_code == 1


def test_the_schema_names_every_key(world: World) -> None:
    """Law: editors know what `apply` knows."""
    schema = json.loads(world.run("apply", "--schema").stdout)
    (instance,) = (found for found in schema["patternProperties"].values() if isinstance(found, dict))
    assert all(is_known(name.encode()) for name in instance["properties"])
    assert set(WISH_KEYS) <= instance["properties"].keys()
    assert all("anyOf" in instance["properties"][name] for name in CLOSED)
