"""The demo without a person: real etcd, Ceph, supervisors and guests. Each run takes half a minute of a core."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster_demo.__main__ import main
from tests.cluster_demo.leftovers import bearing, mounts_of
from tests.support.checkout import ROOT

LIMIT_S = 900.0


@contextmanager
def demo(*around: str) -> Iterator[subprocess.Popen[str]]:
    argv = [*around, sys.executable, "-m", "tests.cluster_demo"]
    environment = os.environ | {"KVM_DEMO_ONCE": "1"}
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            # It takes all with it.
            process.kill()


def links() -> str:
    """The network interfaces of this machine's own network, which the demo has none of."""
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout


def nothing_is_left(said: str) -> None:
    folder = re.search(r"(/tmp/kvs\w+)/guest", said)
    assert folder is not None, said
    assert not bearing(folder[1])
    assert not Path(folder[1]).exists()
    assert mounts_of(folder[1]) == []


@pytest.mark.soak
@pytest.mark.guest
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="network and PID namespaces take root")
def test_all_scenes_twice_and_ctrl_c() -> None:
    """Each scene comes to what it promises, also right after another demo; and one is interrupted during a move."""
    before = links()
    for _ in range(2):
        with demo() as process:
            said, _ = process.communicate(timeout=LIMIT_S)
        print(said)  # noqa: T201
        assert process.returncode == 0
        assert re.findall(r"^=== (\d)\.", said, re.MULTILINE) == ["1", "2", "3", "4", "5"]
        assert len(re.findall(r"^\d  .* \d+\.\d +\d+ of \d+ +\d+\.\d s$", said, re.MULTILINE)) == 5
        nothing_is_left(said)
    with demo() as process:
        assert process.stdout is not None
        said = ""
        while "migrating" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGINT, rest
    # What was seen by then is told all the same.
    assert "A cluster comes up" in rest
    nothing_is_left(said)
    assert links() == before


def test_where_it_cannot_run_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence, before anything is begun: without root, and where a program is missing."""
    assert main([], root=False) == 2
    assert "sudo make cluster-demo" in capsys.readouterr().out
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main([], root=True) == 2
    assert "ceph-mon, ceph-osd" in capsys.readouterr().out
