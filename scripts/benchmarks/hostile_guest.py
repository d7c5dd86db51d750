"""A guest that does its worst to its own memory map, for ever. cmdline: "what=NAME"; it never ends by itself.

Each is the most expensive that a call or an access of its kind can be, asked for again as soon as it is answered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from domain import memory
from domain._guest import ffi, lib
from domain.paging import AddressSpace
from hypervisor.public.boot_tables import DATA, TABLE, UPPER
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.mmu import ENTRIES, EXT_OP, L1_SHIFT, L2_SHIFT, UPDATE, MmuextCommand, MmuextOp, MmuUpdate, entry
from hypervisor.public.types import DOMID_SELF, MAX_BATCH, PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

BASE = 0x4000_0000
TABLES = 32  # L1 tables below one L2
STRIDE = 37  # of pfns, so that no two neighbours of a table lie together in the machine


def many(kernel: Kernel, *operations: tuple[int, int, int]) -> Hypercall[int]:
    """One call of as many extended operations as it takes, these over and over."""
    raw = b"".join(EXT_OP.pack(*operation) for operation in operations) * (MAX_BATCH // len(operations))
    pages = kernel.memory.alloc(-(-len(raw) // PAGE_SIZE))
    memory.write(pages.address, raw)
    return MmuextOp(pages.va, len(raw) // EXT_OP.size, 0, DOMID_SELF)


def shown(kernel: Kernel) -> tuple[AddressSpace, list[int]]:
    """A loaded space whose table at BASE is full of scattered frames, and its entries."""
    space = AddressSpace.create(kernel)
    pages = kernel.memory.alloc(ENTRIES)
    values = [entry(kernel.memory.p2m[pages.pfn + i * STRIDE % ENTRIES], DATA) for i in range(ENTRIES)]
    for slot, value in enumerate(values):
        space.put(BASE + slot * PAGE_SIZE, value)
    space.switch()
    return space, values


def flush(kernel: Kernel) -> Callable[[], object]:
    """512 times all translations, and then a page of each sixteen comes back by fault."""
    space, _ = shown(kernel)
    call, byte = many(kernel, (MmuextCommand.TLB_FLUSH, 0, 0)), ffi.new("char[8]")

    def worst() -> None:
        kernel.call(call)
        for slot in range(0, ENTRIES, 16):
            lib.gva_copy(ffi.cast("void *", space.window + BASE + slot * PAGE_SIZE), byte, 1)

    return worst


def flip(kernel: Kernel) -> Callable[[], object]:
    """Every entry of a live table to another frame: 512 host mappings a call, none beside another."""
    space, values = shown(kernel)
    table = space._entry_of(space._l1(BASE), BASE, L1_SHIFT)
    calls = []
    for order in (values, values[::-1]):
        pages = kernel.memory.alloc(UPDATE.size * ENTRIES // PAGE_SIZE)
        memory.write(pages.address, b"".join(UPDATE.pack(table + 8 * slot, value) for slot, value in enumerate(order)))
        calls.append(MmuUpdate(pages.va, ENTRIES, 0, DOMID_SELF))

    def worst() -> None:
        kernel.call(calls[0])
        calls.reverse()

    return worst


def pins(kernel: Kernel) -> Callable[[], object]:
    """256 times a tree of 32 full tables becomes one, and is taken apart."""
    pages = kernel.memory.alloc(1)
    frame = struct.pack("<Q", entry(kernel.memory.p2m[pages.pfn], DATA))
    tables = kernel.memory.alloc(TABLES + 1)
    top, *below = tables.pfns
    memory.write(tables.address + PAGE_SIZE, frame * (ENTRIES * TABLES))
    names = [entry(kernel.memory.p2m[pfn], UPPER) for pfn in below]
    memory.write(tables.address, struct.pack(f"<{TABLES}Q", *names))
    kernel.memory.show(tables.pfns, TABLE)
    kernel.memory.mmu.flush()
    mfn = kernel.memory.p2m[top]
    call = many(kernel, (MmuextCommand.PIN_L2, mfn, 0), (MmuextCommand.UNPIN, mfn, 0))
    return lambda: kernel.call(call)


def unhook(kernel: Kernel) -> Callable[[], object]:
    """A live table loses its place above and gets it back, 256 times a call."""
    space, _ = shown(kernel)
    l2 = space.paging.pfn_of(space.paging.table(space.root)[BASE >> 30])
    above, l1 = space._entry_of(l2, BASE, L2_SHIFT), kernel.memory.p2m[space._l1(BASE)]
    raw = (UPDATE.pack(above, 0) + UPDATE.pack(above, entry(l1, UPPER))) * (MAX_BATCH // 2)
    pages = kernel.memory.alloc(len(raw) // PAGE_SIZE)
    memory.write(pages.address, raw)
    call = MmuUpdate(pages.va, MAX_BATCH, 0, DOMID_SELF)
    return lambda: kernel.call(call)


WHAT = {f.__name__: f for f in (flush, flip, pins, unhook)}


async def main(kernel: Kernel) -> int:
    worst = WHAT[kernel.cmdline.removeprefix("what=")](kernel)
    worst()
    print("begun")
    while True:
        worst()
