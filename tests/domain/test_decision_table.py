"""The decision table (`decision.Row`) is what `decide` does: every row, every cell, in every direction.

`faults` compares three things: the rows, the code that names them, and views with the row that decided each. The views
are the cases of `test_lifecycle.py`, and each process with each lock, under each wish, with one more thing changed.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain import lifecycle
from kvmsupervisor.domain.decision import Cells, Row
from kvmsupervisor.domain.exits import Exit, ExitClass
from kvmsupervisor.domain.goal import Goal, goal
from kvmsupervisor.domain.history import Era
from kvmsupervisor.domain.incarnation import InstanceState
from kvmsupervisor.domain.lifecycle import decide
from kvmsupervisor.domain.lock import Claim, LockState, LockView, Storage
from kvmsupervisor.domain.spec import RestartPolicy, Spec
from kvmsupervisor.domain.transfer import Course, Stage
from kvmsupervisor.domain.view import Action, Holdover, LeftAlone, Process, Stopping, View
from tests.domain import test_errands as errands
from tests.domain import test_lifecycle as cases
from tests.domain import test_move as moves

SOURCES = {path.name: path.read_text() for path in sorted(Path(lifecycle.__file__).parent.glob("*.py"))}
PROCESSES = {"none", "ended", "paused", "coming", "ran"}
TABLE = (*cases.TABLE, *moves.TABLE, *errands.TABLE)
OURS = {"mine", "renamed", "leftover"}

# --- views ----------------------------------------------------------------------------------------------------

ended, paused, running = cases.running(exit=Exit(ExitClass.CRASHED, "c")), cases.paused(), cases.running()
QEMUS = (
    None, ended, paused, replace(paused, connected=False), running, replace(running, connected=False),
    replace(running, run_state="shutdown"), replace(running, stopping=Stopping(since=1.0, quit_at=100.0)),
    replace(running, incarnation=cases.UNVOUCHED),
    replace(running, incarnation=cases.record(epoch=2)), replace(paused, incarnation=cases.record(epoch=2)),
)  # fmt: skip
there = cases.locked(host=cases.OTHER, name="y")
NEWER = LockView(known=True, data=b'{"version":9}', mod_revision=3, as_of=9)
LOCKS = (
    LockView(), LockView(known=True, data=b"?", mod_revision=3, as_of=9), NEWER, cases.seen(None),
    *(cases.seen(lock) for lock in (
        cases.locked(), cases.locked(state=LockState.STARTING, pid=None),
        cases.locked(state=LockState.FENCING, pid=None), cases.locked(name="y"),
        replace(cases.locked(name="y"), state=LockState.FENCING),
        cases.locked(host=cases.OTHER), cases.locked(host=cases.OTHER, state=LockState.FENCING),
        there, cases.ON_RBD, replace(there, storage=Storage.UNFENCEABLE),
        cases.locked(state=LockState.BROKEN), replace(there, state=LockState.BROKEN),
        replace(cases.locked(state=LockState.BROKEN), fence=("192.0.2.1:0/1",)),
    )),
)  # fmt: skip
WISHES: tuple[dict[str, Any], ...] = (
    {}, {"wish": None}, {"wish": cases.WITH_IMAGE}, {"wish": cases.OFF}, {"wish": cases.OFF_NOW}, {"wish": cases.GONE},
    {"wish": cases.BAD, "problems": cases.BAD.problems}, {"wish": cases.MOVED, "target": cases.THERE},
    {"wish": cases.MOVED, "target": cases.ABSENT}, {"wish": replace(cases.PLACED_HERE, host_revision=6)},
    {"wish": replace(cases.PLACED_HERE, host=cases.ME, host_revision=6)},
    {"wish": replace(cases.DAMAGED, host=cases.OTHER), "problems": cases.DAMAGED.problems},
    {"wish": replace(cases.WISH, restart_request="r")}, {"wish": replace(cases.WISH, restart_request="reset:1")},
    {"wish": replace(cases.WISH, spec=Spec(ram_mib=128))},
    {"wish": replace(cases.WISH, restart=RestartPolicy.NEVER),
     "saved": InstanceState(boot_id=cases.BOOT, ended=cases.ENDED)},
)  # fmt: skip
MORE: tuple[dict[str, Any], ...] = (
    {}, {"looked": False}, {"session_held": False}, {"etcd_at": 102.0}, {"rival": "r"}, {"quiet_at": 102.0},
    {"guarded": False}, {"guarded": False, "guard_at": 102.0}, {"now": 110.0}, {"now": 170.0}, {"mismatch": "m"},
    {"mismatch": "m", "guarded": False}, {"dissent": "d"}, {"dissent": "d", "looked": False},
    {"draining": True}, {"leaving": "l"}, {"held": True}, {"locks_are_open": True},
    {"era": Era(foreign=True, since=9)}, {"clearing": cases.CLOSED}, {"clearing": cases.EVICTED},
    {"clearing": cases.CLOSED, "etcd_at": 102.0}, {"clearing": cases.CLOSED, "looked": False},
)  # fmt: skip
NOT_YET: tuple[dict[str, Any], ...] = (
    {"slot": True}, {"slot": False}, {"slot": False, "shortage": "s"}, {"prepared": False},
    {"obstacle": "o", "start_at": 102.0}, {"obstacle": "o"}, {"slot": True, "etcd_at": 102.0},
    {"clearing": cases.CLOSED},
)  # fmt: skip
WITHOUT_PROCESS: tuple[dict[str, Any], ...] = (
    *NOT_YET, *({"planned": "x", **more} for more in (*NOT_YET, {"rival": "r"})),
    *({"holder_has_session": False, **more} for more in (*NOT_YET, {"deferral": cases.WAITED})),
    *({"holder_has_session": False, "deferral": replace(cases.WAITED, until=0.0), **more} for more in NOT_YET),
    *({"looked": False, **more} for more in NOT_YET), {"looked": False, "session_held": False},
    {"holder_has_session": True}, {"rival": "r", "etcd_at": 102.0}, {"rival": "r", "ask_at": 102.0},
    {"rival": "r", "ask_at": 102.0, "looked": False}, {"claimed_by": cases.OTHER},
    {"claimed_by": cases.OTHER, "etcd_at": 102.0}, {"holdover": Holdover(pid=42, starttime=9)}, {"era": cases.AWAITED},
    *({"era": cases.RESTORED, "slot": True, "holder_has_session": False, **more} for more in (
        {}, {"planned": "x"}, {"deferral": cases.WAITED}, {"deferral": cases.WAITED, "planned": "x"},
    )),
    {"saved": InstanceState(boot_id=cases.BOOT, not_before=102.0)}, {"left_alone": LeftAlone(reason="r")},
    {"left_alone": LeftAlone(reason="r", look_at=102.0)},
    {"left_alone": LeftAlone(reason="r", look_at=102.0), "looked": False},
)  # fmt: skip
CLOCKS: tuple[dict[str, float], ...] = (
    {"probe_at": 101.0}, {"plug_at": 101.0}, {"grow_at": 101.0}, {"room_at": 101.0}, {"connect_at": 102.0},
)  # fmt: skip


COURSES = (
    Course(), Course(cold="c"), Course(cold="c", only_live=True), moves.LIVE, moves.READY, moves.SENDS,
    *(replace(course, give_up_at=100.0) for course in (moves.LIVE, moves.SENDS, moves.TOLD)),
    replace(moves.SENDS, refused=True), moves.TAKES, moves.TOLD, replace(moves.TAKES, offered=True),
    replace(moves.TAKES, called=True), replace(moves.TOLD, told=False),
)  # fmt: skip
MOVERS = (
    None, *(moves.sending(stage) for stage in Stage), *(moves.coming(stage=stage) for stage in Stage), moves.HAS_ALL,
    moves.coming(run_state="running"),
    *(replace(paused, stage=stage, probe_at=101.0) for stage in (Stage.DONE, Stage.IDLE)),
    *(replace(moves.coming(), connected=False, connect_at=at) for at in (0.0, 105.0)),
    *(replace(one, connected=False, connect_at=105.0) for one in (running, paused)),
    moves.sending(Stage.DONE, connected=False),
    replace(moves.coming(), probe_at=101.0),
    *(replace(moves.sending(stage), probe_at=101.0) for stage in (Stage.IDLE, Stage.ACTIVE, Stage.DONE)),
)  # fmt: skip
MOVING_LOCKS = (
    LockView(), LockView(known=True, data=b"?", mod_revision=3, as_of=9),
    NEWER, cases.seen(None),
    *(cases.seen(lock) for lock in (
        moves.HERE, moves.MOVING, moves.THEIRS, moves.COMING_LOCK, moves.GIVEN, replace(moves.GIVEN, facts="/other"),
        replace(moves.GIVEN, paused=True), replace(moves.MOVING, host=cases.OTHER), cases.locked(name="z"),
        cases.locked(state=LockState.BROKEN), replace(moves.MOVING, facts="/other"),
        replace(moves.HERE, facts="/other"),
    )),
)  # fmt: skip
WHILE_MOVING: tuple[dict[str, Any], ...] = (
    {}, {"session_held": False}, {"etcd_at": 102.0}, {"draining": True}, {"era": cases.RESTORED}, {"guarded": False},
    {"era": Era(number=1, since=9)}, {"holder_has_session": True}, {"held": True}, {"mismatch": "m"},
)  # fmt: skip
MOVE_WISHES: tuple[dict[str, Any], ...] = (
    moves.GOES, {"wish": cases.LIVE_ONLY, "target": cases.THERE}, {},
    {"wish": None}, {"wish": cases.GONE}, {"wish": cases.OFF_NOW},
    {"wish": replace(cases.WISH, restart=RestartPolicy.NEVER),
     "saved": InstanceState(boot_id=cases.BOOT, ended=cases.ENDED)},
    {"wish": replace(cases.WISH, restart_request="r")},
)  # fmt: skip


def moving() -> Iterator[View]:
    """One thing at a time changed of each process with each lock: all of all would take minutes."""
    for qemu, lock in itertools.product(MOVERS, MOVING_LOCKS):
        plain = {"process": qemu, "lock": lock, "course": moves.SENDS}
        yield from (cases.view(**plain, **wish) for wish in MOVE_WISHES)
        yield from (cases.view(**{**plain, **wish, **more}) for wish in MOVE_WISHES[:3] for more in WHILE_MOVING)
        for wish, course in itertools.product(MOVE_WISHES[:3], COURSES):
            there = {**plain, "course": course, "holder_has_session": True, **wish}
            yield cases.view(**there)
            yield cases.view(**{**there, "etcd_at": 102.0})


def views() -> Iterator[View]:
    yield from moving()
    for qemu, lock, wish in itertools.product(QEMUS, LOCKS, WISHES):
        for more in (*MORE, *WITHOUT_PROCESS) if qemu is None else MORE:
            yield cases.view(**{"process": qemu, "lock": lock, **wish, **more})
        if qemu is not None:
            for clock in CLOCKS:
                yield cases.view(process=replace(qemu, **clock), lock=lock, **wish)
            if "wish" not in wish:
                # What the key wants is not in its drive.
                drives = {"process": replace(qemu, spec=cases.WITH_DRIVE), "wish": cases.MEDIUM_WANTED}
                yield from (cases.view(**drives, lock=lock, **more) for more in MORE)


def process_of(process: Process | None) -> str:
    if process is None:
        return "none"
    if process.exit is not None:
        return "ended"
    if process.incarnation.incoming:
        return "coming"
    return "paused" if process.never_ran else "ran"


@dataclass
class Seen:
    """What the views were like that one row decided: the words of its cells."""

    process: set[str] = field(default_factory=set)
    lock: set[str] = field(default_factory=set)
    goal: set[str] = field(default_factory=set)
    action: set[str] = field(default_factory=set)


@cache
def decided() -> Mapping[str, Seen]:
    """By row."""
    found: dict[str, Seen] = {}
    for view in (*(case[2] for case in TABLE), *views()):
        decision = decide(view)
        seen = found.setdefault(decision.row.name, Seen())
        seen.process.add(process_of(view.process))
        seen.lock.add(view.claim.name.lower())
        seen.goal.add(goal(view)[0].name.lower())
        seen.action.add("wait" if decision.action is None else decision.action.name.lower())
    return found


# --- the comparison -------------------------------------------------------------------------------------------


def words(cell: str) -> set[str]:
    told = set(cell.split())
    return told - {"ours"} | OURS if "ours" in told else told


def wrong_cells(rows: Mapping[str, Cells], found: Mapping[str, Seen]) -> Iterator[str]:
    """A cell names what its row decided, all of it, and nothing else."""
    known = {
        "process": PROCESSES,
        "lock": {claim.name.lower() for claim in Claim},
        "goal": {each.name.lower() for each in Goal},
        "action": {"wait", *(action.name.lower() for action in Action)},
    }
    for name, cells in rows.items():
        for column, values in known.items():
            told, seen = words(getattr(cells, column)), getattr(found.get(name, Seen()), column)
            if told == {"any"}:
                continue
            yield from (f"{name}: {column} `{word}` is no such word" for word in sorted(told - values))
            yield from (f"{name}: {column} `{word}` never comes" for word in sorted(told & values - seen))
            yield from (f"{name}: {column} `{word}` is not in its cell" for word in sorted(seen - told))


@cache
def named(source: str) -> list[list[str]]:
    """The rows that each function of a module names, in its order."""
    functions = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            found = [
                (node.lineno, node.col_offset, node.attr)
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Row"
            ]
            functions.append([name for *_, name in sorted(found)])
    return functions


def faults(
    rows: Mapping[str, Cells], sources: Mapping[str, str], told: Mapping[str, str], found: Mapping[str, Seen]
) -> list[str]:
    """Where rows, code and cases differ.

    Args:
        rows: the table.
        sources: the modules of the domain.
        told: case → the row that it names.
        found: what each row decided.
    """
    order = list(rows)
    functions = [names for source in sources.values() for names in named(source)]
    in_code = {name for names in functions for name in names}
    said = [f"{name}: no code decides by it" for name in rows if name not in in_code]
    said += [f"{name}: no row of the table" for name in sorted(in_code - rows.keys())]
    said += [f"{name}: no case names it" for name in rows if name not in told.values()]
    actual = {what: decide(case).row.name for what, _, case, *_ in TABLE}
    said += [f"{what}: decided by {actual[what]}, not by {name}" for what, name in told.items() if actual[what] != name]
    for names in functions:
        known = [name for name in names if name in rows]
        said += [f"{b}: stands before {a}" for a, b in itertools.pairwise(known) if order.index(a) > order.index(b)]
    return [*said, *wrong_cells(rows, found)]


ROWS = {row.name: row.value for row in Row}
WITH_STRAY = {**ROWS, "STRAY": ROWS["RUNS"]}
TOLD = {what: row.name for what, row, *_ in TABLE}


def test_rows_code_and_cases_are_the_same() -> None:
    """Each row is decided by some code and has a case; each code and each case names a row, and the right one."""
    assert faults(ROWS, SOURCES, TOLD, decided()) == []
    assert len(TOLD) == len(TABLE), "two cases of one name"


def test_every_action_is_decided_somewhere() -> None:
    """No action is dead."""
    assert {action for *_, action in TABLE} == {*Action, None}


def swapped(rows: Mapping[str, Cells], a: str, b: str) -> dict[str, Cells]:
    return {{a: b, b: a}.get(name, name): rows[{a: b, b: a}.get(name, name)] for name in rows}


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        pytest.param({"rows": WITH_STRAY}, "STRAY: no code decides by it", id="a row without code"),
        pytest.param({"rows": WITH_STRAY}, "STRAY: no case names it", id="a row without a case"),
        pytest.param({"sources": {**SOURCES, "x.py": "def f(): return Row.STRAY"}}, "STRAY: no row of the table",
                     id="code without a row"),
        pytest.param({"sources": {**SOURCES, "lifecycle.py": SOURCES["lifecycle.py"].replace("Row.RESET", "Row.RUNS")}},
                     "RESET: no code decides by it", id="a row that code has lost"),
        pytest.param({"told": {k: v for k, v in TOLD.items() if v != "RUNS_PLUG"}}, "RUNS_PLUG: no case names it",
                     id="a row that has lost its cases"),
        pytest.param({"told": {**TOLD, "off and free is stopped": "REST_LOOK"}},
                     "off and free is stopped: decided by REST, not by REST_LOOK", id="a case of another row"),
        pytest.param({"rows": {**ROWS, "RECORD": ROWS["RECORD"]._replace(lock="mine renamed")}},
                     "RECORD: lock `renamed` never comes", id="a cell that is too wide"),
        pytest.param({"rows": {**ROWS, "TAKE": ROWS["TAKE"]._replace(lock="absent")}},
                     "TAKE: lock `leftover` is not in its cell", id="a cell that is too narrow"),
        pytest.param({"rows": {**ROWS, "SPAWN": ROWS["SPAWN"]._replace(action="record")}},
                     "SPAWN: action `spawn` is not in its cell", id="another action"),
        pytest.param({"rows": {**ROWS, "SPAWN": ROWS["SPAWN"]._replace(goal="walk")}},
                     "SPAWN: goal `walk` is no such word", id="a word of no column"),
        pytest.param({"rows": swapped(ROWS, "STOP_FORCE", "STOP_ASK")}, "STOP_CONNECT: stands before STOP_FORCE",
                     id="two rows in another order than in the code"),
    ],
)  # fmt: skip
def test_each_difference_is_found(planted: dict[str, Any], fault: str) -> None:
    """The comparison above can fail, in each direction."""
    whole = {"rows": ROWS, "sources": SOURCES, "told": TOLD, "found": decided()}
    assert fault in faults(**{**whole, **planted})
