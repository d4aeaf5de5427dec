"""SSH for the demo's guest: a second archive behind the initramfs, with Debian's dropbear and what it is linked with.

The kernel unpacks one archive after the other, so tests that boot the guest alone do not pay for this one.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from kvmsupervisor.cli.demo.guest import cpio
from kvmsupervisor.cli.demo.packages import GuestError, fetch, locked, only, run_program

SERVER_PACKAGE = "dropbear-bin"

C_LIBRARY = "libc6"
"""Its own needs are of no use to an SSH server."""

LINKER = "ld-linux-x86-64.so.2"

LIBRARIES = "lib/x86_64-linux-gnu"
"""Where Debian's linker looks."""


def build_initramfs(cache: Path, plain: Path) -> Path:
    """Return the guest's initramfs with SSH in it, building it where that was not done yet.

    Like `build_guest`, it needs no network the second time, and is safe to call from several processes at once.

    Args:
        cache: folder for packages and results; it exists.
        plain: the guest's own initramfs.

    Raises:
        GuestError: something cannot be fetched, or is not in the packages.
    """
    cache = cache.absolute()
    with locked(cache / "lock"):
        server = fetch(cache, SERVER_PACKAGE)
        online = (resources.files("kvmsupervisor") / "demo" / "online").read_bytes()
        recipe = [str(plain).encode(), server.name.encode(), online, Path(__file__).read_bytes()]
        built = cache / f"{hashlib.sha256(bytes(1).join(recipe)).hexdigest()[:12]}-ssh"
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as name:
                folder = Path(name)
                for deb in _with_needs(cache, server):
                    run_program(["dpkg", "-x", str(deb), str(folder / "system")])
                files = {"online": online, **server_files(folder / "system")}
                (folder / "initramfs").write_bytes(plain.read_bytes() + cpio(files, {}))
                (folder / "initramfs").rename(built)
    return built


def _with_needs(cache: Path, server: Path) -> Iterable[Path]:
    """The server's package, and all that it depends on."""
    found = {SERVER_PACKAGE: server}
    todo = [SERVER_PACKAGE]
    while todo:
        package = todo.pop()
        if package == C_LIBRARY:
            continue
        depends = run_program(["dpkg-deb", "--field", str(found[package]), "Depends"])
        for name in re.findall(r"(?:^|, )([a-z0-9][a-z0-9.+-]*)", depends):
            if name not in found:
                found[name] = fetch(cache, name)
                todo.append(name)
    return found.values()


def server_files(system: Path) -> dict[str, bytes]:
    """The server, the linker and the libraries of an unpacked system, each by its path in the guest."""
    # Not those of lib64: that is a link with an absolute path, which leads out of the unpacked system.
    libraries = {path.name: path for path in system.glob("**/x86_64-linux-gnu/*.so*")}
    server = only(system, "usr/sbin/dropbear").read_bytes()
    files = {"bin/dropbear": server, f"lib64/{LINKER}": _library(libraries, LINKER)}
    programs = [server]
    while programs:
        # The names of what a program needs are among its strings. So are others, which are in none of the packages.
        for found in re.findall(rb"(?<=\0)lib[\w.+-]+\.so\.\d+(?=\0)", programs.pop()):
            name = found.decode()
            if f"{LIBRARIES}/{name}" not in files and name in libraries:
                files[f"{LIBRARIES}/{name}"] = _library(libraries, name)
                programs.append(files[f"{LIBRARIES}/{name}"])
    return files


def _library(libraries: Mapping[str, Path], name: str) -> bytes:
    if name not in libraries:
        raise GuestError(f"no {name} in {SERVER_PACKAGE} and what it depends on")
    return libraries[name].read_bytes()


def main() -> None:
    """Build it in the cache that is named, from the initramfs that is named, and print its path; errors in one line."""
    try:
        print(build_initramfs(Path(sys.argv[1]), Path(sys.argv[2])))  # noqa: T201
    except (GuestError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
