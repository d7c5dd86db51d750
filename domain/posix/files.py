"""Open files, and the table of a process that names them by number.

An open file never blocks: where it cannot go on it raises EAGAIN, and the system call waits at the file's queues (`sys_file`).
A File is shared by all descriptors that dup or fork made of one open: they share its position and its status flags.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from domain.posix import locks
from domain.posix.errors import Errno
from domain.posix.inode import MAX_OFFSET, Directory, Inode, Regular
from domain.posix.wait import WaitQueue

O_ACCMODE = 3
O_PATH = 0o10000000
O_LARGEFILE = 0o100000  # what Linux sets in the flags of every file of a 64-bit program
SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | 0o40000 | 0o1000000  # O_DIRECT, O_NOATIME
POLLIN, POLLPRI, POLLOUT, POLLERR, POLLHUP, POLLNVAL = 1, 2, 4, 8, 16, 32
POLLRDNORM, POLLWRNORM, POLLRDHUP = 0x40, 0x100, 0x2000
ALWAYS = POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM
NR_OPEN = 1024  # descriptors of a process unless it raises its RLIMIT_NOFILE


class File:
    """An open file. `whole`: a transfer is complete unless the file ends; others may be short and are not asked twice."""

    whole = False
    seekable = False

    def __init__(self, inode: Inode, flags: int) -> None:
        self.inode = inode
        self.flags = flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_TRUNC | os.O_CLOEXEC)
        self.offset = 0
        self.references = 0
        self.path = b""  # by which it was opened, absolute; for /proc

    @property
    def readable(self) -> bool:
        return self.flags & O_ACCMODE != os.O_WRONLY and not self.flags & O_PATH

    @property
    def writable(self) -> bool:
        return self.flags & O_ACCMODE != os.O_RDONLY and not self.flags & O_PATH

    def read(self, task: Any, count: int) -> bytes:
        """At most `count` bytes; none at the end. Errors: EAGAIN where it would wait."""
        raise Errno(errno.EINVAL)

    def put_back(self, data: bytes) -> None:
        """What was read last and could not be handed over."""

    def write(self, task: Any, data: bytes) -> int:
        """How many bytes it took. Errors: EAGAIN where it would wait."""
        raise Errno(errno.EINVAL)

    def pread(self, task: Any, count: int, offset: int) -> bytes:
        raise Errno(errno.ESPIPE)

    def pwrite(self, task: Any, data: bytes, offset: int) -> int:
        raise Errno(errno.ESPIPE)

    def seek(self, offset: int, whence: int) -> int:
        raise Errno(errno.ESPIPE)

    def ioctl(self, task: Any, request: int, argument: int) -> int:
        raise Errno(errno.ENOTTY)

    def poll_events(self) -> int:
        return ALWAYS

    def queues(self) -> tuple[WaitQueue, ...]:
        """Where a change of `poll_events` is announced; none for a file that is always ready."""
        return ()

    def page(self, index: int) -> bytes:
        raise Errno(errno.ENODEV)

    def released(self) -> None:
        """The last descriptor is gone."""
        locks.release_file(self)


class PathFile(File):
    """O_PATH: a name for *at calls and fstat; not readable, not writable."""

    def poll_events(self) -> int:
        return POLLNVAL


class RegularFile(File):
    whole = True
    seekable = True
    inode: Regular
    window: Any = None  # where the program has it, while it is lent: windows.py
    calls, patience = 0, 3  # before it is; twice as many each time that it had to be taken back

    @property
    def offset(self) -> int:
        return self.window.position if self.window else self._offset

    @offset.setter
    def offset(self, place: int) -> None:
        if self.window:
            self.window.position = place
        else:
            self._offset = place

    def read(self, task: Any, count: int) -> bytes:
        data = self.pread(task, count, self.offset)
        self.offset += len(data)
        return data

    def put_back(self, data: bytes) -> None:
        self.offset -= len(data)

    def write(self, task: Any, data: bytes) -> int:
        if self.flags & os.O_APPEND:
            self.offset = self.inode.size
        done = self.inode.write(self.offset, data)
        self.offset += done
        return done

    def pread(self, task: Any, count: int, offset: int) -> bytes:
        data = self.inode.read(offset, count)
        if count:
            self.inode.accessed()
        return data

    def pwrite(self, task: Any, data: bytes, offset: int) -> int:
        """Where O_APPEND is set it appends all the same: Linux does, though POSIX says otherwise."""
        return self.inode.write(self.inode.size if self.flags & os.O_APPEND else offset, data)

    def seek(self, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            place = self.inode.seek_data(offset, whence == os.SEEK_HOLE)
        else:
            place = seek_place(self.offset, self.inode.size, offset, whence)
        self.offset = place
        return place

    def page(self, index: int) -> bytes:
        return self.inode.page(index)


def seek_place(now: int, size: int, offset: int, whence: int) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: now, os.SEEK_END: size}.get(whence)
    if base is None:
        raise Errno(errno.EINVAL)
    place = base + offset
    if place > MAX_OFFSET:
        raise Errno(errno.EOVERFLOW if whence != os.SEEK_SET else errno.EINVAL)
    if place < 0:
        raise Errno(errno.EINVAL)

    return place


class DirectoryFile(File):
    seekable = True
    inode: Directory

    def read(self, task: Any, count: int) -> bytes:
        raise Errno(errno.EISDIR)

    def pread(self, task: Any, count: int, offset: int) -> bytes:
        raise Errno(errno.EISDIR)

    def seek(self, offset: int, whence: int) -> int:
        self.offset = seek_place(self.offset, self.offset, offset, whence)
        return self.offset

    def entries(self) -> list[tuple[int, bytes, int, int]]:
        """(cookie, name, inode number, type) of what comes after the position."""
        directory = self.inode
        dots = [(1, b".", directory.number, stat.S_IFDIR >> 12), (2, b"..", directory.parent.number, stat.S_IFDIR >> 12)]
        return [dot for dot in dots if dot[0] > self.offset] + list(directory.listing(max(self.offset, 2)))


class FileTable:
    """The descriptors of a process; tasks that share it (CLONE_FILES) count as `users`."""

    def __init__(self) -> None:
        self.open: dict[int, File] = {}
        self.cloexec: set[int] = set()
        self.limit = NR_OPEN
        self.users = 1
        self.hint = 0  # no free number lies below

    def get(self, fd: int) -> File:
        """Errors: EBADF for a number that is not open, and for one of O_PATH: see `named`."""
        file = self.open.get(fd)
        if file is None or file.flags & O_PATH:
            raise Errno(errno.EBADF)

        return file

    def named(self, fd: int) -> File:
        """Also those opened with O_PATH: what *at calls, fstat, fcntl and dup take."""
        file = self.open.get(fd)
        if file is None:
            raise Errno(errno.EBADF)

        return file

    def free(self, least: int = 0) -> int:
        fd = max(least, self.hint)
        while fd in self.open:
            fd += 1
        if least <= self.hint:
            self.hint = fd
        if fd >= self.limit:
            raise Errno(errno.EMFILE)
        return fd

    def install(self, file: File, cloexec: bool = False, least: int = 0) -> int:
        """The lowest free number from `least` on. A file for which there is none is released: EMFILE."""
        try:
            fd = self.free(least)
        except Errno:
            if not file.references:
                file.released()
            raise
        self.place(fd, file, cloexec)
        return fd

    def place(self, fd: int, file: File, cloexec: bool = False) -> None:
        assert fd not in self.open, "a number has one file"
        self.open[fd] = file
        file.references += 1
        if cloexec:
            self.cloexec.add(fd)

    def dup(self, fd: int, least: int = 0, cloexec: bool = False) -> int:
        return self.install(self.named(fd), cloexec, least)

    def replace(self, fd: int, new: int, cloexec: bool = False) -> None:
        """dup3. Errors: EBADF for a number beyond the limit too."""
        file = self.named(fd)
        if not 0 <= new < self.limit:
            raise Errno(errno.EBADF)

        if new in self.open:
            self.close(new)
        self.place(new, file, cloexec)

    def close(self, fd: int, owner: object | None = None) -> None:
        """`owner`: the process whose record locks on the file end, as POSIX wants it."""
        file = self.open.pop(fd, None)
        if file is None:
            raise Errno(errno.EBADF)

        if isinstance(file, RegularFile) and file.window and file.window.files is self and file.window.fd == fd:
            file.window.close()
        self.cloexec.discard(fd)
        self.hint = min(self.hint, fd)
        locks.release_owner(file.inode, owner or self)
        file.references -= 1
        if not file.references:
            file.released()

    def fork(self) -> FileTable:
        child = FileTable()
        child.open, child.cloexec = dict(self.open), set(self.cloexec)
        child.limit, child.hint = self.limit, self.hint
        for file in child.open.values():
            file.references += 1
        return child

    def share(self) -> FileTable:
        self.users += 1
        return self

    def release(self) -> None:
        """A task that used it is gone."""
        self.users -= 1
        if not self.users:
            for fd in list(self.open):
                self.close(fd)

    def close_on_exec(self) -> None:
        for fd in list(self.cloexec):
            self.close(fd)
