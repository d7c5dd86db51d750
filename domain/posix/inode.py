"""What a name leads to: one class for each type of file, and what a file system must be able to do with it.

Here is what every file system has in common; `ramfs.py` and `procfs.py` keep the content. All numbers of type and mode are
Linux's (`stat`). Times are nanoseconds since 1970. Operations never block: whatever could wait lives in an open file.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from domain.posix.errors import Errno

NAME_MAX = 255
PAGE = 4096
MAX_OFFSET = (1 << 63) - 1
MAX_LINKS_OF_A_FILE = 65_000
DAY = 86_400 * 10**9
DT_DIR = stat.S_IFDIR >> 12


@dataclass(slots=True)
class Usage:
    """What statfs tells: pages of 4096 bytes and inodes; the type is Linux's magic number."""

    magic: int
    blocks: int = 0
    free: int = 0
    inodes: int = 0
    free_inodes: int = 0


class Filesystem:
    """One tree of inodes with a device number of its own."""

    kind = "none"  # as /proc/mounts calls it

    def __init__(self, now: Callable[[], int], device: int) -> None:
        self.now = now
        self.device = device
        self.last_number = 0
        self.root: Directory
        self.source = self.kind

    def number(self) -> int:
        self.last_number += 1
        return self.last_number

    def usage(self) -> Usage:
        raise NotImplementedError

    def released(self, inode: Inode) -> None:
        """Nobody refers to this inode any more."""


class Inode:
    """A file of any type: its attributes, and the operations that its type refuses unless it says otherwise."""

    __slots__ = "__weakref__ atime btime ctime fs gid links locks mode mtime number rdev uid".split()

    def __init__(self, fs: Filesystem, mode: int) -> None:
        self.fs = fs
        self.number = fs.number()
        self.mode = mode
        self.links = 1
        self.uid = self.gid = 0
        self.rdev = 0
        self.atime = self.mtime = self.ctime = self.btime = fs.now()
        self.locks: object | None = None  # domain.posix.locks keeps them: they live and die with the file

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    @property
    def size(self) -> int:
        return 0

    @property
    def blocks(self) -> int:
        """In units of 512 bytes, as stat has it."""
        return 0

    def accessed(self) -> None:
        """As `relatime` mounts do it: once after each change, and once a day."""
        now = self.fs.now()
        if self.atime <= self.mtime or self.atime <= self.ctime or now - self.atime >= DAY:
            self.atime = now

    def modified(self) -> None:
        self.mtime = self.ctime = self.fs.now()

    def changed(self) -> None:
        self.ctime = self.fs.now()

    def __del__(self) -> None:
        """Nobody refers to it: no name, no open file, no mapping. That is when its storage is free, as on Linux."""
        self.fs.released(self)

    def settle(self) -> None:
        """Its times are what they should be."""

    def truncate(self, size: int) -> None:
        raise Errno(errno.EINVAL)


class Symlink(Inode):
    __slots__ = ("target",)

    def __init__(self, fs: Filesystem, target: bytes) -> None:
        super().__init__(fs, stat.S_IFLNK | 0o777)
        self.target = target

    @property
    def size(self) -> int:
        return len(self.target)

    def text(self, task: object) -> bytes:
        """What readlink tells `task`."""
        return self.target

    def follow(self, task: object) -> bytes | Inode:
        """Where it leads: a path, or for the links of /proc the thing itself."""
        return self.target


class Device(Inode):
    """A device node: opening it asks the table of drivers for its number."""

    __slots__ = ()

    def __init__(self, fs: Filesystem, mode: int, rdev: int) -> None:
        super().__init__(fs, mode)
        self.rdev = rdev


class Fifo(Inode):
    """A pipe with a name, or the inode behind an unnamed one. The pipe exists while somebody has it open."""

    __slots__ = ("pipe",)

    def __init__(self, fs: Filesystem, mode: int) -> None:
        super().__init__(fs, stat.S_IFIFO | mode)
        self.pipe: object | None = None


class Socket(Inode):
    """The name that bind gave, and what is connected through it while that is open; or what an unnamed socket has."""

    __slots__ = ("listener",)

    def __init__(self, fs: Filesystem, mode: int) -> None:
        super().__init__(fs, mode)
        self.listener: object | None = None


class Regular(Inode):
    """Bytes. A file system says where they are."""

    __slots__ = ("generation",)

    def __init__(self, fs: Filesystem, mode: int) -> None:
        super().__init__(fs, stat.S_IFREG | mode)
        self.generation = 0  # how often its content has changed: whoever keeps copies of pages compares

    def modified(self) -> None:
        super().modified()
        self.generation += 1

    def read(self, offset: int, count: int) -> bytes:
        raise NotImplementedError

    def write(self, offset: int, data: bytes | memoryview) -> int:
        raise Errno(errno.EINVAL)

    def page(self, index: int) -> bytes:
        """The page of that number for a mapping, filled up with zeros. Pages beyond the end are the mapper's SIGBUS."""
        return self.read(index * PAGE, PAGE).ljust(PAGE, b"\0")

    def adopt(self, index: int, page: memoryview) -> None:
        """Keep the bytes of that page there, where mappings have them, if they can be kept anywhere: they are there already.
        Errors: ENOSPC, where the page is a hole."""

    def at(self, index: int) -> object:
        """What has the bytes of that page."""
        return None

    def disown(self, index: int) -> None:
        """Keep the bytes of an adopted page elsewhere again."""

    def allocate(self, offset: int, length: int) -> None:
        raise Errno(errno.EOPNOTSUPP)

    def punch(self, offset: int, length: int) -> None:
        raise Errno(errno.EOPNOTSUPP)

    def seek_data(self, offset: int, hole: bool) -> int:
        """SEEK_DATA and SEEK_HOLE for a file that has no holes."""
        if not 0 <= offset < self.size:
            raise Errno(errno.ENXIO)

        return self.size if hole else offset


class Directory(Inode):
    """Names. A directory has one parent and one name, so that it needs no cache of entries beside it."""

    __slots__ = "covered mounted name parent".split()

    def __init__(self, fs: Filesystem, mode: int, parent: Directory | None = None, name: bytes = b"") -> None:
        super().__init__(fs, stat.S_IFDIR | mode)
        self.links = 2
        self.parent: Directory = parent or self
        self.name = name
        self.mounted: Directory | None = None  # the root of what is mounted here
        self.covered: Directory | None = None  # of a mounted root: where it is mounted

    def lookup(self, name: bytes) -> Inode | None:
        raise NotImplementedError

    def listing(self, after: int) -> Iterator[tuple[int, bytes, int, int]]:
        """(cookie, name, inode number, DT type) of entries whose cookie is larger than `after`, in the order of cookies;
        cookies begin at 3, 1 and 2 are `.` and `..`. An entry keeps its cookie, so removal while reading skips nothing."""
        raise NotImplementedError

    def empty(self) -> bool:
        return next(self.listing(2), None) is None

    def add(self, name: bytes, inode: Inode) -> None:
        """A name that is not there yet."""
        raise Errno(errno.EPERM)

    def remove(self, name: bytes) -> None:
        raise Errno(errno.EPERM)

    def create(self, name: bytes, mode: int, *, rdev: int = 0, target: bytes = b"") -> Inode:
        """A new file of the type in `mode` under a name that is not there yet.

        Raises ENOSPC where the file system is full, EPERM where it has no such files."""
        raise Errno(errno.EPERM)
