"""The page tables and the frame list that a domain starts with, as whoever builds it lays them out in its own frames.

    pfn   image | mfn_list | the root | L2 tables | L1 tables | free | the boot stack, a native kernel's last frame

The reservation is shown linearly from VIRT_BASE: everything writable and not executable, but the page tables read-only, and
a native kernel's text read-only and executable. Tables and mfn_list have room for `max_pages`, so that a domain that grows
has entries for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from hypervisor.public.layout import VIRT_BASE
from hypervisor.public.mmu import ENTRIES, Pte
from hypervisor.public.types import INVALID_PFN, PAGE_SHIFT, PAGE_SIZE

FIRST_SLOT = VIRT_BASE >> PAGE_SHIFT  # L1 entries below the reservation
DATA = int(Pte.PRESENT | Pte.RW | Pte.NX)
TABLE = int(Pte.PRESENT | Pte.NX)
TEXT = int(Pte.PRESENT)
UPPER = int(Pte.PRESENT | Pte.RW)


@dataclass(frozen=True)
class BootTables:
    """Where they lie, in pfns; `nr_l1` and `nr_l2` tables below the root, which is the first frame of `tables`."""

    mfn_list: range
    tables: range
    nr_l1: int
    nr_l2: int
    max_pages: int

    def pack(self, mfns: Sequence[int], text: range = range(0)) -> bytes:
        """The bytes of the frames `mfn_list` and `tables`, which follow each other. `mfns`: the domain's, by pfn."""
        names = array("Q", mfns)
        names.extend([INVALID_PFN] * (len(self.mfn_list) * PAGE_SIZE // 8 - len(mfns)))
        l1 = array("Q", bytes(8 * FIRST_SLOT))
        l1.extend([mfn << PAGE_SHIFT | DATA for mfn in mfns])
        for pages, flags in ((self.tables, TABLE), (text, TEXT)):
            for pfn in pages:
                l1[FIRST_SLOT + pfn] = mfns[pfn] << PAGE_SHIFT | flags
        first_l2 = self.tables.start + 1
        root = self._upper([mfns[pfn] for pfn in range(first_l2, first_l2 + self.nr_l2)])
        l2 = self._upper([mfns[pfn] for pfn in self.tables[1 + self.nr_l2 :]])
        return names.tobytes() + root + l2 + l1.tobytes() + bytes(PAGE_SIZE * self.nr_l1 - 8 * len(l1))

    @staticmethod
    def _upper(children: list[int]) -> bytes:
        entries = array("Q", [mfn << PAGE_SHIFT | UPPER for mfn in children])
        return entries.tobytes() + bytes(-8 * len(entries) % PAGE_SIZE)


def boot_tables(first_pfn: int, max_pages: int) -> BootTables:
    """For a domain whose image ends before `first_pfn`."""
    nr_l1 = -(-(FIRST_SLOT + max_pages) // ENTRIES)
    nr_l2 = -(-nr_l1 // ENTRIES)
    mfn_list = range(first_pfn, first_pfn - (-8 * max_pages // PAGE_SIZE))
    return BootTables(mfn_list, range(mfn_list.stop, mfn_list.stop + 1 + nr_l2 + nr_l1), nr_l1, nr_l2, max_pages)
