"""The image library, and what a new disk begins with (`from=`). Pure.

An image is a key, `/kvm/.images/<name>`: its URL, its SHA-256, and its format where the URL's ending does not tell
that. It is known everywhere by its content, not by its name: what is kept of it on hosts and in Ceph is named after the
sum and the format, so another URL with the same content is the same image, and another content never stands for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import ID_PATTERN, ID_RULE, InstanceId
from kvmsupervisor.domain.local_disk import SCHEME, DiskFormat, file_name
from kvmsupervisor.domain.media import media_url
from kvmsupervisor.domain.values import Unfit, show

PACKED = ("gz", "xz", "zst", "bz2", "zip", "tar", "tgz", "7z")
"""Endings of files that hold an image packed. None is unpacked here."""

LIBRARY_PREFIX, LIBRARY_SNAPSHOT = "kvm-image-", "image"
ASIDE_PREFIX = "kvm-new-"
LIBRARY_NAMESPACE = "kvm-images"
"""Where images of the library are for disks in a namespace: their guests read it, and have no right to the namespace
without a name, where other guests' disks may be."""

_FORMATS = {"iso": "raw"}
"""Formats by other endings: a medium's file holds its bytes."""

_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
_RBD_NAME = r"[^-/@\s\x00-\x1f\x7f][^/@\s\x00-\x1f\x7f]*"
_SNAPSHOT = re.compile(f"({_RBD_NAME})/(?:({_RBD_NAME})/)?({_RBD_NAME})@({_RBD_NAME})")


@frozen(kw_only=True)
class Image:
    """One entry of the library.

    Attributes:
        name: its key's.
        url: where its file is.
        sha256: of the file, in lower case.
        format: of the file.
    """

    name: str
    url: str
    sha256: str
    format: DiskFormat

    @property
    def content(self) -> str:
        """What names its content: the same bytes read as another format are another disk."""
        return f"{self.sha256}-{self.format.value}"


@frozen
class Snapshot:
    """A snapshot of an image in Ceph."""

    pool: str
    image: str
    snap: str
    namespace: str = ""

    def __str__(self) -> str:
        return f"{'/'.join(filter(None, (self.pool, self.namespace, self.image)))}@{self.snap}"


def parent_of(image: Image, pool: str, *, apart: bool = False) -> Snapshot:
    """Where an image of the library is in a pool: the snapshot of which its clones are made.

    The image has this name once it is whole and its snapshot is protected.

    Args:
        image: of the library.
        pool: where it is, or is to be.
        apart: whether it is for disks in a namespace.
    """
    namespace = LIBRARY_NAMESPACE if apart else ""
    return Snapshot(pool, f"{LIBRARY_PREFIX}{image.content}", LIBRARY_SNAPSHOT, namespace=namespace)


def aside_of(name: str) -> str:
    """What the name of an image begins with that is being made and is to be called `name`; the rest nobody else has.

    As short for every name: Ceph's names have at most 96 characters (RBD_MAX_IMAGE_NAME_SIZE).
    """
    return f"{ASIDE_PREFIX}{hashlib.sha256(name.encode()).hexdigest()[:16]}-"


def image_name(text: str) -> str:
    """The name of an image of the library, checked."""
    if not ID_PATTERN.fullmatch(text) or ".." in text:
        raise Unfit(f"the name of an image of the library is {ID_RULE}, without '..'")
    return text


def parse_image(name: str, value: str) -> Image:
    """Read an entry of the library.

    Raises:
        Unfit: it is none. The message repeats nothing of the URL, which may hold a password.
    """
    url, *words = value.split() or [""]
    try:
        parsed = media_url(url)
    except Unfit as unfit:
        raise Unfit(f"{unfit}, then sha256=…") from unfit
    given: dict[str, str] = {}
    for word in words:
        option, _, text = word.partition("=")
        if option not in {"sha256", "format"}:
            raise Unfit(f"behind the URL stand sha256=… and format=…, separated by spaces; {show(option)} is neither")
        if option in given:
            raise Unfit(f"each option is given once, {option} is there twice")
        given[option] = text
    if not _SHA256.fullmatch(given.get("sha256", "")):
        raise Unfit("behind the URL stands sha256=… with the 64 hexadecimal digits that `sha256sum` prints of the file")
    ending = parsed.path.rpartition("/")[2].rpartition(".")[2].lower()
    return Image(name=name, url=url, sha256=given["sha256"].lower(), format=_format(ending, given.get("format")))


