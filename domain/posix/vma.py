"""The areas of an address space: what a program may touch, before and after there are frames behind it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypervisor.public.types import PAGE_SIZE

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
USER_START, FILES = 0x10_0000, 0x7F_F800_0000  # below and above what is the program's: fast.h
USER_END = STACK_TOP = FILES
STACK_BYTES = 8 << 20
MMAP_TOP = STACK_TOP - STACK_BYTES - (1 << 20)  # mappings grow down from here
NEAR_END = 0x200_0000  # thunks reach text below (sites.py)
PIE_BASE = 0x55_5500_0000


def page_up(size: int) -> int:
    return size + PAGE_SIZE - 1 & -PAGE_SIZE


@dataclass(slots=True)
class Vma:
    """[start, end), whole pages, all alike. `file`: the inode whose bytes from `offset` on are at `start`; None: zeroes."""

    start: int
    end: int
    prot: int
    shared: bool = False
    file: Any = None
    offset: int = 0
    around: int = 16  # pages that one fault fills
    reach: int = 16  # as many, of the last one
    ahead: int = 0  # the page after them: a fault there fills twice as many

    def continues(self, other: Vma) -> bool:
        """Whether `other`, which starts where we end, is more of the same."""
        return (
            self.file is None and other.file is None and not self.shared and not other.shared
            and self.prot == other.prot and self.around == other.around
        )  # fmt: skip


class Areas:
    """Vmas in order of address, none over another."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._vmas: list[Vma] = []

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._vmas)

    def __len__(self) -> int:
        return len(self._vmas)

    def find(self, address: int) -> Vma | None:
        i = bisect.bisect_right(self._starts, address) - 1
        return self._vmas[i] if i >= 0 and address < self._vmas[i].end else None

    def insert(self, vma: Vma) -> None:
        """A new one, where nothing is."""
        i = bisect.bisect_right(self._starts, vma.start)
        if i and self._vmas[i - 1].end == vma.start and self._vmas[i - 1].continues(vma):
            vma.start = self._vmas[i - 1].start
            i -= 1
            del self._vmas[i], self._starts[i]
        if i < len(self._vmas) and self._vmas[i].start == vma.end and vma.continues(self._vmas[i]):
            vma.end = self._vmas[i].end
            del self._vmas[i], self._starts[i]
        self._vmas.insert(i, vma)
        self._starts.insert(i, vma.start)

    def overlapping(self, start: int, end: int) -> list[Vma]:
        i = max(0, bisect.bisect_right(self._starts, start) - 1)
        found = []
        while i < len(self._vmas) and self._vmas[i].start < end:
            if self._vmas[i].end > start:
                found.append(self._vmas[i])
            i += 1
        return found

    def carve(self, start: int, end: int) -> list[Vma]:
        """Take out what lies in [start, end), splitting at its edges; the parts taken out."""
        taken = []
        for vma in self.overlapping(start, end):
            i = bisect.bisect_left(self._starts, vma.start)
            del self._vmas[i], self._starts[i]
            for piece_start, piece_end in ((vma.start, start), (end, vma.end)):
                if piece_start < piece_end:
                    piece = self.part(vma, piece_start, piece_end)
                    j = bisect.bisect_right(self._starts, piece.start)
                    self._vmas.insert(j, piece)
                    self._starts.insert(j, piece.start)
            taken.append(self.part(vma, max(start, vma.start), min(end, vma.end)))
        return taken

    @staticmethod
    def part(vma: Vma, start: int, end: int) -> Vma:
        return replace(vma, start=start, end=end, offset=vma.offset + start - vma.start if vma.file is not None else 0)

    def gap(self, size: int, top: int = MMAP_TOP) -> int | None:
        """The highest place below `top` where `size` bytes are free."""
        end = top
        for vma in reversed(self._vmas):
            if vma.start >= end:
                continue
            if vma.end + size <= end:
                break
            end = min(end, vma.start)
        return end - size if end - size >= USER_START else None

    def size(self) -> int:
        """Bytes in all."""
        return sum(vma.end - vma.start for vma in self._vmas)

    def copy(self) -> Areas:
        other = Areas()
        other._starts = list(self._starts)
        other._vmas = [Vma(v.start, v.end, v.prot, v.shared, v.file, v.offset, v.around) for v in self._vmas]
        return other
