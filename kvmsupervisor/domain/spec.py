"""Wishes: what people write below `/kvm/<id>/`, parsed purely.

`parse_wish` never raises: whatever stands in etcd becomes a `Wish`, with every problem named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from kvmsupervisor.domain import values
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.values import SHOWN_LENGTH, Unfit, nearest, plain, show_bytes

VALUE_LIMIT = 65_536
"""Bytes of a value that are looked at; a longer one is a problem. Arbitrary: no wish needs a tenth of it."""


WISH_KEYS = (
    "host",
    "ram",
    "mac",
    "bridge",
    "rbd",
    "spice_port",
    "extra_flags",
    "cloud-config",
    "cpus",
    "cpu",
    "machine",
    "firmware",
    "power",
    "restart",
    "restart_request",
    "shutdown_timeout",
)
"""The names of all wishes, in the order in which they are explained."""

DEFAULT_MACHINE = "q35"

FREE_KEY = "description"
FREE_KEY_PREFIX = "x-"
"""Keys that are for people: never looked at."""

UNKNOWN_KEYS_NAMED = 20
"""Unknown keys that the problem names; the others are counted. Arbitrary: they still fit on a screen."""

RESTART_REQUEST_LENGTH = 256
"""Characters of a `restart_request`, which is kept in the run directory. Arbitrary: a date or uuid fits."""

RESERVED_FLAGS = {
    "daemonize": "the supervisor starts QEMU as a child that stays",
    "incoming": "a migration is the supervisor's to begin",
    "preconfig": "the supervisor sets QEMU up by its arguments alone",
    "uuid": "the uuid is made of prefix and id, and a running QEMU is recognised by it",
}
"""QEMU options that `extra_flags` may not hold, and why: with them a running QEMU would be lost sight of."""


class Power(StrEnum):
    """`power`: whether the machine shall run."""

    ON = "on"
    OFF = "off"


class RestartPolicy(StrEnum):
    """`restart`: what follows when QEMU or the guest ends by itself."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Firmware(StrEnum):
    """`firmware` of the machine."""

    BIOS = "bios"
    UEFI = "uefi"


class RawValue(NamedTuple):
    """One key's value as etcd holds it, cut to `VALUE_LIMIT` + 1 bytes, and the revision that wrote it.

    A tuple, because a large cluster has 80,000: a frozen dataclass takes longer to make.
    """

    value: bytes
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one key: `found` there, and what would be right."""

    key: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.key}: found {self.found}; {self.wanted}"


@dataclass(frozen=True, slots=True)
class RbdImage:
    """An RBD image, `<pool>/<image>`."""

    pool: str
    image: str

    def __str__(self) -> str:
        return f"{self.pool}/{self.image}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The machine that the keys describe. Only the keys that shape QEMU's arguments are here."""

    ram_mib: int
    mac: str | None = None
    bridge: str | None = None
    rbd: RbdImage | None = None
    spice_port: int | None = None
    extra_flags: tuple[str, ...] = ()
    cpus: int = 1
    cpu: str | None = None
    machine: str = DEFAULT_MACHINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """All that people want of one instance.

    Attributes:
        host: the value of `host`, or None without that key (or with one that is no host name).
        host_revision: `mod_revision` of the `host` key, 0 without one.
        power: None when the key is there and holds neither `on` nor `off`.
        power_revision: `mod_revision` of the `power` key, 0 without one.
        restart_request: the value of that key.
        shutdown_timeout_s: None for the host's default.
        spec: the machine, or None when any key has a problem.
        problems: every problem of every key, in key order.
        revision: the newest `mod_revision` of all its keys: what "acted on" refers to.
        keys: how many keys the instance has, the lock not counted; 0 when it was removed.
    """

    instance: InstanceId
    host: str | None = None
    host_revision: int = 0
    power: Power | None = Power.ON
    power_revision: int = 0
    restart: RestartPolicy = RestartPolicy.ALWAYS
    restart_request: str | None = None
    shutdown_timeout_s: float | None = None
    spec: Spec | None = None
    problems: tuple[Problem, ...] = ()
    revision: int = 0
    keys: int = 0


