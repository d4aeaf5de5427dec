"""Taps by the real helper, on real bridges in namespaces of the test's own; and the file that allows them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters import network
from kvmsupervisor.adapters.network import NetworkTrouble, Tap, allow_bridges, open_tap, tap_name, withdraw_bridges
from kvmsupervisor.cli.demo.guest import MINIMUM_RAM_MIB, Guest
from kvmsupervisor.domain.bridge_acl import BrokenAcl, read_acl, with_lines
from tests.support.net import AS_ROOT, HELPER, Lan, Namespace, new_lan

LIMIT_S = 30.0
TUNGETIFF = 0x800454D2
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


@pytest.fixture
def place(netns: Namespace) -> Namespace:
    """A namespace with the bridge br0, which its bridge.conf allows, and the bridge br1, of which it says nothing."""
    for bridge in ("br0", "br1"):
        netns.run("ip", "link", "add", bridge, "type", "bridge")
        netns.run("ip", "link", "set", bridge, "up")
    netns.bridge_conf.write_text("allow br0\n")
    return netns


@pytest.fixture(autouse=True)
async def no_descriptor_is_left() -> AsyncIterator[None]:
    """Law: whatever happens, no descriptor stays open but those of a tap that was returned."""
    before = descriptors()
    yield
    # One of an earlier test may have been closed meanwhile, by the collector.
    await until(lambda: descriptors() <= before)


def descriptors() -> set[str]:
    listed = os.listdir("/proc/self/fd")  # noqa: PTH208
    return {name for name in listed if os.path.exists(f"/proc/self/fd/{name}")}  # noqa: PTH110


async def opened(place: Namespace, bridge: str = "br0", helper: Path | None = None, **options: Any) -> Tap:
    options = {"vhost": False, "acl": place.bridge_conf, "net": place.net, **options}
    return await open_tap(bridge, helper=helper or place.helper(), **options)


async def refused(place: Namespace, bridge: str = "br0", helper: Path | None = None, **options: Any) -> str:
    with pytest.raises(NetworkTrouble) as caught:
        await opened(place, bridge, helper, **options)
    assert ports(place, "br0") == ports(place, "br1") == set()
    return str(caught.value)


def ports(place: Namespace, bridge: str = "br0") -> set[str]:
    return {entry.name for entry in (place.net / bridge / "brif").iterdir()}


def name_and_flags(tap: Tap) -> tuple[str, int]:
    answer = fcntl.ioctl(tap.fd, TUNGETIFF, bytes(40))
    return answer[:16].rstrip(b"\0").decode(), int(struct.unpack_from("=H", answer, 16)[0])


def script(folder: Path, text: str) -> Path:
    """A helper of a test's own."""
    path = folder / "some-helper"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.005)


# --- a tap ----------------------------------------------------------------------------------------------------


async def test_a_tap_is_an_up_port_of_its_bridge(place: Namespace) -> None:
    """Law: a tap with virtio-net headers, up, on the bridge that was named; closed on exec; gone when it is closed."""
    tap = await opened(place)
    name, flags = name_and_flags(tap)
    assert flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) == IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    assert ports(place) == {name} == {tap_name(tap.fd)}
    assert ports(place, "br1") == set()
    assert int((place.net / name / "flags").read_text(), 16) & 1  # IFF_UP
    assert not os.get_inheritable(tap.fd)
    assert tap.vhost_fd is None
    tap.close()
    await until(lambda: not ports(place))


async def test_many_at_once(place: Namespace) -> None:
    """Law: each call has a tap of its own."""
    taps = await asyncio.gather(*(opened(place) for _ in range(8)))
    assert len({name_and_flags(tap)[0] for tap in taps}) == len(ports(place)) == 8
    for tap in taps:
        tap.close()


async def test_a_bridge_that_was_just_allowed(place: Namespace) -> None:
    """Law: the line that `allow_bridges` adds is one that the helper goes by."""
    assert allow_bridges(["br0", "br1"], place.bridge_conf, net=place.net) == ("br1",)
    tap = await opened(place, "br1")
    assert len(ports(place, "br1")) == 1
    tap.close()


