"""Page tables of programs in a real domain: what the hypervisor validates, copy on write through them, and their price."""

from __future__ import annotations

from tests.system.machine import Machine
from tests.system.test_paging import run

PROGRAM = '''
from domain.posix.frames import Frames, PageCache
from domain.posix.memory import Memory
from domain.posix.pagetable import UserTable
from domain.posix.space import Space
from hypervisor.public.layout import KERNEL_WINDOW, VIRT_BASE
from hypervisor.public.mmu import Pte


def entries(kernel, table):
    """(page, mfn, writable) of what the tables in force say, read directly."""
    found = set()
    paging = kernel.space.paging
    for top, l2 in [(i, paging.pfn_of(e)) for i, e in enumerate(paging.table(table.root)[0:512]) if e & 1]:
        for middle, l1 in [(i, paging.pfn_of(e)) for i, e in enumerate(paging.table(l2)[0:512]) if e & 1]:
            for slot, e in enumerate(paging.table(l1)[0:512]):
                if e & 1:
                    found.add((top << 18 | middle << 9 | slot, e >> 12 & (1 << 40) - 1, bool(e & Pte.RW)))
    return found


def agree(kernel, memory):
    p2m = kernel.memory.p2m
    return entries(kernel, memory.table) == {(page, p2m[v >> 2], bool(v & 1)) for page, v in memory.pages.items() if v & 2}


async def main(kernel):
    kernel.space
    before = kernel.memory.nr_free
    frames = Frames(kernel.memory, KERNEL_WINDOW + VIRT_BASE)
    parent = Memory(frames, PageCache(frames), UserTable(kernel, Space()))
    parent.map(0x400000, 64 * 4096, 7)
    high = parent.map(0, 1 << 20, 3)
    for at in range(0x400000, 0x440000, 65536):
        parent.copy_out(at, b"parent")
    parent.copy_out(high, b"parent")
    parent.flush()
    assert agree(kernel, parent)
    table = UserTable(kernel, Space())
    for turn in range(20):
        asked = kernel.memory.mmu.flushes
        child = parent.fork(table)
        child.flush()
        asked = kernel.memory.mmu.flushes - asked
        assert agree(kernel, parent) and agree(kernel, child)
        child.copy_out(0x400000, b"child!")
        child.flush()
        assert agree(kernel, child) and parent.copy_in(0x400000, 6) == b"parent"
        child.clear()
        parent.copy_out(0x400000, b"parent")
        parent.flush()
        assert agree(kernel, parent) and not entries(kernel, table)
    print(f"{len(parent.pages)} pages, {asked} hypercalls a fork")
    parent.clear()
    parent.table.destroy()
    table.destroy()
    taken = frames.free - max(0, kernel.memory.nr_free - 64)  # free, but of the allocator of programs' frames
    print(f"{frames.used} frames held, {before - kernel.memory.nr_free - taken} lost")
    return 0
'''


def test_forks_through_validated_tables(host: Machine) -> None:
    path = host.work / "posix_tables.py"
    path.write_text(PROGRAM)
    code, text = run(host, path)
    assert code == 0, text
    assert "128 pages, 1 hypercalls a fork" in text, text
    assert "0 frames held, 0 lost" in text, text
