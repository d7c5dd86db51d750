"""Address spaces: page tables in frames of ours, read directly, changed by hypercall, and what happens on a page fault.

    space = AddressSpace.create(kernel, handler)     a root of its own; `kernel.space` is the one that we started in
    space.map(va, pfn); space.flush()                edits are collected; reads, writes and switches flush them first
    space.lookup(va), space.entries()                the tables as they are in force: no hypercall
    await space.read(va, 100)                        what is not mapped is the handler's affair: `async def handler(fault)`

A table is a page that this kernel has stopped writing: its boot mapping is made read-only, and then it is pinned (a root) or
named by an entry of a table above. Frames that a space maps stay whose they are; its tables are its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domain._guest import ffi, lib
from domain.memory import Pages
from domain.traps import set_traps
from hypervisor.public.boot_tables import DATA, TABLE, UPPER
from hypervisor.public.layout import HYPERVISOR_VIRT_START, KERNEL_WINDOW, M2P, NR_WINDOWS, SPACE_BYTES, VIRT_BASE
from hypervisor.public.mmu import ENTRIES, L1_SHIFT, L2_SHIFT, L3_SHIFT, MFN_MASK, MmuextCommand, Pte, entry
from hypervisor.public.sched import SchedShutdown, ShutdownReason
from hypervisor.public.start_info import SHARED_CR2, SHARED_WINDOW
from hypervisor.public.traps import PF_FETCH, PF_PRESENT, PF_WRITE, Vector
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

SLOTS = ENTRIES - 1
DIGITS = "0123456789abcdef"  # in the last words: where the C half puts a number


class PageFault(Exception):
    """An access that no handler made possible."""


@dataclass(frozen=True)
class Fault:
    """What a handler is told: where, and whether the tables had the page, and what for."""

    space: AddressSpace
    va: int
    present: bool
    write: bool
    fetch: bool

    @property
    def page(self) -> int:
        """The first address of the page."""
        return self.va & -PAGE_SIZE


Handler = Callable[[Fault], Awaitable[None]]


class Paging:
    """What the spaces of a kernel have in common."""

    def __init__(self, kernel: Kernel) -> None:
        self.memory, self.queue = kernel.memory, kernel.memory.mmu
        self.shown: list[AddressSpace | None] = [None] * NR_WINDOWS
        self.faults = 0  # that reached this kernel
        shared = KERNEL_WINDOW + kernel.start.shared_info
        self._cr2: Any = ffi.cast("volatile uint64_t *", shared + SHARED_CR2)
        self._window: Any = ffi.cast("volatile uint64_t *", shared + SHARED_WINDOW)
        self._m2p: Any = ffi.cast("uint64_t *", KERNEL_WINDOW + M2P)
        self.boot = self.current = AddressSpace(self, (kernel.start.pt_base - VIRT_BASE) // PAGE_SIZE, None)
        self.boot.window, self.shown[0] = KERNEL_WINDOW, self.boot
        self._register(kernel)

    def _register(self, kernel: Kernel) -> None:
        """The handler of vector 14 (fault.c), and what it says where it cannot go on."""
        words = (
            f"page fault at guest address 0x{DIGITS}, error code 0x{DIGITS[:2]}, at instruction 0x{DIGITS}, outside an accessor"
        )
        message = SchedShutdown(int(ShutdownReason.CRASH), 1, words).encode(0)
        cr2, rip = message.index(DIGITS.encode()), message.rindex(DIGITS.encode())
        error = message.index(b"code 0x") + len(b"code 0x")
        start = kernel.start
        handler = lib.fault_handler(start.request_mqd, start.reply_mqd, message, len(message), cr2, error, rip, self._cr2)
        set_traps(kernel, {Vector.PAGE_FAULT: handler})

    def load(self, space: AddressSpace) -> None:
        """Make it current. The window that it gets may have been another's, which is shown no more."""
        self.queue.run((MmuextCommand.NEW_BASEPTR, self.memory.p2m[space.root], 0))
        space.window = self._window[0]
        number = (space.window - KERNEL_WINDOW) // SPACE_BYTES
        before = self.shown[number]
        if before is not None and before is not space:
            before.window = 0
        self.shown[number] = self.current = space

    def fault_of(self, error: int) -> Fault:
        """The fault that an access has just ended with."""
        self.faults += 1
        window, va = divmod(int(self._cr2[0]), SPACE_BYTES)
        space = self.shown[window]
        assert space is not None, f"a page fault in window {window}, which shows nothing"
        return Fault(space, va, bool(error & PF_PRESENT), bool(error & PF_WRITE), bool(error & PF_FETCH))

    def table(self, pfn: int) -> Any:
        """A page of ours as 512 entries."""
        return ffi.cast("uint64_t *", KERNEL_WINDOW + VIRT_BASE + pfn * PAGE_SIZE)

    def pfn_of(self, value: int) -> int:
        """What an entry names, by the M2P."""
        return int(self._m2p[(value & MFN_MASK) >> PAGE_SHIFT])


