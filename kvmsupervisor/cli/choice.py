"""The instances that a command is about: ids, and patterns that name several at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.common import InstanceType, Tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import printable
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster, shown
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.values import nearest, plain, show, some

NAMED = 50
"""Instances that a question names; the others are counted. Arbitrary: they still fit on a screen."""

_WILD = frozenset("*?[")


@frozen
class Pattern:
    """A word that may stand for several instances: `*`, `?` and `[…]`, as in names of files."""

    text: str

    def matches(self, instance: InstanceId) -> bool:
        """Whether the whole id is so; upper and lower case differ."""
        return fnmatchcase(instance, self.text)


Word = InstanceId | Pattern


class WordType(InstanceType):
    """An id, or a pattern of ids."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check that it is one of the two."""
        return Pattern(str(value)) if _WILD & set(str(value)) else super().convert(value, param, ctx)


WORD = WordType()


def is_one(words: Sequence[Word]) -> bool:
    """Whether they are one id, without a pattern."""
    return len(words) == 1 and not isinstance(words[0], Pattern)


def has_pattern(words: Iterable[Word]) -> bool:
    """Whether any of them is a pattern."""
    return any(isinstance(word, Pattern) for word in words)


def without_patterns(words: Iterable[Word]) -> list[InstanceId]:
    """The ids among the words."""
    return [word for word in words if not isinstance(word, Pattern)]


def chosen(words: Sequence[Word], there: Iterable[Instance], *, all_or_none: bool = True) -> list[InstanceId]:
    """The ids that the words mean, each once, in the order of the words.

    A pattern means instances that have keys. An id also means what is left of one without.

    Args:
        words: as given.
        there: all instances.
        all_or_none: whether an id that is not there refuses everything.

    Raises:
        Refused: a pattern means nothing, or an id is not there.
    """
    instances = {instance.id: instance for instance in there}
    alive = [name for name, instance in instances.items() if instance.keys]
    found: dict[InstanceId, None] = {}
    lacking: list[str] = []
    for word in words:
        if isinstance(word, Pattern):
            meant = [name for name in alive if word.matches(name)]
            if not meant:
                lacking.append(f"no instance is like {show(word.text)}")
        else:
            meant = [word]
            if word not in instances and all_or_none:
                lacking.append(f"there is no instance {word}{meant_by(word, instances)}")
        found |= dict.fromkeys(meant)
    if lacking:
        said = some(lacking, NAMED)
        raise Refused(said if len(words) == 1 else f"nothing was done: {said}")
    return list(found)


def meant_by(word: str, there: Iterable[str]) -> str:
    """A clause with the id that was probably meant; empty when none is like it."""
    near = nearest(word, {plain(name): name for name in reversed(tuple(there))})
    return "" if near is None else f" (did you mean {near}?)"


def read_chosen(tools: Tools, words: Sequence[Word]) -> tuple[list[InstanceId], Cluster]:
    """Read the cluster, and which of its instances the words mean.

    Raises:
        Refused: see `chosen`.
    """

    async def work(store: Store, settings: Settings) -> Cluster:
        return await read_cluster(store, settings.layout)

    cluster = with_store(tools, work)
    return chosen(words, cluster.instances.values()), cluster


def question(ids: Sequence[InstanceId], cluster: Cluster, what: str) -> str:
    """What a person is asked: every instance with its host and phase, then `what` is to be done with them."""
    lines = [f"  {name}  {_state(cluster.instances[name], cluster)}" for name in ids[:NAMED]]
    if len(ids) > NAMED:
        lines.append(f"  … and {len(ids) - NAMED} more")
    return "\n".join([*map(printable, lines), what])


def _state(instance: Instance, cluster: Cluster) -> str:
    view = shown(instance, cluster)
    return view.phase if view.host is None else f"{view.phase} on {view.host}"
