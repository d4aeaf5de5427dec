"""A configuration file in YAML, read with care: nothing stands there twice, and every line of a problem is known.

Libraries let the last of two equal keys win, and take `no` for a truth: of a file that says who may come in, neither is
wanted. So the nodes are read, and every scalar is the text that stands there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from kvmsupervisor.domain.values import nearest, plain, show

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MOST_BYTES = 1 << 20
"""Of one file. Arbitrary: a thousand users are 80 KB."""

_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar: what stands there, and where."""

    text: str
    line: int


@dataclass(slots=True)
class Reader:
    """Reads one file, and gathers every problem.

    Attributes:
        name: of the file, for messages.
        problems: one line each.
    """

    name: str
    problems: list[str] = field(default_factory=list)

    def problem(self, line: int | None, said: str) -> None:
        """Note one."""
        self.problems.append(f"{self.name}:{line}: {said}" if line is not None else f"{self.name}: {said}")

    def document(self, path: Path) -> Node | None:
        """The file's one document; None for an empty one, and for one that cannot be read."""
        try:
            with path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
            text = data.decode("utf-8-sig")
        except OSError as error:
            self.problem(None, f"it cannot be read: {error.strerror}")
            return None
        except UnicodeDecodeError as error:
            self.problem(None, f"it is no text (not UTF-8 at byte {error.start})")
            return None
        if len(data) > MOST_BYTES:
            self.problem(None, f"it has more than {MOST_BYTES >> 20} MiB")
            return None
        # A page without such a file does without the library.
        import yaml  # noqa: PLC0415

        try:
            found: Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.problem(None if mark is None else mark.line + 1, f"this is no YAML: {error.problem or error.context}")
            return None
        except yaml.YAMLError as error:
            self.problem(None, f"this is no YAML: {str(error).splitlines()[0]}")
            return None
        except RecursionError:
            self.problem(None, "it is nested too deeply")
            return None
        return None if found is None or found.tag == _NULL else found

    def mapping(self, node: Node | None, what: str) -> Iterator[tuple[Text, Node]]:
        """The entries of a mapping, each once."""
        if node is None or node.tag == _NULL:
            return
        if not _is_mapping(node):
            self.problem(node.start_mark.line + 1, f"{what} is a mapping, `name: value` on lines of their own")
            return
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not _is_scalar(key):
                self.problem(line, f"{what}: a name is plain text")
            elif key.value in seen:
                self.problem(line, f"{what}: {show(key.value)} stands there twice")
            else:
                seen.add(key.value)
                yield Text(key.value, line), value

    def known(
        self, node: Node | None, what: str, names: Collection[str], refused: Mapping[str, str] | None = None
    ) -> dict[str, Node]:
        """The entries of a mapping with certain names; others are problems.

        Args:
            node: the mapping.
            what: it is, for messages.
            names: that there are.
            refused: names that others know, and why they are not taken here.
        """
        refused = refused or {}
        found = {}
        for key, value in self.mapping(node, what):
            if key.text in names:
                found[key.text] = value
            elif key.text in refused:
                self.problem(key.line, f"{key.text} is not taken here: {refused[key.text]}")
            else:
                near = nearest(key.text, {plain(name): name for name in names})
                meant = f"did you mean {near}?" if near is not None else f"there are {', '.join(sorted(names))}"
                self.problem(key.line, f"{what} has no {show(key.text)}; {meant}")
        return found

    def text(self, node: Node | None, what: str) -> Text | None:
        """A scalar that is not empty; None for a missing one, and for what is none, which is a problem."""
        if node is None:
            return None
        line = node.start_mark.line + 1
        if not _is_scalar(node):
            self.problem(line, f"{what} is one value, no list and no mapping")
            return None
        if node.tag == _NULL or not node.value.strip():
            self.problem(line, f"{what} has no value; leave the line out to do without it")
            return None
        return Text(node.value.strip(), line)

    def texts(self, node: Node | None, what: str) -> list[Text]:
        """A list of scalars."""
        if node is None or node.tag == _NULL:
            return []
        if not _is_sequence(node):
            self.problem(node.start_mark.line + 1, f"{what} is a list, such as [one, other]")
            return []
        found = (self.text(one, f"an entry of {what}") for one in node.value)
        return [one for one in found if one is not None]

    def one_of(self, node: Node | None, what: str, values: Mapping[str, str]) -> str | None:
        """A scalar that is one of some.

        Args:
            node: the scalar.
            what: it is, for messages.
            values: value → empty, or why it is not taken here.
        """
        found = self.text(node, what)
        if found is None:
            return None
        if values.get(found.text) == "":
            return found.text
        right = ", ".join(one for one, why in values.items() if not why)
        why = values.get(found.text)
        because = f", which is not taken here: {why}" if why else ""
        self.problem(found.line, f"{what} is {show(found.text)}{because}; right would be {right}")
        return None


def _is_mapping(node: Node) -> TypeGuard[MappingNode]:
    return getattr(node, "id", None) == "mapping"


def _is_scalar(node: Node) -> TypeGuard[ScalarNode]:
    return getattr(node, "id", None) == "scalar"


def _is_sequence(node: Node) -> TypeGuard[SequenceNode]:
    return getattr(node, "id", None) == "sequence"
