"""User data for a guest's first boot: its kind, and the files of its medium.

Sources: cloud-init's pages on user-data formats, NoCloud and ConfigDrive (https://docs.cloud-init.io); Ignition's
specification (https://coreos.github.io/ignition/specs/); cloudbase-init's page on user data.

User data may hold secrets and messages are public, so no message repeats a word of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from enum import StrEnum
from urllib.parse import SplitResult, urlsplit, urlunsplit
from uuid import UUID, uuid5

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.secrecy import hidden_url
from kvmsupervisor.domain.values import Unfit

NOCLOUD_LABEL = "cidata"
CONFIG_DRIVE_LABEL = "config-2"
IGNITION_FW_CFG = "opt/com.coreos/config"
"""The names under which guests look for their data."""

HEAD_BYTES = 4096
"""Where cloud-init looks for `MIME-Version:`, from the beginning."""

UNPACKED_BYTES = 65_536
"""How much of gzip to unpack to see its kind. Arbitrary: the first line shows the kind."""

WANTED = (
    "user data begins with #cloud-config, #! or another beginning that cloud-init knows, "
    "is a MIME multi-part message, or is Ignition JSON"
)

_GZIP = b"\x1f\x8b"
_DAMAGED_GZIP = ("gzip that is damaged", "pack the user data again, or leave it unpacked")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_IGNITION_VERSION = re.compile(r"[23]\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]+)?")
_BUTANE = re.compile(rb"^variant:[ \t]", re.MULTILINE)
_YAML_KEY = re.compile(rb"^[A-Za-z_][A-Za-z0-9_-]*:(?:[ \t\r]|$)", re.MULTILINE)
_VISIBLE_ASCII = re.compile(r"[!-~]+")


class MediumKind(StrEnum):
    """The kind of user data. All but Ignition goes on media unchanged; its reader in the guest decides again."""

    CLOUD_CONFIG = "cloud-config"
    SCRIPT = "shell script"
    MULTIPART = "MIME multi-part"
    OTHER = "cloud-init data"
    IGNITION = "Ignition"


_BEGINNINGS = (
    # The longer first. cloud-init compares in lower case, behind white space.
    (b"#cloud-config-archive", MediumKind.OTHER),
    (b"#cloud-config-jsonp", MediumKind.OTHER),
    (b"#cloud-config", MediumKind.CLOUD_CONFIG),
    (b"#cloud-boothook", MediumKind.OTHER),
    (b"#include", MediumKind.OTHER),
    (b"#part-handler", MediumKind.OTHER),
    (b"#upstart-job", MediumKind.OTHER),
    (b"## template: jinja", MediumKind.OTHER),
    (b"#!", MediumKind.SCRIPT),
    # cloudbase-init, for Windows, which reads the config-drive: PowerShell and batch files.
    (b"#ps1", MediumKind.OTHER),
    (b"rem cmd", MediumKind.OTHER),
)


class NotUserData(Unfit):
    """Bytes that are no user data.

    Attributes:
        found: what they are.
        wanted: what would be right.
    """

    def __init__(self, found: str, wanted: str = WANTED) -> None:
        super().__init__(f"found {found}; {wanted}")
        self.found = found
        self.wanted = wanted


def detect(data: bytes) -> MediumKind:
    """Tell what kind of user data this is.

    Raises:
        NotUserData: it is none. There is no other error, whatever the bytes.
    """
    if data.startswith(_GZIP):
        return _detect_in_gzip(data)
    text = _text(data)
    if text.startswith((b"{", b"[")):
        return _ignition(data)
    kind = _recognised(text)
    if kind is None:
        raise _stranger(data, text)
    if kind is MediumKind.CLOUD_CONFIG:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            found = f"cloud-config that is not UTF-8 at byte {error.start}"
            raise NotUserData(found, "cloud-config is YAML in UTF-8") from None
    return kind


def user_data(text: str) -> bytes:
    """User data that a key holds, as the guest gets it: with a line feed at its end, which etcd's values have not.

    Raises:
        NotUserData: it is none.
    """
    if "\0" in text:
        raise NotUserData("a NUL character", "user data in a key is text")
    if "\n" not in text and text.startswith(("http://", "https://", "file:///")):
        raise NotUserData("a URL", "a URL belongs into the key cloud-config; this one holds the user data itself")
    data = f"{text}\n".encode()
    detect(data)
    return data


def _detect_in_gzip(data: bytes) -> MediumKind:
    """cloud-init unpacks gzip itself, so gzip is passed on unchanged; Ignition does not unpack it."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        head = unpacker.decompress(data, UNPACKED_BYTES)
    except zlib.error:
        raise NotUserData(*_DAMAGED_GZIP) from None
    if len(head) < UNPACKED_BYTES and not unpacker.eof:
        raise NotUserData(*_DAMAGED_GZIP)
    try:
        text = _text(head)
        if _recognised(text) is None:
            raise _stranger(head, text)
    except NotUserData as error:
        raise NotUserData(f"gzip with {error.found} in it", error.wanted) from None
    return MediumKind.OTHER


def _text(data: bytes) -> bytes:
    """`data` without white space in front."""
    if data.startswith(_BYTE_ORDER_MARK):
        raise NotUserData("a byte order mark at the beginning", "save the file as UTF-8 without one")
    text = data.lstrip()
    if not text:
        raise NotUserData("white space only" if data else "nothing, 0 bytes")
    return text


