"""System calls on time (kernel/time/)."""

from __future__ import annotations

import errno
import signal
import struct
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from domain import sched
from domain.posix.errors import Errno, Interrupted
from domain.posix.signals import SI_KERNEL, Info
from domain.posix.table import signed32, syscall
from domain.posix.wait import Wait, WaitQueue

if TYPE_CHECKING:
    from domain.posix.task import Process, Task

REALTIME, MONOTONIC, PROCESS_CPU, THREAD_CPU, RAW, REALTIME_COARSE, MONOTONIC_COARSE, BOOTTIME = range(8)
TIMER_ABSTIME = 1
ITIMERS = signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF  # ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
SHORTEST = 1_000_000  # ns between two looks at how long a process has run
SECOND = 10**9
TIMESPEC = struct.Struct("<qq")


def clock_ns(task: Task, clock: int) -> int:
    """Raises Errno(EINVAL)."""
    clock = signed32(clock)
    if clock in (REALTIME, REALTIME_COARSE):
        return task.system.wall_ns()
    if clock in (MONOTONIC, RAW, MONOTONIC_COARSE, BOOTTIME):
        return task.system.now_ns()
    if clock in (PROCESS_CPU, THREAD_CPU):
        return task.process.cpu_ns
    if clock < 0 and clock & 3 <= 2:  # of another process or thread: ~number << 3, 4 for a thread, which clock
        other = task.system.tasks.get(~clock >> 3) if ~clock >> 3 else task
        if other is not None:
            return other.process.cpu_ns
    raise Errno(errno.EINVAL)


def timespec(task: Task, address: int) -> int:
    """In ns. Raises Errno(EINVAL, EFAULT)."""
    seconds, ns = TIMESPEC.unpack(task.memory.copy_in(address, 16))
    if seconds < 0 or not 0 <= ns < SECOND:
        raise Errno(errno.EINVAL)
    return int(seconds * SECOND + ns)


@syscall(228)
def sys_clock_gettime(task: Task, clock: int, address: int) -> int:
    task.memory.copy_out(address, TIMESPEC.pack(*divmod(clock_ns(task, clock), SECOND)))
    return 0


@syscall(229)
def sys_clock_getres(task: Task, clock: int, address: int) -> int:
    clock_ns(task, clock)
    if address:
        task.memory.copy_out(address, TIMESPEC.pack(0, 1))
    return 0


@syscall(227, "none", "EPERM: the wall clock is dom0's")
def sys_clock_settime(task: Task, clock: int, address: int) -> int:
    raise Errno(errno.EPERM)