def _format(ending: str, said: str | None) -> DiskFormat:
    if ending in PACKED:
        raise Unfit(f"the file is packed (.{ending}), and nothing is unpacked here: give the URL of the unpacked image")
    try:
        return DiskFormat(_FORMATS.get(ending, ending) if said is None else said)
    except ValueError:
        wanted = "format=qcow2 or format=raw"
        if said is not None:
            raise Unfit(f"the format of an image is {wanted}; {show(said)} is neither") from None
        raise Unfit(f"the URL's ending does not tell the format: add {wanted} (`qemu-img info` tells which)") from None


# --- what a disk begins with ----------------------------------------------------------------------------------


def origin(text: str) -> str:
    """What stands behind `from=`, checked: an image of the library, a snapshot in Ceph, or a file of the host."""
    if (file := local_file_of(text)) is not None:
        return f"{SCHEME}{file_name(file)}"
    if "/" not in text and "@" not in text:
        return image_name(text)
    if _SNAPSHOT.fullmatch(text) is None or not text.isprintable():
        raise Unfit(
            "from= is the name of an image of the library, a snapshot in Ceph, POOL/IMAGE@SNAP or "
            "POOL/NAMESPACE/IMAGE@SNAP, no name beginning with '-', or another disk of the host, file:NAME"
        )
    return text


def local_file_of(text: str) -> str | None:
    """The name of the disk's file that `from=` names; None for an image of the library, or a snapshot."""
    return text.removeprefix(SCHEME) if text.startswith(SCHEME) else None


def is_of_library(text: str) -> bool:
    """Whether a checked `from=` names an image of the library."""
    return local_file_of(text) is None and snapshot_of(text) is None


def snapshot_of(text: str) -> Snapshot | None:
    """The snapshot that a checked `from=` names; None for an image of the library."""
    found = _SNAPSHOT.fullmatch(text)
    return None if found is None else Snapshot(found[1], found[3], found[4], namespace=found[2] or "")


def missing(snapshot: Snapshot) -> str:
    """What to say of a snapshot that is not there; one of a machine may be on its way."""
    name = snapshot.snap.removeprefix("kvm-")
    made = f"`rbd snap create {snapshot}` makes one"
    if name != snapshot.snap:
        made = f"`kvmsupervisor snapshot create ID {name}` has one taken of the machine that has the image"
    return f"there is no such snapshot, or not yet: {made}"


def note_of(instance: InstanceId, text: str, *, mark: str = "") -> str:
    """What is kept beside a disk that was made for an instance: whose it is, and what it began with.

    Args:
        instance: whose.
        text: what it began with, one word.
        mark: a word that no other disk has, by which it is known again; empty for none.
    """
    return " ".join(filter(None, (instance, text, mark)))


def refusal(key: str, disk: str, text: str, instance: InstanceId, note: str | None) -> str | None:
    """Why `from=` is not for a disk that is there already; None where the disk was made for this instance.

    Args:
        key: of the disk.
        disk: its name.
        text: what `from=` says.
        instance: whose key it is.
        note: what is kept beside the disk, None for nothing.
    """
    owner = (note or "").partition(" ")[0]
    if owner == instance:
        return None
    found = f"was made for instance {owner}" if owner else "was not made by this key"
    return (
        f"{key}: from={text} is what a new disk begins with, and {disk} is there already and {found}; nothing was "
        "written to it: leave from= out to use the disk as it is, or name another disk"
    )


def remark(key: str, disk: str, text: str, note: str | None) -> str | None:
    """What to say of a disk that was made for this instance and began with something else; None otherwise."""
    _, began, *_ = [*(note or "").split(" "), "", ""]
    if not began or began == text:
        return None
    return f"{key}: {disk} began with {began}; from={text} is for a new disk only, and this one is left as it is"


def leftover(key: str, disk: str, instance: InstanceId, note: str | None) -> str | None:
    """What to say of a disk that is there when its machine begins, because an earlier machine of that id has left it.

    None where it was made by something else, which `refusal` is about.
    """
    owner, began, *_ = [*(note or "").split(" "), "", ""]
    if owner != instance:
        return None
    return (
        f"{key}: {disk} was there already, made of {began} for {instance} before, and is used as it is, with all that "
        "is on it: for a fresh one remove it while the machine is off, or name another disk"
    )


def users_of(name: str, origins: Mapping[InstanceId, Mapping[str, str]]) -> dict[InstanceId, tuple[str, ...]]:
    """The keys that name an image, by instance.

    Args:
        name: of the image.
        origins: what stands behind `from=`, by instance and key.
    """
    found = {instance: tuple(key for key, text in keys.items() if text == name) for instance, keys in origins.items()}
    return {instance: keys for instance, keys in found.items() if keys}