def _recognised(text: bytes) -> MediumKind | None:
    head = text[:HEAD_BYTES].lower()
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    return MediumKind.MULTIPART if b"mime-version:" in head else None


def _ignition(data: bytes) -> MediumKind:
    wanted = 'Ignition JSON is an object with {"ignition": {"version": "3.…"}}; cloud-config begins with #cloud-config'
    try:
        found = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise NotUserData(f"JSON that is not UTF-8 at byte {error.start}", wanted) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise NotUserData(f"JSON that is damaged ({where})", wanted) from None
    except (ValueError, RecursionError):
        # A number of thousands of digits, or thousands of brackets.
        raise NotUserData("JSON that cannot be read", wanted) from None
    if not isinstance(found, dict):
        raise NotUserData("JSON that is not an object", wanted)
    if "ignitionVersion" in found:
        raise NotUserData("Ignition JSON of version 1", "convert it to version 3")
    ignition = found.get("ignition")
    version = ignition.get("version") if isinstance(ignition, dict) else None
    if version is None:
        raise NotUserData("JSON without ignition.version", wanted)
    if not isinstance(version, str) or not _IGNITION_VERSION.fullmatch(version):
        raise NotUserData("Ignition JSON of an unknown version", "ignition.version is text such as 3.4.0")
    return MediumKind.IGNITION


def _stranger(data: bytes, text: bytes) -> NotUserData:
    """Name the usual mistakes."""
    head = text[:HEAD_BYTES].lower()
    if head.startswith((b"{", b"[")):
        return NotUserData("JSON", "Ignition JSON is given as it is, not packed")
    if head.startswith((b"<!doctype html", b"<html")):
        return NotUserData("an HTML page", f"see whether the URL leads to the file itself: {WANTED}")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return NotUserData(f"{len(data)} bytes that are no text (not UTF-8 at byte {error.start})")
    if _BUTANE.search(text):
        return NotUserData("Butane YAML", "make Ignition JSON of it with the program butane")
    if b"#cloud-config" in text:
        return NotUserData("#cloud-config behind other lines", "it is the first line")
    if _YAML_KEY.search(text):
        return NotUserData("YAML without a first line that says what it is", "cloud-config begins with #cloud-config")
    return NotUserData(f"text of {len(data)} bytes with an unknown beginning")


def instance_id(uuid: UUID, data: bytes) -> UUID:
    """The id by which cloud-init recognises a first boot: it depends on the machine and the user data.

    Both media carry the same one, in the form of a uuid, as a config-drive needs it.
    """
    return uuid5(uuid, hashlib.sha256(data).hexdigest())


def nocloud(instance: InstanceId, uuid: UUID, data: bytes, network_config: bytes | None = None) -> dict[str, bytes]:
    """Files of the NoCloud medium, whose label is `cidata`."""
    # A JSON string is a YAML string, too; without quotes an id such as `1` would be a number.
    meta_data = f"instance-id: {instance_id(uuid, data)}\nlocal-hostname: {json.dumps(instance)}\n"
    files = {"meta-data": meta_data.encode(), "user-data": data}
    return files if network_config is None else files | {"network-config": network_config}


def config_drive(instance: InstanceId, uuid: UUID, data: bytes) -> dict[str, bytes]:
    """Files of the config-drive, whose label is `config-2`."""
    meta_data = {"uuid": str(instance_id(uuid, data)), "hostname": instance, "name": instance}
    latest = "openstack/latest"
    return {f"{latest}/meta_data.json": json.dumps(meta_data).encode(), f"{latest}/user_data": data}


def media_url(text: str) -> SplitResult:
    """Parse the URL of user data.

    Raises:
        Unfit: it is no such URL; the text repeats nothing of it, because it may hold a password.
    """
    wanted = "it is a URL: http://HOST/PATH, https://HOST/PATH or file:///PATH"
    if not _VISIBLE_ASCII.fullmatch(text):
        raise Unfit(f"{wanted}, in visible ASCII characters, others as %XX")
    try:
        url = urlsplit(text)
        fits = url.port != 0
    except ValueError:
        raise Unfit(f"{wanted}; special characters in a user's name or password are written as %XX") from None
    remote = url.scheme in {"http", "https"} and url.hostname
    local = url.scheme == "file" and url.netloc in {"", "localhost"} and url.path.startswith("/")
    if not fits or not (remote or local):
        raise Unfit(wanted)
    return url


def without_user(text: str) -> str:
    """A URL without user and password: it leads to the same data."""
    try:
        url = media_url(text)
    except Unfit:
        return text
    return urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))


def shown_url(text: str) -> str:
    """A URL for messages, without what may be secret: user, password, and the query, which may hold a token."""
    try:
        url = media_url(text)
    except Unfit:
        return hidden_url(text)
    user, _, host = url.netloc.rpartition("@")
    if ":" in url.netloc and "@" in url.path + url.query + url.fragment:
        # A password with /, ? or # that is not written as %XX: the text before it looks like host, or host and port.
        return hidden_url(text)
    shown = urlunsplit((url.scheme, f"…@{host}" if user else host, url.path, "", ""))
    return f"{shown}?…" if url.query else shown
