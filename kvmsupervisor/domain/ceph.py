"""Parsers for the output of Ceph's tools: images, their users, the blocklist, and errors.

Sources: rbd(8) and ceph(8) of Ceph 16 to 18 with `--format json`. A tool may print anything: what
is not understood raises `Unfit`, so no decision is based on a part of it.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from typing import NewType

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.records import Unfit
from kvmsupervisor.domain.values import show

Client = NewType("Client", str)
"""One client of Ceph, `IP:PORT/NONCE`, as `client_address` writes it. The nonce is drawn when a program connects to
the cluster, so it names one connection of one process, for good."""

EXCLUSIVE_LOCK = "exclusive-lock"

_TYPED = re.compile(r"(?:v1|v2|any):")
_CLIENT = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15})):([0-9]{1,5})/([0-9]{1,10})")


@frozen(kw_only=True)
class ImageInfo:
    """An RBD image.

    Attributes:
        size: bytes.
        features: as `rbd info` names them.
    """

    size: int
    features: frozenset[str]

    @property
    def has_exclusive_lock(self) -> bool:
        """Whether a frozen client leaves a trace in it (law 5)."""
        return EXCLUSIVE_LOCK in self.features


def leaves_no_trace(name: str) -> str:
    """Law 5: the message about an image without `exclusive-lock`."""
    return (
        f"the image {name} lacks the feature exclusive-lock, without which a frozen client leaves no trace: "
        f"`rbd feature enable {name} exclusive-lock`, or KVM_ALLOW_UNFENCED=1 on this host"
    )


PRIMARIES = "default"
"""The policy by which each read goes to the primary OSD of the object's placement group."""

READ_POLICY = "rbd_read_from_replica_policy"
"""The setting of librbd that names the policy."""

READ_POLICY_OF_IMAGE = f"conf_{READ_POLICY}"
"""What is set for one image is in its metadata (rbd(8), config image set)."""


def reads_replicas(name: str, policy: str) -> str:
    """Law 5: the message about an image of which replicas are read."""
    return (
        f"{READ_POLICY} is {policy} for the image {name}: a guest could read an object before a client that was shut "
        f"out writes to it for the last time. `rbd config image set {name} {READ_POLICY} {PRIMARIES}`, the same "
        "for the pool or in ceph.conf, or KVM_ALLOW_UNFENCED=1 on this host"
    )


class Trouble(Enum):
    """Why a tool failed; each kind needs another remedy."""

    AWAY = "the cluster does not answer"
    REFUSED = "the cluster refuses this client, or the client's settings are incomplete"
    NO_POOL = "there is no such pool"
    NO_NAMESPACE = "the pool has no such namespace"
    NO_IMAGE = "there is no such image"
    EXISTS = "there is one already"
    BUSY = "somebody has it open"
    OLD = "the cluster is older than Ceph 16"
    OTHER = "something else"


# --- addresses ------------------------------------------------------------------------------------------------


def client_address(text: str) -> Client:
    """The address of one client, in the form in which addresses are compared and given to `osd blocklist add`.

    A `v1:`, `v2:` or `any:` in front names the protocol; it is dropped, because the blocklist does not distinguish
    them, and the tool of Ceph 16 does not understand all three.

    Raises:
        Unfit: it is no such address, or it names a whole host: without a nonce, or with nonce 0, which stands for all
            clients and daemons of that address.
    """
    found = _CLIENT.fullmatch(_TYPED.sub("", text, count=1))
    if found is None:
        raise Unfit(f"{show(text)} is no address of one client, such as 192.0.2.7:0/3710147553")
    six, four, port, nonce = found.groups()
    try:
        address = ipaddress.ip_address(six or four)
    except ValueError as error:
        raise Unfit(f"{show(text)} begins with no IP address ({error})") from error
    # `int` drops leading zeros, as Ceph does.
    if int(port) > 65535 or int(nonce) >= 1 << 32:
        raise Unfit(f"{show(text)} has a port above 65535, or a nonce of more than 32 bits")
    if int(nonce) == 0:
        raise Unfit(f"{show(text)} has the nonce 0: it stands for everything at {address}, not for one client")
    host = f"[{address}]" if address.version == 6 else str(address)
    return Client(f"{host}:{int(port)}/{int(nonce)}")


