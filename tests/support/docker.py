"""A Docker daemon of our own, and in it the image, built from this checkout's Dockerfile.

The daemon has its own socket and no network; what it has built stays in `.cache/docker`, so that only what has changed
is built again. Its base is made by mmdebstrap: a bare Debian, with this machine's ways to reach package archives.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.support.nspawn import ROOT, debian_root

BASE, IMAGE = "kvmsupervisor-base", "kvmsupervisor-test"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
START_S = 60.0
BUILD_S = 1200.0

PRIVILEGED = ("--cap-add=ALL", "--cap-drop=SYS_RESOURCE", "--security-opt=seccomp=unconfined")
"""`--privileged` as far as it goes where this machine itself lacks that capability."""


class Docker:
    """The daemon. As a context manager it starts, and leaves nothing running."""

    def __enter__(self) -> Self:
        cache = ROOT / ".cache" / "docker"
        cache.mkdir(parents=True, exist_ok=True)
        # One daemon at a time has that folder.
        self._lock = (cache / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._folder = Path(tempfile.mkdtemp(prefix="kvd"))
        with (self._folder / "log").open("wb") as log:
            self._daemon = subprocess.Popen(
                [
                    "dockerd",
                    f"--data-root={cache.resolve() / 'data'}",
                    f"--exec-root={self._folder / 'exec'}",
                    f"--pidfile={self._folder / 'pid'}",
                    f"--host={self._host}",
                    "--bridge=none",
                    "--iptables=false",
                    "--ip6tables=false",
                    "--ip-masq=false",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + START_S
        while self.run("version", check=False).returncode != 0:
            if time.monotonic() > deadline or self._daemon.poll() is not None:
                log_text = (self._folder / "log").read_text(errors="replace")
                self.close()
                raise AssertionError(f"dockerd does not start:\n{log_text[-3000:]}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _host(self) -> str:
        return f"unix://{self._folder / 'sock'}"

    def run(
        self, *args: str, check: bool = True, timeout_s: float = 120.0, stdin: int = subprocess.DEVNULL
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker`."""
        done = subprocess.run(
            ["docker", "--host", self._host, *args],
            env=os.environ | {"DOCKER_BUILDKIT": "0"},
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"docker {args}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def build(self) -> str:
        """Build the image; return its name."""
        if not self.run("images", "--quiet", BASE).stdout:
            self._make_base()
        self.run("build", "--network=host", f"--build-arg=BASE={BASE}", f"--tag={IMAGE}", str(ROOT), timeout_s=BUILD_S)
        return IMAGE

    def _make_base(self) -> None:
        root = debian_root("trixie", "trixie-slim", "ca-certificates")
        tar = subprocess.Popen(["tar", "--directory", root, "--create", "."], stdout=subprocess.PIPE)
        assert tar.stdout is not None
        with tar.stdout:
            self.run("import", "-", f"{BASE}-bare", stdin=tar.stdout.fileno())
        assert tar.wait() == 0
        context = self._folder / "base"
        context.mkdir()
        shutil.copy(CERTIFICATES, context / "ca.crt")
        acquire = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
        wanted = ("http", "https", "Check", "Retries", "ForceIP")
        lines = [line for line in acquire.splitlines() if line.startswith(tuple(f"Acquire::{one}" for one in wanted))]
        (context / "99host").write_text("\n".join(lines) + "\n")
        (context / "Dockerfile").write_text(
            f"FROM {BASE}-bare\nCOPY ca.crt {CERTIFICATES}\nCOPY 99host /etc/apt/apt.conf.d/\n"
            f"ENV PIP_CERT={CERTIFICATES}\n"
        )
        self.run("build", f"--tag={BASE}", str(context))

    def close(self) -> None:
        """End all containers and the daemon."""
        if self._daemon.poll() is None:
            left = self.run("ps", "--all", "--quiet", check=False).stdout.split()
            if left:
                self.run("rm", "--force", *left, check=False)
            # Layers of earlier builds that nothing names any more.
            self.run("image", "prune", "--force", "--filter=until=24h", check=False)
            self._daemon.send_signal(signal.SIGTERM)
            try:
                self._daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        # dockerd leaves the mount of its network namespace behind.
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in reversed([one for one in mounts if one.startswith(f"{self._folder}/")]):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """The daemon, with the image built."""
    with Docker() as daemon:
        daemon.build()
        yield daemon
