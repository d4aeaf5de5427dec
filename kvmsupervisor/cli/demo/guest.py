"""The small Linux guest that `kvmsupervisor demo` and the tests boot: Debian's kernel, busybox, one script.

Nothing is installed for it: its packages are fetched with `apt-get download` and unpacked with `dpkg -x`;
both need neither root nor a place outside the cache. The initramfs is a cpio archive in the "newc" format
(https://docs.kernel.org/driver-api/early-userspace/buffer-format.html).
"""

from __future__ import annotations

import hashlib
import lzma
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path

from kvmsupervisor.cli.demo.packages import GuestError, apt_options, fetch, locked, only, run_program
from kvmsupervisor.domain.frozen import frozen

KERNEL_PACKAGE = "linux-image-cloud-amd64"
"""Depends on Debian's present kernel for virtual machines: small, boots in 3 s under TCG."""

BUSYBOX_PACKAGE = "busybox-static"

MODULES_FIRST = ("evdev", "button", "pvpanic_mmio")
"""Loaded before the guest says HELLO: the power button, and the device that tells QEMU of a panic.
`pvpanic_mmio` drives the ISA device too, both are `QEMU0001` to ACPI."""

MODULES_LATER = (
    "virtio_pci",
    "virtio_balloon",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "isofs",
    "qemu_fw_cfg",
)
"""Loaded while the guest already runs."""

APPLETS = (
    *("sh", "dd", "findfs", "grep", "ifconfig", "insmod", "ls", "mkdir", "mount", "poweroff", "reboot", "sleep"),
    *("stty", "udhcpc", "umount"),
)
"""What `demo/init` calls that is no builtin of the shell."""

MINIMUM_RAM_MIB = 96
"""Less makes the kernel run out of memory while it unpacks the initramfs (tried with Debian 12 and 13)."""


@frozen(kw_only=True)
class Guest:
    """A guest that is ready to boot."""

    kernel: Path
    initramfs: Path

    @classmethod
    def at(cls, folder: Path) -> Guest:
        """The guest that was built in `folder`."""
        return cls(kernel=folder / "vmlinuz", initramfs=folder / "initramfs")

    def options(
        self,
        *,
        tag: str = "guest",
        heartbeat_s: float = 1,
        deaf: bool = False,
        quiet: bool = True,
        dhcp: bool = False,
        login: bool = False,
    ) -> list[str]:
        """QEMU options that boot the guest.

        Args:
            tag: what the guest calls itself in `HELLO from <tag>`; one word.
            heartbeat_s: seconds between two heartbeats.
            deaf: whether it ignores the power button.
            quiet: whether the kernel keeps its messages to itself; otherwise it shows a few.
            dhcp: whether it asks for an address for its NIC, and says `DHCP <address>`.
            login: whether its console is a login prompt for people, without heartbeats, instead of `demo/init`'s words.
        """
        # panic=-1: without a pvpanic device a panic reboots at once; it must not leave a frozen guest.
        # cryptomgr.notests: a seventh of the boot under TCG would be the kernel's tests of its own ciphers.
        words = [
            "console=ttyS0",
            "quiet" if quiet else "loglevel=6",
            "panic=-1",
            "cryptomgr.notests",
            f"hb={heartbeat_s:g}",
        ]
        words += [f"tag={tag}", *(["deaf=1"] if deaf else []), *(["dhcp=1"] if dhcp else [])]
        words += ["login=1"] if login else []
        return ["-kernel", str(self.kernel), "-initrd", str(self.initramfs), "-append", " ".join(words)]

    def extra_flags(
        self,
        *,
        tag: str = "guest",
        heartbeat_s: float = 1,
        deaf: bool = False,
        quiet: bool = True,
        dhcp: bool = False,
        login: bool = False,
    ) -> str:
        """`options` as the text of an `extra_flags` key."""
        return shlex.join(
            self.options(tag=tag, heartbeat_s=heartbeat_s, deaf=deaf, quiet=quiet, dhcp=dhcp, login=login)
        )


def build_guest(cache: Path) -> Guest:
    """Return the guest, building it where that was not done yet.

    Safe to call from several processes at once: one builds, the others wait for it. What was fetched stays
    in the cache, so a second build needs no network. Blocks for seconds: call it in a thread.

    Args:
        cache: folder for packages and results; made when missing.

    Raises:
        GuestError: something cannot be fetched or is not in the packages, or this is no Debian.
    """
    cache = cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        kernel_deb, busybox_deb = _fetch_kernel(cache), fetch(cache, BUSYBOX_PACKAGE)
        init = (resources.files("kvmsupervisor") / "demo" / "init").read_bytes()
        recipe = [kernel_deb.name.encode(), busybox_deb.name.encode(), init, Path(__file__).read_bytes()]
        built = cache / hashlib.sha256(b"\0".join(recipe)).hexdigest()[:12]
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as folder:
                _build(Path(folder), kernel_deb, busybox_deb, init).rename(built)
    return Guest.at(built)


