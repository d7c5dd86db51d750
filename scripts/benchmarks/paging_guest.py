"""The guest of the paging benchmark. cmdline: "what=NAME n=COUNT"; it prints {"ns": median of one} and ends.

All but the boot space is one space with one L1 table, at BASE. Accesses and updates are made as a kernel makes them: by the
accessor of the library, and by hypercalls whose requests lie ready in memory, so that packing them is in no figure.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from domain import memory
from domain._guest import ffi, lib
from domain.paging import AddressSpace, Fault
from hypervisor.public.boot_tables import DATA
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.memory import IncreaseReservation
from hypervisor.public.mmu import ENTRIES, L1_SHIFT, UPDATE, MmuextCommand, MmuUpdate, entry
from hypervisor.public.traps import VmassCommand, VmAssist, VmassType
from hypervisor.public.types import DOMID_SELF, PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

BASE = 0x4000_0000
FILL = 16  # pages mapped by one fault, where their entries are present
STRIDE = 37  # of pfns, so that no two neighbours of a table lie together in the machine
QUIET = 0.02  # seconds: who made this domain has nothing more to ask by then
clock = time.perf_counter_ns


class Bench:
    """One space and frames to show in it."""

    def __init__(self, kernel: Kernel, loaded: bool = True) -> None:
        self.kernel, self.paging = kernel, kernel.space.paging
        self.space = AddressSpace.create(kernel)
        self.space.put(BASE, 0)
        self.space.flush()
        self.table = self.space._entry_of(self.space._l1(BASE), BASE, L1_SHIFT)
        self.nothing = [0] * ENTRIES
        self._area = kernel.memory.alloc(2 * UPDATE.size * ENTRIES // PAGE_SIZE)
        self._byte = ffi.new("char[8]")
        if loaded:
            self.space.switch()

    def scattered(self) -> list[int]:
        """Entries for frames no two of which lie together."""
        pages = self.kernel.memory.alloc(ENTRIES)
        return [entry(self.kernel.memory.p2m[pages.pfn + i * STRIDE % ENTRIES], DATA) for i in range(ENTRIES)]

    def together(self) -> list[int]:
        """Entries for frames in as few runs as the machine has: an extent of 512, or smaller ones."""
        self.kernel.memory.release(ENTRIES)
        queue, out = self.paging.queue, list[int]()
        for order in range(9, -1, -1):
            want = ENTRIES - len(out) >> order
            got = self.kernel.call(IncreaseReservation(queue.give(bytes(8 * max(want, 1))), want, order))
            firsts = ffi.cast("uint64_t *", queue.scratch)
            out += [entry(firsts[i] + j, DATA) for i in range(got) for j in range(1 << order)]
        return out

    def batch(self, values: list[int], slot: int = 0, at: int = 0) -> Hypercall[int]:
        """The call that sets entries from `slot` on; `at`: 0 or 1, which of two areas its requests lie in."""
        size = UPDATE.size * ENTRIES
        requests = b"".join(UPDATE.pack(self.table + 8 * (slot + i), value) for i, value in enumerate(values))
        memory.write(self._area.address + at * size, requests)
        return MmuUpdate(self._area.va + at * size, len(values), 0, DOMID_SELF)

    def set(self, values: list[int], slot: int = 0) -> None:
        self.kernel.call(self.batch(values, slot))

    def forget(self) -> None:
        """No translation is left; the kernel's own pages that the next measurement needs come back at once."""
        self.paging.queue.run((MmuextCommand.TLB_FLUSH, 0, 0))
        memory.read(self._area.address, 2 * UPDATE.size * ENTRIES)

    def touch(self, slot: int) -> None:
        """A store, as a program would make it."""
        error = lib.gva_copy(ffi.cast("void *", self.space.window + BASE + slot * PAGE_SIZE), self._byte, 1)
        assert not error, f"slot {slot}: page fault {error:#x}"


