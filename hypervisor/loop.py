"""One thread, one epoll loop, no locks: whoever runs here runs alone until it returns or yields.

A handler that must wait is a generator: it yields a Wait and is resumed with what it waited for. It holds whatever
references it took before it yielded, and re-validates afterwards what may have changed meanwhile.

Interface:
  * Loop.watch(fd, handler), unwatch(fd): level-triggered. Handlers tolerate a spurious call: one batch of events may name
    a descriptor that an earlier handler of the same batch closed and another reused.
  * Loop.at(deadline_ns, call), Timer.cancel(); Loop.soon(call): next turn.
  * run_task(generator, done): drive a continuation to its end.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

Resume = Callable[[Any], None]
Wait = Callable[[Resume], None]  # begin waiting; call resume(value) or resume(exception), once
Steps = Generator[Wait, Any, Any]
FAR_NS = 1 << 60
LONGEST = 3600.0  # seconds: epoll takes no more than 24 days
CLOSE = 0.004  # seconds
SWEEP = 1024  # timers, live or cancelled, before the cancelled ones are thrown out
SLICE = 512  # calls of one turn before descriptors are looked at again


class Timer:
    """A call that is due at a time, unless cancelled."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._select = select.select
        assert self._epoll.fileno() < 1024, "select takes no more"
        self._handlers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[int, int, Timer]] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._sweep_at = SWEEP
        self._order = itertools.count()
        self.before_sleep: Callable[[], bool] = lambda: False  # True: something was done, look again instead
        self.stopped = False

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call `handler` while `fd` is readable or hung up."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Idempotent; before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def at(self, deadline_ns: int, call: Callable[[], None]) -> Timer:
        """`call` at CLOCK_MONOTONIC `deadline_ns`, never earlier; a guest's choice of a time past 35 years is 35 years."""
        if len(self._timers) >= self._sweep_at:  # cancelled ones wait for a day that a guest chose, perhaps next year
            self._timers = [entry for entry in self._timers if entry[2].call is not None]
            heapq.heapify(self._timers)
            self._sweep_at = max(SWEEP, 2 * len(self._timers))
        timer = Timer(call)
        heapq.heappush(self._timers, (min(deadline_ns, FAR_NS), next(self._order), timer))
        return timer

    def soon(self, call: Callable[[], None]) -> None:
        self._soon.append(call)

    def turn(self, resume: Resume) -> None:
        """A Wait: let everybody else have a turn."""
        self.soon(lambda: resume(None))

    def run(self) -> None:
        while not self.stopped:
            self.step()

    def step(self) -> None:
        """One turn: due timers, posted calls, ready descriptors."""
        self._run_timers()
        for _ in range(min(len(self._soon), SLICE)):
            self._soon.popleft()()
        looked = not self._soon and self.before_sleep()
        for fd, _ in self._epoll.poll(0 if looked else self._sleep(), 64):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler()

    def _run_timers(self) -> None:
        now = time.monotonic_ns()
        while self._timers and (self._timers[0][2].call is None or self._timers[0][0] <= now):
            call = heapq.heappop(self._timers)[2].call
            if call is not None:
                call()

    def _sleep(self) -> float:
        """How long epoll may sleep, in seconds. It counts in milliseconds, rounded up: it stops short of a timer, and the rest
        is waited for here, to the microsecond. That costs one call more, where a timer is near."""
        left = self._until_due()
        if left > CLOSE:
            return left - CLOSE / 2
        if left > 0:
            self._select([self._epoll], (), (), left)
            return 0
        return left

    def _until_due(self) -> float:
        """Seconds that may be slept, -1 without end. Asked last before sleeping: a posted call may have set a timer."""
        if self._soon:
            return 0
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        return min(max(0, self._timers[0][0] - time.monotonic_ns() + 999) / 1e9, LONGEST) if self._timers else -1


def run_task(steps: Steps, done: Callable[[Any, BaseException | None], None]) -> None:
    """Drive `steps` to its end, then done(value, None) or done(None, exception)."""

    def resume(value: Any) -> None:
        try:
            wait = steps.throw(value) if isinstance(value, BaseException) else steps.send(value)
        except StopIteration as stop:
            done(stop.value, None)
        except Exception as error:
            done(None, error)
        else:
            wait(resume)

    resume(None)
