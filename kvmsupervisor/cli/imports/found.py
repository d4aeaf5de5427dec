"""What was found of one machine: its keys, and what they do not say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmsupervisor.domain.keys import ID_RULE, parse_id
from kvmsupervisor.domain.parse_keys import DISKS, NICS
from kvmsupervisor.domain.values import SHOWN_LENGTH, show

_NOT_IN_AN_ID = re.compile(r"[^A-Za-z0-9._-]+")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_+.-]+")


class NotThat(Exception):
    """The file is no description of a machine that can be read. The message says what was found."""


@dataclass
class Machine:
    """One machine, as far as it was read.

    Attributes:
        id: its id; empty before it has a name.
        keys: key name → value.
        left: what is not brought over: the part, and what it means here.
    """

    id: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def name(self, name: str) -> None:
        """Give it its name; where that is no id, what is one."""
        self.id = name
        if parse_id(name) is None:
            self.id = _NOT_IN_AN_ID.sub("-", name).strip("-._")[:63].rstrip("-._") or "machine"
            self.leave(f"name {show(name)}", f"an id has {ID_RULE}")

    def leave(self, part: str, why: str) -> None:
        """Note a part that is not brought over, once."""
        said = f"{part[:SHOWN_LENGTH]}: {why}"
        if said not in self.left:
            self.left.append(said)

    def add_disk(self, where: str, options: Sequence[str], part: str) -> None:
        """Add a disk behind those that there are.

        Args:
            where: `POOL/IMAGE`, or `file:NAME`.
            options: behind it.
            part: what it is called in the file.
        """
        number = self._disks()
        if number == DISKS:
            self.leave(part, f"a machine has at most {DISKS} disks")
            return
        self.keys[f"disk/{number}"] = " ".join([where, *options])

    def add_file(self, source: str, form: str, options: Sequence[str], part: str) -> None:
        """Add a disk that is a file, or is to become one, and say what has to be copied where.

        Args:
            source: the file, as a word of a shell's command.
            form: `raw`, or any format that `qemu-img convert` reads.
            options: of the disk.
            part: what it is called in the file.
        """
        number = self._disks()
        name = _NOT_IN_A_NAME.sub("-", self.id) + (f"-{number}" if number else "")
        ending = "raw" if form == "raw" else "qcow2"
        self.add_disk(f"file:{name}.{ending}", options, part)
        self.leave(
            part,
            f"copy it to the host's KVM_DISK_DIR while the machine is off: qemu-img convert -O {ending} {source} "
            f"{name}.{ending}",
        )

    def _disks(self) -> int:
        """How many there are."""
        return sum(key.startswith("disk/") for key in self.keys)

    def add_medium(self, source: str, name: str, part: str) -> None:
        """Put a medium into the CD-ROM drive, and say what has to be copied where.

        Args:
            source: the file, as a word of a shell's command.
            name: the same, as its name is made of.
            part: what it is called in the file.
        """
        stem = re.split(r"[/:]", name)[-1].rpartition(".")[0] or "medium"
        file = (_NOT_IN_A_NAME.sub("-", stem).lstrip("+.-") or "medium") + ".iso"
        self.keys["cdrom"] = f"file:{file}"
        self.leave(part, f"copy it to the host's KVM_DISK_DIR: cp {source} {file}")

    def add_nic(self, mac: str | None, bridge: str | None, part: str) -> None:
        """Add a NIC behind those that there are."""
        number = sum(key == "mac" or key.endswith("/mac") for key in self.keys)
        if number == NICS:
            self.leave(part, f"a machine has at most {NICS} NICs")
            return
        place = f"nic/{number}/" if number else ""
        self.keys[f"{place}mac"] = (mac or "auto").lower()
        if bridge is not None:
            self.keys[f"{place}bridge"] = bridge
