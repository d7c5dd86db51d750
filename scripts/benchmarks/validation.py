"""What validation costs: the hypervisor's C kernels beside the same rules in plain Python, on one table, with no process.

The Python here is for comparison only: what one would write without C, on a memoryview of machine memory and lists of counts.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable
from functools import cache
from typing import Any

from hypervisor._hv import ffi, lib
from hypervisor.frames import FrameTable
from hypervisor.public.boot_tables import DATA, UPPER
from hypervisor.public.mmu import ENTRIES, MFN_MASK, PageType, Pte, entry
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

OWNER = 1
FRAMES = 2048
ALLOWED = (1 << 63 | 0x7FF << 52 | MFN_MASK | 7 << 9) | 0x167  # NX, the guest's, mfn, the guest's, P RW US A D G
VA = 0x4000_0000
clock = time.perf_counter_ns


class Plain:
    """A frame table in Python: owner, type, references by frame, and an L1 as 512 words."""

    def __init__(self, memory: Any) -> None:
        self.words = memoryview(memory).cast("B").cast("Q")
        self.owner, self.type = [OWNER] * FRAMES, [int(PageType.NONE)] * FRAMES
        self.total, self.count = [1] * FRAMES, [0] * FRAMES

    def get(self, value: int) -> None:
        """Raises ValueError."""
        if not value & Pte.PRESENT.value:
            return
        mfn = (value & MFN_MASK) >> PAGE_SHIFT
        if value & ~ALLOWED or mfn >= FRAMES or self.owner[mfn] != OWNER:
            raise ValueError(f"{value:#x}")
        if value & Pte.RW.value:
            if self.type[mfn] != WRITABLE and self.count[mfn]:
                raise ValueError(f"{mfn:#x} is a table")
            self.type[mfn] = WRITABLE
            self.count[mfn] += 1
        self.total[mfn] += 1

    def put(self, value: int) -> None:
        if value & Pte.PRESENT.value:
            mfn = (value & MFN_MASK) >> PAGE_SHIFT
            self.total[mfn] -= 1
            if value & Pte.RW.value:
                self.count[mfn] -= 1

    def update(self, requests: list[tuple[int, int]]) -> None:
        for ptr, value in requests:
            mfn, slot = ptr >> PAGE_SHIFT, ptr >> 3 & ENTRIES - 1
            if mfn >= FRAMES or self.owner[mfn] != OWNER or self.type[mfn] != L1 or ptr & 7:
                raise ValueError(f"{ptr:#x}")
            at = mfn * ENTRIES + slot
            old = self.words[at]
            self.get(value)
            self.words[at] = value
            self.put(old)

    def validate(self, mfn: int) -> None:
        self.type[mfn] = L1
        self.count[mfn] += 1
        for value in self.words[mfn * ENTRIES : (mfn + 1) * ENTRIES]:
            self.get(value)

    def undo(self, mfn: int) -> None:
        for value in self.words[mfn * ENTRIES : (mfn + 1) * ENTRIES]:
            self.put(value)
        self.count[mfn] -= 1

    def walk(self, root: int, va: int, write: bool) -> int:
        mfn, rights = root, Pte.RW.value
        for shift in (30, 21, 12):
            value = self.words[mfn * ENTRIES + (va >> shift & ENTRIES - 1)]
            if not value & Pte.PRESENT.value:
                return -1
            rights &= value
            mfn = (value & MFN_MASK) >> PAGE_SHIFT
        return mfn if rights or not write else -1


L1, WRITABLE = int(PageType.L1), int(PageType.WRITABLE)


class Bench:
    """One machine: frames of one owner, a root, an L2 and an L1 full of writable pages."""

    def __init__(self) -> None:
        self.machine: Any = ffi.new("char[]", FRAMES * PAGE_SIZE)
        self.frames = FrameTable(FRAMES, self.machine, ffi.new("uint64_t[]", FRAMES))
        self.frames.allocate(OWNER, FRAMES)
        self.root, self.l2, self.l1 = 0, 1, 2
        self.values = [entry(ENTRIES + i, DATA) for i in range(ENTRIES)]
        self.write(self.l1, self.values)
        self.write(self.l2, [entry(self.l1, UPPER)])
        self.write(self.root, [0, entry(self.l2, UPPER)])
        self.walker: Any = ffi.new("struct table_walk *")
        self.job: Any = ffi.new("struct mmu_job *", {"room": lib.JOB_REQUESTS})
        self.requests = [(self.l1 << PAGE_SHIFT | 8 * i, value) for i, value in enumerate(self.values[::-1])]

    def write(self, mfn: int, values: list[int]) -> None:
        ffi.buffer(self.machine + mfn * PAGE_SIZE, 8 * len(values))[:] = array("Q", values).tobytes()

    def get(self, mfn: int, level: int) -> None:
        status = lib.table_get(self.frames.mmu, self.walker, mfn, level, OWNER, lib.NO_MFN, 0)
        while status == -11:
            status = lib.table_step(self.frames.mmu, self.walker, 64)
        assert not status, status

    def put(self, mfn: int) -> None:
        lib.table_put(self.frames.mmu, self.walker, mfn, False)
        while lib.table_step(self.frames.mmu, self.walker, 64) == -11:
            pass

    def plain(self) -> Plain:
        return Plain(ffi.buffer(self.machine))


@cache
def bench() -> Bench:
    return Bench()


def each(action: Callable[[], object], count: int, after: Callable[[], object] = lambda: None, times: int = 31) -> float:
    """Median ns of one of the `count` things that `action` does; `after` is not measured."""
    out = []
    for _ in range(times):
        begin = clock()
        action()
        out.append((clock() - begin) / count)
        after()
    return statistics.median(out)


def update_c() -> float:
    """ns of an entry of a batch of 512."""
    b = bench()
    b.get(b.l1, L1)
    b.job.requests[0:ENTRIES] = b.requests
    b.job.count, b.job.domid = ENTRIES, OWNER

    def run() -> None:
        b.job.next = 0
        assert not lib.mmu_update(b.frames.mmu, b.job)
        lib.mmu_commit(b.frames.mmu, b.job)

    ns = each(run, ENTRIES)
    b.put(b.l1)
    b.write(b.l1, b.values)
    return ns


def update_python() -> float:
    b = bench()
    plain = b.plain()
    plain.validate(b.l1)
    ns = each(lambda: plain.update(b.requests), ENTRIES)
    b.write(b.l1, b.values)
    return ns


def validate_c() -> float:
    """ns of an entry of a table that is pinned."""
    b = bench()
    return each(lambda: b.get(b.l1, L1), ENTRIES, lambda: b.put(b.l1))


def validate_python() -> float:
    b = bench()
    plain = b.plain()
    return each(lambda: plain.validate(b.l1), ENTRIES, lambda: plain.undo(b.l1))


def walk_c() -> float:
    """ns of a walk through three levels, called from Python as the hypervisor does."""
    b = bench()
    b.get(b.root, int(PageType.L3))
    walk, mmu, root = lib.mmu_walk, b.frames.mmu, b.root
    ns = each(lambda: [walk(mmu, root, va, 1) for va in range(VA, VA + ENTRIES * PAGE_SIZE, PAGE_SIZE)], ENTRIES)
    assert walk(mmu, root, VA + PAGE_SIZE, 1) == ENTRIES + 1
    b.put(b.root)
    return ns


def walk_python() -> float:
    b = bench()
    plain = b.plain()
    walk, root = plain.walk, b.root
    assert walk(root, VA + PAGE_SIZE, True) == ENTRIES + 1
    return each(lambda: [walk(root, va, True) for va in range(VA, VA + ENTRIES * PAGE_SIZE, PAGE_SIZE)], ENTRIES)
