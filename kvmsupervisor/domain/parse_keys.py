"""Wishes: what people write below `/kvm/<id>/`, parsed purely.

`parse_wish` never raises: any keys in etcd become a `Wish`, with every problem named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

from kvmsupervisor.domain import snapshots, values
from kvmsupervisor.domain.cdrom import cdrom
from kvmsupervisor.domain.disk_values import any_disk, rbd_disk
from kvmsupervisor.domain.keys import ID_PATTERN, InstanceId
from kvmsupervisor.domain.local_disk import FileDisk
from kvmsupervisor.domain.media import NotUserData, media_url, shown_url, user_data
from kvmsupervisor.domain.names import ANY_HOST, FREE_KEY, FREE_KEY_PREFIX, WISH_KEYS
from kvmsupervisor.domain.placement import NOT_PLACED, Placed
from kvmsupervisor.domain.secrecy import HIDDEN, cleaned, cleaned_flags, names_a_secret
from kvmsupervisor.domain.snapshots import RollbackWish, SnapshotWish
from kvmsupervisor.domain.spec import (
    DEFAULT_MACHINE,
    FIRST_DISK,
    FIRST_IMAGE,
    OFF_NOW,
    Disk,
    Display,
    Firmware,
    HugePages,
    Nic,
    Power,
    Problem,
    RawValue,
    RbdDisk,
    RestartPolicy,
    Secret,
    Spec,
    Wish,
)
from kvmsupervisor.domain.suggestions import suggest_wish
from kvmsupervisor.domain.user_network import USER, bridge_name, forwards
from kvmsupervisor.domain.values import SHOWN_LENGTH, Unfit, show, show_bytes, some, strange

VALUE_LIMIT = 65_536
"""Most bytes of a value; a longer one is a problem. Arbitrary: no wish needs a tenth of it."""

NICS = 8
DISKS = 16
"""How many NICs and disks a machine may have, the first included: that many PCI slots are kept for them (`argv.py`)."""

NUMBERED_KEYS = ("nic/<n>/mac", "nic/<n>/bridge", "nic/<n>/link", "disk/<n>", "snapshot/<name>")
"""The names of the wishes that a machine may have several of: NICs counting from 1, disks from 0."""

ALL_NUMBERED_KEYS = (
    *(f"nic/{number}/{part}" for number in range(1, NICS) for part in ("mac", "bridge", "link")),
    *(f"disk/{number}" for number in range(DISKS)),
)
"""Every name that those can have."""

SECRET_KEYS = frozenset({"spice_password", "user-data"})
"""Keys whose values are shown nowhere."""

CANDIDATES = 16
"""Most hosts in `hosts`. Arbitrary: the last of them waits for more than a minute."""

UNKNOWN_KEYS_NAMED = 20
"""Unknown keys that the problem names; the others are counted. Arbitrary: they still fit on a screen."""

RESTART_REQUEST_LENGTH = 256
"""Characters of a `restart_request`, which is kept in the run directory. Arbitrary: a date or uuid fits."""

SPICE_PASSWORD_LENGTH = 60
"""Characters of a SPICE password: `SPICE_MAX_PASSWORD_LENGTH` of the protocol (spice/protocol.h)."""

RESERVED_FLAGS = {
    "daemonize": "the supervisor starts QEMU as a child that stays",
    "incoming": "a migration is the supervisor's to begin",
    "preconfig": "the supervisor sets QEMU up by its arguments alone",
    "uuid": "the uuid is made of prefix and id, and a running QEMU is recognised by it",
}
"""QEMU options that `extra_flags` may not hold, and why: they would break the supervision of QEMU."""


_A_PLACEMENT = (
    "JSON with host, why, since, of, as supervisors write it; delete that key, and `host` alone says where it runs"
)


def parse_wish(instance: InstanceId, keys: Mapping[bytes, RawValue], placed: Placed = NOT_PLACED) -> Wish:
    """Parse the keys of one instance. Never raises, whatever the bytes are.

    A sound key counts even where another is bad: `power=off` beside a bad `ram` stops the machine.

    Args:
        instance: whose keys they are.
        keys: what follows `/kvm/<id>/` in each key, as bytes (it may be anything, slashes included), with
            its value. The lock is not among them.
        placed: its placement key. A damaged one is a problem, so that nothing starts.
    """
    if not keys:
        return Wish(instance=instance, placed=placed)
    reader = _Reader(keys)
    host = reader.read("host", values.host_name, None)
    hosts = reader.read("hosts", _hosts, ())
    power, off_now = reader.read("power", _power, (Power.ON, False))
    restart = reader.read("restart", _restart, RestartPolicy.ALWAYS)
    restart_request = reader.read("restart_request", _restart_request, None)
    shutdown_timeout_s = reader.read("shutdown_timeout", _shutdown_timeout_s, None)
    priority = reader.read("priority", _priority, 0)
    rollback = reader.read(snapshots.ROLLBACK, snapshots.rollback_request, None)
    wished = reader.snapshots()
    rbd, rbd_key, disks = reader.disks()
    spec = Spec(
        ram_mib=reader.read("ram", values.ram_mib, 0),
        mac=reader.read("mac", values.mac_address, None),
        bridge=reader.read("bridge", bridge_name, None),
        link_down=reader.read("link", _link_down, False),
        forward=reader.read("forward", forwards, ()),
        nics=reader.nics(),
        rbd=rbd,
        rbd_key=rbd_key,
        disks=disks,
        cdrom=reader.read("cdrom", cdrom, None),
        display=reader.read("display", _display, None),
        spice_port=reader.read("spice_port", _spice_port, None),
        spice_addr=reader.read("spice_addr", values.ip_address, None),
        spice_password=reader.read("spice_password", _spice_password, None),
        extra_flags=reader.read("extra_flags", _extra_flags, ()),
        cloud_config=reader.read("cloud-config", _cloud_config, None),
        user_data=reader.read("user-data", _user_data, None),
        cpus=reader.read("cpus", _cpus, 1),
        cpu=reader.read("cpu", _cpu, None),
        machine=reader.read("machine", _machine, DEFAULT_MACHINE),
        firmware=reader.read("firmware", _firmware, Firmware.BIOS),
        hugepages=reader.read("hugepages", _hugepages, None),
        cpu_shares=reader.read("cpu_shares", _cpu_shares, None),
        memory_limit_mib=reader.read("memory_limit", values.ram_mib, None),
        ram_max_mib=reader.read("ram_max", values.ram_mib, None),
        cpus_max=reader.read("cpus_max", _cpus, None),
        pluggable=True,
    )
    reader.require("ram", "how much memory the machine has, such as 2048 (MiB) or 2G")
    reader.unique(((nic.key + "mac", nic.mac) for nic in spec.all_nics), "each NIC has a MAC address of its own")
    reader.unique(((disk.key, disk.name) for disk in spec.all_disks), "each disk is another image or file")
    reader.limits(spec)
    reader.one_of("user-data", "cloud-config", "they are both its user data: delete one of the two keys")
    reader.user_network(spec)
    reader.screen(spec)
    if placed.is_damaged:
        reader.problems["placement"] = Problem("placement", "what cannot be read, or is not of this etcd", _A_PLACEMENT)
    problems = reader.all_problems()
    revisions = [raw.mod_revision for raw in keys.values()]
    newest = max(revisions)
    return Wish(
        instance=instance,
        host=host,
        host_revision=reader.revision("host"),
        hosts=hosts,
        power=None if "power" in reader.problems else power,
        power_off_now=off_now,
        power_revision=reader.revision("power"),
        restart=restart,
        restart_request=restart_request,
        shutdown_timeout_s=shutdown_timeout_s,
        priority=priority,
        snapshots=wished,
        rollback=reader.rollback(rollback),
        spec=None if problems else spec,
        problems=problems,
        revision=newest,
        together=revisions.count(newest),
        keys=len(keys),
        placed=placed,
    )


_T = TypeVar("_T")
_D = TypeVar("_D")


class _Reader:
    """Reads keys one by one and notes the problem of each."""

    def __init__(self, keys: Mapping[bytes, RawValue]) -> None:
        self._keys = keys
        self.problems: dict[str, Problem] = {}

    def read(self, name: str, parse: Callable[[str], _T], default: _D) -> _T | _D:
        """Parse one key; return `default` when it is absent or bad."""
        raw = self._keys.get(name.encode())
        if raw is None:
            return default
        try:
            return parse(_text(raw.value))
        except NotUserData as unfit:
            self.problems[name] = Problem(name, unfit.found, unfit.wanted)
            return default
        except Unfit as unfit:
            self.problems[name] = Problem(name, _shown(name, raw.value), str(unfit))
            return default

    def nics(self) -> tuple[Nic, ...]:
        """The NICs beyond the first."""
        nics = []
        for number in self._numbers(_NIC_KEY):
            mac = self.read(f"nic/{number}/mac", values.mac_address, None)
            bridge = self.read(f"nic/{number}/bridge", bridge_name, None)
            down = self.read(f"nic/{number}/link", _link_down, False)
            self.require(f"nic/{number}/mac", "the MAC address of the NIC, such as 52:54:00:12:34:56")
            if mac is not None:
                nics.append(Nic(number, mac, bridge, down))
        return tuple(nics)

    def disks(self) -> tuple[RbdDisk | None, str, tuple[Disk, ...]]:
        """The first disk where that is an image in Ceph, the key that says so, and the other disks."""
        first, key = self.read(FIRST_IMAGE, rbd_disk, None), FIRST_IMAGE
        others = []
        for number in self._numbers(_DISK_KEY):
            disk = self.read(f"disk/{number}", any_disk, None)
            if isinstance(disk, FileDisk):
                others.append(Disk(number, file=disk))
            elif disk is not None and number == 0:
                first, key = disk, FIRST_DISK
            elif disk is not None:
                others.append(Disk(number, disk))
        self.one_of(FIRST_DISK, FIRST_IMAGE, "they are the same disk, the first one: delete one of the two keys")
        return first, key, tuple(others)

    def snapshots(self) -> tuple[SnapshotWish, ...]:
        """The snapshots that are to exist, or to be taken away, by name."""
        found = []
        for key in sorted(key for key in self._keys if _SNAPSHOT_KEY.fullmatch(key)):
            name = key.decode()
            # Without a note `etcdctl put KEY ''` is enough.
            delete = self.read(name, snapshots.is_deleted, None) if self._keys[key].value.strip() else False
            if delete is not None:
                found.append(SnapshotWish(name.removeprefix(snapshots.KEY), delete, self.revision(name)))
        if len(found) > snapshots.MOST:
            said = Problem(snapshots.KEY, f"{len(found)} of them", f"a machine has at most {snapshots.MOST} snapshots")
            self.problems.setdefault(snapshots.KEY, said)
        return tuple(found)

    def rollback(self, name: str | None) -> RollbackWish | None:
        """The rollback that is asked for; `name` is what was read of it."""
        raw = self._keys.get(snapshots.ROLLBACK.encode())
        return None if raw is None or name is None else RollbackWish(_text(raw.value), name, raw.mod_revision)

    def _numbers(self, pattern: re.Pattern[bytes]) -> list[int]:
        return sorted({int(match[1]) for key in self._keys if (match := pattern.fullmatch(key))})

    def require(self, name: str, wanted: str) -> None:
        """Note the problem that `name` is not there."""
        if name.encode() not in self._keys:
            self.problems[name] = Problem(name, "nothing", f"it is required: {wanted}")

    def one_of(self, name: str, other: str, wanted: str) -> None:
        """Note the problem that both keys are there, which mean the same."""
        if {name.encode(), other.encode()} <= self._keys.keys():
            found = f"{_shown(name, self._keys[name.encode()].value)}, and {other} beside it"
            self.problems.setdefault(name, Problem(name, found, wanted))

    def user_network(self, spec: Spec) -> None:
        """Note the problems of a port that leads to no NIC, and of a network without one."""
        if spec.bridge == USER and b"mac" not in self._keys:
            self.require("mac", f"bridge={USER} needs a NIC; `kvmsupervisor set ID mac=auto` chooses its address")
        if spec.forward and spec.bridge != USER and "bridge" not in self.problems:
            found = _shown("forward", self._keys[b"forward"].value)
            wanted = f"it is for bridge={USER}: write that, or delete the key; a guest on a bridge has an address"
            self.problems.setdefault("forward", Problem("forward", found, wanted))

    def screen(self, spec: Spec) -> None:
        """Note the problem of viewers that would have nothing to look at."""
        if spec.display is Display.NONE and spec.spice_port is not None:
            wanted = "that port is of viewers, who look at a display: write another one, or delete spice_port"
            self.problems.setdefault("display", Problem("display", "'none', and spice_port beside it", wanted))

    def unique(self, named: Iterable[tuple[str, Hashable]], wanted: str) -> None:
        """Note the problem that two keys have the same value."""
        users: dict[Hashable, str] = {}
        for key, value in named:
            other = users.setdefault(value, key)
            if other != key:
                self.problems.setdefault(key, Problem(key, f"{value}, which {other} has, too", wanted))

    def limits(self, spec: Spec) -> None:
        """Note the problems of a limit below what the machine is to have."""
        memory, most = f"{spec.ram_mib} MiB", spec.ram_max_mib or spec.ram_mib
        self._at_least("ram_max", spec.ram_max_mib, spec.ram_mib, f"it is not below `ram` ({memory})", " MiB")
        self._at_least("cpus_max", spec.cpus_max, spec.cpus, f"it is not below `cpus` ({spec.cpus})")
        if spec.hugepages is None:
            key = "ram" if spec.ram_max_mib is None else "ram_max"
            wanted = f"it is not below `{key}` ({most} MiB), and better above: QEMU needs some, too"
            self._at_least("memory_limit", spec.memory_limit_mib, most, wanted, " MiB")

    def _at_least(self, name: str, value: int | None, least: int, wanted: str, unit: str = "") -> None:
        if value is not None and value < least:
            self.problems.setdefault(name, Problem(name, f"{value}{unit}", wanted))

    def revision(self, name: str) -> int:
        """The `mod_revision` of one key, 0 without it."""
        raw = self._keys.get(name.encode())
        return 0 if raw is None else raw.mod_revision

    def all_problems(self) -> tuple[Problem, ...]:
        """All problems in key order, that of the unknown keys last."""
        unknown = sorted(key for key in self._keys if not is_known(key))
        known = tuple(self.problems[name] for name in sorted(self.problems))
        return (*known, _unknown_keys(unknown)) if unknown else known


_NIC_KEY = re.compile(rf"nic/([1-{NICS - 1}])/(?:mac|bridge|link)".encode())
_DISK_KEY = re.compile(rf"disk/([0-9]|1[0-{DISKS - 11}])".encode())

_SNAPSHOT_KEY = re.compile(f"{snapshots.KEY}(?!.*[.][.]){ID_PATTERN.pattern}".encode())

_KNOWN_KEYS = frozenset(name.encode() for name in (*WISH_KEYS, *ALL_NUMBERED_KEYS, FREE_KEY))


def is_known(key: bytes) -> bool:
    """Whether this is the name of a wish, or of a key for people."""
    return key in _KNOWN_KEYS or key.startswith(FREE_KEY_PREFIX.encode()) or bool(_SNAPSHOT_KEY.fullmatch(key))


def _unknown_keys(unknown: list[bytes]) -> Problem:
    """One problem for all: ten thousand keys must not make ten thousand sentences."""
    return Problem(
        "unknown key" if len(unknown) == 1 else "unknown keys",
        some(unknown, UNKNOWN_KEYS_NAMED, _with_suggestion),
        f"the keys are {', '.join((*WISH_KEYS, *NUMBERED_KEYS))} (NICs to {NICS - 1}, disks to {DISKS - 1}); "
        f"{FREE_KEY} and {FREE_KEY_PREFIX}… are for people",
    )


def _with_suggestion(key: bytes) -> str:
    name, equals, _ = key[:SHOWN_LENGTH].decode(errors="replace").partition("=")
    near = suggest_wish(name)
    # `etcdctl put KEY=VALUE` makes a key whose name contains the value.
    is_pair = bool(equals) and (near is not None or names_a_secret(name))
    held = strange(key.decode(errors="ignore"))
    shown = show(f"{name}={HIDDEN}") if is_pair else show_bytes(key)
    shown += "" if held is None else f", which holds {held}"
    meant = f"{near}, and its value as a word of its own" if equals else near
    return shown if near is None else f"{shown} (did you mean {meant}?)"


def _hosts(text: str) -> tuple[str, ...]:
    """The candidates for a takeover."""
    wanted = (
        f"it is one to {CANDIDATES} different host names in the order in which they are asked, such as node2 node3; "
        f"{ANY_HOST} is every other one"
    )
    names = [word for word in re.split(r"[\s,]+", text) if word]
    try:
        found = tuple(name if name == ANY_HOST else values.host_name(name) for name in names)
    except Unfit as unfit:
        raise Unfit(wanted) from unfit
    if not 0 < len(found) <= CANDIDATES or len(set(found)) < len(found):
        raise Unfit(wanted)
    return found


def _text(value: bytes) -> str:
    if len(value) > VALUE_LIMIT:
        raise Unfit(f"a value has at most {VALUE_LIMIT} bytes")
    try:
        text = value.decode().strip()
    except UnicodeDecodeError as error:
        raise Unfit("a value is UTF-8 text") from error
    if not text:
        raise Unfit("a value is not empty: delete the key to have its default")
    return text


def public_value(name: str, value: bytes) -> bytes:
    """A key's value for people, without secrets.

    An unknown key may be the mistyped name of a secret one.
    """
    mistyped = not is_known(name.encode()) and suggest_wish(name) in SECRET_KEYS
    if name in SECRET_KEYS or mistyped or names_a_secret(name):
        return b"(not shown)"
    if len(value) > VALUE_LIMIT:
        # Not searched either: a megabyte would be searched again and again.
        return f"({len(value)} bytes, not shown)".encode()
    hide = {"cloud-config": shown_url, "extra_flags": cleaned_flags}.get(name, cleaned)
    return hide(value.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _shown(name: str, value: bytes) -> str:
    """The value for a message; problems are public."""
    if len(value) > VALUE_LIMIT:
        return f"more than {VALUE_LIMIT} bytes"
    if name in SECRET_KEYS:
        return "a value that is not shown"
    shown = cleaned(public_value(name, value).decode(errors="surrogateescape")).encode(errors="surrogateescape")
    # Look at the shown text only, not at the secret.
    held = strange(shown.decode(errors="ignore"))
    return show_bytes(shown) + ("" if held is None else f", which holds {held}")


_restart = values.choice(RestartPolicy, "it")
_firmware = values.choice(Firmware, "it")
_display = values.choice(Display, "it")
_any_hugepages = values.choice(HugePages, "it")


def _hugepages(text: str) -> HugePages | None:
    pages = _any_hugepages(text)
    return None if pages is HugePages.OFF else pages


def _cloud_config(text: str) -> str:
    media_url(text)
    return text


def _user_data(text: str) -> Secret:
    return Secret.of(user_data(text).decode())


def _extra_flags(text: str) -> tuple[str, ...]:
    words = values.shell_words(text)
    for word in words:
        # QEMU takes `--option` for `-option`.
        name = word[1:].removeprefix("-") if word.startswith("-") else ""
        if name in RESERVED_FLAGS:
            raise Unfit(f"leave {word} out: {RESERVED_FLAGS[name]}")
    return words


def _spice_password(text: str) -> Secret:
    if len(text.encode()) > SPICE_PASSWORD_LENGTH or not text.isprintable():
        raise Unfit(f"it is at most {SPICE_PASSWORD_LENGTH} bytes, without control characters")
    return Secret.of(text)


_PRIORITY = re.compile(r"-?[0-9]{1,4}")


def _priority(text: str) -> int:
    if not _PRIORITY.fullmatch(text) or not -1000 <= int(text) <= 1000:
        raise Unfit("it is a whole number from -1000 to 1000; the greater one starts first")
    return int(text)


def _power(text: str) -> tuple[Power, bool]:
    """Whether it is to run, and whether to stop it without its guest's consent."""
    if text == OFF_NOW:
        return Power.OFF, True
    if text not in tuple(Power):
        raise Unfit(f"it is on, off or {OFF_NOW}")
    return Power(text), False


