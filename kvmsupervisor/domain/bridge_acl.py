"""Who may use which bridge: what `bridge.conf` says to `qemu-bridge-helper`.

Source: `parse_acl_file` and `main` in QEMU's qemu-bridge-helper.c, which is the only description of the file. A line
is `allow NAME`, `deny NAME`, `include FILE`, a comment that begins with `#`, or blank; `all` stands for every bridge.
The order does not matter: the helper refuses a bridge that no line allows, or that any line denies.

A comment right above a line of ours names the writer and the bridge. It alone tells the line from those of people, and
from those of another supervisor with the same file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator

from kvmsupervisor.domain.frozen import frozen

NAME_LIMIT = 15
"""Bytes of a name that the helper looks at (IFNAMSIZ without its NUL)."""

OWNER_LIMIT = 1000
"""Bytes of an owner's name. The helper reads 4095 bytes of a line at once; it takes the rest for another line."""

_ALL = b"all"
_LINE = re.compile(rb"[^\n]*\n|[^\n]+\Z")


class BrokenAcl(ValueError):
    """The helper refuses the whole file for one line. The message names file and line."""


@frozen(kw_only=True)
class Rule:
    """One `allow` or `deny` line.

    Attributes:
        allow: whether it allows.
        bridge: the bridge's name, `all` for every one.
        place: file, line number and text, for people.
        above: the line above it.
    """

    allow: bool
    bridge: bytes
    place: str
    above: bytes = b""

    def names(self, bridge: str) -> bool:
        """Whether it speaks of this bridge."""
        return self.bridge in {_ALL, _bytes(bridge)}

    def is_of_another(self, owner: str | None) -> bool:
        """Whether another supervisor than `owner` wrote it: such a line may go at any time."""
        words = self.above.split(b" ")
        is_own = len(words) == _MARK_WORDS and self.above == _mark(words[2], self.bridge)
        return is_own and (owner is None or self.above != _mark(_bytes(owner), self.bridge))


@frozen(kw_only=True)
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
        read: returns a file's content, None where it cannot be read. The helper skips an included file
            that it cannot read, and so does this.

    Raises:
        BrokenAcl: a line of the file itself (an included file only ends early there).
    """
    return Acl(rules=tuple(_rules(path, read, (path,))))


def _rules(path: str, read: Callable[[str], bytes | None], above: tuple[str, ...]) -> Iterator[Rule]:
    lines = (read(path) or b"").split(b"\n")
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        place = f"{path} line {number}: {text.decode(errors='replace')}"
        # A blank ends the word. Only in a line without blanks a tab does.
        word, separator, rest = text.partition(b" " if b" " in text else b"\t")
        name = rest.strip()
        if separator and word in {b"allow", b"deny"}:
            before = lines[number - 2] if number > 1 else b""
            yield Rule(allow=word == b"allow", bridge=name[:NAME_LIMIT], place=place, above=before)
        elif separator and word == b"include":
            file = name.decode(errors="surrogateescape")
            # The helper would follow a circle until it dies; a circle adds no rule.
            if file not in above:
                try:
                    yield from _rules(file, read, (*above, file))
                except BrokenAcl:
                    continue
        else:
            raise BrokenAcl(f"{place} (qemu-bridge-helper knows allow NAME, deny NAME, include FILE and # comments)")


def can_be_named(bridge: str) -> bool:
    """Whether a line can allow this bridge and no other. Impossible for the name `all`, and with white space."""
    name = _bytes(bridge)
    return 0 < len(name) <= NAME_LIMIT and name != _ALL and not bridge.startswith("#") and name.split() == [name]


def missing(acl: Acl, bridges: Iterable[str], owner: str | None = None) -> tuple[str, ...]:
    """Those bridges for which an `allow` line is to be added, each once.

    Allowed bridges need no line; for a denied one a line would look as if it helped. A line that another supervisor
    wrote for itself does not count.
    """
    wanted = dict.fromkeys(bridge for bridge in bridges if can_be_named(bridge))
    return tuple(
        bridge
        for bridge in wanted
        if acl.denial(bridge) is None
        and not any(rule.allow and rule.names(bridge) and not rule.is_of_another(owner) for rule in acl.rules)
    )


def with_lines(content: bytes, bridges: Iterable[str], owner: str | None = None) -> bytes:
    """`content`, followed by an `allow` line for each bridge.

    Args:
        content: of the file.
        bridges: to be allowed.
        owner: the supervisor that takes the lines away later; None: they stay, like those of people.
    """
    lines = b"".join(_own(owner, bridge) if owner is not None else _line(bridge) for bridge in bridges)
    # Otherwise our first line would continue a last line that has no end.
    return content + (b"\n" if lines and content and not content.endswith(b"\n") else b"") + lines


def without_lines(content: bytes, wanted: Container[str], owner: str) -> tuple[bytes, tuple[str, ...]]:
    """Drop the owner's lines for bridges that are not wanted; return the content, and these bridges.

    Everything else stays byte for byte, also a line of the owner's that a person changed or moved.
    """
    lines = _LINE.findall(content)
    kept: list[bytes] = []
    gone: list[str] = []
    place = 0
    while place < len(lines):
        bridge = _named(lines[place])
        own = b"".join(lines[place : place + 2])
        if bridge is None or bridge in wanted or own.removesuffix(b"\n") != _own(owner, bridge).removesuffix(b"\n"):
            kept.append(lines[place])
            place += 1
        else:
            gone.append(bridge)
            place += 2
    return b"".join(kept), tuple(gone)


# --- lines of ours --------------------------------------------------------------------------------------------

_MARK_WORDS = 5


def _mark(owner: bytes, bridge: bytes) -> bytes:
    # White space in it would change what the line means.
    return b"# kvmsupervisor " + b"".join(owner.split())[:OWNER_LIMIT] + b" wants " + bridge + b":"


def _line(bridge: str) -> bytes:
    return b"allow " + _bytes(bridge) + b"\n"


def _own(owner: str, bridge: str) -> bytes:
    return _mark(_bytes(owner), _bytes(bridge)) + b"\n" + _line(bridge)


def _named(line: bytes) -> str | None:
    """The bridge that a mark names, of any writer; None where the line is no mark."""
    words = line.removesuffix(b"\n").split(b" ")
    is_mark = len(words) == _MARK_WORDS and line.startswith(_mark(words[2], words[-1].removesuffix(b":")))
    return words[-1].removesuffix(b":").decode(errors="surrogateescape") if is_mark else None


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
