"""Demand-zero paging: a region has no memory until it is touched; then each page gets a frame of zeros.

cmdline: "pages=N" (default 256). Half of them are touched, in random order: read first, then written, then all are read again.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from domain.memory import Pages
from domain.paging import AddressSpace, Fault
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

REGION = 0x10_0000_0000


class Zeros:
    """The policy."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self._memory, self._region = kernel.memory, range(REGION, REGION + size)
        self.frames: dict[int, Pages] = {}  # by page
        self.faults = 0

    async def handle(self, fault: Fault) -> None:
        self.faults += 1
        if fault.va in self._region and not fault.present:
            self.frames[fault.page] = frame = self._memory.alloc(1)  # zeroed
            fault.space.map(fault.page, frame.pfn)

    def free(self) -> None:
        for frame in self.frames.values():
            self._memory.free(frame)


async def main(kernel: Kernel) -> int:
    options = dict(word.split("=", 1) for word in kernel.cmdline.split())
    pages = int(options.get("pages", 256))
    zeros = Zeros(kernel, pages * PAGE_SIZE)
    space = AddressSpace.create(kernel, zeros.handle)
    before = kernel.memory.nr_free
    touched = random.Random(1).sample(range(REGION, REGION + pages * PAGE_SIZE, PAGE_SIZE), pages // 2)

    wrong = 0
    for va in touched:
        wrong += await space.read(va, PAGE_SIZE) != bytes(PAGE_SIZE)
    first = zeros.faults
    for va in touched:
        await space.write(va, va.to_bytes(8, "little") * (PAGE_SIZE // 8))
    for va in touched:
        wrong += await space.read(va, PAGE_SIZE) != va.to_bytes(8, "little") * (PAGE_SIZE // 8)
    again = zeros.faults - first
    shown = {va for va, _ in space.entries()}

    print(f"{pages} pages, {len(touched)} touched: {first} faults, {again} more when written and read again, {wrong} wrong")
    print(f"{len(shown)} pages are mapped; {before - kernel.memory.nr_free} pages of memory used, tables included")
    space.destroy()
    zeros.free()
    return 0 if not wrong and not again and first == len(touched) and shown == set(touched) else 1
