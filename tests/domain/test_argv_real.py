"""The command line, held against a real QEMU under TCG: it starts, paused, and is who it should be."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvmsupervisor.adapters import firmware
from kvmsupervisor.adapters.log_buffer import LogBuffer
from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.argv import (
    Channels,
    HostSide,
    Identity,
    Provision,
    build_argv,
    instance_uuid,
)
from kvmsupervisor.domain.hardware import Ceph, Handed, Nvram, Ovmf, TapFds
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.names import AGENT_SOCKET, CONSOLE_LOG, CONSOLE_SOCKET, QMP_SOCKET, QMP_SPARE_SOCKET
from kvmsupervisor.domain.spec import Disk, Display, Firmware, HugePages, Nic, RbdDisk, Secret, Spec
from tests.support.ceph import POOL
from tests.support.ceph import Ceph as Cluster

VM = InstanceId("vm-1")
UUID = instance_uuid("/kvm", VM)
PATIENCE_S = 60.0


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    yield folder
    shutil.rmtree(folder)


HOST = HostSide(qemu="qemu-system-x86_64", accel="tcg")


class Machine:
    """A QEMU started on listening sockets, and a QMP connection that was made before it existed.

    Args:
        ready: what else was made ready, as in `Provision`.
    """

    def __init__(
        self,
        stack: ExitStack,
        run_dir: Path,
        spec: Spec,
        *,
        host: HostSide = HOST,
        instance: InstanceId = VM,
        **ready: Any,
    ) -> None:
        names = (QMP_SOCKET, QMP_SPARE_SOCKET, CONSOLE_SOCKET, AGENT_SOCKET)
        listeners = [stack.enter_context(_listener(run_dir / name)) for name in names]
        self._qmp = _connect(stack, run_dir / QMP_SOCKET)
        self._qmp_path = run_dir / QMP_SPARE_SOCKET
        first, spare, console, agent = (listener.fileno() for listener in listeners)
        log = _log(stack)
        channels = Channels(qmp=first, spare=spare, console=console, agent=agent, console_log=log)
        provision = Provision(run_dir=f"{run_dir}", channels=channels, **ready)
        words = build_argv(spec, identity=Identity(instance=instance, uuid=UUID), host=host, provision=provision)
        # Its words show up in pytest's report of what was printed, when a test fails.
        process = stack.enter_context(subprocess.Popen(words, pass_fds=provision.descriptors))
        stack.callback(process.kill)
        for listener in listeners:
            # Now QEMU alone holds them: its end is the end of the connection.
            listener.close()
        assert "QMP" in self._read()
        self.ask("qmp_capabilities")

    def _read(self) -> Any:
        return json.loads(self._qmp.readline())

    def ask(self, command: str, **arguments: Any) -> Any:
        words = {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        self._qmp.write(json.dumps(words).encode() + b"\n")
        while "event" in (answer := self._read()):
            pass
        assert "return" in answer, answer
        return answer["return"]

    def hand(self, name: str, fd: int) -> None:
        """Give it a descriptor, by `getfd`, and the answer to that."""
        message = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()
        with socket.socket(fileno=os.dup(self._qmp.fileno())) as same:
            socket.send_fds(same, [message], [fd])
        assert self._read() == {"return": {}}

    def viewer_greets(self, stack: ExitStack) -> bool:
        """Hand a viewer to it; whether that is greeted, and asked for nothing (RFC 6143, 7.1)."""
        ours, theirs = socket.socketpair()
        stack.enter_context(ours).settimeout(PATIENCE_S)
        with theirs:
            self.hand("viewer", theirs.fileno())
        assert self.ask("add_client", protocol="vnc", fdname="viewer", skipauth=True) == {}
        said = ours.recv(12)
        ours.sendall(b"RFB 003.008\n")
        return said == b"RFB 003.008\n" and ours.recv(2) == b"\x01\x01"

    @property
    def objects(self) -> set[str]:
        """The ids of all objects that the command line made."""
        listed = self.ask("qom-list", path="/objects")
        # The machine makes the last one itself.
        return {one["name"] for one in listed if one["type"].startswith("child<")} - {"pc.ram"}

    @property
    def chardevs(self) -> set[str]:
        return {device["label"] for device in self.ask("query-chardev")}

    @property
    def nodes(self) -> dict[str, Any]:
        """The block nodes that were given a name."""
        nodes = self.ask("query-named-block-nodes")
        return {node["node-name"]: node for node in nodes if not node["node-name"].startswith("#")}

    @property
    def slots(self) -> dict[str, tuple[int, int]]:
        """Each PCI device with an id on the machine's own buses: bus and slot."""
        devices = ((bus["bus"], device) for bus in self.ask("query-pci") for device in bus["devices"])
        return {device["qdev_id"]: (bus, device["slot"]) for bus, device in devices if device["qdev_id"]}

    def property_of(self, device: str, name: str) -> Any:
        """A property of a device; of a PCI device, `addr` is slot and function."""
        return self.ask("qom-get", path=f"/machine/peripheral/{device}", property=name)


