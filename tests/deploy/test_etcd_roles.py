"""config/etcd-roles on a real etcd: what each may do is enough, and no more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from kvmsupervisor.adapters.etcd import Delete, Etcd, EtcdConfig, Put
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.lock import Lock, LockState, Storage
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Keys
from tests.support.etcd import EtcdServer, Tls

SCRIPT = Path(__file__).resolve().parents[2] / "config" / "etcd-roles"
MAKE_CERTIFICATES = SCRIPT.parents[1] / "deploy" / "coreos" / "make-certificates"
LOCK = "/kvmsupervisor/locks/%i"
USERS = ("root", "supervisor", "operator")


class Secured:
    """An etcd with users, whose passwords are their names twice, in files of `folder`."""

    def __init__(self, etcd: EtcdServer, folder: Path) -> None:
        self.etcd = etcd
        self.folder = folder
        for user in USERS:
            (folder / user).write_text(f"{user}{user}\n")

    def set_up(self, **environment: str) -> None:
        base = {"PATH": os.environ["PATH"], "ETCDCTL_ENDPOINTS": self.etcd.endpoint}
        subprocess.run([SCRIPT, self.folder], env=base | environment, check=True, capture_output=True, text=True)

    def put(self, user: str, key: str, value: str = "x") -> None:
        self.etcd.ctl("put", key, value, user=f"{user}:{user}{user}")

    async def instead(self, user: str, old: Iterable[str], new: Mapping[str, str]) -> int:
        """As this user, delete keys and write others in one transaction; return its revision."""
        config = EtcdConfig(
            endpoints=self.etcd.endpoints, username=user, password_file=self.folder / user, call_timeout_s=30.0
        )
        etcd = Etcd(config)
        try:
            gone = [Delete(key) for key in old if key not in new]
            return (await etcd.txn([], [*gone, *(Put(key, value.encode()) for key, value in new.items())])).revision
        finally:
            await etcd.close()

    def refused(self, user: str, *args: str) -> None:
        with pytest.raises(AssertionError, match="permission denied"):
            self.etcd.ctl(*args, user=f"{user}:{user}{user}")

    def host(self, user: str, name: str = "alpha", **settings: str) -> Host:
        access = {"ETCD_USERNAME": user, "ETCD_PASSWORD_FILE": str(self.folder / user), "LOCK": LOCK}
        return Host(Keys(self.etcd), name, run_dir=None, **access, **settings)

    def get(self, key: str) -> str:
        return self.etcd.ctl("get", "--print-value-only", key, user="root:rootroot").strip()


@pytest.fixture
def secured(etcd_alone: EtcdServer, tmp_path: Path) -> Secured:
    return Secured(etcd_alone, tmp_path)


def test_each_may_do_its_part_and_no_more(secured: Secured, tiny: str) -> None:
    """Law: people write wishes, hosts run them and write facts and locks, and neither can write the other's."""
    secured.set_up()
    with secured.host("supervisor") as host, secured.host("operator") as people:
        host.start()
        made = people.cli(
            "create", "one", "host=alpha", "ram=16", "shutdown_timeout=0", f"extra_flags={tiny}", "--wait"
        )
        assert made.returncode == 0, made.stderr
        assert host.wait_for("one", Phase.RUNNING).pid is not None
        assert "one" in people.cli("list").stdout
        assert "running" in people.cli("events", "one").stdout
        assert people.cli("stop", "one", "--wait").returncode == 0
        assert people.cli("delete", "one", "--yes", "--wait").returncode == 0
        host.wait_forgotten("one")
    secured.refused("supervisor", "put", "/kvm/one/host", "alpha")
    secured.refused("supervisor", "put", "/kvm/.hosts/alpha/drain", "live")
    secured.put("operator", "/kvm/.hosts/alpha/drain", "live")
    secured.put("supervisor", "/kvmsupervisor/drains/alpha")
    secured.refused("operator", "put", "/kvmsupervisor/drains/alpha", "x")
    secured.refused("operator", "put", "/kvmsupervisor/locks/one", "x")
    secured.refused("operator", "put", "/kvmsupervisor/instances/one", "x")
    secured.refused("operator", "put", "/kvmsupervisor/events/one", "x")
    secured.refused("operator", "put", "/kvmsupervisor/hosts/alpha", "x")
    secured.put("operator", "/kvmsupervisor/confirm-removal/alpha", "[]")
    for user in ("supervisor", "operator"):
        secured.refused(user, "get", "/elsewhere")
        secured.refused(user, "user", "list")


