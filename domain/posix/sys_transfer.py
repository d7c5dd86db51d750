"""read and write in all their forms, lseek, and the calls that move bytes from file to file."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.files import DirectoryFile, File, RegularFile
from domain.posix.sys_file import (
    CHUNK,
    MAX_TRANSFER,
    Result,
    blocking,
    for_reading,
    for_writing,
    piece,
    position,
    read_pieces,
    vector,
    write_pieces,
)
from domain.posix.table import signed32, signed64, syscall

if TYPE_CHECKING:
    from domain.posix.task import Task

RWF_APPEND = 0x10
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 0x10


@syscall(0)
def sys_read(task: Task, fd: int, buffer: int, count: int) -> Result:
    return read_pieces(task, for_reading(task, fd), piece(buffer, count))


@syscall(1)
def sys_write(task: Task, fd: int, buffer: int, count: int) -> Result:
    return write_pieces(task, for_writing(task, fd), piece(buffer, count))


@syscall(17)
def sys_pread64(task: Task, fd: int, buffer: int, count: int, offset: int) -> Result:
    place = position(offset)
    return read_pieces(task, for_reading(task, fd, at=True), piece(buffer, count), place)


@syscall(18)
def sys_pwrite64(task: Task, fd: int, buffer: int, count: int, offset: int) -> Result:
    place = position(offset)
    return write_pieces(task, for_writing(task, fd, at=True), piece(buffer, count), place)


@syscall(19)
def sys_readv(task: Task, fd: int, iov: int, count: int) -> Result:
    file = for_reading(task, fd)
    return read_pieces(task, file, vector(task, iov, count))


@syscall(20)
def sys_writev(task: Task, fd: int, iov: int, count: int) -> Result:
    file = for_writing(task, fd)
    pieces = vector(task, iov, count)
    return write_pieces(task, file, pieces) if pieces else 0


@syscall(295)
def sys_preadv(task: Task, fd: int, iov: int, count: int, offset: int) -> Result:
    place = position(offset)
    file = for_reading(task, fd, at=True)
    return read_pieces(task, file, vector(task, iov, count), place)


@syscall(296)
def sys_pwritev(task: Task, fd: int, iov: int, count: int, offset: int) -> Result:
    place = position(offset)
    file = for_writing(task, fd, at=True)
    pieces = vector(task, iov, count)
    return write_pieces(task, file, pieces, place) if pieces else 0


@syscall(327, "partial", "no RWF_ flags")
def sys_preadv2(task: Task, fd: int, iov: int, count: int, offset: int, high: int, flags: int) -> Result:
    if flags:
        raise Errno(errno.EOPNOTSUPP)
    if signed64(offset) == -1:
        return sys_readv(task, fd, iov, count)
    return sys_preadv(task, fd, iov, count, offset)


@syscall(328, "partial", "no RWF_ flags")
def sys_pwritev2(task: Task, fd: int, iov: int, count: int, offset: int, high: int, flags: int) -> Result:
    if flags:
        raise Errno(errno.EOPNOTSUPP)
    if signed64(offset) == -1:
        return sys_writev(task, fd, iov, count)
    return sys_pwritev(task, fd, iov, count, offset)


@syscall(8)
def sys_lseek(task: Task, fd: int, offset: int, whence: int) -> int:
    return task.files.get(signed32(fd)).seek(signed64(offset), signed32(whence))


def regular(file: File) -> RegularFile:
    if isinstance(file, DirectoryFile):
        raise Errno(errno.EISDIR)
    if not isinstance(file, RegularFile):
        raise Errno(errno.EINVAL)
    return file


def copy(task: Task, source: File, target: File, count: int, where: int | None, to: int | None = None) -> int:
    """Reads and writes in turns; what the target does not take goes back. Returns what both have moved."""
    done = 0
    try:
        while done < count:
            size = min(CHUNK, count - done)
            data = source.read(task, size) if where is None else source.pread(task, size, where + done)
            if not data:
                break
            try:
                put = target.write(task, data) if to is None else target.pwrite(task, data, to + done)
            except Errno:
                if where is None:
                    source.put_back(data)
                raise
            done += put
            if put < len(data):
                if where is None:
                    source.put_back(data[put:])
                break
            if not source.whole:
                break
    except Errno:
        if not done:
            raise
    return done


@syscall(40)
def sys_sendfile(task: Task, out: int, source_fd: int, offset: int, count: int) -> Result:
    source, target = for_reading(task, source_fd), for_writing(task, out)
    if target.flags & os.O_APPEND:
        raise Errno(errno.EINVAL)
    if count >> 63:
        raise Errno(errno.EINVAL)
    if not source.whole:  # what can be mapped
        raise Errno(errno.EINVAL)
    count = min(count, MAX_TRANSFER)
    if not offset:
        return blocking(target, lambda: copy(task, source, target, count, None))

    (where,) = struct.unpack("<q", task.memory.copy_in(offset, 8))
    if where < 0:
        raise Errno(errno.EINVAL)

    def attempt() -> int:
        done = copy(task, source, target, count, where)
        task.memory.copy_out(offset, struct.pack("<q", where + done))
        return done

    return blocking(target, attempt)


@syscall(326, "partial", "between regular files")
def sys_copy_file_range(task: Task, source_fd: int, where: int, target_fd: int, to: int, count: int, flags: int) -> int:
    source, target = regular(for_reading(task, source_fd)), regular(for_writing(task, target_fd))
    if flags:
        raise Errno(errno.EINVAL)
    if target.flags & os.O_APPEND:
        raise Errno(errno.EBADF)
    places: list[int | None] = []
    for address in (where, to):
        places.append(struct.unpack("<q", task.memory.copy_in(address, 8))[0] if address else None)
    start = source.offset if places[0] is None else places[0]
    end = target.offset if places[1] is None else places[1]
    if start < 0 or end < 0:
        raise Errno(errno.EINVAL)
    count = min(count, MAX_TRANSFER, max(0, source.inode.size - start))
    if source.inode is target.inode and start < end + count and end < start + count:
        raise Errno(errno.EINVAL)

    done = copy(task, source, target, count, places[0], places[1])
    for address, place in ((where, places[0]), (to, places[1])):
        if place is not None:
            task.memory.copy_out(address, struct.pack("<q", place + done))
    return done


@syscall(285, "partial", "plain, KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE")
def sys_fallocate(task: Task, fd: int, mode: int, offset: int, length: int) -> int:
    file = task.files.get(signed32(fd))
    mode, offset, length = signed32(mode), signed64(offset), signed64(length)
    if offset < 0 or length <= 0:
        raise Errno(errno.EINVAL)
    if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
        raise Errno(errno.EOPNOTSUPP)
    if mode & FALLOC_FL_PUNCH_HOLE and mode != FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE:
        raise Errno(errno.EOPNOTSUPP)
    if not file.writable:
        raise Errno(errno.EBADF)
    if not isinstance(file, RegularFile):
        raise Errno(errno.EISDIR if isinstance(file, DirectoryFile) else errno.ESPIPE if not file.seekable else errno.ENODEV)
    if offset + length >= 1 << 63:
        raise Errno(errno.EFBIG)

    inode = file.inode
    if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
        inode.punch(offset, length)
    if not mode & FALLOC_FL_PUNCH_HOLE:
        inode.allocate(offset, length)
        if not mode & FALLOC_FL_KEEP_SIZE and offset + length > inode.size:
            inode.truncate(offset + length)
    return 0


@syscall(221)
def sys_fadvise64(task: Task, fd: int, offset: int, length: int, advice: int) -> int:
    file = task.files.get(signed32(fd))
    if not file.seekable:
        raise Errno(errno.ESPIPE)
    if signed64(length) < 0 or signed32(advice) not in range(6):
        raise Errno(errno.EINVAL)

    return 0
