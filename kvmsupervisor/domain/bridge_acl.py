"""Who may use which bridge: what `bridge.conf` says to `qemu-bridge-helper`.

Source: `parse_acl_file` and `main` in QEMU's qemu-bridge-helper.c, which is the only description of the file. A line
is `allow NAME`, `deny NAME`, `include FILE`, a comment that begins with `#`, or blank; `all` stands for every bridge.
The order does not matter: a bridge is refused that no line allows, and one that any line denies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

NAME_LIMIT = 15
"""Bytes of a name that the helper looks at (IFNAMSIZ without its NUL)."""

_ALL = b"all"


class BrokenAcl(ValueError):
    """The helper refuses the whole file for one line. The message names file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One `allow` or `deny` line.

    Attributes:
        allow: whether it allows.
        bridge: the bridge's name, `all` for every one.
        place: file, line number and text, for people.
    """

    allow: bool
    bridge: bytes
    place: str

    def names(self, bridge: str) -> bool:
        """Whether it speaks of this bridge."""
        return self.bridge in {_ALL, bridge.encode(errors="surrogateescape")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Acl:
    """All rules of a file and of those that it includes."""

    rules: tuple[Rule, ...] = ()

    def denial(self, bridge: str) -> Rule | None:
        """The first rule that denies the bridge; nothing can allow it then."""
        return next((rule for rule in self.rules if not rule.allow and rule.names(bridge)), None)

    def permission(self, bridge: str) -> Rule | None:
        """The first rule that allows the bridge, if nothing denies it."""
        return next((rule for rule in self.rules if rule.allow and rule.names(bridge)), None)


def read_acl(path: str, read: Callable[[str], bytes | None]) -> Acl:
    """Read a file as the helper does.

    Args:
        path: of the file.
        read: returns a file's content, None where it cannot be read. The helper passes over a file that is included
            and cannot be read, so this does too.

    Raises:
        BrokenAcl: a line of the file itself (an included file only ends early there).
    """
    return Acl(rules=tuple(_rules(path, read, (path,))))


def _rules(path: str, read: Callable[[str], bytes | None], above: tuple[str, ...]) -> Iterator[Rule]:
    for number, line in enumerate((read(path) or b"").split(b"\n"), start=1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        place = f"{path} line {number}: {text.decode(errors='replace')}"
        # A blank ends the word if there is any in the line; only otherwise a tab does.
        word, separator, rest = text.partition(b" " if b" " in text else b"\t")
        name = rest.strip()
        if separator and word in {b"allow", b"deny"}:
            yield Rule(allow=word == b"allow", bridge=name[:NAME_LIMIT], place=place)
        elif separator and word == b"include":
            file = name.decode(errors="surrogateescape")
            # The helper would follow a circle until it dies; there is nothing new in it.
            if file not in above:
                try:
                    yield from _rules(file, read, (*above, file))
                except BrokenAcl:
                    continue
        else:
            raise BrokenAcl(f"{place} (qemu-bridge-helper knows allow NAME, deny NAME, include FILE and # comments)")


def can_be_named(bridge: str) -> bool:
    """Whether a line can allow this bridge and no other: not one that is called `all`, nor one with white space."""
    name = bridge.encode(errors="surrogateescape")
    return 0 < len(name) <= NAME_LIMIT and name != _ALL and not bridge.startswith("#") and name.split() == [name]


def missing(acl: Acl, bridges: Iterable[str]) -> tuple[str, ...]:
    """Those bridges for which an `allow` line is to be added, each once.

    Not those that are allowed already, nor those that are denied: such a line would change nothing, and only look as
    if it did.
    """
    wanted = dict.fromkeys(bridge for bridge in bridges if can_be_named(bridge))
    return tuple(bridge for bridge in wanted if acl.denial(bridge) is None and acl.permission(bridge) is None)


def with_lines(content: bytes, bridges: Iterable[str]) -> bytes:
    """`content` as it is, with an `allow` line for each bridge behind it."""
    lines = b"".join(b"allow " + bridge.encode(errors="surrogateescape") + b"\n" for bridge in bridges)
    # A last line without an end would otherwise swallow the first of ours.
    return content + (b"\n" if lines and content and not content.endswith(b"\n") else b"") + lines
