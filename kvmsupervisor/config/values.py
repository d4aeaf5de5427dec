"""Parsers of settings: they turn text of the environment or of the TOML file into values.

Each parser takes text without surrounding white space and returns the value, or raises `Unfit`, whose text says what
would be right. The parsers of `domain.values` do the same; some of these also look whether a file is there.
"""

from __future__ import annotations

import ipaddress
import os
import re
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from kvmsupervisor.domain import values
from kvmsupervisor.domain.flags import AllowedFlags
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import LOCK_PLACEHOLDER, HostName
from kvmsupervisor.domain.names import QMP_SPARE_SOCKET
from kvmsupervisor.domain.uids import UidRange, trouble_with
from kvmsupervisor.domain.values import Unfit
from kvmsupervisor.domain.words import may_begin_a_word

SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix socket's path on Linux, unix(7): 108 with the NUL behind it."""

LONGEST_ID = 63
"""Bytes of the longest instance id, see `domain.keys.ID_PATTERN`."""


class Accel(StrEnum):
    """`KVM_ACCEL`: the accelerator of all guests."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class EtcdWallKind(StrEnum):
    """Values of KVM_ETCD_WALL."""

    AUTO = "auto"
    OFF = "off"


class CgroupKind(StrEnum):
    """`KVM_CGROUP`: where QEMU processes live."""

    AUTO = "auto"
    SYSTEMD = "systemd"
    CGROUP = "cgroup"
    NONE = "none"


class Unfenced(StrEnum):
    """`KVM_UNFENCED`: what happens to machines whose disks cannot be fenced when the session is lost."""

    PIN = "pin"
    GUARD = "guard"


class MigrationKind(StrEnum):
    """`KVM_MIGRATION`: how a machine that runs moves to another host."""

    AUTO = "auto"
    LIVE = "live"
    COLD = "cold"


class ReturnKind(StrEnum):
    """`KVM_RETURN`: whether what stands elsewhere for a host comes back by itself."""

    ASKED = "asked"
    AUTO = "auto"


class LogLevel(StrEnum):
    """`KVM_LOG_LEVEL`: the lowest level that is logged."""

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
    """The text of a setting that is on or off."""

    OFF = "0"
    ON = "1"


@frozen(kw_only=True)
class Listen:
    """Where the HTTP server listens. Port 0 lets the kernel choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoints(text: str) -> tuple[str, ...]:
    """Members of etcd, as URLs separated by commas."""
    return tuple(endpoint(part.strip()) for part in text.split(","))


def endpoint(text: str) -> str:
    """One member of etcd, as a URL with its port."""
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


def absolute(text: str) -> Path:
    """An absolute path."""
    if not text.startswith("/") or not text.isprintable():
        raise Unfit("it is an absolute path")
    return Path(text)


def file(text: str) -> Path:
    """A file that can be read. The parser does not read it: it may be a pipe."""
    path = absolute(text)
    if not path.exists():
        raise Unfit("it names a file that exists")
    if path.is_dir() or not os.access(path, os.R_OK):
        raise Unfit("it names a file that can be read")
    return path


def program(text: str) -> str:
    """A program, by name or absolute path."""
    if "/" in text:
        return str(absolute(text))
    if not may_begin_a_word(text):
        raise Unfit("it is a program's name, which does not begin with '-', or its absolute path")
    return line(text)


def program_file(text: str) -> Path:
    """The path of a program, which may be installed later: the program is looked for when it is needed."""
    return absolute(text)


def line(text: str) -> str:
    """Text without control characters."""
    if not text.isprintable():
        raise Unfit("it is text without control characters")
    return text


def ceph_user(text: str) -> str:
    """A Ceph user's name, which is an argument of Ceph's tools and the name of a section in a keyring."""
    is_entity = text.startswith("client.")
    if not may_begin_a_word(text) or not text.isprintable() or set(text) & set(" []") or is_entity:
        raise Unfit("it is the name of a Ceph user without 'client.', without white space, not beginning with '-'")
    return text


def key_prefix(text: str) -> str:
    """The prefix of keys, without a slash at its end."""
    key = text.rstrip("/")
    if not re.fullmatch(r"(?:/[^/\s%]+)+", key) or not key.isprintable():
        raise Unfit("it is a key prefix such as /kvm: begins with '/', no '//', no white space, no '%'")
    return key


def lock(text: str) -> str:
    """The template of a lock's key."""
    wanted = f"it is a key that begins with '/' and holds {LOCK_PLACEHOLDER} (the id) once, such as /kvm/%i/lock"
    fits = re.fullmatch(r"(?:/[^/\s]+)+", text) and text.isprintable() and text.count("%") == 1
    if not fits or LOCK_PLACEHOLDER not in text:
        raise Unfit(wanted)
    return text


