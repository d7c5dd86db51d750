"""Names: what a process calls `/`, where it is, and how a path leads to a file.

The walk is Linux's (`fs/namei.c`): symbolic links on the way are followed, forty at most; `..` stops at the root of the process
and crosses mounts; a slash at the end asks for a directory and follows a link that would not be followed without it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.inode import NAME_MAX, Directory, Filesystem, Inode, Symlink, Usage
from domain.posix.ramfs import Ramfs

if TYPE_CHECKING:
    from domain.posix.files import File

PATH_MAX = 4096  # with the zero at the end
MAX_LINKS = 40

Opener = Callable[[object, Inode, int], "File"]  # (task, inode, O_ flags): what opening a device does


class Nameless(Filesystem):
    """Where the inodes of unnamed pipes live."""

    kind = "pipefs"

    def usage(self) -> Usage:
        return Usage(0x50495045)


class Sockets(Filesystem):
    """Where the inodes of sockets live, and the names that are none of files (abstract ones, unix(7))."""

    kind = "sockfs"

    def __init__(self, now: Callable[[], int], device: int) -> None:
        super().__init__(now, device)
        self.names: dict[bytes, object] = {}

    def usage(self) -> Usage:
        return Usage(0x534F434B)


class Vfs:
    """The tree of one kernel: its root, what is mounted where, and the drivers behind device numbers."""

    def __init__(self, now: Callable[[], int], root: Filesystem) -> None:
        self.now = now
        self.root = root.root
        self.pipes: Filesystem = Nameless(now, device=11)
        self.sockets = Sockets(now, device=13)
        self.anonymous = Ramfs(now, device=12)  # of memfd_create
        self.mounts: list[tuple[Filesystem, Directory | None]] = [(root, None)]
        self.character: dict[int, Opener] = {}

    def mount(self, fs: Filesystem, on: Directory) -> None:
        """Errors: EBUSY where something is mounted already."""
        if on.mounted or on is self.root:
            raise Errno(errno.EBUSY)

        on.mounted, fs.root.covered = fs.root, on
        self.mounts.append((fs, on))

    def unmount(self, root: Directory) -> None:
        """Errors: EINVAL for a directory that is no mounted root, EBUSY where another mount is inside of it."""
        if not root.covered:
            raise Errno(errno.EINVAL)
        if any(on and on.fs is root.fs for _, on in self.mounts):
            raise Errno(errno.EBUSY)

        self.mounts = [(fs, on) for fs, on in self.mounts if on is not root.covered]
        root.covered.mounted = None
        root.covered = None


class FsContext:
    """What CLONE_FS shares: root, working directory, umask."""

    def __init__(self, vfs: Vfs, root: Directory, cwd: Directory, umask: int = 0o022) -> None:
        self.vfs, self.root, self.cwd, self.umask = vfs, root, cwd, umask

    def fork(self) -> FsContext:
        return FsContext(self.vfs, self.root, self.cwd, self.umask)


@dataclass(slots=True)
class Found:
    """Where a path led: the directory and the name in it, and what has that name, if anything has.

    `name` is empty where the path ended in `.`, `..`, the root or a link of /proc: there `inode` has no name to be acted on;
    `dots` says which (b"", b"." or b"..")."""

    directory: Directory
    name: bytes
    inode: Inode | None
    slash: bool = False  # the path ended in one
    dots: bytes = b""

    def file(self) -> Inode:
        if self.inode is None:
            raise Errno(errno.ENOENT)

        return self.inode


def up(fs: FsContext, directory: Directory) -> Directory:
    if directory is fs.root:
        return directory
    while directory.covered:
        directory = directory.covered
        if directory is fs.root:
            return directory
    return directory.parent


def down(inode: Inode | None) -> Inode | None:
    while isinstance(inode, Directory) and inode.mounted:
        inode = inode.mounted
    return inode


def lookup(directory: Directory, name: bytes) -> Inode | None:
    if len(name) > NAME_MAX:
        raise Errno(errno.ENAMETOOLONG)

    return down(directory.lookup(name))


def walk(task: object, fs: FsContext, start: Directory, path: bytes, *, follow: bool = True) -> Found:
    """Follows `path` from `start`. The last name may be free (`inode` None): what that means is the caller's.

    `follow`: whether a link at the end is followed. Errors: ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG."""
    if len(path) >= PATH_MAX:
        raise Errno(errno.ENAMETOOLONG)
    if not path:
        raise Errno(errno.ENOENT)

    links = 0
    directory = fs.root if path[:1] == b"/" else start
    slash = path[-1:] == b"/"
    rest = [part for part in path.split(b"/") if part]
    rest.reverse()  # the next name is the last of it
    found = Found(directory, b"", directory, slash)
    while rest:
        name = rest.pop()
        last = not rest
        if name == b".":
            found = Found(directory, b"", directory, slash, b".")
            continue
        if name == b"..":
            directory = as_directory(down(up(fs, directory)))
            found = Found(directory, b"", directory, slash, b"..")
            continue
        inode = lookup(directory, name)
        if isinstance(inode, Symlink) and (not last or follow or slash):
            links += 1
            if links > MAX_LINKS:
                raise Errno(errno.ELOOP)
            target = inode.follow(task)
            inode.accessed()
            if isinstance(target, Inode):
                found = Found(directory, b"", target, slash)
                if not last:
                    directory = as_directory(target)
                continue
            if not target:
                raise Errno(errno.ENOENT)
            if target[:1] == b"/":
                directory = fs.root
            if last:
                slash = slash or target[-1:] == b"/"
                follow = True  # a link at the end of a link that is followed is followed too
            rest += reversed([part for part in target.split(b"/") if part])
            found = Found(directory, b"", directory, slash)
            continue
        if last:
            return Found(directory, name, inode, slash)
        if inode is None:
            raise Errno(errno.ENOENT)
        directory = as_directory(inode)
    return found


def as_directory(inode: Inode | None) -> Directory:
    if not isinstance(inode, Directory):
        raise Errno(errno.ENOTDIR)

    return inode


def existing(task: object, fs: FsContext, start: Directory, path: bytes, *, follow: bool = True) -> Inode:
    """The file of that name. Errors: those of `walk`; ENOTDIR where the path ends in a slash and the file is no directory."""
    found = walk(task, fs, start, path, follow=follow)
    inode = found.file()
    if found.slash:
        as_directory(inode)
    return inode


def path_of(fs: FsContext, directory: Directory) -> bytes:
    """The absolute path of a directory, as getcwd has it. Errors: ENOENT for one that was removed."""
    names: list[bytes] = []
    while directory is not fs.root:
        while directory.covered:
            directory = directory.covered
        if directory is fs.root or directory.parent is directory:
            break
        if not directory.links:
            raise Errno(errno.ENOENT)
        names.append(directory.name)
        directory = directory.parent
    return b"/" + b"/".join(reversed(names))
