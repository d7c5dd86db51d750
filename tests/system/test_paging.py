"""Address spaces in a domain: the programs that show what they are for, switches, direct reads, and what goes wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dom0.demo import PROGRAMS
from tests.conftest import NIGHTLY
from tests.system.machine import Guest, Machine, Refused, machine, until

SWITCHES = 10_000 if NIGHTLY else 1000
STEPS = 20_000 if NIGHTLY else 2000
SWAP_BYTES = 1 << 20


def run(host: Machine, program: str | Path, cmdline: str = "", **options: object) -> tuple[int, str]:
    """A program's exit code, and what it printed."""
    kernel = PROGRAMS / f"{program}.py" if isinstance(program, str) else program
    log = host.state / "console" / "pager.log"
    before = len(log.read_text()) if log.exists() else 0
    host.create("pager", kernel, memory=4, cmdline=cmdline, **options)  # type: ignore[arg-type]
    ended = host.wait("pager")
    assert ended.reason == "poweroff", ended.reason
    return ended.exit_code, log.read_text()[before:]


def changed(host: Machine, program: str, old: str, new: str) -> Path:
    """A program with a defect."""
    text = (PROGRAMS / f"{program}.py").read_text()
    assert text.count(old) == 1
    path = host.work / f"{program}-broken.py"
    path.write_text(text.replace(old, new))
    return path


def swap_disk(host: Machine) -> dict[str, object]:
    return {"disk": [{"name": "xvda", "image": str(host.disk("swap.img", SWAP_BYTES)), "mode": "w"}]}


# ---- the programs


def test_demand_zero(host: Machine) -> None:
    code, text = run(host, "demand_zero", "pages=512")
    assert code == 0, text
    assert "512 pages, 256 touched: 256 faults, 0 more when written and read again, 0 wrong" in text


def test_copy_on_write(host: Machine) -> None:
    """Of 60 pages the child writes to 30, the parent to 20, of which 10 are the child's old ones, and its own alone."""
    code, text = run(host, "copy_on_write", "pages=60")
    assert code == 0, text
    assert "40 pages copied, 10 given to their last user, 0 wrong" in text


def test_swap(host: Machine) -> None:
    code, text = run(host, "swap", "pages=192 frames=48", **swap_disk(host))
    assert code == 0, text
    assert "192 pages in 48 frames, 1500 touches and a last look at every page: 0 wrong" in text


DEFECTS = [
    ("demand_zero", "map(fault.page, frame.pfn)", "map(fault.page, min(frame.pfn for frame in self.frames.values()))"),
    ("copy_on_write", "parent.protect(va, SHARED)", "pass"),
    ("copy_on_write", "memory.write(own.address, memory.read(frame.address, PAGE_SIZE))", "pass"),
    ("swap", "await self._disk.write(self._sector(page), memory.read(frame.address, PAGE_SIZE))", "pass"),
    ("swap", "self._dirty.add(page)\n            space.protect", "space.protect"),
]


@pytest.mark.parametrize(("program", "old", "new"), DEFECTS)
def test_a_program_finds_a_defect_of_its_policy(host: Machine, program: str, old: str, new: str) -> None:
    code, text = run(host, changed(host, program, old, new), **(swap_disk(host) if program == "swap" else {}))
    assert code == 1, text


# ---- spaces by hand


def pager(host: Machine) -> Guest:
    """A guest with `space`, whose handler gives a fresh page, and `faults`, what it was told."""
    guest = host.guest("pager", memory=4)
    guest.do("""
    from domain.paging import AddressSpace, PageFault
    from hypervisor.public.mmu import Pte
    global AddressSpace, PageFault, Pte, space, faults, boot, paging, handler
    faults = []
    async def handler(fault):
        faults.append([fault.va, fault.present, fault.write])
        fault.space.map(fault.page, kernel.memory.alloc(1).pfn)
    boot, space = kernel.space, AddressSpace.create(kernel, handler)
    paging = boot.paging
    """)
    return guest


@pytest.fixture
def guest(host: Machine) -> Iterator[Guest]:
    """A test may end it."""
    guest = pager(host)
    yield guest
    if guest.row()["state"] != "dead":
        guest.destroy()


def batches(guest: Guest) -> int:
    """How often its monitor has slept, which it does once for each batch of host mappings."""
    processes = (psutil.Process(pid) for pid in guest.machine.ask("ledger")["processes"])
    monitor = next(process for process in processes if process.name() == f"{guest.name}/monitor")
    return int(monitor.num_ctx_switches().voluntary)