@syscall(96)
def sys_gettimeofday(task: Task, address: int, zone: int) -> int:
    seconds, ns = divmod(task.system.wall_ns(), SECOND)
    if address:
        task.memory.copy_out(address, TIMESPEC.pack(seconds, ns // 1000))
    if zone:
        task.memory.copy_out(zone, bytes(8))
    return 0


@syscall(201)
def sys_time(task: Task, address: int) -> int:
    seconds = task.system.wall_ns() // SECOND
    if address:
        task.memory.copy_out(address, seconds.to_bytes(8, "little"))
    return seconds


def sleep(task: Task, deadline: int, rest: int) -> Generator[Wait, Any, int]:
    """Until system time `deadline`; what is left at a signal goes to `rest`."""
    nothing = WaitQueue()
    try:
        while task.system.now_ns() < deadline:
            yield nothing, deadline
    except Interrupted:
        if rest:
            task.memory.copy_out(rest, TIMESPEC.pack(*divmod(max(0, deadline - task.system.now_ns()), SECOND)))
        raise Errno(errno.EINTR) from None
    return 0


@syscall(35)
def sys_nanosleep(task: Task, address: int, rest: int) -> Generator[Wait, Any, int]:
    return sleep(task, task.system.now_ns() + timespec(task, address), rest)


@syscall(230)
def sys_clock_nanosleep(task: Task, clock: int, flags: int, address: int, rest: int) -> Generator[Wait, Any, int]:
    system = task.system
    wait = timespec(task, address)
    if flags & TIMER_ABSTIME:
        return sleep(task, wait - clock_ns(task, clock) + system.now_ns(), 0)
    clock_ns(task, clock)
    return sleep(task, system.now_ns() + wait, rest)


# ---- interval timers


class IntervalTimer:
    """One of a process's three: its signal at its end, and again where it has a period.

    The other two count the process's time on the processor. That is never more than what goes by, so that they are looked at
    when they could be over, and set again for what is missing."""

    def __init__(self, process: Process, which: int, value: int, period: int) -> None:
        self._process, self._which, self.period = process, which, period
        self._arm(self._now() + value)

    def _now(self) -> int:
        return self._process.cpu_ns if self._which else self._process.system.now_ns()

    def _arm(self, deadline: int) -> None:
        self.deadline = deadline
        self._wait(deadline - self._now())

    def _wait(self, left: int) -> None:
        system = self._process.system
        self._timer: sched.Timer = system.at(system.now_ns() + max(left, SHORTEST if self._which else 0), self._expire)

    @property
    def left(self) -> int:
        return max(1000, self.deadline - self._now())

    def _expire(self) -> None:
        if self._which and self._now() < self.deadline:
            self._wait(self.deadline - self._now())
            return
        if self.period:
            self._arm(max(self.deadline + self.period, self._now()))
        else:
            self._process.timers.pop(self._which, None)
        signo = ITIMERS[self._which]
        self._process.send_signal(signo, Info(int(signo), SI_KERNEL))

    def cancel(self) -> None:
        self._timer.cancel()


def set_timer(process: Process, which: int, value: int, period: int) -> tuple[int, int]:
    """Replace it, 0: by none; what was left, and its period, in ns."""
    left, old = remaining(process, which)
    timer = process.timers.pop(which, None)
    if timer:
        timer.cancel()
    if value:
        process.timers[which] = IntervalTimer(process, which, value, period)
    return left, old


def remaining(process: Process, which: int) -> tuple[int, int]:
    timer = process.timers.get(which)
    return (timer.left, timer.period) if timer else (0, 0)


def _itimerval(left: int, period: int) -> bytes:
    return struct.pack("<qqqq", period // SECOND, period % SECOND // 1000, left // SECOND, left % SECOND // 1000)


@syscall(37)
def sys_alarm(task: Task, seconds: int) -> int:
    left, _ = set_timer(task.process, 0, (seconds & 0xFFFF_FFFF) * SECOND, 0)
    return -(-left // SECOND)


@syscall(38, "partial", "time of the process is all its user's: ITIMER_VIRTUAL is as ITIMER_PROF")
def sys_setitimer(task: Task, which: int, new: int, old: int) -> int:
    if which >= len(ITIMERS):
        raise Errno(errno.EINVAL)
    words = struct.unpack("<qqqq", task.memory.copy_in(new, 32)) if new else (0,) * 4
    if any(word < 0 for word in words) or words[1] >= 10**6 or words[3] >= 10**6:
        raise Errno(errno.EINVAL)
    before = set_timer(task.process, which, words[2] * SECOND + words[3] * 1000, words[0] * SECOND + words[1] * 1000)
    if old:
        task.memory.copy_out(old, _itimerval(*before))
    return 0


@syscall(36)
def sys_getitimer(task: Task, which: int, address: int) -> int:
    if which >= len(ITIMERS):
        raise Errno(errno.EINVAL)
    task.memory.copy_out(address, _itimerval(*remaining(task.process, which)))
    return 0


@syscall(100)
def sys_times(task: Task, address: int) -> int:
    if address:
        own, children = task.process.cpu_ns // 10**7, task.process.children_cpu_ns // 10**7
        task.memory.copy_out(address, struct.pack("<4q", own, 0, children, 0))
    return task.system.now_ns() // 10**7
