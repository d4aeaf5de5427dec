"""Faults that are planted, to see that the simulation finds them: laws left out, and mends taken back.

`python -m tests.simulation --mutant NAME --seeds 1-1000` plays with one of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest

from kvmsupervisor.adapters.etcd import Compare
from kvmsupervisor.cluster import history, session
from kvmsupervisor.cluster import lock as lock_module
from kvmsupervisor.cluster.fencing import CephFencing
from kvmsupervisor.cluster.lock import compares as right_compares
from kvmsupervisor.domain.decision import Decision
from kvmsupervisor.domain.incarnation import Incarnation
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Change, Lock, LockState
from kvmsupervisor.domain.lock import take as domain_take
from kvmsupervisor.domain.view import Action, View
from kvmsupervisor.instance import start, worker
from kvmsupervisor.supervisor import identity

Plant = Callable[[pytest.MonkeyPatch], None]

MUTANTS: dict[str, Plant] = {}


def mutant(plant: Plant) -> Plant:
    """Register one, under its function's name."""
    MUTANTS[plant.__name__.replace("_", "-")] = plant
    return plant


def _with_decisions(patch: pytest.MonkeyPatch, change: Callable[[View, Decision], Decision]) -> None:
    patch.setattr(worker, "decide", lambda view: change(view, decide(view)))


# --- the lock ---------------------------------------------------------------------------------------------------


@mutant
def lock_without_session(patch: pytest.MonkeyPatch) -> None:
    """Laws 2 and 4: neither our own session is compared, nor that the holder has none."""

    def left(change: Change, **told: Any) -> list[Compare]:
        return [one for one in right_compares(change, **told) if "/hosts/" not in one.key]

    patch.setattr(lock_module, "compares", left)


@mutant
def epoch_stands_still(patch: pytest.MonkeyPatch) -> None:
    """Law 2: a new incarnation takes over its predecessor's epoch."""
    right = domain_take

    def take(previous: Lock | None, **told: Any) -> Lock:
        lock = right(previous, **told)
        return lock if previous is None else replace(lock, epoch=previous.epoch)

    patch.setattr(start, "take", take)


@mutant
def epoch_begins_again(patch: pytest.MonkeyPatch) -> None:
    """Law 2: what the status tells of the last epoch is not looked at."""
    right = domain_take

    def take(previous: Lock | None, **told: Any) -> Lock:
        return right(previous, **{**told, "epoch_floor": 0})

    patch.setattr(start, "take", take)


@mutant
def addresses_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Law 4: whoever takes a lock does not take over what there is to fence."""
    right = domain_take

    def take(previous: Lock | None, **told: Any) -> Lock:
        return replace(right(previous, **told), fence=(), state=LockState.STARTING, taken_from=None)

    patch.setattr(start, "take", take)


# --- storage ----------------------------------------------------------------------------------------------------


@mutant
def no_fence(patch: pytest.MonkeyPatch) -> None:
    """Law 4: nobody is shut out."""

    async def fence(self: CephFencing, addresses: Collection[str]) -> None:
        await asyncio.sleep(0)

    patch.setattr(CephFencing, "fence", fence)


@mutant
def no_clients_on_record(patch: pytest.MonkeyPatch) -> None:
    """Law 3: a guest runs before its storage clients are on record."""

    async def clients(self: CephFencing, record: Incarnation, known: Collection[str] = ()) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ()

    patch.setattr(CephFencing, "clients", clients)


@mutant
def shut_out_unnoticed(patch: pytest.MonkeyPatch) -> None:
    """The mend of simulation seed 12 taken back: a lock is written again without asking Ceph."""

    async def shut_out(self: CephFencing, addresses: Collection[str]) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ()

    patch.setattr(CephFencing, "shut_out", shut_out)


@mutant
def runs_before_the_record(patch: pytest.MonkeyPatch) -> None:
    """Law 3: `cont` comes before the swap."""

    def change(view: View, decision: Decision) -> Decision:
        return replace(decision, action=Action.CONTINUE) if decision.action is Action.RECORD else decision

    _with_decisions(patch, change)


# --- decisions --------------------------------------------------------------------------------------------------


@mutant
def killed_without_session(patch: pytest.MonkeyPatch) -> None:
    """Law 6: a guest is killed because its host has no session."""

    def change(view: View, decision: Decision) -> Decision:
        if not view.session_held and view.process is not None and view.process.exit is None:
            return replace(decision, action=Action.KILL)
        return decision

    _with_decisions(patch, change)


@mutant
def released_while_it_lives(patch: pytest.MonkeyPatch) -> None:
    """Law 9: the lock is let go of when the power button is pressed."""

    def change(view: View, decision: Decision) -> Decision:
        return replace(decision, action=Action.RELEASE) if decision.action is Action.POWERDOWN else decision

    _with_decisions(patch, change)


@mutant
def any_name_will_do(patch: pytest.MonkeyPatch) -> None:
    """Law 12: what lives is not asked under which name it was started."""
    patch.setattr(identity, "judge", lambda wanted, living: (wanted, None))


@mutant
def any_history_will_do(patch: pytest.MonkeyPatch) -> None:
    """Law 11: nobody makes sure that etcd has the same history."""

    async def prove(self: history.History) -> None:
        await asyncio.sleep(0)

    patch.setattr(history.History, "prove", prove)


@mutant
def session_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Law 1: a session counts as held whatever etcd says."""
    patch.setattr(session.Session, "held", property(lambda self: self._create_revision != 0))
