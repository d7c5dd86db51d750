"""The loop: continuations, timers that are never early and never forgotten, and events of descriptors that are gone."""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from hypervisor import loop as module
from hypervisor.loop import SLICE, Loop, Resume, Steps, run_task
from tests.conftest import TIMEOUT

MS = 1_000_000


def until(loop: Loop, done: Callable[[], bool]) -> None:
    """Turn the loop, which always finds something ready and so never sleeps, until `done`."""
    deadline = time.monotonic() + TIMEOUT
    ready = os.eventfd(1)
    loop.watch(ready, lambda: None)
    while not done():
        loop.step()
        assert time.monotonic() < deadline, "it never came"
    loop.unwatch(ready)
    os.close(ready)


class Sleepless:
    """In the place of epoll, and of select that waits for it: says what the loop would have slept, and does not."""

    def __init__(self, loop: Loop) -> None:
        self.slept: list[float] = []
        loop._epoll, loop._select = self, self.select  # type: ignore[assignment]

    def poll(self, timeout: float, _: int) -> list[tuple[int, int]]:
        if timeout or not self.slept or self.slept[-1] < 0:
            self.slept.append(timeout)
        return []

    def select(self, read: object, write: object, error: object, timeout: float) -> None:
        self.slept.append(timeout)


# ---- continuations


def outcome(steps: Steps) -> list[Any]:
    """[value, error] once it ended, [] while it waits."""
    out: list[Any] = []
    run_task(steps, lambda value, error: out.extend((value, error)))
    return out


def test_a_continuation_gets_what_it_waited_for() -> None:
    waiting: list[Resume] = []

    def inner() -> Steps:
        first = yield waiting.append
        second = yield waiting.append
        return first + second

    def outer() -> Steps:
        return (yield from inner()) * 10

    out = outcome(outer())
    waiting.pop()(1)
    assert out == []
    waiting.pop()(2)
    assert out == [30, None]


def test_an_exception_is_thrown_into_it() -> None:
    waiting: list[Resume] = []

    def steps() -> Steps:
        try:
            yield waiting.append
        except KeyError:
            yield waiting.append
            raise ValueError("after") from None

    out = outcome(steps())
    waiting.pop()(KeyError())
    waiting.pop()(None)
    assert out[0] is None and str(out[1]) == "after"


def test_a_wait_may_be_over_at_once() -> None:
    def steps() -> Steps:
        total = 0
        for i in range(100):
            total += yield lambda resume, i=i: resume(i)
        return total

    assert outcome(steps()) == [4950, None]


def test_turn_lets_the_others_run() -> None:
    loop, said = Loop(), list[str]()

    def steps(name: str) -> Steps:
        for _ in range(3):
            said.append(name)
            yield loop.turn

    for name in "ab":
        run_task(steps(name), lambda *_: None)
    until(loop, lambda: len(said) == 6)
    assert said == list("ababab")


# ---- timers


def test_timers_are_never_early_and_in_order() -> None:
    loop, rng, fired = Loop(), random.Random(1), list[int]()
    start = time.monotonic_ns()
    deadlines = [start + rng.randrange(20 * MS) for _ in range(300)]

    def fire(deadline: int) -> None:
        assert time.monotonic_ns() >= deadline
        fired.append(deadline)

    for deadline in deadlines:
        loop.at(deadline, lambda deadline=deadline: fire(deadline))
    until(loop, lambda: len(fired) == 300)
    assert fired == sorted(deadlines)


def test_the_loop_never_sleeps_past_a_timer_and_never_wakes_much_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    epoll = Sleepless(loop)
    now = 10**15
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: now)
    loop.at(now + 1, lambda: None)
    loop.step()
    assert 1e-9 <= epoll.slept[-1] <= 1e-6, "a timer that is not due yet would spin"
    now += 1
    loop.step()
    assert epoll.slept[-1] == -1


