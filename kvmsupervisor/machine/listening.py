"""The ports of this host on which QEMUs listen: those of displays, and those that lead into guests."""

from __future__ import annotations

from collections.abc import Iterator

from kvmsupervisor.adapters import ports
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import Spec
from kvmsupervisor.domain.user_network import overlap
from kvmsupervisor.machine.system import PortTrouble


class Taken(Exception):
    """A port cannot be listened on. The message says who has it, and what would be right."""


@frozen
class Server:
    """A port on which a QEMU listens.

    Attributes:
        key: that asks for it.
        address_key: the key, or the setting, that names the address.
        protocol: `tcp` or `udp`.
        address: of the host.
        port: likewise.
    """

    key: str
    address_key: str
    protocol: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.protocol.upper()} port {self.port} on {self.address}"

    def clashes(self, other: Server) -> bool:
        """Whether not both can be listened on."""
        return overlap((self.protocol, self.address, self.port), (other.protocol, other.address, other.port))


class Listening:
    """Who listens where.

    Args:
        trouble_with: tells why nobody can listen at an address and a port.
        spice_addr: where displays without `spice_addr` listen.
    """

    def __init__(self, trouble_with: PortTrouble, *, spice_addr: str) -> None:
        self._trouble_with = trouble_with
        self._spice_addr = spice_addr
        # Invariant: the ports of all QEMUs that live on this host or are being started.
        self._servers: dict[InstanceId, tuple[Server, ...]] = {}

    def arrived(self, instance: InstanceId, spec: Spec) -> None:
        """Note that a QEMU of this machine lives on this host or is being started."""
        self._servers[instance] = tuple(self._of(spec))

    def left(self, instance: InstanceId) -> None:
        """Note that the QEMU is proven gone."""
        self._servers.pop(instance, None)

    def check(self, instance: InstanceId, spec: Spec) -> None:
        """See that every port of this machine can be listened on.

        Raises:
            Taken: one cannot, because of another instance, of this one, or of another program.
        """
        wanted = tuple(self._of(spec))
        for place, server in enumerate(wanted):
            for other in wanted[:place]:
                if server.clashes(other):
                    raise Taken(f"{server.key}: {server} is that of its {other.key}, too; change one of the two keys")
            for other_id, others in self._servers.items():
                for other in others:
                    if other_id != instance and server.clashes(other):
                        raise Taken(
                            f"{server.key}: {server} belongs to instance {other_id} (its {other.key}), and {instance} "
                            "wants it, too; give one of the two another port"
                        )
            self._look(server)

    def _look(self, server: Server) -> None:
        trouble = self._trouble_with(server.address, server.port, server.protocol)
        if trouble is None:
            return
        if trouble == ports.TAKEN:
            raise Taken(
                f"{server.key}: {server} cannot be used: {trouble}; give the instance another port, or end that program"
            )
        raise Taken(
            f"{server.address_key}: {server.address} cannot be listened on ({trouble}): use an address of this host, "
            "such as 127.0.0.1, or 0.0.0.0 for all addresses"
        )

    def _of(self, spec: Spec) -> Iterator[Server]:
        if spec.spice_port is not None:
            address_key = "SPICE_ADDR" if spec.spice_addr is None else "spice_addr"
            yield Server("spice_port", address_key, "tcp", spec.spice_addr or self._spice_addr, spec.spice_port)
        for one in spec.forward:
            yield Server("forward", "forward", one.protocol, one.address, one.port)
