"""Page tables of a program's address space: frames of this domain, validated by the hypervisor.

A new table is written while it is still an ordinary page of ours, then made read-only and named by the table above: one
validation in C for 512 entries. Entries of tables in force go through the queue of updates, many a call, and only where they
change: so a fork into a table that shows the last fork is a handful of them, or none.
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
    from domain.posix.space import Space

LEVEL_BITS = 9
SLOTS = ENTRIES - 1
USER = int(Pte.PRESENT | Pte.US | Pte.A)
WRITE, NO_EXECUTE = int(Pte.RW | Pte.D), int(Pte.NX)


class UserTable:
    """A root and what is below it. `map` and `unmap` are collected until `flush`. Raises MemoryError, XenError."""

    def __init__(self, kernel: Kernel, space: Space) -> None:
        """`space`: whose `stale` is kept; the run loop looks at it once a system call."""
        self._space = space
        self._asked = -1  # flushes when `expel` was asked for
        self._memory, self._queue = kernel.memory, kernel.memory.mmu
        self._l1_pages: list[int] = []  # pfns
        self._l2_pages: list[int] = []
        self._l1: dict[int, int] = {}  # page >> 9: machine address of the table
        self._l2: dict[int, int] = {}  # page >> 18: likewise
        self._new: dict[int, array[int]] = {}  # page >> 9: a table that is not in force yet
        self._shown: dict[int, int] = {}  # page: its entry, when all that was asked for is in force
        self._code: set[int] = set()  # page >> 9: tables that had entries for code
        self._hidden: set[int] = set()  # page >> 9: those that no L2 names, until the next flush
        self.root = self._memory.alloc(1).pfn
        self._memory.show([self.root], TABLE)
        self._queue.run((MmuextCommand.PIN_L3, self.root_mfn, 0))

    @property
    def root_mfn(self) -> int:
        return self._memory.p2m[self.root]

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None:
        """Show our frame at a page, in place of what was there."""
        value = self._memory.p2m[pfn] << PAGE_SHIFT | (USER | WRITE if write else USER) | (0 if execute else NO_EXECUTE)
        if self._shown.get(page) != value:
            self._shown[page] = value
            self._space.stale = True
            self._put(page, value)
            if execute:
                self._code.add(page >> LEVEL_BITS)

    def map_all(self, pages: dict[int, int], execute: bool) -> None:
        """As `map`, for many: what they are to be is of memory.Memory.pages. Where nothing changes it costs 0.1 us a page."""
        p2m, shown = self._memory.p2m, self._shown
        rights = [flags | (0 if execute else NO_EXECUTE) for flags in (0, 0, USER, USER | WRITE)]
        words = array("Q")
        for page, value in pages.items():
            wanted = p2m[value >> 2] << PAGE_SHIFT | rights[value & 3]
            if shown.get(page) == wanted:
                continue
            table = self._l1.get(page >> LEVEL_BITS)
            if not value & 2:
                self.unmap(page)
            elif execute or table is None:
                self.map(page, value >> 2, bool(value & 1), execute)
            else:
                shown[page] = wanted
                words.extend((table | (page & SLOTS) << 3, wanted))
        if words:
            self._space.stale = True
            self._queue.put_all(words)

    def unmap(self, page: int) -> None:
        if self._shown.pop(page, 0):
            self._space.stale = True
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
        """All of it is in force. Raises MemoryError: no page for a table; nothing is lost, and it can be tried again."""
        if self._new:
            self._add_tables()
        for number in self._hidden:
            self._name(number, self._l1[number])
        self._hidden = set()
        self._queue.flush()
        self._space.stale = False

    def expel(self) -> None:
        """Tables with code are named by nobody until the next flush: whoever still runs in this space faults, and waits in the
        gate then. Two requests, and no work an entry; in force with the next flush of any table, or `settle`."""
        self._hidden = {number for number in self._code if number in self._l1}
        for number in self._hidden:
            self._name(number, 0)
        self._space.stale = True
        self._asked = self._queue.flushes

    @property
    def in_force(self) -> bool:
        """What `expel` asked for is."""
        return self._queue.flushes > self._asked

    def settle(self) -> None:
        """So it is."""
        if not self.in_force:
            self._queue.flush()

    def _name(self, number: int, table: int) -> None:
        """An L2's entry for an L1 at a machine address, or for none."""
        at = self._l2[number >> LEVEL_BITS] | (number & SLOTS) << 3
        self._queue.put(at, entry(table >> PAGE_SHIFT, UPPER) if table else 0)

    def _add_tables(self) -> None:
        """New L1s, then new L2s that name them, then the root's entries: each is good when the one above names it."""
        tops = {number >> LEVEL_BITS for number in self._new} - self._l2.keys()
        pages = self._take(len(self._new) + len(tops))
        upper = {top: array("Q", bytes(PAGE_SIZE)) for top in tops}
        for number, entries in self._new.items():
            mfn = self._table(entries, pages.pop(), self._l1_pages)
            self._l1[number] = mfn << PAGE_SHIFT
            if number >> LEVEL_BITS in tops:
                upper[number >> LEVEL_BITS][number & SLOTS] = entry(mfn, UPPER)
            else:
                self._name(number, mfn << PAGE_SHIFT)
        self._new = {}
        for top, entries in upper.items():
            mfn = self._table(entries, pages.pop(), self._l2_pages)
            self._l2[top] = mfn << PAGE_SHIFT
            self._queue.put(self.root_mfn << PAGE_SHIFT | top << 3, entry(mfn, UPPER))

    def _take(self, count: int) -> list[Pages]:
        """Raises MemoryError, with nothing taken."""
        pages: list[Pages] = []
        try:
            while len(pages) < count:
                pages.append(self._memory.alloc(1))
        except MemoryError:
            for page in pages:
                self._memory.free(page)
            raise
        return pages

    def _table(self, entries: array[int], page: Pages, pages: list[int]) -> int:
        """A page with these entries, which this kernel will not write any more; its mfn. It is one of `pages` then."""
        memory.write(page.address, memoryview(entries).cast("B"))
        self._memory.show(page.pfns, TABLE)
        pages.append(page.pfn)
        return self._memory.p2m[page.pfn]

    def clear(self) -> None:
        """Empty, in force at once. The L1s are free pages again; the few L2s stay, for the next program."""
        self._new, self._shown, self._code, self._hidden = {}, {}, set(), set()
        for number in self._l1:
            self._name(number, 0)
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