async def test_vhost_net_is_opened_where_the_host_has_it(place: Namespace, tmp_path: Path) -> None:
    """Law: closed on exec, and by `close`; where it is missing, or not wanted, there is a tap all the same."""
    device = tmp_path / "vhost-net"
    assert (await _vhost_fd(place, vhost=True, vhost_device=device)) is None
    device.touch()
    assert (await _vhost_fd(place, vhost=False, vhost_device=device)) is None
    fd = await _vhost_fd(place, vhost=True, vhost_device=device)
    assert fd is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def _vhost_fd(place: Namespace, **options: Any) -> int | None:
    tap = await opened(place, **options)
    if tap.vhost_fd is not None:
        assert not os.get_inheritable(tap.vhost_fd)
        assert stat.S_ISREG(os.fstat(tap.vhost_fd).st_mode)
    tap.close()
    return tap.vhost_fd


# --- why there is none ----------------------------------------------------------------------------------------


async def test_no_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: all places that were looked at are named, and what brings it; a file that is no program is none."""
    with pytest.raises(NetworkTrouble, match=f"looked for {tmp_path}/nowhere; it comes with QEMU"):
        await open_tap("br0", helper=tmp_path / "nowhere")
    (tmp_path / "plain").touch(mode=0o644)
    monkeypatch.setattr(network, "HELPERS", (tmp_path / "nowhere", tmp_path / "plain", tmp_path))
    with pytest.raises(NetworkTrouble, match=f"looked for {tmp_path}/nowhere, {tmp_path}/plain, {tmp_path}; "):
        await open_tap("br0")


def test_the_helper_is_looked_for_where_distributions_have_it() -> None:
    """Law: Debian's and Fedora's places; the one of this machine is among them."""
    assert {"/usr/lib/qemu/qemu-bridge-helper", "/usr/libexec/qemu-bridge-helper"} <= set(map(str, network.HELPERS))
    assert HELPER in network.HELPERS
    assert HELPER.exists(), "qemu-bridge-helper is missing: tools/install-system dev"


async def test_a_helper_that_cannot_be_executed_after_all(place: Namespace, tmp_path: Path) -> None:
    """Law: what the kernel says is said."""
    broken = tmp_path / "helper"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    assert await refused(place, helper=broken) == f"{broken} cannot be run: Exec format error"


@pytest.mark.parametrize("conf", ["allow all\n", "# nothing\n"])
async def test_no_such_bridge(place: Namespace, conf: str) -> None:
    """Law: the bridges that are there are named, and how to make one, whether bridge.conf speaks of it or not."""
    place.bridge_conf.write_text(conf)
    said = await refused(place, "br9")
    assert said == "there is no bridge br9 on this host (bridges here: br0, br1); ip link add br9 type bridge"


async def test_an_interface_that_is_no_bridge(place: Namespace) -> None:
    """Law: it is not called missing."""
    place.bridge_conf.write_text("allow all\n")
    assert (await refused(place, "lo")).startswith("lo is a network interface of this host, but no bridge; ")


@pytest.mark.parametrize(
    ("conf", "bridge", "why"),
    [
        ("allow br1\n", "br0", "{path} has no line 'allow br0'"),
        (None, "br0", "{path} does not exist; it needs the line 'allow br0'"),
        ("allow all\n\ndeny br0\n", "br0", "an administrator denies it in {path} line 3: deny br0"),
        ("allow br0\ndeny all\n", "br0", "an administrator denies it in {path} line 2: deny all"),
        ("permit br0\n", "br0", "it cannot read {path} line 1: permit br0 ("),
        ("allow br1\n", "all", "{path} cannot allow that name and no other; "),
    ],
)
async def test_a_bridge_that_is_not_allowed(place: Namespace, conf: str | None, bridge: str, why: str) -> None:
    """Law: the file is named, and the very line that denies."""
    if conf is None:
        place.bridge_conf.unlink()
    else:
        place.bridge_conf.write_text(conf)
    said = await refused(place, bridge)
    assert said.startswith(f"qemu-bridge-helper may not use bridge {bridge}: " + why.format(path=place.bridge_conf))


async def test_a_helper_that_reads_another_file(place: Namespace) -> None:
    """Law: when the file that we know allows what the helper refuses, that is said, not guessed."""
    elsewhere = place.folder / "elsewhere"
    elsewhere.write_text("allow br1\n")
    with pytest.raises(NetworkTrouble, match=f"access denied by acl file, though {elsewhere} allows it; does it read"):
        await open_tap("br1", helper=place.helper(), acl=elsewhere, net=place.net)


async def test_no_tun_device(place: Namespace) -> None:
    """Law: missing, and another device in its place: each is named with what would help."""
    place.run("mount", "-t", "tmpfs", "tmpfs", "/dev/net")
    said = await refused(place)
    assert "failed to open /dev/net/tun: No such file or directory; " in said
    assert "modprobe tun" in said
    place.run("touch", "/dev/net/tun")
    place.run("mount", "--bind", "/dev/null", "/dev/net/tun")
    said = await refused(place)
    assert "failed to create tun device: Inappropriate ioctl for device; " in said
    assert "/dev/net/tun must be the tun device" in said


async def test_without_the_right_to_make_a_tap(place: Namespace) -> None:
    """Law: the capability that is missing is named."""
    limited = place.program("limited", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", HELPER)
    said = await refused(place, helper=limited)
    assert "failed to create tun device: Operation not permitted; the supervisor needs CAP_NET_ADMIN" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'the  moon is' >&2; echo wrong >&2; exit 3", "the moon is wrong"),
        ("exit 3", "it said nothing, sent no descriptor and ended with exit status 3"),
        ("kill -9 $$", "it said nothing, sent no descriptor and ended with signal 9"),
        ("exit 0", "it said nothing, sent no descriptor and ended with exit status 0"),
        # A child that outlives it has its standard error open; nobody waits for that one.
        ("sleep 1 & exit 1", "it said nothing, sent no descriptor and ended with exit status 1"),
    ],
)
async def test_anything_else_is_told_in_the_helpers_own_words(place: Namespace, text: str, said: str) -> None:
    """Law: its words on one line, or how it ended."""
    helper = script(place.folder, text)
    assert await refused(place, helper=helper) == f"no tap for bridge br0: {helper} says: {said}"


# --- a helper that hangs --------------------------------------------------------------------------------------


async def test_out_of_time(place: Namespace) -> None:
    """Law: it is killed and reaped."""
    helper = script(place.folder, f"echo $$ >{place.folder}/pid; exec sleep 60")
    assert "it did not end within 0.5 s and was killed" in await refused(place, helper=helper, timeout_s=0.5)
    pid = int((place.folder / "pid").read_text())
    await until(lambda: not Path(f"/proc/{pid}").exists())


async def test_cancelled(place: Namespace) -> None:
    """Law: it is killed and reaped, and the cancellation goes on."""
    helper = script(
        place.folder, f"echo $$ >{place.folder}/new; mv {place.folder}/new {place.folder}/pid; exec sleep 60"
    )
    task = asyncio.create_task(opened(place, helper=helper))
    await until((place.folder / "pid").exists)
    pid = int((place.folder / "pid").read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not Path(f"/proc/{pid}").exists())


async def test_one_that_hangs_after_it_has_sent_the_tap(place: Namespace) -> None:
    """Law: no tap is left on the bridge."""
    helper = script(place.folder, f'{place.helper()} "$@"; touch {place.folder}/sent; exec sleep 60')
    task = asyncio.create_task(opened(place, helper=helper))
    await until((place.folder / "sent").exists)
    assert len(ports(place)) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not ports(place))


async def test_a_helper_that_cannot_be_watched_is_not_kept(place: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: without a descriptor for it, it is killed and reaped at once, and the cause is said."""

    def none_left(pid: int) -> int:
        raise OSError(24, "Too many open files")

    helper = script(place.folder, "exec sleep 60")
    monkeypatch.setattr(os, "pidfd_open", none_left)
    before = children()
    assert await refused(place, helper=helper) == f"{helper} cannot be run: Too many open files"
    assert children() == before


