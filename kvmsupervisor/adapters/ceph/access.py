"""Who asks Ceph, and for which image, as words of its tools."""

from __future__ import annotations

from dataclasses import field

from kvmsupervisor.adapters.ceph.slots import Slots
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import LOCK_PLACEHOLDER
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.words import option


@frozen(kw_only=True)
class CephAccess:
    """How this host reaches its cluster.

    Attributes:
        user: the client's id, without `client.` (`KVM_SUPERVISOR_CEPH_ID`, or `CEPH_ID`).
        conf: path of ceph.conf (`CEPH_CONF`); None: where Ceph looks by itself.
        keyring: path of the client's keyring; None: where ceph.conf says.
        guests: the id of guests' clients, in which `%i` stands for the instance's (`CEPH_ID`); None: the same client.
        slots: for the tools that ask images, those of guests' clients included.
    """

    user: str = "admin"
    conf: str | None = None
    keyring: str | None = None
    guests: str | None = None
    slots: Slots = field(default_factory=Slots, compare=False, repr=False)

    @property
    def guests_apart(self) -> bool:
        """Whether guests are other clients than this one."""
        return self.guests not in {None, self.user}

    def of_guest(self, instance: str) -> CephAccess | None:
        """How the guest of an instance reaches the cluster; None where it does so as this client."""
        user = None if self.guests is None else self.guests.replace(LOCK_PLACEHOLDER, instance)
        if user in {None, self.user}:
            return None
        return CephAccess(user=user or "", conf=self.conf, slots=self.slots)

    @property
    def entity(self) -> str:
        """The client's full name."""
        return f"client.{self.user}"


def located(image: RbdDisk) -> tuple[str, ...]:
    """An image as options. In `POOL/IMAGE` an `@` or a second slash would have a meaning of its own."""
    return (*placed(image), option("--image", image.image))


def placed(image: RbdDisk) -> tuple[str, ...]:
    """The pool of an image, and its namespace, as options."""
    namespace = (option("--namespace", image.namespace),) if image.namespace else ()
    return (option("--pool", image.pool), *namespace)


def destined(image: RbdDisk) -> tuple[str, ...]:
    """An image that is to be created, as options."""
    namespace = (option("--dest-namespace", image.namespace),) if image.namespace else ()
    return (option("--dest-pool", image.pool), *namespace, option("--dest", image.image))
