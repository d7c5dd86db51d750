"""The guest's scheduler: tasks, events, queues, timeouts, with a clock that moves only while everybody waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import sched
from domain.sched import Cancelled, Event, Queue, Scheduler, Task, TimeoutExpired, gather, sleep, sleep_until, timeout


class Deadlock(Exception):
    """Everybody waits, and no timer will end it."""


class Clock(Scheduler):
    """A scheduler whose idle loop is a clock; it notes what it was asked to sleep."""

    def __init__(self) -> None:
        self.now, self.idled = 0, list[float]()
        super().__init__(lambda: self.now, self.pass_time)
        self.failed: list[BaseException] = []
        self.on_error = lambda task, error: self.failed.append(error)

    def pass_time(self, seconds: float) -> None:
        self.idled.append(seconds)
        if seconds < 0:
            raise Deadlock
        self.now += int(seconds * 1e9)
        if seconds and self.now < self._timers[0][0] <= self.now + 1000:
            self.now = self._timers[0][0]  # a float of seconds is not exact to the ns; a real clock goes on by itself


def fresh() -> Clock:
    made = Clock()
    sched.install(made)
    return made


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield fresh()
    sched._schedulers.pop()


def run(clock: Clock, coroutine: Any) -> Any:
    return clock.run(clock.spawn(coroutine, "main"))


# ---- tasks


def test_tasks_run_in_the_order_they_became_ready(clock: Clock) -> None:
    said: list[str] = []

    async def speak(name: str) -> None:
        for i in range(3):
            said.append(f"{name}{i}")
            await sleep(0)

    async def main() -> None:
        for task in [clock.spawn(speak(name)) for name in "abc"]:
            await task

    run(clock, main())
    assert said == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_awaiting_a_task_gives_its_value_or_its_error(clock: Clock) -> None:
    async def good() -> int:
        await sleep(1)
        return 7

    async def bad() -> None:
        await sleep(1)
        raise KeyError("x")

    async def main() -> list[Any]:
        first, second = clock.spawn(good()), clock.spawn(bad())
        out: list[Any] = [await first, await first]
        for _ in range(2):
            try:
                await second
            except KeyError as error:
                out.append(error)
        return out

    got = run(clock, main())
    assert got[:2] == [7, 7] and got[2] is got[3]


def test_gather_waits_for_all_and_raises_the_first_error(clock: Clock) -> None:
    """A piece that fails while another is awaited is the caller's error, and no task's that nobody awaits."""
    ended: list[int] = []

    async def piece(i: int) -> int:
        await sleep(i)
        ended.append(i)
        if i in (1, 2):
            raise KeyError(i)
        return i

    async def main() -> list[int]:
        assert await gather([]) == []
        assert await gather(piece(i) for i in (4, 3, 5)) == [4, 3, 5]
        return await gather(piece(i) for i in (7, 2, 1, 6))

    with pytest.raises(KeyError, match="2"):
        run(clock, main())
    assert ended == [3, 4, 5, 1, 2, 6, 7] and not clock.failed


def test_an_error_that_nobody_awaits_is_reported(clock: Clock) -> None:
    async def bad() -> None:
        raise KeyError("x")

    async def main() -> None:
        clock.spawn(bad())
        await sleep(1)

    run(clock, main())
    assert [type(error) for error in clock.failed] == [KeyError]


def test_the_others_stay_where_they_are_when_main_is_done(clock: Clock) -> None:
    async def forever() -> None:
        await Event().wait()

    async def main() -> str:
        clock.spawn(forever())
        await sleep(0)
        return "done"

    assert run(clock, main()) == "done" and len(clock.tasks) == 1
    (task,) = clock.tasks
    task.cancel()
    task.step()
    assert task.done and not clock.tasks


def test_all_waiting_for_nothing_is_seen(clock: Clock) -> None:
    async def main() -> None:
        await Event().wait()

    with pytest.raises(Deadlock):
        run(clock, main())
    next(iter(clock.tasks))._coroutine.close()


# ---- events and queues


def test_an_event_wakes_everybody_and_stays_set(clock: Clock) -> None:
    event, woken = Event(), list[int]()

    async def wait(i: int) -> None:
        await event.wait()
        woken.append(i)

    async def main() -> None:
        tasks = [clock.spawn(wait(i)) for i in range(3)]
        await sleep(1)
        assert not woken
        event.set()
        for task in tasks:
            await task
        await event.wait()

    run(clock, main())
    assert woken == [0, 1, 2]


def test_whoever_finds_it_cleared_waits_on(clock: Clock) -> None:
    """One event, two waiters, of whom the first takes it."""
    event, taken = Event(), list[int]()

    async def take(i: int) -> None:
        await event.wait()
        event.clear()
        taken.append(i)

    async def main() -> None:
        tasks = [clock.spawn(take(i)) for i in range(2)]
        for expected in ([0], [0, 1]):
            await sleep(1)
            event.set()
            await sleep(1)
            assert taken == expected
        for task in tasks:
            await task

    run(clock, main())


def test_a_queue_keeps_order_and_hands_each_item_to_one(clock: Clock) -> None:
    queue: Queue[int] = Queue()
    got: list[list[int]] = [[], [], []]

    async def take(mine: list[int]) -> None:
        while True:
            mine.append(await queue.get())
            await sleep(0)

    async def main() -> None:
        tasks = [clock.spawn(take(mine)) for mine in got]
        for i in range(50):
            queue.put(i)
            if i % 7 == 0:
                await sleep(0.001)
        await sleep(1)
        assert len(queue) == 0
        for task in tasks:
            task.cancel()

    run(clock, main())
    assert sorted(i for mine in got for i in mine) == list(range(50)) and all(mine == sorted(mine) for mine in got)


# ---- cancelling


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_task_ends_and_its_waiters_know(clock: Clock, begun: bool) -> None:
    cleaned: list[bool] = []

    async def work() -> None:
        try:
            await sleep(100)
        finally:
            cleaned.append(True)

    async def main() -> str:
        task = clock.spawn(work())
        if begun:
            await sleep(1)
        task.cancel()
        task.cancel()
        try:
            await task
        except Cancelled:
            return "cancelled"
        return "?"

    assert run(clock, main()) == "cancelled" and cleaned == [True] * begun and not clock.failed


def test_a_cancelled_waiter_is_forgotten_by_its_event(clock: Clock) -> None:
    event = Event()

    async def wait() -> None:
        await event.wait()

    async def main() -> None:
        task = clock.spawn(wait())
        await sleep(1)
        task.cancel()
        await sleep(1)
        assert task.done and not event._waiting
        event.set()

    run(clock, main())


@pytest.mark.parametrize("ends", [False, True])
def test_a_task_may_cancel_itself(clock: Clock, ends: bool) -> None:
    """As a server does that closes its own connection: it ends by returning, or at its next wait."""

    async def work() -> str:
        clock.current.cancel()  # type: ignore[union-attr]
        if not ends:
            await sleep(1)
        return "ended"

    async def main() -> Task[str]:
        task = clock.spawn(work())
        await sleep(2)
        return task

    task = run(clock, main())
    assert task.done and (task.value == "ended" if ends else isinstance(task.error, Cancelled)) and not clock.failed


def test_except_exception_lets_a_cancel_pass(clock: Clock) -> None:
    async def stubborn() -> str:
        try:
            await sleep(100)
        except Exception:
            return "swallowed"
        return "?"

    async def main() -> Task[str]:
        task = clock.spawn(stubborn())
        await sleep(1)
        task.cancel()
        await sleep(1)
        return task

    assert isinstance(run(clock, main()).error, Cancelled)


# ---- time


@given(st.lists(st.integers(0, 5_000_000_000), min_size=1, max_size=20))
def test_sleepers_wake_in_order_and_never_early(deadlines: list[int]) -> None:
    clock, woken = fresh(), list[tuple[int, int]]()

    async def sleeper(i: int, deadline: int) -> None:
        await sleep_until(deadline)
        assert clock.now >= deadline
        woken.append((deadline, i))

    async def main() -> None:
        for task in [clock.spawn(sleeper(i, deadline)) for i, deadline in enumerate(deadlines)]:
            await task

    try:
        run(clock, main())
    finally:
        sched._schedulers.pop()
    assert woken == sorted(woken)


def test_idle_is_told_how_long(clock: Clock) -> None:
    async def busy() -> None:
        for _ in range(3):
            await sleep(0)

    async def main() -> None:
        clock.spawn(busy())
        await sleep(2)

    run(clock, main())
    assert clock.idled[-1] == 2 and sum(clock.idled) == pytest.approx(2)


def test_a_cancelled_timer_wakes_nobody(clock: Clock) -> None:
    fired: list[int] = []

    async def main() -> None:
        clock.at(1000, lambda: fired.append(1)).cancel()
        await sleep(1)

    run(clock, main())
    assert clock.idled == [1.0] and not fired


def test_timeout(clock: Clock) -> None:
    cleaned: list[bool] = []

    async def work(seconds: float) -> str:
        try:
            await sleep(seconds)
            return "value"
        finally:
            cleaned.append(True)

    async def fails() -> None:
        raise KeyError("x")

    async def main() -> None:
        assert await timeout(2, work(1)) == "value"
        with pytest.raises(TimeoutExpired, match="2 s"):
            await timeout(2, work(3))
        assert clock.now == 3_000_000_000 and cleaned == [True, True]
        with pytest.raises(KeyError):
            await timeout(2, fails())
        assert not [timer for _, _, timer in clock._timers if timer.call and timer.call.__name__ == "expire"]

    run(clock, main())
    assert not clock.failed


def test_a_timeout_that_is_cancelled_from_outside_is_a_cancel(clock: Clock) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await sleep(100)
        finally:
            ended.append("work")

    async def outer() -> None:
        await timeout(50, work())

    async def main() -> Task[None]:
        task = clock.spawn(outer())
        await sleep(1)
        task.cancel()
        await sleep(1)
        return task

    task = run(clock, main())
    assert isinstance(task.error, Cancelled) and ended == ["work"]


def test_timeouts_inside_each_other(clock: Clock) -> None:
    async def inner() -> str:
        try:
            await timeout(5, sleep(100))
        except TimeoutExpired:
            return "inner"
        return "?"

    async def main() -> list[str]:
        first = await timeout(10, inner())
        try:
            await timeout(3, inner())
        except TimeoutExpired:
            return [first, "outer"]
        return [first]

    assert run(clock, main()) == ["inner", "outer"] and clock.now == 8_000_000_000