def _build(folder: Path, kernel_deb: Path, busybox_deb: Path, init: bytes) -> Path:
    """Unpack the packages below `folder` and make a folder of `vmlinuz` and `initramfs` there."""
    system = folder / "system"
    for deb in (kernel_deb, busybox_deb):
        run_program(["dpkg", "-x", str(deb), str(system)])
    result = folder / "result"
    result.mkdir()
    shutil.copyfile(only(system, "boot/vmlinuz-*"), result / "vmlinuz")
    files = {"init": init, "bin/busybox": only(system, "bin/busybox", "usr/bin/busybox").read_bytes()}
    # Debian 13 has them below /usr; a release in between may have both, one of them empty.
    modules = Modules(only(system, "lib/modules/*", "usr/lib/modules/*"))
    for stage, names in (("first", MODULES_FIRST), ("later", MODULES_LATER)):
        for number, path in enumerate(modules.take(names)):
            files[f"modules/{stage}/{number:02}-{_module_name(path)}.ko"] = _content(path)
    (result / "initramfs").write_bytes(cpio(files, {f"bin/{applet}": "busybox" for applet in APPLETS}))
    return result


class Modules:
    """The modules of one kernel, given out in an order in which they can be loaded."""

    def __init__(self, folder: Path) -> None:
        """Read what there is below `folder`, a `/lib/modules/<release>`."""
        self._paths = {_module_name(path): path for path in folder.rglob("*.ko*")}
        builtin = (folder / "modules.builtin").read_text().split()
        # Invariant: what was given out, or is part of the kernel itself, is never given out (again).
        self._done = {_module_name(Path(line)) for line in builtin}

    def take(self, names: Iterable[str]) -> Iterator[Path]:
        """Yield the named modules, each after those it depends on, without what was yielded before.

        Raises:
            GuestError: the kernel has no such module.
        """
        for name in names:
            if name in self._done:
                continue
            self._done.add(name)
            if name not in self._paths:
                raise GuestError(f"the kernel package has no module {name!r}, neither as a file nor built in")
            path = self._paths[name]
            # depmod has not run, so there is no modules.dep: each module names its own needs in .modinfo.
            depends = re.search(rb"\0depends=([^\0]*)\0", _content(path))
            if depends is not None:
                yield from self.take(_normal(word) for word in depends[1].decode().split(",") if word)
            yield path


def _normal(module: str) -> str:
    # The kernel takes both spellings for the same module; file names use either.
    return module.replace("-", "_")


def _module_name(path: Path) -> str:
    return _normal(path.name.partition(".ko")[0])


def _content(path: Path) -> bytes:
    """The module itself: Debian 13 packs them with xz, and busybox's insmod would not unpack them."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def cpio(files: Mapping[str, bytes], links: Mapping[str, str]) -> bytes:
    """Return an initramfs: a "newc" cpio archive, not compressed (the guest would pay for unpacking it).

    Args:
        files: content of each executable file by its path, without a leading slash.
        links: target of each symbolic link by its path.

    It also holds the folders that these need, the mount points `dev`, `proc` and `sys`, and `dev/console`,
    which the kernel opens for init before anything is mounted.
    """
    folders = {"dev", "proc", "sys"}
    for name in (*files, *links):
        folders.update(str(parent) for parent in Path(name).parents if parent.name)
    entries = [
        *(_cpio_entry(name, 0o040755) for name in sorted(folders)),
        _cpio_entry("dev/console", 0o020600, device=(5, 1)),
        *(_cpio_entry(name, 0o100755, content) for name, content in files.items()),
        *(_cpio_entry(name, 0o120777, target.encode()) for name, target in links.items()),
        _cpio_entry("TRAILER!!!", 0),
    ]
    return b"".join(entries)


def _cpio_entry(name: str, mode: int, content: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> bytes:
    path = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, size, major, minor, rmajor, rminor, length of the name, checksum.
    # The inode number only matters for hard links, and there are none.
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + path) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _fetch_kernel(cache: Path) -> Path:
    kernels = sorted(cache.glob("linux-image-*-cloud-amd64_*.deb"), key=lambda path: path.stat().st_mtime)
    if kernels:
        return kernels[-1]
    found: list[str] = []
    for options in apt_options(cache):
        text = run_program(["apt-cache", *options, "depends", KERNEL_PACKAGE], check=False)
        found = re.findall(r"Depends: (linux-image-\S+)", text)
        if found:
            break
    if not found:
        raise GuestError(f"apt knows no package {KERNEL_PACKAGE}; the guest needs Debian's package sources (amd64)")
    return fetch(cache, found[0])


def main() -> None:
    """Build the guest in the folder that is named, and print the folder of the result."""
    try:
        print(build_guest(Path(sys.argv[1])).kernel.parent)  # noqa: T201
    except GuestError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
