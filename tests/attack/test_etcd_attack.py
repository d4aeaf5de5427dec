"""An operator who may write the keys of one instance only, on a real etcd with users: what that does to others."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase, Status
from tests.attack.test_ceph_attack import MAKE_CLIENT, VICTIM
from tests.deploy.test_etcd_roles import Secured
from tests.support.ceph import CLIENT_CAPS, POOL, Ceph
from tests.support.cluster import Host, Keys, eventually
from tests.support.etcd import EtcdServer

MALLORY, MINE = "mallory", "web1"
OTHERS = ("web", "web10", "web2")
"""Ids that `web1` begins with, and that begin with it."""

ELSEWHERE = (
    *(f"/kvm/{other}/{key}" for other in OTHERS for key in ("host", "power", "extra_flags", "lock")),
    *("/kvm/web1", "/kvm/web1.", "/kvm/web10", "/kvm/.images/debian", "/kvm/.hosts/alpha/drain", "/kvm/web1x/host"),
    *("/kvmsupervisor/locks/web1", "/kvmsupervisor/locks/web", "/kvmsupervisor/placements/web1"),
    *("/kvmsupervisor/placements/web", "/kvmsupervisor/instances/web", "/kvmsupervisor/hosts/alpha"),
    *("/kvmsupervisor/clients/web", "/kvmsupervisor/history", "/kvmsupervisor/confirm-removal/alpha"),
)
"""Keys that this operator may not write."""


def forged(clients: tuple[str, ...] = (VICTIM,)) -> str:
    lock = Lock(
        host=HostName("gone"), boot_id="b", epoch=9, state=LockState.RUNNING, incarnation="i9", pid=1, starttime=1,
        clients=clients, fence=clients, storage=Storage.RBD,
    )  # fmt: skip
    return lock.to_json().decode()


def attacks(victim_pid: int) -> Iterator[Mapping[str, str]]:
    """What is written below `/kvm/web1/`, one after the other."""
    yield from ({"host": value} for value in ("beta", "web", "alpha\0", "ä" * 300, "*", "../alpha"))
    yield {"hosts": "alpha *"}
    yield {"lock": forged()}
    yield {"placement": '{"host": "beta"}'}
    yield {"drain": "stop"}
    yield from ({"power": value} for value in ("off-now", "off", "maybe", "on"))
    yield from ({"restart_request": value} for value in ("now:web", "reset:1", "../web", "x" * 100_000))
    yield {"priority": "1000000"}
    yield {"shutdown_timeout": "0"}
    yield from (
        {"extra_flags": value}
        for value in (
            "-name web",
            f"-pidfile /proc/{victim_pid}/mem",
            "-qmp unix:{run}/web/qmp.sock,server=on,wait=off",
            "-drive file={run}/web/incarnation.json,format=raw,if=none,id=x",
            "-fw_cfg name=opt/x,file={run}/web/incarnation.json",
            "-incoming tcp:127.0.0.1:{port}",
            "-chardev file,id=x,path={run}/_supervisor.lock",
            "-daemonize",
            "-runas root",
            "-readconfig {run}/web/incarnation.json",
            "'unbalanced",
        )
    )
    yield {"cloud-config": "file:///etc/shadow"}
    yield {"cloud-config": "http://127.0.0.1:{port}/"}
    yield {"user-data": "#cloud-config\n" + "x" * 900_000}
    yield {"cdrom": "file:../../web.iso"}
    yield {"disk/1": "file:../web.qcow2 size=1G"}
    yield {"disk/1": "rbd/--id=admin"}
    yield {"from": "rbd/web/disk@s"}
    yield {"mac": "52:54:00:00:00:01", "bridge": "; reboot"}
    yield {"spice_port": "{port}"}
    yield {"ram": "99999999999999999999G"}
    yield {"cpus": "100000"}
    yield {"firmware": "uefi", "machine": "../web"}
    yield {"../web/power": "off", "//power": "off", "\x01": "x", "web/power": "off", "": "x"}
    yield {f"x-{number}": "x" * 1000 for number in range(30)}


def test_one_instances_operator_harms_nobody(etcd_alone: EtcdServer, tmp_path: Path, tiny: str) -> None:
    """Law 10, B9: key by key, with etcd's roles and locks outside the wishes, no other machine is touched."""
    secured = Secured(etcd_alone, tmp_path)
    secured.set_up()
    (tmp_path / MALLORY).write_text(f"{MALLORY}{MALLORY}\n")
    for words in (
        ("user", "add", f"{MALLORY}:{MALLORY}{MALLORY}"),
        ("role", "add", MALLORY),
        ("role", "grant-permission", "--prefix=true", MALLORY, "readwrite", f"/kvm/{MINE}/"),
        ("user", "grant-role", MALLORY, MALLORY),
    ):
        secured.etcd.ctl(*words, user="root:rootroot")
    for key in ELSEWHERE:
        secured.refused(MALLORY, "put", key, "x")
        secured.refused(MALLORY, "del", key)
    secured.refused(MALLORY, "del", "--prefix", "/kvm/")
    secured.refused(MALLORY, "get", "--prefix", "/kvm/")
    with secured.host("supervisor") as host, secured.host("operator") as people:
        host.start()
        for other in OTHERS[:2]:
            wishes = ("host=alpha", "ram=16", "shutdown_timeout=0", f"extra_flags={tiny}")
            made = people.cli("create", other, *wishes, "--wait")
            assert made.returncode == 0, made.stderr
        before = {name: host.qemu(name).pid for name in OTHERS[:2]}
        port = host.environment["KVM_LISTEN"].rpartition(":")[2]
        base = {"host": "alpha", "ram": "16", "shutdown_timeout": "0", "extra_flags": tiny}
        told, run = 0, host.environment["KVM_RUN_DIR"]
        written: Mapping[str, str] = {}
        for attack in attacks(before["web"]):
            attacked = {
                f"/kvm/{MINE}/{name}": value.replace("{run}", run).replace("{port}", port)
                for name, value in (base | dict(attack)).items()
            }
            revision = asyncio.run(secured.instead(MALLORY, written, attacked))
            written = attacked
            if attack.get("host", "alpha") == "alpha":
                host.wait_for(MINE, partial(heard, revision))
            told += 1
            assert host.running
            assert {name: host.qemu(name).pid for name in before} == before, attack
        secured.etcd.ctl("del", "--prefix", f"/kvm/{MINE}/", user=f"{MALLORY}:{MALLORY}{MALLORY}")
        host.wait_forgotten(MINE)
        assert told >= 45
        assert {name: host.qemu(name).pid for name in before} == before
        statuses = host.instances()
        assert {name: statuses[name].phase for name in before} == dict.fromkeys(before, Phase.RUNNING)
        assert all(not statuses[name].problems for name in before)
        assert not host.events("instance.failed")
        assert host.ready


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    """A cluster of its own: its images and clients have names that other tests use, too."""
    with Ceph() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def guests(ceph: Ceph) -> Ceph:
    """A cluster with clients and images of two guests, and the hosts' client."""
    environment = {"PATH": os.environ["PATH"], "CEPH_CONF": str(ceph.conf)}
    ceph.new_client("vm", CLIENT_CAPS)
    for guest in (MINE, "web2"):
        words = (MAKE_CLIENT, "create", f"kvm-{guest}", f"{POOL}/{guest}")
        made = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        (ceph.folder / f"client.kvm-{guest}.keyring").write_text(made.stdout)
    ceph.rbd_create(f"{POOL}/web2/disk")
    ceph.rbd("snap", "create", f"{POOL}/web2/disk@s")
    ceph.rbd("snap", "protect", f"{POOL}/web2/disk@s")
    return ceph


