"""The lines of bridge.conf that a supervisor has written for its instances, and takes away when none wants them.

A line too few costs nothing: it is written again before the next start that needs it (`Provisioner.open`), and a guest
that runs does not need it. So nothing is remembered here; what is ours is told by the file itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Set
from typing import Never

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.network import NetworkTrouble
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.machine.system import Network

log = structlog.get_logger(__name__)

GATHER_S = 1.0
"""How long the file is left alone after a change of keys, for more of them. Arbitrary: nobody waits for it."""

AGAIN_S = 60.0
"""The pause after the file could not be written. Arbitrary, as above."""


async def withdraw(network: Network, owner: str, wanted: Set[str] = frozenset()) -> bool:
    """Take the owner's lines away that allow other bridges than these; False when that cannot be done."""
    try:
        gone = await asyncio.to_thread(network.withdraw_bridges, wanted, owner=owner)
    except NetworkTrouble as error:
        log.warning("bridge.not_withdrawn", reason=str(error))
        return False
    if gone:
        log.info("bridge.withdrawn", bridges=list(gone))
    return True


class Bridges:
    """Keeps the lines of one supervisor to the bridges that its instances want.

    Args:
        network: bridges of this host.
        me: this host.
        owner: as whom its lines are written.
        bridge_if: the bridge of NICs that name none.
        instances: those of this host; a live mapping.
        clock: the machine's.
    """

    def __init__(
        self,
        *,
        network: Network,
        me: HostName,
        owner: str,
        bridge_if: str | None,
        instances: Mapping[InstanceId, Worker],
        clock: Clock,
    ) -> None:
        self._network = network
        self._me = me
        self._owner = owner
        self._bridge_if = bridge_if
        self._instances = instances
        self._clock = clock
        self._changed = asyncio.Event()

    def heed(self) -> None:
        """Keys of instances differ, or one is this host's no more."""
        self._changed.set()

    async def run(self) -> Never:
        """Take away what nobody wants any more, whenever there may be something. Begins with the first `heed`."""
        wanted: set[str] | None = None
        while True:
            await self._changed.wait()
            await self._clock.sleep(GATHER_S)
            self._changed.clear()
            before, wanted = wanted, self._wanted()
            if before is not None and before <= wanted:
                continue
            if not await withdraw(self._network, self._owner, wanted):
                wanted = None
                await self._clock.sleep(AGAIN_S)
                self._changed.set()

    def _wanted(self) -> set[str]:
        """The bridges of all NICs that are to be here, whether their machines run or not, and of those that are."""
        found: set[str | None] = set()
        for instance in self._instances.values():
            wish = instance.wish
            if wish is not None and wish.spec is not None and wish.runs_on == self._me:
                found |= {nic.bridge or self._bridge_if for nic in wish.spec.bridged_nics}
            found |= {one.bridge for one in instance.plugs.attachments()}
        return {bridge for bridge in found if bridge is not None}