def _link_down(text: str) -> bool:
    if text not in {"up", "down"}:
        raise Unfit("it is up or down")
    return text == "down"


def _restart_request(text: str) -> str:
    if len(text) > RESTART_REQUEST_LENGTH:
        raise Unfit(f"it is any text of at most {RESTART_REQUEST_LENGTH} characters, such as a date")
    return text


def _not_help(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Refuse `help`: QEMU prints a list and ends as if all had gone well."""

    def parse_name(text: str) -> str:
        if text == "help":
            raise Unfit("it is a name; `help` makes QEMU print them and end")
        return parse(text)

    return parse_name


_spice_port = values.integer(1, 65_535, "a TCP port")
_cpu_shares = values.integer(2, 262_144, "the weight of its CPU time, 1024 being ordinary,")
_cpus = values.integer(1, 512, "the number of vCPUs")
_shutdown_timeout_s = values.seconds(0, values.SHUTDOWN_TIMEOUT_MAX_S, "the time for a shutdown")
_cpu = _not_help(
    values.matching(
        r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,1023}",
        "it is a CPU model of QEMU's, with features if need be, such as host or qemu64,+aes",
    )
)
_machine = _not_help(
    values.matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
        "it is a machine type of QEMU's, without options, such as q35 or pc-q35-7.2",
    )
)