# --- what the tools print -------------------------------------------------------------------------------------


def parse_info(data: bytes) -> ImageInfo:
    """Read `rbd info --format json`."""
    found = _object(_one(data))
    features = found.get("features")
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise Unfit(f"features are {show(str(features))}, not a list of names")
    size = found.get("size")
    if type(size) is not int or size < 0:
        raise Unfit(f"size is {show(str(size))}, not a number of bytes")
    return ImageInfo(size=size, features=frozenset(features))


@frozen
class SnapshotInfo:
    """A snapshot of an image: its bytes, whether it is kept from being removed, and when it was made, as Ceph says."""

    size: int
    is_protected: bool
    made: str = ""


def parse_id(data: bytes) -> str:
    """Read the id of an image in `rbd info --format json`: it stays when the image is renamed."""
    found = _object(_one(data)).get("id")
    if not isinstance(found, str) or not found:
        raise Unfit("it has no id")
    return found


def parse_snapshots(data: bytes) -> dict[str, SnapshotInfo]:
    """Read `rbd snap ls --format json`."""
    found = {}
    for entry in _list(_one(data)):
        one = _object(entry)
        name, size, protected = one.get("name"), one.get("size"), one.get("protected")
        if not isinstance(name, str) or type(size) is not int or protected not in {"true", "false"}:
            raise Unfit(f"the entry {show(str(entry))} has no name, no size, or does not say whether it is protected")
        found[name] = SnapshotInfo(size, protected == "true", str(one.get("timestamp", "")))
    return found


def parse_metadata(data: bytes) -> Mapping[str, str]:
    """Read `rbd image-meta list --format json`, which prints nothing where there is none."""
    if not data.strip():
        return {}
    return {name: value for name, value in _object(_one(data)).items() if isinstance(value, str)}


def parse_names(data: bytes) -> tuple[str, ...]:
    """Read `rbd ls --format json`: the images of a pool."""
    found = _list(_one(data))
    if not all(isinstance(name, str) for name in found):
        raise Unfit("it is no list of names")
    return tuple(map(str, found))


def parse_children(data: bytes) -> tuple[str, ...]:
    """Read `rbd children --format json`: the clones of a snapshot, as people name them."""
    found = []
    for entry in _list(_one(data)):
        one = _object(entry)
        pool, image = one.get("pool"), one.get("image")
        if not isinstance(pool, str) or not isinstance(image, str):
            raise Unfit(f"the entry {show(str(entry))} has no pool, or no image")
        found.append("/".join(filter(None, (pool, str(one.get("pool_namespace") or ""), image))))
    return tuple(found)


def parse_watchers(data: bytes) -> frozenset[Client]:
    """Read `rbd status --format json`: the clients that have the image open for writing."""
    watchers = _object(_one(data)).get("watchers")
    if not isinstance(watchers, list):
        raise Unfit("it has no list of watchers")
    return frozenset(_addresses(watchers, "address"))


@frozen
class HeldLock:
    """A lock of an image, as `rbd lock ls` names it, and whose it is."""

    name: str
    locker: str
    client: Client

    @property
    def is_exclusive(self) -> bool:
        """Whether it is librbd's own lock for `exclusive-lock`; others are people's (`rbd lock add`)."""
        return bool(_AUTOMATIC.fullmatch(self.name) and _LOCKER.fullmatch(self.locker))


_AUTOMATIC, _LOCKER = re.compile(r"auto [0-9]+"), re.compile(r"client\.[0-9]+")


def parse_locks(data: bytes) -> tuple[HeldLock, ...]:
    """Read `rbd lock ls --format json`: who holds the image's exclusive lock, or did not release it."""
    found = []
    for entry in _list(_one(data)):
        one = _object(entry)
        name, locker, address = one.get("id"), one.get("locker"), one.get("address")
        if not isinstance(name, str) or not isinstance(locker, str) or not isinstance(address, str):
            raise Unfit(f"the entry {show(str(entry))} has no id, no locker, or no address")
        found.append(HeldLock(name, locker, client_address(address)))
    return tuple(found)


