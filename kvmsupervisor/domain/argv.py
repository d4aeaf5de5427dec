"""QEMU's command line, made of the wish, the host's choices and what was made ready.

The devices that the wishes describe are in `hardware.py`. Source: qemu-system-x86_64(1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal
from uuid import UUID, uuid5

from kvmsupervisor.domain import hardware
from kvmsupervisor.domain.flags import ANY_FLAGS, AllowedFlags
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.hardware import OWN_DEFAULTS, Ceph, Handed, Nvram, Ovmf, TapFds
from kvmsupervisor.domain.keys import LOCK_PLACEHOLDER, InstanceId
from kvmsupervisor.domain.names import CONSOLE_LOG
from kvmsupervisor.domain.spec import Firmware, Problem, Spec
from kvmsupervisor.domain.user_network import USER
from kvmsupervisor.domain.words import escaped, json_option

UUID_NAMESPACE = UUID("b108c36d-2985-4a5f-9c7a-3d69497d770a")
"""Drawn once. It must never change: guests, and licences in them, identify the machine by its uuid."""

AGENT_PORT = "agent0"
"""Name of the guest agent's channel, both of the device (in QMP events) and of its chardev (in `query-chardev`)."""

LOG_SET = 97469746
"""Number of the set of open files that holds the console's log. Arbitrary: unlikely in `extra_flags`."""

_LOG_SET = f"set={LOG_SET}"

IGNITION_NAME = "opt/com.coreos/config"
"""Where Ignition looks for its configuration: a file of QEMU's fw_cfg device
(https://coreos.github.io/ignition/supported-platforms/)."""

NETWORK_FLAG = "netdev"
"""The option by which `extra_flags` may give a machine QEMU's own network, and whatever listens on the host's loopback:
`bridge=:user` is allowed where that is."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""Everything that QEMU's seccomp filter can deny: it never starts a program, nor gains a privilege."""


@frozen(kw_only=True)
class Identity:
    """The identity of a machine.

    Attributes:
        instance: its id.
        uuid: `instance_uuid` of it.
    """

    instance: InstanceId
    uuid: UUID


@frozen(kw_only=True)
class HostSide:
    """What the host chooses, for every machine on it.

    Attributes:
        qemu: QEMU's program, a name or a path.
        accel: the accelerator to use.
        sandbox: whether QEMU is confined by seccomp.
        bridge_if: bridge of NICs without `bridge`, or None.
        spice_addr: where SPICE servers without `spice_addr` listen.
        flags: which options `extra_flags` may hold.
        ovmf: the firmware of `firmware=uefi`, None when the host has none.
        ceph: how QEMU reaches Ceph.
        memory_mib: of the host, beyond which no guest is made ready to grow; None where that is not known.
    """

    qemu: str
    accel: Literal["kvm", "tcg"]
    sandbox: bool = True
    bridge_if: str | None = None
    spice_addr: str = "127.0.0.1"
    flags: AllowedFlags = ANY_FLAGS
    ovmf: Ovmf | None = None
    ceph: Ceph = OWN_DEFAULTS
    memory_mib: int | None = None


@frozen(kw_only=True)
class Channels:
    """Listening sockets that QEMU inherits, under the same numbers.

    Attributes:
        qmp: the supervisor's own.
        spare: QMP for its successor and for people.
        console: of the serial console.
        agent: of the guest agent.
        console_log: no socket: the log of the console, open for writing only.
    """

    qmp: int
    spare: int
    console: int
    agent: int
    console_log: int


@frozen(kw_only=True)
class Provision:
    """What was made ready on the host for one QEMU process.

    Attributes:
        run_dir: the instance's own run directory, an absolute path without a slash at its end.
        channels: sockets that listen already, so that connecting needs no waiting for QEMU.
        machine: the versioned machine type for the wish's `machine`; None: QEMU chooses.
        taps: of the NICs that are on a bridge, in their order.
        media: the read-only media for the guest's first boot, open for reading.
        ignition: descriptor of the Ignition configuration.
        files: descriptors of its disks that are files of the host, in their order.
        cdrom: the medium in its CD-ROM drive; None for an empty one, or none.
        nvram: where the UEFI variables are.
        spice_password: descriptor of the file that holds the SPICE password.
        ceph_key: descriptor of the file that holds the key to Ceph; None for the keyring that ceph.conf names.
    """

    run_dir: str
    channels: Channels
    machine: str | None = None
    taps: tuple[TapFds, ...] = ()
    files: tuple[int, ...] = ()
    media: tuple[Handed, ...] = ()
    ignition: int | None = None
    cdrom: Handed | None = None
    nvram: Nvram | None = None
    spice_password: int | None = None
    ceph_key: int | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All that QEMU inherits."""
        channels = self.channels
        vhost = (tap.vhost_fd for tap in self.taps if tap.vhost_fd is not None)
        fixed = (channels.qmp, channels.spare, channels.console, channels.agent, channels.console_log)
        variables = None if self.nvram is None or self.nvram.file is None else self.nvram.file.fd
        medium = None if self.cdrom is None else self.cdrom.fd
        single = (variables, medium, self.ignition, self.spice_password, self.ceph_key)
        files = (*self.files, *(medium.fd for medium in self.media), *(fd for fd in single if fd is not None))
        return (*fixed, *(tap.fd for tap in self.taps), *vhost, *files)


def logs_into_memory(argv: Sequence[str]) -> bool:
    """Whether a QEMU with that command line has its logs as open files; an earlier release's opens them itself."""
    return any(option == "-add-fd" and _LOG_SET in value.split(",") for option, value in pairwise(argv))


