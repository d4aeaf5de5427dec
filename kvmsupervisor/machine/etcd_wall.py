"""Keeps QEMUs of this host from etcd, the supervisor's page and that of the cluster, by the host's packet filter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.packet_rule import NoRule
from kvmsupervisor.adapters.users import QemuUsers
from kvmsupervisor.aio import Part
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.config.values import EtcdWallKind

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 60.0
"""How often to look whether the rule is still there: who loads the host's own rules anew may take all away unseen."""

ETCD, ETCD_PEERS = 2379, 2380
"""As IANA has them. Where clients come in at the first one, members mostly speak to each other at the second one."""

FIRST_OWN = 1024
"""Below it are ports that a guest's own network needs, too, such as that of HTTPS."""


class Rule(Protocol):
    """See `PacketRule`."""

    async def keep(self) -> bool:
        """Make the rule, unless it is there; whether it had to be made."""
        ...


def ports_of(settings: Settings) -> tuple[frozenset[int], frozenset[int]]:
    """The ports that QEMUs are kept from, and those from which they cannot be."""
    ports = {urlsplit(url).port or ETCD for url in settings.etcd_endpoints}
    if ETCD in ports:
        ports.add(ETCD_PEERS)
    if settings.listen is not None and settings.listen.port:
        ports.add(settings.listen.port)
    # Also where `web` does not run: what a host's settings say of it is all that is known here.
    if settings.web_listen.port:
        ports.add(settings.web_listen.port)
    shared = frozenset(port for port in ports if port < FIRST_OWN)
    return frozenset(ports) - shared, shared


def etcd_wall(
    settings: Settings, who: QemuUsers, make: Callable[[int, int, Iterable[int]], Rule] | None, clock: Clock
) -> EtcdWall:
    """The wall of this host. There is none where QEMUs have no users that nobody else has.

    Args:
        settings: of this host.
        who: QEMUs run as.
        make: makes the rule for users, first to last, and ports; None where nothing may be done to the host's filter.
        clock: the machine's.
    """
    ports, shared = ports_of(settings)
    wanted = settings.etcd_wall is EtcdWallKind.AUTO and who.uids is not None and ports
    rule = make(who.uids.first, who.uids.last, ports) if wanted and make is not None and who.uids is not None else None
    return EtcdWall(rule, shared, clock)


class EtcdWall:
    """That wall.

    Args:
        rule: what it is made of; None where there shall be none.
        shared: the ports that it leaves open.
        clock: the machine's.

    Attributes:
        stands: whether it does.
        gap: why it does not although it should; None as long as nothing is known against it.
    """

    def __init__(self, rule: Rule | None, shared: frozenset[int], clock: Clock) -> None:
        self._rule, self._shared, self._clock = rule, shared, clock
        self._listeners: list[Callable[[], None]] = []
        self.stands = False
        self.gap: str | None = None

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever `gap` has changed; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What keeps it for as long as the supervisor lives; nothing where there is none. It stays afterwards."""
        return () if self._rule is None else (partial(self._run, self._rule),)

    async def _run(self, rule: Rule) -> None:
        while True:
            try:
                made = await rule.keep()
            except NoRule as error:
                self._say(str(error))
            else:
                if made and self.stands:
                    log.warning("etcd_wall.made_again", reason="somebody took it away")
                at = ", ".join(map(str, sorted(self._shared)))
                self._say(f"etcd is at port {at}, which guests' own networks need" if self._shared else None)
            await self._clock.sleep(LOOK_EVERY_S)

    def _say(self, gap: str | None) -> None:
        self.stands = gap is None
        if gap == self.gap:
            return
        self.gap = gap
        if gap is not None:
            log.warning("qemu.wall_missing", wall="etcd", reason=gap)
        for listener in self._listeners:
            listener()
