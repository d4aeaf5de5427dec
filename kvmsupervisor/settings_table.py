"""What can be set: of each setting its name, its parser, its default and its explanation.

`check-config`, the example file and the page of the settings are held against `SETTINGS`. How a value is found
is the business of `settings.py`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from kvmsupervisor.domain import argv, values
from kvmsupervisor.domain.flags import AllowedFlags
from kvmsupervisor.domain.keys import LOCK_PLACEHOLDER
from kvmsupervisor.domain.values import Unfit

DEFAULT_CONFIG = Path("/etc/kvmsupervisor/kvmsupervisor.toml")

SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix socket's path on Linux, unix(7): 108 with the NUL behind it."""

LONGEST_ID = 63
"""Bytes of the longest instance id, see `domain.keys.ID_PATTERN`."""


class Accel(StrEnum):
    """`KVM_ACCEL`: the accelerator of all guests."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class CgroupKind(StrEnum):
    """`KVM_CGROUP`: what gives QEMU processes their homes."""

    AUTO = "auto"
    SYSTEMD = "systemd"
    CGROUP = "cgroup"
    NONE = "none"


class LogLevel(StrEnum):
    """`KVM_LOG_LEVEL`: the least that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """`KVM_LOG_FORMAT`: `auto` is `console` on a terminal, else `json`."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


class Switch(StrEnum):
    """How a setting of yes or no is written."""

    OFF = "0"
    ON = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where the HTTP server listens. Port 0 lets the kernel choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting, as `describe` tells it.

    Attributes:
        name: the field of `Settings`.
        env: the environment variable.
        toml_key: the key of the TOML file, None when only the environment can say it.
        default: as text that could be written; None when there is none, or when it is worked out.
        shown_default: the default for people.
        example: a value for the example file, where `default` is None.
        help: one or two sentences.
        parse: from text without surrounding white space; raises `Unfit`.
        may_be_empty: whether empty text means something.
    """

    name: str
    env: str
    toml_key: str | None
    default: str | None
    shown_default: str
    example: str
    help: str
    parse: Callable[[str], object]
    may_be_empty: bool = False


def _endpoints(text: str) -> tuple[str, ...]:
    return tuple(_endpoint(part.strip()) for part in text.split(","))


def _endpoint(text: str) -> str:
    wanted = "endpoints are URLs such as http://10.0.0.1:2379, separated by commas"
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        port = url.port
    except ValueError as error:
        raise Unfit(f"{wanted} ({error})") from error
    fits = url.scheme in {"http", "https"} and url.hostname and re.fullmatch(r"[!-~]+", text)
    if not fits or url.path not in {"", "/"} or url.query or url.fragment or "@" in url.netloc or port == 0:
        raise Unfit(wanted)
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else url.hostname
    return f"{url.scheme}://{host}:{port or 2379}"


def _absolute(text: str) -> Path:
    if not text.startswith("/") or not text.isprintable():
        raise Unfit("it is an absolute path")
    return Path(text)


def _file(text: str) -> Path:
    """A file that can be read. It is not read here: it may be a pipe."""
    path = _absolute(text)
    if not path.exists():
        raise Unfit("it names a file that exists")
    if path.is_dir() or not os.access(path, os.R_OK):
        raise Unfit("it names a file that can be read")
    return path


def _program(text: str) -> str:
    return str(_absolute(text)) if "/" in text else _line(text)


def _program_file(text: str) -> Path:
    """A program by its path; whether it is there is told when it is needed, so that it can be installed later."""
    return _absolute(text)


def _line(text: str) -> str:
    if not text.isprintable():
        raise Unfit("it is text without control characters")
    return text


def _key_prefix(text: str) -> str:
    key = text.rstrip("/")
    if not re.fullmatch(r"(?:/[^/\s%]+)+", key) or not key.isprintable():
        raise Unfit("it is a key prefix such as /kvm: begins with '/', no '//', no white space, no '%'")
    return key


