"""Descriptors: dup, fcntl, ioctl, locks, pipes, memfd."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING

from domain.posix import locks
from domain.posix.errors import Errno
from domain.posix.files import O_PATH, SETTABLE, DirectoryFile, File, RegularFile
from domain.posix.inode import Fifo, Regular
from domain.posix.locks import END, F_RDLCK, F_UNLCK, F_WRLCK, Lock
from domain.posix.pipe import Pipe, PipeFile, open_pipe
from domain.posix.sys_file import Blocking, Result
from domain.posix.table import signed32, syscall
from domain.posix.termios import FIONREAD

if TYPE_CHECKING:
    from domain.posix.task import Task

F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032
FIOCLEX, FIONCLEX, FIONBIO, FIOASYNC, FIOQSIZE = 0x5451, 0x5450, 0x5421, 0x5452, 0x5460
FLOCK = struct.Struct("<hhxxxxqqixxxx")  # l_type, l_whence, l_start, l_len, l_pid
CLOSE_RANGE_UNSHARE, CLOSE_RANGE_CLOEXEC = 2, 4
MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_HUGETLB = 1, 2, 4


@syscall(32)
def sys_dup(task: Task, fd: int) -> int:
    return task.files.dup(signed32(fd))


@syscall(33)
def sys_dup2(task: Task, fd: int, new: int) -> int:
    fd, new = signed32(fd), signed32(new)
    if fd == new:
        task.files.named(fd)
        return new
    task.files.replace(fd, new)
    return new


@syscall(292)
def sys_dup3(task: Task, fd: int, new: int, flags: int) -> int:
    fd, new, flags = signed32(fd), signed32(new), signed32(flags)
    if flags & ~os.O_CLOEXEC or fd == new:
        raise Errno(errno.EINVAL)

    task.files.replace(fd, new, bool(flags))
    return new


@syscall(436, "partial", "CLOSE_RANGE_UNSHARE where the table is not shared")
def sys_close_range(task: Task, first: int, last: int, flags: int) -> int:
    first, last, flags = first & 0xFFFF_FFFF, last & 0xFFFF_FFFF, signed32(flags)
    if flags & ~(CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC) or first > last:
        raise Errno(errno.EINVAL)
    if flags & CLOSE_RANGE_UNSHARE and task.files.users > 1:
        raise Errno(errno.EINVAL)

    chosen = [fd for fd in task.files.open if first <= fd <= last]
    if flags & CLOSE_RANGE_CLOEXEC:
        task.files.cloexec.update(chosen)
    else:
        for fd in chosen:
            task.files.close(fd)
    return 0


@syscall(72, "partial", "no leases, no notification, no owners of signals")
def sys_fcntl(task: Task, fd: int, command: int, argument: int) -> Result:
    fd, command = signed32(fd), signed32(command)
    file = task.files.named(fd)
    if command in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC):
        least = signed32(argument)
        if not 0 <= least < task.files.limit:
            raise Errno(errno.EINVAL)
        return task.files.dup(fd, least, command == fcntl.F_DUPFD_CLOEXEC)
    if command == fcntl.F_GETFD:
        return int(fd in task.files.cloexec)
    if command == fcntl.F_SETFD:
        (task.files.cloexec.add if argument & fcntl.FD_CLOEXEC else task.files.cloexec.discard)(fd)
        return 0
    if command == fcntl.F_GETFL:
        return file.flags
    if file.flags & O_PATH:
        raise Errno(errno.EBADF)
    if command == fcntl.F_SETFL:
        file.flags = (file.flags & ~SETTABLE) | (argument & SETTABLE)
        return 0
    if command in (F_SETPIPE_SZ, F_GETPIPE_SZ):
        if not isinstance(file, PipeFile):
            raise Errno(errno.EBADF)
        return file.pipe.resize(argument & 0xFFFF_FFFF) if command == F_SETPIPE_SZ else file.pipe.size * 4096
    if command in (fcntl.F_GETLK, F_OFD_GETLK):
        return get_lock(task, file, argument, command == F_OFD_GETLK)
    if command in (fcntl.F_SETLK, fcntl.F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW):
        ofd = command in (F_OFD_SETLK, F_OFD_SETLKW)
        return set_lock(task, file, argument, ofd, command in (fcntl.F_SETLKW, F_OFD_SETLKW))
    raise Errno(errno.EINVAL)


def read_lock(task: Task, file: File, address: int, ofd: bool) -> tuple[int, Lock]:
    """The type asked for and the span as a lock. Errors: EINVAL for a type, a whence or a span that there is not."""
    kind, whence, start, length, pid = FLOCK.unpack(task.memory.copy_in(address, FLOCK.size))
    if kind not in (F_RDLCK, F_WRLCK, F_UNLCK) or whence not in (0, 1, 2) or (ofd and pid):
        raise Errno(errno.EINVAL)
    start += (0, file.offset, file.inode.size)[whence]
    end = start + length if length else END
    if length < 0:
        start, end = end, start
    if start < 0:
        raise Errno(errno.EINVAL)
    if end > END:
        raise Errno(errno.EOVERFLOW)

    owner: object = file if ofd else task.files
    return kind, Lock(owner, kind == F_WRLCK, start, end, -1 if ofd else task.process.pid)


def get_lock(task: Task, file: File, address: int, ofd: bool) -> int:
    kind, wanted = read_lock(task, file, address, ofd)
    if kind == F_UNLCK and not ofd:
        raise Errno(errno.EINVAL)
    held = locks.conflict(locks.of(file.inode).records, wanted)
    if held is None:
        task.memory.copy_out(address, struct.pack("<h", F_UNLCK))
        return 0
    length = 0 if held.end == END else held.end - held.start
    kind = F_WRLCK if held.exclusive else F_RDLCK
    task.memory.copy_out(address, FLOCK.pack(kind, 0, held.start, length, held.pid))
    return 0


def set_lock(task: Task, file: File, address: int, ofd: bool, wait: bool) -> Result:
    kind, wanted = read_lock(task, file, address, ofd)
    if kind == F_UNLCK:
        locks.unlock(file.inode, wanted)
        return 0
    if not (file.writable if kind == F_WRLCK else file.readable):
        raise Errno(errno.EBADF)
    try:
        locks.acquire(file.inode, wanted)
        return 0
    except Errno:
        if not wait:
            raise
    return wait_lock(file, wanted)


def wait_lock(file: File, wanted: Lock) -> Blocking:
    """A circle of waiters is not found: such programs wait for a signal."""
    held = locks.of(file.inode)
    while locks.conflict(held.records, wanted):
        yield held.changed
    locks.acquire(file.inode, wanted)
    return 0


@syscall(73)
def sys_flock(task: Task, fd: int, operation: int) -> Result:
    file = task.files.get(signed32(fd))
    kind = operation & ~fcntl.LOCK_NB
    if kind == fcntl.LOCK_UN:
        locks.funlock(file)
        return 0
    if kind not in (fcntl.LOCK_SH, fcntl.LOCK_EX):
        raise Errno(errno.EINVAL)
    try:
        locks.flock(file, kind == fcntl.LOCK_EX)
        return 0
    except Errno:
        if operation & fcntl.LOCK_NB:
            raise
    return wait_flock(file, kind == fcntl.LOCK_EX)


def wait_flock(file: File, exclusive: bool) -> Blocking:
    held = locks.of(file.inode)
    while True:
        yield held.changed
        if not locks.conflict(held.whole, Lock(file, exclusive, 0, END, 0)):
            locks.flock(file, exclusive)
            return 0


@syscall(16, "partial", "terminals, FIONREAD, FIONBIO, FIOCLEX")
def sys_ioctl(task: Task, fd: int, request: int, argument: int) -> int:
    fd, request = signed32(fd), request & 0xFFFF_FFFF
    file = task.files.get(fd)
    if request == FIOCLEX:
        task.files.cloexec.add(fd)
    elif request == FIONCLEX:
        task.files.cloexec.discard(fd)
    elif request == FIONBIO:
        (on,) = struct.unpack("<i", task.memory.copy_in(argument, 4))
        file.flags = file.flags | os.O_NONBLOCK if on else file.flags & ~os.O_NONBLOCK
    elif request == FIONREAD and isinstance(file, PipeFile):
        task.memory.copy_out(argument, struct.pack("<i", file.pipe.length))
    elif request == FIONREAD and isinstance(file, RegularFile):
        waiting = file.inode.size - file.offset
        task.memory.copy_out(argument, struct.pack("<I", waiting & 0xFFFF_FFFF))
    elif request == FIOQSIZE and isinstance(file, RegularFile | DirectoryFile):
        task.memory.copy_out(argument, struct.pack("<q", file.inode.size))
    else:
        return file.ioctl(task, request, argument)
    return 0


@syscall(22)
def sys_pipe(task: Task, address: int) -> int:
    return sys_pipe2(task, address, 0)


@syscall(293, "partial", "no packet mode (O_DIRECT)")
def sys_pipe2(task: Task, address: int, flags: int) -> int:
    flags = signed32(flags)
    if flags & ~(os.O_CLOEXEC | os.O_NONBLOCK):
        raise Errno(errno.EINVAL)
    cloexec = bool(flags & os.O_CLOEXEC)
    fifo = Fifo(task.fs.vfs.pipes, 0o600)
    fifo.pipe = Pipe()
    reader, writer = open_pipe(fifo, flags & os.O_NONBLOCK)
    made: list[int] = []
    try:
        made.append(task.files.install(reader, cloexec))
        made.append(task.files.install(writer, cloexec))
        task.memory.copy_out(address, struct.pack("<ii", *made))
    except Errno:
        for fd in made:
            task.files.close(fd)
        if not made:
            writer.released()
        raise
    return 0


@syscall(319, "partial", "no seals, no huge pages")
def sys_memfd_create(task: Task, name: int, flags: int) -> int:
    flags = signed32(flags)
    if flags & ~(MFD_CLOEXEC | MFD_ALLOW_SEALING):
        raise Errno(errno.EINVAL)
    title = task.memory.string(name)
    if len(title) > 249:
        raise Errno(errno.EINVAL)
    inode = task.fs.vfs.anonymous.create(stat.S_IFREG | 0o777)
    assert isinstance(inode, Regular)
    inode.links = 0
    file = RegularFile(inode, os.O_RDWR | 0o100000)
    file.path = b"/memfd:" + title + b" (deleted)"
    return task.files.install(file, bool(flags & MFD_CLOEXEC))


@syscall(74, "none", "files are in memory: there is nothing to write out")
def sys_fsync(task: Task, fd: int) -> int:
    return sync_file(task.files.get(signed32(fd)))


@syscall(75, "none", "files are in memory: there is nothing to write out")
def sys_fdatasync(task: Task, fd: int) -> int:
    return sync_file(task.files.get(signed32(fd)))


def sync_file(file: File) -> int:
    if not isinstance(file, RegularFile | DirectoryFile):
        raise Errno(errno.EINVAL)
    return 0


@syscall(162, "none", "files are in memory: there is nothing to write out")
def sys_sync(task: Task) -> int:
    return 0


@syscall(306, "none", "files are in memory: there is nothing to write out")
def sys_syncfs(task: Task, fd: int) -> int:
    task.files.get(signed32(fd))
    return 0