def parse_wish(instance: InstanceId, keys: Mapping[bytes, RawValue]) -> Wish:
    """Parse the keys of one instance. Never raises, whatever the bytes are.

    A key that is sound counts even where another is not: `power=off` beside a bad `ram` stops the machine.

    Args:
        instance: whose keys they are.
        keys: what follows `/kvm/<id>/` in each key, as bytes (it may be anything, slashes included), with
            its value. The lock is not among them.
    """
    if not keys:
        return Wish(instance=instance)
    reader = _Reader(keys)
    host = reader.read("host", values.host_name, None)
    power = reader.read("power", _power, Power.ON)
    restart = reader.read("restart", _restart, RestartPolicy.ALWAYS)
    restart_request = reader.read("restart_request", _restart_request, None)
    shutdown_timeout_s = reader.read("shutdown_timeout", _shutdown_timeout_s, None)
    reader.read("cloud-config", _cloud_config, None)
    reader.read("firmware", _firmware, Firmware.BIOS)
    spec = Spec(
        ram_mib=reader.read("ram", values.ram_mib, 0),
        mac=reader.read("mac", values.mac_address, None),
        bridge=reader.read("bridge", values.interface_name, None),
        rbd=reader.read("rbd", _rbd_image, None),
        spice_port=reader.read("spice_port", _spice_port, None),
        extra_flags=reader.read("extra_flags", _extra_flags, ()),
        cpus=reader.read("cpus", _cpus, 1),
        cpu=reader.read("cpu", _cpu, None),
        machine=reader.read("machine", _machine, DEFAULT_MACHINE),
    )
    reader.require("ram", "how much memory the machine has, such as 2048 (MiB) or 2G")
    problems = reader.all_problems()
    return Wish(
        instance=instance,
        host=host,
        host_revision=reader.revision("host"),
        power=None if "power" in reader.problems else power,
        power_revision=reader.revision("power"),
        restart=restart,
        restart_request=restart_request,
        shutdown_timeout_s=shutdown_timeout_s,
        spec=None if problems else spec,
        problems=problems,
        revision=max(raw.mod_revision for raw in keys.values()),
        keys=len(keys),
    )


def pending(running: Spec, wanted: Spec) -> tuple[str, ...]:
    """Names of the wishes that differ between the machine that runs and the one that is wanted."""
    return tuple(
        _KEY_OF_FIELD.get(field.name, field.name)
        for field in fields(Spec)
        if getattr(running, field.name) != getattr(wanted, field.name)
    )


def spec_to_object(spec: Spec) -> dict[str, Any]:
    """`spec` as a JSON object, for the record of the running incarnation."""
    return asdict(spec) | {
        "rbd": None if spec.rbd is None else str(spec.rbd),
        "extra_flags": list(spec.extra_flags),
    }


def spec_from_object(found: object) -> Spec | None:
    """Read what `spec_to_object` wrote; None when it is not one (fields of a newer release are left out)."""
    if not isinstance(found, dict):
        return None
    known = {field.name for field in fields(Spec)}
    held: dict[str, Any] = {name: value for name, value in found.items() if name in known}
    if not all(_is_field(name, value) for name, value in held.items()):
        return None
    try:
        if held.get("rbd") is not None:
            held["rbd"] = _rbd_image(held["rbd"])
        return Spec(**{**held, "extra_flags": tuple(held.get("extra_flags", ()))})
    except (Unfit, TypeError):
        # TypeError: `ram_mib` is missing.
        return None


_KEY_OF_FIELD = {"ram_mib": "ram"}
_OPTIONAL_TEXTS = {"mac", "bridge", "rbd", "cpu"}


def _is_field(name: str, value: object) -> bool:
    """Whether `value` has the JSON type of the field `name`."""
    if value is None:
        return name in _OPTIONAL_TEXTS or name == "spice_port"
    if name == "extra_flags":
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    return type(value) is (str if name in _OPTIONAL_TEXTS or name == "machine" else int)


_T = TypeVar("_T")
_D = TypeVar("_D")


class _Reader:
    """Reads keys one by one and remembers what was wrong with each."""

    def __init__(self, keys: Mapping[bytes, RawValue]) -> None:
        self._keys = keys
        self.problems: dict[str, Problem] = {}

    def read(self, name: str, parse: Callable[[str], _T], default: _D) -> _T | _D:
        """Parse one key; return `default` without it, and when it is bad."""
        raw = self._keys.get(name.encode())
        if raw is None:
            return default
        try:
            return parse(_text(raw.value))
        except Unfit as unfit:
            self.problems[name] = Problem(name, _shown(name, raw.value), str(unfit))
            return default

    def require(self, name: str, wanted: str) -> None:
        """Note the problem that `name` is not there."""
        if name.encode() not in self._keys:
            self.problems[name] = Problem(name, "nothing", f"it is required: {wanted}")

    def revision(self, name: str) -> int:
        """The `mod_revision` of one key, 0 without it."""
        raw = self._keys.get(name.encode())
        return 0 if raw is None else raw.mod_revision

    def all_problems(self) -> tuple[Problem, ...]:
        """All problems in key order, that of the unknown keys last."""
        unknown = sorted(key for key in self._keys if not _is_known(key))
        known = tuple(self.problems[name] for name in sorted(self.problems))
        return (*known, _unknown_keys(unknown)) if unknown else known


_WISH_KEY_BYTES = frozenset(name.encode() for name in WISH_KEYS)


def _is_known(key: bytes) -> bool:
    return key in _WISH_KEY_BYTES or key == FREE_KEY.encode() or key.startswith(FREE_KEY_PREFIX.encode())


