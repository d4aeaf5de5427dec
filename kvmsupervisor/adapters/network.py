"""Taps on bridges, opened by QEMU's own `qemu-bridge-helper`, and the file with the bridges that the helper may use.

The supervisor runs the helper and passes the tap's descriptor to QEMU (`-netdev tap,fd=N`). So QEMU needs no privileges
and no helper of its own. The helper gets one end of a socket pair and sends the descriptor through it.

Source: QEMU's qemu-bridge-helper.c and net/tap.c (`net_bridge_run_helper`, which runs the helper in QEMU).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from kvmsupervisor.domain.bridge_acl import Acl, BrokenAcl, can_be_named, missing, read_acl, with_lines, without_lines
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.words import option
from kvmsupervisor.folders import make_folder

HELPERS = (
    Path("/usr/lib/qemu/qemu-bridge-helper"),  # Debian, Ubuntu, Arch, Alpine
    Path("/usr/libexec/qemu-bridge-helper"),  # Fedora, RHEL, Gentoo
    Path("/usr/lib/qemu-bridge-helper"),  # openSUSE
    Path("/usr/local/libexec/qemu-bridge-helper"),  # QEMU's own `make install`
)

BRIDGE_CONF = Path("/etc/qemu/bridge.conf")
"""The path is built into the helper (CONFIG_QEMU_CONFDIR); it is the same in every distribution."""

VHOST_NET = Path("/dev/vhost-net")
NET = Path("/sys/class/net")

HELPER_TIMEOUT_S = 5.0
"""The helper takes 3 ms. Arbitrary: long enough for a busy host, short enough for a start that waits."""

SAID_LIMIT = 4096
"""The most bytes to read of what the helper prints; its sentences are short."""

NEW_MODE = 0o640
"""Mode of a bridge.conf that did not exist. A setuid helper reads the file as the user who runs the helper. So what
this supervisor allows for itself is not allowed for every user of the host."""

EDIT_TRIES = 10
"""How often to start over because another program has written the file meanwhile. Arbitrary: once is rare already."""

TUNGETIFF = 0x800454D2
"""`_IOR('T', 210, unsigned int)`."""

IFREQ_BYTES, IFNAMSIZ = 40, 16
"""Sizes of `struct ifreq`, and of the name at its start (include/uapi/linux/if.h)."""

_writing = threading.Lock()


class NetworkTrouble(Exception):
    """There is no tap for now: wait and try again. The message says what was found and what would be right."""


@frozen(kw_only=True)
class Tap:
    """An open tap that is a port of its bridge. The owner of this object closes it.

    Attributes:
        fd: the tap, with virtio-net headers; closed on exec unless it is passed on.
        vhost_fd: its vhost-net; None where the host has none.
    """

    fd: int
    vhost_fd: int | None = None

    def close(self) -> None:
        """Close the descriptors, once.

        Quick once QEMU has the tap. When no other process has it, as after a failed start, the kernel also removes the
        tap from its bridge, which takes about 20 ms: call this in a thread then.
        """
        os.close(self.fd)
        if self.vhost_fd is not None:
            os.close(self.vhost_fd)


async def open_tap(
    bridge: str,
    *,
    helper: Path | None = None,
    vhost: bool = True,
    acl: Path = BRIDGE_CONF,
    net: Path = NET,
    vhost_device: Path = VHOST_NET,
    timeout_s: float = HELPER_TIMEOUT_S,
) -> Tap:
    """Make a tap on the bridge.

    When cancelled or out of time, kills the helper and leaves no tap. Blocks the event loop only for a vfork and exec
    (0.4 ms); asyncio's own subprocesses would block it for 2 ms more.

    Args:
        bridge: the name of the bridge.
        helper: the program to run; None: the first of `HELPERS` that exists.
        vhost: whether to open vhost-net as well, where the host has it.
        acl: the file that the helper reads; used only to explain a refusal.
        net: the folder of all interfaces in sysfs; used only to explain a refusal.
        vhost_device: the device of vhost-net.
        timeout_s: the helper's time limit.

    Raises:
        NetworkTrouble: there is no tap.
    """
    program = _find(helper)
    try:
        fd = await _run_helper(program, bridge, timeout_s)
    except _Refused as error:
        raise NetworkTrouble(_explain(str(error), bridge, program, acl, net)) from None
    except OSError as error:
        raise NetworkTrouble(f"{program} cannot be run: {error.strerror or error}") from error
    return Tap(fd=fd, vhost_fd=_open_vhost(vhost_device) if vhost else None)


def tap_name(fd: int) -> str:
    """The name of an open tap's interface (TUNGETIFF, include/uapi/linux/if_tun.h)."""
    request = fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ_BYTES))
    return request[:IFNAMSIZ].rstrip(b"\0").decode(errors="replace")


