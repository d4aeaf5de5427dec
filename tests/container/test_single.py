"""Single mode in the real image: what a container's arguments and environment come to, under Docker."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.cli.demo.guest import MINIMUM_RAM_MIB, Guest
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import LockState
from tests.support.boxed import Boxed, Boxes
from tests.support.cluster import Keys, eventually
from tests.support.docker import Docker
from tests.support.single import holder

pytestmark = [pytest.mark.docker, pytest.mark.guest, pytest.mark.timeout(1500)]

OPTIONS = ("-accel", "tcg", "-m", str(MINIMUM_RAM_MIB), "-nodefaults", "-nographic", "-serial", "stdio")
AS_THE_ORIGINAL = ("--rm", "--pid=host", "--ipc=host", "--no-healthcheck")


def begin(boxes: Boxes, keys: Keys, *arguments: str, name: str = "alpha", **settings: Any) -> Boxed:
    """A container of the host `name`, started."""
    box = boxes(
        options=AS_THE_ORIGINAL,
        arguments=arguments,
        name=name,
        LOCK=keys.layout.lock_key(InstanceId("1")),
        KVM_LOG_LEVEL="info",
        **settings,
    )
    # What is asked for is a container, not a supervisor's settings.
    del box.settings["KVM_CGROUP"]
    box.launch()
    return box


def in_front(docker: Docker, *words: str) -> tuple[int, str]:
    """Exit status of a container that ends by itself, and what it said."""
    done = docker.run("run", "--rm", "--network=none", *words, check=False)
    return done.returncode, done.stdout + done.stderr


def test_qemus_options_are_a_container(docker: Docker, boxes: Boxes, keys: Keys, guest: Guest) -> None:
    """Law: one QEMU under LOCK; another host's waits and says for whom; `docker stop` is the power button, QEMU's 0."""
    first = begin(boxes, keys, *OPTIONS, *guest.options(tag="one"))
    first.hears_itself("HELLO from one")
    lock = keys.lock("1")
    assert lock is not None
    assert (lock.host, lock.state) == (holder("alpha", "1"), LockState.RUNNING)
    second = begin(boxes, keys, *OPTIONS, *guest.options(tag="two"), name="beta")
    second.hears_itself(f"{holder('alpha', '1')} holds its lock")
    assert "HELLO" not in second.log
    # The same host again: somebody has started it twice.
    twice = begin(boxes, keys, *OPTIONS, *guest.options(tag="twice"))
    assert twice.wait_ended() == 1
    assert holder("alpha", "1") in twice.log
    docker.run("stop", "--time=60", first.container)
    assert first.wait_ended() == 0
    assert "power button: GOODBYE from one" in first.log
    second.hears_itself("HELLO from two")
    docker.run("stop", "--time=60", second.container)
    assert second.wait_ended() == 0
    assert keys.lock("1") is None


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("-nonsense",), 1, "-nonsense: invalid option"),
        (("--version",), 0, "QEMU emulator version"),
        (("exec", "--no-wait"), 2, "Give QEMU's options"),
    ],
)
def test_qemus_exit_status_is_the_containers(docker: Docker, arguments: Sequence[str], status: int, said: str) -> None:
    """Law: what QEMU ends with, the container ends with; usage is 2."""
    found, words = in_front(docker, "kvmsupervisor-test", *arguments)
    assert (found, said in words) == (status, True), words


def test_a_qemu_that_is_killed_is_137(boxes: Boxes, keys: Keys, guest: Guest) -> None:
    """Law: 128 and the signal; the lock is released once QEMU is gone."""
    box = begin(boxes, keys, *OPTIONS, *guest.options(tag="one"))
    box.hears_itself("HELLO from one")
    lock = keys.lock("1")
    assert lock is not None
    assert lock.pid is not None
    assert Path(f"/proc/{lock.pid}/comm").read_text().startswith("qemu-system")
    # The pid is the host's, by --pid=host.
    os.kill(lock.pid, signal.SIGKILL)
    assert box.wait_ended() == 128 + signal.SIGKILL
    assert keys.lock("1") is None


def test_an_instance_is_a_container(docker: Docker, boxes: Boxes, keys: Keys, guest: Guest) -> None:
    """Law: INSTANCE and no arguments: from its keys, VM_RAM wins over `ram`; graceful; 1 where `host` is another."""
    keys.put("1", ram="lots", extra_flags=guest.extra_flags(tag="one"), host="alpha")
    box = begin(boxes, keys, INSTANCE="1", VM_RAM=str(MINIMUM_RAM_MIB))
    lock = eventually("it to run", lambda: _running(box, keys))
    argv = Path(f"/proc/{lock}/cmdline").read_bytes().decode().split("\0")
    assert argv[argv.index("-m") + 1] == f"size={MINIMUM_RAM_MIB * 1024 + 128}K"
    (folder,) = box.run_dir.glob("_*/1")
    console = folder / "console.log"
    eventually("the guest", lambda: "HELLO from one" in console.read_text(errors="replace"))
    docker.run("stop", "--time=60", box.container)
    assert box.wait_ended() == 0
    assert "power button: GOODBYE from one" in console.read_text(errors="replace")
    assert keys.lock("1") is None
    elsewhere = begin(boxes, keys, name="beta", INSTANCE="1", VM_RAM=str(MINIMUM_RAM_MIB))
    assert elsewhere.wait_ended() == 1
    assert "host is alpha, this host is beta" in elsewhere.log
    assert keys.lock("1") is None


def _running(box: Boxed, keys: Keys) -> int | None:
    """The pid of the QEMU that may run by its lock."""
    assert box.running, box.log
    lock = keys.lock("1")
    return lock.pid if lock is not None and lock.state is LockState.RUNNING else None
