"""The guest's page allocator against a set of numbers, over real memory where a kernel's window would be."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator

import pytest

from domain import memory
from domain.memory import Memory, Pages
from hypervisor.public.layout import KERNEL_WINDOW, VIRT_BASE
from hypervisor.public.types import PAGE_SIZE
from tests.conftest import NIGHTLY

FIRST, NR = 12, 100
STEPS = 100_000 if NIGHTLY else 10_000
MAP_FIXED_NOREPLACE = 0x100000
BASE = KERNEL_WINDOW + VIRT_BASE


@pytest.fixture(scope="module", autouse=True)
def window() -> Iterator[None]:
    """A reservation of NR pages at the address where a domain has its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mmap.argtypes = None
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    at = libc.mmap(BASE, NR * PAGE_SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert at == BASE, "the window's address is taken"
    yield
    libc.munmap(BASE, NR * PAGE_SIZE)


def test_pages_are_contiguous_and_zero() -> None:
    allocator = Memory(FIRST, NR)
    pages = allocator.alloc(3)
    assert list(pages.pfns) == [12, 13, 14] and pages.va == VIRT_BASE + 12 * PAGE_SIZE and allocator.nr_free == NR - FIRST - 3
    memory.write(pages.address, b"\xff" * 3 * PAGE_SIZE)
    allocator.free(pages)
    assert memory.read(allocator.alloc(3).address, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)


def test_copies_are_copies() -> None:
    pages = Memory(FIRST, NR).alloc()
    memory.write(pages.address + 5, memoryview(b"hello"))
    copy = memory.read(pages.address, 12)
    memory.zero(pages.address, PAGE_SIZE)
    assert copy == b"\0\0\0\0\0hello\0\0" and memory.read(pages.address, 12) == bytes(12)


def test_too_much_is_a_memory_error_that_says_what_is_left() -> None:
    allocator = Memory(FIRST, NR)
    taken = [allocator.alloc(8) for _ in range(11)]
    with pytest.raises(MemoryError, match="1 contiguous pages of 100; 0 are free"):
        allocator.alloc()
    for pages in taken[::2]:
        allocator.free(pages)
    with pytest.raises(MemoryError, match="9 contiguous pages of 100; 48 are free"):
        allocator.alloc(9)


def test_a_double_free_is_ours_and_loud() -> None:
    allocator = Memory(FIRST, NR)
    first, second = allocator.alloc(4), allocator.alloc(4)
    allocator.free(first)
    for pages in (first, Pages(first.pfn + 3, 2, 0)):
        with pytest.raises(AssertionError, match="freed twice"):
            allocator.free(pages)
    allocator.free(second)
    assert allocator.alloc(NR - FIRST).pfn == FIRST, "everything is one extent again"


def play(allocator: Memory, steps: int) -> None:
    """Allocate and free; what is free is a set of numbers."""
    rng, free, held = random.Random(10), set(range(FIRST, NR)), list[Pages]()
    for _ in range(steps):
        if rng.random() < 0.55:
            nr = rng.choice((1, 1, 2, 3, 8, 20))
            fits = [p for p in sorted(free) if all(p + i in free for i in range(nr))]
            try:
                pages = allocator.alloc(nr)
            except MemoryError:
                assert not fits, f"{nr} pages fit at {fits[0]}"
                continue
            assert pages.pfn == fits[0], "not the first fit"
            assert memory.read(pages.address, nr * PAGE_SIZE) == bytes(nr * PAGE_SIZE), "not zero"
            memory.write(pages.address, bytes([rng.randrange(1, 256)]) * 64)
            free -= set(pages.pfns)
            held.append(pages)
        elif held:
            pages = held.pop(rng.randrange(len(held)))
            allocator.free(pages)
            free |= set(pages.pfns)
        assert allocator.nr_free == len(free)


def test_a_long_run_agrees_with_the_model() -> None:
    play(Memory(FIRST, NR), STEPS)


class Fragments(Memory):
    """Does not join what lies together."""

    def free(self, pages: Pages) -> None:
        self._free = sorted([*self._free, (pages.pfn, pages.nr)])


class Leaks(Memory):
    """Forgets what is left of an extent it took from."""

    def alloc(self, nr: int = 1) -> Pages:
        pages = super().alloc(nr)
        self._free = [(pfn, n) for pfn, n in self._free if pfn != pages.pfn + nr or n > 1]
        return pages


@pytest.mark.parametrize("kind", [Fragments, Leaks])
def test_the_long_run_finds_a_seeded_defect(kind: type[Memory]) -> None:
    with pytest.raises(AssertionError):
        play(kind(FIRST, NR), STEPS)


def test_pages_that_are_not_zeroed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "zero", lambda address, size: None)
    with pytest.raises(AssertionError, match="not zero"):
        play(Memory(FIRST, NR), STEPS)
