"""The vDSO: a page of code that every program has (vdso.c), behind the page of the domain's time record.

Both are private mappings of one page whose frame everybody shares. The record's is the domain's shared_info: it is held once
more than anybody maps it, so that no entry with it is ever writable, and who makes the page writable gets a copy, which stands
still.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from domain.posix.vma import PROT_EXEC, PROT_READ
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.posix.frames import PageCache
    from domain.posix.memory import Memory

IMAGE = Path(__file__).with_name("linux-vdso.so.1").read_bytes()  # here: a kernel that is locked opens nothing
assert len(IMAGE) <= PAGE_SIZE


class Page:
    """A file of one page, as the page cache and /proc see it."""

    size, generation, number = PAGE_SIZE, 0, 0

    def __init__(self, label: bytes, content: bytes = b"") -> None:
        self.label, self._content = label, content

    def read(self, offset: int, count: int) -> bytes:
        return self._content[offset : offset + count]

    def adopt(self, index: int, page: memoryview) -> None:
        """It has its bytes elsewhere, and they never change."""

    def at(self, index: int) -> None:
        return None

    def disown(self, index: int) -> None:
        raise AssertionError("it has adopted none")


class Vdso:
    """`record`: the pfn of the frame that has the time record at vcpu_time_info's place, for as long as the kernel runs."""

    def __init__(self, cache: PageCache, record: int) -> None:
        self._record, self._code = Page(b"[vvar]"), Page(b"[vdso]", IMAGE)
        cache.place(self._record, record)

    def map(self, memory: Memory, at: int) -> int:
        """Two pages at `at` of a program's space; where the second is, for AT_SYSINFO_EHDR. Filled at once: a C library looks
        at it before main. Raises Errno(ENOMEM)."""
        code = at + PAGE_SIZE
        memory.map(at, PAGE_SIZE, PROT_READ, file=self._record)
        memory.map(code, PAGE_SIZE, PROT_READ | PROT_EXEC, file=self._code)
        memory.fault(at, False)
        memory.fault(code, False)
        return code