def as_root(ceph: Ceph) -> dict[str, str]:
    """Settings of a host whose QEMUs read the ceph.conf of a test, in a folder of root's."""
    return {"CEPH_CONF": str(ceph.conf), "KVM_QEMU_USER": "", "KVM_EXTRA_FLAGS": "any"}


def heard(revision: int, status: Status) -> bool:
    return status.revision >= revision


def turned_away(since: int, status: Status) -> bool:
    return status.revision > since and "is not open to the guest of web1" in status.reason


def test_anothers_image_is_not_to_be_had_by_a_key(etcd_alone: EtcdServer, guests: Ceph, tiny: str) -> None:
    """Law: with clients of their own, keys that name another guest's image, or a copy of it, get nothing of it."""
    keys = Keys(etcd_alone)
    settings = as_root(guests) | {"CEPH_ID": "kvm-%i", "KVM_SUPERVISOR_CEPH_ID": "vm"}
    with Host(keys, run_dir=None, LOCK="/kvmsupervisor/locks/%i", **settings) as host:
        host.start()
        # In one transaction: one key after the other would start it for the moment before `power` is there.
        keys.machines("alpha", "web2", ram=16, rbd=f"{POOL}/web2/disk", power="off", extra_flags=tiny)
        size = json.loads(guests.rbd("info", f"{POOL}/web2/disk", "--format", "json"))["size"]
        for image in (
            f"{POOL}/web2/disk",
            f"/{POOL}/web2/disk ro",
            f"{POOL}/web2/disk size=1G",
            f"{POOL}/web2/new size=1G",
            f"{POOL}/web1/copy from={POOL}/web2/disk@s",
        ):
            before = keys.status(MINE)
            since = 0 if before is None else before.revision
            keys.put(MINE, host="alpha", ram=16, shutdown_timeout=0, rbd=image, extra_flags=tiny)
            refused = host.wait_for(MINE, partial(turned_away, since))
            assert refused.pid is None
            assert keys.lock(MINE) is None
        # Nor are snapshots taken of it, or its content thrown away.
        keys.put(MINE, power="off", rbd=f"{POOL}/web2/disk", **{"snapshot/mine": "", "rollback_request": "s:1"})
        host.wait_for(MINE, lambda status: "not permitted" in status.reason)
        snaps = json.loads(guests.rbd("snap", "ls", f"{POOL}/web2/disk", "--format", "json"))
        assert [snap["name"] for snap in snaps] == ["s"]
        found = json.loads(guests.rbd("info", f"{POOL}/web2/disk", "--format", "json"))
        assert (found["size"], guests.watchers(f"{POOL}/web2/disk"), guests.blocklist()) == (size, set(), set())
        assert json.loads(guests.rbd("ls", f"{POOL}/web1", "--format", "json")) == []
        keys.put("web2", power="on")
        assert host.wait_for("web2", Phase.RUNNING).pid is not None


