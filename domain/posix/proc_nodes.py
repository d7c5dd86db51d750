"""The nodes of /proc: files, links and directories that are made when they are looked up or read."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from domain.posix.errors import Errno
from domain.posix.inode import Directory, Filesystem, Inode, Regular, Symlink

Maker = Callable[[Filesystem], Inode]


class Text(Regular):
    """A file whose content is made anew for each read from its beginning."""

    __slots__ = ("content", "make")

    def __init__(self, fs: Filesystem, make: Callable[[], bytes]) -> None:
        super().__init__(fs, 0o444)
        self.make = make
        self.content = b""

    def read(self, offset: int, count: int) -> bytes:
        if not offset:
            self.content = self.make()
        return self.content[offset : offset + count]

    def truncate(self, size: int) -> None:
        raise Errno(errno.EACCES)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        raise Errno(errno.EACCES)


class Link(Symlink):
    """A link whose text depends on who asks, and that may lead to a file without a name."""

    __slots__ = ("tell", "thing")

    def __init__(self, fs: Filesystem, tell: Callable[[Any], bytes], thing: Callable[[], Inode] | None = None) -> None:
        super().__init__(fs, b"")
        self.tell, self.thing = tell, thing

    def text(self, task: Any) -> bytes:
        return self.tell(task)

    def follow(self, task: Any) -> bytes | Inode:
        return self.thing() if self.thing else self.tell(task)


class ProcDirectory(Directory):
    """Entries that are made when they are looked up. Their numbers do not change: they come from the path."""

    __slots__ = ("makers",)

    def __init__(self, fs: Filesystem, parent: Directory | None, name: bytes, makers: Callable[[], dict[bytes, Maker]]) -> None:
        super().__init__(fs, 0o555, parent, name)
        self.makers = makers

    def lookup(self, name: bytes) -> Inode | None:
        maker = self.makers().get(name)
        if maker is None:
            return None
        inode = maker(self.fs)
        inode.number = zlib.crc32(name, self.number)
        if isinstance(inode, Directory):
            inode.parent, inode.name = self, name
        return inode

    def listing(self, after: int) -> Iterator[tuple[int, bytes, int, int]]:
        for index, name in enumerate(self.makers()):
            if index + 3 > after and (inode := self.lookup(name)):
                yield index + 3, name, inode.number, inode.kind >> 12


def text(make: Callable[[], bytes]) -> Maker:
    return lambda fs: Text(fs, make)


def folder(makers: Callable[[], dict[bytes, Maker]]) -> Maker:
    return lambda fs: ProcDirectory(fs, None, b"", makers)
