"""Futexes whose word names its owner, and the lists of them, which are a program's and may be anything."""

from __future__ import annotations

import errno
import struct

import pytest

from domain.posix.errors import Errno
from domain.posix.frames import Frames, PageCache
from domain.posix.futex import DIED, MOST_ROBUST, WAITERS, Futexes
from domain.posix.memory import Memory
from domain.posix.wait import Waiter
from tests.domain.posix.test_memory import BASE, Table
from tests.domain.posix.traced import Machine

HEAD, LOCK = BASE + 0x100, BASE + 0x800


@pytest.fixture
def memory() -> Memory:
    machine = Machine(256)
    frames = Frames(machine, machine.base)
    memory = Memory(frames, PageCache(frames), Table())
    memory.map(BASE, 4096, 3)
    return memory


def word(memory: Memory, value: int) -> None:
    memory.copy_out(LOCK, value.to_bytes(4, "little"))


def test_a_lock_goes_to_who_waits(memory: Memory) -> None:
    futexes, living = Futexes(), {7, 8}.__contains__
    with pytest.raises(StopIteration):
        next(futexes.lock(memory, LOCK, 7, living, None))
    assert memory.word(LOCK, 4) == 7
    with pytest.raises(Errno) as error:
        next(futexes.lock(memory, LOCK, 7, living, None))
    assert error.value.number == errno.EDEADLK
    waiting = futexes.lock(memory, LOCK, 8, living, None)
    (queue,) = next(waiting)  # type: ignore[misc]
    assert memory.word(LOCK, 4) == 7 | WAITERS
    with pytest.raises(Errno) as error:
        futexes.unlock(memory, LOCK, 8)
    assert error.value.number == errno.EPERM
    futexes.unlock(memory, LOCK, 7)
    assert not memory.word(LOCK, 4)
    with pytest.raises(StopIteration):
        waiting.send(queue)
    assert memory.word(LOCK, 4) == 8
    word(memory, 9)  # nobody has this number
    with pytest.raises(Errno) as error:
        next(futexes.lock(memory, LOCK, 7, living, None))
    assert error.value.number == errno.ESRCH


def check_what_a_dead_thread_had_is_marked(futexes: Futexes, memory: Memory, pending: int) -> None:
    word(memory, 7 | WAITERS)
    entry = LOCK - 0x20
    memory.copy_out(HEAD, struct.pack("<QqQ", HEAD if pending else entry, 0x20, entry if pending else 0))
    memory.copy_out(entry, HEAD.to_bytes(8, "little"))
    waiting = futexes.wait(memory, LOCK, 7 | WAITERS, None)
    (queue,) = next(waiting)  # type: ignore[misc]
    woken: list[object] = []
    Waiter([queue], woken.append)
    futexes.bury(memory, HEAD, 8)
    assert memory.word(LOCK, 4) == 7 | WAITERS, "it is another's"
    futexes.bury(memory, HEAD, 7)
    assert memory.word(LOCK, 4) == WAITERS | DIED and woken == [queue]


@pytest.mark.parametrize("pending", [0, 1])
def test_what_a_dead_thread_had_is_marked(memory: Memory, pending: int) -> None:
    check_what_a_dead_thread_had_is_marked(Futexes(), memory, pending)


def test_a_kernel_that_does_not_look_whose_it_is_is_found(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domain.posix.futex.OWNER", 0)
    with pytest.raises(AssertionError):
        check_what_a_dead_thread_had_is_marked(Futexes(), memory, 0)


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<QqQ", LOCK, 0, 0),  # a circle that never comes back
        struct.pack("<QqQ", 1 << 63, -(1 << 62), 1 << 63),
        struct.pack("<QqQ", 0, 0, 3),
        struct.pack("<QqQ", HEAD, (1 << 63) - 1, (1 << 64) - 1),
    ],
)
def test_a_list_may_be_anything(memory: Memory, head: bytes) -> None:
    memory.copy_out(LOCK, LOCK.to_bytes(8, "little"))
    memory.copy_out(HEAD, head)
    before = memory.faults
    Futexes().bury(memory, HEAD, 7)
    Futexes().bury(memory, 1 << 63, 7)
    assert memory.faults - before <= MOST_ROBUST
