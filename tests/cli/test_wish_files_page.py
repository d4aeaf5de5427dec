"""docs/wish-files.md, done as it is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from kvmsupervisor.cli.wish_files.reading import read_files
from tests.cli.conftest import World
from tests.support.pages import DOCS, commands

PAGE = "docs/wish-files.md"


def printed(kind: str, number: int) -> str:
    """A block of the page."""
    page = (DOCS / "wish-files.md").read_text()
    return str(re.findall(rf"^```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[number])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(world: World, command: str, **more: object) -> str:
    """Do a command of the page, with what it writes to a file; return what it prints."""
    words, _, target = command.removeprefix("kvmsupervisor ").partition(" >")
    done = world.run(*shlex.split(words), **more)  # type: ignore[arg-type]
    assert done.exit_code == 0, done.output
    if target:
        Path(target).write_text(done.stdout)
    return done.output


def test_the_page_s_own_file(folder: Path) -> None:
    """Its example is understood, and is what it says."""
    (folder / "web1.yaml").write_text("#cloud-config\n")
    (folder / "shop.yml").write_text(printed("yaml", 0))
    wanted = read_files(["shop.yml"])
    assert set(wanted.instances["web1"]) == {"ram", "bridge", "x-team", "host", "mac", "disk/0", "user-data"}  # type: ignore[index]
    assert set(wanted.images) == {"noble"}


def test_its_commands(world: World, folder: Path) -> None:
    """Export, no difference; a change is shown as printed; what is in no file any more goes."""
    world.host("alpha")
    export, dry_run = commands(PAGE, "Begin with what there is")
    for number in range(2, 14):
        world.running(f"web{number}", **{"x-team": "shop"})
    world.running("web1", ram="2G", spice_port="5900", **{"x-team": "shop"})
    do(world, export)
    assert "13 are as the files say" in do(world, dry_run)
    file = folder / "machines.yaml"
    file.write_text(file.read_text().replace("ram: 2G", "ram: 4G").replace("  spice_port: '5900'\n", ""))
    block = printed("console", 1)
    (change,) = commands(PAGE, "Change something")
    told = do(world, change, input_text="y\n", asked=True)
    assert [line.rstrip() for line in told.splitlines() if line] == block.splitlines()[1:]
    kept = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key != "web3"}
    file.write_text(yaml.safe_dump(kept))
    (prune,) = commands(PAGE, "Remove what is in no file any more")
    told = do(world, prune, input_text="y\n", asked=True)
    for line in printed("console", 2).splitlines()[1:]:
        assert line in told
    assert world.value("web3", "host") is None
    assert world.value("web2", "host") == "alpha"


def test_the_job(world: World, folder: Path) -> None:
    """The job's own command, on a folder; the second run writes nothing."""
    (command,) = yaml.safe_load(printed("yaml", 1))["apply"]["script"]
    world.host("alpha")
    (folder / "machines").mkdir()
    (folder / "machines" / "web1.yaml").write_text("web1: {host: alpha, ram: 1G, x-team: shop}\n")
    do(world, command)
    revision = world.etcd.revision
    do(world, command)
    assert world.etcd.revision == revision