def allow_bridges(
    bridges: Iterable[str], path: Path = BRIDGE_CONF, *, owner: str | None = None, net: Path = NET
) -> tuple[str, ...]:
    """Allow the helper to use these bridges; return the bridges for which a line was added.

    Everything else in the file stays byte for byte. No line is added for a bridge that an administrator denies, or that
    does not exist; `open_tap` reports these. When there is nothing to add, nothing is written, and the call takes 0.1
    ms. Otherwise the file is replaced as a whole, which waits for the disk once.

    Args:
        bridges: the names of the bridges.
        path: of the file.
        owner: who removes the lines again (`withdraw_bridges`); None: only people do.
        net: the folder of all interfaces in sysfs.

    Raises:
        NetworkTrouble: the file cannot be read or written, or the helper could not read it.
    """
    here = [bridge for bridge in bridges if lack_of(bridge, net) is None]
    added: tuple[str, ...] = ()

    def change(content: bytes | None) -> bytes:
        nonlocal added
        added = missing(_read_acl(path, content), here, owner)
        return with_lines(content or b"", added, owner)

    try:
        _edit(path, change)
    except BrokenAcl as error:
        raise NetworkTrouble(f"no bridge can be allowed before this line is mended: {error}") from error
    except OSError as error:
        lines = ", ".join(f"'allow {bridge}'" for bridge in added)
        raise NetworkTrouble(f"{path} needs {lines}, but cannot be written: {error.strerror}") from error
    return added


def withdraw_bridges(wanted: Container[str], path: Path = BRIDGE_CONF, *, owner: str) -> tuple[str, ...]:
    """Remove the owner's lines that allow other bridges than `wanted`; return those bridges.

    What a person has written or changed stays byte for byte. Waits for the disk when there is such a line.

    Raises:
        NetworkTrouble: the file cannot be read or written.
    """
    gone: tuple[str, ...] = ()

    def change(content: bytes | None) -> bytes:
        nonlocal gone
        kept, gone = without_lines(content or b"", wanted, owner)
        return kept

    try:
        _edit(path, change)
    except OSError as error:
        lines = ", ".join(f"'allow {bridge}'" for bridge in gone)
        raise NetworkTrouble(f"{path} needs {lines} no more, but cannot be written: {error.strerror}") from error
    return gone


def denial_of(bridge: str, path: Path = BRIDGE_CONF) -> str | None:
    """Where an administrator denies this bridge, for people; None when nobody denies it."""
    try:
        rule = _read_acl(path).denial(bridge)
    except BrokenAcl as error:
        return f"qemu-bridge-helper cannot read {error}"
    return None if rule is None else f"an administrator denies {bridge} in {rule.place}"


# --- the helper -----------------------------------------------------------------------------------------------


class _Refused(Exception):
    """The helper sent no descriptor. The message is what the helper printed, or how it ended."""


def _find(helper: Path | None) -> Path:
    looked = HELPERS if helper is None else (helper,)
    for path in looked:
        if path.is_file() and os.access(path, os.X_OK):
            return path
    places = ", ".join(map(str, looked))
    raise NetworkTrouble(
        f"no qemu-bridge-helper that can be executed: looked for {places}; it comes with QEMU "
        "(Debian: qemu-system-common, Fedora: qemu-common)"
    )


