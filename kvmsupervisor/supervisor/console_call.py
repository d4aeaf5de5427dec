"""One call at the door to the consoles: who asks, what for, and the descriptor or the refusal.

For a display the descriptor is a connection with QEMU, on which nothing of ours is any more. For a serial console it is
the log, and the keyboard while it is theirs (`supervisor/serial.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.descriptors import Carrier, Lost
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.domain.consoles import ConsoleKind, ConsoleRequest, Unfit, encoded
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.machine.viewers import NotShown
from kvmsupervisor.supervisor.serial import SEND_S, Guest, SerialConsole

log = structlog.get_logger(__name__)

FIRST_S = 5.0
"""How long a client may take to say what it wants. Arbitrary: it knows that before it connects."""


async def answer(
    carrier: Carrier,
    *,
    instances: Mapping[InstanceId, Guest],
    run_dir: RunDir,
    is_guests: Callable[[int], bool],
    clock: Clock,
) -> None:
    """Serve one call to its end, and close it."""
    with contextlib.closing(carrier), contextlib.suppress(Lost, TimeoutError):
        try:
            await _answer(carrier, instances, run_dir, is_guests, clock)
        except Unfit as unfit:
            await carrier.send(encoded({"refused": str(unfit)}), timeout_s=SEND_S)


async def _answer(
    carrier: Carrier,
    instances: Mapping[InstanceId, Guest],
    run_dir: RunDir,
    is_guests: Callable[[int], bool],
    clock: Clock,
) -> None:
    peer = carrier.peer
    if is_guests(peer.uid):
        raise Unfit(f"user {peer.uid} is one that guests run as")
    async with asyncio.timeout(FIRST_S):
        data, _ = await carrier.receive()
    request = ConsoleRequest.parse(data)
    if (guest := instances.get(request.instance)) is None:
        raise Unfit(f"{request.instance} is not on this host")
    told = log.bind(instance=request.instance, who=request.who, uid=peer.uid, pid=peer.pid)
    if request.kind is ConsoleKind.DISPLAY:
        await _show(carrier, guest)
        told.info("console.display_given")
        return
    console = SerialConsole(
        carrier,
        run_dir.instance(request.instance),
        guest=lambda: instances.get(request.instance),
        who=request.who,
        clock=clock,
        told=told,
    )
    await console.run()


async def _show(carrier: Carrier, guest: Guest) -> None:
    theirs, qemus = socket.socketpair()
    with theirs, qemus:
        try:
            await guest.viewers.show(qemus.fileno())
        except NotShown as error:
            raise Unfit(str(error)) from error
        await carrier.send(encoded({"is": "display"}), fd=theirs.fileno(), timeout_s=SEND_S)
