"""What a history draws from its seed: one source for each purpose, so that one more draw here changes nothing there."""

from __future__ import annotations

from random import Random


class Chance:
    """All sources of one seed."""

    def __init__(self, seed: object) -> None:
        self._seed = seed

    def of(self, purpose: str) -> Random:
        """A source of its own, the same for the same seed and purpose, whatever PYTHONHASHSEED is."""
        return Random(f"{self._seed}/{purpose}")


class NoChance(Chance):
    """Everything takes half of the longest time that it may take, and nothing unlikely happens."""

    def of(self, purpose: str) -> Random:
        return _Half(f"{self._seed}/{purpose}")


class _Half(Random):
    def random(self) -> float:
        return 0.5
