"""What a file is: the stat family, and the calls that change its attributes. Layouts are those of x86-64."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.files import RegularFile
from domain.posix.inode import MAX_OFFSET, Directory, Inode, Regular, Symlink
from domain.posix.sys_file import AT_FDCWD, base, find_file
from domain.posix.table import signed32, signed64, syscall
from domain.posix.vfs import existing

if TYPE_CHECKING:
    from domain.posix.task import Task

AT_SYMLINK_NOFOLLOW, AT_EACCESS, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = 0x100, 0x200, 0x400, 0x1000
AT_NO_AUTOMOUNT, AT_STATX_SYNC = 0x800, 0x6000
# st_dev, st_ino, st_nlink, st_mode, st_uid, st_gid, pad, st_rdev, st_size, st_blksize, st_blocks, three times (s, ns), 24 spare
STAT = struct.Struct("<QQQIIIIQqqq6q24x")
# mask, blksize, attributes, nlink, uid, gid, mode, pad, ino, size, blocks, attributes_mask, four times (s, ns, pad), rdev, dev
STATX = struct.Struct("<IIQIIIHxxQQQQ" + "qIxxxx" * 4 + "IIII" + "112x")
STATX_BASIC, STATX_BTIME, STATX_RESERVED = 0x7FF, 0x800, 0x80000000
# f_type, f_bsize, f_blocks, f_bfree, f_bavail, f_files, f_ffree, f_fsid, f_namelen, f_frsize, f_flags, 4 spare
STATFS = struct.Struct("<qqQQQQQiiqqq32x")
TIMES = struct.Struct("<4q")
UTIME_NOW, UTIME_OMIT = 0x3FFFFFFF, 0x3FFFFFFE
SECOND = 10**9


def pack_stat(inode: Inode) -> bytes:
    inode.settle()
    times = [part for ns in (inode.atime, inode.mtime, inode.ctime) for part in divmod(ns, SECOND)]
    links = max(inode.links, 0)
    return STAT.pack(
        inode.fs.device, inode.number, links, inode.mode, inode.uid, inode.gid, 0, inode.rdev, inode.size, 4096,
        inode.blocks, *times,
    )  # fmt: skip


def pack_statx(inode: Inode) -> bytes:
    inode.settle()
    times = [part for ns in (inode.atime, inode.btime, inode.ctime, inode.mtime) for part in divmod(ns, SECOND)]
    rdev, dev = inode.rdev, inode.fs.device
    return STATX.pack(
        STATX_BASIC | STATX_BTIME, 4096, 0, max(inode.links, 0), inode.uid, inode.gid, inode.mode, inode.number, inode.size,
        inode.blocks, 0, *times, os.major(rdev), os.minor(rdev), os.major(dev), os.minor(dev),
    )  # fmt: skip


def at(task: Task, fd: int, address: int, flags: int, allowed: int) -> Inode:
    """The file that an *at call means. Errors: EINVAL for flags that the call does not have."""
    flags = signed32(flags)
    if flags & ~(allowed | AT_EMPTY_PATH):
        raise Errno(errno.EINVAL)
    path = task.memory.string(address) if address or not flags & AT_EMPTY_PATH else b""
    if not path and flags & AT_EMPTY_PATH:
        return task.fs.cwd if signed32(fd) == AT_FDCWD else task.files.named(signed32(fd)).inode
    return existing(task, task.fs, base(task, fd, path), path, follow=not flags & AT_SYMLINK_NOFOLLOW)


@syscall(4)
def sys_stat(task: Task, path: int, buffer: int) -> int:
    task.memory.copy_out(buffer, pack_stat(find_file(task, AT_FDCWD, path)))
    return 0


@syscall(6)
def sys_lstat(task: Task, path: int, buffer: int) -> int:
    task.memory.copy_out(buffer, pack_stat(find_file(task, AT_FDCWD, path, follow=False)))
    return 0


@syscall(5)
def sys_fstat(task: Task, fd: int, buffer: int) -> int:
    task.memory.copy_out(buffer, pack_stat(task.files.named(signed32(fd)).inode))
    return 0


@syscall(262)
def sys_newfstatat(task: Task, fd: int, path: int, buffer: int, flags: int) -> int:
    inode = at(task, fd, path, flags, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT)
    task.memory.copy_out(buffer, pack_stat(inode))
    return 0


@syscall(332)
def sys_statx(task: Task, fd: int, path: int, flags: int, mask: int, buffer: int) -> int:
    if mask & STATX_RESERVED or flags & AT_STATX_SYNC == AT_STATX_SYNC:
        raise Errno(errno.EINVAL)
    inode = at(task, fd, path, flags, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_SYNC)
    task.memory.copy_out(buffer, pack_statx(inode))
    return 0


@syscall(137)
def sys_statfs(task: Task, path: int, buffer: int) -> int:
    return put_statfs(task, find_file(task, AT_FDCWD, path), buffer)


@syscall(138)
def sys_fstatfs(task: Task, fd: int, buffer: int) -> int:
    return put_statfs(task, task.files.named(signed32(fd)).inode, buffer)


def put_statfs(task: Task, inode: Inode, buffer: int) -> int:
    use = inode.fs.usage()
    space = (use.blocks, use.free, use.free, use.inodes, use.free_inodes)
    numbers = (use.magic, 4096, *space, inode.fs.device, 0, 255, 4096, 0x20)
    task.memory.copy_out(buffer, STATFS.pack(*numbers))
    return 0


def access(task: Task, fd: int, path: int, mode: int, flags: int) -> int:
    """Root may read and write everything, and execute what anybody may execute."""
    mode = signed32(mode)
    if mode & ~7:
        raise Errno(errno.EINVAL)
    inode = at(task, fd, path, flags, AT_SYMLINK_NOFOLLOW | AT_EACCESS)
    if mode & os.X_OK and not isinstance(inode, Directory) and not inode.mode & 0o111:
        raise Errno(errno.EACCES)

    return 0


@syscall(21)
def sys_access(task: Task, path: int, mode: int) -> int:
    return access(task, AT_FDCWD, path, mode, 0)


@syscall(269)
def sys_faccessat(task: Task, fd: int, path: int, mode: int) -> int:
    return access(task, fd, path, mode, 0)


@syscall(439)
def sys_faccessat2(task: Task, fd: int, path: int, mode: int, flags: int) -> int:
    return access(task, fd, path, mode, flags)


def change_mode(inode: Inode, mode: int) -> int:
    if isinstance(inode, Symlink):
        raise Errno(errno.EOPNOTSUPP)

    inode.mode = inode.kind | (mode & 0o7777)
    inode.changed()
    return 0


@syscall(90)
def sys_chmod(task: Task, path: int, mode: int) -> int:
    return change_mode(find_file(task, AT_FDCWD, path), mode)


@syscall(91)
def sys_fchmod(task: Task, fd: int, mode: int) -> int:
    return change_mode(task.files.get(signed32(fd)).inode, mode)


@syscall(268)
def sys_fchmodat(task: Task, fd: int, path: int, mode: int) -> int:
    return change_mode(find_file(task, fd, path), mode)


@syscall(452)
def sys_fchmodat2(task: Task, fd: int, path: int, mode: int, flags: int) -> int:
    return change_mode(at(task, fd, path, flags, AT_SYMLINK_NOFOLLOW), mode)


def change_owner(inode: Inode, uid: int, gid: int) -> int:
    """All ones leave a number as it is. A program that changes hands loses its set-id bits."""
    uid, gid = uid & 0xFFFF_FFFF, gid & 0xFFFF_FFFF
    if uid != 0xFFFF_FFFF:
        inode.uid = uid
    if gid != 0xFFFF_FFFF:
        inode.gid = gid
    if not isinstance(inode, Directory):
        inode.mode &= ~stat.S_ISUID
        if inode.mode & stat.S_IXGRP:
            inode.mode &= ~stat.S_ISGID
    inode.changed()
    return 0


@syscall(92)
def sys_chown(task: Task, path: int, uid: int, gid: int) -> int:
    return change_owner(find_file(task, AT_FDCWD, path), uid, gid)


@syscall(94)
def sys_lchown(task: Task, path: int, uid: int, gid: int) -> int:
    return change_owner(find_file(task, AT_FDCWD, path, follow=False), uid, gid)


@syscall(93)
def sys_fchown(task: Task, fd: int, uid: int, gid: int) -> int:
    return change_owner(task.files.get(signed32(fd)).inode, uid, gid)


@syscall(260)
def sys_fchownat(task: Task, fd: int, path: int, uid: int, gid: int, flags: int) -> int:
    return change_owner(at(task, fd, path, flags, AT_SYMLINK_NOFOLLOW), uid, gid)


def set_size(inode: Inode, size: int) -> int:
    if size > MAX_OFFSET:
        raise Errno(errno.EFBIG)

    inode.truncate(size)
    return 0


@syscall(76)
def sys_truncate(task: Task, path: int, size: int) -> int:
    size = signed64(size)
    if size < 0:
        raise Errno(errno.EINVAL)
    inode = find_file(task, AT_FDCWD, path)
    if isinstance(inode, Directory):
        raise Errno(errno.EISDIR)
    if not isinstance(inode, Regular):
        raise Errno(errno.EINVAL)

    return set_size(inode, size)


@syscall(77)
def sys_ftruncate(task: Task, fd: int, size: int) -> int:
    size = signed64(size)
    if size < 0:
        raise Errno(errno.EINVAL)
    file = task.files.get(signed32(fd))
    if not isinstance(file, RegularFile) or not file.writable:
        raise Errno(errno.EINVAL)

    return set_size(file.inode, size)


@syscall(280)
def sys_utimensat(task: Task, fd: int, path: int, times: int, flags: int) -> int:
    now = task.fs.vfs.now()
    wanted: list[int | None] = [now, now]
    if times:
        parts = TIMES.unpack(task.memory.copy_in(times, TIMES.size))
        for index, (seconds, ns) in enumerate((parts[:2], parts[2:])):
            if ns not in (UTIME_NOW, UTIME_OMIT) and not 0 <= ns < SECOND:
                raise Errno(errno.EINVAL)
            if ns != UTIME_NOW:
                wanted[index] = None if ns == UTIME_OMIT else seconds * SECOND + ns
        if wanted == [None, None]:
            return 0
    if not path:  # futimens
        if signed32(fd) == AT_FDCWD:
            raise Errno(errno.EFAULT)
        if flags:
            raise Errno(errno.EINVAL)
        inode = task.files.get(signed32(fd)).inode
    else:
        inode = at(task, fd, path, flags, AT_SYMLINK_NOFOLLOW)
    return set_times(inode, *wanted)


def set_times(inode: Inode, atime: int | None, mtime: int | None) -> int:
    inode.settle()
    inode.changed()
    if atime is not None:
        inode.atime = atime
    if mtime is not None:
        inode.mtime = mtime
    return 0


@syscall(132)
def sys_utime(task: Task, path: int, times: int) -> int:
    inode = find_file(task, AT_FDCWD, path)
    if not times:
        return set_times(inode, task.fs.vfs.now(), task.fs.vfs.now())
    atime, mtime = struct.unpack("<2q", task.memory.copy_in(times, 16))
    return set_times(inode, atime * SECOND, mtime * SECOND)


@syscall(235)
def sys_utimes(task: Task, path: int, times: int) -> int:
    inode = find_file(task, AT_FDCWD, path)
    if not times:
        return set_times(inode, task.fs.vfs.now(), task.fs.vfs.now())
    a, a_us, m, m_us = struct.unpack("<4q", task.memory.copy_in(times, 32))
    if not (0 <= a_us < 10**6 and 0 <= m_us < 10**6):
        raise Errno(errno.EINVAL)
    return set_times(inode, a * SECOND + a_us * 1000, m * SECOND + m_us * 1000)


# ---- extended attributes: there are none


NO_ATTRIBUTES = "no file has any: EOPNOTSUPP, as of a file system without them"


@syscall(191, "none", NO_ATTRIBUTES)
def sys_getxattr(task: Task) -> int:
    raise Errno(errno.EOPNOTSUPP)


@syscall(192, "none", NO_ATTRIBUTES)
def sys_lgetxattr(task: Task) -> int:
    raise Errno(errno.EOPNOTSUPP)


@syscall(193, "none", NO_ATTRIBUTES)
def sys_fgetxattr(task: Task) -> int:
    raise Errno(errno.EOPNOTSUPP)


@syscall(194, "none", NO_ATTRIBUTES)
def sys_listxattr(task: Task) -> int:
    raise Errno(errno.EOPNOTSUPP)


@syscall(195, "none", NO_ATTRIBUTES)
def sys_llistxattr(task: Task) -> int:
    raise Errno(errno.EOPNOTSUPP)


@syscall(196, "none", NO_ATTRIBUTES)
def sys_flistxattr(task: Task) -> int:
    raise Errno(errno.EOPNOTSUPP)