def children() -> set[str]:
    return {pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


# --- bridge.conf ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conf",
    ["allow br0", "allow\tbr0", "allow  br0  ", "allow br0 # x", "allow all", "allow br0\ndeny br0", "deny all",
     "# allow br0", "allow br00", "include {more}", "allow br0\ninclude {less}", "include {broken}", "include nowhere",
     "allow br0\nnonsense", "allow", "allow br0\n\tdeny\tall\n", "allow all\ndeny br1"],
)  # fmt: skip
async def test_the_file_is_read_as_the_helper_reads_it(place: Namespace, conf: str) -> None:
    """Law: what we take for allowed is what the real helper allows."""
    files = {"more": "allow br0\n", "less": "deny br0\n", "broken": "allow br0\nnonsense\ndeny br0\n"}
    for name, text in files.items():
        (place.folder / name).write_text(text)
    place.bridge_conf.write_text(conf.format(**{name: place.folder / name for name in files}))
    try:
        rules = read_acl(str(place.bridge_conf), lambda name: Path(name).read_bytes() if Path(name).exists() else None)
        expected = rules.denial("br0") is None and rules.permission("br0") is not None
    except BrokenAcl:
        expected = False
    if expected:
        (await opened(place)).close()
    else:
        assert "qemu-bridge-helper may not use bridge br0: " in await refused(place)


