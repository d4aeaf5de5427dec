"""Reads wishes from YAML files. Every value is the text that stands there.

YAML takes `power: on` for a truth and `mac: 52:54:00:12:34:56` for a number of the base 60 (YAML 1.1). Keys of etcd are
text, so scalars are taken as they are written, quoted or not, and no tag changes that. Libraries let the last of two
equal keys win; here that is a mistake of the file. So the nodes are read, not what a library would make of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kvmsupervisor.cli.value_files import FROM_FILE, STDIN, Unreadable, value_of
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import ID_RULE, InstanceId, parse_id
from kvmsupervisor.domain.values import show

IMAGES = ".images"
"""The part of a file that has entries of the image library, as below `/kvm/.images/`."""

TEMPLATE = ".x-"
"""How parts begin that nobody reads: what other parts repeat by an alias."""

ENDINGS = (".yaml", ".yml")

MOST_BYTES = 16 << 20
"""Of one file. Arbitrary: 10,000 instances with 8 keys each are 3 MB."""

_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "timestamp", "value"))
"""What a scalar without a tag of its own is taken for (YAML 1.1)."""

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class Faulty(Exception):
    """Files cannot be used. The message has all that is wrong, one line each."""


@frozen(kw_only=True)
class Wanted:
    """What the files say.

    Attributes:
        instances: id → key name → value.
        places: where each instance stands, as `FILE:LINE`.
        images: name → entry of the image library.
    """

    instances: Mapping[InstanceId, Mapping[str, str]]
    places: Mapping[InstanceId, str]
    images: Mapping[str, str]


def read_files(names: Sequence[str], read_stdin: Callable[[int], bytes] | None = None) -> Wanted:
    """Read files, and the YAML files of folders. `-` is standard input.

    Raises:
        Faulty: something cannot be read or understood, or stands there twice.
    """
    reader = _Reader(read_stdin or sys.stdin.buffer.read)
    for name in names:
        for path in reader.files_of(name):
            reader.read(path)
    if reader.faults:
        raise Faulty("\n".join(reader.faults))
    return Wanted(instances=reader.instances, places=reader.places, images=reader.images)


class _Reader:
    """Gathers what files say, and every fault."""

    def __init__(self, read_stdin: Callable[[int], bytes]) -> None:
        self._read_stdin = read_stdin
        self.faults: list[str] = []
        self.instances: dict[InstanceId, dict[str, str]] = {}
        self.places: dict[InstanceId, str] = {}
        self.images: dict[str, str] = {}
        self._image_places: dict[str, str] = {}
        # Of mappings that others merge, read once each; None while one is being read.
        self._merged: dict[Node, list[tuple[str, Node, str]] | None] = {}

    def files_of(self, name: str) -> list[str]:
        """The files that a word names: itself, or those of a folder, without those below."""
        if name == STDIN or not Path(name).is_dir():
            return [name]
        found = sorted(str(path) for path in Path(name).iterdir() if path.suffix in ENDINGS and path.is_file())
        if not found:
            self.faults.append(f"{name}: no file in this folder ends in {' or '.join(ENDINGS)}")
        return found

    def read(self, name: str) -> None:
        said = "standard input" if name == STDIN else name
        text = self._text_of(name, said)
        if text is None:
            return
        try:
            for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
                self._document(document, name, said)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark is not None else ""
            self.faults.append(f"{said}{line}: this is no YAML: {error.problem or error.context}")
        except yaml.YAMLError as error:
            self.faults.append(f"{said}: this is no YAML: {str(error).splitlines()[0]}")
        except RecursionError:
            self.faults.append(f"{said}: it is nested too deeply; an instance is a mapping of keys to values")

    def _text_of(self, name: str, said: str) -> str | None:
        try:
            if name == STDIN:
                data = self._read_stdin(MOST_BYTES + 1)
            else:
                with Path(name).open("rb") as file:
                    data = file.read(MOST_BYTES + 1)
        except OSError as error:
            self.faults.append(f"{said}: it cannot be read: {error.strerror}")
            return None
        if len(data) > MOST_BYTES:
            self.faults.append(f"{said}: it has more than {MOST_BYTES >> 20} MiB; divide it")
            return None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.faults.append(f"{said}: it is no text (not UTF-8 at byte {error.start})")
            return None

    # --- parts of a file --------------------------------------------------------------------------------------

    def _document(self, document: Node | None, name: str, said: str) -> None:
        if document is None or document.tag == _NULL:
            return
        for part, node, place in self._entries(document, said, "a file is a mapping of ids to their keys"):
            if part.startswith(TEMPLATE):
                continue
            if part == IMAGES:
                self._take_images(node, said)
            elif (instance := parse_id(part)) is not None:
                self._take(instance, node, name, said, place)
            else:
                self.faults.append(
                    f"{place}: {show(part)} is no id: {ID_RULE}; other parts are {IMAGES}, and {TEMPLATE}… for what is "
                    "repeated by an alias"
                )

    def _take(self, instance: InstanceId, node: Node, name: str, said: str, place: str) -> None:
        if instance in self.places:
            self.faults.append(f"{place}: {instance} stands at {self.places[instance]} already")
            return
        self.places[instance] = place
        found = self.instances[instance] = {}
        for key, value, at in self._values(node, said, f"{instance}: an instance is a mapping of keys to values"):
            try:
                found[key] = value_of(key, _beside(name, key, value))
            except Unreadable as error:
                self.faults.append(f"{at}: {error}")
        if not found and not self.faults:
            self.faults.append(f"{place}: {instance} has no keys; it needs ram and host, say")

    def _take_images(self, node: Node, said: str) -> None:
        for name, entry, place in self._values(node, said, f"{IMAGES} is a mapping of names to entries"):
            if name in self.images:
                self.faults.append(f"{place}: image {name} stands at {self._image_places[name]} already")
                continue
            self.images[name], self._image_places[name] = entry, place

    # --- nodes ------------------------------------------------------------------------------------------------

    def _values(self, node: Node, said: str, wanted: str) -> Iterator[tuple[str, str, str]]:
        """Keys and texts of a mapping, with their places."""
        for key, value, place in self._entries(node, said, wanted):
            if isinstance(value, ScalarNode) and value.tag in _PLAIN_TAGS and value.value.strip():
                yield key, value.value, place
            elif isinstance(value, ScalarNode) and value.tag not in {*_PLAIN_TAGS, _NULL}:
                self.faults.append(f"{place}: {key} has the tag {value.tag}; a value is text, without a tag")
            elif isinstance(value, ScalarNode):
                self.faults.append(f"{place}: {key} has no value; leave the line out to have its default")
            elif isinstance(value, MappingNode):
                self.faults.append(
                    f"{place}: {key} is a mapping; a key is written whole, such as nic/1/mac: 52:54:00:12:34:56"
                )
            else:
                self.faults.append(f"{place}: {key} is a list; its value is one text, words divided by spaces")

    def _entries(self, node: Node, said: str, wanted: str) -> list[tuple[str, Node, str]]:
        """The entries of a mapping and of what it merges (`<<`); its own win, and none may stand there twice."""
        if not isinstance(node, MappingNode):
            self.faults.append(f"{said}:{node.start_mark.line + 1}: {wanted}")
            return []
        own: dict[str, tuple[str, Node, str]] = {}
        merged: dict[str, tuple[str, Node, str]] = {}
        for key, value in node.value:
            at = f"{said}:{key.start_mark.line + 1}"
            if key.tag == _MERGE:
                for other in value.value if isinstance(value, SequenceNode) else [value]:
                    merged = {entry[0]: entry for entry in self._once(other, said, wanted, at)} | merged
            elif not isinstance(key, ScalarNode):
                self.faults.append(f"{at}: {wanted}")
            elif key.value in own:
                self.faults.append(f"{at}: {show(key.value)} stands at {own[key.value][2]} already")
            else:
                own[key.value] = (key.value, value, at)
        return list((merged | own).values())

    def _once(self, node: Node, said: str, wanted: str, at: str) -> list[tuple[str, Node, str]]:
        """The same of a mapping that is merged, read once however often that is."""
        if node in self._merged:
            if (known := self._merged[node]) is None:
                self.faults.append(f"{at}: it merges itself")
            return known or []
        self._merged[node] = None
        found = self._merged[node] = self._entries(node, said, wanted)
        return found


def _beside(name: str, key: str, value: str) -> str:
    """A value that names a file, by its path from here: people write it as seen from their file."""
    if key not in FROM_FILE or not value.startswith("@") or name == STDIN:
        return value
    path = value.removeprefix("@")
    if path in {"", STDIN}:
        raise Unreadable(f"{key}={value} names no file")
    return f"@{Path(name).parent / path}"


# --- writing --------------------------------------------------------------------------------------------------


_BREAKS = frozenset("\r\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such."""


def _written(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    style = "|" if "\n" in text.strip("\n") else None
    # Other line breaks than \n are read as \n, or as a space (YAML 1.1, "line breaks"): they are written as escapes.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _BREAKS & set(text) else style)


_Dumper.add_representer(str, _written)


def written(part: str, keys: Iterable[tuple[str, str]]) -> str:
    """One part of a file: what `read_files` reads as these keys, in that order."""
    return yaml.dump({part: dict(keys)}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
