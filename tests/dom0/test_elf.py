"""Native kernels as ELF files: what is loaded where, and every file that is refused, with the sentence why."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0 import elf
from dom0.elf import FIRST, HEADER, PROGRAM, ElfError
from hypervisor.public.layout import KERNEL_PFN, VIRT_BASE
from hypervisor.public.types import PAGE_SIZE

R, W, X = 4, 2, 1


@dataclass(frozen=True)
class Load:
    """A PT_LOAD header as a test writes it."""

    va: int
    data: bytes
    flags: int
    in_memory: int | None = None
    kind: int = 1
    offset: int | None = None
    in_file: int | None = None


TEXT = Load(FIRST, b"\x90" * 100, R | X)
DATA = Load(FIRST + 2 * PAGE_SIZE + 0x10, b"data" * 2000, R | W, 3 * PAGE_SIZE)


def build(
    *loads: Load, entry: int = FIRST + 4, magic: bytes = elf.MAGIC, kind: int = 2, machine: int = 62, size: int = 56
) -> bytes:
    """The file: header, program headers, bytes."""
    at = HEADER.size + len(loads) * PROGRAM.size
    headers, body = b"", b""
    for load in loads:
        offset = at + len(body) if load.offset is None else load.offset
        in_file = len(load.data) if load.in_file is None else load.in_file
        in_memory = in_file if load.in_memory is None else load.in_memory
        headers += PROGRAM.pack(load.kind, load.flags, offset, load.va, load.va, in_file, in_memory, PAGE_SIZE)
        body += load.data
    ident = magic.ljust(16, b"\0")
    return HEADER.pack(ident, kind, machine, 1, entry, HEADER.size, 0, 0, 64, size, len(loads), 0, 0, 0) + headers + body


def refusal(file: bytes) -> str:
    with pytest.raises(ElfError) as refused:
        elf.parse(file)
    return str(refused.value)


def test_segments_lie_where_they_were_linked() -> None:
    image = elf.parse(build(DATA, TEXT))
    assert image.entry == FIRST + 4
    text, data = image.segments
    assert image.text is text and (text.pfn, text.offset, text.pages, text.executable) == (KERNEL_PFN, 0, 1, True)
    assert (data.pfn, data.offset, data.pages, data.executable) == (KERNEL_PFN + 2, 0x10, 4, False)
    assert (text.data, data.data) == (TEXT.data, DATA.data)
    assert image.end_pfn == KERNEL_PFN + 6


def test_what_is_no_load_and_what_is_empty_is_passed_over() -> None:
    note, empty = replace(TEXT, kind=4, va=0), replace(DATA, data=b"", in_memory=0)
    assert len(elf.parse(build(note, TEXT, empty)).segments) == 1


def test_a_segment_of_zeros_has_frames() -> None:
    bss = Load(FIRST + PAGE_SIZE, b"", R | W, 10 * PAGE_SIZE)
    assert elf.parse(build(TEXT, bss)).end_pfn == KERNEL_PFN + 11


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"", "not a 64-bit little-endian ELF file"),
        (b"\x7fELF", "not a 64-bit little-endian ELF file"),
        (build(TEXT, magic=b"\x7fELF\x01\x01\x01"), "not a 64-bit little-endian ELF file"),
        (build(TEXT, magic=b"\x7fELF\x02\x02\x01"), "not a 64-bit little-endian ELF file"),
        (build(TEXT, kind=3), "not an x86-64 executable linked at fixed addresses"),
        (build(TEXT, machine=183), "not an x86-64 executable linked at fixed addresses"),
        (build(TEXT, size=64), "its program headers lie outside the file"),
        (build(TEXT)[: HEADER.size + 10], "its program headers lie outside the file"),
        (build(TEXT)[:-1], "a segment lies outside the file"),
        (build(replace(TEXT, offset=1 << 60)), "a segment lies outside the file"),
        (build(replace(TEXT, in_file=200, in_memory=100)), "a segment lies outside the file"),
        (build(replace(TEXT, va=FIRST - 1)), "a segment at 0x10bfff: kernels are linked at 0x10c000 and above"),
        (build(replace(TEXT, va=0)), "a segment at 0x0"),
        (build(replace(TEXT, va=(1 << 39) - 50)), "a segment at 0x7fffffffce"),
        (build(replace(TEXT, in_memory=1 << 63)), "a segment at 0x10c000"),
        (build(replace(TEXT, flags=R | W | X)), "a segment is both writable and executable"),
        (build(TEXT, replace(DATA, va=FIRST + 200)), "two segments share a frame"),
        (build(TEXT, replace(TEXT, va=FIRST + PAGE_SIZE)), "a kernel has exactly one executable segment"),
        (build(DATA), "a kernel has exactly one executable segment"),
        (build(), "a kernel has exactly one executable segment"),
    ],
)
def test_every_refusal_says_why(file: bytes, why: str) -> None:
    assert why in refusal(file)


def test_the_first_address_is_the_kernel_s() -> None:
    assert FIRST == VIRT_BASE + KERNEL_PFN * PAGE_SIZE == 0x10C000
    assert (HEADER.size, PROGRAM.size) == (64, 56) == (struct.calcsize("<16sHHIQQQIHHHHHH"), struct.calcsize("<IIQQQQQQ"))


@given(st.binary(max_size=300), st.data())
def test_no_file_does_more_than_be_refused(noise: bytes, data: st.DataObject) -> None:
    """Any bytes, and a good file with any of its bytes changed; what is taken lies within its bounds."""
    good = bytearray(build(TEXT, DATA))
    for _ in range(data.draw(st.integers(0, 8))):
        good[data.draw(st.integers(0, 175))] = data.draw(st.integers(0, 255))
    for file in (noise, elf.MAGIC + noise, bytes(good)):
        try:
            image = elf.parse(file)
        except ElfError:
            continue
        within(image)


def within(image: elf.Elf) -> None:
    """What the builder relies on."""
    for segment in image.segments:
        assert segment.pfn >= KERNEL_PFN and segment.offset + len(segment.data) <= segment.pages * PAGE_SIZE
    assert sum(segment.executable for segment in image.segments) == 1


def test_a_parser_that_takes_any_address_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded defect: the lowest address is not checked. The segment would overwrite the grant table."""
    monkeypatch.setattr(elf, "FIRST", 0)
    with pytest.raises(AssertionError):
        within(elf.parse(build(replace(TEXT, va=FIRST - PAGE_SIZE))))
