"""Whether more keys of an instance may follow: people write keys one by one (decision 0003). Pure.

A guest that runs too early runs without the keys that come later. A guest that waits for nothing is late.
"""

from __future__ import annotations

from kvmsupervisor.domain.spec import Wish


def is_complete(wish: Wish) -> bool:
    """Whether nothing is expected to follow the newest write of these keys.

    - The newest write is a word on where the instance runs: `host`, which people write last, or a placement, which a
      supervisor writes for keys that stand.
    - The newest write wrote several keys. A program did so in one transaction, and has written all that it had.

    One transaction that makes an instance is both: `host` is part of it.
    """
    said_where = wish.host_revision if wish.placement is None else max(wish.host_revision, wish.placed.revision)
    return said_where >= wish.revision or wish.together > 1


class Quiet:
    """When the keys of one instance will have been quiet for long enough to let a new guest run.

    Args:
        settle_s: how long keys that may not be complete must be quiet (`KVM_SETTLE`).

    Attributes:
        at: from when on; the past when now. CLOCK_BOOTTIME.
    """

    def __init__(self, settle_s: float) -> None:
        self.at = 0.0
        self._settle_s = settle_s

    def heard(self, before: Wish | None, wish: Wish, now: float) -> None:
        """Keys were just written or deleted; `before` is None for an instance that was not known here."""
        # A deletion leaves no revision behind, so the newest write that is there says nothing of it.
        written = before is None or wish.revision > before.revision or wish.placed != before.placed
        if written and is_complete(wish):
            self.at = now
        elif before is None or (wish.spec, wish.priority) != (before.spec, before.priority):
            self.at = now + self._settle_s
