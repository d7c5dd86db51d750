"""The guest's page allocator against a set of numbers, over real memory where a kernel's window would be; and its balloon
against a hypervisor that is a few dictionaries."""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from domain import memory
from domain.memory import Memory, Pages
from hypervisor.public.boot_tables import DATA, FIRST_SLOT, boot_tables
from hypervisor.public.layout import KERNEL_WINDOW, VIRT_BASE
from hypervisor.public.memory import DecreaseReservation, PopulatePhysmap
from hypervisor.public.mmu import MFN_MASK, UPDATE, MmuUpdate
from hypervisor.public.types import INVALID_PFN, MAX_BATCH, PAGE_SIZE
from tests.conftest import NIGHTLY
from tests.models.kernel import mapped

IMAGE, NR, ROOM = 12, 1400, 1600  # pages before the boot tables, pages that have a frame, pfns
TABLES = boot_tables(IMAGE, ROOM)
FIRST = TABLES.tables.stop + 2  # after the pages for arrays
SMALL = FIRST + 88  # pages, for what is played against a set
STEPS = 100_000 if NIGHTLY else 10_000
BASE = KERNEL_WINDOW + VIRT_BASE


@pytest.fixture(scope="module", autouse=True)
def window() -> Iterator[None]:
    """A reservation of ROOM pages at the address where a domain has its own."""
    with mapped(BASE, ROOM * PAGE_SIZE):
        yield


class Machine:
    """What the hypervisor does to a domain's frames: which it owns, and what its boot L1 entries say."""

    def __init__(self, nr: int = NR, most: int = ROOM) -> None:
        self.owned = {1000 + 2 * pfn: pfn for pfn in range(nr)}
        self.entries = {self.entry_of(pfn): mfn << 12 | DATA for mfn, pfn in self.owned.items()}
        self.most, self.fresh, self.calls = most, 50_000, list[str]()

    @staticmethod
    def entry_of(pfn: int) -> int:
        first_l1 = TABLES.tables.start + 1 + TABLES.nr_l2
        table, slot = divmod(FIRST_SLOT + pfn, 512)
        return (1000 + 2 * (first_l1 + table)) << 12 | slot * 8

    def __call__(self, call: Any) -> int:
        self.calls.append(type(call).__name__)
        assert call.count <= MAX_BATCH
        at = KERNEL_WINDOW + call.address
        if isinstance(call, MmuUpdate):
            for entry, value in UPDATE.iter_unpack(memory.read(at, call.count * 16)):
                assert entry in ENTRIES and (not value or (value & MFN_MASK) >> 12 in self.owned)
                self.entries[entry] = value
            return call.count
        array_ = struct.unpack(f"<{call.count}Q", memory.read(at, 8 * call.count))
        if isinstance(call, DecreaseReservation):
            mapped = {(value & MFN_MASK) >> 12 for value in self.entries.values()}
            for mfn in array_:
                assert mfn not in mapped, "a frame leaves that an entry shows"
                del self.owned[mfn]
            return call.count
        assert isinstance(call, PopulatePhysmap)
        got = array_[: max(0, self.most - len(self.owned))]
        for i, pfn in enumerate(got):
            self.fresh += 3
            self.owned[self.fresh] = pfn
            memory.write(at + 8 * i, self.fresh.to_bytes(8, "little"))
        return len(got)

    def agrees(self, mine: Memory) -> None:
        """The p2m names what is owned, and all of that is shown, at its place."""
        p2m = {mfn: pfn for pfn, mfn in enumerate(mine.p2m) if mfn != INVALID_PFN}
        assert p2m == self.owned and mine.nr_pages == len(p2m) == ROOM - mine.nr_holes
        shown = {entry: value for entry, value in self.entries.items() if value}
        assert shown == {self.entry_of(pfn): mfn << 12 | DATA for mfn, pfn in p2m.items()}


ENTRIES = {Machine.entry_of(pfn) for pfn in range(ROOM)}


def new(kind: type[Memory] = Memory, machine: Machine | None = None, nr: int = NR) -> Memory:
    """A kernel's memory at start."""
    p2m = array("Q", [1000 + 2 * pfn for pfn in range(nr)] + [INVALID_PFN] * (ROOM - nr))
    return kind(machine or Machine(nr), nr, p2m, TABLES)


def test_pages_are_contiguous_and_zero() -> None:
    allocator = new()
    pages = allocator.alloc(3)
    assert list(pages.pfns) == [FIRST, FIRST + 1, FIRST + 2] and pages.va == VIRT_BASE + FIRST * PAGE_SIZE
    assert allocator.nr_free == NR - FIRST - 3
    memory.write(pages.address, b"\xff" * 3 * PAGE_SIZE)
    allocator.free(pages)
    assert memory.read(allocator.alloc(3).address, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)


def test_copies_are_copies() -> None:
    pages = new().alloc()
    memory.write(pages.address + 5, memoryview(b"hello"))
    copy = memory.read(pages.address, 12)
    memory.zero(pages.address, PAGE_SIZE)
    assert copy == b"\0\0\0\0\0hello\0\0" and memory.read(pages.address, 12) == bytes(12)


