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
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
Loop = TypeVar("Loop", bound="SimLoop")

START_S = 1000.0

copy_context = contextvars.copy_context
_new_handle = object.__new__


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


class _Handle(asyncio.TimerHandle):
    """A callback that will be run. Made by `SimLoop._handle`: there are millions, and asyncio's take twice as long."""

    def __init__(self) -> None:
        pass

    # Of two that are due at the same time, neither comes before the other: the heap leaves them as they lie.
    def __lt__(self, other: object) -> bool:
        return False

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None  # type: ignore[assignment]


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


LANE_BITS = 40
TASK_BITS = (1 << LANE_BITS) - 1
"""A lane is one number: the life's, then, in so many bits, the task's; 0 is no task."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module.

    Attributes:
        steps: callbacks that were run.
        now_s: the time.
        on_step: called after each that has stirred something, with the life; None for nothing.
        stirred: something happened that `on_step` looks at. Most steps only pass something on.
        errors: what was told to the loop's exception handler.
    """

    def __init__(self, seed: object = 0) -> None:
        super().__init__()
        self.steps = 0
        self.on_step: Callable[[Life], None] | None = None
        self.stirred = False
        self.errors: list[str] = []
        self.now_s = START_S
        # When, and what: a heap.
        self._timers: list[tuple[float, _Handle]] = []
        self._draw = Random(f"{seed}/loop").random
        # Ready callbacks by lane; a lane is that of one task, or of all that belongs to a life and to no task of it.
        self._ready: dict[int, Any] = {}
        self._lives: dict[Life, int] = {}
        self._order: list[Life] = []
        # What the dead will never do, for `abandon`.
        self._morgue: list[asyncio.Handle] = []
        # Invariant: holds every task that is not done, also of the dead: nothing is torn down at the collector's time.
        self._lane_of: dict[Any, int] = {}
        self._made = 0
        self._spins_at = SPIN_LIMIT
        self.set_exception_handler(self._note)

    # --- time -------------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> asyncio.Future[None]:
        """`asyncio.sleep`, for what nobody cancels: half as dear."""
        future: asyncio.Future[None] = self.create_future()
        self.call_later(seconds, _wake, future)
        return future

    # --- what is ready ----------------------------------------------------------------------------------------

    def create_task(  # type: ignore[override]
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        self._made += 1
        # Its first step becomes ready while it is being made, before there is a lane for it.
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        life = LIFE.get() if context is None else context.get(LIFE, WORLD)
        self._lane_of[task] = self._lane(life, self._made)
        return task

    def _lane(self, life: Life, number: int) -> int:
        place = self._lives.get(life)
        if place is None:
            place = self._lives[life] = len(self._order)
            self._order.append(life)
        return (place << LANE_BITS) + number

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = self._handle(0.0, callback, args, context)
        self._enqueue(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = self._handle(when, callback, args, context)
        heapq.heappush(self._timers, (when, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        when = self.now_s + delay
        handle = self._handle(when, callback, args, context)
        heapq.heappush(self._timers, (when, handle))
        return handle

    def _handle(
        self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> _Handle:
        handle: Any = _new_handle(_Handle)
        handle._context = copy_context() if context is None else context
        handle._loop, handle._when = self, when
        handle._callback, handle._args = callback, args
        handle._cancelled = False
        handle._repr = handle._source_traceback = None
        return handle  # type: ignore[no-any-return]

    def _enqueue(self, handle: asyncio.Handle) -> None:
        owner, lane = getattr(handle._callback, "__self__", None), None  # type: ignore[attr-defined]
        is_step = type(owner) is asyncio.Task
        if is_step:
            lane = self._lane_of.get(owner)
        if lane is None:
            life: Life = handle._context.get(LIFE, WORLD)  # type: ignore[attr-defined]
            lane = self._lane(life, self._made if is_step else 0)
        if self._order[lane >> LANE_BITS].dead:
            self._morgue.append(handle)
            return
        waiting = self._ready.get(lane)
        if waiting is None:
            # A task has one step that is ready, at most.
            self._ready[lane] = handle if is_step else deque((handle,))
        elif type(waiting) is deque:
            waiting.append(handle)
        else:
            self._ready[lane] = deque((waiting, handle))

    # --- running ----------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        """Run what is ready, drawn one by one, and whenever nothing is, move time on; until the loop is to stop."""
        while True:
            lane = self._drawn()
            if lane is None:
                self._advance()
            else:
                life, handle = self._order[lane >> LANE_BITS], self._first_of(lane)
                if life.dead:
                    self._morgue.append(handle)
                    continue
                if handle._cancelled:
                    continue
                self._step(life, lane, handle)
            if self._stopping:  # type: ignore[attr-defined]
                return

    def _drawn(self) -> int | None:
        """The lane of which something is run next; None when there is none that may."""
        ready, order = self._ready, self._order
        if len(ready) == 1:
            # Mostly there is one only.
            (lane,) = ready
            return None if order[lane >> LANE_BITS].frozen else lane
        lanes = [lane for lane in ready if not order[lane >> LANE_BITS].frozen]
        if len(lanes) > 1:
            lanes.sort()
            return lanes[int(self._draw() * len(lanes))]
        return lanes[0] if lanes else None

    def _first_of(self, lane: int) -> Any:
        waiting = self._ready[lane]
        if type(waiting) is deque:
            first = waiting.popleft()
            if not waiting:
                del self._ready[lane]
            return first
        del self._ready[lane]
        return waiting

    def _step(self, life: Life, lane: int, handle: Any) -> None:
        self.steps += 1
        if self.steps > self._spins_at:
            self._spin(life, handle)
        callback = handle._callback
        try:
            handle._context.run(callback, *handle._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as asyncio does: whatever it is, the loop goes on
            told = {"message": f"Exception in callback {handle!r}", "exception": error, "handle": handle}
            self.call_exception_handler(told)
        if lane & TASK_BITS and callback.__self__.done():
            self._lane_of.pop(callback.__self__, None)
        if self.stirred and self.on_step is not None:
            self.stirred = False
            self.on_step(life)

    def _spin(self, life: Life, handle: asyncio.Handle) -> None:
        self._spins_at = self.steps + SPIN_LIMIT
        said = f"{life} at {self.now_s:.3f}: {handle!r}"
        if life is WORLD:
            raise Spinning(said)
        self.errors.append(f"it spins: {said}")
        self.stirred = True
        life.dead = True

    def _advance(self) -> None:
        """Move time on to the next timer, and make ready all that are due."""
        timers = self._timers
        while timers and timers[0][1]._cancelled:
            heapq.heappop(timers)
        if not timers:
            if self._stopping:  # type: ignore[attr-defined]
                return
            raise Stuck
        self._spins_at = self.steps + SPIN_LIMIT
        # A little more: who waits for an instant, and computes with fractions, has it behind it then.
        now = self.now_s = max(self.now_s, timers[0][0]) + MOMENT_S
        while timers and timers[0][0] <= now:
            _, handle = heapq.heappop(timers)
            if not handle._cancelled:
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
        # Taken away first: whatever were put back there would be come upon again, for ever.
        morgue, self._morgue = self._morgue, []
        for handle in morgue:
            self._enqueue(handle)
        for _ in range(ROUNDS_TO_END):
            left = list(self._lane_of)
            if not left:
                break
            for task in left:
                task.cancel()
            self.run_until_complete(asyncio.wait(left, timeout=60.0))
        for task in self._lane_of:
            task._log_destroy_pending = False
        self._lane_of.clear()
        self.run_until_complete(self.shutdown_asyncgens())
        self.errors = errors

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if LIFE.get().dead:
            return
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")
        self.stirred = True


@contextmanager
def apart() -> Iterator[None]:
    """Collect no garbage on the way: when that is done is no part of a history, as what it finalises would be.

    What is garbage at the end is collected then. So whoever holds the history's world must have let go of it by then:
    the collector never comes upon it again, as what is there before is none of its business.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    # To look through all that was there before, at each collection, took a seventh of a history.
    gc.freeze()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            # As in `run_within`.
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def run(main: Callable[[SimLoop], Coroutine[Any, Any, T]], seed: object = 0) -> T:
    """Run `main(loop)` to its end on a loop of its own."""
    return run_on(SimLoop(seed), main)


def run_on(loop: Loop, main: Callable[[Loop], Coroutine[Any, Any, T]]) -> T:
    """The same on a given loop, which is closed then."""
    with apart():
        return run_within(loop, main)


def run_within(loop: Loop, main: Callable[[Loop], Coroutine[Any, Any, T]]) -> T:
    """The same for who is `apart`."""
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(loop))
    finally:
        asyncio.set_event_loop(None)
        with warnings.catch_warnings():
            # Who is ended while it starts its parts has made coroutines that nobody awaits.
            warnings.simplefilter("ignore", RuntimeWarning)
            loop.abandon()
        loop.close()
