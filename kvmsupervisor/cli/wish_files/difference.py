"""What has to be written so that an instance is as a file says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmsupervisor.cluster.acts import mac_auto
from kvmsupervisor.cluster.overview import natural
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.parse_keys import SECRET_KEYS, public_value
from kvmsupervisor.domain.snapshots import KEY as SNAPSHOT_KEY

LEFT = frozenset({"host", "power", "restart_request", "rollback_request", *SECRET_KEYS})
"""Keys that stay as they are where a file does not name them, as those of snapshots do. `move`, `stop`, `restart` and
`snapshot` write them: what a person has ordered is not undone by a file that says nothing of it. Secrets need not be in
a file."""

_ORDER = {name: number for number, name in enumerate(WISH_KEYS)}


@frozen
class Change:
    """Of one key.

    Attributes:
        key: its name.
        before: the present value; None without one.
        after: the value to be written; None for a key that goes.
    """

    key: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        """One line for people, without secrets."""
        before, after = (None if text is None else _shown(self.key, text) for text in (self.before, self.after))
        if after is None:
            return f"- {self.key}: {before}"
        if before is None:
            return f"+ {self.key}: {after}"
        return f"~ {self.key}: {before} → {after}"


def differences(present: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[Change]:
    """What has to change, in the order in which keys are explained. White space around a value does not count.

    Args:
        present: the keys that the instance has.
        wanted: the keys that the file names.
    """
    for key in sorted({*present, *wanted}, key=in_order):
        before, after = present.get(key), wanted.get(key)
        if after is None:
            if key not in LEFT and not key.startswith(SNAPSHOT_KEY):
                yield Change(key, before, None)
        elif before is None or (before.strip() != after.strip() and not mac_auto.asks(key, after)):
            yield Change(key, before, after)


def in_order(key: str) -> tuple[int, tuple[tuple[int, int, str], ...]]:
    """Sort key of names of keys: as they are explained, then in natural order."""
    return _ORDER.get(key, len(_ORDER)), natural(key)


def _shown(key: str, text: str) -> str:
    first, *more = public_value(key, text.strip().encode()).decode(errors="replace").splitlines() or [""]
    return f"{first} … ({len(more)} more line{'s' if len(more) > 1 else ''})" if more else first
