"""What a guest kernel has around it, in this process: memory where its window would be, and a hypervisor for its page tables.

The rules are those of hypervisor/public/mmu.py in their shortest form: a frame is a table or is writable, never both; a table
has one parent; an L3 is shown in one of 16 windows while it is pinned. Who breaks one gets Invalid or Busy.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from domain import memory
from domain._guest import ffi
from domain.memory import Memory
from hypervisor.public.boot_tables import boot_tables
from hypervisor.public.errors import Busy, Invalid
from hypervisor.public.layout import KERNEL_WINDOW, M2P, NR_WINDOWS, SHARED_INFO, SPACE_BYTES, VIRT_BASE, virt
from hypervisor.public.mmu import ENTRIES, EXT_OP, MFN_MASK, UPDATE, MmuextCommand, MmuextOp, MmuUpdate
from hypervisor.public.start_info import SHARED_CR2, SHARED_WINDOW
from hypervisor.public.types import INVALID_PFN, PAGE_SIZE

MAP_FIXED_NOREPLACE = 0x100000
PRESENT, RW, NX = 1, 2, 1 << 63
PAGES, FIRST_TABLE, NR_MFNS = 600, 12, 4096


@contextlib.contextmanager
def mapped(address: int, size: int) -> Iterator[None]:
    """Private memory at a fixed address, which must be free."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    at = libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert at == address, "the window's address is taken"
    try:
        yield
    finally:
        libc.munmap(address, size)


@contextlib.contextmanager
def window() -> Iterator[None]:
    """A reservation of PAGES pages, the M2P and shared_info at their places."""
    with (
        mapped(KERNEL_WINDOW + VIRT_BASE, PAGES * PAGE_SIZE),
        mapped(KERNEL_WINDOW + M2P, 8 * NR_MFNS),
        mapped(KERNEL_WINDOW + SHARED_INFO, PAGE_SIZE),
    ):
        yield