def parse_read_policy(data: bytes) -> str:
    """Read `rbd config image ls --format json`: from which OSDs the image's objects are read.

    Ceph 16 and newer list each setting of librbd, whether it is set for the image, its pool, the client, or not at all.
    One that is not listed is not known to this librbd, which reads from primaries then.
    """
    for entry in _list(_one(data)):
        if _object(entry).get("name") == READ_POLICY:
            value = _object(entry).get("value")
            if not isinstance(value, str):
                raise Unfit(f"{READ_POLICY} is {show(str(value))}, not a word")
            return value
    return PRIMARIES


def parse_blocklist(data: bytes) -> Mapping[Client, datetime]:
    """Read `ceph osd blocklist ls --format json`: each fenced client, and until when by the monitors' clock.

    Since Ceph 16.2 there are two lists, the second one of address ranges. Ranges and entries for whole hosts are not
    ours, and prove nothing of one client: they are left out.
    """
    first = next(_documents(data), None)
    if first is None:
        raise Unfit("it is empty")
    found: dict[Client, datetime] = {}
    for entry in _list(first):
        address, until = _object(entry).get("addr"), _object(entry).get("until")
        if not isinstance(address, str) or not isinstance(until, str):
            raise Unfit(f"the entry {show(str(entry))} has no address, or no time")
        try:
            client = client_address(address)
        except Unfit:
            continue
        found[client] = _time(until)
    return found


_ADDED = re.compile(r"^blocklisting \S+ until (\S+)", re.MULTILINE)


def parse_added(stderr: str) -> datetime:
    """Read the words of `ceph osd blocklist add`: until when a new entry lasts."""
    found = _ADDED.search(stderr)
    if found is None:
        raise Unfit(f"{show(stderr)} does not say until when")
    return _time(found[1])


def parse_keyring(text: str, entity: str) -> str:
    """The key of `entity` (`client.NAME`) in a keyring file, base64 as it stands there.

    Raises:
        Unfit: it is missing, or no key. The message does not repeat it.
    """
    section, key = None, None
    for line in text.splitlines():
        word = line.strip()
        if word.startswith("[") and word.endswith("]"):
            section = word[1:-1].strip()
        name, equals, value = word.partition("=")
        if section == entity and equals and name.strip() == "key":
            key = value.strip()
    if key is None:
        raise Unfit(f"it has no key of [{entity}]")
    try:
        # Type, time and length precede the key itself (CryptoKey, 12 bytes).
        sound = len(base64.b64decode(key, validate=True)) > 12
    except binascii.Error:
        sound = False
    if not sound:
        raise Unfit(f"the key of [{entity}] is not what `ceph auth get-key` prints")
    return key


def keyring_paths(text: str) -> tuple[str, ...]:
    """Read `ceph-conf --show-config-value keyring`: the files that a client reads, in order."""
    return tuple(path for path in re.split(r"[,;\s]+", text) if path)


# --- what the tools complain about ----------------------------------------------------------------------------

_UNKNOWN_CLIENT = "its key is wrong, or the cluster has no such client"
_ABSENT = "its keyring is not there, or no ceph.conf names the monitors"