def test_switches_unmap_nothing(guest: Guest) -> None:
    """After the first touch an access faults neither to the kernel nor to the hypervisor, however often spaces change:
    each switch is one call, and nothing is mapped or unmapped."""
    guest.do("""
    global page
    page = kernel.memory.alloc(1)
    await space.write(0x1000, b'one')
    await boot.write(page.va, b'two')
    """)
    before = batches(guest)
    calls, told = guest.do(f"""
    calls = kernel.hypercall.count
    for i in range({SWITCHES}):
        space.switch()
        assert await space.read(0x1000, 3) == b'one'
        boot.switch()
        assert await boot.read(page.va, 3) == b'two'
    return kernel.hypercall.count - calls, paging.faults
    """)
    assert (calls, told) == (2 * SWITCHES, 1)
    assert batches(guest) == before, "something was mapped or unmapped"
    guest.do("space.unmap(0x1000); space.flush()")
    assert batches(guest) > before, "a batch counts"


def test_tables_are_read_where_they_lie(guest: Guest) -> None:
    """Every page of the reservation, and of another space, without a call."""
    calls, own, other, pfn = guest.do("""
    pages = kernel.memory.alloc(2)
    space.map(0x5000, pages.pfn)
    space.map(0x40_0000_0000, pages.pfn + 1, Pte.NX)
    space.flush()
    calls = kernel.hypercall.count
    own = [[va, paging.pfn_of(value)] for va, value in boot.entries()]
    other = [[va, paging.pfn_of(value), bool(value & Pte.RW)] for va, value in space.entries()]
    assert boot.lookup(0) == boot.lookup(0x7F_0000_0000) == space.lookup(0x6000) == 0
    return kernel.hypercall.count - calls, own, other, pages.pfn
    """)
    assert calls == 0
    assert own == [[0x10_0000 + pfn * 4096, pfn] for pfn in range(1024)]
    assert other == [[0x5000, pfn, True], [0x40_0000_0000, pfn + 1, False]]


def test_edits_go_in_one_batch(guest: Guest) -> None:
    """300 pages of one table: three calls make the tables, one maps; and a batch that is full goes by itself."""
    assert guest.do("""
    pages = kernel.memory.alloc(300)
    flushes = paging.queue.flushes
    for i, pfn in enumerate(pages.pfns):
        space.map(i * 4096, pfn)
    assert space.lookup(0) == 0, 'in force before it was flushed'
    space.flush()
    for i in range(300):
        space.unmap(i * 4096)
    for i, pfn in enumerate(pages.pfns):
        space.map(i * 4096, pfn)
    space.flush()
    return paging.queue.flushes - flushes, len(list(space.entries()))
    """) == [2 + 1 + 2, 300]


def test_a_handler_is_told_what_happened(guest: Guest) -> None:
    assert guest.do("""
    await space.read(0x1ffe, 4)
    space.protect(0x1000, Pte.NX)
    await space.write(0x1004, b'x')
    return faults
    """) == [[0x1FFE, False, False], [0x2000, False, False], [0x1004, True, True]]


def test_what_no_handler_mends_is_an_error(guest: Guest) -> None:
    guest.do("""
    async def idle(fault): pass
    global lazy
    lazy = AddressSpace.create(kernel, idle)
    """)
    for code, why in [
        ("await lazy.write(0x1000, b'x')", "PageFault: write at 0x1000: its handler did not map it"),
        ("await boot.read(0, 1)", "PageFault: read at 0x0: the space has no handler"),
        ("await space.read((1 << 39) - (64 << 20) - 1, 2)", "ValueError: address 0x7ffc000000 is none of a guest's"),
    ]:
        with pytest.raises(Refused) as refused:
            guest.do(code)
        assert str(refused.value) == why
    guest.do("lazy.destroy()")


def test_a_table_is_a_page_that_nobody_writes(guest: Guest) -> None:
    """The hypervisor refuses it, and the kernel's own view of it faults."""
    with pytest.raises(Refused, match="Invalid"):
        guest.do("space.map(0x1000, space.root); space.flush()")
    assert guest.do("va = layout.virt(space.root); return boot.allows(va), boot.allows(va, write=True)") == [True, False]
    reason = guest.dies("poke(WINDOW + layout.virt(space.root), 0)")
    assert reason.startswith("crash: page fault at guest address 0x") and "error code 0x07" in reason


def test_more_spaces_than_windows(guest: Guest) -> None:
    """Each keeps its own page at one address; who lost its window is shown again when it is read."""
    assert guest.do("""
    spaces = [AddressSpace.create(kernel, handler) for _ in range(20)]
    for i, each in enumerate(spaces):
        await each.write(0x1000, bytes([i]) * 4)
    shown = sum(1 for each in spaces if each.window)
    right = [await each.read(0x1000, 4) == bytes([i]) * 4 for i, each in enumerate(spaces)]
    for each in spaces:
        each.destroy()
    return shown, all(right), len(faults), paging.current is boot
    """) == [15, True, 20, True]