def instance_uuid(prefix: str, instance: InstanceId) -> UUID:
    """The machine's uuid. Prefix and id determine it, on every host."""
    return uuid5(UUID_NAMESPACE, f"{prefix}/{instance}")


def host_problems(spec: Spec, host: HostSide) -> tuple[Problem, ...]:
    """What this host lacks for a sound wish, or forbids. Empty ⇔ `build_argv` can be called."""
    return tuple(_host_problems(spec, host))


def _host_problems(spec: Spec, host: HostSide) -> Iterator[Problem]:
    for nic in spec.all_nics:
        if nic.bridge is None and host.bridge_if is None:
            wanted = f"say which bridge its NIC is on, here or in this host's BRIDGE_IF, or delete the key {nic.key}mac"
            yield Problem(f"{nic.key}bridge", "nothing", wanted)
    if spec.firmware is Firmware.UEFI and host.ovmf is None:
        wanted = "install OVMF there (Debian's package ovmf), or say where it is by KVM_OVMF_CODE and KVM_OVMF_VARS"
        yield Problem("firmware", "'uefi', and this host has no UEFI firmware", wanted)
    yield from host.flags.problems(spec.extra_flags)
    for nic in spec.all_nics:
        if nic.bridge == USER and not host.flags.allow(NETWORK_FLAG):
            found = f"{USER!r}, by which a guest reaches what listens on this host's loopback"
            wanted = (
                f"name a bridge: this host's KVM_EXTRA_FLAGS {host.flags.said}, and {USER} needs {NETWORK_FLAG} there"
            )
            yield Problem(f"{nic.key}bridge", found, wanted)


def build_argv(spec: Spec, *, identity: Identity, host: HostSide, provision: Provision) -> tuple[str, ...]:
    """The whole command line, the program first.

    QEMU starts paused (`-S`): the guest runs when the supervisor says `cont`. Precondition: `host_problems` is empty,
    and everything was made ready, such as one tap for each NIC on a bridge.
    """
    ceph = ceph_of(host, identity.instance, provision.ceph_key)
    return (
        host.qemu,
        *("-nodefaults", "-no-user-config", "-S"),
        *(("-sandbox", SANDBOX) if host.sandbox else ()),
        *("-name", f"guest={escaped(identity.instance)},debug-threads=on"),
        *("-uuid", str(identity.uuid)),
        *(hardware.ceph_key(ceph) if spec.images else ()),
        *_machine(spec, host, ceph, provision),
        # Commas separate the features of a CPU, so they are not doubled.
        *("-cpu", spec.cpu or ("host" if host.accel == "kvm" else "max")),
        *hardware.memory(spec, host.memory_mib, is_emulated=host.accel == "tcg"),
        *hardware.processors(spec),
        *_monitors(provision),
        *_channels(provision),
        *hardware.common(),
        *hardware.bridge(spec),
        *hardware.nics(spec, provision.taps),
        *hardware.disks(spec, ceph, provision.files),
        *hardware.media(spec, provision.media),
        *hardware.cdrom(spec, provision.machine or spec.machine, provision.cdrom),
        *_ignition(provision.ignition),
        *hardware.display(spec, host.spice_addr, provision.spice_password),
        *spec.extra_flags,
    )


def ceph_of(host: HostSide, instance: InstanceId, key: int | None) -> Ceph:
    """How the QEMU of an instance reaches Ceph; `key` as in `Provision`."""
    user = None if host.ceph.user is None else host.ceph.user.replace(LOCK_PLACEHOLDER, instance)
    return replace(host.ceph, user=user, key=key)


def _machine(spec: Spec, host: HostSide, ceph: Ceph, provision: Provision) -> Iterator[str]:
    """The machine type with its parts: memory of huge pages, and flash memory with the firmware."""
    options = [escaped(provision.machine or spec.machine), f"accel={host.accel}"]
    if spec.hugepages is not None:
        options.append("memory-backend=ram0")
        yield from ("-object", json_option(hardware.huge_memory(spec)))
    if provision.nvram is not None:
        assert host.ovmf is not None
        options += ["pflash0=firmware", "pflash1=nvram"]
        yield from hardware.flash(host.ovmf, provision.nvram, ceph)
    yield from ("-machine", ",".join(options))


def _monitors(provision: Provision) -> Iterator[str]:
    """Two QMP monitors."""
    for number, fd in enumerate((provision.channels.qmp, provision.channels.spare)):
        yield from ("-chardev", f"socket,id=qmp{number},fd={fd},server=on,wait=off")
        yield from ("-mon", f"chardev=qmp{number},mode=control")


def _channels(provision: Provision) -> Iterator[str]:
    """The serial console, which is also logged, and the channel of the guest agent.

    QEMU opens a log by name, so it gets a name that stands for an open file. Without append, QEMU would truncate it.
    """
    name = f"{escaped(provision.run_dir)}/{CONSOLE_LOG}"
    yield from ("-add-fd", f"fd={provision.channels.console_log},{_LOG_SET},opaque={name}")
    log = f"logfile=/dev/fdset/{LOG_SET},logappend=on"
    yield from ("-chardev", f"socket,id=serial0,fd={provision.channels.console},server=on,wait=off,{log}")
    yield from ("-serial", "chardev:serial0")
    yield from ("-chardev", f"socket,id=agent0,fd={provision.channels.agent},server=on,wait=off")


def _ignition(fd: int | None) -> Iterator[str]:
    if fd is not None:
        yield from ("-fw_cfg", f"name={IGNITION_NAME},file={hardware.inherited(fd)}")
