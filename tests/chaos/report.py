"""What a run came to: for people a table, for programs JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from tests.chaos.faults import Terms
from tests.chaos.points import DRAWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """What one machine felt of an episode.

    Attributes:
        machine: which.
        hit: whether a fault was meant for it.
        guarded: whether it counts as one that storage cannot fence.
        away_s: the longest time in which it did not write.
        restarts: how often it was started again.
        bound_s: what `away_s` may be.
        blind_s: the longest time in which nobody looked.
    """

    machine: str
    hit: bool
    guarded: bool
    away_s: float
    restarts: int
    bound_s: float
    blind_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A fault with those that rode on it, until everything wrote again.

    Attributes:
        kinds: of the faults, the first one's first.
        told: each fault in a line.
        began_s: since the run's beginning.
        lasted_s: until everything wrote again.
        felt: by each machine.
    """

    kinds: tuple[str, ...]
    told: tuple[str, ...]
    began_s: float
    lasted_s: float
    felt: tuple[Felt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run.

    Attributes:
        seed: that it was drawn from.
        minutes: that it was drawn for.
        took_s: how long it took.
        terms: of the world.
        boot_s: from a machine's keys to its first record, the longest of the first starts.
        faults: how many of each kind there were.
        episodes: in order.
        takeovers: locks that were taken from another host.
        fences: addresses that locks had on record to be shut out.
        records: that were found on the disks.
        owners: incarnations that wrote.
        load: of the machine, in the last minute at the end.
        reached: failpoints that a supervisor came to.
        violations: of the promises and of the laws.
        replay: the command that does it again.
    """

    seed: int
    minutes: float
    took_s: float
    terms: Terms
    boot_s: float
    faults: dict[str, int]
    episodes: tuple[Episode, ...]
    takeovers: int = 0
    fences: int = 0
    records: int = 0
    owners: int = 0
    load: float = 0.0
    reached: tuple[str, ...] = ()
    violations: tuple[str, ...] = ()
    replay: str = field(default="")

    def to_json(self) -> str:
        """Everything."""
        return json.dumps(asdict(self), indent=1, default=str)

    def __str__(self) -> str:
        """The table."""
        lines = [
            f"seed {self.seed}: {self.took_s / 60:.1f} min, {sum(self.faults.values())} faults on "
            f"{self.terms.targets} machines of {self.terms.hosts} hosts, TTL {self.terms.ttl_s:g} s, "
            f"takeover wait {self.terms.wait_s:g} s; load {self.load:.1f}",
            f"{self.takeovers} takeovers, {self.fences} clients fenced, {self.owners} QEMUs wrote "
            f"{self.records} records; keys to first record {self.boot_s:.1f} s",
            "",
            *table(rows(self.episodes)),
            "",
            f"failpoints reached: {len(self.reached)} of {len(DRAWN)}, never: "
            f"{', '.join(name for name in DRAWN if name not in self.reached) or 'none'}",
        ]
        if self.violations:
            lines += [f"VIOLATION {one}" for one in self.violations]
            lines.append(f"again: {self.replay}")
        else:
            lines.append("no violation")
        return "\n".join(lines)


def rows(episodes: Iterable[Episode]) -> list[tuple[str, ...]]:
    """One for each kind: how often, restarts, the time that those were away whom it hit, and the bound."""
    found: dict[str, list[Felt]] = {}
    times: dict[str, int] = {}
    for episode in episodes:
        name = episode.kinds[0] if len(episode.kinds) == 1 else "several at once"
        for one in episode.felt:
            if one.hit:
                found.setdefault(f"{name}, under guard" if one.guarded else name, []).append(one)
        for whose in {f"{name}, under guard" if one.guarded else name for one in episode.felt if one.hit}:
            times[whose] = times.get(whose, 0) + 1
    head = ("fault", "times", "machines hit", "restarts", "away, median", "worst", "bound then")
    body = []
    for name in sorted(found):
        felt = found[name]
        worst = max(felt, key=lambda one: one.away_s)
        body.append(
            (
                name,
                str(times[name]),
                str(len(felt)),
                str(sum(one.restarts for one in felt)),
                f"{median(one.away_s for one in felt):.1f} s",
                f"{worst.away_s:.1f} s",
                f"{worst.bound_s:.1f} s",
            )
        )
    return [head, *body]


def table(found: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns for a terminal."""
    widths = [max(len(row[column]) for row in found) for column in range(len(found[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in found
    ]
