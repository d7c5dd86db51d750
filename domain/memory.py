"""Pages of this domain: the physical allocator over the boot mapping.

Interface: Memory.alloc(nr) -> Pages (zeroed, contiguous pfns), free; read, write, zero: one copy in C by host address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from domain._guest import ffi, lib
from hypervisor.public.layout import KERNEL_WINDOW, VIRT_BASE
from hypervisor.public.types import PAGE_SIZE


def read(address: int, size: int) -> bytes:
    """A private copy of `size` bytes at a host address."""
    buffer: Any = ffi.new("char[]", size)
    lib.memory_copy(buffer, ffi.cast("void *", address), size)
    return bytes(ffi.buffer(buffer, size))


def write(address: int, data: bytes | memoryview) -> None:
    lib.memory_copy(ffi.cast("void *", address), ffi.from_buffer(data), len(data))


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


class Memory:
    """First fit over free extents; a kernel allocates pools once and keeps them."""

    def __init__(self, first_pfn: int, nr_pages: int) -> None:
        self._free = [(first_pfn, nr_pages - first_pfn)]  # sorted, coalesced
        self.nr_pages = nr_pages

    @property
    def nr_free(self) -> int:
        return sum(n for _, n in self._free)

    def alloc(self, nr: int = 1) -> Pages:
        """Zeroed pages. Raises MemoryError: the reservation has no `nr` contiguous pfns left."""
        for i, (pfn, n) in enumerate(self._free):
            if n >= nr:
                self._free[i : i + 1] = [(pfn + nr, n - nr)] if n > nr else []
                pages = Pages(pfn, nr, KERNEL_WINDOW + VIRT_BASE + pfn * PAGE_SIZE)
                zero(pages.address, nr * PAGE_SIZE)
                return pages
        raise MemoryError(f"{nr} contiguous pages of {self.nr_pages}; {self.nr_free} are free")

    def free(self, pages: Pages) -> None:
        extents = sorted([*self._free, (pages.pfn, pages.nr)])
        merged = [extents[0]]
        for pfn, n in extents[1:]:
            last, count = merged[-1]
            assert last + count <= pfn, f"pfn {pfn} freed twice"
            if last + count == pfn:
                merged[-1] = (last, count + n)
            else:
                merged.append((pfn, n))
        self._free = merged
