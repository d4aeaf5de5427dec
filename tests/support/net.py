"""A network of a test's own: a bridge in one namespace, and a DHCP server in another one that is joined to it.

A namespace lives as long as one process that reads from a pipe of the test's. When the test ends, however it ends, the
pipe is closed, the process ends, and the kernel removes bridge, veths and taps: nothing can be left on the host. The
host's firewall (Docker's, for instance) has no say in it, and an ordinary user can do it all in a user namespace.

A supervisor under test stays in the host's network, where it reaches etcd on loopback. `Lan.around` starts it with
mounts of its own, in which `/etc/qemu` and the interfaces in `/sys` are the test's and `qemu-bridge-helper` is the real
helper, run where the bridge is. QEMU only gets a descriptor, which works wherever QEMU is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.namespaces import set_network

HELPER = next(
    (
        path
        for path in map(Path, ("/usr/lib/qemu/qemu-bridge-helper", "/usr/libexec/qemu-bridge-helper"))
        if path.exists()
    ),
    Path("/usr/lib/qemu/qemu-bridge-helper"),
)
LIMIT_S = 20.0
T = TypeVar("T")
AS_ROOT = os.geteuid() == 0

_MOUNTS = 'mount --bind /etc "$0/real" && mount --bind "$0/etc" /etc'
"""Puts a test's /etc in place, `$0` being its folder. The host's own is to be seen at `real`."""


_SYSFS = (
    'mkdir -p "$0/sys" && nsenter --net="$3" mount -t sysfs sysfs "$0/sys"'
    ' && for it in class/net devices/virtual/net; do mount --bind "$0/sys/$it" "/sys/$it" || exit; done'
)
"""Puts the interfaces of a test's network, `$3`, in place, and nothing else: cgroups are to be seen below /sys, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A network and a mount namespace.

    Attributes:
        pid: the process that keeps them.
        folder: the test's, for what belongs to them.
    """

    pid: int
    folder: Path

    @property
    def net(self) -> Path:
        """Its /sys/class/net, seen from outside."""
        return Path(f"/proc/{self.pid}/root/sys/class/net")

    @property
    def bridge_conf(self) -> Path:
        """What is /etc/qemu/bridge.conf inside."""
        return self.folder / "etc" / "qemu" / "bridge.conf"

    def command(self, *argv: str | Path) -> list[str]:
        """The command line that runs `argv` inside."""
        user = [] if AS_ROOT else ["--user", "--preserve-credentials"]
        return ["nsenter", f"--target={self.pid}", *user, "--net", "--mount", "--", *map(str, argv)]

    def run(self, *argv: str | Path) -> str:
        """Run a program inside to its end; return what it printed.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            self.command(*argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(map(str, argv))}: {done.stdout}"
        return done.stdout

    def inside(self, main: Callable[[], T]) -> T:
        """Call `main` in a thread of this process that is in this network (root only); return what it returns.

        Sockets that it makes, and threads that it starts, are there as well.
        """

        def enter() -> T:
            with self.entered():
                return main()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result(LIMIT_S)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the calling thread in this network meanwhile (root only): what it starts, and connects to, is there."""
        with Path("/proc/thread-self/ns/net").open("rb") as before, Path(f"/proc/{self.pid}/ns/net").open("rb") as here:
            set_network(here.fileno())
            try:
                yield
            finally:
                set_network(before.fileno())

    def program(self, name: str, *argv: str | Path) -> Path:
        """A program outside that runs `argv` inside, with its own arguments behind."""
        path = self.folder / name
        # Not written again: somebody may be running it.
        if not path.exists():
            path.write_text(f'#!/bin/sh\nexec {shlex.join(self.command(*argv))} "$@"\n')
            path.chmod(0o755)
        return path

    def helper(self) -> Path:
        """The real qemu-bridge-helper, run inside."""
        return self.program("helper", HELPER)


@contextmanager
def new_namespace(*, beside: Namespace | None = None) -> Iterator[Namespace]:
    """A new namespace with loopback, its own /sys and its own /etc/qemu, empty at first.

    Args:
        beside: one that a veth shall lead to. An ordinary user may join only two of the same user namespace.
    """
    enter: list[str] = []
    user = [] if AS_ROOT else ["--user", "--map-root-user"]
    if beside is not None and not AS_ROOT:
        enter, user = ["nsenter", f"--target={beside.pid}", "--user", "--preserve-credentials", "--"], []
    with tempfile.TemporaryDirectory(prefix="kvsnet") as name:
        folder = Path(name)
        # QEMU's own user reads /etc too.
        folder.chmod(0o755)
        (folder / "real").mkdir()
        (folder / "etc" / "qemu").mkdir(parents=True)
        for entry in Path("/etc").iterdir():
            if entry.name != "qemu":
                (folder / "etc" / entry.name).symlink_to(folder / "real" / entry.name)
        script = f"{_MOUNTS} && mount -t sysfs sysfs /sys && ip link set lo up && echo ready && exec cat"
        with subprocess.Popen(
            [*enter, "unshare", *user, "--net", "--mount", "--propagation=private", "sh", "-c", script, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            try:
                assert holder.stdout is not None
                assert holder.stdout.readline() == "ready\n", "no namespace: neither root nor user namespaces here?"
                yield Namespace(pid=holder.pid, folder=folder)
            finally:
                holder.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lan:
    """A bridge, and a router on it that gives out addresses by DHCP.

    Attributes:
        bridge: the bridge's name.
        inside: where it is.
        router: where the DHCP server is.
        subnet: the first three numbers of every address.
        log: what the DHCP server says.
    """

    bridge: str
    inside: Namespace
    router: Namespace
    subnet: str
    log: Path

    def ping(self, address: str) -> None:
        """Have the router ping a guest, until it answers.

        Raises:
            AssertionError: it does not, within `LIMIT_S`.
        """
        deadline = time.monotonic() + LIMIT_S
        while True:
            done = subprocess.run(
                self.router.command("ping", "-n", "-c", "1", "-W", "1", address),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, f"{done.stdout}{done.stderr}"

    def around(self, *argv: str | Path) -> list[str]:
        """The command line that starts a supervisor (as root) so that its helper finds this bridge."""
        script = f'{_MOUNTS} && mount --bind "$1" "$2" && {_SYSFS} && shift 3 && exec "$@"'
        words = (self.inside.folder, self.inside.helper(), HELPER, f"/proc/{self.inside.pid}/ns/net", *argv)
        return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, *map(str, words)]


@contextmanager
def new_lan(bridge: str = "br0", subnet: str = "10.91.7") -> Iterator[Lan]:
    """A bridge, and a router with a DHCP server on it, until the end."""
    with ExitStack() as stack:
        inside = stack.enter_context(new_namespace())
        router = stack.enter_context(new_namespace(beside=inside))
        inside.run("ip", "link", "add", bridge, "type", "bridge")
        inside.run("ip", "link", "set", bridge, "up")
        inside.run("ip", "link", "add", "router", "type", "veth", "peer", "name", "lan0", "netns", str(router.pid))
        inside.run("ip", "link", "set", "router", "master", bridge, "up")
        router.run("ip", "address", "add", f"{subnet}.1/24", "dev", "lan0")
        router.run("ip", "link", "set", "lan0", "up")
        log = router.folder / "dnsmasq.log"
        stack.enter_context(_dnsmasq(router, subnet, log))
        yield Lan(bridge=bridge, inside=inside, router=router, subnet=subnet, log=log)


def _program(name: str) -> str:
    # Debian has it where an ordinary user does not look for programs.
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None, f"{name} is missing: tools/install-system dev"
    return found


@contextmanager
def _dnsmasq(router: Namespace, subnet: str, log: Path) -> Iterator[None]:
    argv = router.command(
        # In the foreground, as the user it is started by, without name service.
        *(
            _program("dnsmasq"),
            "--no-daemon",
            "--conf-file=/dev/null",
            "--port=0",
            "--interface=lan0",
            "--bind-interfaces",
        ),
        *(f"--dhcp-range={subnet}.100,{subnet}.199,255.255.255.0,1h", "--dhcp-authoritative", "--log-dhcp"),
        # It would ask for three seconds whether somebody has the address already.
        *("--no-ping", f"--dhcp-leasefile={router.folder}/leases", "--log-facility=-"),
    )
    with (
        log.open("wb") as output,
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as server,
    ):
        try:
            deadline = time.monotonic() + LIMIT_S
            while "bound exclusively to interface lan0" not in log.read_text():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            yield
        finally:
            server.kill()


@pytest.fixture
def netns() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    with new_namespace() as made:
        yield made


@pytest.fixture
def lan() -> Iterator[Lan]:
    """A bridge with a DHCP server on it, in namespaces of the test's own."""
    with new_lan() as made:
        yield made
