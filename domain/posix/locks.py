"""Record locks of processes (fcntl) and locks of open files (flock, F_OFD_SETLK), within the domain.

The owner of a record lock is the file table, which is what a process is to its files; of the others, the open file.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from domain.posix.errors import Errno
from domain.posix.wait import WaitQueue

if TYPE_CHECKING:
    from domain.posix.files import File
    from domain.posix.inode import Inode

F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2
END = 1 << 63


@dataclass(slots=True)
class Lock:
    owner: Any
    exclusive: bool
    start: int
    end: int  # the first byte that is not of it; END: however long the file gets
    pid: int


@dataclass(slots=True)
class Locks:
    """Those of one file."""

    records: list[Lock] = field(default_factory=list)
    whole: list[Lock] = field(default_factory=list)  # flock's: a world of its own
    changed: WaitQueue = field(default_factory=WaitQueue)


def of(inode: Inode) -> Locks:
    if inode.locks is None:
        inode.locks = Locks()
    assert isinstance(inode.locks, Locks)
    return inode.locks


def conflict(held: list[Lock], wanted: Lock) -> Lock | None:
    for lock in held:
        apart = lock.owner is wanted.owner or lock.start >= wanted.end or wanted.start >= lock.end
        if not apart and (lock.exclusive or wanted.exclusive):
            return lock
    return None


def acquire(inode: Inode, wanted: Lock) -> None:
    """Errors: EAGAIN where another owner's lock is in the way. What the owner held there becomes the new lock."""
    locks = of(inode)
    if conflict(locks.records, wanted):
        raise Errno(errno.EAGAIN)

    unlock(inode, wanted)
    locks.records.append(wanted)


def unlock(inode: Inode, span: Lock) -> None:
    locks = of(inode)
    kept: list[Lock] = []
    for lock in locks.records:
        if lock.owner is not span.owner or lock.end <= span.start or span.end <= lock.start:
            kept.append(lock)
            continue
        if lock.start < span.start:
            kept.append(Lock(lock.owner, lock.exclusive, lock.start, span.start, lock.pid))
        if span.end < lock.end:
            kept.append(Lock(lock.owner, lock.exclusive, span.end, lock.end, lock.pid))
    locks.records = kept
    locks.changed.wake()


def flock(file: File, exclusive: bool) -> None:
    """Errors: EAGAIN. As Linux does it, a change of kind gives the old lock up even where the new one is not to be had."""
    locks = of(file.inode)
    funlock(file)
    wanted = Lock(file, exclusive, 0, END, 0)
    if conflict(locks.whole, wanted):
        raise Errno(errno.EAGAIN)

    locks.whole.append(wanted)


def funlock(file: File) -> None:
    locks = of(file.inode)
    locks.whole = [lock for lock in locks.whole if lock.owner is not file]
    locks.changed.wake()


def release_owner(inode: Inode, owner: object) -> None:
    if isinstance(inode.locks, Locks) and inode.locks.records:
        unlock(inode, Lock(owner, False, 0, END, 0))


def release_file(file: File) -> None:
    if isinstance(file.inode.locks, Locks):
        release_owner(file.inode, file)
        funlock(file)