def each(n: int, action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Median ns of `action`, the first tenth left out; `before` is not measured."""
    out = []
    for _ in range(n + n // 10 + 1):
        before()
        begin = clock()
        action()
        out.append(clock() - begin)
    return statistics.median(out[n // 10 :])


async def update(kernel: Kernel, n: int) -> float:
    """p1: one entry that a window shows gets another frame."""
    bench = Bench(kernel)
    one, other = bench.scattered()[:2]
    calls = [bench.batch([one], at=0), bench.batch([other], at=1)]

    def swap() -> None:
        kernel.call(calls[0])
        calls.reverse()

    return each(n, swap)


async def batch(kernel: Kernel, n: int) -> float:
    """p2: 512 entries of a table that no window shows."""
    bench = Bench(kernel, loaded=False)
    frames = bench.scattered()
    calls = [bench.batch(frames, at=0), bench.batch(frames[::-1], at=1)]

    def swap() -> None:
        kernel.call(calls[0])
        calls.reverse()

    return each(n, swap) / ENTRIES


async def eager(kernel: Kernel, n: int, scattered: bool = False) -> float:
    """p3: 512 pages mapped by one batch, of frames that lie together."""
    bench = Bench(kernel)
    frames = bench.scattered() if scattered else bench.together()
    there, gone = bench.batch(frames, at=0), bench.batch(bench.nothing, at=1)
    return each(n, lambda: kernel.call(there), lambda: kernel.call(gone)) / ENTRIES


async def eager_scattered(kernel: Kernel, n: int) -> float:
    """p4: of frames that do not."""
    return await eager(kernel, n, True)


async def fill(kernel: Kernel, n: int) -> float:
    """p5: the first access to a page none of whose neighbours is there."""
    bench, out = Bench(kernel), list[int]()
    frames = bench.scattered()
    alone = range(0, ENTRIES, FILL)
    bench.set([frames[slot] if slot in alone else 0 for slot in range(ENTRIES)])
    while len(out) < n:
        bench.forget()
        for slot in alone:
            begin = clock()
            bench.touch(slot)
            out.append(clock() - begin)
    return statistics.median(out)


async def fill_around(kernel: Kernel, n: int) -> float:
    """p6: the first access to each page of a full table, one after the other."""
    bench = Bench(kernel)
    bench.set(bench.scattered())

    def touch_all() -> None:
        for slot in range(ENTRIES):
            bench.touch(slot)

    return each(n, touch_all, bench.forget) / ENTRIES


async def revoke(kernel: Kernel, n: int) -> float:
    """p7: an entry under a mapping that is in use is taken away."""
    bench = Bench(kernel)
    there, gone = bench.batch(bench.scattered()[:1], at=0), bench.batch([0], at=1)

    def use() -> None:
        kernel.call(there)
        bench.touch(0)

    return each(n, lambda: kernel.call(gone), use)


async def bounce(kernel: Kernel, n: int) -> float:
    """p8: an access that the handler of the space makes possible."""
    bench, out = Bench(kernel), list[int]()
    value = bench.scattered()[0]

    async def handler(fault: Fault) -> None:
        fault.space.put(fault.page, value)

    bench.space.handler = handler
    for _ in range(n):
        begin = clock()
        await bench.space.write(BASE, b"x")
        out.append(clock() - begin)
        bench.set([0])
    return statistics.median(out[n // 10 :])


async def switch(kernel: Kernel, n: int) -> float:
    """p9: from one loaded root to another."""
    bench = Bench(kernel)
    spaces = [kernel.space, bench.space]

    def swap() -> None:
        spaces[0].switch()
        spaces.reverse()

    return each(n, swap)


async def store(kernel: Kernel, n: int) -> float:
    """p10: 512 entries that a window shows, each by a store to the read-only table, as a kernel does that was not ported."""
    bench = Bench(kernel)
    frames = bench.scattered()
    bench.set(frames)
    kernel.call(VmAssist(VmassCommand.ENABLE, VmassType.WRITABLE_PAGETABLES))
    table = bench.paging.table(bench.space._l1(BASE))
    frames.reverse()

    def store_all() -> None:
        for slot, value in enumerate(frames):
            error = lib.gva_store(table + slot, value)
            assert not error, f"slot {slot}: page fault {error:#x}"
        assert table[0] == frames[0]
        frames.reverse()

    return each(n, store_all) / ENTRIES


WHAT = {f.__name__: f for f in (update, batch, eager, eager_scattered, fill, fill_around, revoke, bounce, switch, store)}


async def main(kernel: Kernel) -> int:
    options = dict(word.split("=", 1) for word in kernel.cmdline.split())
    await kernel.sleep(QUIET)
    print(json.dumps({"ns": await WHAT[options["what"]](kernel, int(options["n"]))}))
    return 0