OWN_CHARDEVS = {"qmp0", "qmp1", "serial0", "agent0"}
OWN_SLOTS = {"virtio-serial0": 0x12, "rng0": 0x13, "balloon0": 0x14}


def file_behind(node: Mapping[str, Any]) -> str:
    """The file of a raw node. QEMU tells a name that has a colon or other special characters as JSON."""
    found = node["image"]["filename"]
    if not found.startswith("json:"):
        return str(found)
    tree = json.loads(found[5:])
    while "filename" not in tree:
        tree = tree["file"]
    return str(tree["filename"])


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def last_words(spec: Spec, run_dir: Path, *, host: HostSide = HOST, **ready: Any) -> str:
    """What QEMU says at the end, when it refuses to start."""
    with ExitStack() as stack:
        fds = [stack.enter_context(_listener(run_dir / name)).fileno() for name in ("a", "b", "c", "d")]
        channels = Channels(qmp=fds[0], spare=fds[1], console=fds[2], agent=fds[3], console_log=_log(stack))
        provision = Provision(run_dir=f"{run_dir}", channels=channels, **ready)
        words = build_argv(spec, identity=Identity(instance=VM, uuid=UUID), host=host, provision=provision)
        done = subprocess.run(
            words, pass_fds=provision.descriptors, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def _log(stack: ExitStack) -> int:
    log = LogBuffer.make("console.log")
    stack.callback(log.close)
    return log.fd


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _connect(stack: ExitStack, path: Path) -> socket.SocketIO:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
    connection.settimeout(PATIENCE_S)
    connection.connect(str(path))
    return stack.enter_context(connection.makefile("rwb", buffering=0))


def test_tiny_machine_starts_paused(run_dir: Path) -> None:
    """Law: the least machine comes up paused, under its uuid and name, with every channel it should have."""
    with ExitStack() as stack:
        machine = Machine(stack, run_dir, Spec(ram_mib=64))
        assert machine.ask("query-status")["status"] == "prelaunch"
        assert machine.ask("query-uuid")["UUID"] == str(UUID)
        assert machine.ask("query-name")["name"] == VM
        assert machine.chardevs == OWN_CHARDEVS
        assert machine.objects == set()
        assert machine.nodes == {}
        assert machine.slots == {name: (0, slot) for name, slot in OWN_SLOTS.items()}
        assert {path.name for path in run_dir.iterdir()} == {
            *(QMP_SOCKET, QMP_SPARE_SOCKET, CONSOLE_SOCKET, AGENT_SOCKET)
        }
        assert b"QMP" in _connect(stack, run_dir / QMP_SPARE_SOCKET).readline()


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_machine_with_spice(run_dir: Path, machine_type: str) -> None:
    """Law: a SPICE port makes a display that listens there, without a password, on both families of machines."""
    port = free_port()
    with ExitStack() as stack:
        machine = Machine(stack, run_dir, Spec(ram_mib=64, spice_port=port, cpus=2, machine=machine_type))
        spice = machine.ask("query-spice")
        assert (spice["enabled"], spice["host"], spice["port"], spice["auth"]) == (
            True,
            "127.0.0.1",
            port,
            "none",
        )
        assert machine.ask("query-status")["status"] == "prelaunch"
        assert len(machine.ask("query-cpus-fast")) == 2


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
@pytest.mark.parametrize("display", [Display.STD, Display.VIRTIO, Display.QXL])
def test_machine_with_a_display(run_dir: Path, machine_type: str, display: Display) -> None:
    """Law: QEMU's VNC server listens nowhere, greets a viewer that is handed to it, and asks it for no password."""
    with ExitStack() as stack:
        machine = Machine(stack, run_dir, Spec(ram_mib=64, display=display, machine=machine_type))
        assert machine.ask("query-vnc")["enabled"] is False
        assert machine.ask("query-vnc-servers")[0]["server"] == []
        assert machine.viewer_greets(stack)


@pytest.mark.parametrize("spice_port", [True, False])
def test_a_person_s_own_vnc_server(run_dir: Path, spice_port: bool) -> None:
    """Law: viewers get to the server that `extra_flags` made, which listens where it says, and has a password."""
    port = free_port()
    spec = Spec(
        ram_mib=64,
        display=Display.STD,
        spice_port=free_port() if spice_port else None,
        extra_flags=("-vnc", f"127.0.0.1:{port - 5900},password=on"),
    )
    with ExitStack() as stack:
        machine = Machine(stack, run_dir, spec)
        (server,) = machine.ask("query-vnc-servers")
        assert server["server"][0]["service"] == str(port)
        assert machine.viewer_greets(stack)


def test_machine_with_a_disk_on_ceph(run_dir: Path, ceph: Cluster, ceph_image: str) -> None:
    """Law: the disk is the image, written back and flushed, open for writing; an I/O error stops the guest."""
    (run_dir / "a,key").write_text(ceph.ceph("auth", "get-key", "client.admin"))
    host = replace(HOST, ceph=Ceph(user="admin", conf=str(ceph.conf)))
    with ExitStack() as stack:
        spec = Spec(ram_mib=64, rbd=RbdDisk(pool=POOL, image=ceph_image))
        machine = Machine(stack, run_dir, spec, host=host, ceph_key=_opened(stack, run_dir / "a,key"))
        assert machine.ask("query-status")["status"] == "prelaunch"
        (disk,) = machine.ask("query-block")
        assert disk["inserted"]["cache"] == {"no-flush": False, "direct": False, "writeback": True}
        assert (disk["inserted"]["drv"], disk["inserted"]["ro"]) == ("rbd", False)
        assert disk["inserted"]["image"]["virtual-size"] == 8 << 20
        assert len(ceph.watchers(f"{POOL}/{ceph_image}")) == 1


@pytest.mark.guest
def test_a_kernel_in_extra_flags_beside_a_disk(run_dir: Path, ceph: Cluster, ceph_image: str, guest: Guest) -> None:
    """Law: the first disk is booted where nothing else is asked for, and is in the way of nothing else."""
    host = replace(HOST, ceph=Ceph(user="admin", conf=str(ceph.conf)))
    (run_dir / "key").write_text(ceph.ceph("auth", "get-key", "client.admin"))
    spec = Spec(ram_mib=64, rbd=RbdDisk(pool=POOL, image=ceph_image), extra_flags=("-kernel", str(guest.kernel)))
    with ExitStack() as stack:
        machine = Machine(stack, run_dir, spec, host=host, ceph_key=_opened(stack, run_dir / "key"))
        assert machine.ask("query-status")["status"] == "prelaunch"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::"])
def test_spice_with_a_password(run_dir: Path, address: str) -> None:
    """Law: with a password SPICE asks for one, on the address of the key; QEMU reads it in its file."""
    port = free_port(address)
    (run_dir / "password").write_text("hunter2")
    spec = Spec(ram_mib=64, spice_port=port, spice_addr=address, spice_password=Secret.of("hunter2"))
    with ExitStack() as stack:
        machine = Machine(stack, run_dir, spec, spice_password=_opened(stack, run_dir / "password"))
        spice = machine.ask("query-spice")
        assert (spice["host"], spice["port"], spice["auth"]) == (address, port, "spice")
        assert machine.objects == {"spice0"}
        with socket.create_connection((address, port), PATIENCE_S):
            pass


def test_two_nics(run_dir: Path) -> None:
    """Law: each NIC is on the descriptor that it was given, in its own slot, with its address."""
    spec = Spec(ram_mib=64, mac="52:54:00:12:34:56", nics=(Nic(3, "52:54:00:12:34:57"), Nic(7, "52:54:00:12:34:58")))
    with ExitStack() as stack:
        taps = tuple(TapFds(fd=_tap(stack)) for _ in spec.all_nics)
        machine = Machine(stack, run_dir, spec, taps=taps)
        assert machine.slots == {name: (0, slot) for name, slot in {**OWN_SLOTS, "nic0": 0x10, "more0": 0x16}.items()}
        # Paused, no firmware has numbered the bus behind the bridge yet: QMP's list of PCI devices ends there.
        for name in ("nic3", "nic7"):
            assert machine.property_of(name, "addr") == int(name[-1]) << 3
            assert machine.property_of(name, "parent_bus").endswith("/more0")
        for name, mac in (("nic0", spec.mac), ("nic3", spec.nics[0].mac), ("nic7", spec.nics[1].mac)):
            (answer,) = machine.ask("query-rx-filter", name=name)
            assert answer["main-mac"] == mac
        assert machine.ask("query-status")["status"] == "prelaunch"


def _opened(stack: ExitStack, path: Path, flags: int = os.O_RDONLY) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _tap(stack: ExitStack) -> int:
    """A tap without a bridge, which ends with the test; QEMU wants a real one."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    request = struct.pack("16sH22x", b"", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    fcntl.ioctl(fd, TUNSETIFF, request)
    return fd


TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def test_media(run_dir: Path) -> None:
    """Law: media are disks that the guest cannot write to, in slots of their own; Ignition is a file of fw_cfg."""
    paths = [run_dir / name for name in ("seed,1.iso", "config.iso", "x,y.json")]
    for path in paths:
        path.write_bytes(bytes(4096))
    with ExitStack() as stack:
        media = tuple(Handed(_opened(stack, path), str(path)) for path in paths[:2])
        machine = Machine(stack, run_dir, Spec(ram_mib=64), media=media, ignition=_opened(stack, paths[2]))
        nodes = machine.nodes
        assert {name: (file_behind(node), node["ro"]) for name, node in nodes.items()} == {
            "medium0": ("/dev/fdset/97471000", True),
            "medium1": ("/dev/fdset/97471001", True),
        }
        assert {block["qdev"].split("/")[3] for block in machine.ask("query-block")} == {
            "medium0-dev",
            "medium1-dev",
        }
        assert (machine.slots["medium0-dev"], machine.slots["medium1-dev"]) == ((0, 0x17), (0, 0x18))


def test_uefi(run_dir: Path) -> None:
    """Law: UEFI firmware is flash memory: its code cannot be written to, its variables are the machine's own file."""
    ovmf = firmware.find(None, None)
    assert ovmf is not None, "Debian's package ovmf is missing"
    variables = run_dir / "nvram,{x}.fd"
    shutil.copyfile(ovmf.variables, variables)
    with ExitStack() as stack:
        machine = Machine(
            stack,
            run_dir,
            Spec(ram_mib=64, firmware=Firmware.UEFI),
            host=replace(HOST, ovmf=ovmf),
            nvram=Nvram(file=Handed(_opened(stack, variables, os.O_RDWR), "variables")),
        )
        nodes = machine.nodes
        assert (file_behind(nodes["firmware"]), nodes["firmware"]["ro"]) == (ovmf.code, True)
        assert (file_behind(nodes["nvram"]), nodes["nvram"]["ro"]) == ("/dev/fdset/97472000", False)
        assert machine.ask("query-status")["status"] == "prelaunch"


@pytest.mark.parametrize("pages", [HugePages.M2, HugePages.G1])
def test_huge_pages(run_dir: Path, pages: HugePages) -> None:
    """Law: a guest on huge pages starts with all of them, or fails in QEMU's own words about them."""
    spec = Spec(ram_mib=1024, hugepages=pages)
    with ExitStack() as stack:
        try:
            machine = Machine(stack, run_dir, spec)
        except (ConnectionError, json.JSONDecodeError):
            # It ended before it greeted.
            machine = None
        if machine is not None:
            (memory,) = machine.ask("query-memdev")
            assert (memory["id"], memory["size"], memory["prealloc"]) == ("ram0", 1 << 30, True)
            return
    folder = run_dir / "again"
    folder.mkdir()
    said = last_words(spec, folder)
    assert "memory" in said
    assert "invalid" not in said.lower().replace("invalid argument", "")


DISKS = Spec(
    ram_mib=64,
    rbd=RbdDisk("p,x", 'i"}{', discard=True),
    disks=(Disk(1, RbdDisk("a", "b", ro=True)), Disk(15, RbdDisk("c", "d", ro=True, discard=True, iops=7))),
)


@pytest.mark.parametrize("first", [DISKS.rbd, None], ids=["plain", "throttled"])
def test_rbd_disks_as_far_as_without_a_cluster(run_dir: Path, first: RbdDisk | None) -> None:
    """Law: QEMU takes every member of an RBD disk's node, and fails only when it connects to the cluster.

    An unknown member, or one of another type, it would refuse before that. That pool and image arrive is for the
    tests that have a cluster.
    """
    disks = DISKS.disks if first is not None else DISKS.disks[1:]
    said = last_words(
        replace(DISKS, rbd=first, disks=disks), run_dir, host=replace(HOST, ceph=Ceph(conf="/dev/null", user="u"))
    )
    assert said.endswith("error connecting: No such file or directory")


def test_the_configuration_of_ceph_is_the_one_that_is_named(run_dir: Path) -> None:
    """Law: the path of Ceph's configuration arrives as it is, whatever characters it has."""
    conf = str(run_dir / "no,such=\"file'{}")
    said = last_words(replace(DISKS, disks=()), run_dir, host=replace(HOST, ceph=Ceph(conf=conf, user="a,b=c")))
    assert said.endswith(f"error reading conf file {conf}: No such file or directory")


# --- hostile but valid values ---------------------------------------------------------------------------------

_names = st.text(st.sampled_from(",=\"'{}[]\\ é%:;$&|*?~#@+-.ab"), min_size=1, max_size=12).filter(
    lambda name: name not in {".", ".."} and not name.endswith("/")
)
_ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True).map(InstanceId)


