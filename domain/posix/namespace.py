"""What changes names: create, link, remove, rename. The checks come in Linux's order, because programs see the first error."""

from __future__ import annotations

import errno
import stat

from domain.posix.errors import Errno
from domain.posix.inode import MAX_LINKS_OF_A_FILE, Directory, Inode
from domain.posix.vfs import Found, as_directory

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


def living(directory: Directory) -> None:
    if not directory.links:
        raise Errno(errno.ENOENT)


def free_name(found: Found, *, directory: bool = False) -> None:
    """A name may be given here. Errors: EEXIST; ENOENT for `name/` where no directory is to be made."""
    if not found.name or found.inode is not None:
        raise Errno(errno.EEXIST)
    if found.slash and not directory:
        raise Errno(errno.ENOENT)
    living(found.directory)


def create(found: Found, mode: int, *, rdev: int = 0, target: bytes = b"") -> Inode:
    """A file of the type in `mode`, whose bits have been masked already."""
    free_name(found, directory=stat.S_ISDIR(mode))

    return found.directory.create(found.name, mode, rdev=rdev, target=target)


def link(inode: Inode, found: Found) -> None:
    free_name(found)
    if inode.fs is not found.directory.fs:
        raise Errno(errno.EXDEV)
    if isinstance(inode, Directory):
        raise Errno(errno.EPERM)
    if inode.links <= 0:
        raise Errno(errno.ENOENT)
    if inode.links >= MAX_LINKS_OF_A_FILE:
        raise Errno(errno.EMLINK)

    found.directory.add(found.name, inode)
    inode.links += 1
    inode.changed()


def unlink(found: Found) -> None:
    if not found.name:
        raise Errno(errno.EISDIR)
    inode = found.file()
    if isinstance(inode, Directory):
        raise Errno(errno.EISDIR)
    if found.slash:
        raise Errno(errno.ENOTDIR)

    found.directory.remove(found.name)
    unname(inode)


def unname(inode: Inode) -> None:
    inode.links -= 1
    inode.changed()


def rmdir(found: Found) -> None:
    if not found.name:
        raise Errno({b"": errno.EBUSY, b".": errno.EINVAL, b"..": errno.ENOTEMPTY}[found.dots])
    directory = as_directory(found.file())
    if directory.covered:
        raise Errno(errno.EBUSY)
    if not directory.empty():
        raise Errno(errno.ENOTEMPTY)

    found.directory.remove(found.name)
    bury(directory)


def bury(directory: Directory) -> None:
    """Removed, but still somebody's working directory perhaps: `..` leads on to its parent, nothing can be made in it."""
    directory.links = 0
    directory.changed()


def rename(old: Found, new: Found, flags: int) -> None:
    """Errors: EINVAL for a directory moved into itself; and whatever Linux says, in its order."""
    if old.directory.fs is not new.directory.fs:
        raise Errno(errno.EXDEV)
    if not old.name:
        raise Errno(errno.EBUSY)
    if not new.name:
        raise Errno(errno.EEXIST if flags & RENAME_NOREPLACE else errno.EBUSY)
    source, target = old.file(), new.inode
    check_rename(old, new, source, target, flags)
    if source is target:
        return

    if flags & RENAME_EXCHANGE:
        assert target is not None, "checked above"
        old.directory.remove(old.name)
        new.directory.remove(new.name)
        old.directory.add(old.name, target)
        new.directory.add(new.name, source)
        target.changed()
    else:
        if target is not None:
            new.directory.remove(new.name)
            if isinstance(target, Directory):
                bury(target)
            else:
                unname(target)
        old.directory.remove(old.name)
        new.directory.add(new.name, source)
    source.changed()


def check_rename(old: Found, new: Found, source: Inode, target: Inode | None, flags: int) -> None:
    exchange = flags & RENAME_EXCHANGE
    if flags & RENAME_NOREPLACE and target is not None:
        raise Errno(errno.EEXIST)
    if exchange:
        if target is None:
            raise Errno(errno.ENOENT)
        if not isinstance(target, Directory) and new.slash:
            raise Errno(errno.ENOTDIR)
    if not isinstance(source, Directory) and (old.slash or (not exchange and new.slash)):
        raise Errno(errno.ENOTDIR)
    if isinstance(source, Directory) and within(new.directory, source):
        raise Errno(errno.EINVAL)
    if isinstance(target, Directory) and within(old.directory, target):
        raise Errno(errno.EINVAL if exchange else errno.ENOTEMPTY)
    if source is target:
        return
    if target is None:
        living(new.directory)
    elif not exchange:
        if isinstance(source, Directory) and not isinstance(target, Directory):
            raise Errno(errno.ENOTDIR)
        if isinstance(target, Directory) and not isinstance(source, Directory):
            raise Errno(errno.EISDIR)
    for inode in (source, target):
        if isinstance(inode, Directory) and inode.covered:
            raise Errno(errno.EBUSY)
    if isinstance(target, Directory) and not exchange and not target.empty():
        raise Errno(errno.ENOTEMPTY)


def within(directory: Directory, ancestor: Directory) -> bool:
    while directory is not ancestor:
        if directory.parent is directory:
            return False
        directory = directory.parent
    return True