@pytest.mark.parametrize("far", [0.1, 1.5, 3.9, 4.1, 5.0, 600.0])
def test_it_comes_to_a_timer_by_the_microsecond(monkeypatch: pytest.MonkeyPatch, far: float) -> None:
    """epoll counts in milliseconds, and rounds up: what it is asked for ends before the timer, however that is rounded."""
    loop = Loop()
    epoll = Sleepless(loop)
    now = 10**15
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: now)
    fired = list[int]()
    due = now + int(far * MS)
    loop.at(due, lambda: fired.append(now))
    while not fired:
        loop.step()
        slept = epoll.slept[-1]
        now += int(slept * 1e9) if slept * 1e9 <= 4 * MS else -(-int(slept * 1e9) // MS) * MS
        assert slept > 0 or fired
        assert now <= due + 1_000, "past it"


def test_a_cancelled_timer_does_not_fire_and_does_not_wake() -> None:
    loop, fired = Loop(), list[int]()
    epoll = Sleepless(loop)
    loop.at(time.monotonic_ns() + MS, lambda: fired.append(1)).cancel()
    loop.at(0, lambda: fired.append(2)).cancel()
    loop.step()
    assert epoll.slept == [-1] and not fired


def check_a_posted_call_may_set_a_timer(loop: Loop) -> None:
    """A silent monitor's deadline is often set by a posted call; nothing else may happen until it is due."""
    epoll = Sleepless(loop)
    loop.soon(lambda: void(loop.at(time.monotonic_ns() + MS, lambda: None)))
    loop.step()
    assert 0 <= epoll.slept[-1] <= 1e-3, f"sleeps {epoll.slept[-1]} s"


def void(_: object) -> None:
    """A lambda's value that nobody wants."""


def test_a_posted_call_may_set_a_timer() -> None:
    check_a_posted_call_may_set_a_timer(Loop())


class AsksTooEarly(Loop):
    """How long to sleep is asked before the posted calls have run."""

    def step(self) -> None:
        posted, self._soon = self._soon, deque()
        timeout = self._until_due()
        self._soon = posted
        self._until_due = lambda: timeout  # type: ignore[method-assign]
        super().step()


def test_asking_too_early_is_found() -> None:
    with pytest.raises(AssertionError, match="sleeps"):
        check_a_posted_call_may_set_a_timer(AsksTooEarly())


def test_a_timer_that_sets_the_next_one() -> None:
    loop, ticks = Loop(), list[int]()

    def tick() -> None:
        ticks.append(time.monotonic_ns())
        if len(ticks) < 5:
            loop.at(ticks[-1] + MS, tick)

    loop.at(0, tick)
    until(loop, lambda: len(ticks) == 5)
    assert all(b - a >= MS for a, b in pairwise(ticks))


# ---- descriptors


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    """Three pipes with a byte in each."""
    made = [os.pipe() for _ in range(3)]
    for _, write in made:
        os.write(write, b"!")
    yield made
    for pair in made:
        for fd in pair:
            try:
                os.close(fd)
            except OSError:
                pass  # the test closed it


def test_a_handler_is_called_while_its_descriptor_is_ready(pipes: list[tuple[int, int]]) -> None:
    loop, called = Loop(), list[int]()
    read = pipes[0][0]
    loop.watch(read, lambda: called.append(read))
    loop.step()
    loop.step()
    assert called == [read, read], "level-triggered"
    loop.unwatch(read)
    loop.unwatch(read)
    loop.soon(lambda: None)
    loop.at(0, lambda: None)
    loop.at(time.monotonic_ns() + MS, lambda: None)
    loop.step()
    assert len(called) == 2


def test_an_unwatched_descriptor_is_not_served_in_the_same_batch(pipes: list[tuple[int, int]]) -> None:
    loop, called = Loop(), list[int]()
    reads = [read for read, _ in pipes]

    def handler(mine: int) -> None:
        called.append(mine)
        for other in reads:
            if other != mine:
                loop.unwatch(other)
                os.close(other)

    for read in reads:
        loop.watch(read, lambda read=read: handler(read))
    loop.step()
    assert len(called) == 1


def test_a_reused_number_gets_a_spurious_call_and_no_more(pipes: list[tuple[int, int]]) -> None:
    """One batch may name a descriptor that was closed meanwhile and whose number is another's now: handlers look first."""
    loop, spurious, read = Loop(), list[BlockingIOError](), [read for read, _ in pipes]
    fresh = os.pipe()

    def newcomer(fd: int) -> None:
        try:
            os.read(fd, 1)
            raise AssertionError("the new pipe is empty")
        except BlockingIOError as error:
            spurious.append(error)

    def replace(mine: int) -> None:
        os.read(mine, 1)
        for other in read:
            if other != mine and not spurious and not replaced:
                replaced.append(other)
                loop.unwatch(other)
                os.dup2(fresh[0], other)
                os.set_blocking(other, False)
                loop.watch(other, lambda other=other: newcomer(other))
                return

    replaced: list[int] = []
    for fd in read[:2]:
        loop.watch(fd, lambda fd=fd: replace(fd))
    loop.step()
    assert len(replaced) == 1 and len(spurious) == 1
    for fd in fresh:
        os.close(fd)


def test_posted_calls_do_not_starve_descriptors(pipes: list[tuple[int, int]]) -> None:
    loop, calls, served = Loop(), list[int](), list[int]()

    def again() -> None:
        calls.append(1)
        loop.soon(again)
        loop.soon(again)

    loop.soon(again)
    loop.watch(pipes[0][0], lambda: served.append(len(calls)))
    for _ in range(20):
        loop.step()
    assert len(served) == 20 and max(b - a for a, b in pairwise(served)) <= SLICE
