"""A program from the fork server does what the interpreter's own does."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import fork_server

ENVIRONMENT = {"PATH": os.environ["PATH"], "KVM_CONFIG": "/dev/null", "ETCD_ENDPOINTS": "http://127.0.0.1:1"}


@pytest.mark.parametrize("args", [["check-config"], ["list"], ["nonsense"]])
def test_it_says_what_the_interpreter_says(args: list[str], tmp_path: Path) -> None:
    """Law: the same exit status, output and errors: of done, of a refusal, of wrong usage."""
    forked = fork_server.run(args, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    plain = subprocess.run(
        fork_server.command(args), env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_it_has_its_own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: nothing of the worker's environment, of now or of the server's start, and nothing of an earlier program."""
    monkeypatch.setenv("KVM_NONSENSE", "1")
    refused = fork_server.run(["check-config"], env={**ENVIRONMENT, "KVM_NONSENSE": "2"}, cwd=tmp_path, timeout=60)
    assert (refused.returncode, "KVM_NONSENSE" in refused.stderr) == (1, True)
    done = fork_server.run(["check-config"], env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr


def test_its_end_is_told(tmp_path: Path) -> None:
    """Law: a process of its own session, which lives until a signal ends it; that is its exit status."""
    env = {**ENVIRONMENT, "KVM_RUN_DIR": str(tmp_path / "run"), "KVM_LISTEN": "127.0.0.1:0"}
    with (tmp_path / "log").open("wb") as log:
        process = fork_server.start(["run"], env=env, cwd=tmp_path, output=log.fileno())
    assert process.poll() is None
    assert os.getsid(process.pid) == process.pid
    assert Path(f"/proc/{process.pid}/cwd").readlink() == tmp_path
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process.send_signal(signal.SIGKILL)
    assert not Path(f"/proc/{process.pid}").exists()
