"""The machine that an instance's keys describe, and the wish that it is part of: plain data.

`parse_keys.py` reads the keys; `argv.py` makes QEMU's command line of a `Spec`.
"""

from __future__ import annotations

import hashlib
from dataclasses import field, replace
from enum import Enum, StrEnum
from typing import Any, NamedTuple

from kvmsupervisor.domain import records
from kvmsupervisor.domain.cdrom import Cdrom
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.local_disk import FileDisk, size_text
from kvmsupervisor.domain.placement import NOT_PLACED, Ground, Placed, Placement
from kvmsupervisor.domain.snapshots import RollbackWish, SnapshotWish
from kvmsupervisor.domain.user_network import USER, Forward

DEFAULT_MACHINE = "q35"


class Power(StrEnum):
    """`power`: whether the machine is to run."""

    ON = "on"
    OFF = "off"


OFF_NOW = "off-now"
"""`power`: off, and without the guest's consent. An earlier release finds it invalid, and lets the guest run on."""


class Request(Enum):
    """What a `restart_request` asks for, by its text before the first colon (decision 0023)."""

    RESTART = "any other text"
    RESTART_NOW = "now"
    RESET = "reset"


class RestartPolicy(StrEnum):
    """`restart`: what follows when QEMU or the guest ends by itself."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Firmware(StrEnum):
    """`firmware` of the machine."""

    BIOS = "bios"
    UEFI = "uefi"


class Display(StrEnum):
    """`display`: the graphics device that the guest sees. All but `none` can be looked at in a browser."""

    NONE = "none"
    STD = "std"
    VIRTIO = "virtio"
    QXL = "qxl"


class HugePages(StrEnum):
    """`hugepages`: the size of the pages that the guest's memory is made of."""

    OFF = "off"
    M2 = "2M"
    G1 = "1G"


class RawValue(NamedTuple):
    """One key's value as etcd holds it, cut to `VALUE_LIMIT` + 1 bytes, and the revision that wrote it.

    A tuple, because a large cluster has 80,000: a frozen dataclass takes longer to make.
    """

    value: bytes
    mod_revision: int


@frozen
class Problem:
    """What is wrong with one key: `found` there, and what would be right."""

    key: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.key}: found {self.found}; {self.wanted}"


@frozen
class RbdDisk:
    """An RBD image as a disk of the machine.

    Attributes:
        pool: of the image.
        image: its name.
        ro: the guest cannot write to it.
        discard: what the guest discards is given back to the pool.
        iops: most requests per second, None for no limit.
        size: bytes that the disk has at least; None for those that it has.
        origin: what it begins with, an image of the library or a snapshot POOL/IMAGE@SNAP; None for an empty disk.
        namespace: of the pool; empty for the one without a name.
        copy: it is made a whole copy of what it begins with, and no clone.
    """

    pool: str
    image: str
    ro: bool = False
    discard: bool = False
    iops: int | None = None
    size: int | None = None
    origin: str | None = None
    namespace: str = ""
    copy: bool = False

    def __str__(self) -> str:
        options = (
            *((f"size={size_text(self.size)}",) if self.size is not None else ()),
            *((f"from={self.origin}",) if self.origin is not None else ()),
            *(("copy",) if self.copy else ()),
            *(("ro",) if self.ro else ()),
            *(("discard",) if self.discard else ()),
            *((f"iops={self.iops}",) if self.iops is not None else ()),
        )
        return " ".join((self.name, *options))

    @property
    def name(self) -> str:
        """The image as Ceph's tools name it."""
        return "/".join(filter(None, (self.pool, self.namespace, self.image)))

    @property
    def place(self) -> str:
        """Where it is, as Ceph's tools name it: the pool, and the namespace if it has a name."""
        return self.name.rpartition("/")[0]

    def beside(self, image: str) -> RbdDisk:
        """The image of another name in the same pool and namespace."""
        return RbdDisk(self.pool, image, namespace=self.namespace)

    @classmethod
    def named(cls, name: str) -> RbdDisk:
        """The image that Ceph's tools call so, `POOL[/NAMESPACE]/IMAGE`."""
        pool, *namespace, image = name.split("/")
        return cls(pool, image, namespace="".join(namespace))

    @property
    def title(self) -> str:
        """As the key names it."""
        return self.name

    @property
    def may_be_made(self) -> bool:
        """Whether it is made when it is missing."""
        return self.size is not None or self.origin is not None


FIRST_IMAGE = "rbd"
FIRST_DISK = "disk/0"
"""The keys of the first disk: of an image in Ceph alone, and of any disk."""


