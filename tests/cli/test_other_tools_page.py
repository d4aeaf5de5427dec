"""docs/other-tools.md: its commands do what it says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import World
from tests.support.cluster import Keys
from tests.support.etcd import EtcdServer
from tests.support.pages import DOCS, commands

PAGE = "docs/other-tools.md"


@pytest.fixture
def keys() -> Iterator[Keys]:
    with EtcdServer() as etcd:
        yield Keys(etcd)


def test_etcd_by_curl(keys: Keys) -> None:
    """Law: what is written is the key, and what is read is the status."""
    *_, put, read = commands(PAGE, "curl")
    keys.write("/kvmsupervisor/instances/web1", "{}")
    for command in (put, read):
        there = command.replace("http://127.0.0.1:2379", keys.etcd.endpoints[0])
        done = subprocess.run(["/bin/sh", "-c", there], capture_output=True, text=True, check=True, env=os.environ)
        assert '"header"' in done.stdout, done
    assert keys.get("/kvm/web1/power") == b"off"
    assert '"kvs"' in done.stdout


def test_the_playbook(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: its command is understood, and what it takes for a change is said for a change only."""
    page = (DOCS.parent / PAGE).read_text()
    (play,) = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0])
    first, second = play["tasks"]
    _, *words = first["ansible.builtin.command"]["argv"]
    monkeypatch.chdir(tmp_path)
    Path("machines.yaml").write_text("web1: {host: alpha, ram: 2G, power: on, mac: 52:54:00:12:34:56}\n")
    world.host("alpha")
    said = [world.run(*words) for _ in range(2)]
    assert [(one.exit_code, "is written" in one.stdout) for one in said] == [(0, True), (0, False)]
    _, command, *_ = second["ansible.builtin.command"].split()
    (listed,) = world.json(command)
    assert {"id", "phase"} <= listed.keys()