def address(text: str) -> str:
    """An IP address, or a host's name (which cannot look like a broken IPv4 address)."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if re.fullmatch(r"[0-9.]+", text) or ":" in text:
            raise Unfit("it is an IP address, such as 127.0.0.1 or ::1, or a host's name") from None
        return values.host_name(text)


def hostname(text: str) -> HostName:
    """The name of this host."""
    return HostName(values.host_name(text))


def run_dir(text: str) -> Path:
    """The run directory, short enough for the sockets below it."""
    path = absolute(text)
    if ".." in path.parts:
        raise Unfit("it is an absolute path without '..', such as /run/kvmsupervisor")
    room = SOCKET_PATH_LIMIT - len(f"/{'i' * LONGEST_ID}/{QMP_SPARE_SOCKET}")
    if len(os.fsencode(path)) > room:
        raise Unfit(f"its path has at most {room} bytes, or the sockets of instances would not fit below it")
    return path


def listen(text: str) -> Listen | None:
    """The address and port of the HTTP server; None for no server."""
    if text in {"", "off"}:
        return None
    wanted = "it is ADDRESS:PORT, such as 0.0.0.0:9746 or [::]:9746, or off"
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]+)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65_535:
        raise Unfit(wanted)
    try:
        return Listen(host=address(match[1] or match[2]), port=int(match[3]))
    except Unfit:
        raise Unfit(wanted) from None


def web_listen(text: str) -> Listen:
    """The address and port of `kvmsupervisor web`, which is there to listen."""
    found = listen(text)
    if found is None:
        raise Unfit("it is ADDRESS:PORT, such as 127.0.0.1:9747 or [::1]:9747")
    return found


_WEB_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,251}[a-z0-9])?")


def web_names(text: str) -> tuple[str, ...]:
    """Names by which browsers call `kvmsupervisor web`, separated by commas; `*` is any."""
    names = tuple(part.strip().lower() for part in text.split(","))
    if names != ("*",) and not all(map(_WEB_NAME.fullmatch, names)):
        raise Unfit("it is names separated by commas, without scheme and port, such as vms.example.org, or *")
    return names


def networks(text: str) -> tuple[str, ...]:
    """IP addresses and networks, separated by commas."""
    try:
        return tuple(str(ipaddress.ip_network(part.strip())) for part in text.split(","))
    except ValueError:
        raise Unfit("they are IP addresses or networks, separated by commas, such as 10.0.0.2,fd00::/64") from None


def web_url(text: str) -> str:
    """Where the page of a host answers the pages of others: with TLS, as both show certificates."""
    wanted = "it is https://NAME or https://NAME:PORT, without a path, such as https://node1.example.org:9747"
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise Unfit(wanted) from error
    fits = url.scheme == "https" and url.hostname and re.fullmatch(r"[!-~]+", text) and "@" not in url.netloc
    if not fits or url.path not in {"", "/"} or url.query or url.fragment or port == 0:
        raise Unfit(wanted)
    return f"https://{url.netloc}"


def migration_listen(text: str) -> Listen | None:
    """The address and port for live moves; None for none. Other hosts connect to it, so it is a certain one."""
    found = listen(text)
    if found is not None and found.host in {"0.0.0.0", "::"}:
        raise Unfit("it is the ADDRESS:PORT of this host that the other hosts reach, such as 10.0.0.5:9747, or off")
    return found


_SIZE = re.compile(r"([0-9]{1,12}) *([kmg]?)(?:i?b)?", re.IGNORECASE)
_LOG_MIN = 4096
_LOG_MAX = 1024**3


def log_size(text: str) -> int:
    """The size of a log, in bytes."""
    match = _SIZE.fullmatch(text)
    size = int(match[1]) * 1024 ** " kmg".index(match[2].lower() or " ") if match else 0
    if not _LOG_MIN <= size <= _LOG_MAX:
        raise Unfit("it is a number of bytes from 4K to 1G, such as 1M or 65536")
    return size


def ram_mib(text: str) -> int:
    """Memory in MiB, or 0."""
    return 0 if text == "0" else values.ram_mib(text)


def flags(text: str) -> AllowedFlags:
    """The options that `extra_flags` may hold."""
    if text == "any":
        return AllowedFlags()
    if text == "none":
        return AllowedFlags(frozenset())
    words = [word.strip().lstrip("-") for word in text.split(",")]
    if not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", word) for word in words):
        raise Unfit("it is any, none, or names of QEMU options separated by commas, such as device,netdev,cdrom")
    return AllowedFlags(frozenset(words))


def user(text: str) -> str:
    """The name of a user, or empty text."""
    if not re.fullmatch(r"(?:[A-Za-z_][A-Za-z0-9_.-]{0,31})?", text):
        raise Unfit("it is the name of a user, such as qemu, or empty")
    return text


def group(text: str) -> str:
    """The name or number of a group, or empty text."""
    if not re.fullmatch(r"(?:[A-Za-z_][A-Za-z0-9_.-]{0,31}|[0-9]{1,9})?", text):
        raise Unfit("it is the name of a group, such as kvmsupervisor-consoles, its number, or empty")
    return text


def paths(text: str) -> tuple[str, ...]:
    """Absolute paths, separated by commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if any(not path.startswith("/") or ".." in path.split("/") for path in found):
        raise Unfit("they are absolute paths without '..', separated by commas")
    return found


def uids(text: str) -> UidRange:
    """A range of the numbers of users and groups."""
    found = re.fullmatch(r"(\d{1,10})\s*-\s*(\d{1,10})", text)
    if found is None:
        raise Unfit("it is a range of user ids, first-last, such as 70000-79999")
    first, last = int(found[1]), int(found[2])
    if (said := trouble_with(first, last)) is not None:
        raise Unfit(said)
    return UidRange(first, last)


def switch(text: str) -> bool:
    """On (1) or off (0)."""
    return values.choice(Switch, "it")(text) is Switch.ON
