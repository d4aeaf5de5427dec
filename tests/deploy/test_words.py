"""The scripts in config/: a word that would mean more than a name is refused before anything is asked of a server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvmsupervisor.config import values as setting_values
from kvmsupervisor.domain.values import Unfit

CONFIG = Path(__file__).resolve().parents[2] / "config"


class Script:
    """One of them, with a program on PATH that writes down what it was asked, one word a line."""

    def __init__(self, name: str, program: str, folder: Path) -> None:
        self._script = CONFIG / name
        self._folder = folder
        fake = folder / program
        fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>{folder}/asked\n')
        fake.chmod(0o755)

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self._folder}:{os.environ['PATH']}"
        return subprocess.run(
            [self._script, *args], env={"PATH": path, **environment}, capture_output=True, text=True, check=False
        )

    @property
    def asked(self) -> list[str]:
        """The words of all calls."""
        log = self._folder / "asked"
        return log.read_text().splitlines() if log.exists() else []

    def refuses(self, told: str, *args: str, **environment: str) -> None:
        done = self.run(*args, **environment)
        assert done.returncode == 2, done
        assert told in done.stderr
        assert self.asked == []


@pytest.fixture
def ceph_client(tmp_path: Path) -> Script:
    return Script("ceph-client", "ceph", tmp_path)


@pytest.fixture
def etcd_roles(tmp_path: Path) -> Script:
    return Script("etcd-roles", "etcdctl", tmp_path)


NO_NAMES = ["", "-x", "--help", "a b", "a,b", "a, allow *", 'a"b', "a'b", "a\nb", "a=b", "a/b", "é", "*"]


@pytest.mark.parametrize("word", NO_NAMES)
def test_a_name_of_ceph_is_a_name(ceph_client: Script, word: str) -> None:
    """Law: neither the client's name nor a pool's can say more to Ceph than a name does."""
    ceph_client.refuses("NAME is ", word)
    ceph_client.refuses("POOL is ", "kvm", word)
    ceph_client.refuses("POOL is ", "kvm", "rbd", word)


def test_the_client_is_named_without_its_kind(ceph_client: Script) -> None:
    """Law: `client.kvm`, as Ceph shows it, is told to be `kvm` here, and in CEPH_ID."""
    ceph_client.refuses("put before it: kvm", "client.kvm")
    with pytest.raises(Unfit, match=r"without 'client\."):
        setting_values.ceph_user("client.kvm")


def test_names_that_are_sound(ceph_client: Script) -> None:
    """Law: usual names of pools are taken as they are, and each pool is one of its own."""
    assert ceph_client.run("kvm-1", "rbd", ".mgr", "vm_images.ssd").returncode == 0
    assert "client.kvm-1" in ceph_client.asked
    assert "profile rbd pool=rbd, profile rbd pool=.mgr, profile rbd pool=vm_images.ssd" in ceph_client.asked


PREFIXES = ["/kvm", "/kvm/", "/a/b-c.d_e", "/kvm//", *NO_NAMES, "/", "//", "kvm", "/a//b", "/a b", "/a,b", '/a"']
FOREIGN = ["/a%i", "/a\u00a0b", "/a\u200bb", "/a\u0085b", "/a\nb"]


@pytest.mark.parametrize("word", [*PREFIXES, *FOREIGN])
def test_a_prefix_is_what_the_hosts_take_for_one(etcd_roles: Script, word: str) -> None:
    """Law: the roles are for exactly the keys that hosts with the same settings use, or there are none."""
    done = etcd_roles.run(KVM_PREFIX=word)
    if done.returncode == 0:
        prefix = setting_values.key_prefix(word)
        granted = {asked for asked in etcd_roles.asked if asked.startswith("/")}
        assert {f"{prefix}/", f"{prefix}supervisor/"} <= granted
        assert not any("//" in asked for asked in granted)
    else:
        etcd_roles.refuses("KVM_PREFIX is ", KVM_PREFIX=word)


def test_prefixes_that_are_sound_are_taken(etcd_roles: Script) -> None:
    """Law: the test above is not one of refusals only."""
    for word in PREFIXES[:4]:
        assert etcd_roles.run(KVM_PREFIX=word).returncode == 0


@pytest.mark.parametrize("facts", ["/kvm", "/kvm/facts", "/", "kvm", "/a b", "-x"])
def test_facts_lie_outside_the_wishes(etcd_roles: Script, facts: str) -> None:
    """Law: who may write facts could write wishes otherwise."""
    etcd_roles.refuses("KVM_FACTS_PREFIX is ", KVM_FACTS_PREFIX=facts)


def test_wishes_lie_outside_the_facts(etcd_roles: Script) -> None:
    """Law: the same the other way round."""
    etcd_roles.refuses("KVM_FACTS_PREFIX is '/a'", KVM_PREFIX="/a/b", KVM_FACTS_PREFIX="/a")


def test_no_user_is_made_without_a_password_by_mistake(etcd_roles: Script, tmp_path: Path) -> None:
    """Law: a folder that was mistyped, a file that is missing or empty, or a second word stop it before it begins."""
    for user in ("root", "supervisor"):
        (tmp_path / user).write_text("x\n")
    etcd_roles.refuses("its file operator", str(tmp_path))
    (tmp_path / "operator").touch()
    etcd_roles.refuses("its file operator", str(tmp_path))
    for folder in ("", "/no/such", "--help"):
        etcd_roles.refuses("its file root", folder)
    (tmp_path / "operator").write_text("x\n")
    etcd_roles.refuses("one at most", str(tmp_path), "more")
    assert etcd_roles.run(str(tmp_path)).returncode == 0