UNSEEN = Path("/nonexistent")
"""No sysfs: every bridge may be there."""


def test_a_file_that_is_missing_is_made(tmp_path: Path) -> None:
    """Law: with its folder, readable for root's group at most."""
    path = tmp_path / "qemu" / "bridge.conf"
    assert allow_bridges(["br0", "br-x", "br0"], path, net=UNSEEN) == ("br0", "br-x")
    assert path.read_text() == "allow br0\nallow br-x\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["bridge.conf"]


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    """Law: byte for byte, with mode and owner; what a link leads to is written, not the link."""
    real, path = tmp_path / "real.conf", tmp_path / "bridge.conf"
    before = b"# ours \xff\r\n\n  deny\tbr9\ninclude /nowhere\nallow br0"
    real.write_bytes(before)
    real.chmod(0o604)
    if AS_ROOT:
        os.chown(real, 12001, 12002)
    owner = (real.stat().st_uid, real.stat().st_gid)
    path.symlink_to(real)
    assert allow_bridges(["br1", "br9", "br0"], path, net=UNSEEN) == ("br1",)
    assert path.is_symlink()
    assert real.read_bytes() == before + b"\nallow br1\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o604
    assert (real.stat().st_uid, real.stat().st_gid) == owner


@pytest.mark.parametrize(
    "content", ["allow br0\n", "allow all\n", "deny br0\n", "deny all\n", "allow all\ndeny br0", "include {other}"]
)
def test_nothing_is_written_when_nothing_is_to_be_added(tmp_path: Path, content: str) -> None:
    """Law: also not for a bridge that an administrator denies."""
    (tmp_path / "other").write_text("allow br0\n")
    path = tmp_path / "bridge.conf"
    path.write_text(content.format(other=tmp_path / "other"))
    before = path.stat()
    assert allow_bridges(["br0", "all", "a b", ""], path, net=UNSEEN) == ()
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_nothing_is_made_for_nobody(tmp_path: Path) -> None:
    """Law: a host without bridges in use gets no file."""
    assert allow_bridges([], tmp_path / "qemu" / "bridge.conf", net=UNSEEN) == ()
    assert not (tmp_path / "qemu").exists()


def test_a_file_that_the_helper_cannot_read(tmp_path: Path) -> None:
    """Law: the line is named; another one behind it would be of no use."""
    path = tmp_path / "bridge.conf"
    path.write_text("allow br0\nallow: br1\n")
    with pytest.raises(NetworkTrouble, match=r"before this line is mended: .*bridge\.conf line 2: allow: br1"):
        allow_bridges(["br1"], path, net=UNSEEN)
    assert path.read_text() == "allow br0\nallow: br1\n"


