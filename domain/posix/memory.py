"""A program's address space: areas, the frames behind them, and the page tables that say so.

`pages` is the authority: page number -> frame and what its entry allows now. The tables follow it, edits collected until
`flush`, which the run loop calls before the program runs. A page is filled when it is first touched, a few around it as well
(a fault is two hundred times the price of a page); a page that two spaces share privately is read-only in both, and copied when
one writes.
"""

from __future__ import annotations

import errno
from typing import Any, Protocol

from domain import memory
from domain._guest import ffi
from domain.posix.errors import Errno
from domain.posix.frames import Frames, PageCache
from domain.posix.vma import (
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
OK, MAPERR, ACCERR, BUSERR = range(4)  # what a fault comes to; 1 and 2 are SEGV_MAPERR and SEGV_ACCERR
READABLE, WRITABLE = 2, 1  # low bits of a value of `pages`; the frame is above them
STRING_MAX = 4096


class PageTable(Protocol):
    """Where entries go: domain.posix.pagetable, or a stand-in."""

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None: ...
    def unmap(self, page: int) -> None: ...
    def clear(self) -> None: ...
    def flush(self) -> None: ...


class Memory:
    """One address space. `users`: how many tasks run in it."""

    def __init__(self, frames: Frames, cache: PageCache, table: PageTable) -> None:
        self.frames, self.cache, self.table = frames, cache, table
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
            place = self.areas.gap(size)
            if place is None:
                raise Errno(errno.ENOMEM)
            address = place
        if address % PAGE_SIZE or not USER_START <= address <= address + size <= USER_END:
            raise Errno(errno.ENOMEM)
        self.unmap(address, size)
        around = around or (AROUND_BIG if size >= BIG else AROUND)
        self.areas.insert(Vma(address, address + size, prot & 7, shared, file, offset, around))
        return address

    def unmap(self, address: int, size: int) -> None:
        """Nothing is there any more."""
        end = address + page_up(size)
        for vma in self.areas.carve(address, end):
            for page in self._present(vma.start, vma.end):
                self.table.unmap(page)
                self.frames.drop(self.pages.pop(page) >> 2)

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
            self.areas.insert(Vma(old, new, PROT_READ | PROT_WRITE))
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
            self.table.unmap(page)
            self.frames.drop(self.pages.pop(page) >> 2)
        return place

    def discard(self, start: int, end: int) -> None:
        """Private anonymous pages are zero again (madvise DONTNEED)."""
        for vma in self.areas.overlapping(start, end):
            if not vma.shared:
                for page in self._present(max(start, vma.start), min(end, vma.end)):
                    self.table.unmap(page)
                    self.frames.drop(self.pages.pop(page) >> 2)

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
        first = max(vma.start >> PAGE_SHIFT, page & -vma.around)
        for near in range(first, min(vma.end >> PAGE_SHIFT, (page & -vma.around) + vma.around)):
            if near not in self.pages:
                try:
                    self._fill(near, vma)
                except Errno:
                    if near >= page and page not in self.pages:
                        raise
        if write:
            self._own(page, vma)
        return OK

    def _fill(self, page: int, vma: Vma) -> None:
        """A frame for a page that has none."""
        if vma.file is None:
            self._install(page, self.frames.alloc(), vma)
            return
        offset = vma.offset + (page << PAGE_SHIFT) - vma.start
        if offset < vma.file.size:
            pfn = self.cache.frame(vma.file, offset >> PAGE_SHIFT)
            self.frames.hold(pfn)
            self._install(page, pfn, vma)

    def _own(self, page: int, vma: Vma) -> None:
        """It may be written: copied first where anybody else has it."""
        value = self.pages[page]
        pfn = value >> 2
        if not vma.shared and self.frames.references[pfn] > 1:
            new = self.frames.copy(pfn)
            self.frames.drop(pfn)
            pfn = new
        self._install(page, pfn, vma)

    def _install(self, page: int, pfn: int, vma: Vma) -> None:
        """The entry that the area allows: one that others share privately is read-only."""
        write = bool(vma.prot & PROT_WRITE) and (vma.shared or self.frames.references[pfn] == 1)
        if vma.prot:
            self.table.map(page, pfn, write, bool(vma.prot & PROT_EXEC))
        else:
            self.table.unmap(page)
        self.pages[page] = pfn << 2 | (READABLE if vma.prot else 0) | (WRITABLE if write else 0)

    # ---- the kernel's own accesses

    def copy_in(self, address: int, size: int) -> bytes:
        """A copy of what the program has there. Raises Errno(EFAULT)."""
        offset = address & PAGE_SIZE - 1
        if offset + size <= PAGE_SIZE:
            value = self.pages.get(address >> PAGE_SHIFT, 0)
            if value & READABLE or self._touch(address, size, False):
                at = self.frames.address(self.pages[address >> PAGE_SHIFT] >> 2) + offset
                return bytes(ffi.buffer(ffi.cast("char *", at), size))
            return b""
        parts = []
        while size:
            count = min(size, PAGE_SIZE - (address & PAGE_SIZE - 1))
            parts.append(self.copy_in(address, count))
            address, size = address + count, size - count
        return b"".join(parts)

    def copy_out(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Raises Errno(EFAULT); what came before the page that cannot be written is written."""
        view, size, done = memoryview(data), len(data), 0
        while done < size:
            offset = address & PAGE_SIZE - 1
            count = min(size - done, PAGE_SIZE - offset)
            if not self.pages.get(address >> PAGE_SHIFT, 0) & WRITABLE:
                self._touch(address, count, True)
            memory.write(self.frames.address(self.pages[address >> PAGE_SHIFT] >> 2) + offset, view[done : done + count])
            address, done = address + count, done + count

    def string(self, address: int, limit: int = STRING_MAX) -> bytes:
        """Up to the null byte. Raises Errno(EFAULT), Errno(ENAMETOOLONG): none within `limit`."""
        found = b""
        while len(found) < limit:
            count = PAGE_SIZE - (address & PAGE_SIZE - 1)
            part = self.copy_in(address, count)
            end = part.find(0)
            if end >= 0:
                found += part[:end]
                break
            found, address = found + part, address + count
        if len(found) >= limit:
            raise Errno(errno.ENAMETOOLONG)
        return found

    def word(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.copy_in(address, size), "little")

    def _touch(self, address: int, size: int, write: bool) -> bool:
        """Make one page accessible to us as it is to the program; False: nothing is to be copied."""
        if not size:
            return False
        if not USER_START <= address < USER_END or self.fault(address, write) != OK:
            raise Errno(errno.EFAULT)
        return True

    # ---- lives

    def fork(self, table: PageTable) -> Memory:
        """The child's: the same areas and frames, private ones read-only in both from here on. Raises Errno(ENOMEM)."""
        child = Memory(self.frames, self.cache, table)
        child.areas = self.areas.copy()
        child.brk_start, child.brk_end = self.brk_start, self.brk_end
        references = self.frames.references
        for vma in self.areas:
            execute = bool(vma.prot & PROT_EXEC)
            for page in self._present(vma.start, vma.end):
                value = self.pages[page]
                pfn = value >> 2
                references[pfn] += 1
                if value & WRITABLE and not vma.shared:
                    value &= ~WRITABLE
                    self.pages[page] = value
                    self.table.map(page, pfn, False, execute)
                child.pages[page] = value
                if value & READABLE:
                    table.map(page, pfn, bool(value & WRITABLE), execute)
        return child

    def clear(self) -> None:
        """Empty: what execve begins with, and exit ends with."""
        self.table.clear()
        for value in self.pages.values():
            self.frames.drop(value >> 2)
        self.pages.clear()
        self.areas = Areas()
        self.brk_start = self.brk_end = 0
