"""The devices of one QEMU that come, go or change while it runs: asked for over QMP, and what came of that.

Decides nothing. Sources: `device_add`, `device_del`, `netdev_add`, `blockdev-add`, `block_set_io_throttle`, `set_link`,
`query-hotpluggable-cpus`, `query-memory-devices` and the events `DEVICE_DELETED`, `DEVICE_UNPLUG_GUEST_ERROR` and
`MEMORY_DEVICE_SIZE_CHANGE` of QEMU's QMP reference (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.qmp import MonitorRefused, MonitorSilent
from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.hardware import Ceph, TapFds
from kvmsupervisor.domain.live import MEMORY, Attempt, key_of
from kvmsupervisor.domain.qmp_answers import number_in, object_in, objects_in, text_in
from kvmsupervisor.domain.spec import Disk, Nic, Spec
from kvmsupervisor.domain.storage import node_of
from kvmsupervisor.machine.monitor import Ask

GUEST_S = 30.0
"""How long a guest may take to do its part before people are told that it has not. Linux takes some 50 ms; one that is
still booting, or has no driver, does nothing. What it does later is noticed by an event."""

SILENT_S = 5.0
"""Pause after QEMU has not answered."""

_PERIPHERAL = "/machine/peripheral"
_IN_THE_MIDST = "already in the process of unplug"
"""What QEMU says to who asks a guest twice."""


class Changes:
    """The changes of one QEMU.

    Attributes:
        attempts: what is known of the last one at each device, by name.
    """

    def __init__(self, clock: Clock, ask: Ask) -> None:
        self.attempts: dict[str, Attempt] = {}
        self._clock = clock
        self._ask = ask

    # --- when the next attempt is due -------------------------------------------------------------------------

    def look(self) -> None:
        """Try all again now, but for what a guest still has time for: people have changed a key."""
        self.attempts = {device: one for device, one in self.attempts.items() if one.asked}

    def is_guests_turn(self, device: str) -> bool:
        """Whether a guest was asked for something, and has still time to do it."""
        attempt = self.attempts.get(device)
        return attempt is not None and attempt.asked and self._clock.now() < attempt.at

    def wait(self, device: str, said: str | None, after_s: float = math.inf) -> None:
        """Note why nothing came of a change, and when to try again; by itself not before something changes."""
        self.attempts[device] = Attempt(at=self._clock.now() + after_s, said=said)

    def wait_for_guest(self, device: str, said: str) -> None:
        """It is the guest's turn. Noted before it is asked: its answer may come with QEMU's own."""
        self.attempts[device] = Attempt(at=self._clock.now() + GUEST_S, said=said, asked=True)

    def say(self, device: str, said: str) -> None:
        """Note what is to be said of an attempt that goes on."""
        if (attempt := self.attempts.get(device)) is not None:
            self.attempts[device] = replace(attempt, said=said)

    def done(self, device: str) -> None:
        """Nothing keeps it any more."""
        self.attempts.pop(device, None)

    def hears(self, event: str, data: Mapping[str, Any]) -> bool:
        """Note what an event says of them; return whether anything is to be decided."""
        match event:
            case "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR":
                device = (text_in(data, "device") or "").removesuffix("-dev")
                refused = event == "DEVICE_UNPLUG_GUEST_ERROR"
            case "MEMORY_DEVICE_SIZE_CHANGE":
                device, refused = MEMORY, False
            case _:
                return False
        if device not in self.attempts:
            return False
        if refused:
            self.wait(device, f"{key_of(device)}: its guest refuses to let go of {device}")
        else:
            self.attempts[device] = Attempt(said=self.attempts[device].said)
        return True

    # --- what QEMU is asked -----------------------------------------------------------------------------------

    async def do(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None, **more: object
    ) -> Any:
        """Run a QMP command.

        Raises:
            MonitorSilent: QEMU did not answer, so it may have done it.
            MonitorRefused: it refuses.
        """
        answer = await self._ask(command, {**(arguments or {}), **more} or None, fd=fd)
        if answer is None:
            raise MonitorSilent(f"QEMU has not answered {command}")
        return answer

    async def has(self, device: str) -> bool:
        """Whether QEMU has a device of that name.

        Raises:
            MonitorSilent, MonitorRefused: see `do`.
        """
        named = await self._names("qom-list", "name", path=_PERIPHERAL)
        return device in named or f"{device}-dev" in named

    async def _names(self, command: str, member: str, **arguments: object) -> set[str | None]:
        """The names in what QEMU answers; see `do`."""
        return {text_in(one, member) for one in objects_in(await self.do(command, arguments))}

    async def open_disk(self, disk: Disk, ceph: Ceph, fd: int | None) -> None:
        """Have QEMU open a disk, which its guest does not see yet.

        Args:
            disk: which.
            ceph: how images are reached.
            fd: of its file; None for an image.

        Raises:
            MonitorSilent, MonitorRefused: see `do`.
        """
        if fd is not None:
            await self.do("add-fd", {"fdset-id": hardware.disk_set(disk), "opaque": disk.key}, fd=fd)
        if (limit := hardware.disk_limit(disk)) is not None:
            await self.do("object-add", limit)
        await self.do("blockdev-add", hardware.disk_node(disk, ceph))

    async def close_disk(self, disk: Disk) -> None:
        """Have QEMU close a disk that its guest does not have, as far as it is open. May be repeated.

        Raises:
            MonitorSilent, MonitorRefused: see `do`.
        """
        if node_of(disk) in await self._names("query-named-block-nodes", "node-name", flat=True):
            await self.do("blockdev-del", {"node-name": node_of(disk)})
        if hardware.limit_name(disk) in await self._names("qom-list", "name", path="/objects"):
            await self.do("object-del", id=hardware.limit_name(disk))
        if any(
            number_in(one, "fdset-id") == hardware.disk_set(disk) for one in objects_in(await self.do("query-fdsets"))
        ):
            await self.do("remove-fd", {"fdset-id": hardware.disk_set(disk)})

    async def give_disk(self, disk: Disk, spec: Spec) -> None:
        """Show a disk of a machine that is open to its guest, which may write to it from now on; see `do`."""
        await self.do("device_add", hardware.disk_device(disk, spec))

    async def give_nic(self, nic: Nic, tap: TapFds) -> None:
        """Give the guest a NIC on an open tap.

        Raises:
            MonitorSilent, MonitorRefused: see `do`.
        """
        name = hardware.netdev_name(nic)
        network: dict[str, object] = {"type": "tap", "id": name, "fd": name}
        await self.do("getfd", fdname=name, fd=tap.fd)
        if tap.vhost_fd is not None:
            network |= {"vhost": True, "vhostfd": f"{name}-vhost"}
            await self.do("getfd", fdname=f"{name}-vhost", fd=tap.vhost_fd)
        await self.do("netdev_add", network)
        await self.do("device_add", hardware.nic_device(nic))
        if nic.down:
            await self.set_link(nic)

    async def close_nic(self, nic: Nic) -> None:
        """Have QEMU close the host's end of a NIC that its guest does not have, as far as it is open.

        Raises:
            MonitorSilent: see `do`.
        """
        with contextlib.suppress(MonitorRefused):  # there is none
            await self.do("netdev_del", id=hardware.netdev_name(nic))

    async def ask_for(self, device: str, name: str) -> None:
        """Ask the guest to let go of a device.

        Args:
            device: by the name under which attempts at it are kept.
            name: its name in QEMU.

        Raises:
            MonitorSilent, MonitorRefused: see `do`.
        """
        self.wait_for_guest(device, f"{key_of(device)}: its guest is asked to let go of {device}")
        try:
            await self.do("device_del", id=name)
        except MonitorRefused as error:
            if _IN_THE_MIDST not in str(error):
                raise

    async def set_link(self, nic: Nic) -> None:
        """Pull out the cable of a NIC, or plug it in; see `do`."""
        await self.do("set_link", name=hardware.nic_name(nic), up=not nic.down)

    async def limit(self, disk: Disk) -> None:
        """Limit the requests of a disk, or lift its limit; see `do`."""
        if (name := hardware.limit_name(disk)) in await self._names("qom-list", "name", path="/objects"):
            value = hardware.limits(disk.source.iops)
            await self.do("qom-set", path=f"/objects/{name}", property="limits", value=value)
            return
        # It began without one: the limit is its device's.
        none = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
        place = f"{_PERIPHERAL}/{hardware.disk_name(disk)}/virtio-backend"
        await self.do("block_set_io_throttle", {**none, "id": place, "iops": disk.source.iops or 0})

    async def give_processors(self, count: int) -> int:
        """Give the guest as many vCPUs; return how many it has then.

        Raises:
            MonitorSilent, MonitorRefused: see `do`.
        """
        slots = list(objects_in(await self.do("query-hotpluggable-cpus")))
        free = [slot for slot in slots if "qom-path" not in slot]
        there = len(slots) - len(free)
        # In the order in which they are when QEMU is started with them, as at the target of a live move.
        free.sort(key=lambda slot: _place(object_in(slot, "props")))
        for number, slot in enumerate(free[: max(count - there, 0)], there):
            place = object_in(slot, "props")
            await self.do("device_add", {"driver": text_in(slot, "type"), "id": f"cpu{number}", **place})
        return min(max(count, there), len(slots))

    async def ask_for_memory(self, size: int) -> int:
        """Ask the guest to have so many bytes beside those that it began with; return how many it has now.

        Raises:
            MonitorSilent, MonitorRefused: see `do`.
        """
        for device in objects_in(await self.do("query-memory-devices")):
            data = object_in(device, "data")
            if text_in(data, "id") != hardware.MEMORY_DEVICE:
                continue
            if number_in(data, "requested-size") != size:
                path = f"{_PERIPHERAL}/{hardware.MEMORY_DEVICE}"
                await self.do("qom-set", path=path, property="requested-size", value=size)
            return number_in(data, "size") or 0
        raise MonitorRefused("QEMU has no device for more memory")


def _place(props: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(number_in(props, name) or 0 for name in ("socket-id", "die-id", "core-id", "thread-id"))