def test_a_space_gives_back_what_it_took(guest: Guest) -> None:
    """Its tables are pages again, that can be written and leave for the machine."""
    assert guest.do("""
    page = kernel.memory.alloc(1)
    free = kernel.memory.nr_free
    for i in range(30):
        other = AddressSpace.create(kernel)
        for va in (0, 0x4000_0000, 0x7F_0000_0000):
            other.map(va, page.pfn)
        other.switch()
        assert await other.read(0, 1) is not None
        other.destroy()
    left, mine = free - kernel.memory.nr_free, kernel.memory.nr_free
    return left, kernel.memory.release(mine) - mine, kernel.memory.obtain(mine) - mine
    """) == [0, 0, 0]
    guest.do("pages = kernel.memory.alloc(kernel.memory.nr_free); memory.write(pages.address, b'x' * 4096 * pages.nr)")


@pytest.mark.parametrize("before", ["", "kernel.evtchn.send(kernel.start.store_evtchn); "], ids=["", "answer to be taken"])
def test_a_fault_outside_an_accessor_ends_the_kernel_with_a_reason(guest: Guest, before: str) -> None:
    """Also while the answer to an event that was posted lies in the queue: it is not that to the last words."""
    reason = guest.dies(before + "memory.read(WINDOW + 0x2008, 1)")
    assert reason.startswith("crash: page fault at guest address 0x0000000000002008, error code 0x04, at instruction 0x0000")
    assert reason.endswith(", outside an accessor")


def test_what_is_read_is_what_the_tables_say(guest: Guest) -> None:
    """Spaces come and go, pages move between addresses, memory leaves and comes back. Every frame holds its own number, so
    that a host mapping that an edit left behind would show."""
    guest.do(f"""
    import random
    m, rng, said = kernel.memory, random.Random(5), {{}}
    pool = m.alloc(40)
    for pfn in pool.pfns:
        memory.write(WINDOW + layout.virt(pfn), pfn.to_bytes(4, 'little'))
    free = m.nr_free
    for step in range({STEPS}):
        what, each = rng.random(), rng.choice(list(said)) if said else None
        if each is None or what < 0.05 and len(said) < 18:
            said[AddressSpace.create(kernel)] = {{}}
        elif what < 0.08:
            each.destroy()
            del said[each]
        elif what < 0.12:
            assert m.obtain(m.release(rng.randrange(1, 200))) >= 0
        elif what < 0.5:
            va, pfn = rng.choice((0, 1, 2, 3, 511, 512, 1 << 18, 1 << 26)) * 4096, rng.choice(pool.pfns)
            each.map(va, pfn, rng.choice((0, Pte.RW)) | Pte.NX)
            said[each][va] = pfn
        elif said[each]:
            va = rng.choice(list(said[each]))
            if what < 0.6:
                each.unmap(va)
                del said[each][va]
            else:
                assert int.from_bytes(await each.read(va, 4), 'little') == said[each][va], 'another frame is there'
    for each, wanted in said.items():
        each.flush()
        assert {{va: paging.pfn_of(entry) for va, entry in each.entries()}} == wanted
        for va in (0, 4096):
            if va not in wanted:
                try:
                    await each.read(va, 1)
                except PageFault:
                    continue
                raise AssertionError('it was unmapped')
        each.destroy()
    assert m.nr_free == free
    """)


def test_a_hypervisor_that_does_not_follow_edits_is_noticed() -> None:
    with machine(seed="edits_are_not_followed") as host:
        guest = pager(host)
        with pytest.raises(Refused, match=r"another frame is there|it was unmapped"):
            test_what_is_read_is_what_the_tables_say(guest)


def test_a_hypervisor_that_flushes_at_switches_is_noticed() -> None:
    with machine(seed="switches_flush") as host, pytest.raises(AssertionError, match="mapped or unmapped"):
        test_switches_unmap_nothing(pager(host))


def test_killed_in_the_middle(host: Machine, guest: Guest) -> None:
    """Its frames come back, whatever they were: `balanced` counts."""
    guest.begin("""
    page = kernel.memory.alloc(1)
    while True:
        other = AddressSpace.create(kernel)
        other.map(0x1000, page.pfn)
        await other.write(0x1000, b'x')
        other.destroy()
        await kernel.store.write('data/rounds', 1)
    """)
    assert until(lambda: host.ask("store-read", path=f"/local/domain/{guest.domid}/data/rounds"))
    os.kill(guest.row()["pid"], signal.SIGKILL)
    assert guest.wait().reason == "SIGKILL: killed from outside"