def test_failover_needs_no_more(secured: Secured, tiny: str) -> None:
    """Law 10: with exactly these roles a machine is taken over by itself, comes home, and leaves nothing behind."""
    secured.set_up()
    fast = {"KVM_SESSION_TTL": "2", "KVM_SHUTDOWN_TIMEOUT": "1"}
    with (
        secured.host("supervisor", "alpha", **fast) as alpha,
        secured.host("supervisor", "beta", **fast) as beta,
        secured.host("operator") as people,
    ):
        alpha.start()
        beta.start()
        wishes = ("host=alpha", "hosts=alpha beta", "ram=16", "shutdown_timeout=0", f"extra_flags={tiny}")
        made = people.cli("create", "one", *wishes, "--wait")
        assert made.returncode == 0, made.stderr
        alpha.kill9()
        for qemu in alpha.qemus():
            qemu.kill()
        beta.wait_running("one")
        assert beta.wait_for("one", lambda s: s.placed_for == "alpha").phase is Phase.RUNNING
        assert secured.get("/kvm/one/host") == "alpha"
        assert "beta (for alpha)" in people.cli("list").stdout
        alpha.start()
        back = people.cli("set", "one", "host=alpha", "--wait")
        assert back.returncode == 0, back.stderr
        alpha.wait_running("one")
        assert secured.get("/kvmsupervisor/placements/one") == ""
        assert not [line for line in beta.log.splitlines() + alpha.log.splitlines() if "permission denied" in line]
    # People may take a placement away.
    secured.put("operator", "/kvmsupervisor/placements/two", "?")


def test_the_default_lock_needs_the_wishes_prefix(secured: Secured) -> None:
    """Law: KEEP_LOCK=1 lets supervisors write below the wishes, and only that makes the default LOCK work."""
    secured.set_up(KEEP_LOCK="1")
    secured.put("supervisor", "/kvm/one/lock")


def test_it_can_be_called_again(secured: Secured) -> None:
    """Law: what is there already is kept, a password that was changed too."""
    secured.set_up()
    environment = {"ETCDCTL_USER": "root:rootroot"}
    secured.set_up(**environment)
    secured.put("operator", "/kvm/one/ram", "1G")


def test_who_looks_and_who_breaks(secured: Secured) -> None:
    """Law: a reader sees all and writes nothing; an operator breaks a lock with the role breaker, and only with it."""
    secured.set_up()

    def as_root(*args: str) -> None:
        secured.etcd.ctl(*args, user="root:rootroot")

    as_root("user", "add", "reader:readerreader")
    as_root("user", "grant-role", "reader", "reader")
    (secured.folder / "reader").write_text("readerreader\n")
    held = Lock(
        host=HostName("beta"),
        boot_id="b",
        epoch=3,
        state=LockState.RUNNING,
        incarnation="i3",
        storage=Storage.UNFENCEABLE,
    )
    as_root("put", "/kvmsupervisor/locks/one", held.to_json().decode())
    secured.put("operator", "/kvm/one/host", "alpha")
    with secured.host("reader") as looker, secured.host("operator") as people:
        listed = looker.cli("list")
        assert listed.returncode == 0, listed.stderr
        assert "one" in listed.stdout
        for key in ("/kvm/one/host", "/kvmsupervisor/locks/one", "/kvmsupervisor/hosts/x"):
            secured.refused("reader", "put", key, "x")
        refused = people.cli("break-lock", "one", "--yes")
        assert refused.returncode != 0
        assert "permission denied" in refused.stderr
        as_root("user", "grant-role", "operator", "breaker")
        done = people.cli("break-lock", "one", "--yes")
        assert done.returncode == 0, done.stderr
    secured.refused("operator", "put", "/kvmsupervisor/instances/one", "x")


def test_certificates_tell_who_comes(tmp_path: Path, tiny: str) -> None:
    """Law: with the certificates of make-certificates and no password, each user is who its certificate says."""
    folder = tmp_path / "tls"
    subprocess.run([MAKE_CERTIFICATES, folder, "node1=10.0.0.11"], check=True)
    tls = Tls(
        ca=folder / "ca.pem",
        cert=folder / "node1.pem",
        key=folder / "node1-key.pem",
        client_cert=folder / "root.pem",
        client_key=folder / "root-key.pem",
    )

    def settings(user: str) -> dict[str, str]:
        return {
            "ETCD_CACERT": str(folder / "ca.pem"),
            "ETCD_CERT": str(folder / f"{user}.pem"),
            "ETCD_KEY": str(folder / f"{user}-key.pem"),
        }

    with EtcdServer(tls=tls) as etcd:
        environment = {
            "PATH": os.environ["PATH"],
            "ETCDCTL_ENDPOINTS": etcd.endpoint,
            "ETCDCTL_CACERT": str(tls.ca),
            "ETCDCTL_CERT": str(tls.client_cert),
            "ETCDCTL_KEY": str(tls.client_key),
        }
        subprocess.run([SCRIPT], env=environment, check=True, capture_output=True, text=True)
        keys = Keys(etcd)
        with (
            Host(keys, run_dir=None, LOCK=LOCK, **settings("supervisor")) as host,
            Host(keys, run_dir=None, LOCK=LOCK, **settings("operator")) as people,
        ):
            host.start()
            wishes = ("host=alpha", "ram=16", "shutdown_timeout=0", f"extra_flags={tiny}")
            made = people.cli("create", "one", *wishes, "--wait")
            assert made.returncode == 0, made.stderr
            denied = host.cli("set", "one", "x-note=mine")
            assert denied.returncode != 0
            assert "permission denied" in denied.stderr
