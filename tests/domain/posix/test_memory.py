"""Address spaces of programs against a plain model: areas, frames, copy on write, and what comes back at the end."""

from __future__ import annotations

import errno
import random

import pytest

from domain.posix.accesses import ACCERR, BUSERR, MAPERR, OK
from domain.posix.errors import Errno
from domain.posix.frames import KEPT, TABLE_RESERVE, Frames, PageCache
from domain.posix.memory import Memory
from domain.posix.ramfs import RamFile, Ramfs
from domain.posix.space import Space
from domain.posix.spaces import Idle, Spaces
from domain.posix.vma import MMAP_TOP, Areas, Vma
from hypervisor.public.errors import NoSpace
from hypervisor.public.types import PAGE_SIZE
from tests.domain.posix.traced import Machine

BASE = 0x40_0000


class Table:
    """What is in force, as the hypervisor would have it."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[int, bool, bool]] = {}

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None:
        self.entries[page] = pfn, write, execute

    def map_all(self, pages: dict[int, int], execute: bool) -> None:
        for page, value in pages.items():
            self.map(page, value >> 2, bool(value & 1), execute) if value & 2 else self.unmap(page)

    def unmap(self, page: int) -> None:
        self.entries.pop(page, None)

    def clear(self) -> None:
        self.entries.clear()

    def flush(self) -> None:
        pass

    def expel(self) -> None:
        pass


class File:
    def __init__(self, data: bytes) -> None:
        self.data, self.generation = bytearray(data), 0

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self.data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data
        self.generation += 1

    def adopt(self, index: int, page: memoryview) -> None:
        pass

    def at(self, index: int) -> object:
        return None

    def disown(self, index: int) -> None:
        raise AssertionError("it has adopted none")


@pytest.fixture
def frames() -> Frames:
    machine = Machine(1024)
    return Frames(machine, machine.base)


@pytest.fixture
def memory(frames: Frames) -> Memory:
    return Memory(frames, PageCache(frames), Table())


def check(*spaces: Memory) -> None:
    """No frame that two spaces have is writable in either, unless its area is shared; every count is what is held."""
    held: dict[int, int] = {}
    for space in spaces:
        table: Table = space.table  # type: ignore[assignment]
        for pfn in space._leaving:
            held[pfn] = held.get(pfn, 0) + 1
        for page, value in space.pages.items():
            held[value >> 2] = held.get(value >> 2, 0) + 1
            vma = space.areas.find(page << 12)
            assert vma is not None, f"page {page:#x} lies in no area"
            entry = table.entries.get(page)
            assert (entry is not None) == bool(vma.prot)
            if entry and entry[1]:
                assert vma.prot & 2
                assert vma.shared or space.frames.references[value >> 2] == 1, f"{page:#x} is shared and writable"
    frames = spaces[0].frames
    for pages in spaces[0].cache._files.values():
        for pfn in pages[1].values():
            held[pfn] = held.get(pfn, 0) + 1
    assert held == frames.references


def test_a_fault_fills_the_pages_around(memory: Memory) -> None:
    memory.map(BASE, 64 * PAGE_SIZE, 3)
    assert memory.fault(BASE + 20 * PAGE_SIZE, write=True) == OK
    assert sorted(memory.pages) == [(BASE >> 12) + page for page in range(16, 32)]
    check(memory)


def test_pages_side_by_side_get_frames_side_by_side_again_and_again(memory: Memory) -> None:
    runs = set()
    for _ in range(3):
        memory.map(BASE, 32 * PAGE_SIZE, 3)
        for page in (20, 3):
            assert memory.fault(BASE + page * PAGE_SIZE, write=True) == OK
        for first in (0, 16):
            pfns = [memory.pages[(BASE >> 12) + first + page] >> 2 for page in range(16)]
            assert pfns == list(range(pfns[0], pfns[0] + 16))
            runs.add(pfns[0])
        memory.unmap(BASE, 32 * PAGE_SIZE)
        memory.flush()
    assert len(runs) == 2, "the same frames"


def test_what_a_fault_comes_to(memory: Memory) -> None:
    memory.map(BASE, PAGE_SIZE, 1)
    memory.map(BASE + PAGE_SIZE, 2 * PAGE_SIZE, 3, file=File(b"short"))
    assert memory.fault(BASE - 1, write=False) == MAPERR
    assert memory.fault(BASE, write=True) == ACCERR
    assert memory.fault(BASE, write=False, fetch=True) == ACCERR
    assert memory.fault(BASE + 2 * PAGE_SIZE, write=False) == BUSERR
    with pytest.raises(Errno) as error:
        memory.copy_out(BASE, b"x")
    assert error.value.number == errno.EFAULT


def test_fork_copies_what_is_written_and_nothing_else(memory: Memory, frames: Frames) -> None:
    memory.map(BASE, 16 * PAGE_SIZE, 3)
    memory.copy_out(BASE, b"parent" * 1000)
    before = frames.used
    child = memory.fork(Table())
    assert frames.used == before
    check(memory, child)
    child.copy_out(BASE, b"child")
    child.flush()
    assert memory.copy_in(BASE, 6) == b"parent" and child.copy_in(BASE, 6) == b"childt"
    assert frames.used == before + 1
    memory.copy_out(BASE, b"PARENT")  # the last one that has it: no copy
    assert frames.used == before + 1
    check(memory, child)
    child.clear()
    memory.clear()
    assert frames.used == 0


def test_a_shared_mapping_stays_shared_over_a_fork(memory: Memory) -> None:
    memory.map(BASE, PAGE_SIZE, 3, shared=True)
    memory.copy_out(BASE, b"one")
    child = memory.fork(Table())
    child.copy_out(BASE + 3, b"two")
    assert memory.copy_in(BASE, 7) == b"onetwo\0"


def test_a_file_that_changed_is_read_again(memory: Memory) -> None:
    file = File(b"old!")
    memory.map(BASE, PAGE_SIZE, 1, file=file)
    assert memory.copy_in(BASE, 4) == b"old!"
    file.write(0, b"new!")
    memory.map(BASE, PAGE_SIZE, 1, file=file)
    assert memory.copy_in(BASE, 4) == b"new!"
    check(memory)


def check_mappings_and_calls_see_one_file(memory: Memory, file: RamFile) -> None:
    """Two mappings, one of them made after the file grew, and read and write."""
    file.write(0, b"a" * PAGE_SIZE)
    memory.map(BASE, 2 * PAGE_SIZE, 3, shared=True, file=file)
    memory.copy_out(BASE, b"map")
    assert file.read(0, 4) == b"mapa"
    file.write(1, b"ILE")
    assert memory.copy_in(BASE, 5) == b"mILEa"
    file.truncate(2 * PAGE_SIZE)
    other = memory.fork(Table())
    other.map(BASE + 4 * PAGE_SIZE, 2 * PAGE_SIZE, 3, shared=True, file=file)
    other.copy_out(BASE + 5 * PAGE_SIZE, b"hole")
    other.copy_out(BASE + 4 * PAGE_SIZE, b"M")
    assert memory.copy_in(BASE, 4) == b"MILE" and memory.copy_in(BASE + PAGE_SIZE, 4) == b"hole"
    assert file.read(PAGE_SIZE, 5) == b"hole\0" and file.blocks == 16
    other.map(BASE + 8 * PAGE_SIZE, PAGE_SIZE, 3, file=file)
    file.write(0, b"new")
    assert other.copy_in(BASE + 8 * PAGE_SIZE, 4) == b"newE"  # private, and not written yet
    check(memory, other)
    other.clear()


def test_mappings_and_calls_see_one_file(memory: Memory, frames: Frames) -> None:
    fs = Ramfs(lambda: 0)
    file = fs.create(0o100644)
    assert isinstance(file, RamFile)
    check_mappings_and_calls_see_one_file(memory, file)
    memory.clear()
    assert memory.cache.shrink() == 2 and frames.used == 0
    assert file.read(0, 5) == b"newEa" and file.read(PAGE_SIZE, 4) == b"hole"
    memory.map(BASE, 2 * PAGE_SIZE, 3, shared=True, file=file)
    memory.copy_out(BASE, b"back")
    assert file.read(0, 5) == b"backa"
    file.punch(0, PAGE_SIZE)
    memory.map(BASE, PAGE_SIZE, 3, shared=True, file=file)
    assert memory.copy_in(BASE, 4) == bytes(4)
    memory.clear()
    del file  # the last that has it: its frames go with it
    assert frames.used == 0 and fs.used_pages == 0


def test_a_copy_instead_of_the_page_is_found(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: a file that keeps its bytes elsewhere."""
    monkeypatch.setattr(RamFile, "adopt", lambda self, index, page: None)
    file = Ramfs(lambda: 0).create(0o100644)
    assert isinstance(file, RamFile)
    with pytest.raises(AssertionError):
        check_mappings_and_calls_see_one_file(memory, file)


