"""Names and places: directories, links, rename, the working directory."""

from __future__ import annotations

import errno
import stat
import struct
from typing import TYPE_CHECKING

from domain.posix import namespace
from domain.posix.errors import Errno
from domain.posix.files import DirectoryFile
from domain.posix.inode import Symlink
from domain.posix.sys_file import AT_FDCWD, base, find_file
from domain.posix.sys_stat import AT_EMPTY_PATH, AT_SYMLINK_FOLLOW
from domain.posix.table import signed32, syscall
from domain.posix.vfs import Found, as_directory, path_of, walk

if TYPE_CHECKING:
    from domain.posix.task import Task

AT_REMOVEDIR = 0x200
DIRENT = struct.Struct("<QqHB")  # d_ino, d_off, d_reclen, d_type; then the name and a zero, to a multiple of 8


@syscall(217)
def sys_getdents64(task: Task, fd: int, buffer: int, size: int) -> int:
    file = task.files.get(signed32(fd))
    if not isinstance(file, DirectoryFile):
        raise Errno(errno.ENOTDIR)
    if not file.inode.links:
        raise Errno(errno.ENOENT)
    size &= 0xFFFF_FFFF
    out = bytearray()
    last = file.offset
    entries = file.entries()
    for cookie, name, number, kind in entries:
        length = (DIRENT.size + len(name) + 1 + 7) & ~7
        if len(out) + length > size:
            break
        out += (DIRENT.pack(number, cookie, length, kind) + name).ljust(length, b"\0")
        last = cookie
    if entries and not out:
        raise Errno(errno.EINVAL)

    task.memory.copy_out(buffer, bytes(out))
    file.offset = last
    file.inode.accessed()
    return len(out)


@syscall(83)
def sys_mkdir(task: Task, path: int, mode: int) -> int:
    return sys_mkdirat(task, AT_FDCWD, path, mode)


@syscall(258)
def sys_mkdirat(task: Task, fd: int, path: int, mode: int) -> int:
    namespace.create(find_parent(task, fd, path), stat.S_IFDIR | (mode & 0o1777 & ~task.fs.umask))
    return 0


def find_parent(task: Task, fd: int, address: int) -> Found:
    """For calls that act on a name and not on what it leads to: a slash at the end follows no link here."""
    path = task.memory.string(address)
    bare = path.rstrip(b"/") or path[:1]
    found = walk(task, task.fs, base(task, fd, path), bare, follow=False)
    found.slash = len(bare) < len(path)
    return found


@syscall(133)
def sys_mknod(task: Task, path: int, mode: int, rdev: int) -> int:
    return sys_mknodat(task, AT_FDCWD, path, mode, rdev)