@frozen
class Disk:
    """One of the machine's disks: an image in Ceph, or a file of its host.

    Attributes:
        number: which; 0 is the first.
        rbd: the image, None when it is a file.
        file: the file, None when it is an image.
        key: that describes it, `disk/<n>`; the first one's may also be `rbd`.
    """

    number: int
    rbd: RbdDisk | None = None
    file: FileDisk | None = None
    key: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if (self.rbd is None) is (self.file is None):
            raise ValueError("a disk is an image or a file")
        if not self.key:
            object.__setattr__(self, "key", f"disk/{self.number}")

    @property
    def source(self) -> RbdDisk | FileDisk:
        """What it is."""
        found = self.file if self.rbd is None else self.rbd
        assert found is not None
        return found

    @property
    def name(self) -> str:
        """What it is, as keys and people name it: `POOL/IMAGE` or `file:NAME`."""
        return self.source.title

    @property
    def ro(self) -> bool:
        """Whether the guest cannot write to it."""
        return self.source.ro


@frozen
class Nic:
    """One of the machine's NICs: `number` 0 is the keys `mac` and `bridge`, n is `nic/<n>/…`.

    Attributes:
        number: which.
        mac: its address.
        bridge: what it is plugged into; None for the host's `BRIDGE_IF`, `USER` for QEMU's own network.
        down: whether its cable is pulled out, as the guest sees it.
    """

    number: int
    mac: str
    bridge: str | None = None
    down: bool = False

    @property
    def key(self) -> str:
        """What the names of its keys begin with."""
        return f"nic/{self.number}/" if self.number else ""


@frozen
class Secret:
    """Text that is shown nowhere. Two are equal when their texts are; a record keeps the digest alone.

    Attributes:
        digest: of the text.
        text: None when it was read back from a record.
    """

    digest: str
    text: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, text: str) -> Secret:
        """The secret that `text` is."""
        return cls(hashlib.sha256(text.encode()).hexdigest(), text)


@frozen(kw_only=True)
class Spec:
    """The machine that the keys describe. Only the keys that shape its process are here.

    Attributes:
        nics: those beyond the first, by number; `all_nics` has them all.
        forward: ports of the host that lead to the guest, of the first NIC when that is on QEMU's own network.
        rbd: the first disk, when it is an image in Ceph.
        rbd_key: the key that says so, of the two that can.
        disks: the others, by number; `all_disks` has them all.
        cdrom: its CD-ROM drive, None without one.
        display: as the key says; None without it, see `screen`.
        cloud_config: URL of the user data.
        user_data: the user data itself, instead.
        hugepages: None for ordinary pages.
        cpu_shares: weight of its CPU time among others, 1024 being ordinary.
        memory_limit_mib: most that QEMU may use for itself and its guest.
        link_down: `Nic.down` of the first NIC.
        ram_max_mib: up to which its memory may grow while it runs; None where it cannot.
        cpus_max: up to how many vCPUs it may get while it runs; None where it gets none.
        pluggable: whether it has a bus for disks and NICs also where it starts without any; not so for machines that an
            earlier release started.
        plugged_mib: how much of its memory it has got since it was started.
        plugged_cpus: likewise.
    """

    ram_mib: int
    mac: str | None = None
    bridge: str | None = None
    link_down: bool = False
    nics: tuple[Nic, ...] = ()
    forward: tuple[Forward, ...] = ()
    rbd: RbdDisk | None = None
    rbd_key: str = field(default=FIRST_IMAGE, compare=False)
    disks: tuple[Disk, ...] = ()
    cdrom: Cdrom | None = None
    display: Display | None = None
    spice_port: int | None = None
    spice_addr: str | None = None
    spice_password: Secret | None = None
    extra_flags: tuple[str, ...] = ()
    cloud_config: str | None = None
    user_data: Secret | None = None
    cpus: int = 1
    cpu: str | None = None
    machine: str = DEFAULT_MACHINE
    firmware: Firmware = Firmware.BIOS
    hugepages: HugePages | None = None
    cpu_shares: int | None = None
    memory_limit_mib: int | None = None
    ram_max_mib: int | None = None
    cpus_max: int | None = None
    pluggable: bool = field(default=False, compare=False)
    plugged_mib: int = field(default=0, compare=False)
    plugged_cpus: int = field(default=0, compare=False)

    @property
    def all_nics(self) -> tuple[Nic, ...]:
        """Every NIC, by number."""
        return self.nics if self.mac is None else (Nic(0, self.mac, self.bridge, self.link_down), *self.nics)

    @property
    def bridged_nics(self) -> tuple[Nic, ...]:
        """Those that have a tap on a bridge, by number."""
        return tuple(nic for nic in self.all_nics if nic.bridge != USER)

    @property
    def has_bus(self) -> bool:
        """Whether it has the bus on which disks and NICs beyond the first are."""
        return self.pluggable or bool(self.nics or self.disks)

    @property
    def has_user_data(self) -> bool:
        """Whether its guest gets user data, from a URL or a key."""
        return self.cloud_config is not None or self.user_data is not None

    @property
    def screen(self) -> Display:
        """The graphics device that it has."""
        return self.display or (Display.NONE if self.spice_port is None else Display.QXL)

    @property
    def all_disks(self) -> tuple[Disk, ...]:
        """Every disk, by number."""
        return self.disks if self.rbd is None else (Disk(0, self.rbd, key=self.rbd_key), *self.disks)

    @property
    def images(self) -> tuple[tuple[Disk, RbdDisk], ...]:
        """The disks that are images in Ceph, by number."""
        return tuple((disk, disk.rbd) for disk in self.all_disks if disk.rbd is not None)

    @property
    def files(self) -> tuple[tuple[Disk, FileDisk], ...]:
        """The disks that are files of the host, by number."""
        return tuple((disk, disk.file) for disk in self.all_disks if disk.file is not None)


