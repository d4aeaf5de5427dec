"""The key `cdrom`: what is in the machine's CD-ROM drive. Pure.

A medium is an image of the library, or a file of the host that ends in `.iso`. `empty` is a drive without one, for a
machine that is to get one later: a drive can be had at a start only, a medium at any time.
"""

from __future__ import annotations

import re
from dataclasses import field

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import image_name
from kvmsupervisor.domain.local_disk import NAME_LENGTH, SCHEME
from kvmsupervisor.domain.values import Unfit, show

EMPTY = "empty"

CHANGING = "?"
"""What a drive holds while its medium is changed: one of two, until QEMU has answered. No key can say it."""

DEVICE = "cdrom0"
"""The name of the drive in QEMU, and what the names of its media's block nodes begin with."""

_FILE = re.compile(rf"(?=.{{1,{NAME_LENGTH}}}\Z)[A-Za-z0-9_][A-Za-z0-9_+.-]*\.iso")


@frozen
class Cdrom:
    """The drive of a machine, and what it holds.

    Attributes:
        title: the medium as the key names it: `file:NAME.iso`, an image of the library, or `empty`.
        boot: whether the machine boots from it before its first disk.
        force: whether a guest that has locked the tray is not waited for.
    """

    title: str
    boot: bool = False
    force: bool = field(default=False, compare=False)

    @property
    def medium(self) -> str | None:
        """What is in it; None for nothing."""
        return None if self.title == EMPTY else self.title

    @property
    def file(self) -> str | None:
        """The name of the file, where it is one."""
        return self.title.removeprefix(SCHEME) if self.title.startswith(SCHEME) else None

    @property
    def image(self) -> str | None:
        """The name of the image of the library, where it is one."""
        return None if self.title == EMPTY or self.title.startswith(SCHEME) else self.title


def cdrom(text: str) -> Cdrom:
    """A medium, `file:NAME.iso`, an image of the library, or `empty`, and its options.

    Raises:
        Unfit: it is none.
    """
    title, *options = text.split()
    for place, option in enumerate(options):
        if option not in {"boot", "force"} or option in options[:place]:
            raise Unfit(f"behind the medium stand the options boot and force, each once at most; {show(option)} is not")
    return Cdrom(_title(title), boot="boot" in options, force="force" in options)


def _title(text: str) -> str:
    if not text.startswith(SCHEME):
        try:
            return image_name(text)
        except Unfit:
            raise Unfit(
                f"it is file:NAME.iso, a file below the host's KVM_DISK_DIR, the name of an image of the library, or "
                f"{EMPTY}"
            ) from None
    name = text.removeprefix(SCHEME)
    if not _FILE.fullmatch(name) or ".." in name:
        raise Unfit(
            "a medium is file:NAME.iso, below the host's KVM_DISK_DIR: letters, digits and . _ + -, beginning with a "
            f"letter or digit, without a slash or '..', at most {NAME_LENGTH} characters; the options boot and force "
            "follow after white space"
        )
    return text


def medium_of(drive: Cdrom | None) -> str | None:
    """What a key wants in the drive; None for nothing, as without the key."""
    return None if drive is None else drive.medium
