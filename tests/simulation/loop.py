"""An event loop in virtual time, whose next callback is drawn from a seed.

Nothing sleeps: when nothing is ready, time moves on to the next timer. What is ready is drawn, not queued:

- A step of a task may come before or after the steps of all other tasks. asyncio never has two steps of one task ready,
  so their order cannot change.
- All other callbacks of one life (what `call_soon` and timers call, and what futures call when they are done) keep
  their order among each other, as asyncio promises. Code that sets a future's result relies on that; code that relies
  on the order in which two *tasks* wake up would rely on which of two answers comes first.

A `Life` is one process of the world: a supervisor from its start to its end. Each callback belongs to the life in whose
context it was asked for. A frozen life's callbacks wait; a dead life's are gone, and no `finally` of it runs: SIGKILL.

Threads (`asyncio.to_thread`, `run_in_executor`) run at once, in place. There is no input and output: readers are
remembered, and never called.

Ties that Python breaks by addresses in memory (a set of tasks that is cancelled) do not show: what is ready is put into
the order in which its tasks were made before one is drawn.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import heapq
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

START_S = 1000.0


class Life:
    """One process, as the loop sees it.

    Attributes:
        name: for people.
        frozen: its callbacks wait.
        dead: its callbacks are gone.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.dead = False

    def __repr__(self) -> str:
        return self.name


WORLD = Life("world")

LIFE: contextvars.ContextVar[Life] = contextvars.ContextVar("LIFE", default=WORLD)
"""Whose callback runs."""


def context_of(life: Life) -> contextvars.Context:
    """A context in which callbacks belong to `life`."""
    context = contextvars.Context()
    context.run(LIFE.set, life)
    return context


class Stuck(Exception):
    """Nothing is ready, and no timer is left: the world waits for ever."""


class Spinning(Exception):
    """Too many steps without any time passing: something asks again and again."""


MOMENT_S = 1e-6
"""How much time passes at least between two rounds of timers."""

SPIN_LIMIT = 50_000
"""Steps at one instant. A supervisor with a few machines takes some hundred at its start."""


ROUNDS_TO_END = 5
"""How often all are told to end. The second time reaches who took the first for somebody else's."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module.

    Attributes:
        steps: callbacks that were run.
        on_step: called after each, with the life; None for nothing.
        errors: what was told to the loop's exception handler.
    """

    def __init__(self, seed: object = 0) -> None:
        super().__init__()
        self.steps = 0
        self.on_step: Callable[[Life], None] | None = None
        self.errors: list[str] = []
        self._now = START_S
        self._timer_cancelled_count = 0
        self._draw = Random(f"{seed}/loop").random
        # Ready callbacks by life and task; the number 0 is that of what belongs to no task.
        self._lanes: dict[tuple[int, int], deque[asyncio.Handle]] = {}
        self._lives: dict[Life, int] = {}
        self._order: list[Life] = []
        # What the dead will never do, for `abandon`.
        self._morgue: list[asyncio.Handle] = []
        # Invariant: holds every task that is not done, also of the dead: nothing is torn down at the collector's time.
        self._numbers: dict[asyncio.Task[Any], int] = {}
        self._made = 0
        self._spun = 0
        self.set_exception_handler(self._note)

    # --- time -------------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    # --- what is ready ----------------------------------------------------------------------------------------

    def create_task(  # type: ignore[override]
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        self._made += 1
        number = self._made
        # Its first step becomes ready while it is being made, before there is a number for it.
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        self._numbers[task] = number
        return task

    def _call_soon(
        self, callback: Callable[..., Any], args: Any, context: contextvars.Context | None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._enqueue(handle)
        return handle

    def _enqueue(self, handle: asyncio.Handle) -> None:
        life: Life = handle._context.get(LIFE, WORLD)  # type: ignore[attr-defined]
        if life.dead:
            self._morgue.append(handle)
            return
        owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
        number = 0 if not isinstance(owner, asyncio.Task) else self._numbers.get(owner, self._made)
        place = self._lives.get(life)
        if place is None:
            place = self._lives[life] = len(self._order)
            self._order.append(life)
        lane = place, number
        self._lanes.setdefault(lane, deque()).append(handle)

    def _pick(self) -> tuple[Life, asyncio.Handle] | None:
        """Draw one of the ready callbacks; None when there is none that may run."""
        while True:
            open_lanes = [lane for lane in self._lanes if not self._order[lane[0]].frozen]
            if not open_lanes:
                return None
            open_lanes.sort()
            lane = open_lanes[int(self._draw() * len(open_lanes))] if len(open_lanes) > 1 else open_lanes[0]
            life, handles = self._order[lane[0]], self._lanes[lane]
            handle = handles.popleft()
            if not handles:
                del self._lanes[lane]
            if life.dead:
                self._morgue.append(handle)
            elif not handle.cancelled():
                return life, handle

    # --- running ----------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        picked = self._pick()
        if picked is None:
            self._advance()
            return
        life, handle = picked
        self.steps += 1
        self._spun += 1
        if self._spun > SPIN_LIMIT:
            self._spun = 0
            said = f"{life} at {self._now:.3f}: {handle!r}"
            if life is WORLD:
                raise Spinning(said)
            self.errors.append(f"it spins: {said}")
            life.dead = True
        owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
        handle._run()
        if isinstance(owner, asyncio.Task) and owner.done():
            self._numbers.pop(owner, None)
        if self.on_step is not None:
            self.on_step(life)

    def _advance(self) -> None:
        """Move time on to the next timer, and make ready all that are due."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0].cancelled():
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]
        if not scheduled:
            if self._stopping:  # type: ignore[attr-defined]
                return
            raise Stuck
        self._spun = 0
        # A little more: who waits for an instant, and computes with fractions, has it behind it then.
        self._now = max(self._now, scheduled[0].when()) + MOMENT_S
        while scheduled and scheduled[0].when() <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False  # type: ignore[attr-defined]
            if handle.cancelled():
                self._timer_cancelled_count -= 1
            else:
                self._enqueue(handle)

    # --- what there is not ------------------------------------------------------------------------------------

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
            future.set_exception(error)
        return future

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        pass

    def remove_reader(self, fd: Any) -> bool:
        return False

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass

    # --- the end ----------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Have every task end that has not, the dead's too, so that nothing is left for the collector to finalise."""
        errors, self.errors, self.on_step = self.errors, [], None
        for life in self._order:
            life.dead = life.frozen = False
        for handle in self._morgue:
            self._enqueue(handle)
        self._morgue = []
        for _ in range(ROUNDS_TO_END):
            left = list(self._numbers)
            if not left:
                break
            for task in left:
                task.cancel()
            self.run_until_complete(asyncio.wait(left, timeout=60.0))
        for task in self._numbers:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._numbers.clear()
        self.run_until_complete(self.shutdown_asyncgens())
        self.errors = errors

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if LIFE.get().dead:
            return
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")


def run(main: Callable[[SimLoop], Coroutine[Any, Any, T]], seed: object = 0) -> T:
    """Run `main(loop)` to its end on a loop of its own."""
    loop = SimLoop(seed)
    # When garbage is collected is no part of a history: what it finalises would be.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(loop))
    finally:
        asyncio.set_event_loop(None)
        with warnings.catch_warnings():
            # Who is ended while it starts its parts has made coroutines that nobody awaits.
            warnings.simplefilter("ignore", RuntimeWarning)
            loop.abandon()
            gc.collect()
        loop.close()
        if was_enabled:
            gc.enable()
