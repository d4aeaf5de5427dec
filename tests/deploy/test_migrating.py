"""docs/migrating.md, its commands as they stand there, on a real etcd that serves v2 and v3."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.support.cluster import Hosts, Keys, eventually
from tests.support.etcd import EtcdServer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"


def old(etcd: EtcdServer, *args: str) -> str:
    """Run etcdctl as the old units did, API 2."""
    done = subprocess.run(
        ["etcdctl", "--endpoints", etcd.endpoint, *args],
        env={"PATH": os.environ["PATH"], "ETCDCTL_API": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_keys_get_from_v2_to_v3_and_the_guest_to_the_supervisor(tiny: str, tmp_path: Path) -> None:
    """Law: the page's loop copies every wish but `host`; nothing runs until `host` is set; then it does, once."""
    with EtcdServer(args=("--enable-v2",)) as etcd:
        flags = f"-bios {tiny.removeprefix('-bios ')}"
        wishes = {"ram": "16", "mac": "52:54:00:00:00:01", "rbd": "/rbd/one", "extra_flags": flags, "x-note": "a  b"}
        for name, value in wishes.items():
            old(etcd, "set", f"/kvm/1/{name}", "--", value)
        old(etcd, "set", "/kvm/1/host", "alpha")
        old(etcd, "set", "/kvm/2/ram", "32")
        (script,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
        subprocess.run(
            ["bash", "-euc", script],
            env={"PATH": os.environ["PATH"], "OLD": etcd.endpoint, "NEW": etcd.endpoint},
            check=True,
        )
        keys = Keys(etcd)
        for name, value in wishes.items():
            assert (keys.get(f"/kvm/1/{name}") or b"").decode().strip() == value
        assert keys.get("/kvm/2/ram") == b"32\n"
        assert keys.get("/kvm/1/host") is None

        # Disk and NIC are for hosts that have Ceph and a bridge.
        keys.delete("1", "mac", "rbd")
        keys.put("1", shutdown_timeout=0)
        hosts = Hosts(keys)
        try:
            host = hosts().start()
            assert not host.qemus()
            assert "not found" in old(etcd, "get", "/kvm/2/host")
            done = host.cli("set", "1", "host=alpha", "--wait")
            assert done.returncode == 0, done.stderr
            assert len(host.qemus()) == 1

            # And back.
            assert host.cli("stop", "1", "--wait").returncode == 0
            assert host.cli("set", "1", "--unset", "host").returncode == 0
            eventually("nothing to be left", lambda: not host.qemus() and keys.lock("1") is None)
        finally:
            hosts.close()