def test_too_much_is_a_memory_error_that_says_what_is_left() -> None:
    allocator = new()
    taken = [allocator.alloc(8) for _ in range(allocator.nr_free // 8)]
    if allocator.nr_free:
        allocator.alloc(allocator.nr_free)
    with pytest.raises(MemoryError, match="1 contiguous pages of 1400; 0 are free"):
        allocator.alloc()
    for pages in taken[:12:2]:
        allocator.free(pages)
    with pytest.raises(MemoryError, match="9 contiguous pages of 1400; 48 are free"):
        allocator.alloc(9)


def test_a_double_free_is_ours_and_loud() -> None:
    allocator = new()
    first, second = allocator.alloc(4), allocator.alloc(4)
    allocator.free(first)
    for pages in (first, Pages(first.pfn + 3, 2, 0)):
        with pytest.raises(AssertionError, match="freed twice"):
            allocator.free(pages)
    allocator.free(second)
    assert allocator.alloc(NR - FIRST).pfn == FIRST, "everything is one extent again"


def play(allocator: Memory, steps: int) -> None:
    """Allocate and free; what is free is a set of numbers."""
    rng, free, held = random.Random(10), set(range(FIRST, SMALL)), list[Pages]()
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
    play(new(nr=SMALL), STEPS)


class Fragments(Memory):
    """Does not join what lies together."""

    def free(self, pages: Pages) -> None:
        self._free.runs = sorted([*self._free.runs, (pages.pfn, pages.nr)])


class Leaks(Memory):
    """Forgets what is left of an extent it took from."""

    def alloc(self, nr: int = 1) -> Pages:
        pages = super().alloc(nr)
        self._free.runs = [(pfn, n) for pfn, n in self._free.runs if pfn != pages.pfn + nr or n > 1]
        return pages


@pytest.mark.parametrize("kind", [Fragments, Leaks])
def test_the_long_run_finds_a_seeded_defect(kind: type[Memory]) -> None:
    with pytest.raises(AssertionError):
        play(new(kind, nr=SMALL), STEPS)


def test_pages_that_are_not_zeroed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "zero", lambda address, size: None)
    with pytest.raises(AssertionError, match="not zero"):
        play(new(nr=SMALL), STEPS)


# ---- the balloon


def test_pages_go_and_come_back() -> None:
    machine = Machine()
    mine = new(machine=machine)
    kept = mine.alloc(5)
    free = mine.nr_free
    assert mine.release(700) == 700 and mine.nr_free == free - 700 and mine.nr_holes == ROOM - NR + 700
    assert machine.calls == ["MmuUpdate", "DecreaseReservation"] * 2
    machine.agrees(mine)
    assert all(mine.p2m[pfn] != INVALID_PFN for pfn in kept.pfns)

    machine.calls.clear()
    assert mine.obtain(700) == 700 and mine.nr_free == free and machine.calls == ["PopulatePhysmap", "MmuUpdate"] * 2
    machine.agrees(mine)
    assert mine.alloc(free).nr == free, "they lie together again"


def test_no_more_goes_than_is_free_and_no_more_comes_than_there_are_pfns() -> None:
    machine = Machine()
    mine = new(machine=machine)
    mine.alloc(10)
    free = mine.nr_free
    assert mine.release(10_000) == free and mine.nr_free == 0 and mine.release(1) == 0
    machine.agrees(mine)
    assert mine.obtain(10_000) == ROOM - NR + free and mine.nr_holes == 0 and mine.obtain(1) == 0
    machine.agrees(mine)


def test_the_machine_gives_as_much_as_it_has() -> None:
    machine = Machine(most=NR + 7)
    mine = new(machine=machine)
    assert mine.obtain(100) == 7 and mine.obtain(100) == 0 and mine.nr_pages == NR + 7
    machine.agrees(mine)


def test_a_page_in_use_that_is_free_here_is_ours_and_loud() -> None:
    class Stubborn(Machine):
        def __call__(self, call: Any) -> int:
            return 3 if isinstance(call, DecreaseReservation) else super().__call__(call)

    with pytest.raises(AssertionError, match="is free here, and in use"):
        new(machine=Stubborn()).release(10)


def test_a_balloon_that_plays() -> None:
    machine, rng = Machine(), random.Random(4)
    mine, held = new(machine=machine), list[Pages]()
    for _ in range(STEPS // 100):
        what, nr = rng.choice(("alloc", "free", "release", "obtain")), rng.randrange(1, 60)
        if what == "alloc" and mine.nr_free > 100:
            held.append(mine.alloc(rng.randrange(1, 8)))
        elif what == "free" and held:
            mine.free(held.pop(rng.randrange(len(held))))
        elif what == "release":
            mine.release(nr)
        elif what == "obtain":
            mine.obtain(nr)
        machine.agrees(mine)
    assert all(mine.p2m[pfn] != INVALID_PFN for pages in held for pfn in pages.pfns)