_WORDS: tuple[tuple[str, Trouble, str], ...] = (
    # These come from a cluster that let the client in; the names in them may hold any words, so they are matched first.
    ("error opening pool", Trouble.NO_POOL, "there is no such pool"),
    ("rbd: namespace '", Trouble.NO_NAMESPACE, "there is no such namespace of the pool (`rbd namespace create`)"),
    ("error opening image", Trouble.NO_IMAGE, "there is no such image"),
    ("failed to find snapshot", Trouble.NO_IMAGE, "there is no such snapshot"),
    ("failed to open parent image", Trouble.NO_IMAGE, "there is no such image"),
    ("error opening source image", Trouble.NO_IMAGE, "there is no such image"),
    ("setting snapshot context", Trouble.NO_IMAGE, "there is no such snapshot"),
    ("delete error", Trouble.NO_IMAGE, "there is no such image"),
    # The cause before its consequences. A client that was refused had a key, wherever else the tool looked for one.
    ("allowed_methods", Trouble.REFUSED, _UNKNOWN_CLIENT),
    ("rados permission denied", Trouble.REFUSED, _UNKNOWN_CLIENT),
    ("find a keyring", Trouble.REFUSED, "its keyring is not there, or not to be read"),
    ("no keyring found", Trouble.REFUSED, "its keyring is not there, or not to be read"),
    ("unable to open config file", Trouble.REFUSED, "ceph.conf is not there, or not to be read"),
    ("unable to get monitor info", Trouble.REFUSED, "no ceph.conf names the monitors"),
    ("conf_read_file", Trouble.REFUSED, "ceph.conf is not there, or not to be read"),
    ("timed out", Trouble.AWAY, "the monitors are away, or have no quorum"),
    ("access denied", Trouble.REFUSED, "its capabilities do not allow it"),
    ("permission denied", Trouble.REFUSED, "its capabilities do not allow it"),
    ("not permitted", Trouble.REFUSED, "its capabilities do not allow it"),
    # For a tool that ended before its log was written.
    ("object not found (error connecting", Trouble.REFUSED, _ABSENT),
)
_STATUS = {1: Trouble.REFUSED, 13: Trouble.REFUSED, 16: Trouble.BUSY, 17: Trouble.EXISTS}
_AWAY_STATUS = {101, 107, 110, 111, 113}
"""ENETUNREACH, ENOTCONN, ETIMEDOUT, ECONNREFUSED, EHOSTUNREACH."""

_ENOENT = 2
_EINVAL = 22
_ONLY_IF_ABSENT = {Trouble.NO_POOL, Trouble.NO_NAMESPACE, Trouble.NO_IMAGE}

_STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\S+ \S+ +-?\d+ ")


def trouble(status: int, stderr: str) -> tuple[Trouble, str]:
    """The meaning of a tool's exit status and words: the kind, and the cause in plain words if it is known.

    `rbd` exits with the errno of the failed step, and names the step. `ceph` does so for answers of the monitors, and
    exits with 1 for an earlier failure. "No such file" alone may be an image or a keyring.
    """
    if status in _AWAY_STATUS:
        return Trouble.AWAY, "the cluster is away, or has no quorum"
    low = stderr.lower()
    for words, kind, cause in _WORDS:
        if words in low and (kind not in _ONLY_IF_ABSENT or status == _ENOENT):
            return kind, cause
    if "couldn't connect to the cluster" in low:
        return Trouble.REFUSED, _ABSENT if status == _ENOENT else _UNKNOWN_CLIENT
    if status == _EINVAL and "osd blacklist" in low:
        return Trouble.OLD, "it has no `osd blocklist`"
    return _STATUS.get(status, Trouble.OTHER), ""


def last_words(stderr: str) -> str:
    """The line of a tool's complaints for people: the last one, without time and thread."""
    lines = [_STAMP.sub("", line).strip() for line in stderr.splitlines()]
    # `ceph` explains after "Error", `rbd` begins its own line with its name.
    told = [line for line in lines if line.startswith(("rbd: ", "Error ", "[errno"))]
    return next(reversed(told or [line for line in lines if line]), "")[:300]


# --- inside ---------------------------------------------------------------------------------------------------


def _documents(data: bytes) -> Iterator[object]:
    """The JSON documents that stand one behind the other."""
    decoder = json.JSONDecoder()
    try:
        text = data.decode().strip()
        while text:
            found, end = decoder.raw_decode(text)
            yield found
            text = text[end:].strip()
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is not JSON ({error})") from error


def _one(data: bytes) -> object:
    found = list(_documents(data))
    if len(found) != 1:
        raise Unfit(f"it holds {len(found)} JSON documents, not one")
    return found[0]


def _object(found: object) -> Mapping[str, object]:
    if not isinstance(found, dict):
        raise Unfit(f"{show(str(found))} is no JSON object")
    return found


def _list(found: object) -> list[object]:
    if not isinstance(found, list):
        raise Unfit(f"{show(str(found))} is no JSON list")
    return found


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise Unfit(f"{show(text)} is no time") from error
    if found.tzinfo is None:
        raise Unfit(f"{show(text)} has no time zone")
    return found


def _addresses(entries: list[object], name: str) -> Iterator[Client]:
    for entry in entries:
        address = _object(entry).get(name)
        if not isinstance(address, str):
            raise Unfit(f"the entry {show(str(entry))} has no address")
        yield client_address(address)