@syscall(259)
def sys_mknodat(task: Task, fd: int, path: int, mode: int, rdev: int) -> int:
    kind = stat.S_IFMT(mode & 0xFFFF) or stat.S_IFREG
    if kind == stat.S_IFDIR:
        raise Errno(errno.EPERM)
    if kind not in (stat.S_IFREG, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        raise Errno(errno.EINVAL)
    device = rdev & 0xFFFF_FFFF if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    namespace.create(find_parent(task, fd, path), kind | (mode & 0o7777 & ~task.fs.umask), rdev=device)
    return 0


@syscall(84)
def sys_rmdir(task: Task, path: int) -> int:
    namespace.rmdir(find_parent(task, AT_FDCWD, path))
    return 0


@syscall(87)
def sys_unlink(task: Task, path: int) -> int:
    namespace.unlink(find_parent(task, AT_FDCWD, path))
    return 0


@syscall(263)
def sys_unlinkat(task: Task, fd: int, path: int, flags: int) -> int:
    flags = signed32(flags)
    if flags & ~AT_REMOVEDIR:
        raise Errno(errno.EINVAL)
    (namespace.rmdir if flags else namespace.unlink)(find_parent(task, fd, path))
    return 0


@syscall(82)
def sys_rename(task: Task, old: int, new: int) -> int:
    return sys_renameat2(task, AT_FDCWD, old, AT_FDCWD, new, 0)


@syscall(264)
def sys_renameat(task: Task, old_fd: int, old: int, new_fd: int, new: int) -> int:
    return sys_renameat2(task, old_fd, old, new_fd, new, 0)


@syscall(316, "partial", "no RENAME_WHITEOUT")
def sys_renameat2(task: Task, old_fd: int, old: int, new_fd: int, new: int, flags: int) -> int:
    flags = signed32(flags)
    if flags & ~(namespace.RENAME_NOREPLACE | namespace.RENAME_EXCHANGE) or flags == 3:  # both
        raise Errno(errno.EINVAL)

    namespace.rename(find_parent(task, old_fd, old), find_parent(task, new_fd, new), flags)
    return 0


@syscall(86)
def sys_link(task: Task, old: int, new: int) -> int:
    return sys_linkat(task, AT_FDCWD, old, AT_FDCWD, new, 0)


@syscall(265)
def sys_linkat(task: Task, old_fd: int, old: int, new_fd: int, new: int, flags: int) -> int:
    flags = signed32(flags)
    if flags & ~(AT_SYMLINK_FOLLOW | AT_EMPTY_PATH):
        raise Errno(errno.EINVAL)
    if flags & AT_EMPTY_PATH and not task.memory.string(old):
        inode = task.files.named(signed32(old_fd)).inode
    else:
        inode = find_file(task, old_fd, old, follow=bool(flags & AT_SYMLINK_FOLLOW))
    namespace.link(inode, find_parent(task, new_fd, new))
    return 0


@syscall(88)
def sys_symlink(task: Task, target: int, path: int) -> int:
    return sys_symlinkat(task, target, AT_FDCWD, path)


@syscall(266)
def sys_symlinkat(task: Task, target: int, fd: int, path: int) -> int:
    text = task.memory.string(target)
    if not text:
        raise Errno(errno.ENOENT)
    namespace.create(find_parent(task, fd, path), stat.S_IFLNK | 0o777, target=text)
    return 0


@syscall(89)
def sys_readlink(task: Task, path: int, buffer: int, size: int) -> int:
    return sys_readlinkat(task, AT_FDCWD, path, buffer, size)


@syscall(267)
def sys_readlinkat(task: Task, fd: int, path: int, buffer: int, size: int) -> int:
    size = signed32(size)
    if size <= 0:
        raise Errno(errno.EINVAL)
    if not task.memory.string(path) and signed32(fd) != AT_FDCWD:
        inode = task.files.named(signed32(fd)).inode
        if not isinstance(inode, Symlink):
            raise Errno(errno.ENOENT)
    else:
        inode = find_file(task, fd, path, follow=False)
    if not isinstance(inode, Symlink):
        raise Errno(errno.EINVAL)

    text = inode.text(task)[:size]
    inode.accessed()
    task.memory.copy_out(buffer, text)
    return len(text)


@syscall(79)
def sys_getcwd(task: Task, buffer: int, size: int) -> int:
    path = path_of(task.fs, task.fs.cwd) + b"\0"
    if len(path) > size:
        raise Errno(errno.ERANGE)

    task.memory.copy_out(buffer, path)
    return len(path)


@syscall(80)
def sys_chdir(task: Task, path: int) -> int:
    task.fs.cwd = as_directory(find_file(task, AT_FDCWD, path))
    return 0


@syscall(81)
def sys_fchdir(task: Task, fd: int) -> int:
    task.fs.cwd = as_directory(task.files.named(signed32(fd)).inode)
    return 0


@syscall(161)
def sys_chroot(task: Task, path: int) -> int:
    inode = find_file(task, AT_FDCWD, path)
    task.fs.root = as_directory(inode)
    return 0


@syscall(95)
def sys_umask(task: Task, mask: int) -> int:
    was, task.fs.umask = task.fs.umask, mask & 0o777
    return was
