"""Keys of a machine beyond the first ones, and what a host grants: firmware, machine type, memory, limits, turns."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmsupervisor.adapters.cgroup.manager import cgroups_of
from kvmsupervisor.adapters.cgroup.tree import FOLDER, Hierarchy, find_hierarchies
from kvmsupervisor.adapters.usage import memory_for_guests_mib
from kvmsupervisor.domain.limits import cpu_weight
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys, eventually

QEMU = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that to its host")


def wrapped_qemu(host: Host, script: str) -> str:
    """`KVM_QEMU` for this host: a program that does something of its own before it becomes QEMU, as `$QEMU`."""
    path = host.folder / "qemu"
    path.write_text(f"#!/bin/sh\nQEMU={shlex.quote(QEMU)}\n{script}\n")
    path.chmod(0o755)
    return str(path)


# --- firmware -------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.guest
def test_uefi(keys: Keys, hosts: Hosts) -> None:
    """Law: `firmware=uefi` boots OVMF; its variables are QEMU's alone, and are kept over a restart of all."""
    host = hosts(KVM_QEMU_USER="nobody").start()
    keys.machines(host.name, "one", ram=128, firmware="uefi", shutdown_timeout=0)
    first = host.wait_running("one")["one"]
    host.hears("one", "BdsDxe")
    variables = host.folder / "state" / "one" / "nvram.fd"
    found = variables.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
    # The firmware itself has written to them: what it found to boot.
    written = variables.read_bytes()
    assert "EFI Internal Shell".encode("utf-16-le") in written

    keys.put("one", power="off")
    host.wait_for("one", Phase.STOPPED)
    host.stop()
    host.start()
    keys.put("one", power="on")
    host.wait_for("one", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, first.pid})
    assert os.path.samestat(found, variables.stat())
    assert "EFI Internal Shell".encode("utf-16-le") in variables.read_bytes()


def test_uefi_variables_that_cannot_be_kept(keys: Keys, hosts: Hosts, tmp_path: Path) -> None:
    """Law: a folder that cannot be made is told, and it waits; nothing is started half."""
    (tmp_path / "state").write_text("a file where a folder should be")
    host = hosts(KVM_STATE_DIR=str(tmp_path / "state")).start()
    keys.machines(host.name, "one", ram=128, firmware="uefi")
    status = host.wait_for("one", lambda s: s.phase is Phase.WAITING and "UEFI" in s.reason)
    assert str(tmp_path / "state") in status.reason
    assert host.qemus() == []


# --- machine type ---------------------------------------------------------------------------------------------


def test_the_machine_type_is_kept(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: what `q35` stood for at the first start holds over restart and move; q35 may mean another there."""
    host, newer = hosts(), hosts("beta")
    # What an update of QEMU does: the same name stands for another machine.
    says = r"""case "$*" in "-machine help")
    "$QEMU" -machine help | sed -E 's/\(alias of pc-q35-[0-9.]+\)/(alias of pc-q35-6.2)/'; exit;;
esac; exec "$QEMU" "$@" """
    newer.settings["KVM_QEMU"] = wrapped_qemu(newer, says)
    host.start()
    newer.start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, shutdown_timeout=0)
    qemu = host.wait_running("one")["one"]
    status = keys.wait_status("one", lambda s: s.machine is not None)
    assert status.machine is not None
    assert re.fullmatch(r"pc-q35-\d+\.\d+", status.machine)
    assert status.machine != "pc-q35-6.2"
    assert any(word.startswith(f"{status.machine},accel=") for word in qemu.argv), qemu.argv

    keys.put("one", restart_request="now")
    again = host.wait_for("one", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, qemu.pid})
    assert again.machine == status.machine

    keys.put("one", host=newer.name)
    moved = newer.wait_running("one")["one"]
    assert any(word.startswith(f"{status.machine},accel=") for word in moved.argv), moved.argv
    assert keys.wait_status("one", lambda s: s.host == newer.name and s.pid is not None).machine == status.machine

    # One that is new there has the newer one, and so has this one once its key was another.
    keys.machines(newer.name, "two", ram=16, extra_flags=tiny)
    newer.wait_running("two")
    assert newer.instances()["two"].machine == "pc-q35-6.2"
    keys.put("one", machine="pc", restart_request="pc")
    newer.wait_for("one", lambda s: s.phase is Phase.RUNNING and (s.machine or "").startswith("pc-i440fx-"))


# --- huge pages -----------------------------------------------------------------------------------------------


@contextmanager
def huge_pages(wanted: int) -> Iterator[int]:
    """Have the kernel set huge pages aside; the number is what it could."""
    before = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text(f"{wanted}\n")
    try:
        yield int(HUGE_PAGES.read_text())
    finally:
        HUGE_PAGES.write_text(before)


@needs_root
def test_huge_pages(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: a guest on huge pages has all of its memory there; where there are too few, QEMU's own words are told."""
    host = hosts().start()
    with huge_pages(20) as there:
        keys.machines(host.name, "one", ram=16, hugepages="2M", extra_flags=tiny, shutdown_timeout=0)
        if there >= 8:
            qemu = host.wait_running("one")["one"]
            maps = Path(f"/proc/{qemu.pid}/smaps").read_text()
            assert sum(int(kib) for kib in re.findall(r"^Private_Hugetlb: +(\d+) kB", maps, re.MULTILINE)) == 16 << 10
        # More than there are.
        keys.machines(host.name, "more", ram=256, hugepages="2M", extra_flags=tiny)
        status = host.wait_for("more", lambda s: s.phase is Phase.BACKOFF)
        assert "annot allocate memory" in status.reason
        keys.delete("one", "host")
        host.wait_forgotten("one")


