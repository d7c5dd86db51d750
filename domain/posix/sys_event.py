"""Counters as files (fs/eventfd.c): what threads wake each other's poll with."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from domain.posix.errors import Errno
from domain.posix.files import POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM, File
from domain.posix.inode import Inode
from domain.posix.table import signed32, syscall
from domain.posix.wait import WaitQueue

if TYPE_CHECKING:
    from domain.posix.task import Task

EFD_SEMAPHORE = 1
MOST = (1 << 64) - 2


class EventFile(File):
    """Eight bytes a call: a write adds, a read takes all, or one of a semaphore. It waits at 0, and for room below 2^64 - 1."""

    def __init__(self, inode: Inode, flags: int, count: int, semaphore: bool) -> None:
        super().__init__(inode, flags)
        self.count, self.semaphore = count, semaphore
        self.changed = WaitQueue()

    def read(self, task: Any, count: int) -> bytes:
        if count < 8:
            raise Errno(errno.EINVAL)
        if not self.count:
            raise Errno(errno.EAGAIN)

        taken = 1 if self.semaphore else self.count
        self.count -= taken
        self.changed.wake()
        return taken.to_bytes(8, "little")

    def put_back(self, data: bytes) -> None:
        self.count += int.from_bytes(data, "little")

    def write(self, task: Any, data: bytes) -> int:
        if len(data) < 8:
            raise Errno(errno.EINVAL)
        value = int.from_bytes(data[:8], "little")
        if value > MOST:
            raise Errno(errno.EINVAL)
        if self.count + value > MOST:
            raise Errno(errno.EAGAIN)

        self.count += value
        self.changed.wake()
        return 8

    def poll_events(self) -> int:
        return (POLLIN | POLLRDNORM if self.count else 0) | (POLLOUT | POLLWRNORM if self.count < MOST else 0)

    def queues(self) -> tuple[WaitQueue, ...]:
        return (self.changed,)


@syscall(290)
def sys_eventfd2(task: Task, count: int, flags: int) -> int:
    flags = signed32(flags)
    if flags & ~(EFD_SEMAPHORE | os.O_CLOEXEC | os.O_NONBLOCK):
        raise Errno(errno.EINVAL)
    inode = Inode(task.fs.vfs.pipes, stat.S_IRUSR | stat.S_IWUSR)
    file = EventFile(inode, os.O_RDWR | flags & os.O_NONBLOCK, count & 0xFFFF_FFFF, bool(flags & EFD_SEMAPHORE))
    file.path = b"anon_inode:[eventfd]"
    return task.files.install(file, bool(flags & os.O_CLOEXEC))


@syscall(284)
def sys_eventfd(task: Task, count: int) -> int:
    return sys_eventfd2(task, count, 0)
