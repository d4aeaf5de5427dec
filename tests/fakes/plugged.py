"""The devices of a QEMU in virtual time that come and go while it runs, by the words of QMP.

What it has in common with a real one was seen on QEMU 7.2: a guest that is asked to let go of a device does so later,
or never; QEMU says `DEVICE_DELETED` twice for a virtio device; a node in use is not closed; a second request is refused
while the first one is fresh.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from kvmsupervisor.adapters.qmp import MonitorRefused

COMMANDS = frozenset(
    {
        *("qom-list", "qom-set", "device_add", "device_del", "netdev_add", "netdev_del", "getfd"),
        *("object-add", "object-del", "set_link", "block_set_io_throttle"),
        *("query-hotpluggable-cpus", "query-memory-devices"),
    }
)


class FakePlugged:
    """Devices, disks' nodes, and what limits them.

    Attributes:
        guest: what the guest does that is asked for a device, or to take memory: `heeds`, `ignores`, `refuses`.
        devices: all that have a name, with what was said of each.
        nodes: those of disks.
        netdevs: the host's ends of NICs.
        objects: all that have a name.
        sets: of open files that disks are.
        down: NICs whose cable is out.
        limits: requests a second by the name of the node, or of the object.
        cpus: how many there are, of how many.
        memory: of the device for more: what is asked for, what the guest has.
        asked: devices that the guest was asked to let go of.
        seen: what the guest has seen come and go, in order.
    """

    def __init__(self, argv: Sequence[str], event: Callable[..., None]) -> None:
        self.guest = "heeds"
        self.devices: dict[str, dict[str, str]] = {}
        self.nodes: set[str] = set()
        self.netdevs: set[str] = set()
        self.objects: set[str] = set()
        self.sets: set[int] = set()
        self.down: set[str] = set()
        self.limits: dict[str, int] = {}
        self.memory: list[int] | None = None
        self.cpus = [1, 1]
        self.asked: set[str] = set()
        self.seen: list[str] = []
        self._event = event
        for option, value in pairwise(argv):
            words = dict(word.partition("=")[::2] for word in value.split(","))
            if option == "-device" and "id" in words:
                self.devices[words["id"]] = words
                if value.startswith("virtio-mem-pci"):
                    self.memory = [int(words["requested-size"])] * 2
            elif option == "-netdev":
                self.netdevs.add(words["id"])
            elif option == "-smp":
                self.cpus = [int(words["cpus"]), int(words.get("maxcpus", words["cpus"]))]
            elif option == "-add-fd" and (number := int(words.get("set", "0"))) // 1000 == 97470:
                self.sets.add(number)
            elif option == "-object" and (found := re.search(r'"id":"([^"]+)"', value)):
                self.objects.add(found[1])
            elif option == "-blockdev" and (found := re.search(r'"node-name":"(disk\d+)"', value)):
                self.nodes.add(found[1])

    def concerns(self, command: str, given: dict[str, Any]) -> bool:
        """Whether a command for nodes and sets is about a disk, not about a medium."""
        name, number = str(given.get("node-name", "")), given.get("fdset-id", 0)
        return command in {"blockdev-add", "blockdev-del", "add-fd", "remove-fd"} and (
            name.startswith("disk") or 97470000 <= number < 97471000
        )

    def run(self, command: str, given: dict[str, Any]) -> Any:  # noqa: C901, PLR0912 - a table of commands
        match command:
            case "qom-list":
                return [{"name": name} for name in (self.objects if given["path"] == "/objects" else self.devices)]
            case "add-fd":
                assert given["fdset-id"] not in self.sets
                self.sets.add(given["fdset-id"])
            case "remove-fd":
                assert given["fdset-id"] in self.sets
                self.sets.remove(given["fdset-id"])
            case "object-add":
                self.objects.add(given["id"])
                self.limits[given["id"]] = given["limits"]["iops-total"]
            case "object-del":
                self.objects.remove(given["id"])
            case "blockdev-add":
                self._refuse(given["node-name"] in self.nodes, "Duplicate nodes")
                self.nodes.add(given["node-name"])
            case "blockdev-del":
                used = {device.get("drive") for device in self.devices.values()}
                self._refuse(given["node-name"] in used, "Node is in use")
                self.nodes.remove(given["node-name"])
            case "getfd":
                pass
            case "netdev_add":
                self._refuse(given["id"] in self.netdevs, "Duplicate ID")
                self.netdevs.add(given["id"])
            case "netdev_del":
                self._refuse(given["id"] not in self.netdevs, "Device not found")
                self.netdevs.remove(given["id"])
            case "device_add":
                self._add(given)
            case "device_del":
                self._refuse(given["id"] not in self.devices, "Device not found")
                self._refuse(given["id"] in self.asked, "Device is already in the process of unplug")
                self.asked.add(given["id"])
                if self.guest == "refuses":
                    self.asked.remove(given["id"])
                    self._event("DEVICE_UNPLUG_GUEST_ERROR", device=given["id"], path="/machine")
                elif self.guest == "heeds":
                    self.let_go(given["id"])
            case "set_link":
                (self.down.discard if given["up"] else self.down.add)(given["name"])
            case "block_set_io_throttle":
                self.limits[given["id"].split("/")[3]] = given["iops"]
            case "qom-set" if given["property"] == "limits":
                self.limits[given["path"].rpartition("/")[2]] = given["value"]["iops-total"]
            case "qom-set":
                assert self.memory is not None
                self.memory[0] = given["value"]
                if self.guest == "heeds":
                    self.take_memory()
            case "query-hotpluggable-cpus":
                there, most = self.cpus
                slots = [{"type": "cpu", "props": {"core-id": number}, "qom-path": "/x"} for number in range(there)]
                return [*({"type": "cpu", "props": {"core-id": n}} for n in range(most - 1, there - 1, -1)), *slots]
            case _:
                told = [] if self.memory is None else [dict(zip(("requested-size", "size"), self.memory, strict=True))]
                return [{"type": "virtio-mem", "data": {"id": "memory0", **one}} for one in told]
        return {}

    def _add(self, given: dict[str, Any]) -> None:
        self._refuse(given["id"] in self.devices, "Duplicate device ID")
        if given["driver"] == "cpu":
            self.cpus[0] += 1
            assert given["core-id"] == self.cpus[0] - 1, "in order"
        elif given["driver"] == "virtio-blk-pci":
            assert given["drive"] in self.nodes
        else:
            assert given["netdev"] in self.netdevs
        self.devices[given["id"]] = given
        self.seen.append(f"+{given['id']}")

    def let_go(self, name: str) -> None:
        """The guest lets go of a device that it was asked for."""
        self.asked.discard(name)
        del self.devices[name]
        self.seen.append(f"-{name}")
        self._event("DEVICE_DELETED", path=f"/machine/peripheral/{name}/virtio-backend")
        self._event("DEVICE_DELETED", device=name, path=f"/machine/peripheral/{name}")

    def take_memory(self) -> None:
        """The guest takes the memory that it was asked to take, or gives it back."""
        assert self.memory is not None
        self.memory[1] = self.memory[0]
        self._event("MEMORY_DEVICE_SIZE_CHANGE", id="memory0", size=self.memory[1])

    def _refuse(self, wrong: bool, words: str) -> None:
        if wrong:
            raise MonitorRefused(f"QEMU refuses it: {words}")
