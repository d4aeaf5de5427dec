"""Wheel and sdist, installed by pip alone on Debian 12 and 13: bare roots, where nothing of this checkout is seen."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor import __version__
from tests.support import checkout
from tests.support.bare_root import in_bare_root
from tests.support.nspawn import debian_root

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

TRY = """
set -u
# There is no QEMU in such a root, which check-config would name.
python3 -m pip install --quiet /given/*.whl && echo 'pip installed it beside Debian packages'
for one in /given/*; do
    rm -rf /opt/kvmsupervisor
    python3 -m venv /opt/kvmsupervisor || exit 1
    /opt/kvmsupervisor/bin/pip install --quiet "$one" || exit 1
    cd / && /opt/kvmsupervisor/bin/kvmsupervisor --version || exit 1
    KVM_QEMU=/bin/true KVM_CONFIG=/dev/null /opt/kvmsupervisor/bin/kvmsupervisor check-config >/dev/null || exit 1
    test -r /opt/kvmsupervisor/lib/python3*/site-packages/kvmsupervisor/demo/init || exit 1
done
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the sdist, made of a copy: building leaves folders behind."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    checkout.copy_to(source)
    subprocess.run([sys.executable, "-m", "build", "--quiet", f"--outdir={made}", source], check=True)
    return made


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's own, which may lie on an overlay: overlays do not lie on overlays.
    with tempfile.TemporaryDirectory(prefix="kvi") as name:
        yield Path(name)


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_pip_alone_installs_it(suite: str, dist: Path, folder: Path, tmp_path: Path) -> None:
    """Law: with python3-venv and nothing else, wheel and sdist give a program that runs; without a venv pip refuses."""
    root = debian_root(suite, f"{suite}-pip", "python3-venv,python3-pip,ca-certificates")
    done = in_bare_root(root, folder, TRY, given=dist, made=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "externally-managed-environment" in done.stderr
    assert done.stdout.count(f"kvmsupervisor, version {__version__}") == 2, done.stdout