def test_programs_leave_the_kernel_what_its_tables_need() -> None:
    machine = Machine(TABLE_RESERVE + 10)
    small = Frames(machine, machine.base)
    memory = Memory(small, PageCache(small), Table())
    memory.map(BASE, 64 * PAGE_SIZE, 3)
    with pytest.raises(Errno) as error:
        for page in range(64):
            memory.copy_out(BASE + page * PAGE_SIZE, b"x")
    assert error.value.number == errno.ENOMEM
    assert machine.nr_free >= TABLE_RESERVE
    check(memory)


def test_frames_that_many_had_go_back_to_the_domain() -> None:
    """They are what page tables are made of."""
    machine = Machine(2 * KEPT)
    frames = Frames(machine, machine.base)
    memory = Memory(frames, PageCache(frames), Table())
    memory.map(BASE, KEPT + 300 << 12, 3)
    for page in range(KEPT + 300):
        memory.fault(BASE + (page << 12), write=True)
    left = machine.nr_free
    memory.clear()
    assert frames.used == 0 and machine.nr_free >= left + 300
    assert frames.free == machine.nr_free - TABLE_RESERVE + KEPT


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_is_what_a_plain_model_says(seed: int, frames: Frames) -> None:  # noqa: PLR0912, one game
    """A dict of bytes and protections a page is the model; two spaces, of which one is a fork now and then."""
    dice = random.Random(seed)
    spaces = [Memory(frames, PageCache(frames), Table())]
    models: list[dict[int, tuple[int, int]]] = [{}]  # page: (prot, first byte)
    for _ in range(600):
        which = dice.randrange(len(spaces))
        space, model = spaces[which], models[which]
        page, count = dice.randrange(24), dice.randrange(1, 9)
        at, size, span = BASE + page * PAGE_SIZE, count * PAGE_SIZE, range(page, page + count)
        match dice.choice("map unmap protect write write read fork exit discard".split()):
            case "map":
                prot = dice.choice((0, 1, 3, 5))
                space.map(at, size, prot)
                model.update(dict.fromkeys(span, (prot, 0)))
            case "unmap":
                space.unmap(at, size)
                for gone in span:
                    model.pop(gone, None)
            case "protect":
                prot = dice.choice((0, 1, 3))
                if all(p in model for p in span):
                    space.protect(at, size, prot)
                    model.update({p: (prot, model[p][1]) for p in span})
                else:
                    with pytest.raises(Errno):
                        space.protect(at, size, prot)
            case "write":
                value = dice.randrange(1, 256)
                if model.get(page, (0, 0))[0] & 2:
                    space.copy_out(at, bytes([value]))
                    model[page] = model[page][0], value
                else:
                    with pytest.raises(Errno):
                        space.copy_out(at, bytes([value]))
            case "read":
                if model.get(page, (0, 0))[0]:
                    assert space.copy_in(at, 1)[0] == model[page][1]
                else:
                    with pytest.raises(Errno):
                        space.copy_in(at, 1)
            case "fork" if len(spaces) < 3:
                spaces.append(space.fork(Table()))
                models.append(dict(model))
            case "exit" if len(spaces) > 1:
                spaces.pop(which).clear()
                models.pop(which)
            case "discard":
                space.discard(at, at + size)
                model.update({p: (model[p][0], 0) for p in span if p in model})
        check(*spaces)
    for space in spaces:
        space.clear()
    assert frames.used == 0