# Without making failures small: that would start hundreds of QEMUs.
@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(folder=_names, medium=_names, password=_names, code=_names, instance=_ids)
def test_what_qemu_understands_is_the_value(
    folder: str, medium: str, password: str, code: str, instance: InstanceId
) -> None:
    """Law: whatever characters ids and paths have, QEMU reports them as they are, and makes nothing besides."""
    with ExitStack() as stack:
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="k")))
        run_dir = short / folder
        run_dir.mkdir()
        paths = [run_dir / f"{kind}{name}" for kind, name in (("m", medium), ("p", password), ("c", code), ("v", code))]
        for path in paths:
            path.write_bytes(bytes(4 << 20 if path.name[0] in "cv" else 4096))
        paths[1].write_text("secret")
        spec = Spec(ram_mib=64, spice_port=free_port("::1"), spice_addr="::1", spice_password=Secret.of("secret"))
        ovmf = Ovmf(code=str(paths[2]), variables="")
        password_fd = _opened(stack, paths[1])
        machine = Machine(
            stack,
            run_dir,
            replace(spec, firmware=Firmware.UEFI),
            host=replace(HOST, ovmf=ovmf),
            instance=instance,
            media=(Handed(_opened(stack, paths[0]), str(paths[0])),),
            ignition=_opened(stack, paths[0]),
            nvram=Nvram(file=Handed(_opened(stack, paths[3], os.O_RDWR), str(paths[3]))),
            spice_password=password_fd,
        )
        assert machine.ask("query-name")["name"] == instance
        assert {name: file_behind(node) for name, node in machine.nodes.items()} == {
            "medium0": "/dev/fdset/97471000",
            "firmware": str(paths[2]),
            "nvram": "/dev/fdset/97472000",
        }
        told = {one["opaque"] for fdset in machine.ask("query-fdsets") for one in fdset["fds"]}
        assert told == {f"{run_dir}/{CONSOLE_LOG}", str(paths[0]), str(paths[3])}
        assert machine.objects == {"spice0"}
        assert machine.ask("qom-get", path="/objects/spice0", property="file") == f"/proc/self/fd/{password_fd}"
        assert machine.chardevs == OWN_CHARDEVS
        assert machine.ask("human-monitor-command", command_line="info network") == ""
        assert machine.slots.keys() == OWN_SLOTS.keys() | {"usb0", "medium0-dev"}
        spice = machine.ask("query-spice")
        assert (spice["host"], spice["port"], spice["auth"]) == ("::1", spec.spice_port, "spice")
