"""The part of a wish that starting needs."""

from __future__ import annotations

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.placement import Ground
from kvmsupervisor.domain.spec import Spec, Wish


@frozen(kw_only=True)
class Wanted:
    """The part of a runnable wish that starting needs."""

    spec: Spec
    ground: Ground | None
    restart_request: str | None
    revision: int
    priority: int


def wanted(wish: Wish | None) -> Wanted:
    """That part of `wish`, which can be run."""
    # Invariant of the decision: it starts nothing without a machine that can be built.
    assert wish is not None
    assert wish.spec is not None
    return Wanted(
        spec=wish.spec,
        ground=wish.ground,
        restart_request=wish.restart_request,
        revision=wish.revision,
        priority=wish.priority,
    )
