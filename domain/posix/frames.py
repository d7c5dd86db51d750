"""Frames for programs: taken from the domain's pages in chunks, counted, shared; and the page cache of files.

A frame of a program is one page of the domain's reservation, by pfn. Its count is how many page-table entries, programs' and
the cache's own, hold it; at 0 it is free. The kernel sees every frame at `address(pfn)` in its boot mapping.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import pairwise
from typing import Protocol
from weakref import WeakKeyDictionary

from domain import memory
from domain._guest import ffi
from domain.memory import Pages
from domain.posix.errors import Errno
from hypervisor.public.types import PAGE_SIZE

CHUNK = 64  # pages taken from the domain at a time
KEPT = 16 * CHUNK  # free ones that are not given back to the domain, whose page tables, and balloon, want some too
TABLE_RESERVE = 64  # pages that programs may not have: page tables of those that run must still be made


class Source(Protocol):
    """Where pages come from: domain.memory.Memory."""

    @property
    def nr_free(self) -> int: ...

    def alloc(self, nr: int = 1) -> Pages: ...
    def free(self, pages: Pages) -> None: ...


class Inode(Protocol):
    """What the cache needs of a file: bytes by offset, a number that every change of them raises, and whether a page of it may
    live in a frame: `adopt` gives it one that has its bytes, `at` says where its bytes are."""

    generation: int

    def read(self, offset: int, count: int) -> bytes: ...
    def adopt(self, index: int, page: memoryview) -> None: ...
    def at(self, index: int) -> object: ...
    def disown(self, index: int) -> None: ...


class Frames:
    """The allocator. `base`: host address at which pfn 0 would be seen."""

    def __init__(self, source: Source, base: int) -> None:
        self._source, self._base = source, base
        self._free: list[int] = []  # a heap: pages side by side get frames side by side, where the host needs but one mapping
        self.unmapped: list[int] = []
        self.references: dict[int, int] = {}
        self.shrink: Callable[[], int] = lambda: 0  # gives back what can be made again; how many frames

    def address(self, pfn: int) -> int:
        """Host address of a frame."""
        return self._base + pfn * PAGE_SIZE

    @property
    def used(self) -> int:
        return len(self.references)

    @property
    def free(self) -> int:
        return len(self._free) + max(0, self._source.nr_free - TABLE_RESERVE)

    def alloc(self, zeroed: bool = True) -> int:
        """A frame with one reference. Raises Errno(ENOMEM)."""
        if not self._free:
            self._more()
        pfn = heappop(self._free)
        self.references[pfn] = 1
        if zeroed:
            memory.zero(self._base + pfn * PAGE_SIZE, PAGE_SIZE)
        return pfn

    def alloc_many(self, count: int) -> list[int]:
        """As many as there are without taking them from anybody, at most `count`, zeroed, in order: what lies together is one
        host mapping."""
        with contextlib.suppress(Errno):
            while len(self._free) < count:
                self._more()
        pfns = [heappop(self._free) for _ in range(min(count, len(self._free)))]
        self.references.update(dict.fromkeys(pfns, 1))
        for first, nr in _runs(pfns):
            memory.zero(self._base + first * PAGE_SIZE, nr * PAGE_SIZE)
        return pfns

    def copy(self, pfn: int) -> int:
        """A frame of its own with the same bytes. Raises Errno(ENOMEM)."""
        new = self.alloc(zeroed=False)
        memory.copy(self._base + new * PAGE_SIZE, self._base + pfn * PAGE_SIZE, PAGE_SIZE)
        return new

    def hold(self, pfn: int) -> None:
        self.references[pfn] += 1

    def drop(self, pfn: int) -> None:
        """One reference less."""
        left = self.references[pfn] - 1
        if left:
            self.references[pfn] = left
            return
        del self.references[pfn]
        if len(self._free) < KEPT:
            heappush(self._free, pfn)
        else:
            self._source.free(Pages(pfn, 1, self.address(pfn)))

    def drop_unmapped(self, pfn: int) -> None:
        """Likewise, once the tables that do not show it any more are in force: a program may be running that should not."""
        self.unmapped.append(pfn)

    def in_force(self) -> None:
        """All edits of tables are."""
        while self.unmapped:
            self.drop(self.unmapped.pop())

    def _more(self) -> None:
        """A chunk, or a few pages, or what the cache can spare."""
        nr = CHUNK
        while nr and self._source.nr_free >= nr + TABLE_RESERVE:
            try:
                pages = self._source.alloc(nr)
            except MemoryError:  # none that lie together
                nr //= 2
                continue
            self._free = sorted([*self._free, *pages.pfns])
            return
        if not self._free and nr > 1 and self._source.nr_free > TABLE_RESERVE:
            self._free.extend(self._source.alloc(1).pfns)
            return
        if not self.shrink():
            raise Errno(errno.ENOMEM)


class Cached(dict[int, int]):
    """The frames of one file by the number of the page, each held once; they go when the file does."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames = frames
        self.views: dict[int, memoryview] = {}  # the same memory, as the file has it

    def drop(self, index: int) -> None:
        self.views.pop(index, None)
        self.frames.drop(self.pop(index))

    def __del__(self) -> None:
        for pfn in self.values():
            self.frames.drop(pfn)


