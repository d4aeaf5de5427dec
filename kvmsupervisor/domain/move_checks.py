"""Whether a guest can be moved while it runs, and if not, why, and what would let it. Pure.

Asked by the source before anything begins, by the target of what comes, and by `move --dry-run` and `check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.lock import Storage
from kvmsupervisor.domain.offer import PROTOCOL, MoveFacts
from kvmsupervisor.domain.spec import Firmware, Spec
from kvmsupervisor.domain.storage import nvram_of, pinning, storage_of
from kvmsupervisor.domain.values import some

SHOWN = 8
"""How many features of a processor a refusal names. Arbitrary: one line."""

SWITCHES = "live moves are switched on by KVM_MIGRATION_LISTEN"


@frozen
class Refusal:
    """Why a guest cannot be moved live.

    Attributes:
        what: the cause, as a clause.
        way_out: what would let it be moved.
    """

    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.what} ({self.way_out})"


@frozen(kw_only=True)
class Guest:
    """What the checks need of a running guest.

    Attributes:
        spec: the machine that was started.
        machine: its versioned machine type; None where that is not known.
        accel: `kvm` or `tcg`.
    """

    spec: Spec
    machine: str | None
    accel: str | None


def refusals(guest: Guest, target: str, here: MoveFacts | None, there: MoveFacts | None) -> tuple[Refusal, ...]:
    """Everything that keeps a guest from being moved live; empty when nothing is known that does.

    Args:
        guest: which.
        target: the name of the other host.
        here: of the host where it runs; None where live moves are not switched on.
        there: of the target, likewise.
    """
    return tuple(_refusals(guest, target, here, there))


def _refusals(guest: Guest, target: str, here: MoveFacts | None, there: MoveFacts | None) -> Iterator[Refusal]:
    yield from _disks(guest.spec)
    if here is None:
        yield Refusal("this host moves no guest live", SWITCHES)
    if there is None:
        yield Refusal(f"{target} takes no guest live: another release, or not switched on there", SWITCHES)
    if here is None or there is None:
        return
    if there.protocol != here.protocol or here.protocol != PROTOCOL:
        yield Refusal(f"{target} has a release that moves guests in another way", "bring both to the same release")
    yield from _machine(guest, target, there)
    yield from _cpu(guest, target, here, there)
    if guest.spec.plugged_cpus and any(_DISKS.search(word) for word in guest.spec.extra_flags):
        yield Refusal(
            "it has got processors while it runs, and disks by extra_flags, which get a queue for each at a start",
            "restart it, or say their num-queues",
        )
    if guest.spec.firmware is Firmware.UEFI and here.firmware != there.firmware:
        sizes = f"{here.firmware or 'none'} here, {there.firmware or 'none'} there"
        yield Refusal(f"the UEFI firmware of {target} has other sizes ({sizes})", "install the same package of OVMF")


_DISKS = re.compile(r"(virtio-(blk|scsi)|if=virtio)(?!.*num[-_]queues=)")
"""Disks whose number of queues QEMU makes that of the processors."""


def _disks(spec: Spec) -> Iterator[Refusal]:
    files = pinning(spec)
    if files:
        names = some([f"{key} is {file.title}" for key, file in files.items()], SHOWN)
        yield Refusal(f"it writes to files of this host: {names}", "move their contents into Ceph")
    elif storage_of(spec) is Storage.UNFENCEABLE:
        yield Refusal(
            "its extra_flags name what belongs to this host, or what is not known to be harmless",
            "leave that out, or stop it for the move",
        )
    if spec.cdrom is not None:
        yield Refusal(
            "its CD-ROM drive holds what this host has opened for it", "delete the key `cdrom`, and restart it"
        )
    if spec.firmware is Firmware.UEFI and nvram_of(spec) is None:
        yield Refusal("its UEFI variables are a file of this host", "give it a first disk in Ceph: they lie beside it")


def _machine(guest: Guest, target: str, there: MoveFacts) -> Iterator[Refusal]:
    """A versioned machine type is known to the QEMU of that version and, for some years, to later ones."""
    machine = guest.machine
    needed = None if machine is None else re.fullmatch(r"pc-(?:q35|i440fx)-(\d+)\.(\d+)", machine)
    known = re.match(r"(\d+)\.(\d+)", there.qemu)
    if machine is None:
        yield Refusal("its versioned machine type is not on record", "restart it once")
    elif needed and known and tuple(map(int, needed.groups())) > tuple(map(int, known.groups())):
        wanted = f"install QEMU {needed[1]}.{needed[2]} or later there"
        yield Refusal(f"QEMU {there.qemu} of {target} does not know its machine type {machine}", wanted)


def _cpu(guest: Guest, target: str, here: MoveFacts, there: MoveFacts) -> Iterator[Refusal]:
    if guest.accel != there.accel:
        yield Refusal(f"it runs with {guest.accel} and {target} has {there.accel}", "set KVM_ACCEL to the same on both")
        return
    if guest.accel != "kvm":
        return
    wide = guest.spec.cpu is None or guest.spec.cpu.partition(",")[0] in {"host", "max"}
    if here.cpu != there.cpu:
        makes = f"{here.cpu or 'unknown'} here, {there.cpu or 'unknown'} there"
        yield Refusal(f"{target} has a processor of another make ({makes})", "move it to a host with one of the same")
    elif wide and (missing := sorted(set(here.flags) - set(there.flags))):
        yield Refusal(
            f"its processor is the host's own (`cpu` is {guest.spec.cpu or 'host'}), and that of {target} lacks "
            f"{some(missing, SHOWN)}",
            "give it a named model that both have, such as x86-64-v2-AES or Nehalem, and restart it",
        )


SEEN = frozenset({"-device", "-machine", "-M", "-cpu", "-m", "-smp", "-vga", "-global", "-rtc", "-numa", "-watchdog"})
"""Options by which a guest, and so its migration, sees the machine. The others say where things are on the host."""


def seen_by_guest(argv: Sequence[str], extra: Sequence[str]) -> tuple[str, ...]:
    """The words of a command line that must be the same on both sides, without what differs from host to host."""
    words = [f"{option} {value}" for option, value in pairwise(argv) if option in SEEN]
    return (*(re.sub(r"\b(v?host)?fds?=[\d:]+", "fd", word) for word in words), *extra)


def differing(here: Sequence[str], there: Sequence[str]) -> Refusal | None:
    """Why a guest cannot go on under the command line that the target would give it; None when it can."""
    if list(here) == list(there):
        return None
    words = [word for word in here if word not in there] + [word for word in there if word not in here]
    return Refusal(
        f"the target would give it another machine: {some(words or ['another order of devices'], SHOWN)} differs",
        "restart it here, under the release that both have",
    )
