"""Swapping: a region larger than the frames it may have, the rest of it on the disk xvda, first in first out.

A page comes in read-only, so that its first write is a fault too, which makes it dirty: a page that nobody wrote to needs not
be written out again. Where a page is on the disk, its entry, not present, says so in bits of our own.

cmdline: "pages=N frames=F touches=T" (default 192, 48, 1500). The disk has at least N * 4 KiB.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from typing import TYPE_CHECKING

from domain import memory
from domain.memory import Pages
from domain.paging import AddressSpace, Fault
from hypervisor.public.boot_tables import DATA
from hypervisor.public.mmu import Pte
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.blkfront import BlockDevice
    from domain.kernel import Kernel

REGION = 0x20_0000_0000
CLEAN = int(Pte.PRESENT | Pte.NX)
ON_DISK = 1 << 9  # of an entry that is not present


class Swap:
    """The policy. One task at a time may fault: a page that is under way is nobody's."""

    def __init__(self, kernel: Kernel, disk: BlockDevice, frames: int) -> None:
        self._kernel, self._disk, self._per_page = kernel, disk, PAGE_SIZE // disk.sector_size
        self._frames = [kernel.memory.alloc(1) for _ in range(frames)]
        self._free = list(self._frames)
        self._in = deque[tuple[int, Pages]]()  # (page, frame), the oldest first
        self._dirty = set[int]()
        self._stored = set[int]()  # have a copy on the disk, as old as their last swap-out
        self.faults = self.zeroed = self.ins = self.outs = self.dropped = 0

    async def handle(self, fault: Fault) -> None:
        self.faults += 1
        space, page = fault.space, fault.page
        if fault.present:  # a write to a clean page
            self._dirty.add(page)
            space.protect(page, DATA)
            return
        frame = self._free.pop() if self._free else await self._evict(space)
        if space.lookup(page) & ON_DISK:
            self.ins += 1
            memory.write(frame.address, await self._disk.read(self._sector(page), self._per_page))
        else:
            self.zeroed += 1
            memory.zero(frame.address, PAGE_SIZE)
        if fault.write:
            self._dirty.add(page)
        self._in.append((page, frame))
        space.map(page, frame.pfn, DATA if fault.write else CLEAN)

    async def _evict(self, space: AddressSpace) -> Pages:
        """The frame of the oldest page, which is on the disk then, or is zeros. First nobody can write to it any more."""
        page, frame = self._in.popleft()
        dirty = page in self._dirty
        self._stored |= {page} if dirty else set()
        space.put(page, ON_DISK if page in self._stored else 0)
        space.flush()
        if dirty:
            self._dirty.discard(page)
            self.outs += 1
            await self._disk.write(self._sector(page), memory.read(frame.address, PAGE_SIZE))
        else:
            self.dropped += 1
        return frame

    def _sector(self, page: int) -> int:
        return (page - REGION) // PAGE_SIZE * self._per_page

    def free(self) -> None:
        for frame in self._frames:
            self._kernel.memory.free(frame)


def content(page: int, version: int) -> bytes:
    """What the program writes to a page: different everywhere and every time."""
    return random.Random(page << 32 | version).randbytes(PAGE_SIZE)


async def main(kernel: Kernel) -> int:
    options = dict(word.split("=", 1) for word in kernel.cmdline.split())
    pages, frames, touches = (int(options.get(*word)) for word in (("pages", 192), ("frames", 48), ("touches", 1500)))
    swap = Swap(kernel, await kernel.block("xvda"), frames)
    space = AddressSpace.create(kernel, swap.handle)

    rng, wrong = random.Random(3), 0
    sums = [zlib.crc32(bytes(PAGE_SIZE))] * pages
    for touch in range(1, touches + 1):
        page = rng.randrange(pages)
        va = REGION + page * PAGE_SIZE
        if rng.random() < 0.4:
            data = content(page, touch)
            sums[page] = zlib.crc32(data)
            await space.write(va, data)
        else:
            wrong += zlib.crc32(await space.read(va, PAGE_SIZE)) != sums[page]
    most = sum(1 for _ in space.entries())
    for page in range(pages):
        wrong += zlib.crc32(await space.read(REGION + page * PAGE_SIZE, PAGE_SIZE)) != sums[page]

    print(f"{pages} pages in {frames} frames, {touches} touches and a last look at every page: {wrong} wrong")
    print(f"{swap.faults} faults: {swap.zeroed} zeroed, {swap.ins} swap-ins, {swap.outs} swap-outs, {swap.dropped} dropped")
    space.destroy()
    swap.free()
    return 0 if not wrong and most <= frames and swap.ins and swap.outs else 1
