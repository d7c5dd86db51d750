"""Pages of this domain: the physical allocator over the boot mapping, and what a balloon takes from it and gives back.

Interface:
  * Memory.alloc(nr) -> Pages (zeroed, contiguous pfns), free.
  * Memory.release(nr) -> int, obtain(nr) -> int: free pages to the machine, and from it; nr_pages, nr_free, nr_holes.
  * read, write, copy, zero: one copy in C by host address.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from domain._guest import ffi, lib
from domain.mmu import SCRATCH_PAGES, MmuQueue
from hypervisor.public.boot_tables import DATA, FIRST_SLOT, BootTables
from hypervisor.public.layout import KERNEL_WINDOW, VIRT_BASE
from hypervisor.public.memory import DecreaseReservation, PopulatePhysmap
from hypervisor.public.mmu import ENTRIES, entry
from hypervisor.public.types import INVALID_PFN, MAX_BATCH, PAGE_SHIFT, PAGE_SIZE


def read(address: int, size: int) -> bytes:
    """A private copy of `size` bytes at a host address."""
    buffer: Any = ffi.new("char[]", size)
    lib.memory_copy(buffer, ffi.cast("void *", address), size)
    return bytes(ffi.buffer(buffer, size))


def write(address: int, data: bytes | memoryview) -> None:
    lib.memory_copy(ffi.cast("void *", address), ffi.from_buffer(data), len(data))


def copy(to: int, source: int, size: int) -> None:
    """Between two host addresses, which do not overlap."""
    lib.memory_copy(ffi.cast("void *", to), ffi.cast("void *", source), size)


def zero(address: int, size: int) -> None:
    lib.memory_zero(ffi.cast("void *", address), size)


@dataclass(frozen=True)
class Pages:
    """`nr` pages from pseudo-physical frame `pfn`; `address` is the host address of the first byte."""

    pfn: int
    nr: int
    address: int

    @property
    def pfns(self) -> range:
        return range(self.pfn, self.pfn + self.nr)

    @property
    def va(self) -> int:
        """Guest-virtual address, as hypercalls take it."""
        return self.address - KERNEL_WINDOW


class Extents:
    """A set of pfns as sorted runs (first, count) that do not touch."""

    def __init__(self, *runs: tuple[int, int]) -> None:
        self.runs = [run for run in runs if run[1]]

    def __len__(self) -> int:
        return sum(count for _, count in self.runs)

    def take(self, nr: int) -> int | None:
        """The lowest `nr` that lie together, which are in it no more."""
        for i, (pfn, count) in enumerate(self.runs):
            if count >= nr:
                self.runs[i : i + 1] = [(pfn + nr, count - nr)] if count > nr else []
                return pfn
        return None

    def take_lowest(self, nr: int) -> tuple[int, int]:
        """At most `nr` of the lowest run: (first, count). Not of an empty set."""
        pfn, count = self.runs[0]
        self.runs[:1] = [(pfn + nr, count - nr)] if count > nr else []
        return pfn, min(nr, count)

    def take_highest(self, nr: int) -> tuple[int, int]:
        """At most `nr` of the highest run: (first, count). Not of an empty set."""
        pfn, count = self.runs.pop()
        if count > nr:
            self.runs.append((pfn, count - nr))
            return pfn + count - nr, nr
        return pfn, count

    def put(self, pfn: int, nr: int) -> None:
        runs = sorted([*self.runs, (pfn, nr)])
        merged = [runs[0]]
        for first, count in runs[1:]:
            last, length = merged[-1]
            assert last + length <= first, f"pfn {first} freed twice"
            if last + length == first:
                merged[-1] = (last, length + count)
            else:
                merged.append((first, count))
        self.runs = merged


class Memory:
    """First fit over free extents; a kernel allocates pools once and keeps them."""

    def __init__(self, hypercall: Callable[[Any], Any], nr_pages: int, p2m: array[int], tables: BootTables) -> None:
        """`p2m`: the mfn of each pfn, INVALID_PFN where it has none, for tables.max_pages; this kernel's own affair."""
        self._hypercall, self._tables = hypercall, tables
        first = tables.tables.stop
        self._free = Extents((first, nr_pages - first))
        self._holes = Extents((nr_pages, tables.max_pages - nr_pages))
        self.nr_pages = nr_pages  # that have a frame
        self.p2m = p2m
        self.on_free: Callable[[], None] | None = None  # who wants to know that pages were freed
        self.mmu = MmuQueue(hypercall, self.alloc(SCRATCH_PAGES).address)

    @property
    def nr_free(self) -> int:
        return len(self._free)

    @property
    def nr_holes(self) -> int:
        """Pfns that `obtain` could find frames for: never had any, or released."""
        return len(self._holes)

    def alloc(self, nr: int = 1) -> Pages:
        """Zeroed pages. Raises MemoryError: the reservation has no `nr` contiguous pfns left."""
        pfn = self._free.take(nr)
        if pfn is None:
            raise MemoryError(f"{nr} contiguous pages of {self.nr_pages}; {self.nr_free} are free")
        pages = Pages(pfn, nr, KERNEL_WINDOW + VIRT_BASE + pfn * PAGE_SIZE)
        zero(pages.address, nr * PAGE_SIZE)
        return pages

    def free(self, pages: Pages) -> None:
        self._free.put(pages.pfn, pages.nr)
        if self.on_free is not None:
            self.on_free()

    # ---- the boot mapping, by which this kernel sees its own pages

    def boot_entry(self, pfn: int) -> int:
        """Machine address of the entry that shows `pfn` at virt(pfn)."""
        table, slot = divmod(FIRST_SLOT + pfn, ENTRIES)
        return self.p2m[self._tables.tables.start + 1 + self._tables.nr_l2 + table] << PAGE_SHIFT | slot * 8

    def show(self, pfns: Iterable[int], flags: int) -> None:
        """Queue: the boot mapping of these shows their frames with `flags` (mmu.Pte); 0: nothing."""
        for pfn in pfns:
            self.mmu.put(self.boot_entry(pfn), entry(self.p2m[pfn], flags) if flags else 0)

    # ---- the balloon

    def release(self, nr: int) -> int:
        """Give at most `nr` free pages back to the machine, the highest first; how many. Fewer: no more are free.

        Two hypercalls for 512: out of the boot mapping, out of the reservation.
        """
        done = 0
        while done < nr and self._free.runs:
            first, count = self._free.take_highest(min(nr - done, MAX_BATCH))
            pfns = range(first, first + count)
            self.show(pfns, 0)
            self.mmu.flush()
            va = self.mmu.give(array("Q", self.p2m[first : first + count]).tobytes())
            gone = self._hypercall(DecreaseReservation(va, count, 0))
            if gone != count:
                raise AssertionError(f"pfn {pfns[gone]} is free here, and in use for the hypervisor")
            for pfn in pfns:
                self.p2m[pfn] = INVALID_PFN
            self._holes.put(first, count)
            self.nr_pages -= count
            done += count
        return done

    def obtain(self, nr: int) -> int:
        """Get at most `nr` pages for holes, the lowest first, zeroed and mapped writable; they are free then. How many.

        Fewer: start_info's max_pages or the domain's maximum is reached, or the machine has no more. Two hypercalls for 512.
        """
        done = 0
        while done < nr and self._holes.runs:
            first, count = self._holes.take_lowest(min(nr - done, MAX_BATCH))
            va = self.mmu.give(array("Q", range(first, first + count)).tobytes())
            got = self._hypercall(PopulatePhysmap(va, count, 0))
            self.p2m[first : first + got] = array("Q", self.mmu.take(8 * got))
            if got < count:
                self._holes.put(first + got, count - got)
            if got:
                self.show(range(first, first + got), DATA)
                self.mmu.flush()
                self._free.put(first, got)
                self.nr_pages += got
                done += got
            if got < count:
                break
        return done