def _lock(text: str) -> str:
    wanted = f"it is a key that begins with '/' and holds {LOCK_PLACEHOLDER} (the id) once, such as /kvm/%i/lock"
    fits = re.fullmatch(r"(?:/[^/\s]+)+", text) and text.isprintable() and text.count("%") == 1
    if not fits or LOCK_PLACEHOLDER not in text:
        raise Unfit(wanted)
    return text


def _address(text: str) -> str:
    """An IP address, or a host's name (which cannot look like a broken IPv4 address)."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if re.fullmatch(r"[0-9.]+", text) or ":" in text:
            raise Unfit("it is an IP address, such as 127.0.0.1 or ::1, or a host's name") from None
        return values.host_name(text)


def _run_dir(text: str) -> Path:
    path = _absolute(text)
    if ".." in path.parts:
        raise Unfit("it is an absolute path without '..', such as /run/kvmsupervisor")
    room = SOCKET_PATH_LIMIT - len(f"/{'i' * LONGEST_ID}/{argv.QMP_SPARE_SOCKET}")
    if len(os.fsencode(path)) > room:
        raise Unfit(f"its path has at most {room} bytes, or the sockets of instances would not fit below it")
    return path


def _listen(text: str) -> Listen | None:
    if text in {"", "off"}:
        return None
    wanted = "it is ADDRESS:PORT, such as 0.0.0.0:9746 or [::]:9746, or off"
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]+)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65_535:
        raise Unfit(wanted)
    try:
        return Listen(host=_address(match[1] or match[2]), port=int(match[3]))
    except Unfit:
        raise Unfit(wanted) from None


_SIZE = re.compile(r"([0-9]{1,12}) *([kmg]?)(?:i?b)?", re.IGNORECASE)
_LOG_MIN = 4096
_LOG_MAX = 1024**3


def _log_size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    size = int(match[1]) * 1024 ** " kmg".index(match[2].lower() or " ") if match else 0
    if not _LOG_MIN <= size <= _LOG_MAX:
        raise Unfit("it is a number of bytes from 4K to 1G, such as 1M or 65536")
    return size


def _ram_mib(text: str) -> int:
    """Memory, or none of it."""
    return 0 if text == "0" else values.ram_mib(text)


def _flags(text: str) -> AllowedFlags:
    if text == "any":
        return AllowedFlags()
    if text == "none":
        return AllowedFlags(frozenset())
    words = [word.strip().lstrip("-") for word in text.split(",")]
    if not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", word) for word in words):
        raise Unfit("it is any, none, or options of QEMU's separated by commas, such as device,netdev,cdrom")
    return AllowedFlags(frozenset(words))


def _user(text: str) -> str:
    if not re.fullmatch(r"(?:[A-Za-z_][A-Za-z0-9_.-]{0,31})?", text):
        raise Unfit("it is the name of a user, such as qemu, or empty")
    return text


def _switch(text: str) -> bool:
    return values.choice(Switch, "it")(text) is Switch.ON


def _setting(
    name: str,
    parse: Callable[[str], object],
    help_text: str,
    *,
    default: str | None = None,
    shown: str | None = None,
    example: str = "",
    kvm: bool = True,
    in_file: bool = True,
    may_be_empty: bool = False,
) -> Setting:
    """A setting, its names made of that of the field: `settle_s` is `KVM_SETTLE` and `settle`."""
    word = name.removesuffix("_s").removesuffix("_mib")
    return Setting(
        name=name,
        env=f"KVM_{word}".upper() if kvm else word.upper(),
        toml_key=word if in_file else None,
        default=default,
        shown_default=shown or default or "not set",
        example=default or example,
        help=help_text,
        parse=parse,
        may_be_empty=may_be_empty,
    )


SETTINGS: tuple[Setting, ...] = (
    _setting(
        "etcd_endpoints",
        _endpoints,
        "URLs of etcd's members, separated by commas. HOST:PORT is taken as http.",
        default="http://127.0.0.1:2379",
        kvm=False,
    ),
    _setting(
        "etcd_cacert",
        _file,
        "Certificates of the authority that etcd's own certificates are checked against (PEM).",
        example="/etc/kvmsupervisor/etcd-ca.pem",
        kvm=False,
    ),
    _setting(
        "etcd_cert",
        _file,
        "This client's certificate (PEM). Needs ETCD_KEY.",
        example="/etc/kvmsupervisor/etcd-client.pem",
        kvm=False,
    ),
    _setting(
        "etcd_key",
        _file,
        "The key of ETCD_CERT (PEM).",
        example="/etc/kvmsupervisor/etcd-client-key.pem",
        kvm=False,
    ),
    _setting(
        "etcd_username",
        _line,
        "User of etcd's own authentication. Needs ETCD_PASSWORD_FILE.",
        example="kvm",
        kvm=False,
    ),
    _setting(
        "etcd_password_file",
        _file,
        "File that holds the password of ETCD_USERNAME; a line feed at its end does not count.",
        example="/etc/kvmsupervisor/etcd-password",
        kvm=False,
    ),
    _setting(
        "lock",
        _lock,
        "Key of an instance's lock; %i stands for its id. The same on all hosts.",
        shown="KVM_PREFIX + /%i/lock",
        example="/kvm/%i/lock",
        kvm=False,
    ),
    _setting(
        "bridge_if",
        values.interface_name,
        "Bridge of the NICs of instances without the key bridge.",
        example="br0",
        kvm=False,
    ),
    _setting(
        "spice_addr",
        _address,
        "Address on which the SPICE servers of guests listen, without the key spice_addr.",
        default="127.0.0.1",
        kvm=False,
    ),
    _setting(
        "hostname",
        values.host_name,
        "Name of this host: instances whose key host holds exactly this run here.",
        shown="the host's name",
        example="node1",
    ),
    _setting("prefix", _key_prefix, "Prefix of the wishes in etcd. The same on all hosts.", default="/kvm"),
    _setting(
        "facts_prefix",
        _key_prefix,
        "Prefix of sessions and statuses in etcd, outside KVM_PREFIX. The same on all hosts.",
        shown="KVM_PREFIX with supervisor appended",
        example="/kvmsupervisor",
    ),
    _setting(
        "run_dir",
        _run_dir,
        "Folder of what a successor needs to adopt running guests: the host's, on a tmpfs.",
        default="/run/kvmsupervisor",
    ),
    _setting(
        "listen",
        _listen,
        "Address and port of the HTTP server, IPv6 in brackets; empty or off for none.",
        default="0.0.0.0:9746",
        may_be_empty=True,
    ),
    _setting(
        "accel",
        values.choice(Accel, "it"),
        "Accelerator: kvm, tcg (slow, works anywhere) or auto (kvm where /dev/kvm works).",
        default="auto",
    ),
    _setting("qemu", _program, "QEMU's program, a name or an absolute path.", default="qemu-system-x86_64"),
    _setting(
        "qemu_user",
        _user,
        "User that QEMU runs as, confined by seccomp, without any privilege. Empty: as the supervisor, not confined.",
        shown="qemu, where that user exists",
        example="qemu",
        may_be_empty=True,
    ),
    _setting(
        "cgroup",
        values.choice(CgroupKind, "it"),
        "What QEMU lives in: systemd (a scope in machine.slice), cgroup (the host's tree), none, or auto (tries them).",
        default="auto",
    ),
    _setting(
        "extra_flags",
        _flags,
        "Which QEMU options the key extra_flags may hold: any, none, or a list of options separated by commas.",
        default="any",
    ),
    _setting(
        "bridge_helper",
        _program_file,
        "QEMU's program qemu-bridge-helper, which plugs NICs into bridges.",
        shown="looked for where distributions install it",
        example="/usr/lib/qemu/qemu-bridge-helper",
    ),
    _setting(
        "memory_reserve_mib",
        _ram_mib,
        "Memory that is kept for the host: guests that would not fit into the rest wait.",
        default="512M",
    ),
    _setting(
        "state_dir",
        _absolute,
        "Folder of what outlives a boot: UEFI variables of machines without a disk in Ceph.",
        default="/var/lib/kvmsupervisor",
    ),
    _setting(
        "ovmf_code",
        _file,
        "UEFI firmware for firmware=uefi. Needs KVM_OVMF_VARS.",
        shown="looked for where distributions install it",
        example="/usr/share/OVMF/OVMF_CODE_4M.fd",
    ),
    _setting(
        "ovmf_vars",
        _file,
        "The UEFI variables that new machines begin with, made for KVM_OVMF_CODE.",
        shown="looked for where distributions install it",
        example="/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
    _setting(
        "media_root",
        _absolute,
        "Folder below which the key cloud-config may name files (file:///...). Without it only http and https.",
        example="/etc/kvmsupervisor/user-data",
    ),
    _setting(
        "media_cacert",
        _file,
        "Certificates of authorities (PEM), beside the system's, that servers of user data are checked against.",
        example="/etc/kvmsupervisor/media-ca.pem",
    ),
    _setting(
        "ceph_conf",
        _absolute,
        "Ceph's configuration file.",
        shown="librbd's own default, /etc/ceph/ceph.conf",
        example="/etc/ceph/ceph.conf",
        kvm=False,
    ),
    _setting(
        "ceph_id",
        _line,
        "Name of the Ceph user, without client. before it.",
        shown="librbd's own default, admin",
        example="kvm",
        kvm=False,
    ),
    _setting(
        "session_ttl_s",
        values.integer(2, 3600, "it"),
        "Seconds after which a host that has gone silent counts as gone.",
        default="15",
    ),
    _setting(
        "shutdown_timeout_s",
        values.seconds(0, values.SHUTDOWN_TIMEOUT_MAX_S, "it"),
        "Seconds that a guest has to shut down before it is forced, without the key shutdown_timeout.",
        default="120",
    ),
    _setting(
        "start_timeout_s",
        values.seconds(1, 3600, "it"),
        "Seconds within which a started QEMU must answer.",
        default="60",
    ),
    _setting(
        "settle_s",
        values.seconds(0, 60, "it"),
        "Seconds that new or changed keys must be quiet before their guest first runs: people write them one by one.",
        default="0.5",
    ),
    _setting(
        "start_parallel",
        values.integer(1, 1024, "it"),
        "How many QEMUs are being started at one time.",
        shown="twice the number of CPUs",
        example="8",
    ),
    _setting(
        "mass_removal_window_s",
        values.seconds(0, 3600, "it"),
        "Seconds within which the removal of more than half of this host's instances (and more than two) is "
        "held for confirmation.",
        default="10",
    ),
    _setting(
        "log_level",
        values.choice(LogLevel, "it"),
        "The least that is logged: debug, info, warning or error.",
        default="info",
    ),
    _setting(
        "log_format",
        values.choice(LogFormat, "it"),
        "json, console, or auto: console on a terminal, else json.",
        default="auto",
    ),
    _setting(
        "log_max_bytes",
        _log_size,
        "Size at which the logs of QEMU and of the console are rotated, in bytes or with K, M or G (of 1024).",
        default="1M",
    ),
    _setting(
        "log_keep",
        values.integer(0, 100, "it"),
        "How many rotated logs of each kind are kept.",
        default="3",
    ),
    _setting(
        "config",
        _absolute,
        "The TOML file. Without this variable it may be missing.",
        default=str(DEFAULT_CONFIG),
        in_file=False,
    ),
    _setting(
        "demo_once",
        _switch,
        "1: `kvmsupervisor demo` ends when its guest has said hello and was shut down.",
        default="0",
        in_file=False,
    ),
)
