"""The CD-ROM drive of a QEMU in virtual time, by the words of QMP.

What it has in common with a real one was seen on QEMU 7.2: a tray that the guest has locked is not opened and no error
says so, nothing is taken out of a tray that is shut, and a set of open files lives until its last node is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from kvmsupervisor.adapters.qmp import MonitorRefused

COMMANDS = frozenset(
    {
        "blockdev-open-tray",
        "blockdev-close-tray",
        "blockdev-remove-medium",
        "blockdev-insert-medium",
        "blockdev-add",
        "blockdev-del",
        "add-fd",
        "remove-fd",
        "query-fdsets",
        "query-named-block-nodes",
    }
)


class FakeDrive:
    """One drive, and the block nodes and sets of open files that media are made of.

    Attributes:
        there: whether QEMU was started with a drive.
        locked: whether its guest holds the tray.
        tray_open: whether that is open.
        inside: the block node in it.
        nodes: all of them, with the set that each was opened from.
        sets: what each set is, as it was named when it was handed over.
        seen: what the guest has found in it, in order.
    """

    def __init__(self, argv: Sequence[str], event: Callable[..., None]) -> None:
        devices = [value for option, value in pairwise(argv) if option == "-device" and value.startswith("ide-cd,")]
        self.there = bool(devices)
        self.locked = self.tray_open = False
        self.nodes: dict[str, int] = {}
        self.sets: dict[int, str] = {}
        self.inside: str | None = None
        self.seen: list[str] = []
        self._event = event
        if devices and "drive=" in devices[0]:
            self.inside = devices[0].partition("drive=")[2]
            added = [value for option, value in pairwise(argv) if option == "-add-fd" and "set=97473000" in value]
            self.nodes[self.inside] = 97473000
            self.sets[97473000] = added[0].partition("opaque=")[2]
            self.seen.append(self.medium)

    @property
    def medium(self) -> str:
        return "" if self.inside is None else self.sets[self.nodes[self.inside]]

    @property
    def block(self) -> list[dict[str, Any]]:
        """As `query-block` tells it."""
        if not self.there:
            return []
        inserted = {} if self.inside is None else {"inserted": {"node-name": self.inside}}
        return [{"qdev": "cdrom0", "locked": self.locked, "tray_open": self.tray_open, **inserted}]

    def run(self, command: str, given: dict[str, Any]) -> Any:
        match command:
            case "query-fdsets":
                return [{"fdset-id": number} for number in self.sets]
            case "query-named-block-nodes":
                return [{"node-name": name} for name in self.nodes]
            case "add-fd":
                assert given["fdset-id"] not in self.sets
                self.sets[given["fdset-id"]] = given["opaque"]
            case "remove-fd":
                assert given["fdset-id"] not in self.nodes.values()
                del self.sets[given["fdset-id"]]
            case "blockdev-add":
                self._refuse(given["node-name"] in self.nodes, "Duplicate nodes")
                self.nodes[given["node-name"]] = int(given["file"]["filename"].rpartition("/")[2])
            case "blockdev-del":
                self._refuse(given["node-name"] == self.inside, "Node is in use")
                del self.nodes[given["node-name"]]
            case "blockdev-open-tray":
                if not self.locked or given["force"]:
                    self.move(is_open=True)
            case "blockdev-close-tray":
                self.move(is_open=False)
                self.seen.append(self.medium)
            case "blockdev-remove-medium":
                self._refuse(not self.tray_open, "Tray of device 'cdrom0' is not open")
                self.inside = None
            case _:
                self._refuse(not self.tray_open, "Tray of device 'cdrom0' is not open")
                self._refuse(self.inside is not None, "There already is a medium in device 'cdrom0'")
                self.inside = given["node-name"]
        return {}

    def move(self, *, is_open: bool) -> None:
        """The tray is opened or closed, by QEMU or by the guest."""
        self.tray_open = is_open
        self._event("DEVICE_TRAY_MOVED", device="", id="cdrom0", **{"tray-open": is_open})

    def _refuse(self, wrong: bool, words: str) -> None:
        if wrong:
            raise MonitorRefused(f"QEMU refuses it: {words}")