def _runs(pfns: list[int]) -> list[tuple[int, int]]:
    """(first, count) of what lies together in a sorted list."""
    starts = [i for i, pfn in enumerate(pfns) if not i or pfns[i - 1] != pfn - 1]
    return [(pfns[at], end - at) for at, end in pairwise([*starts, len(pfns)])]


class PageCache:
    """Pages of files, shared by every program that maps or runs them. A page of a ramfs moves into its frame, so that read,
    write and every mapping are about the same bytes; of other files it is a copy, made anew after a change."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._files: WeakKeyDictionary[Inode, tuple[int, Cached]] = WeakKeyDictionary()
        frames.shrink = self.shrink

    def frame(self, inode: Inode, index: int) -> int:
        """The frame of a file's page; who maps it holds it. Raises Errno(ENOMEM, ENOSPC)."""
        generation, pages = self._files.get(inode) or (-1, Cached(self._frames))
        if generation != inode.generation:
            for old in [old for old in pages if inode.at(old) is not pages.views[old]]:
                pages.drop(old)
            self._files[inode] = inode.generation, pages
        pfn = pages.get(index)
        if pfn is None:
            data = inode.read(index * PAGE_SIZE, PAGE_SIZE)
            pfn = self._frames.alloc(zeroed=len(data) < PAGE_SIZE)
            address = self._frames.address(pfn)
            memory.write(address, data)
            pages[index] = pfn
            pages.views[index] = memoryview(ffi.buffer(ffi.cast("char *", address), PAGE_SIZE)).cast("B")
            try:
                inode.adopt(index, pages.views[index])
            except Errno:
                pages.drop(index)
                raise
        return pfn

    def place(self, inode: Inode, pfn: int) -> None:
        """The file's one page is this frame, for good: one reference is nobody's, so it is never free, nor one program's."""
        self._frames.references[pfn] = 2
        pages = Cached(self._frames)
        pages[0] = pfn
        self._files[inode] = inode.generation, pages

    def cached(self, inode: Inode) -> dict[int, int]:
        """The frames that there are of a file, by the page's number."""
        generation, pages = self._files.get(inode) or (-1, {})
        return pages if generation == inode.generation else {}

    def shrink(self) -> int:
        """Give up what no program maps; how many frames."""
        freed = 0
        for inode, (_, pages) in list(self._files.items()):
            idle = [index for index, pfn in pages.items() if self._frames.references[pfn] == 1]
            for index in idle:
                if inode.at(index) is pages.views[index]:
                    inode.disown(index)
                pages.drop(index)
            freed += len(idle)
        return freed
