"""Any program may ask anything: random system calls with hostile arguments never break the kernel, nor lose it a frame."""

from __future__ import annotations

import random
import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from domain import sched
from domain.posix import boot, calls
from domain.posix import registers as r
from domain.posix import space as kinds
from domain.posix.errors import Errno, Killed
from domain.posix.files import FileTable
from domain.posix.frames import Frames
from domain.posix.run import System
from domain.posix.space import Space
from domain.posix.task import Process, Task
from tests.conftest import NIGHTLY
from tests.domain.posix.traced import Machine

CALLS = 30_000 if NIGHTLY else 3000
DATA = 0x50_0000
HEADER = b"070701" + b"%08x" * 13
EMPTY = HEADER % (1, 0o40755, 0, 0, 2, 0, 0, 0, 0, 0, 0, 4, 0) + b"tmp\0\0\0"
EMPTY += HEADER % (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0)
EMPTY += b"TRAILER!!!\0\0\0\0"
SELF_DESTRUCTION = {60, 231}


class Still(Space):
    """No program runs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.registers, self.fpu = [0] * r.COUNT, b""

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None:
        pass

    def unmap(self, page: int) -> None:
        pass

    def clear(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def destroy(self) -> None:
        pass

    def run(self, timeout_ns: int) -> int:
        return kinds.TIMEOUT


def new_system() -> System:
    machine = Machine(2048)
    scheduler = sched.Scheduler(time.monotonic_ns, lambda timeout: None)
    kernel: Any = SimpleNamespace(
        now_ns=time.monotonic_ns, wall_ns=time.time_ns, scheduler=scheduler, name="guest",
        evtchn=SimpleNamespace(pending=lambda: False), console=SimpleNamespace(write=lambda text: None),
    )  # fmt: skip
    sched.install(scheduler)
    try:
        return System(kernel, Frames(machine, machine.base), Still)
    finally:
        sched._schedulers.remove(scheduler)


def program(system: System, context: Any) -> Task:
    task = Task(Process(system, system.init), system.new_memory(), FileTable(), context.fork())
    task.memory.map(DATA, 16 * 4096, 3)
    task.memory.copy_out(DATA, b"/tmp/name\0".ljust(64, b"\0") + bytes(range(256)))
    return task


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed: int) -> None:
    dice = random.Random(seed)
    system = new_system()
    context = boot.mount(system, EMPTY)
    boot.attach(system, context, lambda data: None)
    first = program(system, context)
    system.init = first.process
    numbers = sorted(set(calls.TABLE) - SELF_DESTRUCTION)
    words: list[Any] = [
        lambda: 0, lambda: (1 << 64) - 1, lambda: dice.randrange(8), lambda: DATA + dice.randrange(0, 16 * 4096),
        lambda: DATA, lambda: DATA + 16 * 4096 - dice.randrange(1, 9), lambda: 1 << dice.randrange(64),
        lambda: dice.getrandbits(64),
        lambda: 4096, lambda: dice.randrange(1, 65), lambda: (1 << 64) - 100, lambda: dice.randrange(1 << 16),
        lambda: system._last_pid,
    ]  # fmt: skip
    task = program(system, context)
    for _ in range(CALLS):
        if task.dead or len(system.tasks) > 40:
            for process in [p for p in system.processes.values() if p is not first.process]:
                process.exit(9)
                process.reap()
            task = program(system, context)
        system.load(task)
        system.syscall(task, dice.choice(numbers), array("Q", [dice.choice(words)() for _ in range(6)]))
        for other in list(system.tasks.values()):
            if other.generator is not None:
                if other.waiter:
                    other.waiter.leave()
                    other.waiter = None
                generator, other.generator = other.generator, None
                with pytest.raises((Killed, StopIteration)):
                    generator.throw(Killed())
        task.process.resume()
        first.blocked = (1 << 64) - 1
    for process in list(system.processes.values()):
        process.exit(9)
    system.frames.shrink()
    assert system.frames.used == 0
    assert system.tasks == {}


def test_groups_are_kept() -> None:
    system = new_system()
    context = boot.mount(system, EMPTY)
    boot.attach(system, context, lambda data: None)
    task = program(system, context)
    task.memory.copy_out(DATA, bytes([5, 0, 0, 0, 7, 0, 0, 0]))
    setgroups, getgroups = calls.TABLE[116].handler, calls.TABLE[115].handler
    assert (setgroups(task, 2, DATA), getgroups(task, 0, 0), getgroups(task, 2, DATA + 64)) == (0, 2, 2)
    assert task.memory.copy_in(DATA + 64, 8) == task.memory.copy_in(DATA, 8)
    assert Process(system, task.process).groups == (5, 7)
    with pytest.raises(Errno, match="EINVAL"):
        getgroups(task, 1, DATA)
