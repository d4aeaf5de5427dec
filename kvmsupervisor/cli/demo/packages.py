"""Debian's packages for the demo's guest: fetched into a cache, and programs that work on them.

`apt-get download` needs neither root nor a place outside the cache.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

RUN_TIMEOUT_S = 300.0
"""For one program. Arbitrary: enough for apt-get to fetch 60 MB over a slow line."""


class GuestError(Exception):
    """The guest cannot be built here; the message says what is missing."""


def fetch(cache: Path, package: str) -> Path:
    """Download `package` into the cache, unless it is there."""
    pattern = f"{package}_*.deb"
    if not any(cache.glob(pattern)):
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
            for options in apt_options(cache):
                said = run_program(["apt-get", *options, "download", package], cwd=Path(folder), check=False)
                if any(Path(folder).glob(pattern)):
                    break
            else:
                raise GuestError(f"apt-get cannot download {package}; it says:\n{said.strip()}")
            deb = only(Path(folder), pattern)
            deb.rename(cache / deb.name)
    return only(cache, pattern)


def apt_options(cache: Path) -> Iterator[Sequence[str]]:
    """Yield options for apt: with the system's package lists, then with fresh ones in the cache.

    The system's may be missing, as in most container images, or name a package that was replaced since.
    Lists of our own can be fetched without being root, and change nothing for others.
    """
    # apt gives up root for a user who cannot write to this folder, and warns about it each time.
    mine = ("-qq", "-o", "APT::Sandbox::User=root")
    yield mine
    lists = (*mine, "-o", f"Dir::State::lists={cache}/lists", "-o", f"Dir::Cache={cache}/apt")
    run_program(["apt-get", *lists, "update"], check=False)
    yield lists


def run_program(command: Sequence[str], *, cwd: Path | None = None, check: bool = True) -> str:
    """Run a program; return what it printed.

    Raises:
        GuestError: it is not installed, takes too long, or (with `check`) failed.
    """
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise GuestError(f"{command[0]} is missing: the guest is made of Debian's packages") from error
    except subprocess.TimeoutExpired as error:
        raise GuestError(f"{shlex.join(command)} did not end within {RUN_TIMEOUT_S:g} s") from error
    if check and done.returncode != 0:
        raise GuestError(f"{shlex.join(command)} failed:\n{done.stdout.strip()}")
    return done.stdout


def only(folder: Path, *patterns: str) -> Path:
    """Return what matches the first of `patterns` that matches anything below `folder`."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found[-1]
    raise GuestError(f"no {' or '.join(patterns)} in {folder}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on the cache; wait for whoever builds there."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