class Hypervisor:
    """Frames are numbered at random. `kernel` is what domain.paging takes of one."""

    def __init__(self) -> None:
        self.mfns = random.Random(6).sample(range(NR_MFNS), PAGES)
        self.pfns = {mfn: pfn for pfn, mfn in enumerate(self.mfns)}
        self.m2p: Any = ffi.cast("uint64_t *", KERNEL_WINDOW + M2P)
        for mfn in range(NR_MFNS):
            self.m2p[mfn] = self.pfns.get(mfn, INVALID_PFN)
        layout = boot_tables(FIRST_TABLE, PAGES)
        memory.write(KERNEL_WINDOW + virt(layout.mfn_list.start), layout.pack(self.mfns))
        self.level = dict[int, int]()  # mfn -> 1, 2, 3
        self.writable = Counter[int]()
        self.windows = [self.mfns[layout.tables.start]] + [-1] * (NR_WINDOWS - 1)
        self.used, self.clock, self.calls = [0] * NR_WINDOWS, 0, list[str]()
        self._become(self.windows[0], 3)
        shared = KERNEL_WINDOW + SHARED_INFO
        self.cr2: Any = ffi.cast("uint64_t *", shared + SHARED_CR2)
        self._window: Any = ffi.cast("uint64_t *", shared + SHARED_WINDOW)
        kernel = SimpleNamespace(hypercall=self, memory=Memory(self, PAGES, array("Q", self.mfns), layout))
        kernel.start = SimpleNamespace(
            shared_info=SHARED_INFO, pt_base=virt(layout.tables.start), request_mqd=-1, reply_mqd=-1
        )  # fmt: skip
        self.kernel: Any = kernel

    def table(self, mfn: int) -> Any:
        return ffi.cast("uint64_t *", KERNEL_WINDOW + virt(self.pfns[mfn]))

    def __call__(self, call: Any) -> int:
        self.calls.append(type(call).__name__)
        if isinstance(call, MmuUpdate):
            for ptr, value in UPDATE.iter_unpack(memory.read(KERNEL_WINDOW + call.address, call.count * UPDATE.size)):
                self._update(ptr >> 12, ptr % PAGE_SIZE // 8, value)
        elif isinstance(call, MmuextOp):
            for operation in EXT_OP.iter_unpack(memory.read(KERNEL_WINDOW + call.address, call.count * EXT_OP.size)):
                self._extended(*operation)
        return 0

    def _update(self, table: int, slot: int, value: int) -> None:
        level, old = self.level[table], int(self.table(table)[slot])
        if value & PRESENT:
            self._get(level, value)
        self.table(table)[slot] = value
        if old & PRESENT:
            self._put(level, old)

    def _get(self, level: int, value: int) -> None:
        mfn = (value & MFN_MASK) >> 12
        if mfn not in self.pfns:
            raise Invalid("not a frame of ours")
        if level > 1:
            self._become(mfn, level - 1)
        elif value & RW:
            if mfn in self.level:
                raise Invalid("a table")
            self.writable[mfn] += 1

    def _put(self, level: int, value: int) -> None:
        mfn = (value & MFN_MASK) >> 12
        if level > 1:
            self._end(mfn)
        elif value & RW:
            self.writable[mfn] -= 1

    def _become(self, mfn: int, level: int) -> None:
        if mfn in self.level:
            raise Busy("a table has one parent")
        self.level[mfn] = level
        for slot in range(ENTRIES):
            if self.table(mfn)[slot] & PRESENT:
                self._get(level, int(self.table(mfn)[slot]))
        if self.writable[mfn]:
            raise Invalid("a frame that is writable")

    def _end(self, mfn: int) -> None:
        level = self.level.pop(mfn)
        for slot in range(ENTRIES):
            if self.table(mfn)[slot] & PRESENT:
                self._put(level, int(self.table(mfn)[slot]))

    def _extended(self, command: int, mfn: int, _: int) -> None:
        if command == MmuextCommand.PIN_L3:
            self._become(mfn, 3)
        elif command == MmuextCommand.UNPIN:
            if mfn in self.windows:
                self.windows[self.windows.index(mfn)] = -1
            self._end(mfn)
        else:
            assert command == MmuextCommand.NEW_BASEPTR and self.level[mfn] == 3
            self._load(mfn)

    def _load(self, mfn: int) -> None:
        if mfn not in self.windows:
            free = -1 if -1 in self.windows else self.windows[min(range(1, NR_WINDOWS), key=lambda w: self.used[w])]
            self.windows[self.windows.index(free)] = mfn
        self.clock += 1
        self.used[self.windows.index(mfn)] = self.clock
        self._window[0] = KERNEL_WINDOW + self.windows.index(mfn) * SPACE_BYTES

    # ---- the process: what takes the place of the C half

    def fault_handler(self, *_: Any) -> int:
        return 0x1000

    def gva_copy(self, to: Any, source: Any, size: int) -> int:
        """As fault.c has it, between a buffer and a window."""
        ends = [int(ffi.cast("uint64_t", end)) for end in (to, source)]
        for i, at in enumerate(ends):
            if 0 <= at - KERNEL_WINDOW < NR_WINDOWS * SPACE_BYTES:
                write = i == 0
                number, va = divmod(at - KERNEL_WINDOW, SPACE_BYTES)
                value = self.walk(self.windows[number], va)
                if not value & PRESENT or (write and not value & RW):
                    self.cr2[0] = at - KERNEL_WINDOW
                    return 0x104 | write * 2 | value & PRESENT
                ends[i] = KERNEL_WINDOW + virt(self.pfns[(value & MFN_MASK) >> 12]) + va % PAGE_SIZE
        ffi.memmove(ffi.cast("char *", ends[0]), ffi.cast("char *", ends[1]), size)
        return 0

    def walk(self, root: int, va: int) -> int:
        """The entry of `va`; 0: none."""
        for shift in (30, 21, 12):
            assert root in self.level, "a walk through what is no table"
            value = int(self.table(root)[va >> shift & ENTRIES - 1])
            if not value & PRESENT or shift == 12:
                return value
            root = (value & MFN_MASK) >> 12
        return 0
