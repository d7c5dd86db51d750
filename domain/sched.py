"""Kernel threads: coroutines run by one small scheduler. Blocking is `await`; the idle loop is the domain's block.

A domain is one virtual CPU: one task runs until it awaits. There is no preemption and there are no locks.

Interface:
  * Scheduler.spawn(coroutine) -> Task; run(until=task): drives everything, calling `idle(timeout_s)` with nothing to run.
  * Event, Queue: what tasks wait on. sleep_until, gather, timeout.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Generic, TypeVar

NEVER = 1 << 63  # ns

T = TypeVar("T")


class Cancelled(BaseException):
    """Thrown into a task that was cancelled; not an Exception, so that handlers of errors let it pass."""


class TimeoutExpired(Exception):
    """`timeout` ran out."""


class _Park:
    """What a task yields to its scheduler: it is woken by Task.wake."""

    def __await__(self) -> Generator[_Park, None, None]:
        yield self


_PARK = _Park()


class Task(Generic[T]):
    """One coroutine. Awaiting it gives its value or raises what it raised."""

    def __init__(self, scheduler: Scheduler, coroutine: Coroutine[Any, Any, T], name: str) -> None:
        self.name, self._coroutine, self._scheduler = name or getattr(coroutine, "__qualname__", "task"), coroutine, scheduler
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None
        self._finished = Event(scheduler)
        self._queued = self._cancelled = False

    def wake(self) -> None:
        """Let it run again; idempotent until it does."""
        if not self.done and not self._queued:
            self._queued = True
            self._scheduler.ready.append(self)

    def cancel(self) -> None:
        """Throw Cancelled into it at its next turn."""
        if not self.done:
            self._cancelled = True
            self.wake()

    def step(self) -> None:
        self._queued = False
        if self.done:
            return  # it cancelled itself, and ended before that could reach it
        try:
            if self._cancelled:
                self._cancelled = False
                self._coroutine.throw(Cancelled())
            else:
                self._coroutine.send(None)
        except StopIteration as stop:
            self.value = stop.value
        except Cancelled as error:
            self.error = error
        except Exception as error:
            self.error = error
            if not self._finished.waited:
                self._scheduler.on_error(self, error)
        else:
            return
        self.done = True
        self._scheduler.tasks.discard(self)
        self._finished.set()

    def __await__(self) -> Generator[Any, None, T]:
        self._finished.waited = True
        yield from self._finished.wait().__await__()
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Timer:
    """A call that is due at a time."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Scheduler:
    """Runs tasks in the order they became ready."""

    def __init__(self, now_ns: Callable[[], int], idle: Callable[[float], None]) -> None:
        self.now_ns, self._idle = now_ns, idle
        self.ready: deque[Task[Any]] = deque()
        self.tasks: set[Task[Any]] = set()
        self.current: Task[Any] | None = None
        self._timers: list[tuple[int, int, Timer]] = []
        self._order = itertools.count()
        self.on_error: Callable[[Task[Any], BaseException], None] = lambda task, error: None

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str = "") -> Task[T]:
        task = Task(self, coroutine, name)
        self.tasks.add(task)
        task.wake()
        return task

    def at(self, deadline_ns: int, call: Callable[[], None]) -> Timer:
        """`call` at system time `deadline_ns`, never earlier, unless it is cancelled before."""
        timer = Timer(call)
        heapq.heappush(self._timers, (deadline_ns, next(self._order), timer))
        return timer

    def run(self, until: Task[T]) -> T:
        """Until that task is done; returns its value or raises its error. Other tasks stay where they are."""
        until._finished.waited = True
        ready = self.ready
        while True:
            if self._timers:
                self._run_timers()
            for _ in range(len(ready)):
                self.current = task = ready.popleft()
                task.step()
                if until.done:
                    break
            self.current = None
            if until.done:
                break
            self._idle(0.0 if ready else self._until_timer() if self._timers else -1.0)
        if until.error is not None:
            raise until.error
        return until.value  # type: ignore[return-value]

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now_ns():
            call = heapq.heappop(self._timers)[2].call
            if call is not None:
                call()

    def next_timer(self) -> int:
        """System time of the next timer, NEVER for none: for who keeps the processor from this scheduler."""
        return self._timers[0][0] if self._timers else NEVER

    def overdue(self) -> bool:
        """Whether a timer is."""
        return bool(self._timers) and self._timers[0][0] <= self.now_ns()

    def _until_timer(self) -> float:
        """Seconds to the next timer, -1 for none. A cancelled one wakes nobody."""
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        return max(0.0, (self._timers[0][0] - self.now_ns()) / 1e9) if self._timers else -1.0


def current_scheduler() -> Scheduler:
    """The scheduler of this virtual CPU."""
    assert _schedulers, "no scheduler is running"
    return _schedulers[-1]


_schedulers: list[Scheduler] = []


def install(scheduler: Scheduler) -> None:
    """Make it the one that Event, Queue and sleep use."""
    _schedulers.append(scheduler)


class Event:
    """A flag that tasks wait for; it stays set until cleared."""

    def __init__(self, scheduler: Scheduler | None = None) -> None:
        self._scheduler = scheduler
        self._waiting: list[Task[Any]] = []
        self.is_set = False
        self.waited = False

    def set(self) -> None:
        self.is_set = True
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            task.wake()

    def clear(self) -> None:
        self.is_set = False

    async def wait(self) -> None:
        while not self.is_set:
            task = (self._scheduler or current_scheduler()).current
            assert task is not None, "wait outside a task"
            self._waiting.append(task)
            try:
                await _PARK
            finally:
                if task in self._waiting:
                    self._waiting.remove(task)


class Queue(Generic[T]):
    """Items in order, from any task to any task."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._event = Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        self._items.append(item)
        self._event.set()

    async def get(self) -> T:
        while not self._items:
            self._event.clear()
            await self._event.wait()
        return self._items.popleft()


async def sleep_until(deadline_ns: int) -> None:
    """Until system time `deadline_ns`, never less."""
    due = Event()
    current_scheduler().at(deadline_ns, due.set)
    await due.wait()


async def sleep(seconds: float) -> None:
    await sleep_until(current_scheduler().now_ns() + int(seconds * 1e9))


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All side by side; their values in order, or the first error, once every one has ended."""
    tasks = [current_scheduler().spawn(coroutine) for coroutine in coroutines]
    for task in tasks:
        task._finished.waited = True  # an error is ours to raise, however early it comes
    for task in tasks:
        await task._finished.wait()
    return [await task for task in tasks]


async def timeout(seconds: float, coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's value, or TimeoutExpired and the coroutine is cancelled."""
    scheduler = current_scheduler()
    task = scheduler.spawn(coroutine)
    task._finished.waited = True
    expired = False

    def expire() -> None:
        nonlocal expired
        if not task.done:
            expired = True
            task.cancel()

    timer = scheduler.at(scheduler.now_ns() + int(seconds * 1e9), expire)
    try:
        return await task
    except Cancelled:
        task.cancel()
        if expired and task.done:
            raise TimeoutExpired(f"{seconds} s") from None
        raise
    finally:
        timer.cancel()
