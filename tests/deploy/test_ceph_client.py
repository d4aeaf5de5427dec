"""config/ceph-client on a real Ceph: the capabilities that the supervisor's own tests are run with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.support.ceph import CLIENT_CAPS, POOL, Ceph

SCRIPT = Path(__file__).resolve().parents[2] / "config" / "ceph-client"


def made(ceph: Ceph, *args: str) -> str:
    environment = {"PATH": os.environ["PATH"], "CEPH_CONF": str(ceph.conf)}
    return subprocess.run([SCRIPT, *args], env=environment, check=True, capture_output=True, text=True).stdout


def test_it_gives_what_is_needed_and_can_be_called_again(ceph: Ceph) -> None:
    """Law: the capabilities are those that the tests of fencing hold to be enough; the key stays when pools change."""
    keyring = made(ceph)
    assert keyring.startswith("[client.kvm]\n\tkey = ")
    (found,) = json.loads(ceph.ceph("auth", "get", "client.kvm", "--format", "json"))
    assert found["caps"] == CLIENT_CAPS
    assert made(ceph, "kvm", POOL, "other") == keyring
    (found,) = json.loads(ceph.ceph("auth", "get", "client.kvm", "--format", "json"))
    assert found["caps"] == CLIENT_CAPS | {"osd": f"profile rbd pool={POOL}, profile rbd pool=other"}
    (ceph.folder / "client.kvm.keyring").write_text(keyring)
    assert ceph.rbd("ls", POOL, name="kvm") is not None
