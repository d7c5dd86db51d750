"""A native kernel's ELF file: what is copied where, what is executable, where it is entered. Nothing is executed here."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from hypervisor.public.layout import KERNEL_PFN, VIRT_BASE
from hypervisor.public.types import PAGE_SIZE

MAGIC = b"\x7fELF\x02\x01\x01"  # 64-bit, little-endian, version 1
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM = struct.Struct("<IIQQQQQQ")
ET_EXEC, EM_X86_64, PT_LOAD, PF_X, PF_W = 2, 62, 1, 1, 2
FIRST = VIRT_BASE + KERNEL_PFN * PAGE_SIZE


class ElfError(ValueError):
    """Not a kernel we can load: one sentence."""


@dataclass(frozen=True)
class Segment:
    """Bytes for the frames from `pfn` on, `offset` bytes into the first; `pages` frames belong to it, zero-filled."""

    pfn: int
    offset: int
    pages: int
    data: bytes
    executable: bool


@dataclass(frozen=True)
class Elf:
    """Segments in order of address, no two in one frame; exactly one is executable. `entry` is guest-virtual."""

    entry: int
    segments: tuple[Segment, ...]

    @property
    def text(self) -> Segment:
        return next(s for s in self.segments if s.executable)

    @property
    def end_pfn(self) -> int:
        """The first frame after the image."""
        return max(s.pfn + s.pages for s in self.segments)


def parse(file: bytes) -> Elf:
    """Raises ElfError."""
    if len(file) < HEADER.size or not file.startswith(MAGIC):
        raise ElfError("not a 64-bit little-endian ELF file")
    _, kind, machine, _, entry, offset, _, _, _, size, count, _, _, _ = HEADER.unpack_from(file)
    if (kind, machine) != (ET_EXEC, EM_X86_64):
        raise ElfError("not an x86-64 executable linked at fixed addresses")
    if size != PROGRAM.size or offset + count * size > len(file):
        raise ElfError("its program headers lie outside the file")
    segments = []
    for i in range(count):
        segment = _segment(file, PROGRAM.unpack_from(file, offset + i * size))
        if segment is not None:
            segments.append(segment)
    segments.sort(key=lambda s: s.pfn)
    for before, after in itertools.pairwise(segments):
        if before.pfn + before.pages > after.pfn:
            raise ElfError("two segments share a frame: link with -z separate-code or align them to pages")
    if sum(s.executable for s in segments) != 1:
        raise ElfError("a kernel has exactly one executable segment")
    return Elf(entry, tuple(segments))


def _segment(file: bytes, header: tuple[int, ...]) -> Segment | None:
    kind, flags, offset, va, _, in_file, in_memory, _ = header
    if kind != PT_LOAD or not in_memory:
        return None
    if in_file > in_memory or offset + in_file > len(file):
        raise ElfError("a segment lies outside the file")
    if va < FIRST or va + in_memory > 1 << 39:
        raise ElfError(f"a segment at {va:#x}: kernels are linked at {FIRST:#x} and above")
    if flags & PF_X and flags & PF_W:
        raise ElfError("a segment is both writable and executable")
    first = (va - VIRT_BASE) // PAGE_SIZE
    pages = (va + in_memory - VIRT_BASE + PAGE_SIZE - 1) // PAGE_SIZE - first
    return Segment(first, va % PAGE_SIZE, pages, file[offset : offset + in_file], bool(flags & PF_X))
