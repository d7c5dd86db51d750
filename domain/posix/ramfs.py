"""Files in the memory of the domain. Directories are dictionaries; a regular file is a dictionary of its pages.

A page that was never written is not there: it reads as zeros and costs nothing. Pages and inodes are counted against the
limits of the file system, so that a program that fills it gets ENOSPC and the kernel lives on.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from typing import Any

from domain.posix.errors import Errno
from domain.posix.inode import (
    MAX_OFFSET,
    PAGE,
    Device,
    Directory,
    Fifo,
    Filesystem,
    Inode,
    Regular,
    Socket,
    Symlink,
    Usage,
)

TMPFS_MAGIC = 0x01021994
ENTRY_SIZE = 20  # what tmpfs counts for a name in the size of a directory
ZEROS = bytes(PAGE)


class Ramfs(Filesystem):
    """`pages` and `inodes` are its limits; the defaults are a ceiling against run-away programs (256 MiB, 65,536 files)."""

    kind = "tmpfs"

    def __init__(
        self, now: Callable[[], int], *, device: int = 1, mode: int = 0o755, pages: int = 65536, inodes: int = 65536
    ) -> None:
        super().__init__(now, device)
        self.pages, self.inodes = pages, inodes
        self.used_pages = self.used_inodes = 0
        self.take_inode()
        self.root = RamDirectory(self, mode)

    def take_inode(self) -> None:
        if self.used_inodes >= self.inodes:
            raise Errno(errno.ENOSPC)

        self.used_inodes += 1

    def room(self, pages: int) -> None:
        if self.used_pages + pages > self.pages:
            raise Errno(errno.ENOSPC)

    def usage(self) -> Usage:
        free = self.pages - self.used_pages
        return Usage(TMPFS_MAGIC, self.pages, free, self.inodes, self.inodes - self.used_inodes)

    def released(self, inode: Inode) -> None:
        self.used_inodes -= 1
        if isinstance(inode, RamFile):
            self.used_pages -= len(inode.pages)

    def create(self, mode: int, *, rdev: int = 0, target: bytes = b"") -> Inode:
        """A file without a name: of the type in `mode`."""
        self.take_inode()
        kind, bits = stat.S_IFMT(mode), stat.S_IMODE(mode)
        if kind == stat.S_IFREG:
            return RamFile(self, bits)
        if kind == stat.S_IFDIR:
            return RamDirectory(self, bits)
        if kind == stat.S_IFLNK:
            return Symlink(self, target)
        if kind == stat.S_IFIFO:
            return Fifo(self, bits)
        if kind == stat.S_IFSOCK:
            return Socket(self, mode)
        assert kind in (stat.S_IFCHR, stat.S_IFBLK), f"no file has the type {kind:o}"
        return Device(self, mode, rdev)


class RamFile(Regular):
    __slots__ = ("length", "lent", "pages")
    fs: Ramfs

    def __init__(self, fs: Ramfs, mode: int) -> None:
        super().__init__(fs, mode)
        self.length = 0
        self.pages: dict[int, bytearray | memoryview] = {}  # a view: of the frame that mappings of the page have
        self.lent: Any = None  # windows.py

    @property
    def size(self) -> int:
        return self.length

    @property
    def blocks(self) -> int:
        return len(self.pages) * (PAGE // 512)

    def read(self, offset: int, count: int) -> bytes:
        count = min(count, self.length - offset)
        if count <= 0:
            return b""

        index, start = divmod(offset, PAGE)
        if start + count <= PAGE:  # most reads of most programs
            return bytes(self.pages.get(index, ZEROS)[start : start + count])
        last = (offset + count - 1) // PAGE
        whole = b"".join([self.pages.get(number, ZEROS) for number in range(index, last + 1)])
        return whole[start : start + count]

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Writes what there is room for; ENOSPC where that is nothing."""
        count = min(len(data), MAX_OFFSET - offset)
        if count <= 0:
            if not data:
                return 0
            raise Errno(errno.EFBIG)

        done = 0
        while done < count:
            index, start = divmod(offset + done, PAGE)
            size = min(PAGE - start, count - done)
            page = self.pages.get(index)
            if page is None:
                if self.fs.used_pages >= self.fs.pages:
                    break
                page = self.new_page(index)
            page[start : start + size] = data[done : done + size]
            done += size
        if not done:
            raise Errno(errno.ENOSPC)

        if offset + done > self.length:
            self.recall()
            self.length = offset + done
        self.modified()
        return done

    def adopt(self, index: int, page: memoryview) -> None:
        if index not in self.pages:
            self.fs.room(1)
            self.fs.used_pages += 1
        self.pages[index] = page

    def at(self, index: int) -> object:
        return self.pages.get(index)

    def disown(self, index: int) -> None:
        self.pages[index] = bytearray(self.pages[index])

    def new_page(self, index: int) -> bytearray:
        self.fs.room(1)

        self.fs.used_pages += 1
        page = self.pages[index] = bytearray(PAGE)
        return page

    def recall(self) -> None:
        if self.lent:
            self.lent.recall()

    def settle(self) -> None:
        if self.lent:
            self.lent.settle()

    def truncate(self, size: int) -> None:
        self.recall()
        if size < self.length:
            self.drop_pages(-(-size // PAGE), -(-self.length // PAGE))
            if size % PAGE and (page := self.pages.get(size // PAGE)):
                page[size % PAGE :] = bytes(PAGE - size % PAGE)
        self.length = size
        self.modified()

    def drop_pages(self, first: int, end: int) -> None:
        gone = [index for index in self.pages if first <= index < end]
        for index in gone:
            del self.pages[index]
        self.fs.used_pages -= len(gone)

    def allocate(self, offset: int, length: int) -> None:
        span = range(offset // PAGE, -(-(offset + length) // PAGE))
        if len(span) - len(self.pages) > self.fs.pages:  # before a hostile length costs a walk
            raise Errno(errno.ENOSPC)
        missing = [index for index in span if index not in self.pages]
        self.fs.room(len(missing))

        for index in missing:
            self.new_page(index)

    def punch(self, offset: int, length: int) -> None:
        self.recall()
        end = offset + length
        first, last = -(-offset // PAGE), end // PAGE
        if first > last:
            self.zero(offset, end)
        else:
            self.zero(offset, first * PAGE)
            self.zero(last * PAGE, end)
            self.drop_pages(first, last)
        self.modified()

    def zero(self, start: int, end: int) -> None:
        """Within one page."""
        if end > start and (page := self.pages.get(start // PAGE)):
            page[start % PAGE : start % PAGE + end - start] = bytes(end - start)

    def seek_data(self, offset: int, hole: bool) -> int:
        if not 0 <= offset < self.length:
            raise Errno(errno.ENXIO)

        index = offset // PAGE
        if hole:
            while index in self.pages:
                index += 1
        else:
            later = [number for number in self.pages if number >= index]
            if not later or min(later) * PAGE >= self.length:
                raise Errno(errno.ENXIO)
            index = min(later)
        return min(max(index * PAGE, offset), self.length)


class RamDirectory(Directory):
    __slots__ = ("cookie", "entries")
    fs: Ramfs

    def __init__(self, fs: Ramfs, mode: int) -> None:
        super().__init__(fs, mode)
        self.entries: dict[bytes, tuple[int, Inode]] = {}  # in the order of their cookies: what is new comes last
        self.cookie = 2

    @property
    def size(self) -> int:
        return ENTRY_SIZE * (2 + len(self.entries))

    def lookup(self, name: bytes) -> Inode | None:
        entry = self.entries.get(name)
        return entry[1] if entry else None

    def empty(self) -> bool:
        return not self.entries

    def listing(self, after: int) -> Iterator[tuple[int, bytes, int, int]]:
        for name, (cookie, inode) in self.entries.items():
            if cookie > after:
                yield cookie, name, inode.number, inode.kind >> 12

    def create(self, name: bytes, mode: int, *, rdev: int = 0, target: bytes = b"") -> Inode:
        inode = self.fs.create(mode, rdev=rdev, target=target)
        if self.mode & stat.S_ISGID:  # what is made in such a directory belongs to its group
            inode.gid = self.gid
            if inode.kind == stat.S_IFDIR:
                inode.mode |= stat.S_ISGID
        self.add(name, inode)
        return inode

    def add(self, name: bytes, inode: Inode) -> None:
        assert name not in self.entries, "a name is given once"
        self.cookie += 1
        self.entries[name] = self.cookie, inode
        if isinstance(inode, Directory):
            inode.parent, inode.name = self, name
            self.links += 1
        self.modified()

    def remove(self, name: bytes) -> None:
        """Only the name goes: the caller counts the links of what it named."""
        _, inode = self.entries.pop(name)
        if isinstance(inode, Directory):
            self.links -= 1
        self.modified()
