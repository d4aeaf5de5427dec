"""The command line, held against a real QEMU under TCG: it starts, paused, and is who it should be."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.argv import (
    AGENT_SOCKET,
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    QMP_SOCKET,
    QMP_SPARE_SOCKET,
    Channels,
    HostSide,
    Identity,
    Provision,
    build_argv,
    instance_uuid,
)
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import RbdDisk, Spec
from tests.support.ceph import POOL, Ceph

VM = InstanceId("vm-1")
UUID = instance_uuid("/kvm", VM)
PATIENCE_S = 60.0


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    yield folder
    shutil.rmtree(folder)


class Machine:
    """A QEMU started on listening sockets, and a QMP connection that was made before it existed."""

    def __init__(
        self, stack: ExitStack, run_dir: Path, spec: Spec, ceph: hardware.Ceph = hardware.OWN_DEFAULTS
    ) -> None:
        names = (QMP_SOCKET, QMP_SPARE_SOCKET, CONSOLE_SOCKET, AGENT_SOCKET)
        listeners = [stack.enter_context(_listener(run_dir / name)) for name in names]
        self._qmp = _connect(stack, run_dir / QMP_SOCKET)
        first, spare, console, agent = (listener.fileno() for listener in listeners)
        provision = Provision(
            run_dir=f"{run_dir}",
            channels=Channels(qmp=first, spare=spare, console=console, agent=agent),
            ceph_key=ceph.key_file,
        )
        host = HostSide(qemu="qemu-system-x86_64", accel="tcg", ceph=ceph)
        words = build_argv(spec, identity=Identity(instance=VM, uuid=UUID), host=host, provision=provision)
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

    def ask(self, command: str) -> Any:
        self._qmp.write(json.dumps({"execute": command}).encode() + b"\n")
        return self._read()["return"]


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
        assert {device["label"] for device in machine.ask("query-chardev")} == {*("qmp0", "qmp1", "serial0", "agent0")}
        assert {path.name for path in run_dir.iterdir()} == {
            *(QMP_SOCKET, QMP_SPARE_SOCKET, CONSOLE_SOCKET, CONSOLE_LOG, AGENT_SOCKET)
        }
        assert b"QMP" in _connect(stack, run_dir / QMP_SPARE_SOCKET).readline()


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_machine_with_spice(run_dir: Path, machine_type: str) -> None:
    """Law: a SPICE port makes a display that listens there, without a password, on both families of machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def test_machine_with_a_disk_on_ceph(run_dir: Path, ceph: Ceph, ceph_image: str) -> None:
    """Law: the disk is the image, written back and flushed, open for writing; an I/O error stops the guest."""
    (run_dir / "a,key").write_text(ceph.ceph("auth", "get-key", "client.admin"))
    side = hardware.Ceph(user="admin", conf=str(ceph.conf), key_file=str(run_dir / "a,key"))
    with ExitStack() as stack:
        machine = Machine(stack, run_dir, Spec(ram_mib=64, rbd=RbdDisk(pool=POOL, image=ceph_image)), side)
        assert machine.ask("query-status")["status"] == "prelaunch"
        (disk,) = machine.ask("query-block")
        assert disk["inserted"]["cache"] == {"no-flush": False, "direct": False, "writeback": True}
        assert (disk["inserted"]["drv"], disk["inserted"]["ro"]) == ("rbd", False)
        assert disk["inserted"]["image"]["virtual-size"] == 8 << 20
        assert len(ceph.watchers(f"{POOL}/{ceph_image}")) == 1
