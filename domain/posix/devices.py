"""The devices every program expects: null, zero, full, random, urandom, and the terminals by their numbers."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from domain.posix.errors import Errno
from domain.posix.files import File
from domain.posix.inode import Device, Directory, Inode
from domain.posix.tty import Tty
from domain.posix.tty_file import TtyFile, open_tty
from domain.posix.vfs import Opener, Vfs

TTY, CONSOLE = os.makedev(5, 0), os.makedev(5, 1)


class NullFile(File):
    whole = True
    seekable = True

    def read(self, task: Any, count: int) -> bytes:
        return b""

    def write(self, task: Any, data: bytes) -> int:
        return len(data)

    def pread(self, task: Any, count: int, offset: int) -> bytes:
        return self.read(task, count)

    def pwrite(self, task: Any, data: bytes, offset: int) -> int:
        return self.write(task, data)

    def seek(self, offset: int, whence: int) -> int:
        return 0


class ZeroFile(NullFile):
    def read(self, task: Any, count: int) -> bytes:
        return bytes(count)

    def page(self, index: int) -> bytes:
        return bytes(4096)


class FullFile(ZeroFile):
    def write(self, task: Any, data: bytes) -> int:
        raise Errno(errno.ENOSPC)


class RandomFile(NullFile):
    """The host's generator is ours: getrandom is one of the calls a domain keeps."""

    def read(self, task: Any, count: int) -> bytes:
        return os.urandom(count)


MEMORY: dict[int, type[File]] = {3: NullFile, 5: ZeroFile, 7: FullFile, 8: RandomFile, 9: RandomFile}
NODES = {b"null": (1, 3), b"zero": (1, 5), b"full": (1, 7), b"random": (1, 8), b"urandom": (1, 9), b"tty": (5, 0)}

LINKS = {
    b"fd": b"/proc/self/fd", b"stdin": b"/proc/self/fd/0", b"stdout": b"/proc/self/fd/1", b"stderr": b"/proc/self/fd/2",
}  # fmt: skip


def install(vfs: Vfs, console: Tty) -> None:
    """The drivers of this kernel's device numbers; ttyS0 and tty1 are the console under names that inittabs have."""
    def opener(kind: type[File]) -> Opener:
        return lambda task, inode, flags: kind(inode, flags)

    for minor, kind in MEMORY.items():
        vfs.character[os.makedev(1, minor)] = opener(kind)

    def open_console(task: Any, inode: Inode, flags: int) -> File:
        return open_tty(console, task, inode, flags)

    def open_terminal(task: Any, inode: Inode, flags: int) -> File:
        terminal = task.process.terminal
        if terminal is None:
            raise Errno(errno.ENXIO)
        return TtyFile(terminal, inode, flags)

    for number in (CONSOLE, os.makedev(4, 64), os.makedev(4, 1)):
        vfs.character[number] = open_console
    vfs.character[TTY] = open_terminal


def populate(directory: Directory) -> None:
    """The nodes and links of a fresh /dev; one that an archive brought stays."""
    for name, (major, minor) in {**NODES, b"console": (5, 1)}.items():
        if directory.lookup(name) is None:
            bits = 0o600 if name == b"console" else 0o666
            directory.create(name, stat.S_IFCHR | bits, rdev=os.makedev(major, minor))
    for name, target in LINKS.items():
        if directory.lookup(name) is None:
            directory.create(name, stat.S_IFLNK | 0o777, target=target)


def open_device(task: Any, vfs: Vfs, inode: Device, flags: int) -> File:
    """Errors: ENXIO where no driver has the number; block devices have none here."""
    opener = vfs.character.get(inode.rdev) if inode.kind == stat.S_IFCHR else None
    if opener is None:
        raise Errno(errno.ENXIO)

    return opener(task, inode, flags)
