"""Runs a script in a bare Debian, where nothing of this checkout is seen: in mount and PID namespaces of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.docker import CERTIFICATES

FILES = {"PIP_CONFIG_FILE", "PIP_FIND_LINKS"}
"""Settings of pip that name what a root does not have."""

INSIDE = """
set -eu
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
root=$2/root
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
cp /etc/resolv.conf /etc/hosts "$root/etc/"
mkdir -p "$root/given" "$root/made" "$root$(dirname "$4")"
cp -r "$3/." "$root/given"
mount --bind "$5" "$root/made"
cp "$4" "$root$4"
exec chroot "$root" sh -c "$6"
"""
"""Arguments: the tree, a folder for the overlay, what is given, certificates, where to put things, a script."""


def in_bare_root(root: Path, folder: Path, script: str, *, given: Path, made: Path) -> subprocess.CompletedProcess[str]:
    """Run `script` as root in a copy of a Debian; how this machine reaches package registries is passed on.

    Args:
        root: the Debian; it is not changed.
        folder: an empty folder that lies on no overlay: overlays do not lie on overlays.
        script: for `sh`.
        given: a folder, copied to /given.
        made: a folder, seen as /made; what is written there stays.
    """
    for one in ("upper", "work", "root"):
        (folder / one).mkdir()
    kept = {
        name: text
        for name, text in os.environ.items()
        if name.lower().endswith("_proxy") or (name.startswith("PIP_") and name not in FILES)
    }
    return subprocess.run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"),
            *("sh", "-c", INSIDE, "sh", root, folder, given, CERTIFICATES, made, script),
        ],
        env=kept | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
