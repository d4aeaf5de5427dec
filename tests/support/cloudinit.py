"""Debian's cloud-init, unpacked beside the checkout and run there: nothing is installed, nothing of the host touched.

Its own code reads a medium's files (taken off it by `isoinfo`) as it would below its seed folder, and its `ds-identify`
is told what `blkid` says of the medium. What is left out is the kernel's mount; the small guest does that elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    *("cloud-init", "python3-certifi", "python3-chardet", "python3-configobj", "python3-idna", "python3-requests"),
    *("python3-six", "python3-urllib3", "python3-yaml"),
)
"""cloud-init, and what its NoCloud and ConfigDrive import: 1.2 MB."""

READER = """
import json, sys
from cloudinit import helpers
from cloudinit.sources import DataSourceConfigDrive, DataSourceNoCloud

# What runs below must not look at the host that it runs on: neither at its firmware nor at its disks.
DataSourceNoCloud.dmi.read_dmi_data = lambda name: None
system = {"datasource": {"NoCloud": {"fs_label": None}}}
readers = {
    "nocloud": DataSourceNoCloud.DataSourceNoCloud,
    "config_drive": DataSourceConfigDrive.DataSourceConfigDrive,
}

def read(kind, folder):
    source = readers[kind](system, None, helpers.Paths({"cloud_dir": folder, "run_dir": folder + "/run"}))
    if not source._get_data():
        return None
    parts = [part for part in source.get_userdata().walk() if not part.is_multipart()]
    return {
        "instance_id": source.get_instance_id(),
        "hostname": source.metadata["local-hostname"],
        "parts": [[part.get_content_type(), part.get_payload(decode=True).decode()] for part in parts],
        "network": source._network_config,
    }

print(json.dumps([read(*job) for job in json.load(sys.stdin)]))
"""


@dataclass(frozen=True, slots=True)
class CloudInit:
    """cloud-init's programs below a folder."""

    root: Path

    def read(self, *media: tuple[str, Mapping[str, bytes]]) -> list[dict[str, Any]]:
        """What cloud-init makes of each medium: its source (`nocloud`, `config_drive`), and its files by path."""
        with tempfile.TemporaryDirectory(prefix="kvs") as folder:
            jobs = []
            for number, (kind, files) in enumerate(media):
                for name, data in files.items():
                    path = Path(folder) / str(number) / "seed" / kind / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                jobs.append([kind, f"{folder}/{number}"])
            done = subprocess.run(
                [sys.executable, "-S", "-W", "ignore", "-c", READER], input=json.dumps(jobs), cwd=folder,
                env={"PYTHONPATH": f"{self.root}/usr/lib/python3/dist-packages", "PATH": os.environ["PATH"]},
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def identify(self, *media: Path) -> list[str]:
        """The data sources that ds-identify finds in a KVM guest whose only file systems are these media."""
        with tempfile.TemporaryDirectory(prefix="kvs") as folder:
            root, programs = Path(folder) / "root", Path(folder) / "bin"
            for place in ("proc/1", "dev", "sys"):
                (root / place).mkdir(parents=True)
            for name, content in (("proc/cmdline", "quiet"), ("proc/1/environ", ""), ("proc/uptime", "1.0 1.0\n")):
                (root / name).write_text(content)
            # The real blkid, looking at the media instead of at this machine's disks.
            looks = "\n".join(f"blkid -p -o export {shlex.quote(str(medium))}; echo" for medium in media)
            path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
            programs.mkdir()
            for name, script in (("blkid", f"PATH={shlex.quote(path)}\n{looks}"), ("systemd-detect-virt", "echo kvm")):
                (programs / name).write_text(f"#!/bin/sh\n{script}\n")
                (programs / name).chmod(0o755)
            done = subprocess.run(
                ["sh", str(self.root / "usr/lib/cloud-init/ds-identify"), "--force"],
                env={"PATH": f"{programs}:{path}", "PATH_ROOT": str(root), "DI_LOG": "stderr", "DEBUG_LEVEL": "0"},
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            written = (root / "run/cloud-init/cloud.cfg").read_text()
        names = written.partition("datasource_list: [")[2].partition("]")[0].split(",")
        return [name.strip() for name in names if name.strip() != "None"]


def unpack_cloud_init(cache: Path) -> CloudInit:
    """Return cloud-init, fetching it where that was not done yet; one process does, the others wait."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = cache / "root"
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
                _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *PACKAGES, folder=folder)
                for deb in sorted(Path(folder).glob("*.deb")):
                    _run("dpkg", "-x", str(deb), f"{folder}/root", folder=folder)
                (Path(folder) / "root").rename(root)
    return CloudInit(root)


def _run(*command: str, folder: str) -> None:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, f"{command[0]} says: {done.stdout}"