class AddressSpace:
    """One root. `window`: the host address of its address 0, or 0 while no window shows it."""

    def __init__(self, paging: Paging, root: int, handler: Handler | None) -> None:
        """For `create` and Paging: of a root that is one already."""
        self.paging, self.root, self.handler = paging, root, handler
        self.window = 0

    @classmethod
    def create(cls, kernel: Kernel, handler: Handler | None = None) -> AddressSpace:
        """An empty one, pinned. Raises MemoryError."""
        paging = kernel.space.paging
        root = paging.memory.alloc(1)
        paging.memory.show(root.pfns, TABLE)
        paging.queue.run((MmuextCommand.PIN_L3, paging.memory.p2m[root.pfn], 0))
        return cls(paging, root.pfn, handler)

    # ---- reading: what is in force

    def _l1(self, va: int) -> int:
        """The pfn of the L1 that `va` is in, or -1."""
        pfn = self.root
        for shift in (L3_SHIFT, L2_SHIFT):
            value = self.paging.table(pfn)[va >> shift & SLOTS]
            if not value & Pte.PRESENT:
                return -1
            pfn = self.paging.pfn_of(value)
        return pfn

    def lookup(self, va: int) -> int:
        """The entry of `va`, 0 where it has none."""
        pfn = self._l1(_checked(va))
        return 0 if pfn < 0 else int(self.paging.table(pfn)[va >> L1_SHIFT & SLOTS])

    def allows(self, va: int, write: bool = False, fetch: bool = False) -> bool:
        """Whether an access would go through. Tables above an L1 allow everything, here."""
        value = self.lookup(va)
        return bool(value & Pte.PRESENT) and (not write or bool(value & Pte.RW)) and not (fetch and value & Pte.NX)

    def tables(self) -> list[int]:
        """The pfns of all of its tables, the root first."""
        found, level = [self.root], [self.root]
        for _ in range(2):
            level = [child for pfn in level for _, child in self._below(pfn)]
            found += level
        return found

    def entries(self) -> Iterator[tuple[int, int]]:
        """(va, entry) of every page that is present, in order."""
        for top, l2 in self._below(self.root):
            for middle, l1 in self._below(l2):
                table = self.paging.table(l1)
                for slot in range(ENTRIES):
                    if table[slot] & Pte.PRESENT:
                        yield top << L3_SHIFT | middle << L2_SHIFT | slot << L1_SHIFT, int(table[slot])

    def _below(self, pfn: int) -> Iterator[tuple[int, int]]:
        """(slot, pfn) of the tables that an upper one names."""
        table = self.paging.table(pfn)
        for slot in range(ENTRIES):
            if table[slot] & Pte.PRESENT:
                yield slot, self.paging.pfn_of(table[slot])

    # ---- editing: collected until `flush`

    def put(self, va: int, value: int) -> None:
        """Any entry: of one that is not present every bit is ours. Makes the tables above it. Raises MemoryError, XenError."""
        pfn = self._l1(_checked(va))
        if pfn < 0:
            pfn = self._make_l1(va)
        self.paging.queue.put(self._entry_of(pfn, va, L1_SHIFT), value)

    def map(self, va: int, pfn: int, flags: int = DATA) -> None:
        """Show our frame `pfn` at `va`, in place of what was there."""
        self.put(va, entry(self.paging.memory.p2m[pfn], flags | Pte.PRESENT))

    def protect(self, va: int, flags: int) -> None:
        """What is in force at `va` gets other flags. Raises ValueError where nothing is."""
        value = self.lookup(va)
        if not value & Pte.PRESENT:
            raise ValueError(f"nothing is mapped at {va:#x}")
        self.put(va, value & MFN_MASK | flags | Pte.PRESENT)

    def unmap(self, va: int) -> None:
        """Nothing where nothing is."""
        if self._l1(_checked(va)) >= 0:
            self.put(va, 0)

    def flush(self) -> None:
        """What was asked for is in force, of all spaces. Raises XenError: an edit was refused, and those after it forgotten."""
        self.paging.queue.flush()

    def _make_l1(self, va: int) -> int:
        """The tables that are missing above `va`, empty, in force at once; the L1's pfn."""
        memory, queue, pfn = self.paging.memory, self.paging.queue, self.root
        for shift in (L3_SHIFT, L2_SHIFT):
            value = self.paging.table(pfn)[va >> shift & SLOTS]
            if value & Pte.PRESENT:
                pfn = self.paging.pfn_of(value)
                continue
            fresh = memory.alloc(1)
            memory.show(fresh.pfns, TABLE)
            queue.put(self._entry_of(pfn, va, shift), entry(memory.p2m[fresh.pfn], UPPER))
            queue.flush()
            pfn = fresh.pfn
        return pfn

    def _entry_of(self, pfn: int, va: int, shift: int) -> int:
        """Machine address of the entry of `va` in a table."""
        return self.paging.memory.p2m[pfn] << PAGE_SHIFT | (va >> shift & SLOTS) << 3

    # ---- being shown

    def switch(self) -> None:
        """Make it the current space: one hypercall, nothing is unmapped. None where it is."""
        self.flush()
        if self.paging.current is not self:
            self.paging.load(self)

    def destroy(self) -> None:
        """Its tables are pages like others again, and free. What it mapped is its makers'."""
        paging = self.paging
        assert self is not paging.boot, "the space that this kernel runs in"
        if paging.current is self:
            paging.boot.switch()
        tables = self.tables()
        paging.queue.run((MmuextCommand.UNPIN, paging.memory.p2m[self.root], 0))
        if self.window:
            paging.shown[(self.window - KERNEL_WINDOW) // SPACE_BYTES] = None
            self.window = 0
        paging.memory.show(tables, DATA)
        self.flush()
        for pfn in tables:
            paging.memory.free(Pages(pfn, 1, KERNEL_WINDOW + VIRT_BASE + pfn * PAGE_SIZE))

    def _shown(self) -> int:
        """The window. A space that lost its own is shown again, and the current one stays current."""
        self.flush()
        if not self.window:
            before = self.paging.current
            self.switch()
            before.switch()
        return self.window

    # ---- accesses

    async def read(self, va: int, size: int) -> bytes:
        """A copy of what is there. Raises PageFault, and what the handler raises."""
        buffer: Any = ffi.new("char[]", size)
        for at, count in _pages(va, size):
            while error := lib.gva_copy(buffer + (at - va), ffi.cast("void *", self._shown() + at), count):
                await self._handle(error)
        return bytes(ffi.buffer(buffer, size))

    async def write(self, va: int, data: bytes) -> None:
        """Page by page: where it raises, what came before is written. Raises as `read`."""
        source: Any = ffi.from_buffer(data)
        for at, count in _pages(va, len(data)):
            while error := lib.gva_copy(ffi.cast("void *", self._shown() + at), source + (at - va), count):
                await self._handle(error)

    async def _handle(self, error: int) -> None:
        """Have the handler make the access possible. No other task runs between its end and our next try."""
        fault = self.paging.fault_of(error)
        assert fault.space is self
        what = f"{'write' if fault.write else 'read'} at {fault.va:#x}"
        if self.handler is None:
            raise PageFault(f"{what}: the space has no handler")
        await self.handler(fault)
        self.flush()
        if not self.allows(fault.va, fault.write):
            raise PageFault(f"{what}: its handler did not map it")


def _checked(va: int) -> int:
    if not 0 <= va < HYPERVISOR_VIRT_START:
        raise ValueError(f"address {va:#x} is none of a guest's")
    return va


def _pages(va: int, size: int) -> Iterator[tuple[int, int]]:
    """(va, bytes) of what lies in one page each."""
    _checked(va)
    _checked(va + max(size, 1) - 1)
    while size:
        count = min(size, PAGE_SIZE - va % PAGE_SIZE)
        yield va, count
        va, size = va + count, size - count
