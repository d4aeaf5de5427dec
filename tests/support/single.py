"""Containers in single mode, as the image starts them: its entry point, its arguments and its environment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters.process import pid_namespace
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.single import holder_of
from tests.support import fork_server
from tests.support.cluster import PROC, Host, Keys, Qemu, eventually, find_qemus
from tests.support.processes import stat_of

__all__ = ["Container", "Containers", "containers", "holder"]


def holder(host: str, name: str) -> str:
    """As whom a container of this machine holds a lock."""
    return holder_of(HostName(host), name, pid_namespace=pid_namespace())


class Container(Host):
    """One container, without its walls: it shares the PID namespace, and its QEMU outlives its crash.

    Args:
        keys: of its cluster.
        options: the container's arguments.
        name: `KVM_HOSTNAME`.
        settings: further environment variables.
    """

    def __init__(self, keys: Keys, *options: str, name: str = "alpha", **settings: Any) -> None:
        super().__init__(keys, name, **settings)
        # What one that is killed leaves goes with the test.
        self.settings["TMPDIR"] = str(self.folder)
        self.entry, self.args = fork_server.ENTRY_POINT, options

    def begin(self) -> Container:
        """Start it."""
        self.launch()
        return self

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended does not mind."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait_running(self, instance: str = "1", *_: str) -> dict[str, Qemu]:
        """Wait until the lock says that its guest may run; return that QEMU."""
        lock = eventually(f"{instance} to run", lambda: self._running(instance))
        (qemu,) = [qemu for qemu in self.qemus() if qemu.pid == lock.pid]
        return {instance: qemu}

    def _running(self, instance: str) -> Lock | None:
        assert self.running, f"the container of {instance} ended by itself:\n{self.log}"
        lock = self.keys.lock(instance)
        mine = {qemu.pid for qemu in self.qemus()}
        return lock if lock is not None and lock.pid in mine else None

    def folder_of(self, instance: str) -> Path:
        """The instance's folder, wherever in the run directory."""
        (found,) = self.run_dir.glob(f"_*/{instance}")
        return found

    def qemus(self) -> list[Qemu]:
        """Its QEMUs."""
        return [
            *(qemu for folder in self.run_dir.glob("_*") for qemu in find_qemus(self.keys.layout.prefix, folder)),
            *_with_own_options(self.environment["KVM_RUN_DIR"]),
        ]


def _with_own_options(run_dir: str) -> list[Qemu]:
    """QEMUs with their users' own options: their environment is their container's, so it names the run directory."""
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            argv = tuple((entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1])
        except OSError:
            continue
        said = dict(word.partition("=")[::2] for word in words)
        stat = stat_of(int(entry.name))
        if stat is None or not stat.alive or said.get("KVM_RUN_DIR") != run_dir or "-readconfig" not in argv:
            continue
        found.append(
            Qemu(
                instance=said.get("KVMSUPERVISOR_INSTANCE", ""),
                incarnation=said.get("KVMSUPERVISOR_INCARNATION", ""),
                pid=int(entry.name),
                starttime=stat.starttime,
                argv=argv,
            )
        )
    return found


class Containers:
    """Makes the containers of one test."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.made: list[Container] = []

    def __call__(self, *options: str, name: str = "alpha", **settings: Any) -> Container:
        """A container, not started."""
        self.made.append(Container(self.keys, *options, name=name, **settings))
        return self.made[-1]

    def locked(self, *options: str, instance: str = "1", name: str = "alpha", **settings: Any) -> Container:
        """One whose QEMU has its user's own options, under the lock of an instance."""
        lock = self.keys.layout.lock_key(InstanceId(instance))
        return self(*options, name=name, LOCK=lock, KVM_LOG_LEVEL="info", **settings)

    def instance(self, instance: str = "1", *, name: str = "alpha", **settings: Any) -> Container:
        """One of an instance from its keys."""
        return self(name=name, INSTANCE=instance, **settings)


@pytest.fixture
def containers(keys: Keys) -> Iterator[Containers]:
    """Makes containers: `containers.instance("1").begin()`."""
    containers = Containers(keys)
    try:
        yield containers
    finally:
        for container in containers.made:
            print(f"--- log of a container of {container.name} ---\n{container.log}")  # noqa: T201
            container.close()
