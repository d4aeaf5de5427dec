"""Where guests of other hosts come in: the one address on which a supervisor listens for live moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from kvmsupervisor.adapters.cpu import processor
from kvmsupervisor.cluster.hosts import Neighbours
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.config.values import MigrationKind
from kvmsupervisor.domain.argv import HostSide
from kvmsupervisor.domain.keys import InstanceId, parse_id
from kvmsupervisor.domain.offer import PROTOCOL, MoveFacts
from kvmsupervisor.instance.context import Few, Moving
from kvmsupervisor.instance.worker import Worker
from kvmsupervisor.machine.system import Connection, Transfers

log = structlog.get_logger(__name__)


class Gate:
    """Takes the connections of sources to the instances that they are about.

    Args:
        settings: of this host; `migration_listen` is not None.
        host_side: what it chooses for every QEMU.
        neighbours: the sessions of all hosts.
        instances: those of this host.
        transfers: listens.
        version_of: tells the version of a QEMU.

    Raises:
        OSError: it cannot be listened there.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        host_side: HostSide,
        neighbours: Neighbours,
        instances: Mapping[InstanceId, Worker],
        transfers: Transfers,
        version_of: Callable[[str], str],
    ) -> None:
        wanted = settings.migration_listen
        assert wanted is not None
        self._instances = instances
        self._listener = transfers.listen(wanted.host, wanted.port, key_of=self._key_of, on_call=self._on_call)
        host = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
        self.moving = Moving(
            facts=facts(host_side, f"{host}:{self._listener.port}", version_of=version_of),
            facts_of=neighbours.moves_of,
            only_cold=settings.migration is MigrationKind.COLD,
            only_live=settings.migration is MigrationKind.LIVE,
            bandwidth=settings.migration_bandwidth_mib << 20,
            leaving=Few(settings.migration_parallel),
            coming=Few(settings.migration_parallel),
        )

    async def run(self) -> None:
        """Take them, for ever."""
        await self._listener.run()

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()

    def _worker(self, instance: str) -> Worker | None:
        name = parse_id(instance)
        return None if name is None else self._instances.get(name)

    def _key_of(self, instance: str) -> bytes | None:
        """Called in a thread: it only looks something up."""
        worker = self._worker(instance)
        return None if worker is None else worker.moves.arrival.key

    def _on_call(self, connection: Connection) -> None:
        worker = self._worker(connection.instance)
        if worker is None:
            connection.close()
        else:
            worker.moves.arrival.called(connection)


def open_gate(
    settings: Settings,
    host_side: HostSide,
    neighbours: Neighbours,
    instances: Mapping[InstanceId, Worker],
    *,
    transfers: Transfers,
    version_of: Callable[[str], str],
) -> Gate | None:
    """The gate of a host; None where `KVM_MIGRATION_LISTEN` is off. An address that cannot be had stops no guest."""
    if settings.migration_listen is None:
        return None
    try:
        gate = Gate(
            settings,
            host_side=host_side,
            neighbours=neighbours,
            instances=instances,
            transfers=transfers,
            version_of=version_of,
        )
    except OSError as error:
        wanted = f"{settings.migration_listen.host}:{settings.migration_listen.port}"
        why = f"KVM_MIGRATION_LISTEN={wanted}: {error.strerror or error}; machines move cold until that is mended"
    else:
        return gate
    log.error("migration.not_listening", reason=why)
    return None


def facts(side: HostSide, address: str, *, version_of: Callable[[str], str]) -> MoveFacts:
    """What this host's session says for live moves."""
    vendor, flags = processor() if side.accel == "kvm" else ("", ())
    return MoveFacts(
        protocol=PROTOCOL,
        address=address,
        accel=side.accel,
        qemu=version_of(side.qemu),
        cpu=vendor,
        flags=flags,
        firmware=() if side.ovmf is None else _sizes(side.ovmf.code, side.ovmf.variables),
    )


def _sizes(*files: str) -> tuple[int, ...]:
    try:
        return tuple(Path(file).stat().st_size for file in files)
    except OSError:
        return ()
