"""config/ceph-client on a real Ceph: the capabilities that the supervisor's own tests are run with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.ceph import CLIENT_CAPS, POOL, Ceph

SCRIPT = Path(__file__).resolve().parents[2] / "config" / "ceph-client"


def made(ceph: Ceph, *args: str) -> str:
    environment = {"PATH": os.environ["PATH"], "CEPH_CONF": str(ceph.conf)}
    return subprocess.run([SCRIPT, *args], env=environment, check=True, capture_output=True, text=True).stdout


def refused(ceph: Ceph, *args: str, **more: str) -> str:
    environment = {"PATH": os.environ["PATH"], "CEPH_CONF": str(ceph.conf)} | more
    done = subprocess.run([SCRIPT, *args], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr


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


def test_a_guests_client_is_made_shown_rotated_and_removed(ceph: Ceph) -> None:
    """Law: each verb can be repeated; `create` keeps the key, `rotate` changes nothing but the key."""
    keyring = made(ceph, "create", "kvm-web1", "rbd/web1")
    assert made(ceph, "create", "kvm-web1", "rbd/web1") == keyring
    (first,) = json.loads(ceph.ceph("auth", "get", "client.kvm-web1", "--format", "json"))
    assert first["caps"] == {
        "mon": "allow r",
        "osd": "profile rbd pool=rbd namespace=web1, profile rbd-read-only pool=rbd namespace=kvm-images",
    }
    assert first["key"] in keyring
    assert '"web1"' in ceph.rbd("namespace", "ls", POOL, "--format", "json")
    shown = made(ceph, "show", "kvm-web1")
    assert first["key"] in shown
    assert "namespace=web1" in shown
    rotated = made(ceph, "rotate", "kvm-web1")
    (second,) = json.loads(ceph.ceph("auth", "get", "client.kvm-web1", "--format", "json"))
    assert second["key"] in rotated
    assert second["key"] != first["key"]
    assert second["caps"] == first["caps"]
    # The guest of an id that the other one begins with is somebody else.
    made(ceph, "create", "kvm-web", "rbd/web")
    made(ceph, "remove", "kvm-web")
    made(ceph, "remove", "kvm-web")
    assert made(ceph, "show", "kvm-web1") != ""
    assert (
        refused(ceph, "show", "kvm-web") == "ceph-client: there is no client.kvm-web, or this caller may not see it\n"
    )


def test_the_hosts_client_is_not_made_a_guests(ceph: Ceph) -> None:
    """Law: a slip of a name takes from the hosts nothing of what they fence by."""
    made(ceph)
    for words in (("create", "kvm", "rbd/web1"), ("remove", "kvm"), ("remove", "admin")):
        assert "is no guest's client" in refused(ceph, *words)
    (found,) = json.loads(ceph.ceph("auth", "get", "client.kvm", "--format", "json"))
    assert found["caps"] == CLIENT_CAPS


@pytest.mark.parametrize(
    "words",
    [
        ("create", "kvm-web1"),
        ("create",),
        ("create", "kvm-web1", "rbd/"),
        ("create", "kvm-web1", "rbd/a/b"),
        ("create", "kvm-web1", "rbd/kvm-images"),
        ("create", "kvm-web1", "rbd/a,profile rbd"),
        ("create", "client.kvm-web1", "rbd/web1"),
        ("show", "a", "b"),
        ("rotate", "-i"),
    ],
)
def test_words_that_are_no_names_change_nothing(ceph: Ceph, words: tuple[str, ...]) -> None:
    """Law: what is not exactly a name is refused before Ceph is asked."""
    before = ceph.ceph("auth", "ls")
    assert refused(ceph, *words).startswith("ceph-client: ")
    assert ceph.ceph("auth", "ls") == before


def test_a_key_type_is_handed_on(ceph: Ceph, tmp_path: Path) -> None:
    """Law: KEY_TYPE reaches a Ceph that knows types; one that does not says so, and the old key stays."""
    tool = tmp_path / "ceph"
    tool.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/said\nexit 0\n')
    tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KEY_TYPE": "aes256k"}
    subprocess.run([SCRIPT, "rotate", "kvm-web1"], env=environment, check=True, capture_output=True)
    assert "auth rotate client.kvm-web1 --key-type=aes256k" in (tmp_path / "said").read_text()
    made(ceph, "create", "kvm-typed", "rbd/typed")
    before = made(ceph, "show", "kvm-typed")
    assert "19.2.6" in refused(ceph, "rotate", "kvm-typed", KEY_TYPE="aes256k")
    assert made(ceph, "show", "kvm-typed") == before
