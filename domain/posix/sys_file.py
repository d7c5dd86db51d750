"""open, close, and what moves bytes between files and programs.

An open file never waits: `blocking` tries, and where the answer is EAGAIN it waits at the file's queues and tries again. So
every call here is a plain function whose result is a generator only when there is something to wait for.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from domain.posix import namespace
from domain.posix.devices import open_device
from domain.posix.errors import Errno, Interrupted
from domain.posix.files import O_ACCMODE, O_LARGEFILE, O_PATH, DirectoryFile, File, PathFile, RegularFile
from domain.posix.inode import Device, Directory, Fifo, Inode, Regular, Socket, Symlink
from domain.posix.pipe import PipeFile, opened
from domain.posix.table import signed32, signed64, syscall
from domain.posix.vfs import Found, as_directory, existing, path_of, walk
from domain.posix.wait import Wait

if TYPE_CHECKING:
    from domain.posix.task import Task

AT_FDCWD = -100
MAX_TRANSFER = 0x7FFFF000  # of one call, Linux's MAX_RW_COUNT
CHUNK = 1 << 20  # bytes in flight of a transfer: what a call costs the kernel beside the file itself
IOV_MAX = 1024
TMPFILE = 0o20000000
Blocking = Generator[Wait, Any, int]
Result = int | Blocking
Pieces = list[tuple[int, int]]  # (address, size)


def base(task: Task, fd: int, path: bytes) -> Directory:
    """Where a path of an *at call begins. Errors: EBADF, ENOTDIR for a relative one."""
    fd = signed32(fd)
    if path[:1] == b"/" or fd == AT_FDCWD:
        return task.fs.cwd
    return as_directory(task.files.named(fd).inode)


def find(task: Task, fd: int, address: int, *, follow: bool = True) -> Found:
    path = task.memory.string(address)
    return walk(task, task.fs, base(task, fd, path), path, follow=follow)


def find_file(task: Task, fd: int, address: int, *, follow: bool = True) -> Inode:
    path = task.memory.string(address)
    return existing(task, task.fs, base(task, fd, path), path, follow=follow)


def blocking(file: File, attempt: Callable[[], int]) -> Result:
    """The result of `attempt`, now or when the file has what it wants."""
    try:
        return attempt()
    except Errno as error:
        if error.number != errno.EAGAIN or file.flags & os.O_NONBLOCK:
            raise
    return wait(file, attempt)


def wait(file: File, attempt: Callable[[], int]) -> Blocking:
    while True:
        yield file.queues()
        try:
            return attempt()
        except Errno as error:
            if error.number != errno.EAGAIN:
                raise


# Opening


def open_found(task: Task, found: Found, flags: int, mode: int) -> tuple[File, bool]:
    """The file, and whether its open may still have to wait (FIFOs)."""
    if flags & os.O_CREAT and found.slash and found.name:  # a link led to `name/`
        raise Errno(errno.EISDIR)
    inode = found.inode
    if inode is None:
        if not flags & os.O_CREAT:
            raise Errno(errno.ENOENT)
        inode = namespace.create(found, stat.S_IFREG | (mode & 0o7777 & ~task.fs.umask))
        flags &= ~os.O_TRUNC
    else:
        check_open(inode, found, flags)
    file = open_inode(task, inode, flags)
    file.path = found_path(task, found)
    return file, isinstance(file, PipeFile)


def check_open(inode: Inode, found: Found, flags: int) -> None:
    if flags & os.O_CREAT and flags & os.O_EXCL:
        raise Errno(errno.EEXIST)
    if isinstance(inode, Symlink) and not flags & O_PATH:
        raise Errno(errno.ENOTDIR if flags & os.O_DIRECTORY else errno.ELOOP)
    if flags & os.O_CREAT and isinstance(inode, Directory):
        raise Errno(errno.EISDIR)
    if flags & os.O_DIRECTORY or found.slash:
        as_directory(inode)  # or ENOTDIR
    if isinstance(inode, Directory) and (flags & O_ACCMODE or flags & os.O_TRUNC) and not flags & O_PATH:
        raise Errno(errno.EISDIR)


def open_inode(task: Any, inode: Inode, flags: int) -> File:
    if flags & O_PATH:
        return PathFile(inode, flags & (O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))
    flags |= O_LARGEFILE
    if isinstance(inode, Regular):
        if flags & os.O_TRUNC:
            inode.truncate(0)
        return RegularFile(inode, flags)
    if isinstance(inode, Directory):
        return DirectoryFile(inode, flags)
    if isinstance(inode, Fifo):
        return PipeFile(inode, flags)
    if isinstance(inode, Device):
        return open_device(task, task.fs.vfs, inode, flags)
    assert isinstance(inode, Socket), f"{inode} is a file of no type"
    raise Errno(errno.ENXIO)


def found_path(task: Task, found: Found) -> bytes:
    try:
        place = path_of(task.fs, found.inode if isinstance(found.inode, Directory) else found.directory)
    except Errno:  # its directory was removed
        return b""
    if isinstance(found.inode, Directory) or not found.name:
        return place
    return place.rstrip(b"/") + b"/" + found.name


def do_open(task: Task, fd: int, address: int, flags: int, mode: int) -> Result:
    flags = signed32(flags)
    if flags & O_PATH:
        flags &= O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    if flags & TMPFILE == TMPFILE:
        raise Errno(errno.EOPNOTSUPP)
    if flags & os.O_CREAT and flags & os.O_DIRECTORY:
        raise Errno(errno.EINVAL)
    follow = not flags & os.O_NOFOLLOW and not (flags & os.O_CREAT and flags & os.O_EXCL)
    path = task.memory.string(address)
    task.files.free()  # EMFILE comes before anything is created

    bare = path.rstrip(b"/") or b"/"
    named = flags & os.O_CREAT and path[-1:] == b"/"
    if named and walk(task, task.fs, base(task, fd, path), bare, follow=False).name:  # whatever is there
        raise Errno(errno.EISDIR)
    found = walk(task, task.fs, base(task, fd, path), path, follow=follow)
    file, may_wait = open_found(task, found, flags, mode)
    cloexec = bool(flags & os.O_CLOEXEC)
    if not may_wait:
        return task.files.install(file, cloexec)
    assert isinstance(file, PipeFile)
    return open_fifo(task, file, cloexec)


def open_fifo(task: Task, file: PipeFile, cloexec: bool) -> Result:
    try:
        if opened(file):
            return task.files.install(file, cloexec)
    except Errno:
        file.released()
        raise
    return wait_fifo(task, file, cloexec)


def wait_fifo(task: Task, file: PipeFile, cloexec: bool) -> Blocking:
    """Until the other end is opened, were it only for a moment."""
    pipe = file.pipe
    counts = (pipe.reader_count, pipe.writer_count)
    waits_for = 1 if file.readable else 0
    try:
        while (pipe.reader_count, pipe.writer_count)[waits_for] == counts[waits_for]:
            yield pipe.opened
    except BaseException:
        file.released()
        raise
    return task.files.install(file, cloexec)


@syscall(2)
def sys_open(task: Task, path: int, flags: int, mode: int) -> Result:
    return do_open(task, AT_FDCWD, path, flags, mode)


@syscall(257, "partial", "no O_TMPFILE")
def sys_openat(task: Task, fd: int, path: int, flags: int, mode: int) -> Result:
    return do_open(task, fd, path, flags, mode)


@syscall(85)
def sys_creat(task: Task, path: int, mode: int) -> Result:
    return do_open(task, AT_FDCWD, path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)


@syscall(3)
def sys_close(task: Task, fd: int) -> int:
    task.files.close(signed32(fd))
    return 0


# Moving bytes


def for_reading(task: Task, fd: int, *, at: bool = False) -> File:
    """`at`: for a call with an offset of its own. Errors: EBADF; before that ESPIPE for what has no offsets."""
    file = task.files.get(signed32(fd))
    if at and not file.seekable:
        raise Errno(errno.ESPIPE)
    if not file.readable:
        raise Errno(errno.EBADF)
    return file


def for_writing(task: Task, fd: int, *, at: bool = False) -> File:
    file = task.files.get(signed32(fd))
    if at and not file.seekable:
        raise Errno(errno.ESPIPE)
    if not file.writable:
        raise Errno(errno.EBADF)
    return file


def take(task: Task, file: File, pieces: Pieces, offset: int | None) -> int:
    """Fills the pieces from the file. After the first byte an error is a short read: nothing that was taken is lost."""
    done = 0
    try:
        for address, size in pieces:
            start = 0
            while start < size or not size:
                count = min(CHUNK, size - start)
                data = file.read(task, count) if offset is None else file.pread(task, count, offset + done)
                try:
                    if data:
                        task.memory.copy_out(address + start, data)
                except Errno:
                    if offset is None:
                        file.put_back(data)
                    raise
                done += len(data)
                start += len(data)
                if len(data) < count or not (file.whole and size):
                    break
            if start < size:
                break
    except Errno:
        if not done:
            raise
    return done


def read_pieces(task: Task, file: File, pieces: Pieces, offset: int | None = None) -> Result:
    return blocking(file, lambda: take(task, file, pieces, offset))


def write_pieces(task: Task, file: File, pieces: Pieces, offset: int | None = None) -> Result:
    """A pipe takes all of it, however long that takes; a write that is interrupted returns what it has done."""
    done = 0
    total = sum(size for _, size in pieces)

    def attempt() -> int:
        nonlocal done
        while True:
            data = gather(task, pieces, done)
            put = file.write(task, data) if offset is None else file.pwrite(task, data, offset + done)
            done += put
            if done == total or (put < len(data) and file.whole):
                return done

    try:
        return attempt()
    except Errno as error:
        if error.number == errno.EAGAIN and not file.flags & os.O_NONBLOCK:
            return wait_write(file, attempt, lambda: done)
        if not done:
            raise
        return done


def wait_write(file: File, attempt: Callable[[], int], done: Callable[[], int]) -> Blocking:
    try:
        return (yield from wait(file, attempt))
    except (Errno, Interrupted):
        if not done():
            raise
        return done()


def gather(task: Task, pieces: Pieces, skip: int) -> bytes:
    """At most CHUNK bytes of the pieces, from `skip` on. A bad address ends it where it begins; at once it is EFAULT."""
    parts: list[bytes] = []
    room = CHUNK
    for address, size in pieces:
        if skip >= size:
            skip -= size
            continue
        count = min(size - skip, room)
        try:
            parts.append(task.memory.copy_in(address + skip, count))
        except Errno:
            if not parts:
                raise
            break
        skip = 0
        room -= count
        if not room:
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)


def vector(task: Task, address: int, count: int) -> Pieces:
    """struct iovec: address and length. Errors: EINVAL for more than 1024 or a length that is negative."""
    count = signed32(count)
    if not 0 <= count <= IOV_MAX:
        raise Errno(errno.EINVAL)
    words = struct.unpack(f"<{2 * count}Q", task.memory.copy_in(address, 16 * count)) if count else ()
    pieces: Pieces = []
    room = MAX_TRANSFER
    for start, size in zip(words[::2], words[1::2], strict=True):
        if size >> 63:
            raise Errno(errno.EINVAL)
        taken = min(size, room)
        room -= taken
        if taken:
            pieces.append((start, taken))
    return pieces


def piece(address: int, count: int) -> Pieces:
    if count >> 63:
        raise Errno(errno.EINVAL)
    return [(address, min(count, MAX_TRANSFER))]


def position(offset: int) -> int:
    offset = signed64(offset)
    if offset < 0:
        raise Errno(errno.EINVAL)
    return offset
