"""What a system call waits on.

A handler that must block is a generator, and its frame is the kernel stack:

    while not pipe.data:
        yield pipe.readable                          until that queue is woken
    which = yield (queue1, queue2, deadline_ns)      until any is, or system time deadline_ns: then `which` is None

A wake-up is a hint, never a promise: who wakes looks again. There is one virtual CPU and no preemption inside the kernel, so
that nothing comes between the look and the yield.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any


class Waiter:
    """One blocked task, in every queue it waits for. `resume(queue)` is called once, when the first is woken."""

    __slots__ = ("queues", "resume")

    def __init__(self, queues: Iterable[WaitQueue], resume: Callable[[WaitQueue | None], None]) -> None:
        self.queues, self.resume = tuple(queues), resume
        for queue in self.queues:
            queue.waiters[self] = None

    def leave(self) -> None:
        """Wait for nothing any more. Idempotent."""
        for queue in self.queues:
            queue.waiters.pop(self, None)


class WaitQueue:
    """Who waits for something, in order of arrival."""

    __slots__ = ("waiters",)

    def __init__(self) -> None:
        self.waiters: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return len(self.waiters)

    def wake(self, count: int = -1) -> int:
        """Wake the first `count`, or all; how many there were."""
        woken = list(self.waiters)[: count if count >= 0 else None]
        for waiter in woken:
            waiter.leave()
            waiter.resume(self)
        return len(woken)

    def move(self, other: WaitQueue, count: int) -> int:
        """Let the first `count` wait on `other` instead (futex requeue); how many did."""
        moved = list(self.waiters)[:count]
        for waiter in moved:
            del self.waiters[waiter]
            waiter.queues = (*(queue for queue in waiter.queues if queue is not self), other)
            other.waiters[waiter] = None
        return len(moved)


Wait = WaitQueue | tuple[WaitQueue | int, ...]  # what a handler may yield
Blocking = Generator[Wait, Any, int]  # a handler that waits


def parts(wait: Wait) -> tuple[list[WaitQueue], int | None]:
    """The queues and the deadline of what was yielded."""
    if isinstance(wait, WaitQueue):
        return [wait], None
    queues = [part for part in wait if isinstance(part, WaitQueue)]
    deadlines = [part for part in wait if isinstance(part, int)]
    return queues, min(deadlines, default=None)
