"""Regular files lent to programs: their bytes mapped where the program's own C (fast.c) reads and writes them.

A page that a program touches moves into its frame, as one that is mapped does (frames.py): whatever the kernel reads or writes
of the file, for whoever, it does there. So nothing has to be brought up to date but three words of the window, which the
program may write: its size, which only we set; its position, which any lseek could have set; and whether it was written, which
is about a time that the program may set as well.

`recall` takes a file back from everybody. It is called where the file's length or its set of pages changes.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.files import RegularFile
from domain.posix.low import FILE_BYTES
from domain.posix.ramfs import RamFile
from domain.posix.vma import FILES
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from domain.posix.files import FileTable
    from domain.posix.low import Low
    from domain.posix.sites import Sites
    from domain.posix.task import Task

NR_WINDOWS = 64  # fast.h
WINDOWS_AT, WINDOW = 160, struct.Struct("<QQIIQ")
POSITION_AT, DIRTY_AT = 8, 20
READ, WRITE = 1, 2
MAX_POSITION = (1 << 63) - 1
AROUND = 16
MOST_PATIENCE = 3000


class Lent:
    """A file that programs have."""

    def __init__(self, inode: RamFile, sites: Sites) -> None:
        self.inode, self.sites = inode, sites
        self.windows: list[Window] = []
        self._filling = False
        sites.lent.append(self)

    def frame(self, index: int) -> int | None:
        """That page's; None: it is a hole. Raises Errno(ENOMEM)."""
        if index not in self.inode.pages:
            return None
        self._filling = True  # where there is no memory, all others are recalled before
        try:
            return self.sites.cache.frame(self.inode, index)
        finally:
            self._filling = False

    def recall(self) -> None:
        """It is the kernel's alone again."""
        for window in list(self.windows):
            window.file.patience = min(2 * window.file.patience, MOST_PATIENCE)
            window.close()

    def give_up(self) -> int:
        """Memory is short: it is recalled, unless it is why; how many frames."""
        if self._filling:
            return 0
        tables = [window.low.table for window in self.windows]
        self.recall()
        for table in tables:
            table.flush()
        self.sites.frames.in_force()
        return self.sites.cache.shrink()

    def settle(self) -> None:
        for window in self.windows:
            window.settle()

    def left(self, window: Window) -> None:
        self.windows.remove(window)
        if not self.windows:
            self.inode.lent = None
            self.sites.lent.remove(self)


def lend(task: Task, fd: int) -> None:
    """A system call on a file came to the kernel: if some did, the program gets the file. Only where all threads of the memory
    have one table of descriptors, since a window is found by number."""
    low, file = task.memory.low, task.files.open.get(fd)
    if low is None or not isinstance(file, RegularFile) or file.window is not None or not 0 <= fd < NR_WINDOWS:
        return
    file.calls += 1
    inode = file.inode
    if file.calls < file.patience or not isinstance(inode, RamFile) or not 0 < inode.size <= FILE_BYTES or not file.readable:
        return
    file.calls = 0
    if any(other.files is not task.files for other in task.system.tasks.values() if other.memory is task.memory):
        return
    Window(low, task.files, fd, file, READ | (WRITE if file.writable and not file.flags & os.O_APPEND else 0))


class Window:
    """One descriptor's. `position` is the open file's, for whoever shares it."""

    def __init__(self, low: Low, files: FileTable, fd: int, file: RegularFile, access: int) -> None:
        self.low, self.files, self.fd, self.file, self.access = low, files, fd, file, access
        self.inode: RamFile = file.inode  # type: ignore[assignment]
        self.shown: dict[int, int] = {}  # index: frame
        self._page = FILES + fd * FILE_BYTES >> PAGE_SHIFT
        self._at = WINDOWS_AT + fd * WINDOW.size
        low.put(self._at, WINDOW.pack(self.inode.size, file.offset, access, 0, 0))
        if self.inode.lent is None:
            self.inode.lent = Lent(self.inode, low.sites)
        self.lent = self.inode.lent
        self.lent.windows.append(self)
        low.windows[fd] = file.window = self

    @property
    def position(self) -> int:
        return int.from_bytes(self.low.get(self._at + POSITION_AT, 8), "little") & MAX_POSITION

    @position.setter
    def position(self, place: int) -> None:
        self.low.put(self._at + POSITION_AT, place.to_bytes(8, "little"))

    def fault(self, index: int) -> bool:
        """Show a page, and those around it; False: there is nothing more to show there."""
        if index in self.shown:
            return False
        first, end = index & -AROUND, -(-self.inode.size // PAGE_SIZE)
        for near in range(first, min(first + AROUND, end)):
            try:
                pfn = None if near in self.shown else self.lent.frame(near)
            except Errno:
                break
            if pfn is not None:
                self.low.sites.frames.hold(pfn)
                self.low.table.map(self._page + near, pfn, bool(self.access & WRITE), False)
                self.shown[near] = pfn
        return index in self.shown

    def settle(self) -> None:
        """What the program wrote is known as a change of the file."""
        if self.access & WRITE:
            self.inode.generation += 1
            if any(self.low.get(self._at + DIRTY_AT, 4)):
                self.low.put(self._at + DIRTY_AT, bytes(4))
                self.inode.modified()

    def close(self) -> None:
        """The descriptor is served by the kernel again."""
        self.settle()
        position = self.position
        self.low.put(self._at, bytes(WINDOW.size))
        for index, pfn in self.shown.items():
            self.low.table.unmap(self._page + index)
            self.low.sites.frames.drop_unmapped(pfn)
        del self.low.windows[self.fd]
        self.file.window = None
        self.file.offset = position
        self.lent.left(self)
