"""Frames for programs: taken from the domain's pages in chunks, counted, shared; and the page cache of files.

A frame of a program is one page of the domain's reservation, by pfn. Its count is how many page-table entries, programs' and
the cache's own, hold it; at 0 it is free. The kernel sees every frame at `address(pfn)` in its boot mapping.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Protocol
from weakref import ref

from domain import memory
from domain.memory import Pages
from domain.posix.errors import Errno
from hypervisor.public.types import PAGE_SIZE

CHUNK = 64  # pages taken from the domain at a time
TABLE_RESERVE = 64  # pages that programs may not have: page tables of those that run must still be made


class Source(Protocol):
    """Where pages come from: domain.memory.Memory."""

    @property
    def nr_free(self) -> int: ...

    def alloc(self, nr: int = 1) -> Pages: ...


class Inode(Protocol):
    """What the cache needs of a file: bytes by offset, and a number that every change of them raises."""

    generation: int

    def read(self, offset: int, count: int) -> bytes: ...


class Frames:
    """The allocator. `base`: host address at which pfn 0 would be seen."""

    def __init__(self, source: Source, base: int) -> None:
        self._source, self._base = source, base
        self._free: list[int] = []  # a heap: pages side by side get frames side by side, where the host needs but one mapping
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
        else:
            del self.references[pfn]
            heappush(self._free, pfn)

    def _more(self) -> None:
        """A chunk, or a few pages, or what the cache can spare."""
        nr = CHUNK
        while nr and self._source.nr_free >= nr + TABLE_RESERVE:
            try:
                pages = self._source.alloc(nr)
            except MemoryError:  # none that lie together
                nr //= 2
                continue
            self._free = sorted(pages.pfns)
            return
        if not self._free and nr > 1 and self._source.nr_free > TABLE_RESERVE:
            self._free.extend(self._source.alloc(1).pfns)
            return
        if not self.shrink():
            raise Errno(errno.ENOMEM)


class PageCache:
    """Pages of files, shared by every program that maps or runs them. A file that changed is read again, and one that has no
    name, no descriptor and no mapping any more is gone with its pages: the cache is not what keeps it."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._files: dict[ref[Inode], tuple[int, dict[int, int]]] = {}
        frames.shrink = self.shrink

    def frame(self, inode: Inode, index: int) -> int:
        """The frame of a file's page; who maps it holds it. Raises Errno(ENOMEM)."""
        generation, pages = self._files.get(ref(inode), (-1, {}))
        if generation != inode.generation:
            self.forget(inode)
            pages = {}
            self._files[ref(inode, self._drop)] = inode.generation, pages
        pfn = pages.get(index)
        if pfn is None:
            data = inode.read(index * PAGE_SIZE, PAGE_SIZE)
            pfn = self._frames.alloc(zeroed=len(data) < PAGE_SIZE)
            memory.write(self._frames.address(pfn), data)
            pages[index] = pfn
        return pfn

    def adopt(self, inode: Inode, pfn: int) -> None:
        """The file's one page is this frame, for good: one reference is nobody's, so it is never free, nor one program's."""
        self._frames.references[pfn] = 2
        self._files[ref(inode, self._drop)] = inode.generation, {0: pfn}

    def written(self, inode: Inode) -> None:
        """What a shared mapping changed was given to the file: its pages are as the file is."""
        if ref(inode) in self._files:
            self._files[ref(inode)] = inode.generation, self._files[ref(inode)][1]

    def forget(self, inode: Inode) -> None:
        """The file has changed; who has its pages mapped keeps them."""
        self._drop(ref(inode))

    def _drop(self, file: ref[Inode]) -> None:
        for pfn in self._files.pop(file, (0, {}))[1].values():
            self._frames.drop(pfn)

    def shrink(self) -> int:
        """Give up what no program maps; how many frames."""
        freed = 0
        for _, pages in list(self._files.values()):
            idle = [index for index, pfn in pages.items() if self._frames.references[pfn] == 1]
            for index in idle:
                self._frames.drop(pages.pop(index))
            freed += len(idle)
        return freed
