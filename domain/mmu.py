"""Page-table updates on their way: collected in the order they were asked for, handed over many a call.

    queue.put(entry, value)          `entry`: the machine address of a page-table entry
    queue.flush()                    all of them: one MmuUpdate for 512
    queue.run((command, mfn, 0))     extended operations, after what was put before them
"""

from __future__ import annotations

from array import array
from typing import Any

from domain._guest import ffi, lib
from hypervisor.public.layout import KERNEL_WINDOW
from hypervisor.public.mmu import EXT_OP, UPDATE, MmuextOp, MmuUpdate
from hypervisor.public.types import DOMID_SELF, MAX_BATCH, PAGE_SIZE

SCRATCH_PAGES = MAX_BATCH * UPDATE.size // PAGE_SIZE


class MmuQueue:
    """Nothing is in force before `flush`; whoever reads a table before it reads what was."""

    def __init__(self, hypercall: Any, scratch: int) -> None:
        """`scratch`: host address of SCRATCH_PAGES, for good, where the hypervisor reads what is asked."""
        self._hypercall, self._va = hypercall, scratch - KERNEL_WINDOW
        self.scratch: Any = ffi.cast("char *", scratch)
        self._updates = bytearray()
        self._posted = False  # a request lies in the scratch pages that may not have been read
        self.flushes = 0  # calls made

    def __len__(self) -> int:
        return len(self._updates) // UPDATE.size

    def put(self, entry: int, value: int) -> None:
        """A batch that is full goes at once. Raises as `flush`."""
        self._updates += UPDATE.pack(entry, value)
        if len(self) == MAX_BATCH:
            self.flush()

    def put_all(self, requests: array[int]) -> None:
        """As `put`, for pairs of words."""
        for at in range(0, len(requests), 2 * MAX_BATCH):
            part = requests[at : at + 2 * MAX_BATCH]
            if len(self) + len(part) // 2 > MAX_BATCH:
                self.flush()
            self._updates += part.tobytes()

    def flush(self) -> None:
        """Raises XenError: an update was refused. Those before it are in force, those after it are forgotten."""
        if self._updates:
            self._hypercall(self._request())
        else:
            self.settle()

    def post(self) -> None:
        """As `flush`, but waited for by `settle`, or by the next call."""
        if self._updates:
            self._hypercall.post(self._request())
            self._posted = True

    def settle(self) -> None:
        """What was posted is in force. Raises XenError, of a refusal."""
        if self._posted:
            self._posted = False
            self._hypercall.settle()

    def _request(self) -> MmuUpdate:
        """All of them, in the scratch pages."""
        updates, self._updates = self._updates, bytearray()
        self.flushes += 1
        self.give(bytes(updates))
        return MmuUpdate(self._va, len(updates) // UPDATE.size, 0, DOMID_SELF)

    def run(self, *operations: tuple[int, int, int]) -> None:
        """Extended operations: (MmuextCommand, arg1, arg2). Raises XenError, as `flush`."""
        self.flush()
        self.give(b"".join(EXT_OP.pack(*operation) for operation in operations))
        self._hypercall(MmuextOp(self._va, len(operations), 0, DOMID_SELF))

    # ---- the scratch pages, for other calls that name an array

    def give(self, array: bytes) -> int:
        """Put an array there; its guest-virtual address, until the next call."""
        self.settle()
        assert len(array) <= SCRATCH_PAGES * PAGE_SIZE, "longer than the scratch pages"
        lib.memory_copy(self.scratch, ffi.from_buffer(array), len(array))
        return self._va

    def take(self, size: int) -> bytes:
        """What the hypervisor wrote there."""
        return bytes(ffi.buffer(self.scratch, size))
