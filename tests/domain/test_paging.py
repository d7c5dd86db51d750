"""A guest's address spaces against a hypervisor that has the rules and nothing else (tests/models/kernel.py)."""

from __future__ import annotations

import random
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from domain import paging
from domain.paging import AddressSpace, Fault, PageFault, Paging
from hypervisor.public.boot_tables import DATA
from hypervisor.public.errors import Invalid
from hypervisor.public.layout import HYPERVISOR_VIRT_START, KERNEL_WINDOW, virt
from hypervisor.public.mmu import MFN_MASK, Pte
from hypervisor.public.types import PAGE_SIZE
from tests.conftest import NIGHTLY
from tests.models import kernel as model

STEPS = 10_000 if NIGHTLY else 1000


@pytest.fixture
def hv(monkeypatch: pytest.MonkeyPatch) -> Iterator[model.Hypervisor]:
    with model.window():
        hv = model.Hypervisor()
        monkeypatch.setattr(paging, "lib", hv)
        hv.kernel.space = Paging(hv.kernel).boot
        yield hv


def now(work: Coroutine[Any, Any, Any]) -> Any:
    """The value of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def shown(hv: model.Hypervisor, space: AddressSpace) -> dict[int, tuple[int, bool]]:
    """{va: (pfn, writable)}"""
    return {va: (space.paging.pfn_of(entry), bool(entry & Pte.RW)) for va, entry in space.entries()}


def test_the_boot_space_is_read_without_a_call(hv: model.Hypervisor) -> None:
    boot, tables = hv.kernel.space, set(hv.kernel.space.tables())
    hv.calls.clear()
    assert shown(hv, boot) == {virt(pfn): (pfn, pfn not in tables) for pfn in range(model.PAGES)}
    assert boot.allows(virt(3), write=True) and not boot.allows(virt(3), fetch=True) and not boot.allows(0)
    assert boot.lookup(virt(5)) & MFN_MASK == hv.mfns[5] << 12 and not hv.calls


def test_edits_are_in_force_when_they_are_flushed(hv: model.Hypervisor) -> None:
    space = AddressSpace.create(hv.kernel)
    page = hv.kernel.memory.alloc(2)
    space.map(0x1000, page.pfn)
    space.map(0x2000, page.pfn + 1, Pte.NX)
    assert shown(hv, space) == {}
    space.flush()
    assert shown(hv, space) == {0x1000: (page.pfn, True), 0x2000: (page.pfn + 1, False)}
    space.protect(0x1000, Pte.NX)
    space.put(0x2000, 77 << 9)
    space.unmap(0x3000)
    space.unmap(0x7F_0000_0000)
    assert space.lookup(0x7F_0000_0000) == 0
    space.flush()
    assert shown(hv, space) == {0x1000: (page.pfn, False)} and space.lookup(0x2000) == 77 << 9
    with pytest.raises(ValueError, match="nothing is mapped at 0x2000"):
        space.protect(0x2000, DATA)


def test_a_batch_that_is_full_goes_by_itself(hv: model.Hypervisor) -> None:
    space, page = AddressSpace.create(hv.kernel), hv.kernel.memory.alloc()
    space.map(0, page.pfn)
    space.flush()
    hv.calls.clear()
    for i in range(1024):
        space.put(i % 500 * PAGE_SIZE, i << 9)
    assert hv.calls == ["MmuUpdate"] * 2 and len(space.paging.queue) == 0


def test_a_refused_edit_is_raised_and_forgotten(hv: model.Hypervisor) -> None:
    space, page = AddressSpace.create(hv.kernel), hv.kernel.memory.alloc()
    space.map(0x1000, page.pfn)
    space.map(0x2000, space.root)
    space.map(0x3000, page.pfn)
    with pytest.raises(Invalid):
        space.flush()
    space.flush()
    assert set(shown(hv, space)) == {0x1000}


@pytest.mark.parametrize("va", [-1, HYPERVISOR_VIRT_START, 1 << 39])
def test_addresses_of_the_hypervisor_are_none(hv: model.Hypervisor, va: int) -> None:
    with pytest.raises(ValueError, match="none of a guest's"):
        hv.kernel.space.lookup(va)
    with pytest.raises(ValueError, match="none of a guest's"):
        now(hv.kernel.space.read(va - 1, 3))


def test_an_access_asks_its_handler_page_by_page(hv: model.Hypervisor) -> None:
    told = list[Fault]()

    async def handler(fault: Fault) -> None:
        told.append(fault)
        fault.space.map(fault.page, hv.kernel.memory.alloc().pfn, DATA if fault.write else Pte.NX)

    space = AddressSpace.create(hv.kernel, handler)
    now(space.write(0x1FFE, b"abcdefgh"))
    assert now(space.read(0x1FFC, 12)) == b"\0\0abcdefgh\0\0"
    assert now(space.read(0x5000, 0)) == b""
    assert now(space.read(0x7000, 1)) == b"\0"
    now(space.write(0x7004, b"x"))
    assert [(f.va, f.present, f.write) for f in told] == [
        (0x1FFE, False, True), (0x2000, False, True), (0x7000, False, False), (0x7004, True, True),
    ]  # fmt: skip
    assert all(fault.space is space for fault in told) and space.paging.faults == 4


def test_no_progress_is_a_page_fault(hv: model.Hypervisor) -> None:
    async def half(fault: Fault) -> None:
        fault.space.map(fault.page, hv.kernel.memory.alloc().pfn, Pte.NX)

    space = AddressSpace.create(hv.kernel, half)
    assert now(space.read(0x1000, 4)) == bytes(4)
    with pytest.raises(PageFault, match="write at 0x1002: its handler did not map it"):
        now(space.write(0x1002, b"x"))
    with pytest.raises(PageFault, match="read at 0x0: the space has no handler"):
        now(hv.kernel.space.read(0, 1))


def play(hv: model.Hypervisor, steps: int) -> None:
    """Spaces come and go, more of them than there are windows; what each shows is a dictionary."""
    rng, mine = random.Random(8), hv.kernel.memory
    pool = mine.alloc(16)
    free, spaces = mine.nr_free, dict[AddressSpace, dict[int, tuple[int, bool]]]()
    for step in range(steps):
        what, space = rng.random(), rng.choice(list(spaces)) if spaces else None
        if space is None or (what < 0.06 and len(spaces) < 20):
            spaces[AddressSpace.create(hv.kernel)] = {}
        elif what < 0.09:
            space.destroy()
            del spaces[space]
        elif what < 0.25:
            space.switch()
            assert hv.windows[(space.window - KERNEL_WINDOW) >> 39] == hv.mfns[space.root]
        elif what < 0.6:
            va = rng.choice((0, 5, 511, 512, 1 << 18, 1 << 26)) * PAGE_SIZE
            pfn, writable = rng.choice(pool.pfns), rng.random() < 0.5
            space.map(va, pfn, DATA if writable else Pte.NX)
            space.flush()
            spaces[space][va] = pfn, writable
        elif spaces[space]:
            va = rng.choice(list(spaces[space]))
            if what < 0.8:
                assert now(space.read(va + 7, 1)) == bytes(1)
            else:
                space.unmap(va)
                space.flush()
                del spaces[space][va]
        for each, wanted in spaces.items() if step % 50 == 0 else ():
            assert shown(hv, each) == wanted
            assert not each.window or hv.windows[(each.window - KERNEL_WINDOW) >> 39] == hv.mfns[each.root]
    for each in spaces:
        each.destroy()
    assert mine.nr_free == free and set(hv.level) == {hv.mfns[pfn] for pfn in hv.kernel.space.tables()}
    everything = mine.alloc(free)
    assert all(hv.kernel.space.allows(virt(pfn), write=True) for pfn in everything.pfns), "a page that is still read-only"


def test_a_long_run_agrees_with_the_model(hv: model.Hypervisor) -> None:
    play(hv, STEPS)


def forgets_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who loses its window to another does not learn of it."""

    def load(self: Paging, space: AddressSpace) -> None:
        self.queue.run((5, self.memory.p2m[space.root], 0))
        space.window, self.current = self._window[0], space
        self.shown[(space.window - KERNEL_WINDOW) >> 39] = space

    monkeypatch.setattr(Paging, "load", load)


def leaks_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dead space only the root comes back."""
    tables = AddressSpace.tables
    monkeypatch.setattr(AddressSpace, "tables", lambda self: tables(self)[:1])


def leaves_them_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "DATA", int(Pte.NX))


@pytest.mark.parametrize("defect", [forgets_windows, leaks_tables, leaves_them_read_only])
def test_the_long_run_finds_a_seeded_defect(hv: model.Hypervisor, monkeypatch: pytest.MonkeyPatch, defect: Any) -> None:
    defect(monkeypatch)
    with pytest.raises((AssertionError, PageFault, MemoryError)):
        play(hv, STEPS)
