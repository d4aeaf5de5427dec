"""`confirm-identity`: who is asked, what has to be written first, what it leaves for the supervisor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvmsupervisor.adapters.clock import boot_id
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.identity import HostIdentity, IdentityNote
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.machine.system import REAL
from kvmsupervisor.supervisor.identity import Standing
from tests.cli.conftest import World

ALPHA = HostIdentity.of(HostName("alpha"), Layout())
BETA = replace(ALPHA, host=HostName("beta"))


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short, as KVM_RUN_DIR has to be."""
    path = Path(tempfile.mkdtemp(prefix="kvs"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def asked(world: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A host whose supervisor asks: two guests were started under `alpha`, and it is called `beta`."""
    lives = [(InstanceId("1"), ALPHA), (InstanceId("2"), ALPHA), (InstanceId("3"), BETA)]
    monkeypatch.setattr(Standing, "living", lambda self: lives)
    world.environ["KVM_RUN_DIR"] = str(run_dir)
    note = IdentityNote(boot_id=boot_id(), recorded=ALPHA, wanted=BETA)
    (run_dir / "_identity.json").write_bytes(note.to_json())
    return world


def said(path: Path) -> bool:
    note = Standing(REAL.processes, RunDir(path), wanted=BETA, boot_id=boot_id()).note()
    assert note is not None
    return note.confirmed


def test_a_word_is_put_down(asked: World, run_dir: Path) -> None:
    """Law 12: with the keys written, the word is for the settings of the supervisor that asked."""
    for name in "12":
        asked.keys(name, host="beta")
    result = asked.run("confirm-identity", "--yes")
    assert result.exit_code == 0, result.output
    assert "started under KVM_HOSTNAME=alpha: 1, 2\nto go on under KVM_HOSTNAME=beta" in result.output
    assert said(run_dir)


def test_the_keys_come_first(asked: World, run_dir: Path) -> None:
    """Law 12: a guest whose `host` is another would be moved away: every such key is named, and nothing done."""
    asked.keys("1", host="alpha")
    result = asked.run("confirm-identity", "--yes")
    assert result.exit_code == 1
    assert "write beta into /kvm/1/host; found alpha" in result.output
    assert "write beta into /kvm/2/host; found nothing" in result.output
    assert not said(run_dir)


def test_nobody_asked(world: World, run_dir: Path) -> None:
    """Without a question there is no answer; the run directory that was looked into is named."""
    world.environ["KVM_RUN_DIR"] = str(run_dir)
    result = world.run("confirm-identity", "--yes")
    assert result.exit_code == 1
    assert f"nothing to confirm: no supervisor with the run directory {run_dir}" in result.output


def test_a_question_of_an_earlier_boot_is_none(asked: World, run_dir: Path) -> None:
    """What lived then is gone."""
    note = IdentityNote(boot_id="another", recorded=ALPHA, wanted=BETA)
    (run_dir / "_identity.json").write_bytes(note.to_json())
    assert asked.run("confirm-identity", "--yes").exit_code == 1


def test_check_tells_of_a_host_that_asks(world: World) -> None:
    """Law 12: what a host's session says that a person should know is a finding."""
    world.host("alpha")
    session = HostSession(host="beta", version="1", url="", boot_id="b", notice="nothing is started or stopped")
    world.etcd.write("/kvmsupervisor/hosts/beta", session.to_json())
    result = world.run("check")
    assert result.exit_code == 1
    assert "nothing is started or stopped" in result.output
