"""A program's address space: areas, the frames behind them, and the page tables that say so.

`pages` is the authority: page number -> frame and what its entry allows now. The tables follow it, edits collected until
`flush`, which the run loop calls before the program runs. A page is filled when it is first touched, a few around it as well
(a fault is two hundred times the price of a page); a page that two spaces share privately is read-only in both, and copied when
one writes. Pages that were copied after a fork are copied by the next one at once, which is cheaper by two faults.

A frame that leaves a space falls when `flush` has taken it out of the tables, never before: its program may be running,
whatever it told the kernel.
"""

from __future__ import annotations

import errno
from typing import Any, Protocol

from domain import memory
from domain.posix.accesses import ACCERR, BUSERR, MAPERR, OK, READABLE, WRITABLE, Accesses
from domain.posix.errors import Errno
from domain.posix.frames import Frames, PageCache
from domain.posix.low import Low
from domain.posix.sites import Sites, index_of, patchable
from domain.posix.vma import (
    NEAR_END,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    USER_END,
    USER_START,
    Areas,
    Vma,
    page_up,
)
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

AROUND, AROUND_BIG, BIG = 16, 64, 1 << 20
MAX_AROUND = 256  # of a program that goes through its memory
MAX_HOT = 32  # pages that a fork copies at once


class PageTable(Protocol):
    """Where entries go: domain.posix.pagetable, or a stand-in. `stale`: there is something to flush."""

    stale: bool

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None: ...
    def map_all(self, pages: dict[int, int], execute: bool) -> None: ...
    def unmap(self, page: int) -> None: ...
    def clear(self) -> None: ...
    def flush(self) -> None: ...
    def expel(self) -> None: ...


