"""The filters of `list`: `--host`, `--phase` and `-l KEY=VALUE`, which combine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.common import complete
from kvmsupervisor.cluster.overview import UNKNOWN, Cluster, Instance, list_all, shown
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import parse_id
from kvmsupervisor.domain.names import FREE_KEY_PREFIX
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.values import nearest, plain, show

PHASES = (*(phase.value for phase in Phase), UNKNOWN)
"""What the column PHASE can hold."""


@frozen(kw_only=True)
class Filters:
    """What the instances to list have in common. Several values of one option: one of them; several options: all.

    Attributes:
        hosts: one of these stands in the column HOST; none for any.
        phases: one of these is the phase; none for any.
        labels: keys for people (`x-…`) and their values; all of them are so.
    """

    hosts: Sequence[str] = ()
    phases: Sequence[str] = ()
    labels: Sequence[tuple[str, str]] = ()

    def choose(self, instances: Iterable[Instance], cluster: Cluster) -> list[Instance]:
        """Those of `instances` that pass every filter."""
        return [instance for instance in instances if self._passes(instance, cluster)]

    def _passes(self, instance: Instance, cluster: Cluster) -> bool:
        view = shown(instance, cluster)
        return (
            (not self.hosts or view.host in self.hosts)
            and (not self.phases or view.phase in self.phases)
            and all(value_of(instance, key) == value for key, value in self.labels)
        )

    def why_nothing(self, cluster: Cluster) -> str:
        """A sentence for an empty list: which filter names something that no instance has, and what was meant."""
        instances = cluster.instances.values()
        seen = {view.host for view in (shown(instance, cluster) for instance in instances) if view.host is not None}
        said = [
            f"no instance names a host {show(host)} ({cluster.who_has_sessions()}{_meant(host, seen)})"
            for host in self.hosts
            if host not in seen and not cluster.alive(host)
        ]
        keys = {key for instance in instances for key in _free_keys(instance)}
        for key, value in self.labels:
            values = {found for instance in instances if (found := value_of(instance, key)) is not None}
            if not values:
                said.append(f"no instance has a key {show(key)}{_meant(key, keys)}")
            elif value not in values:
                said.append(f"no instance has {key}={show(value)}{_meant(value, values)}")
        return "; ".join(["no instance is so", *said])


def value_of(instance: Instance, key: str) -> str | None:
    """The value of a key without the white space around it, which does not count; None without the key."""
    raw = instance.keys.get(key.encode())
    return None if raw is None else raw.value.decode("utf-8", "backslashreplace").strip()


def _free_keys(instance: Instance) -> Iterable[str]:
    names = (name.decode("utf-8", "backslashreplace") for name in instance.keys)
    return (name for name in names if name.startswith(FREE_KEY_PREFIX))


def _meant(word: str, known: Iterable[str]) -> str:
    """A clause that names what was probably meant; empty when nothing is like it."""
    near = nearest(word, {plain(name): name for name in sorted(known)})
    return "" if near is None else f"; did you mean {show(near)}?"


# `ParamType` became generic in click 8.5: with an argument, older ones could not be used.


class PhaseType(click.ParamType):  # type: ignore[type-arg]
    """A phase, as the column PHASE has it."""

    name = "phase"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check that there is such a phase."""
        if value not in PHASES:
            self._refuse(str(value), param, ctx)
        return str(value)

    def _refuse(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        near = nearest(value, {phase: phase for phase in PHASES})
        meant = "" if near is None else f" Did you mean {near}?"
        self.fail(f"{show(value)} is no phase; the phases are {', '.join(PHASES)}.{meant}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the phases."""
        return [CompletionItem(phase) for phase in PHASES if phase.startswith(incomplete)]


class LabelType(click.ParamType):  # type: ignore[type-arg]
    """`x-…=VALUE`, as a pair.

    Wishes are refused: one that has its default has no key, so a comparison of keys would miss it.
    """

    name = "x-key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first `=`."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"{show(value)} is not KEY=VALUE, such as x-team=shop", param, ctx)
        if not key.startswith(FREE_KEY_PREFIX):
            self.fail(
                f"{show(key)} is no key for people: their names begin with {FREE_KEY_PREFIX}, "
                f"such as {FREE_KEY_PREFIX}{key.lower()}. --host and --phase choose by host and phase.",
                param,
                ctx,
            )
        return key, text.strip()

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the keys for people that instances have; behind the `=` name their values."""

        async def work(store: Store, settings: Settings) -> list[tuple[str, str]]:
            wishes = (await list_all(store, settings.layout.wishes_prefix)).kvs
            named = ((kv.key.decode("utf-8", "replace").rpartition("/")[2], kv.value) for kv in wishes)
            return [(name, value.decode("utf-8", "replace").strip()) for name, value in named]

        pairs = [(name, value) for name, value in complete(ctx, work) if name.startswith(FREE_KEY_PREFIX)]
        key, equals, _ = incomplete.partition("=")
        # As with hosts: what a shell would split or expand is typed by hand.
        names = (
            {f"{key}={value}" for name, value in pairs if name == key and parse_id(value)}
            if equals
            else {f"{name}=" for name, _ in pairs if parse_id(name)}
        )
        return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


PHASE = PhaseType()
LABEL = LabelType()