@frozen(kw_only=True)
class Wish:
    """All that people want of one instance.

    Attributes:
        host: the value of `host`, or None without that key (or with one that is no host name).
        host_revision: `mod_revision` of the `host` key, 0 without one.
        hosts: those that may take it over by themselves, in order.
        power: None when the key is there and holds none of `on`, `off` and `off-now`.
        power_off_now: whether it is off without its guest's consent (`off-now`).
        power_revision: `mod_revision` of the `power` key, 0 without one.
        restart_request: the value of that key.
        shutdown_timeout_s: None for the host's default.
        priority: of several that wait, the greatest starts first.
        snapshots: that are to exist, or to be taken away.
        rollback: that is asked for; None without one.
        spec: the machine, or None when any key has a problem.
        problems: every problem of every key, in key order.
        revision: the newest `mod_revision` of all its keys: what "acted on" refers to.
        together: how many keys of that `mod_revision` there are: one transaction wrote them.
        keys: how many keys the instance has, the lock not counted; 0 when it was removed.
        by_keys: whether keys say all this; False for a command line, which no key of etcd is compared with.
        placed: its placement key.
    """

    instance: InstanceId
    host: str | None = None
    host_revision: int = 0
    hosts: tuple[str, ...] = ()
    power: Power | None = Power.ON
    power_off_now: bool = False
    power_revision: int = 0
    restart: RestartPolicy = RestartPolicy.ALWAYS
    restart_request: str | None = None
    shutdown_timeout_s: float | None = None
    priority: int = 0
    snapshots: tuple[SnapshotWish, ...] = ()
    rollback: RollbackWish | None = None
    spec: Spec | None = None
    problems: tuple[Problem, ...] = ()
    revision: int = 0
    together: int = 1
    keys: int = 0
    by_keys: bool = True
    placed: Placed = NOT_PLACED

    @property
    def request(self) -> Request:
        """What `restart_request` asks for."""
        kind = (self.restart_request or "").partition(":")[0]
        return {"now": Request.RESTART_NOW, "reset": Request.RESET}.get(kind, Request.RESTART)

    @property
    def placement(self) -> Placement | None:
        """The placement that stands in for `host`, or None."""
        placement = self.placed.placement
        return placement if placement is not None and placement.stands(self.host_revision) else None

    @property
    def runs_on(self) -> str | None:
        """The host where it is to run (law 10): `host`, or that of the placement that stands in for it."""
        placement = self.placement
        return self.host if placement is None else placement.host

    def is_elsewhere(self, me: str) -> bool:
        """Whether it is to run on another host than `me`. False with a damaged placement: not known then."""
        return self.runs_on not in {None, me} and not self.placed.is_damaged

    @property
    def stale_placement(self) -> int:
        """`mod_revision` of a placement that has ended; 0 without one."""
        ended = self.keys == 0 or (self.placement is None and not self.placed.is_damaged)
        return self.placed.revision if ended else 0

    @property
    def ground(self) -> Ground | None:
        """What a write of its lock compares (law 2); None where no key says that it runs here."""
        return Ground(self.host_revision, self.placed.revision) if self.by_keys else None


def spec_to_object(spec: Spec) -> dict[str, Any]:
    """`spec` as a JSON object, for the record of the running incarnation. It holds no secret."""
    shown = replace(spec, spice_password=_untold(spec.spice_password), user_data=_untold(spec.user_data))
    return records.plain(shown)


def _untold(secret: Secret | None) -> Secret | None:
    return None if secret is None else replace(secret, text=None)


def spec_from_object(found: object) -> Spec | None:
    """Read what `spec_to_object` wrote; None when it is not one (fields of a newer release are left out)."""
    try:
        return records.build(Spec, found)
    except records.Unfit:
        return None