# --- limits ---------------------------------------------------------------------------------------------------


def read_limit(pid: int, controller: str, v1: str, v2: str) -> str:
    """A limit of a process, read from its own cgroup, whichever generation has the controller here."""
    own = {frozenset(names.split(",")) - {""}: path for names, path in cgroups_of(pid).items()}
    (found,) = [one for one in find_hierarchies() if one.has(controller)]
    return (found.top / own[found.controllers].lstrip("/") / (v2 if found.unified else v1)).read_text().strip()


def cgroups(hierarchies: tuple[Hierarchy, ...], instance: str) -> list[Path]:
    return [path for one in hierarchies for path in (one.top / FOLDER).glob(f"{instance}@*")]


@needs_root
def test_limits_of_a_cgroup(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: `cpu_shares` and `memory_limit` are the kernel's to keep; the cgroup goes with its process."""
    host = hosts(KVM_CGROUP="cgroup").start()
    # An id of its own: the tree is the machine's, and others may be testing there.
    one = f"limited-{os.urandom(4).hex()}"
    keys.machines(host.name, one, ram=16, extra_flags=tiny, cpu_shares=512, memory_limit="200M", shutdown_timeout=0)
    qemu = host.wait_running(one)[one]
    shares = read_limit(qemu.pid, "cpu", "cpu.shares", "cpu.weight")
    assert shares in {"512", str(cpu_weight(512))}
    assert read_limit(qemu.pid, "memory", "memory.limit_in_bytes", "memory.max") == str(200 << 20)
    assert cgroups(find_hierarchies(), one) != []

    # Both shape the process: they are pending until the next one.
    keys.put(one, cpu_shares=256, memory_limit="300M")
    host.wait_for(one, lambda s: set(s.pending) == {"cpu_shares", "memory_limit"})
    keys.put(one, restart_request="now")
    host.wait_for(one, lambda s: s.phase is Phase.RUNNING and s.pid not in {None, qemu.pid})
    again = host.qemu(one)
    assert read_limit(again.pid, "memory", "memory.limit_in_bytes", "memory.max") == str(300 << 20)

    keys.delete(one)
    host.wait_forgotten(one)
    eventually("its cgroups to go", lambda: not cgroups(find_hierarchies(), one))


def test_limits_without_a_cgroup(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: a limit that nobody would keep is no limit: it waits, and says what would help."""
    host = hosts(KVM_CGROUP="none").start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, memory_limit="200M")
    status = host.wait_for("one", lambda s: s.phase is Phase.WAITING and "limits" in s.reason)
    assert "KVM_CGROUP" in status.reason
    keys.wait_status("one", lambda s: s.reason == status.reason)
    keys.delete("one", "memory_limit")
    host.wait_running("one")


# --- memory and turns -----------------------------------------------------------------------------------------


def test_one_that_does_not_fit_waits(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: guests that would not fit into the host's memory together wait, one that fits is not held up by them."""
    ram = 1000
    host = hosts(KVM_MEMORY_RESERVE=f"{memory_for_guests_mib() - ram - ram // 2}M").start()
    wishes = {"extra_flags": tiny, "shutdown_timeout": 0}
    keys.machines(host.name, "first", ram=ram, **wishes)
    host.wait_running("first")
    keys.machines(host.name, "second", ram=ram, **wishes)
    status = host.wait_for("second", lambda s: s.phase is Phase.WAITING and "memory" in s.reason)
    found = re.fullmatch(
        r"waits for memory of this host: it needs (\d+) MiB, "
        r"and of \d+ MiB for guests (\d+) MiB are promised to 1 other",
        status.reason,
    )
    assert found is not None, status.reason
    assert int(found[1]) >= ram
    assert found[1] == found[2]
    keys.wait_status("second", lambda s: s.reason == status.reason)
    keys.machines(host.name, "small", ram=16, **wishes)
    host.wait_running("small")
    assert {qemu.instance for qemu in host.qemus()} == {"first", "small"}

    # A successor counts what it adopts.
    host.kill9()
    host.start()
    host.wait_for("second", lambda s: s.phase is Phase.WAITING and "waits for memory" in s.reason)
    keys.put("first", power="off")
    host.wait_running("second")
    keys.put("first", power="on")
    host.wait_for("first", lambda s: s.phase is Phase.WAITING and "waits for memory" in s.reason)


def test_priority(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: whose turn it is: the greater priority first, then who came first; one at a time where one is allowed."""
    # In the supervisor's own view, where the gate is.
    host = hosts(KVM_START_PARALLEL="1", KVM_QEMU_USER="", KVM_EXTRA_FLAGS="any")
    gate = host.folder / "gate"
    os.mkfifo(gate)
    host.settings["KVM_QEMU"] = wrapped_qemu(
        host, f'case "$*" in *guest=slow,*) read -r _ <{gate};; esac; exec "$QEMU" "$@"'
    )
    host.start()
    keys.machines(host.name, "slow", ram=16, extra_flags=tiny)
    eventually("the slow one to be started", lambda: host.events("instance.spawned", instance="slow"))
    for one, priority in (("plain", None), ("late", -5), ("soon", 5), ("first", 100), ("soon-too", 5)):
        wishes = {} if priority is None else {"priority": priority}
        keys.machines(host.name, one, ram=16, extra_flags=tiny, **wishes)
        host.wait_for(one, lambda s: s.phase is Phase.WAITING and "its turn" in s.reason)
    assert [qemu.instance for qemu in host.qemus()] in ([], ["slow"])
    gate.write_text("\n")
    expected = ["slow", "first", "soon", "soon-too", "plain", "late"]
    host.wait_running(*expected)
    assert [line["instance"] for line in host.events("instance.spawned")] == expected


# --- extra_flags ----------------------------------------------------------------------------------------------


def test_which_extra_flags_a_host_allows(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: what a host does not allow is a problem of the instance there, which names the option and the setting."""
    none, some, anything = (
        hosts("none", KVM_EXTRA_FLAGS="none").start(),
        hosts("some", KVM_EXTRA_FLAGS="bios").start(),
        hosts("anything", KVM_EXTRA_FLAGS="any").start(),
    )
    for host in (none, some, anything):
        keys.machines(host.name, f"on-{host.name}", ram=16, extra_flags=f"{tiny} -rtc base=utc")
    for host, refused in ((none, "'-bios' '-rtc'"), (some, "'-rtc'")):
        status = host.wait_for(f"on-{host.name}", Phase.INVALID)
        (problem,) = status.problems
        assert problem.startswith("extra_flags: ")
        assert refused in problem
        assert "KVM_EXTRA_FLAGS" in problem
        assert host.qemus() == []
        assert host.metric("instance_invalid", instance=f"on-{host.name}") == 1
    anything.wait_running("on-anything")
    # Mended by its key, it starts.
    keys.put("on-some", extra_flags=tiny)
    some.wait_running("on-some")


@pytest.mark.skipif(os.geteuid() != 0, reason="otherwise QEMU is not root")
def test_where_qemu_is_root_any_flags_are_asked_for(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: what runs goes on after an upgrade, and says what is to be done; nothing new of that kind starts."""
    host = hosts(KVM_QEMU_USER="", KVM_EXTRA_FLAGS="any").start()
    keys.machines(host.name, "old", ram=16, extra_flags=tiny)
    before = host.wait_running("old")
    host.stop()
    del host.settings["KVM_EXTRA_FLAGS"]
    host.start()
    (line,) = host.events("qemu.privileged")[1:]
    assert line["extra_flags"] == "none"
    keys.machines(host.name, "new", ram=16, extra_flags=tiny)
    for instance in ("new", "old"):
        status = host.wait_for(instance, lambda one: bool(one.problems))
        assert "leave KVM_QEMU_USER out" in status.problems[0]
        assert "set KVM_EXTRA_FLAGS=any there" in status.problems[0]
    assert host.wait_running("old") == before
    assert [qemu.instance for qemu in host.qemus()] == ["old"]
    # With users of their own both are bounded by what those may.
    host.stop()
    del host.settings["KVM_QEMU_USER"]
    host.start()
    host.wait_running("new")
    assert host.wait_running("old") == before