class Watched(Table):
    """Says which frames it showed when they were free: a program that only pretended to end would see what comes into them."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames, self.asked = frames, dict[int, tuple[int, bool, bool] | None]()

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None:
        self.asked[page] = pfn, write, execute

    def unmap(self, page: int) -> None:
        self.asked[page] = None

    def flush(self) -> None:
        assert all(pfn in self.frames.references for pfn, *_ in self.entries.values()), "a free frame is shown"
        self.entries |= {page: value for page, value in self.asked.items() if value}
        for page in [page for page, value in self.asked.items() if not value]:
            self.entries.pop(page, None)
        self.asked.clear()

    def clear(self) -> None:
        self.asked.clear()
        self.entries.clear()


def _lives(frames: Frames, turns: int) -> None:
    """Children that come and go in one table, each edited into what the last one left."""
    table, left = Watched(frames), dict[int, int]()
    parent = Memory(frames, PageCache(frames), Watched(frames))
    parent.map(BASE, 8 * PAGE_SIZE, 3)
    parent.copy_out(BASE, b"p" * 8 * PAGE_SIZE)
    parent.flush()
    for turn in range(turns):
        child = parent.fork(table, left)
        child.flush()
        parent.flush()
        assert child.copy_in(BASE, 8 * PAGE_SIZE) == parent.copy_in(BASE, 8 * PAGE_SIZE), "not the parent's memory"
        check(parent, child)
        assert {page: entry[0] for page, entry in table.entries.items()} == {p: v >> 2 for p, v in child.pages.items()}
        child.copy_out(BASE + turn % 8 * PAGE_SIZE, b"child")
        if turn % 3 == 0:
            child.map(BASE + (16 << 12), 4 * PAGE_SIZE, 3)
            child.copy_out(BASE + (16 << 12), b"secret" * 100)
        if turn % 4 == 0:
            child.unmap(BASE + PAGE_SIZE, PAGE_SIZE)
        child.flush()
        parent.copy_out(BASE + turn % 5 * PAGE_SIZE, bytes([turn]))
        parent.flush()
        left = child.leave()
    last = Memory(frames, parent.cache, table, left)  # an exec's: nothing of them is there
    last.map(BASE, 32 * PAGE_SIZE, 3)
    last.anticipate(BASE, BASE + 32 * PAGE_SIZE)
    last.flush()
    assert last.copy_in(BASE, 32 * PAGE_SIZE) == bytes(32 * PAGE_SIZE), "somebody else's memory"
    last.clear()
    parent.clear()
    assert frames.used == 0


def test_a_table_that_was_left_shows_the_next_program_and_nothing_else(frames: Frames) -> None:
    _lives(frames, 60)


@pytest.mark.parametrize("defect", ["falls at once", "is kept", "is not zeroed"])
def test_that_can_fail(frames: Frames, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: a frame that falls before its entry is gone; entries that stay; a former program's page given as it is."""
    if defect == "falls at once":
        monkeypatch.setattr(Memory, "_remove", lambda self, page: self.frames.drop(self.pages.pop(page) >> 2))
    elif defect == "is kept":
        monkeypatch.setattr(Watched, "unmap", lambda self, page: None)
    else:
        monkeypatch.setattr("domain.posix.memory.memory.zero", lambda address, size: None)
    with pytest.raises((AssertionError, KeyError)):
        _lives(frames, 60)


