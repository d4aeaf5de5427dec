"""Wheel and sdist, installed by pip alone on Debian 12 and 13: bare roots, where nothing of this checkout is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor import __version__
from tests.support import checkout
from tests.support.docker import CERTIFICATES
from tests.support.nspawn import debian_root

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

FILES = {"PIP_CONFIG_FILE", "PIP_FIND_LINKS"}
"""Settings of pip that name what a root does not have."""

INSIDE = """
set -eu
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
root=$2/root
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
cp /etc/resolv.conf /etc/hosts "$root/etc/"
mkdir -p "$root/dist" "$root$(dirname "$4")"
cp "$3"/* "$root/dist/"
cp "$4" "$root$4"
exec chroot "$root" sh -c "$5"
"""
"""In mount and PID namespaces of its own. Arguments: the tree, a folder, the packages, certificates, a script."""

TRY = """
set -u
# There is no QEMU in such a root, which check-config would name.
python3 -m pip install --quiet /dist/*.whl && echo 'pip installed it beside Debian packages'
for one in /dist/*; do
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
    for path in checkout.files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout.ROOT / path, source / path)
    subprocess.run([sys.executable, "-m", "build", "--quiet", f"--outdir={made}", source], check=True)
    return made


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's own, which may lie on an overlay: overlays do not lie on overlays.
    with tempfile.TemporaryDirectory(prefix="kvi") as name:
        for one in ("upper", "work", "root"):
            (Path(name) / one).mkdir()
        yield Path(name)


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_pip_alone_installs_it(suite: str, dist: Path, folder: Path) -> None:
    """Law: with python3-venv and nothing else, wheel and sdist give a program that runs; without a venv pip refuses."""
    root = debian_root(suite, f"{suite}-pip", "python3-venv,python3-pip,ca-certificates")
    kept = {
        name: text
        for name, text in os.environ.items()
        if name.lower().endswith("_proxy") or (name.startswith("PIP_") and name not in FILES)
    }
    done = subprocess.run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"),
            *("sh", "-c", INSIDE, "sh", root, folder, dist, CERTIFICATES, TRY),
        ],
        env=kept | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "externally-managed-environment" in done.stderr
    assert done.stdout.count(f"kvmsupervisor, version {__version__}") == 2, done.stdout