async def _run_helper(program: Path, bridge: str, timeout_s: float) -> int:
    """Run the helper to its end; return the tap that it sent.

    Raises:
        _Refused: the helper sent no tap.
        OSError: the helper could not be started.
    """
    with contextlib.ExitStack() as stack:
        ours, its = socket.socketpair()
        stack.enter_context(ours)
        with its:
            child = _start(program, bridge, its.fileno())
        assert child.stderr is not None
        stack.enter_context(child.stderr)
        ours.setblocking(False)
        try:
            status = await _wait(child, timeout_s)
        except TimeoutError:
            raise _Refused(f"it did not end within {timeout_s:g} s and was killed") from None
        fd = _receive(ours)
        if fd is not None:
            return fd
        words = _read_now(child.stderr.fileno())
        raise _Refused(words or f"it said nothing, sent no descriptor and ended with {status}")


def _start(program: Path, bridge: str, fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [program, "--use-vnet", option("--fd", str(fd)), option("--br", bridge)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[fd],
        # So that no Ctrl-C of a terminal reaches it. A session of its own would do that, too, but the kernel schedules
        # each session as one unit (CONFIG_SCHED_AUTOGROUP); on a busy host the helper then took twice as long.
        process_group=0,
    )


def _read_now(pipe: int) -> str:
    """What is in the pipe, on one line. Never waits: a child of the helper may still have the pipe open."""
    os.set_blocking(pipe, False)
    try:
        return " ".join(os.read(pipe, SAID_LIMIT).decode(errors="replace").split())
    except BlockingIOError:
        return ""


async def _wait(child: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Wait until the child has ended, and reap it; return how it ended. Kill it when the time is over.

    Raises:
        TimeoutError: the child was killed because the time was over.
    """
    try:
        pidfd = os.pidfd_open(child.pid)
    except OSError:
        # No descriptor is left, so the child cannot be watched: end it.
        child.kill()
        child.wait()
        raise
    # The pidfd is used to wait for the child; this keeps Popen from waiting for it, and from warning.
    child.returncode = 0
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[str] = loop.create_future()

    def reap() -> None:
        loop.remove_reader(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        if not ended.done():
            assert result is not None
            how = "exit status" if result.si_code == os.CLD_EXITED else "signal"
            ended.set_result(f"{how} {result.si_status}")

    loop.add_reader(pidfd, reap)
    try:
        async with asyncio.timeout(timeout_s):
            return await ended
    finally:
        if not ended.done() or ended.cancelled():
            # `reap` runs once the child has died. The kernel may take a while; nothing waits for it.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _receive(ours: socket.socket) -> int | None:
    """The descriptor that was sent; None when none was. It is closed on exec."""
    fds = array.array("i")
    try:
        # Not socket.recv_fds: it ignores its flags.
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for surplus in fds[1:]:
        os.close(surplus)
    return fds[0] if fds else None


def _open_vhost(device: Path) -> int | None:
    # Without vhost-net QEMU moves the packets itself, which is only slower.
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None


# --- why there is none ----------------------------------------------------------------------------------------


def _explain(said: str, bridge: str, program: Path, acl: Path, net: Path) -> str:
    """A sentence for people: the cause, and what would fix it."""
    by_acl = "access denied by acl file" in said or "parse default acl file" in said
    # A bridge that does not exist has no line yet: the line is written once the bridge exists.
    if by_acl and (lack_of(bridge, net) is None or _is_kept_off(bridge, acl)):
        return _explain_acl(said, bridge, acl)
    if "/dev/net/tun" in said:
        return (
            f"no tap for bridge {bridge}: {said}; /dev/net/tun is made where the host has the tun module "
            "(modprobe tun), and a container must be allowed to use it (--device /dev/net/tun)"
        )
    if "failed to create tun device" in said:
        return (
            f"no tap for bridge {bridge}: {said}; the supervisor needs CAP_NET_ADMIN, and /dev/net/tun must be "
            "the tun device"
        )
    return lack_of(bridge, net) or f"no tap for bridge {bridge}: {program} says: {said}"


def lack_of(bridge: str, net: Path = NET) -> str | None:
    """A sentence for people when there is no such bridge; None when there is, or when sysfs cannot tell."""
    interface = net / bridge
    if not net.is_dir() or (interface / "bridge").is_dir():
        return None
    if interface.exists():
        return (
            f"{bridge} is a network interface of this host, but no bridge; name a bridge, or make one and add "
            f"{bridge} to it (ip link set {bridge} master BRIDGE)"
        )
    here = ", ".join(sorted(entry.name for entry in net.iterdir() if (entry / "bridge").is_dir())) or "none"
    return f"there is no bridge {bridge} on this host (bridges here: {here}); ip link add {bridge} type bridge"


def _is_kept_off(bridge: str, acl: Path) -> bool:
    """Whether the bridge would be refused even if it existed, so that a person has to fix the file."""
    return not can_be_named(bridge) or denial_of(bridge, acl) is not None


def _explain_acl(said: str, bridge: str, path: Path) -> str:
    """A sentence for people: the line in the file that refuses the bridge, or is missing."""
    refused = f"qemu-bridge-helper may not use bridge {bridge}"
    try:
        rules = _read_acl(path)
    except BrokenAcl as error:
        return f"{refused}: it cannot read {error}"
    if (denial := rules.denial(bridge)) is not None:
        return f"{refused}: an administrator denies it in {denial.place}"
    if not can_be_named(bridge):
        return f"{refused}: {path} cannot allow that name and no other; give the bridge another name"
    if not path.exists():
        return f"{refused}: {path} does not exist; it needs the line 'allow {bridge}'"
    if rules.permission(bridge) is None:
        return f"{refused}: {path} has no line 'allow {bridge}'"
    return f"{refused}: it says {said}, though {path} allows it; does it read another file?"


# --- bridge.conf ----------------------------------------------------------------------------------------------


def _read_acl(path: Path, content: bytes | None = None) -> Acl:
    """The rules in the file. `content` is the file's content, where the caller has read it already."""

    def read(name: str) -> bytes | None:
        try:
            return content if content is not None and name == str(path) else Path(name).read_bytes()
        except (OSError, ValueError):
            return None

    return read_acl(str(path), read)


def _edit(path: Path, change: Callable[[bytes | None], bytes]) -> None:
    """Let `change` make the new content out of the present one (None: there is no file); write the file if they differ.

    Another supervisor, or a person, may edit the same file. The file is not locked, because anybody who may read it
    could hold such a lock for ever. Right before it is replaced, the file is read again. If a line is lost all the
    same, the helper refuses its bridge, and the next start writes the line again.

    Raises:
        NetworkTrouble: the file cannot be read, or others write it all the time.
        OSError: the file cannot be written.
    """
    with _writing:
        for _ in range(EDIT_TRIES):
            content = _content(path)
            new = change(content)
            if new == (content or b"") or _replace(path, content, new):
                return
    raise NetworkTrouble(f"{path} is being written by somebody else all the time")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise NetworkTrouble(f"{path} cannot be read: {error.strerror}") from error


def _replace(path: Path, before: bytes | None, content: bytes) -> bool:
    """Replace the file, keeping its mode and owner; return False if its content is not `before` any more."""
    path = path.resolve()
    make_folder(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if before is None:
                os.fchmod(descriptor, NEW_MODE)
            else:
                was = path.stat()
                os.fchown(descriptor, was.st_uid, was.st_gid)
                os.fchmod(descriptor, was.st_mode & 0o7777)
            file.flush()
            # An administrator's deny lines must survive a power cut.
            os.fsync(descriptor)
        if _content(path) != before:
            return False
        try:
            aside.replace(path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # A file that is mounted into a container cannot be replaced (EBUSY).
            _write_over(path, before or b"", content)
        return True
    finally:
        aside.unlink(missing_ok=True)


def _write_over(path: Path, before: bytes, content: bytes) -> None:
    """Write the file in place. Cut off anywhere, the helper can still read it, and every line of people's is there."""
    is_longer = content.startswith(before)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if is_longer else 0))
    try:
        if is_longer:
            os.write(descriptor, content[len(before) :])
        else:
            # First with blank lines at the end, for the old length; then without them.
            os.pwrite(descriptor, content.ljust(len(before), b"\n"), 0)
            os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