def test_a_forged_lock_shuts_nobody_out(etcd_alone: EtcdServer, guests: Ceph, tiny: str) -> None:
    """B9: with the default LOCK, who writes a lock may name any client of Ceph; none is shut out, as is said."""
    keys = Keys(etcd_alone)
    settings = as_root(guests) | {"CEPH_ID": "vm", "KVM_TAKEOVER_WAIT": "1"}
    with Host(keys, run_dir=None, **settings) as host:
        host.start()
        keys.write("/kvm/one/lock", forged())
        keys.put("one", host="alpha", ram=16, shutdown_timeout=0, rbd=f"{POOL}/web2/disk", extra_flags=tiny)
        waits = host.wait_for("one", lambda status: VICTIM in status.reason)
        assert (waits.phase, waits.pid) == (Phase.WAITING, None)
        assert f"`ceph osd blocklist add {VICTIM}`" in waits.reason
        assert VICTIM not in guests.blocklist()
        # A person says so; then it is shut out for long, and the machine starts.
        guests.ceph("osd", "blocklist", "add", VICTIM)
        host.wait_running("one")
        eventually("a record", lambda: keys.get("/kvmsupervisor/clients/one"))
        lock = keys.lock("one")
        assert lock is not None
        assert replace(lock, fence=()).clients
