"""The kernel's own area in one program: its mappings, the words of it that the program may write, and where a program stands
that was stopped in there (fast.h, fast.c, sites.py).

Whenever the kernel runs, no program stands in the middle of a call that is served here: `place` has put it before or behind.
"""

from __future__ import annotations

import struct
from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Any

from domain import memory
from domain.posix import registers as r
from domain.posix.sites import CODE, DATA, END, THUNKS, Sites
from domain.posix.vma import FILES
from hypervisor.public.types import PAGE_SHIFT

if TYPE_CHECKING:
    from domain.posix.task import Task
    from domain.posix.windows import Window

FILE_BYTES = 1 << 20  # of a descriptor's window
IDS = struct.Struct("<7I")
SAVED_AT, RESULT_AT = 32, 152
SAVED = (r.RAX, r.RCX, r.RDI, r.RSI, r.RDX, r.R10, r.R8, r.R9, r.RSP, r.RBX, r.RBP, r.R12, r.R13, r.R14, r.R15)


class Low:
    """Raises Errno(ENOMEM). It ends with `leave`, and the flush after it."""

    def __init__(self, sites: Sites, table: Any) -> None:
        self.sites, self.table = sites, table
        self.data = sites.frames.alloc()
        self.windows: dict[int, Window] = {}  # by descriptor
        self._shown: set[int] = set()
        self._show(DATA >> PAGE_SHIFT, self.data)
        for page, pfn in sites.shared.items():
            self._show(page, pfn)
        if table.task is not None:
            self.shown(table.task)

    def leave(self) -> None:
        """What is the same in all programs stays in the tables."""
        self.take_back()
        self.table.unmap(DATA >> PAGE_SHIFT)
        self.sites.frames.drop_unmapped(self.data)

    def take_back(self) -> None:
        """All files that are lent."""
        for window in list(self.windows.values()):
            window.close()

    def _show(self, page: int, pfn: int) -> None:
        self.table.map(page, pfn, pfn == self.data, page >= CODE >> PAGE_SHIFT)
        self._shown.add(page)

    def fault(self, address: int) -> bool:
        """A page that the area got since this program was given it; False: it is not for this access."""
        if address >= FILES:
            window = self.windows.get((address - FILES) // FILE_BYTES)
            return window is not None and window.fault((address - FILES) % FILE_BYTES >> PAGE_SHIFT)
        page = address >> PAGE_SHIFT
        if page in self._shown or page not in self.sites.shared:
            return False
        self._show(page, self.sites.shared[page])
        return True

    def shown(self, task: Task) -> None:
        """This thread runs from now on; or something about it has changed."""
        p = task.process
        self.put(0, IDS.pack(p.pid, task.tid, p.ppid, p.uid, p.uid, p.gid, p.gid))

    def put(self, offset: int, data: bytes) -> None:
        memory.write(self.sites.frames.address(self.data) + offset, data)

    def get(self, offset: int, size: int) -> bytes:
        """What the program has made of it."""
        return memory.read(self.sites.frames.address(self.data) + offset, size)

    # ---- where a program stands

    def place(self, registers: MutableSequence[int]) -> bool:
        """Put a program that stands in the area back to its call site, or behind it; whether it was in a call that is served in
        C and had not happened yet. One that came there without a call gets registers of its own making, as by rt_sigreturn."""
        rip, image = registers[r.RIP], self.sites.image
        if not CODE <= rip < END:
            return False
        if rip >= THUNKS:
            site = self.sites.of_thunk(rip)
            registers[r.RIP] = site.own(rip) if site else rip
            return False
        happened = image.committed <= rip - CODE < image.end
        if rip - CODE >= image.saved:
            for register, word in zip(SAVED, struct.unpack(f"<{len(SAVED)}Q", self.get(SAVED_AT, 8 * len(SAVED))), strict=True):
                registers[register] = word
        back = registers[r.RCX]
        site = self.sites.of_thunk(back) if back < END else None
        if happened:
            (registers[r.RAX],) = struct.unpack("<Q", self.get(RESULT_AT, 8))
            registers[r.RIP] = site.own(back) if site else back
        else:
            registers[r.RIP] = site.address if site else back - 7 & r.WORD
        return not happened