def test_a_file_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    """Law: the file, the line that it needs, and the cause."""
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "bridge.conf"
    with pytest.raises(NetworkTrouble, match=rf"{path} needs 'allow br0', 'allow br1', but cannot be written: "):
        allow_bridges(["br0", "br1"], path, net=UNSEEN)
    with pytest.raises(NetworkTrouble, match=rf"{tmp_path} cannot be read: Is a directory"):
        allow_bridges(["br0"], tmp_path, net=UNSEEN)


def test_calls_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """Law: every bridge has its line in the end, once, whichever threads they are called from."""
    path = tmp_path / "bridge.conf"
    path.write_text("deny br0\n")
    names = [f"br{number}" for number in range(1, 41)]
    with ThreadPoolExecutor(8) as threads:
        added = list(threads.map(lambda name: allow_bridges([name, "br1"], path, net=UNSEEN), names))
    lines = path.read_text().splitlines()
    assert lines[0] == "deny br0"
    assert sorted(lines[1:]) == sorted(f"allow {name}" for name in names)
    assert sorted(name for some in added for name in some) == sorted(names)


async def test_a_file_that_is_mounted_is_written_where_it_is(place: Namespace) -> None:
    """Law: in a container bridge.conf may be a mount, which cannot be replaced; the host's file gets the line."""
    host = place.folder / "of-the-host"
    host.write_text("# ours\nallow br0")
    place.run("mount", "--bind", host, "/etc/qemu/bridge.conf")
    inode = host.stat().st_ino
    code = "from kvmsupervisor.adapters.network import allow_bridges; print(allow_bridges(['br1']))"
    assert place.run(sys.executable, "-c", code).strip() == "('br1',)"
    assert host.read_text() == "# ours\nallow br0\nallow br1\n"
    assert host.stat().st_ino == inode
    tap = await opened(place, "br1")
    tap.close()


async def test_own_lines_of_a_file_that_is_mounted_go(place: Namespace) -> None:
    """Law: where the file cannot be replaced, too, and what a person has written behind them stays."""
    host = place.folder / "of-the-host"
    host.write_bytes(with_lines(b"deny br7\n", ["br0", "br9"], "me") + b"allow br1\n")
    place.run("mount", "--bind", host, "/etc/qemu/bridge.conf")
    code = "from kvmsupervisor.adapters.network import withdraw_bridges; print(withdraw_bridges(['br0'], owner='me'))"
    assert place.run(sys.executable, "-c", code).strip() == "('br9',)"
    assert host.read_bytes() == with_lines(b"deny br7\n", ["br0"], "me") + b"allow br1\n"


def test_no_line_for_what_is_no_bridge(place: Namespace) -> None:
    """Law: neither for what is not there nor for another interface; it is written once the bridge is there."""
    place.bridge_conf.unlink()
    assert allow_bridges(["br9", "lo"], place.bridge_conf, owner="me", net=place.net) == ()
    assert not place.bridge_conf.exists()
    place.run("ip", "link", "add", "br9", "type", "bridge")
    assert allow_bridges(["br9", "lo"], place.bridge_conf, owner="me", net=place.net) == ("br9",)


async def test_lines_of_two_supervisors(place: Namespace) -> None:
    """Law: each takes away what it has written, and never what the other one, or a person, still needs."""
    path = place.bridge_conf
    for owner in ("one", "two"):
        assert allow_bridges(["br0", "br1"], path, owner=owner, net=place.net) == ("br1",)
        assert allow_bridges(["br0", "br1"], path, owner=owner, net=place.net) == ()
    assert withdraw_bridges({"br0"}, path, owner="one") == ("br1",)
    assert withdraw_bridges({"br0"}, path, owner="one") == ()
    (await opened(place, "br1")).close()
    assert withdraw_bridges((), path, owner="two") == ("br1",)
    assert path.read_text() == "allow br0\n"


