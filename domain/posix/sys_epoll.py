"""epoll: a set of files that is asked again and again. Level-triggered, edge-triggered and one-shot.

An entry belongs to a descriptor and its file; it goes when the file is released. Readiness is looked up, not queued: a set
costs its length for each wait, which is right for the tens of files of the programs this kernel runs.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domain.posix.errors import Errno
from domain.posix.files import POLLERR, POLLHUP, POLLIN, POLLRDNORM, DirectoryFile, File, PathFile, RegularFile
from domain.posix.inode import Inode
from domain.posix.sys_file import Result
from domain.posix.sys_poll import MILLISECOND, look_or_wait, with_mask
from domain.posix.table import signed32, syscall
from domain.posix.wait import WaitQueue

if TYPE_CHECKING:
    from domain.posix.task import Task

EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD = 1, 2, 3
EPOLLONESHOT, EPOLLET = 1 << 30, 1 << 31
EVENT = struct.Struct("<IQ")  # packed on x86-64: 12 bytes
MAX_DEPTH = 5


@dataclass(slots=True)
class Entry:
    file: File
    events: int
    data: int
    seen: int = 0  # edge-triggered: what was told already and has not gone since


class EpollFile(File):
    def __init__(self, inode: Inode) -> None:
        super().__init__(inode, os.O_RDWR)
        self.entries: dict[tuple[int, int], Entry] = {}  # by descriptor and identity of the file
        self.changed = WaitQueue()

    def living(self) -> list[Entry]:
        for key in [key for key, entry in self.entries.items() if not entry.file.references]:
            del self.entries[key]
        return list(self.entries.values())

    def ready(self, entry: Entry) -> int:
        now = entry.file.poll_events() & (entry.events | POLLERR | POLLHUP) & 0xFFFF if entry.events & 0xFFFF else 0
        if entry.events & EPOLLET:
            entry.seen &= now
            return now & ~entry.seen
        return now

    def collect(self, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for entry in self.living():
            events = self.ready(entry)
            if not events:
                continue
            found.append((events, entry.data))
            entry.seen |= events
            if entry.events & EPOLLONESHOT:
                entry.events &= ~0xFFFF
            if len(found) == limit:
                break
        return found

    def depth(self) -> int:
        return 1 + max((entry.file.depth() for entry in self.living() if isinstance(entry.file, EpollFile)), default=0)

    def reaches(self, other: EpollFile) -> bool:
        below = [entry.file for entry in self.living() if isinstance(entry.file, EpollFile)]
        return self is other or any(file.reaches(other) for file in below)

    def poll_events(self) -> int:
        return POLLIN | POLLRDNORM if any(self.ready(entry) for entry in self.living()) else 0

    def queues(self) -> tuple[WaitQueue, ...]:
        return (self.changed, *(queue for entry in self.living() for queue in entry.file.queues()))


@syscall(291)
def sys_epoll_create1(task: Task, flags: int) -> int:
    flags = signed32(flags)
    if flags & ~os.O_CLOEXEC:
        raise Errno(errno.EINVAL)

    return task.files.install(EpollFile(Inode(task.fs.vfs.pipes, 0o600)), bool(flags))


@syscall(213)
def sys_epoll_create(task: Task, size: int) -> int:
    if signed32(size) <= 0:
        raise Errno(errno.EINVAL)

    return sys_epoll_create1(task, 0)


def epoll(task: Task, fd: int) -> EpollFile:
    file = task.files.get(signed32(fd))
    if not isinstance(file, EpollFile):
        raise Errno(errno.EINVAL)
    return file


@syscall(233, "partial", "an edge is a change between two looks; no EPOLLEXCLUSIVE, no EPOLLWAKEUP")
def sys_epoll_ctl(task: Task, fd: int, operation: int, target_fd: int, address: int) -> int:
    operation, target_fd = signed32(operation), signed32(target_fd)
    events, data = EVENT.unpack(task.memory.copy_in(address, EVENT.size)) if operation != EPOLL_CTL_DEL else (0, 0)
    task.files.get(signed32(fd))
    target = task.files.get(target_fd)
    if isinstance(target, RegularFile | DirectoryFile | PathFile):
        raise Errno(errno.EPERM)
    which = epoll(task, fd)
    if target is which:
        raise Errno(errno.EINVAL)
    which.living()
    key = target_fd, id(target)
    present = key in which.entries
    if operation == EPOLL_CTL_ADD:
        if present:
            raise Errno(errno.EEXIST)
        if isinstance(target, EpollFile) and (target.reaches(which) or target.depth() >= MAX_DEPTH):
            raise Errno(errno.ELOOP)
        which.entries[key] = Entry(target, events, data)
    elif operation in (EPOLL_CTL_MOD, EPOLL_CTL_DEL):
        if not present:
            raise Errno(errno.ENOENT)
        if operation == EPOLL_CTL_DEL:
            del which.entries[key]
        else:
            which.entries[key] = Entry(target, events, data)
    else:
        raise Errno(errno.EINVAL)
    which.changed.wake()
    return 0


def do_wait(task: Task, fd: int, address: int, limit: int, timeout: int | None) -> Result:
    limit = signed32(limit)
    which = epoll(task, fd)
    if limit <= 0:
        raise Errno(errno.EINVAL)

    def look() -> int:
        found = which.collect(limit)
        if found:
            task.memory.copy_out(address, b"".join(EVENT.pack(*event) for event in found))
        return len(found)

    files: list[Any] = [which]
    return look_or_wait(task, look, files, timeout)


@syscall(232)
def sys_epoll_wait(task: Task, fd: int, events: int, limit: int, timeout: int) -> Result:
    ms = signed32(timeout)
    return do_wait(task, fd, events, limit, None if ms < 0 else ms * MILLISECOND)


@syscall(281)
def sys_epoll_pwait(task: Task, fd: int, events: int, limit: int, timeout: int, mask: int, size: int) -> Result:
    ms = signed32(timeout)
    result = do_wait(task, fd, events, limit, None if ms < 0 else ms * MILLISECOND)
    return with_mask(task, mask, size, result)