class Memory(Accesses):
    """One address space. `users`: how many tasks run in it; `program`: for spaces.py."""

    def __init__(
        self, frames: Frames, cache: PageCache, table: PageTable, left: dict[int, int] | None = None, sites: Sites | None = None
    ) -> None:
        """`left`: the pages of a former program that the table still shows; their frames are ours from here on. `sites`: where
        its system calls are to be patched."""
        self.frames, self.cache, self.table = frames, cache, table
        self._left = left or {}
        table.stale = True
        self._leaving: list[int] = []  # frames that fall with the next flush
        self.hot: set[int] = set()  # pages copied since a fork; of all relatives by fork
        self.program = 0, False  # of which file, and whether it is a fork of one that runs it
        self.sites = sites
        self.low: Low | None = None  # once it has made a patched call
        self.areas = Areas()
        self.pages: dict[int, int] = {}
        self.brk_start = self.brk_end = 0
        self.users = 1
        self.faults = 0

    # ---- areas

    def map(
        self, address: int, size: int, prot: int, shared: bool = False, file: Any = None, offset: int = 0, around: int = 0
    ) -> int:
        """An area at `address`, in place of what was there, or anywhere for 0; its address. Raises Errno(ENOMEM, EINVAL)."""
        size = page_up(size)
        if not size:
            raise Errno(errno.EINVAL)
        if not address:
            place = self.room(size, file)
            if place is None:
                raise Errno(errno.ENOMEM)
            address = place
        if address % PAGE_SIZE or not USER_START <= address <= address + size <= USER_END:
            raise Errno(errno.ENOMEM)
        self.unmap(address, size)
        around = around or (AROUND_BIG if size >= BIG else AROUND)
        self.areas.insert(Vma(address, address + size, prot & 7, shared, file, offset, around))
        return address

    def room(self, size: int, file: Any) -> int | None:
        """Where an area fits. Files, among them libraries, lie where their calls can be patched, unless a heap grows there."""
        near = self.sites is not None and file is not None and self.brk_start >= NEAR_END
        return (self.areas.gap(size, NEAR_END) if near else None) or self.areas.gap(size)

    def unmap(self, address: int, size: int) -> None:
        """Nothing is there any more."""
        end = address + page_up(size)
        for vma in self.areas.carve(address, end):
            for page in self._present(vma.start, vma.end):
                self._remove(page)

    def protect(self, address: int, size: int, prot: int) -> None:
        """Raises Errno(ENOMEM): part of it is no area of ours; nothing is changed."""
        end = address + page_up(size)
        if sum(min(vma.end, end) - max(vma.start, address) for vma in self.areas.overlapping(address, end)) != end - address:
            raise Errno(errno.ENOMEM)
        for vma in self.areas.carve(address, end):
            present = self._present(vma.start, vma.end)
            vma.prot = prot & 7
            self.areas.insert(vma)
            for page in present:
                self._install(page, self.pages[page] >> 2, vma)

    def brk(self, address: int) -> int:
        """Move the end of the heap, where that can be; where it is now."""
        if not self.brk_start <= address < USER_END:
            return self.brk_end
        old, new = page_up(self.brk_end), page_up(address)
        if new > old:
            if self.areas.overlapping(old, new + PAGE_SIZE):
                return self.brk_end
            heap = Vma(old, new, PROT_READ | PROT_WRITE)
            self.areas.insert(heap)
            for page in range(old >> PAGE_SHIFT, min(new >> PAGE_SHIFT, (old >> PAGE_SHIFT) + AROUND)):
                self._fill(page, self.areas.find(old) or heap)  # what it asks for it will write
        elif new < old:
            self.unmap(new, old - new)
        self.brk_end = address
        return address

    def remap(self, address: int, old: int, new: int, may_move: bool, target: int = 0) -> int:
        """Grow, shrink or move an area with its frames (mremap). Raises Errno(EFAULT, ENOMEM)."""
        old, new = page_up(old), page_up(new)
        vma = self.areas.find(address)
        if vma is None or address + old > vma.end or not old:
            raise Errno(errno.EFAULT)
        if not target:
            if new <= old:
                self.unmap(address + new, old - new)
                return address
            if address + new <= USER_END and not self.areas.overlapping(address + old, address + new):
                grown = Areas.part(vma, address, address + old)
                self.areas.carve(address, address + old)
                grown.end = address + new
                self.areas.insert(grown)
                return address
        if not may_move:
            raise Errno(errno.ENOMEM)
        place = target or self.areas.gap(new)
        if place is None or not USER_START <= place <= place + new <= USER_END:
            raise Errno(errno.ENOMEM)
        if vma.file is not None and not vma.shared:
            for page in self._present(address, address + old):
                self._unpatch(page)  # such calls return to where they were
        self.unmap(place, new)
        (vma,) = self.areas.carve(address, address + old)
        present = self._present(address, min(address + old, address + new))
        moved = Vma(place, place + new, vma.prot, vma.shared, vma.file, vma.offset, vma.around)
        self.areas.insert(moved)
        for page in present:
            pfn = self.pages.pop(page) >> 2
            self.table.unmap(page)
            self._install(page + (place - address >> PAGE_SHIFT), pfn, moved)
        for page in self._present(address, address + old):
            self._remove(page)
        return place

    def discard(self, start: int, end: int) -> None:
        """Private anonymous pages are zero again (madvise DONTNEED)."""
        for vma in self.areas.overlapping(start, end):
            if not vma.shared:
                for page in self._present(max(start, vma.start), min(end, vma.end)):
                    self._remove(page)

    def _remove(self, page: int) -> None:
        self.table.unmap(page)
        self._leaving.append(self.pages.pop(page) >> 2)

    def _present(self, start: int, end: int) -> list[int]:
        """The pages in [start, end) that have a frame."""
        first, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
        if last - first > len(self.pages):
            return [page for page in self.pages if first <= page < last]
        return [page for page in range(first, last) if page in self.pages]

    # ---- faults

    def fault(self, address: int, write: bool, fetch: bool = False) -> int:
        """Make an access possible: OK, MAPERR, ACCERR or BUSERR. Raises Errno(ENOMEM)."""
        self.faults += 1
        if not USER_START <= address < USER_END:
            return OK if self._low_fault(address) else MAPERR
        vma = self.areas.find(address)
        if vma is None:
            return MAPERR
        if not vma.prot & (PROT_WRITE if write else PROT_EXEC if fetch else PROT_READ | PROT_WRITE | PROT_EXEC):
            return ACCERR
        page = address >> PAGE_SHIFT
        if page in self.pages:
            self._own(page, vma) if write else self._install(page, self.pages[page] >> 2, vma)
            return OK
        if vma.file is not None and vma.offset + address - vma.start >= page_up(vma.file.size):
            return BUSERR
        around = self._around(page, vma)
        if vma.file is None:
            self._fill_zeroed([near for near in around if near not in self.pages], page, vma)
            return OK
        for near in around:
            if near not in self.pages:
                try:
                    self._fill(near, vma)
                except Errno:
                    if near >= page and page not in self.pages:
                        raise
        if write:
            self._own(page, vma)
        return OK

    def _around(self, page: int, vma: Vma) -> range:
        """The pages that a fault fills: those around it, and ever more where one fault follows the other."""
        first = page & -vma.around
        if page != vma.ahead or vma.file is not None or self.frames.free < 8 * MAX_AROUND:
            vma.reach = vma.around
        else:
            first, vma.reach = page, min(2 * vma.reach, MAX_AROUND)
        vma.ahead = min(vma.end >> PAGE_SHIFT, first + vma.reach)
        return range(max(vma.start >> PAGE_SHIFT, first), vma.ahead)

    def _fill_zeroed(self, empty: list[int], page: int, vma: Vma) -> None:
        """Frames of zeroes for pages that have none, all alike; where there are too few, `page` is the last to be without.
        Raises Errno(ENOMEM)."""
        for near in [near for near in empty if near in self._left]:
            self._install(near, self._fresh(near), vma)
            empty.remove(near)
        pfns = self.frames.alloc_many(len(empty))
        if len(pfns) < len(empty) and page not in self.pages:
            empty = [page]
            pfns = pfns or [self.frames.alloc()]
            for pfn in pfns[1:]:
                self.frames.drop(pfn)
        rights = READABLE | (WRITABLE if vma.prot & PROT_WRITE else 0)
        filled = {near: pfn << 2 | rights for near, pfn in zip(empty, pfns, strict=False)}
        self.pages.update(filled)
        self.table.map_all(filled, bool(vma.prot & PROT_EXEC))
    def _low_fault(self, address: int) -> bool:
        """Outside of what is the program's."""
        if self.low is None and self.sites is not None and address < USER_START:
            self.low = Low(self.sites, self.table)
            return True
        return self.low is not None and self.low.fault(address)

    def _fill(self, page: int, vma: Vma) -> None:
        """A frame for a page that has none."""
        if vma.file is None:
            self._install(page, self._fresh(page), vma)
            return
        offset = vma.offset + (page << PAGE_SHIFT) - vma.start
        if offset < vma.file.size:
            pfn = self._patched(vma, page) or self.cache.frame(vma.file, offset >> PAGE_SHIFT)
            self.frames.hold(pfn)
            self._install(page, pfn, vma)

    def _patched(self, vma: Vma, page: int, pfn: int = 0) -> int:
        """The frame with patched calls of a page of a file; `pfn` where there is none."""
        if self.sites is None or not patchable(vma):
            return pfn
        text = self.sites.text(vma.file, index_of(vma, page), page)
        if text and self.low is None:
            self.low = Low(self.sites, self.table)  # now, since tables cost least together
        return text.pfn if text else pfn

    def anticipate(self, start: int, end: int) -> None:
        """What faults of a new program would come to, as far as it costs nothing but entries: the pages of its file that are
        cached, and those it will write because the former program of its table did. Raises Errno(ENOMEM)."""
        references = self.frames.references
        for vma in self.areas.overlapping(start, end):
            cached = self.cache.cached(vma.file) if vma.file is not None else {}
            shift = (vma.start - vma.offset) >> PAGE_SHIFT
            first, last = vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT
            if vma.prot & PROT_WRITE and not vma.shared:
                for page in [page for page in self._left if first <= page < last and page not in self.pages]:
                    source = cached.get(page - shift, -1)
                    if references[self._left[page] >> 2] == 1 and (vma.file is None or source >= 0):
                        self._install(page, self._fresh(page, source), vma)
            for index, pfn in cached.items():
                page = index + shift
                if first <= page < last and page not in self.pages:
                    found = self._patched(vma, page, pfn)
                    references[found] += 1
                    self._install(page, found, vma)
    def _unpatch(self, page: int) -> None:
        """A page of a file has its frame for itself, if there are patches in it."""
        if self.sites is not None and self.sites.at(page):
            pfn = self.frames.copy(self.pages[page] >> 2)
            self._leaving.append(self.pages[page] >> 2)
            self.pages[page] = pfn << 2 | self.pages[page] & 3
            self.sites.restore(page, pfn)

    def exchange(self, page: int, pfn: int) -> None:
        """Another frame with the same content, but for patches."""
        vma = self.areas.find(page << PAGE_SHIFT)
        assert vma is not None, "a page is of an area"
        if not patchable(vma):
            return
        self.frames.hold(pfn)
        self._leaving.append(self.pages[page] >> 2)
        self._install(page, pfn, vma)

    def _own(self, page: int, vma: Vma) -> None:
        """It may be written: copied first where anybody else has it."""
        value = self.pages[page]
        pfn = value >> 2
        if not vma.shared and self.frames.references[pfn] > 1:
            new = self._fresh(page, pfn)
            self._leaving.append(pfn)
            pfn = new
            if self.sites is not None:
                self.sites.restore(page, pfn)
            if len(self.hot) < MAX_HOT:
                self.hot.add(page)
        self._install(page, pfn, vma)

    def _fresh(self, page: int, source: int = -1) -> int:
        """A frame of our own for a page: zeroes, or a copy of `source`. The one that the former program had there, if it can
        be had: then the table needs no change. Raises Errno(ENOMEM)."""
        pfn = self._left.get(page, -1) >> 2
        if pfn < 0 or self.frames.references[pfn] > 1:
            return self.frames.alloc() if source < 0 else self.frames.copy(source)
        del self._left[page]
        if source < 0:
            memory.zero(self.frames.address(pfn), PAGE_SIZE)
        else:
            memory.copy(self.frames.address(pfn), self.frames.address(source), PAGE_SIZE)
        return pfn

    def _install(self, page: int, pfn: int, vma: Vma) -> None:
        """The entry that the area allows: one that others share privately is read-only."""
        write = bool(vma.prot & PROT_WRITE) and (vma.shared or self.frames.references[pfn] == 1)
        if vma.prot:
            self.table.map(page, pfn, write, bool(vma.prot & PROT_EXEC))
        else:
            self.table.unmap(page)
        self.pages[page] = pfn << 2 | (READABLE if vma.prot else 0) | (WRITABLE if write else 0)

    # ---- lives

    def flush(self) -> None:
        """The tables say what `pages` says, and nothing else has a mapping. Raises MemoryError, XenError."""
        for page in self._left:
            if page not in self.pages:
                self.table.unmap(page)
        self.table.flush()
        for value in self._left.values():
            self.frames.drop(value >> 2)
        for pfn in self._leaving:
            self.frames.drop(pfn)
        self._left, self._leaving = {}, []
        self.frames.in_force()

    def fork(self, table: PageTable, left: dict[int, int] | None = None) -> Memory:
        """The child's: the same areas and frames, private ones read-only in both from here on; those that the child would
        write at once are copied. Raises Errno(ENOMEM)."""
        child = Memory(self.frames, self.cache, table, left, self.sites)
        child.areas = self.areas.copy()
        child.brk_start, child.brk_end = self.brk_start, self.brk_end
        child.hot, child.program = self.hot, (self.program[0], True)
        try:
            if self.low is not None:
                child.low = Low(self.low.sites, table)
            for vma in self.areas:
                self._share(vma, child)
        except Errno:
            child.clear()
            raise
        return child

    def _share(self, vma: Vma, child: Memory) -> None:
        """An area's pages, with a child that is being made."""
        present, execute = self._present(vma.start, vma.end), bool(vma.prot & PROT_EXEC)
        if vma.prot & PROT_WRITE and not vma.shared:
            present = [page for page in present if not self._copied(page, vma, child)]
        references, left, pages = self.frames.references, child._left, {page: self.pages[page] for page in present}
        for page, value in pages.items():
            if left.get(page) == value:
                del left[page]  # and its reference is the child's
            else:
                references[value >> 2] += 1
        child.pages.update(pages)
        child.table.map_all(pages, execute)

    def _copied(self, page: int, vma: Vma, child: Memory) -> bool:
        """Whether the child has a copy of a private page; else it is read-only here."""
        value = self.pages[page]
        if page in self.hot if value & WRITABLE else self.frames.references.get(child._left.get(page, -1) >> 2) == 1:
            child._install(page, child._fresh(page, value >> 2), vma)
            return True
        if value & WRITABLE:
            self.pages[page] = value & ~WRITABLE
            self.table.map(page, value >> 2, False, bool(vma.prot & PROT_EXEC))
        return False

    def leave(self) -> dict[int, int]:
        """Its last program has ended. What its tables show stays as it is, and so do the frames: they are the caller's, for
        the Memory that has the table next. Raises MemoryError, XenError."""
        self._leave_low()
        if self._left or self._leaving:
            self.flush()
        left, self.pages, self.areas = self.pages, {}, Areas()
        return left

    def _leave_low(self) -> None:
        if self.low is not None:
            self.low.leave()
            self.low = None

    def clear(self) -> None:
        """Empty, tables too."""
        self._leave_low()
        self.table.clear()
        self.frames.in_force()
        for value in (*self.pages.values(), *self._left.values()):
            self.frames.drop(value >> 2)
        for pfn in self._leaving:
            self.frames.drop(pfn)
        self._left, self._leaving, self.pages = {}, [], {}
        self.areas = Areas()
        self.brk_start = self.brk_end = 0
