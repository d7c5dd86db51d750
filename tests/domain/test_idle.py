"""The idle loop: what it hands out, what it sleeps for, and that events do not keep it from descriptors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from domain import idle as idle_module
from domain import sched
from domain._guest import ffi, lib
from domain.evtchn import EventChannels
from domain.idle import READABLE, WRITABLE, Idle
from domain.sched import Scheduler
from hypervisor import _hv
from hypervisor.public.start_info import SHARED_UPCALL_MASK


class Guest:
    """A page, its ports, a descriptor for the upcall, and a scheduler that sleeps in the idle loop."""

    def __init__(self) -> None:
        self.page = ffi.new("char[4096]")
        self.address = int(ffi.cast("uintptr_t", self.page))
        kernel: Any = SimpleNamespace(hypercall=SimpleNamespace(post=None))
        self.evtchn = EventChannels(kernel, self.address)
        self.upcall, self.signal = os.pipe()
        self.idle = Idle(self.evtchn, self.upcall)
        self.end = _hv.ffi.new("struct evt_end *", {"shared_info": _hv.ffi.cast("void *", self.address)})
        self.slept = 0
        self.while_asleep: Callable[[], None] = lambda: None
        self.scheduler = Scheduler(lambda: 0, self.sleep)
        sched.install(self.scheduler)

    def sleep(self, timeout: float) -> None:
        self.slept += timeout != 0
        if timeout:
            self.while_asleep()
        self.idle(timeout != 0)

    def event(self, port: int) -> None:
        """As the hypervisor sends it; the guest is awake, so there is no signal."""
        assert not _hv.lib.evtchn_notify(self.end, port)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    sched._schedulers.pop()
    os.close(made.upcall)
    os.close(made.signal)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_look_hands_out_and_does_not_wait(guest: Guest) -> None:
    guest.evtchn.adopt(5)
    assert not guest.idle(False)
    guest.event(5)
    guest.event(6)  # nobody's
    assert guest.idle(False) and guest.evtchn.received == 2
    assert guest.evtchn._events[5].is_set and not guest.idle(False)
    assert guest.page[SHARED_UPCALL_MASK] == b"\1", "awake: no signals"


def test_a_sleep_ends_at_once_where_something_is_pending(guest: Guest) -> None:
    guest.evtchn.adopt(5)
    guest.event(5)
    assert guest.idle(True)


def test_a_task_wakes_by_its_event(guest: Guest) -> None:
    guest.evtchn.adopt(5)
    guest.while_asleep = lambda: guest.event(5)
    guest.scheduler.run(guest.scheduler.spawn(guest.evtchn.wait(5)))
    assert guest.slept == 1 and not guest.evtchn._events[5].is_set


def test_tasks_wake_by_their_descriptors(guest: Guest, pipe: tuple[int, int]) -> None:
    one, other = pipe, os.pipe()
    order: list[str] = []

    async def reader(name: str, fd: int) -> None:
        await guest.idle.ready(fd, READABLE)
        os.read(fd, 1)
        order.append(name)

    tasks = [guest.scheduler.spawn(reader("one", one[0])), guest.scheduler.spawn(reader("other", other[0]))]
    writes = iter([other[1], one[1]])

    def write() -> None:
        os.write(next(writes), b"x")

    guest.while_asleep = write
    for task in tasks:
        guest.scheduler.run(task)
    assert order == ["other", "one"] and guest.slept == 2
    guest.while_asleep = lambda: None
    guest.scheduler.run(guest.scheduler.spawn(guest.idle.ready(one[1], WRITABLE)))
    assert guest.idle._waiting == [] and guest.idle._state.nr_fds == 1, "nobody waits any more"
    for end in other:
        os.close(end)


def test_whoever_is_cancelled_waits_no_more(guest: Guest, pipe: tuple[int, int]) -> None:
    task = guest.scheduler.spawn(guest.idle.ready(pipe[0], READABLE))
    guest.while_asleep = task.cancel
    guest.idle = lambda sleep: None  # type: ignore[assignment]
    with pytest.raises(sched.Cancelled):
        guest.scheduler.run(task)


def test_one_task_a_descriptor(guest: Guest, pipe: tuple[int, int]) -> None:
    first = guest.scheduler.spawn(guest.idle.ready(pipe[0], READABLE))
    with pytest.raises(AssertionError, match="two tasks wait"):
        guest.scheduler.run(guest.scheduler.spawn(guest.idle.ready(pipe[0], READABLE)))
    assert not first.done


def check_events_do_not_keep_it_from_descriptors(guest: Guest, pipe: tuple[int, int]) -> None:
    """One is pending whenever it looks."""
    guest.evtchn.adopt(5)
    task = guest.scheduler.spawn(guest.idle.ready(pipe[0], READABLE))
    os.write(pipe[1], b"x")

    async def flood() -> None:
        for _ in range(10):
            guest.event(5)
            await guest.evtchn.wait(5)
            assert not guest.evtchn._events[5].is_set
            if task.done:
                return
        raise AssertionError("ten events, and the descriptor was not looked at")

    guest.scheduler.run(guest.scheduler.spawn(flood()))


def test_events_do_not_keep_it_from_descriptors(guest: Guest, pipe: tuple[int, int]) -> None:
    check_events_do_not_keep_it_from_descriptors(guest, pipe)


class OnlyEvents:
    """guest.c, that looks at descriptors only when it sleeps."""

    def idle(self, state: Any, sleep: bool) -> None:
        state.nr_fds, kept = 1, state.nr_fds
        lib.idle(state, sleep)
        state.nr_fds = kept


def test_one_that_looks_at_events_only_is_found(guest: Guest, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_module, "lib", OnlyEvents())
    guest.idle = Idle(guest.evtchn, guest.upcall)
    with pytest.raises(AssertionError, match="ten events"):
        check_events_do_not_keep_it_from_descriptors(guest, pipe)