def test_a_line_that_is_written_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what somebody else has written since the file was read stays, or nothing is written."""
    path = tmp_path / "bridge.conf"
    path.write_text("allow br0\n")
    others = iter([b"deny br7\n", b"deny br8\n"])
    make = tempfile.mkstemp

    def meanwhile(**options: Any) -> tuple[int, str]:
        path.write_bytes(path.read_bytes() + next(others, b""))
        return make(**options)

    monkeypatch.setattr(tempfile, "mkstemp", meanwhile)
    assert allow_bridges(["br1"], path, net=UNSEEN) == ("br1",)
    assert path.read_text() == "allow br0\ndeny br7\ndeny br8\nallow br1\n"
    others = iter([b"# again\n"] * 100)
    with pytest.raises(NetworkTrouble, match="is being written by somebody else all the time"):
        allow_bridges(["br2"], path, net=UNSEEN)
    assert b"br2" not in path.read_bytes()


def test_own_lines_that_cannot_be_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the file stays as it is, and is named with the line and the cause."""
    path = tmp_path / "bridge.conf"
    path.write_bytes(before := with_lines(b"", ["br1"], "me"))

    def full(**options: Any) -> tuple[int, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(NetworkTrouble, match="needs 'allow br1' no more, but cannot be written: No space left"):
        withdraw_bridges((), path, owner="me")
    assert path.read_bytes() == before


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return dict(line.split(":", 1) for line in lines)


# --- a guest --------------------------------------------------------------------------------------------------


@pytest.mark.guest
async def test_a_guest_on_the_tap_gets_an_address_and_answers(lan: Lan, guest: Guest) -> None:
    """Law: an unprivileged, sandboxed QEMU needs nothing but the descriptor."""
    allow_bridges([lan.bridge], lan.inside.bridge_conf, net=lan.inside.net)
    tap = await open_tap(lan.bridge, helper=lan.inside.helper(), acl=lan.inside.bridge_conf, net=lan.inside.net)
    unprivileged = (
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
        *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
    )
    qemu = await asyncio.create_subprocess_exec(
        *(unprivileged if AS_ROOT else ()),
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"),
        *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(MINIMUM_RAM_MIB), "-serial", "stdio"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-netdev", f"tap,id=net0,fd={tap.fd}"),
        *("-device", "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:12:34:56"),
        *guest.options(dhcp=True),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[tap.fd],
    )
    tap.close()
    try:
        assert qemu.stdout is not None
        async with asyncio.timeout(90):
            while not (line := await qemu.stdout.readline()).startswith(b"DHCP"):
                assert line, "QEMU has ended"
        address = line.split()[1].decode()
        assert address.startswith(f"{lan.subnet}.1")
        await asyncio.to_thread(lan.ping, address)
        status = status_of(qemu.pid)
        assert status["Seccomp"].strip() == "2"
        assert int(status["CapEff"], 16) == 0
        assert status["Uid"].split()[0] != "0"
    finally:
        qemu.kill()
        await qemu.communicate()


# --- the tests' own network -----------------------------------------------------------------------------------


def test_nothing_is_left_of_a_lan_that_fails() -> None:
    """Law: namespaces, server and folders end with the test, however it ends."""
    with pytest.raises(ZeroDivisionError), new_lan() as made:  # noqa: PT012
        assert made.inside.net.is_dir()
        raise ZeroDivisionError
    for namespace in (made.inside, made.router):
        assert not Path(f"/proc/{namespace.pid}").exists()
        assert not namespace.folder.exists()


@pytest.mark.skipif(not AS_ROOT, reason="a supervisor under test with mounts of its own runs as root")
def test_a_program_around_a_lan_finds_its_bridge(lan: Lan, tmp_path: Path) -> None:
    """Law: it sees the test's bridge.conf and the host's other files, and its helper works where the bridge is."""
    allow_bridges([lan.bridge], lan.inside.bridge_conf, net=lan.inside.net)
    ours, its = socket.socketpair()
    with ours, its:
        done = subprocess.run(
            lan.around("sh", "-c", f"cat /etc/qemu/bridge.conf /etc/passwd && {HELPER} --br=br0 --fd={its.fileno()}"),
            pass_fds=[its.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    assert done.stdout == "allow br0\n" + Path("/etc/passwd").read_text()
    assert len(ports(lan.inside)) == 2
    for fd in fds:
        os.close(fd)
    assert len(fds) == 1
