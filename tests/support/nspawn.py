"""A host with systemd as its first process, D-Bus and Docker: a Debian booted by systemd-nspawn, on cgroup v2.

The root is made once by mmdebstrap and kept in `.cache/roots`; each host has an overlay of it, and a network of its own
without any link. The checkout and the virtual environment are seen at their own paths, read-only.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ROOT / ".cache" / "roots"
PACKAGES = "systemd,systemd-sysv,dbus,python3,docker.io,procps,iproute2"
UNIFIED = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
SYSTEMD_V1 = Path("/sys/fs/cgroup/systemd")
BOOT_S = 150.0

SUITE = platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")
"""This machine's Debian, so that its Python runs the packages of this environment."""


def debian_root(suite: str, name: str, packages: str) -> Path:
    """A folder with a Debian, made if it is not there yet."""
    path = ROOTS / name
    if not path.exists():
        ROOTS.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=ROOTS))
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", suite, str(making / "root")],
            check=True,
        )
        (making / "root").rename(path)
        making.rmdir()
    return path


class BootedHost:
    """As a context manager: boots, and leaves nothing behind.

    Args:
        binds: what is seen inside at the same path, read-only, beside the checkout and the virtual environment.
        prepare: called with its root before it boots for the first time.
        debian: its tree; without it this machine's Debian, with Docker.
    """

    def __init__(
        self,
        binds: Sequence[Path] = (),
        *,
        prepare: Callable[[Path], None] = lambda root: None,
        debian: Path | None = None,
    ) -> None:
        # A Python that is not Debian's has to be seen, too; Debian's own is in the root.
        own = {ROOT, Path(sys.prefix)} | ({Path(sys.base_prefix)} - {Path("/usr")})
        self._binds = sorted({*own, *binds})
        self._prepare = prepare
        self._debian = debian
        self._folder = Path()
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._cgroup = Path()
        self.leader = 0

    def __enter__(self) -> Self:
        lower = self._debian or debian_root(SUITE, f"{SUITE}-host", PACKAGES)
        # Its name is the machine's too, which has letters and digits only.
        self._folder = Path(tempfile.gettempdir()) / f"kvh{uuid.uuid4().hex[:8]}"
        self._folder.mkdir(mode=0o700)
        try:
            self._mount(lower)
            self._prepare(self.root)
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> Path:
        """Its root, as seen from outside."""
        return self._folder / "root"

    def _mount(self, lower: Path) -> None:
        # Overlays do not lie on overlays, so what Docker keeps gets a folder of its own.
        for name in ("upper", "work", "root", "docker"):
            (self._folder / name).mkdir()
        options = f"lowerdir={lower},upperdir={self._folder / 'upper'},workdir={self._folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)], check=True)

    def boot(self) -> None:
        """Switch it on; it may have been on before, and has powered itself off. Returns when it is up."""
        name = self._folder.name
        top = next(path for path in UNIFIED if (path / "cgroup.controllers").exists())
        self._cgroup = top / name
        self._cgroup.mkdir(exist_ok=True)
        argv = ["systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", f"--machine={name}"]
        argv += ["--register=no", "--keep-unit", "--capability=all", "--system-call-filter=@known"]
        argv += ["--console=read-only", "--private-network", f"--bind={self._folder / 'docker'}:/var/lib/docker"]
        argv += [f"--bind-ro={path}" for path in self._binds]
        with (self._folder / "console.log").open("wb") as console:
            self._nspawn = subprocess.Popen(
                ["/bin/sh", "-c", 'echo 0 >"$1"; shift; exec "$@"', "sh", str(self._cgroup / "cgroup.procs"), *argv],
                env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_LOCK": "0"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + BOOT_S
        while not self._is_up():
            assert self._nspawn.poll() is None, self.console
            assert time.monotonic() < deadline, self.console
            time.sleep(0.05)

    @property
    def console(self) -> str:
        """What was written while it booted."""
        return (self._folder / "console.log").read_text(errors="replace")

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self.leader = int(children[0])
        done = self.run("systemctl", "is-active", "multi-user.target", "dbus.socket", check=False)
        return done.stdout.split() == ["active", "active"]

    def argv(self, *argv: str) -> list[str]:
        """The command line that runs `argv` inside."""
        return ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C", "--", *argv]

    def run(
        self, *argv: str, check: bool = True, environment: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside, as its root. It is in none of its units, and in none of its cgroups."""
        done = subprocess.run(
            self.argv(*argv),
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"} | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def python(self, code: str, *args: str, timeout_s: float = 60.0) -> str:
        """Run Python as a service, with this checkout's modules and this environment's packages; return its output."""
        as_service = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"]
        as_service += [f"--setenv=PYTHONPATH={ROOT}", "--setenv=PYTHONDONTWRITEBYTECODE=1"]
        return self.run(*as_service, sys.executable, "-c", code, *args, timeout_s=timeout_s).stdout

    def wait_off(self, timeout_s: float = 90.0) -> int:
        """Wait until it has powered itself off; return nspawn's exit status."""
        assert self._nspawn is not None
        return self._nspawn.wait(timeout_s)

    def close(self) -> None:
        """Power it off at once and remove all of it."""
        if self._nspawn is not None:
            if self.leader and self._nspawn.poll() is None:
                # Its first process takes all others with it.
                os.kill(self.leader, signal.SIGKILL)
            try:
                self._nspawn.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        subprocess.run(["umount", "--lazy", str(self.root)], check=False, capture_output=True)
        # nspawn makes the same folder in the hierarchy that v1's systemd keeps.
        for top in (self._cgroup, SYSTEMD_V1 / self._folder.name) if self._cgroup.name else ():
            for path in sorted([top, *top.rglob("*")], key=lambda path: len(path.parts), reverse=True):
                if path.is_dir():
                    path.rmdir()
        shutil.rmtree(self._folder, ignore_errors=True)
