"""Waiting for several files: poll, select, epoll."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from domain.posix.errors import Errno, Interrupted
from domain.posix.files import (
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLNVAL,
    POLLOUT,
    POLLPRI,
    POLLRDNORM,
    POLLWRNORM,
    File,
)
from domain.posix.signals import NEVER_BLOCKED
from domain.posix.sys_file import Blocking, Result
from domain.posix.table import signed32, syscall
from domain.posix.wait import WaitQueue

if TYPE_CHECKING:
    from domain.posix.task import Task

POLLFD = struct.Struct("<ihh")
TIMESPEC = struct.Struct("<qq")
READ_SET, WRITE_SET, EXCEPT_SET = POLLIN | POLLRDNORM | POLLHUP | POLLERR, POLLOUT | POLLWRNORM | POLLERR, POLLPRI
SECOND, MILLISECOND, MICROSECOND = 10**9, 10**6, 10**3
LONGEST = 1 << 62


def until(look: Callable[[], int], queues: tuple[WaitQueue, ...], deadline: int | None) -> Blocking:
    """Until `look` finds something or the time is over. Never restarted after a signal: EINTR (signal(7))."""
    wanted: tuple[Any, ...] = queues if deadline is None else (*queues, deadline)
    try:
        while True:
            which = yield wanted
            found = look()
            if found or which is None:
                return found
    except Interrupted:
        raise Errno(errno.EINTR) from None


def look_or_wait(task: Task, look: Callable[[], int], files: list[File], timeout: int | None) -> Result:
    """`timeout` in nanoseconds: 0 only looks, None waits for ever."""
    found = look()
    if found or timeout == 0:
        return found
    deadline = None if timeout is None else task.system.now_ns() + min(timeout, LONGEST)
    queues = tuple(dict.fromkeys(queue for file in files for queue in file.queues()))
    return until(look, queues, deadline)


def timespec(task: Task, address: int) -> int | None:
    if not address:
        return None
    seconds, ns = TIMESPEC.unpack(task.memory.copy_in(address, TIMESPEC.size))
    if seconds < 0 or not 0 <= ns < SECOND:
        raise Errno(errno.EINVAL)
    wait: int = min(seconds * SECOND + ns, LONGEST)
    return wait


def do_poll(task: Task, address: int, count: int, timeout: int | None) -> Result:
    count &= 0xFFFF_FFFF
    if count > task.files.limit:
        raise Errno(errno.EINVAL)
    entries = list(POLLFD.iter_unpack(task.memory.copy_in(address, 8 * count))) if count else []

    def look() -> int:
        found = 0
        out = bytearray()
        for fd, events, _ in entries:
            answer = 0
            if fd >= 0:
                file = task.files.open.get(fd)
                answer = file.poll_events() & (events | POLLERR | POLLHUP | POLLNVAL) if file else POLLNVAL
            found += bool(answer)
            out += POLLFD.pack(fd, events, answer)
        if out:
            task.memory.copy_out(address, bytes(out))
        return found

    files = [file for fd, _, _ in entries if (file := task.files.open.get(fd))]
    return look_or_wait(task, look, files, timeout)


@syscall(7)
def sys_poll(task: Task, fds: int, count: int, timeout: int) -> Result:
    ms = signed32(timeout)
    return do_poll(task, fds, count, None if ms < 0 else ms * MILLISECOND)


@syscall(271, "partial", "the time that is left is not written back")
def sys_ppoll(task: Task, fds: int, count: int, timeout: int, mask: int, mask_size: int) -> Result:
    result = do_poll(task, fds, count, timespec(task, timeout))
    return with_mask(task, mask, mask_size, result)


def with_mask(task: Task, mask: int, size: int, result: Result) -> Result:
    """The signal mask of the call holds while it waits."""
    if not mask or isinstance(result, int):
        return result
    if size != 8:
        raise Errno(errno.EINVAL)
    (blocked,) = struct.unpack("<Q", task.memory.copy_in(mask, 8))
    return masked(task, blocked, result)


def masked(task: Task, blocked: int, wait: Blocking) -> Blocking:
    """The old mask comes back when the signal is delivered, or here where there was none."""
    task.saved_blocked, task.blocked = task.blocked, blocked & ~NEVER_BLOCKED
    if task.signal_pending():
        raise Errno(errno.EINTR)
    found = yield from wait
    task.blocked, task.saved_blocked = task.saved_blocked, None
    return found


def do_select(task: Task, count: int, sets: tuple[int, int, int], timeout: int | None) -> Result:
    count = signed32(count)
    if count < 0:
        raise Errno(errno.EINVAL)
    count = min(count, task.files.limit)
    size = (count + 63) // 64 * 8
    asked = [int.from_bytes(task.memory.copy_in(each, size), "little") if each else 0 for each in sets]
    limit = (1 << count) - 1
    wanted = [(fd, [bits >> fd & 1 for bits in asked]) for fd in range(count) if any(bits >> fd & 1 for bits in asked)]
    files: dict[int, File] = {fd: task.files.get(fd) for fd, _ in wanted}

    def look() -> int:
        answer = [0, 0, 0]
        for fd, which in wanted:
            events = files[fd].poll_events()
            for index, mask in enumerate((READ_SET, WRITE_SET, EXCEPT_SET)):
                if which[index] and events & mask:
                    answer[index] |= 1 << fd
        found = sum((bits & limit).bit_count() for bits in answer)
        if found or done:
            store(answer)
        return found

    def store(answer: list[int]) -> None:
        for address, bits in zip(sets, answer, strict=True):
            if address:
                task.memory.copy_out(address, bits.to_bytes(size, "little"))

    done = timeout == 0
    result = look_or_wait(task, look, list(files.values()), timeout)
    return result if isinstance(result, int) else at_end(result, store)


def at_end(wait: Blocking, store: Callable[[list[int]], None]) -> Blocking:
    """A select that ran out of time clears the sets."""
    found = yield from wait
    if not found:
        store([0, 0, 0])
    return found


@syscall(23, "partial", "the time that is left is not written back")
def sys_select(task: Task, count: int, readers: int, writers: int, others: int, timeout: int) -> Result:
    limit = None
    if timeout:
        seconds, us = TIMESPEC.unpack(task.memory.copy_in(timeout, TIMESPEC.size))
        if seconds < 0 or us < 0:
            raise Errno(errno.EINVAL)
        limit = min(seconds * SECOND + us * MICROSECOND, LONGEST)
    return do_select(task, count, (readers, writers, others), limit)


@syscall(270, "partial", "the time that is left is not written back")
def sys_pselect6(task: Task, count: int, readers: int, writers: int, others: int, timeout: int, mask: int) -> Result:
    address, size = struct.unpack("<QQ", task.memory.copy_in(mask, 16)) if mask else (0, 0)
    result = do_select(task, count, (readers, writers, others), timespec(task, timeout))
    return with_mask(task, address, size, result)
