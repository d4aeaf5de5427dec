"""A host whose supervisor runs in the real image, in a container as docs/container.md has it; all else is `Host`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from tests.support.cluster import Host, Keys, Qemu, eventually
from tests.support.docker import IMAGE, PRIVILEGED, Docker

CGROUPS = Path("/sys/fs/cgroup")

REPLACEABLE = ("--pid=host", "--cgroupns=host", f"--volume={CGROUPS}:{CGROUPS}")
"""What lets guests outlive the container, on a host without systemd."""


class Boxed(Host):
    """A supervisor in a container, the foreground client of which is the process that `Host` knows.

    Args:
        docker: the daemon.
        keys: of its cluster.
        guest: seen inside at its own path.
        options: of `docker run`, beside the network, the run directory and the guest.
        privileges: options that say what it may do.
        arguments: of the container.
        name: `KVM_HOSTNAME`.
        settings: further environment variables.

    Attributes:
        image: that the next start takes.
        began: when the last start was asked for, CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        docker: Docker,
        keys: Keys,
        guest: Guest,
        *,
        options: Sequence[str] = REPLACEABLE,
        privileges: Sequence[str] = PRIVILEGED,
        arguments: Sequence[str] = (),
        name: str = "boxed",
        **settings: str,
    ) -> None:
        super().__init__(keys, name, run_dir=None, **{"KVM_CGROUP": "auto", **settings})
        self.run_dir.mkdir()
        self.docker = docker
        self.image = IMAGE
        self.began = 0.0
        self.around = self._in_box
        self._guest = guest
        self._options = (*privileges, *options)
        self._arguments = tuple(arguments)
        self._started = 0
        self._seen: set[Qemu] = set()

    @property
    def container(self) -> str:
        """Name of the last one that was started."""
        return f"{self.folder.name}-{self._started}"

    @property
    def init(self) -> int:
        """Its first process."""
        return int(self.docker.run("inspect", "--format={{.State.Pid}}", self.container).stdout)

    def _in_box(self, *_: str) -> list[str]:
        self._started += 1
        self.began = time.monotonic()
        boot = self._guest.kernel.parent
        return self.docker.command(
            *("run", f"--name={self.container}", "--network=host", *self._options),
            *(f"--env={name}" for name in self.settings),
            *(f"--volume={self.run_dir}:{self.run_dir}", f"--volume={boot}:{boot}:ro", self.image, *self._arguments),
        )

    def kill9_init(self) -> None:
        """SIGKILL for the container's first process, from outside."""
        os.kill(self.init, signal.SIGKILL)
        self.wait_ended()

    def end(self, *words: str) -> None:
        """End the container by this command of Docker, which gets its name appended."""
        self.docker.run(*words, self.container)
        self.wait_ended()

    def hears_itself(self, words: str) -> None:
        """Wait until the container has written that."""

        def heard() -> bool:
            assert self.running or words in self.log, f"the container ended by itself:\n{self.log}"
            return words in self.log

        eventually(f"{words!r} of {self.container}", heard)

    def replace(self, image: str) -> None:
        """Start from another image what has ended, and wait until it is in step."""
        self.image = image
        self.start()

    def adopted(self, number: int) -> None:
        """Wait until it has adopted so many."""
        eventually(f"{number} adoptions", lambda: self.metric("adopted_total") == number)

    @property
    def adoption_s(self) -> float:
        """From the last supervisor's start (it serves, and what ran is found) to its last adoption, by its log."""
        times = {
            event: datetime.fromisoformat(self.events(event)[-1]["timestamp"])
            for event in ("supervisor.started", "instance.adopted")
        }
        return (times["instance.adopted"] - times["supervisor.started"]).total_seconds()

    def qemus(self) -> list[Qemu]:
        found = super().qemus()
        self._seen.update(found)
        return found

    def close(self) -> None:
        for number in range(self._started):
            self.docker.run("rm", "--force", f"{self.folder.name}-{number + 1}", check=False)
        if self._process is not None:
            self._process.wait()
        super().close()
        for qemu in self._seen:
            _remove_homes(qemu)
        for cgroup in CGROUPS.glob("*/kvmsupervisor/_guard@*"):
            # One that lives is another host's.
            with contextlib.suppress(OSError):
                cgroup.rmdir()
                cgroup.parent.rmdir()


def _remove_homes(qemu: Qemu) -> None:
    """What its supervisor would have removed."""
    deadline = time.monotonic() + 10
    for cgroup in CGROUPS.glob(f"*/kvmsupervisor/{qemu.instance}@{qemu.incarnation}"):
        while cgroup.exists():
            try:
                cgroup.rmdir()
            except OSError:
                assert time.monotonic() < deadline, cgroup
                time.sleep(0.02)
        # Cgroups of others on this machine stay.
        with contextlib.suppress(OSError):
            cgroup.parent.rmdir()


def begin(box: Boxed, keys: Keys, flags: Mapping[str, str]) -> dict[str, Qemu]:
    """Start guests by their `extra_flags`, which have them say HELLO by their names; they have booted at the return."""
    for one, words in flags.items():
        keys.machines(box.name, one, ram=96, extra_flags=words, shutdown_timeout=0)
    running = box.wait_running(*flags)
    for one in flags:
        box.hears(one, f"HELLO from {one}")
    return running


class Boxes:
    """Makes the boxed hosts of one test."""

    def __init__(self, docker: Docker, keys: Keys, guest: Guest) -> None:
        self._made: list[Boxed] = []
        self._docker, self._keys, self._guest = docker, keys, guest

    def __call__(self, guest: Guest | None = None, **more: Any) -> Boxed:
        """A host, not started; `guest` is what its machines boot, if it is not the ordinary one."""
        box = Boxed(self._docker, self._keys, guest or self._guest, **more)
        self._made.append(box)
        return box

    def close(self) -> None:
        """End all; print what they have logged."""
        for box in self._made:
            print(f"--- log ---\n{box.log}")  # noqa: T201
            box.close()


@pytest.fixture
def boxes(docker: Docker, keys: Keys, guest: Guest) -> Iterator[Boxes]:
    """Makes hosts: `boxes()`."""
    boxes = Boxes(docker, keys, guest)
    try:
        yield boxes
    finally:
        boxes.close()
