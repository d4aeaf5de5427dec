"""`stop --all --local` and `start --all --local` where this host does not let them."""

from __future__ import annotations

import errno
import os

import pytest

from kvmsupervisor.adapters.rundir import RunDir
from tests.cli.conftest import World


@pytest.mark.parametrize(("verb", "method"), [("stop", "mark_draining"), ("start", "unmark_draining")])
@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EACCES, "as root"), (errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space")],
)
def test_a_run_directory_that_cannot_be_written_to(
    world: World, monkeypatch: pytest.MonkeyPatch, *, verb: str, method: str, number: int, said: str
) -> None:
    """An ordinary user, or a full disk: one line that names the file, and no traceback."""
    monkeypatch.setattr(RunDir, "was_used", True)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/run/x")

    monkeypatch.setattr(RunDir, method, refuse)
    result = world.run(verb, "--all", "--local")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: /run/x: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
