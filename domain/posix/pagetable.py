"""Page tables of a program's address space: frames of this domain, validated by the hypervisor.

A new table is written while it is still an ordinary page of ours, then made read-only and named by the table above: one
validation in C for 512 entries. Entries of tables in force go through the queue of updates, many a call. So a fork is the
child's tables written by plain stores, and one batch.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from domain import memory
from domain.memory import Pages
from hypervisor.public.boot_tables import DATA, TABLE, UPPER
from hypervisor.public.layout import KERNEL_WINDOW, VIRT_BASE
from hypervisor.public.mmu import ENTRIES, MmuextCommand, Pte, entry
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

LEVEL_BITS = 9
SLOTS = ENTRIES - 1
USER = Pte.PRESENT | Pte.US | Pte.A


class UserTable:
    """A root and what is below it. `map` and `unmap` are collected until `flush`. Raises MemoryError, XenError."""

    def __init__(self, kernel: Kernel) -> None:
        self._memory, self._queue = kernel.memory, kernel.memory.mmu
        self._l1_pages: list[int] = []  # pfns
        self._l2_pages: list[int] = []
        self._l1: dict[int, int] = {}  # page >> 9: machine address of the table
        self._l2: dict[int, int] = {}  # page >> 18: likewise
        self._new: dict[int, array[int]] = {}  # page >> 9: a table that is not in force yet
        self.root = self._memory.alloc(1).pfn
        self._memory.show([self.root], TABLE)
        self._queue.run((MmuextCommand.PIN_L3, self.root_mfn, 0))

    @property
    def root_mfn(self) -> int:
        return self._memory.p2m[self.root]

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None:
        """Show our frame at a page, in place of what was there."""
        flags = int(USER) | (int(Pte.RW | Pte.D) if write else 0) | (0 if execute else int(Pte.NX))
        self._put(page, self._memory.p2m[pfn] << PAGE_SHIFT | flags)

    def unmap(self, page: int) -> None:
        if page >> LEVEL_BITS in self._l1 or page >> LEVEL_BITS in self._new:
            self._put(page, 0)

    def _put(self, page: int, value: int) -> None:
        table = self._l1.get(page >> LEVEL_BITS)
        if table is not None:
            self._queue.put(table | (page & SLOTS) << 3, value)
            return
        new = self._new.get(page >> LEVEL_BITS)
        if new is None:
            new = self._new[page >> LEVEL_BITS] = array("Q", bytes(PAGE_SIZE))
        new[page & SLOTS] = value

    def flush(self) -> None:
        """All of it is in force."""
        if self._new:
            self._add_tables()
        self._queue.flush()

    def _add_tables(self) -> None:
        """New L1s, then new L2s that name them, then the root's entries: each is good when the one above names it."""
        upper: dict[int, array[int]] = {}
        for number, entries in self._new.items():
            mfn = self._table(entries, self._l1_pages)
            self._l1[number] = mfn << PAGE_SHIFT
            above = self._l2.get(number >> LEVEL_BITS)
            if above is not None:
                self._queue.put(above | (number & SLOTS) << 3, entry(mfn, UPPER))
            else:
                upper.setdefault(number >> LEVEL_BITS, array("Q", bytes(PAGE_SIZE)))[number & SLOTS] = entry(mfn, UPPER)
        self._new = {}
        for number, entries in upper.items():
            mfn = self._table(entries, self._l2_pages)
            self._l2[number] = mfn << PAGE_SHIFT
            self._queue.put(self.root_mfn << PAGE_SHIFT | number << 3, entry(mfn, UPPER))

    def _table(self, entries: array[int], pages: list[int]) -> int:
        """A page with these entries, which this kernel will not write any more; its mfn. It is one of `pages` then."""
        page = self._memory.alloc(1)
        memory.write(page.address, memoryview(entries).cast("B"))
        self._memory.show(page.pfns, TABLE)
        pages.append(page.pfn)
        return self._memory.p2m[page.pfn]

    def clear(self) -> None:
        """Empty, in force at once. The L1s are free pages again; the few L2s stay, for the next program."""
        self._new = {}
        for number in self._l1:
            self._queue.put(self._l2[number >> LEVEL_BITS] | (number & SLOTS) << 3, 0)
        self._give_back(self._l1_pages)
        self._l1_pages, self._l1 = [], {}

    def destroy(self) -> None:
        """The L2s and the root too."""
        self.clear()
        self._queue.run((MmuextCommand.UNPIN, self.root_mfn, 0))
        self._give_back([*self._l2_pages, self.root])

    def _give_back(self, pfns: list[int]) -> None:
        """They are tables no more: pages like others, and free."""
        self._memory.show(pfns, DATA)
        self._queue.flush()
        for pfn in pfns:
            self._memory.free(Pages(pfn, 1, KERNEL_WINDOW + VIRT_BASE + pfn * PAGE_SIZE))
