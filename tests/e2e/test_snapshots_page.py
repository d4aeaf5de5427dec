"""docs/snapshots.md and docs/clones.md by their commands as they are printed, on a real Ceph."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator

import pytest

from kvmsupervisor.domain.status import Phase
from tests.support.ceph import POOL, CephError
from tests.support.cluster import Host, eventually
from tests.support.etcd import free_port
from tests.support.farm import Farm
from tests.support.pages import commands
from tests.support.rbd_qemu import WRITES_PER_S

TIMEOUT = ("--timeout", "120")


@pytest.fixture
def node(farm: Farm) -> Iterator[Host]:
    """The host of the pages, with the machine of the pages, whose guest writes."""
    assert POOL == "rbd", "the pages name that pool"
    farm.ceph.rbd("rename", farm.image.name, f"{POOL}/web1")
    host = farm.host("node1")
    wishes = {"mac": "02:00:00:00:00:01", "bridge": ":user", "forward": f"tcp:127.0.0.1:{free_port()}:22"}
    farm.keys.machines("node1", "web1", ram=16, rbd=f"{POOL}/web1 iops={WRITES_PER_S}", **wishes)
    host.wait_running("web1")
    yield host
    host.close()
    for name in ("web4", "web3", "web2", "web1"):
        eventually(f"{name} to be free", lambda name=name: _removed(farm, name), poll_s=1)  # type: ignore[misc]


def _removed(farm: Farm, name: str) -> bool:
    try:
        for snap in json.loads(farm.ceph.rbd("snap", "ls", f"{POOL}/{name}", "--format", "json")):
            if snap["protected"] == "true":
                farm.ceph.rbd("snap", "unprotect", f"{POOL}/{name}@{snap['name']}")
            farm.ceph.rbd("snap", "rm", f"{POOL}/{name}@{snap['name']}")
        farm.ceph.rbd("rm", f"{POOL}/{name}")
    except CephError as error:
        return "No such file" in str(error)
    return True


def typed(host: Host, command: str) -> str:
    """Do what a page prints; what it answers."""
    program, *words = shlex.split(command)
    if program == "etcdctl":
        _, key, value = words
        host.keys.write(f"{host.keys.layout.prefix}{key.removeprefix('/kvm')}", value)
        return ""
    done = host.cli(*words, *(TIMEOUT if "--wait" in words else ()))
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def test_the_shortest_way(node: Host) -> None:
    """Taken, listed, rolled back to, taken away: each command does what it says, and waits for it."""
    create, listing, *rest = commands("docs/snapshots.md", "The shortest way")
    assert "before-upgrade taken" in typed(node, create)
    (row,) = [line for line in typed(node, listing).splitlines() if "before-upgrade" in line]
    assert row.split()[0] == "web1"
    assert row.endswith("Debian 13")
    stop, rollback, start, delete = rest
    typed(node, stop)
    assert "rolled back to before-upgrade" in typed(node, rollback)
    assert "running on node1" in typed(node, start)
    assert "before-upgrade deleted" in typed(node, delete)
    assert "before-upgrade" not in typed(node, listing)


def test_clones(node: Host) -> None:
    """Both clones run, by other addresses; so does the one that is made by hand."""
    typed(node, commands("docs/snapshots.md", "The shortest way")[0])
    for command in commands("docs/clones.md", "Clones of machines")[:2]:
        assert "running on node1" in typed(node, command)
    for command in commands("docs/clones.md", "By hand"):
        typed(node, command)
    node.wait_running("web1", "web2", "web3", "web4")
    keys = node.keys
    macs = [keys.get(keys.layout.wish_key(node.status(name).id, "mac")) for name in ("web1", "web2", "web3")]  # type: ignore[union-attr, arg-type]
    assert len({*macs}) == 3
    assert None not in macs
    assert keys.names(f"{keys.layout.prefix}/web2/forward") == []
    assert keys.get(f"{keys.layout.prefix}/web3/cpus") == b"2"
    parents = {name: "parent" in json.loads(_info(node, name)) for name in ("web2", "web3", "web4")}
    assert parents == {"web2": True, "web3": False, "web4": True}
    for name in ("web2", "web3", "web4"):
        keys.put(name, power="off")
        node.wait_for(name, lambda s: s.phase is Phase.STOPPED)


def _info(node: Host, name: str) -> str:
    conf = node.settings["CEPH_CONF"]
    words = ["rbd", "--conf", conf, "--id", "vm", "info", f"{POOL}/{name}", "--format", "json"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