def test_mremap_moves_frames_and_not_bytes(memory: Memory, frames: Frames) -> None:
    memory.map(BASE, 2 * PAGE_SIZE, 3)
    memory.map(BASE + 2 * PAGE_SIZE, PAGE_SIZE, 1)
    memory.copy_out(BASE, b"kept")
    used = frames.used
    with pytest.raises(Errno):
        memory.remap(BASE, 2 * PAGE_SIZE, 4 * PAGE_SIZE, may_move=False)
    where = memory.remap(BASE, 2 * PAGE_SIZE, 4 * PAGE_SIZE, may_move=True)
    assert memory.copy_in(where, 4) == b"kept" and frames.used == used
    assert memory.fault(BASE, write=False) == MAPERR
    check(memory)


def test_gaps_are_found_from_the_top() -> None:
    areas = Areas()
    first = areas.gap(PAGE_SIZE)
    assert first == MMAP_TOP - PAGE_SIZE
    areas.insert(Vma(first, first + PAGE_SIZE, 3, file=File(b"")))
    areas.insert(Vma(first - 3 * PAGE_SIZE, first - 2 * PAGE_SIZE, 3))
    assert areas.gap(2 * PAGE_SIZE) == first - 2 * PAGE_SIZE
    assert areas.gap(3 * PAGE_SIZE) == first - 6 * PAGE_SIZE
    assert areas.gap(MMAP_TOP) is None


def test_a_file_that_nobody_has_is_not_kept_by_its_pages(memory: Memory, frames: Frames) -> None:
    """They stay in the cache as long as it has a name or a descriptor; without those, until its last mapping goes."""
    file = File(b"text" * 2 * PAGE_SIZE)
    memory.map(BASE, 4 * PAGE_SIZE, 1, file=file)
    memory.copy_in(BASE, 2 * PAGE_SIZE)
    memory.clear()
    assert frames.used, "a file that is there keeps its pages"
    memory.map(BASE, 4 * PAGE_SIZE, 1, file=file)
    memory.copy_in(BASE, 2 * PAGE_SIZE)
    del file
    check(memory)
    assert memory.copy_in(BASE + PAGE_SIZE, 4) == b"text"
    memory.clear()
    assert frames.used == 0 and not memory.cache._files


def test_a_space_that_is_refused_is_tried_again_by_whoever_forks(frames: Frames) -> None:
    """An idle one is taken instead; without one it is EAGAIN, and nothing is held."""

    def refuse() -> Space:
        raise NoSpace("128 applications")

    spaces = Spaces(frames, refuse)
    with pytest.raises(Errno) as error:
        spaces.take((1, True))
    assert error.value.number == errno.EAGAIN and frames.used == 0
    space = Space()
    space.clear = lambda: None  # type: ignore[method-assign]
    spaces.idle.append(Idle(space, {}, (2, False)))
    assert spaces.take((1, True)) == (space, {}) and not spaces.idle
