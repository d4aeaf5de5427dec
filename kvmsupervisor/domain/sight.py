"""What one QEMU needs of its host beside what it inherits open: which paths it sees, and whether it needs the network.

Programs and libraries are seen by every QEMU; this is what depends on the machine. Whatever is not named here does not
exist for the QEMU (docs/decisions/0030-an-empty-room.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.hardware import Ovmf
from kvmsupervisor.domain.spec import Firmware, Spec
from kvmsupervisor.domain.storage import nvram_of
from kvmsupervisor.domain.user_network import USER

CEPH_CONF = "/etc/ceph/ceph.conf"
"""Where librbd looks for its configuration by itself."""

NAME_FILES = ("/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/gai.conf")
"""What glibc finds addresses by, for a QEMU that has the network (nsswitch.conf(5))."""

_NEEDS = {
    "vfio": ("/dev/vfio", "/sys"),
    "usb-host": ("/dev/bus/usb", "/sys", "/run/udev"),
    "pty": ("/dev/ptmx", "/dev/pts"),
    "snapshot": ("/var/tmp",),  # noqa: S108 - where QEMU itself makes such a file
    "tap": ("/dev/net/tun",),
    "vhost-vsock": ("/dev/vhost-vsock",),
    "gl=on": ("/dev/dri", "/sys"),
}
"""What options need that do not name it, by a word in them."""

_FREE_TEXT = frozenset({"append", "name", "smbios", "msg", "uuid", "k"})
"""Options whose argument is text for the guest or for people: no path in it is one of the host."""

_LOCAL = frozenset(
    {
        *("S", "enable-kvm", "no-reboot", "no-shutdown", "no-acpi", "no-hpet", "usb", "snapshot"),
        *("M", "accel", "action", "boot", "cpu", "device", "fw_cfg", "global", "m", "machine", "numa", "object"),
        *("overcommit", "rtc", "smp", "vga", "watchdog-action", "bios", "cdrom", "drive", "hda", "hdb", "hdc", "hdd"),
        *("initrd", "kernel", "dtb", "parallel", "serial", "debugcon", *_FREE_TEXT),
    }
)
"""Options that need no network, whatever their argument is, unless that names a protocol."""

_LOCAL_DRIVERS = frozenset({"file", "raw", "qcow2", "host_device", "null-co", "null-aio", "throttle"})


@frozen(kw_only=True)
class Sight:
    """What one QEMU needs to see.

    Attributes:
        files: paths that it reads.
        writable: paths that it may write to, as far as their own modes let its user.
        needs_network: whether it needs the host's network.
        listens: the TCP ports that it listens on; None where that is not known.
        connects: whether it may have to connect to a server.
    """

    files: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    needs_network: bool = True
    listens: tuple[int, ...] | None = None
    connects: bool = True


def sight_of(spec: Spec, *, accel: str, ceph_conf: str | None, ovmf: Ovmf | None) -> Sight:
    """What a QEMU of this machine needs to see."""
    images = spec.images or nvram_of(spec) is not None
    is_local = all(_is_local(option, argument) for option, argument in _options(spec.extra_flags))
    is_user_network = any(nic.bridge == USER for nic in spec.all_nics)
    needs_network = bool(images) or spec.spice_port is not None or is_user_network or not is_local
    forwarded = (one.port for one in spec.forward if one.protocol == "tcp")
    named = tuple(dict.fromkeys(_named(spec.extra_flags)))
    return Sight(
        files=(
            *((ceph_conf or CEPH_CONF,) if images else ()),
            *(NAME_FILES if needs_network else ()),
            *((ovmf.code,) if spec.firmware is Firmware.UEFI and ovmf is not None else ()),
        ),
        writable=(*(("/dev/kvm",) if accel == "kvm" else ()), *named),
        needs_network=needs_network,
        listens=tuple(filter(None, [spec.spice_port, *forwarded])) if is_local else None,
        connects=bool(images) or is_user_network or not is_local,
    )


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option of QEMU with its argument; a word without a hyphen is a disk image, as QEMU takes it."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            yield "hda", word
            continue
        has_argument = bool(rest) and not rest[0].startswith("-")
        yield word[1:].removeprefix("-"), rest.pop(0) if has_argument else ""


def _named(words: Sequence[str]) -> Iterator[str]:
    """The paths that `extra_flags` name, and those that their options need."""
    for option, argument in _options(words):
        if option in _FREE_TEXT:
            continue
        for text in _texts(argument):
            if text.startswith("/"):
                yield text
        for word, paths in _NEEDS.items():
            if word in option or word in argument:
                yield from paths


def _texts(argument: str) -> Iterator[str]:
    """The values in an argument: of JSON all texts, otherwise what stands between commas, behind `=` and behind `:`."""
    if argument.startswith("{"):
        yield from (value for _, value in _members(argument))
        return
    # QEMU reads two commas as one comma in a value.
    for part in argument.replace(",,", "\0").split(","):
        value = part.replace("\0", ",")
        value = value.partition("=")[2] or value
        yield value
        # As in unix:/run/x and file:/srv/x.
        yield value.partition(":")[2]


def _is_local(option: str, argument: str) -> bool:
    """Whether that option certainly needs no network."""
    if option in _FREE_TEXT:
        return True
    if argument.startswith("{"):
        return option == "device" or (option == "blockdev" and _drivers(argument) <= _LOCAL_DRIVERS)
    if option not in _LOCAL or not _driver_is_local(argument):
        return False
    values = [text for text in _texts(argument) if ":" in text]
    return all(text.startswith(("/", "file:")) or option in {"device", "global", "rtc", "fw_cfg"} for text in values)


def _driver_is_local(argument: str) -> bool:
    """Whether an argument with `driver=`, or `file.driver=`, names one for files and devices of this host."""
    pairs = (part.partition("=") for part in argument.split(","))
    return all(value in _LOCAL_DRIVERS for name, _, value in pairs if name.rpartition(".")[2] == "driver")


def _drivers(argument: str) -> set[str]:
    """The drivers that a JSON argument names; one that is no JSON may be anything."""
    return {value for key, value in _members(argument) if key == "driver"} or {"?"}


def _members(argument: str) -> Iterator[tuple[str, str]]:
    """All texts in a JSON argument, each with the name of its member."""
    try:
        found: list[tuple[str, object]] = [("", json.loads(argument))]
    except ValueError:
        return
    while found:
        name, one = found.pop()
        if isinstance(one, dict):
            found += one.items()
        elif isinstance(one, list):
            found += [(name, item) for item in one]
        elif isinstance(one, str):
            yield name, one
