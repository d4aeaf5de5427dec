"""A guest's boot media: fetches user data, keeps a copy, and makes the files that QEMU attaches.

    <directory>/user-data       the last usable user data; for root only
    <directory>/media.json      its URL (a digest), if any, and a digest of what the files below were made from
    <directory>/seed.iso        NoCloud, label cidata          } for all but Ignition
    <directory>/config-2.iso    config-drive, label config-2 }
    <directory>/ignition.json   for QEMU's fw_cfg `opt/com.coreos/config`

Crash-safe: each file is replaced in one step. `media.json` first drops the digest of the files and gets the new one
last of all; files without a digest are made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from kvmsupervisor.adapters import medium
from kvmsupervisor.adapters.resources import explain
from kvmsupervisor.domain import media
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.media import MediumKind, NotUserData
from kvmsupervisor.domain.secrecy import cleaned, secrets_of_url

USER_DATA = "user-data"
LEDGER = "media.json"
SEED = "seed.iso"
CONFIG_DRIVE = "config-2.iso"
IGNITION = "ignition.json"
FOR_QEMU = (SEED, CONFIG_DRIVE, IGNITION)
ALL = (LEDGER, USER_DATA, *FOR_QEMU)

EDITION = 1
"""Version of the content of the media. Increase it with every change: media of an earlier edition are made again."""

T = TypeVar("T")


class MediaTrouble(Exception):
    """There are no media for this start: wait and try again. The message says what was found and what is right."""


@frozen(kw_only=True)
class Media:
    """The files that QEMU attaches.

    Attributes:
        cdroms: ISO images, attached as read-only disks.
        ignition: file of the fw_cfg item `opt/com.coreos/config`, or None.
        notice: what people should know, such as that the kept copy was used; None for nothing.
    """

    cdroms: tuple[Path, ...]
    ignition: Path | None
    notice: str | None


NONE = Media(cdroms=(), ignition=None, notice=None)
"""Without user data."""

OF_KEY = "the key user-data"
"""Instead of a URL, in `media.json`."""


@frozen(kw_only=True)
class _Files:
    """The content of the media, before any file is made: images are made only when they are needed."""

    images: Mapping[str, tuple[str, Mapping[str, bytes]]] = field(default_factory=dict)
    plain: Mapping[str, bytes] = field(default_factory=dict)

    def recipe(self) -> str:
        """A digest of everything that goes into the files."""
        digest = hashlib.sha256(repr(EDITION).encode())
        for name, (label, files) in sorted(self.images.items()):
            digest.update(repr((name, label, sorted(files.items()))).encode())
        digest.update(repr(sorted(self.plain.items())).encode())
        return digest.hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in FOR_QEMU if name in self.images or name in self.plain)


@frozen(kw_only=True)
class _Ledger:
    """`media.json`.

    Invariant: the digest of `user-data` is in `sources` at any time. While the file is replaced, both digests are.

    Attributes:
        recipe: a digest of what the files for QEMU were made from; empty while they are being made.
        sources: the digest of the URL, or of `OF_KEY`, by the digest of the user data that came from it.
    """

    recipe: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> _Ledger:
        try:
            found = json.loads(medium.read(directory / LEDGER) or b"{}")
            return cls(recipe=str(found["recipe"]), sources={str(k): str(v) for k, v in found["sources"].items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()

    def write(self, directory: Path) -> None:
        written = json.dumps({"recipe": self.recipe, "sources": dict(self.sources)})
        medium.place(directory / LEDGER, written.encode())


async def furnish(
    url: str,
    *,
    directory: Path,
    instance: InstanceId,
    uuid: UUID,
    file_root: Path | None,
    ca_file: Path | None = None,
    follow_inward: bool = False,
    timeout_s: float | None = None,
    network_config: bytes | None = None,
) -> Media:
    """Make the media for one start. Only one call at a time for each directory.

    When the user data cannot be fetched, or is unusable, the copy of the last start from the same URL is used, and the
    notice says so. When nothing changed, nothing is written: the files of a running QEMU stay as they are.

    Cancellation takes effect once the files are complete, within milliseconds.

    Args:
        url: the value of the key `cloud-config`.
        directory: the instance's folder in the run directory; it exists.
        instance: becomes the guest's host name.
        uuid: the machine's uuid.
        file_root: folder below which `file:` URLs are allowed; None for nowhere.
        ca_file: CA certificates in addition to the system's.
        follow_inward: whether to follow redirects to addresses of this host.
        timeout_s: for the fetch, in seconds; None for its default.
        network_config: this file of the NoCloud medium; None for no such file.

    Raises:
        MediaTrouble: there is neither usable user data nor a copy, or the files cannot be written.
    """
    # Imported here: a supervisor starts sooner without HTTP, and may have no guest with user data.
    from kvmsupervisor.adapters.fetch import TIMEOUT_S, FetchFailed, fetch  # noqa: PLC0415

    limit_s = TIMEOUT_S if timeout_s is None else timeout_s
    # A server may repeat the secrets of the URL.
    shown, secrets = media.shown_url(url), secrets_of_url(url)
    source = _digest(media.without_user(url).encode())
    notice = None
    try:
        try:
            data = await fetch(
                url, file_root=file_root, ca_file=ca_file, timeout_s=limit_s, follow_inward=follow_inward
            )
            kind = media.detect(data)
        except (FetchFailed, NotUserData) as error:
            kept = await _in_thread(lambda: _kept(directory, source))
            if kept is None:
                raise
            data, kind = kept, media.detect(kept)
            why = cleaned(str(error), secrets)
            notice = f"cloud-config {shown}: {why}; until then the copy that the last start had is used"
        files = _files(kind, instance, uuid, data, network_config)
        await _in_thread(lambda: _write(directory, data=data, source=source, files=files))
    except (FetchFailed, NotUserData) as error:
        raise MediaTrouble(f"cloud-config {shown}: {cleaned(str(error), secrets)}") from error
    except OSError as error:
        raise MediaTrouble(f"cloud-config {shown}: its media cannot be made: {explain(error, directory)}") from error
    return _made(kind, directory, files, notice)


async def keep(data: bytes, *, directory: Path, instance: InstanceId, uuid: UUID) -> Media:
    """Make the media for one start of user data that is at hand, from the key `user-data`.

    The arguments, and what holds, are those of `furnish`.

    Raises:
        MediaTrouble: the files cannot be written.
    """
    kind = media.detect(data)
    files = _files(kind, instance, uuid, data, None)
    try:
        await _in_thread(lambda: _write(directory, data=data, source=_digest(OF_KEY.encode()), files=files))
    except OSError as error:
        raise MediaTrouble(f"user-data: its media cannot be made: {explain(error, directory)}") from error
    return _made(kind, directory, files, None)


def _made(kind: MediumKind, directory: Path, files: _Files, notice: str | None) -> Media:
    paths = [directory / name for name in files.names]
    if kind is MediumKind.IGNITION:
        return Media(cdroms=(), ignition=paths[0], notice=notice)
    return Media(cdroms=tuple(paths), ignition=None, notice=notice)


def put(directory: Path, name: str, data: bytes) -> None:
    """Write a medium that another host has made.

    Raises:
        OSError: it cannot be written.
        ValueError: it is none.
    """
    if name not in {SEED, CONFIG_DRIVE, IGNITION}:
        raise ValueError(f"{name} is no medium")
    aside = directory / f"{name}.new"
    aside.unlink(missing_ok=True)
    aside.touch(mode=0o600, exist_ok=False)
    aside.write_bytes(data)
    aside.replace(directory / name)


def discard(directory: Path) -> None:
    """Remove all files: the key is gone, and the user data may be secret. Never during a `furnish`."""
    for name in ALL:
        medium.discard(directory / name)


def _files(kind: MediumKind, instance: InstanceId, uuid: UUID, data: bytes, network_config: bytes | None) -> _Files:
    if kind is MediumKind.IGNITION:
        return _Files(plain={IGNITION: data})
    return _Files(
        images={
            SEED: (media.NOCLOUD_LABEL, media.nocloud(instance, uuid, data, network_config)),
            CONFIG_DRIVE: (media.CONFIG_DRIVE_LABEL, media.config_drive(instance, uuid, data)),
        }
    )


def _kept(directory: Path, source: str) -> bytes | None:
    """The kept copy, if it came from the same URL; None otherwise."""
    data = medium.read(directory / USER_DATA)
    if data is None or _Ledger.read(directory).sources.get(_digest(data)) != source:
        return None
    return data


def _write(directory: Path, *, data: bytes, source: str, files: _Files) -> None:
    """Write the media. Crash-safe: may be interrupted after any statement."""
    for name in ALL:
        medium.sweep(directory / name)
    recipe, digest = files.recipe(), _digest(data)
    done = _Ledger(recipe=recipe, sources={digest: source})
    kept = medium.read(directory / USER_DATA)
    before = _Ledger.read(directory)
    whole = all((directory / name).is_file() for name in files.names)
    if before == done and kept == data and whole:
        return
    old = {} if kept is None else {key: value for key, value in before.sources.items() if key == _digest(kept)}
    vouched = before.recipe == recipe and whole
    _Ledger(recipe=recipe if vouched else "", sources=old | {digest: source}).write(directory)
    if kept != data:
        medium.place(directory / USER_DATA, data)
    if not vouched:
        for name, content in files.plain.items():
            medium.place(directory / name, content)
        for name, (label, contents) in files.images.items():
            medium.place(directory / name, medium.image(label, contents))
        for name in set(FOR_QEMU) - set(files.names):
            medium.discard(directory / name)
    done.write(directory)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a thread. When cancelled, wait for its end: no successor may write meanwhile."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        task.exception()
        raise