def _unknown_keys(unknown: list[bytes]) -> Problem:
    """One problem for all of them: ten thousand keys must not make ten thousand sentences."""
    named = ", ".join(_with_suggestion(key) for key in unknown[:UNKNOWN_KEYS_NAMED])
    more = len(unknown) - UNKNOWN_KEYS_NAMED
    return Problem(
        "unknown key" if len(unknown) == 1 else "unknown keys",
        f"{named} and {more} more" if more > 0 else named,
        f"the keys are {', '.join(WISH_KEYS)}; {FREE_KEY} and {FREE_KEY_PREFIX}… are for people",
    )


_SYNONYMS = {
    "memory": "ram",
    "mem": "ram",
    "disk": "rbd",
    "drive": "rbd",
    "image": "rbd",
    "vcpus": "cpus",
    "smp": "cpus",
    "flags": "extra_flags",
    "args": "extra_flags",
    "spice": "spice_port",
    "node": "host",
    "nic": "mac",
    "user-data": "cloud-config",
    "uefi": "firmware",
}
"""What else people call the wishes, in the form of `values.plain`."""

_SUGGESTIONS = {plain(name): name for name in (*WISH_KEYS, FREE_KEY)} | _SYNONYMS


def suggest_wish(name: str) -> str | None:
    """The wish that was probably meant by an unknown name."""
    return nearest(name, _SUGGESTIONS)


def _with_suggestion(key: bytes) -> str:
    near = suggest_wish(key[:SHOWN_LENGTH].decode(errors="replace"))
    return show_bytes(key) if near is None else f"{show_bytes(key)} (did you mean {near}?)"


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


def _shown(name: str, value: bytes) -> str:
    """What was found, for a message; problems are public, so a URL's user and password are left out."""
    if len(value) > VALUE_LIMIT:
        return f"more than {VALUE_LIMIT} bytes"
    if name == "cloud-config":
        text = values.without_userinfo(value.decode(errors="surrogateescape"))
        value = text.encode(errors="surrogateescape")
    return show_bytes(value)


_power = values.choice(Power, "it")
_restart = values.choice(RestartPolicy, "it")
_any_firmware = values.choice(Firmware, "it")


def _firmware(text: str) -> Firmware:
    firmware = _any_firmware(text)
    if firmware is Firmware.UEFI:
        raise Unfit("uefi is not supported by this version: use bios, or delete the key")
    return firmware


_VISIBLE_ASCII = re.compile(r"[!-~]+")


def _cloud_config(text: str) -> None:
    wanted = "it is a URL: http://HOST/PATH, https://HOST/PATH or file:///PATH"
    if not _VISIBLE_ASCII.fullmatch(text):
        raise Unfit(wanted)
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError as error:
        raise Unfit(f"{wanted} ({error})") from error
    remote = url.scheme in {"http", "https"} and url.hostname
    local = url.scheme == "file" and url.netloc in {"", "localhost"} and url.path.startswith("/")
    if not remote and not local:
        raise Unfit(wanted)
    raise Unfit("media are not supported by this version: delete the key")


_RBD_NAME = r"[^/@\s\x00-\x1f\x7f]+"
_RBD = re.compile(f"/?({_RBD_NAME})/({_RBD_NAME})")


def _rbd_image(text: str) -> RbdImage:
    match = _RBD.fullmatch(text)
    if match is None or not text.isprintable():
        raise Unfit("it is /POOL/IMAGE or POOL/IMAGE, without white space and without a snapshot (@)")
    return RbdImage(pool=match[1], image=match[2])


def _extra_flags(text: str) -> tuple[str, ...]:
    words = values.shell_words(text)
    for word in words:
        # QEMU takes `--option` for `-option`.
        name = word[1:].removeprefix("-") if word.startswith("-") else ""
        if name in RESERVED_FLAGS:
            raise Unfit(f"leave {word} out: {RESERVED_FLAGS[name]}")
    return words


def _restart_request(text: str) -> str:
    if len(text) > RESTART_REQUEST_LENGTH:
        raise Unfit(f"it is any text of at most {RESTART_REQUEST_LENGTH} characters, such as a date")
    return text


def _not_help(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Refuse `help`, to which QEMU answers with a list and ends, as if all had gone well."""

    def parse_name(text: str) -> str:
        if text == "help":
            raise Unfit("it is a name; `help` makes QEMU print them and end")
        return parse(text)

    return parse_name


_spice_port = values.integer(1, 65_535, "a TCP port")
_cpus = values.integer(1, 512, "the number of vCPUs")
_shutdown_timeout_s = values.seconds(0, values.SHUTDOWN_TIMEOUT_MAX_S, "the time for a shutdown")
_cpu = _not_help(
    values.matching(
        r"[A-Za-z0-9._+=,-]{1,1024}",
        "it is a CPU model of QEMU's, with features if need be, such as host or qemu64,+aes",
    )
)
_machine = _not_help(
    values.matching(
        r"[A-Za-z0-9._-]{1,64}",
        "it is a machine type of QEMU's, without options, such as q35 or pc-q35-7.2",
    )
)
