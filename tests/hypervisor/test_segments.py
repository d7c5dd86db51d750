"""Descriptor tables: which descriptors are good, which frames may hold them, and that nobody can write those frames."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from hypervisor import space
from hypervisor.domain import Domain
from hypervisor.public.boot_tables import DATA, TABLE
from hypervisor.public.errors import BadAddress, Invalid
from hypervisor.public.layout import KERNEL_PFN, virt
from hypervisor.public.memory import DecreaseReservation
from hypervisor.public.mmu import EXT_OP, UPDATE, MmuextCommand, MmuextOp, MmuUpdate
from hypervisor.public.segments import DESCRIPTORS, GDT_ENTRIES, GDT_FRAMES, SetGdt, UpdateDescriptor
from hypervisor.public.types import DOMID_SELF, PAGE_SHIFT
from tests.models.stand_in import SCRATCH, StandIn

PFN = KERNEL_PFN + 2  # the frame that becomes a table
S, P, CODE, WRITE, DOWN, LONG, BIG, PAGES = 1 << 44, 1 << 47, 1 << 43, 1 << 41, 1 << 42, 1 << 53, 1 << 54, 1 << 55
TOP = 0xFC00_0000  # where the top 64 MB of 4 GiB begin


def descriptor(bits: int, dpl: int = 1, base: int = 0, limit: int = 0xFBFFF) -> int:
    """Present and no system segment unless `bits` says otherwise."""
    return (
        bits ^ S ^ P | dpl << 45 | limit & 0xFFFF | (limit >> 16) << 48 | (base & 0xFFFFFF) << 16 | (base >> 24) << 56
    )


FLAT = descriptor(WRITE | BIG | PAGES)  # data of ring 1, from 0 to the end of what a guest may have
GOOD = {
    "none": 0,
    "absent, whatever else it says": (1 << 64) - 1 ^ P,
    "data": FLAT,
    "code": descriptor(CODE | BIG | PAGES, dpl=3),
    "conforming": descriptor(CODE | DOWN | BIG | PAGES),
    "64-bit code has no limit": descriptor(CODE | LONG | PAGES, dpl=3, base=0xFFFF_FFFF, limit=0xFFFFF),
    "the last byte": descriptor(WRITE, base=TOP - 0x1000, limit=0xFFF),
}
BAD = {
    "ring 0": descriptor(WRITE | PAGES, dpl=0),
    "64-bit code of ring 0": descriptor(CODE | LONG, dpl=0),
    "conforming of ring 0": descriptor(CODE | DOWN, dpl=0),
    "call gate": P | 3 << 45 | 12 << 40,
    "interrupt gate": P | 3 << 45 | 14 << 40,
    "trap gate": P | 3 << 45 | 15 << 40,
    "task gate": P | 3 << 45 | 5 << 40,
    "task state": P | 3 << 45 | 9 << 40,
    "local table": P | 3 << 45 | 2 << 40,
    "one byte into the top": descriptor(WRITE, base=TOP - 0x1000, limit=0x1000),
    "one page into the top": descriptor(WRITE | PAGES, limit=0xFC000),
    "all of it": descriptor(WRITE | PAGES, limit=0xFFFFF),
    "round the end": descriptor(WRITE | PAGES, base=0xFFFF_F000, limit=1),
    "begins in the top": descriptor(WRITE, base=TOP, limit=0),
    "expands down": descriptor(WRITE | DOWN | BIG | PAGES, limit=0xFFFFE),
    "expands down, to 64 KiB": descriptor(WRITE | DOWN, limit=0xFF),
}


@pytest.fixture
def hv() -> Iterator[StandIn]:
    hv = StandIn(nr_domains=2)
    yield hv
    hv.quiet()
    hv.close()


@pytest.fixture
def guest(hv: StandIn) -> Domain:
    return hv.domains[1]


def frame_of(guest: Domain, pfn: int = PFN) -> int:
    return guest.mfn_list[pfn]


def set_gdt(hv: StandIn, guest: Domain, *mfns: int, entries: int | None = None) -> None:
    hv.write(guest, struct.pack(f"<{len(mfns)}Q", *mfns))
    hv.done(guest, SetGdt(SCRATCH, DESCRIPTORS * len(mfns) if entries is None else entries))


def make_table(hv: StandIn, guest: Domain, *pfns: int) -> None:
    """As a kernel does: its frames are shown read-only first."""
    for pfn in pfns:
        hv.show(guest, pfn, frame_of(guest, pfn), TABLE)
    set_gdt(hv, guest, *(frame_of(guest, pfn) for pfn in pfns))


# ---- which are good


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_a_descriptor(hv: StandIn, guest: Domain, name: str) -> None:
    """The same verdict where it stands in a frame that becomes a table, and where it is put into one."""
    one = {**GOOD, **BAD}[name]
    hv.write(guest, struct.pack("<Q", one), virt(PFN) + 8 * (DESCRIPTORS - 1))
    if name in GOOD:
        make_table(hv, guest, PFN)
        hv.done(guest, UpdateDescriptor(frame_of(guest) << PAGE_SHIFT, one))
        assert hv.read(guest, 8, virt(PFN)) == struct.pack("<Q", one), "a table is read as any frame"
    else:
        with pytest.raises(Invalid):
            make_table(hv, guest, PFN)
        assert guest.gdt == [] and hv.frames.frame[frame_of(guest)].count == 0
        with pytest.raises(Invalid):
            hv.done(guest, UpdateDescriptor(frame_of(guest) << PAGE_SHIFT, one))


# ---- which frames


def test_a_frame_that_can_be_written_is_refused(hv: StandIn, guest: Domain) -> None:
    """What was checked could be changed afterwards."""
    with pytest.raises(Invalid):
        set_gdt(hv, guest, frame_of(guest))


def test_a_table_cannot_be_written(hv: StandIn, guest: Domain) -> None:
    make_table(hv, guest, PFN)
    mfn = frame_of(guest)
    with pytest.raises(Invalid):
        hv.show(guest, PFN, mfn, DATA)
    with pytest.raises(BadAddress):
        hv.write(guest, bytes(8), virt(PFN))
    hv.write(guest, UPDATE.pack(mfn << PAGE_SHIFT, FLAT))
    with pytest.raises(Invalid):
        hv.done(guest, MmuUpdate(SCRATCH, 1, 0, DOMID_SELF))
    for command in (MmuextCommand.CLEAR_PAGE, MmuextCommand.PIN_L1):
        hv.write(guest, EXT_OP.pack(command, mfn, 0))
        with pytest.raises(Invalid):
            hv.done(guest, MmuextOp(SCRATCH, 1, 0, DOMID_SELF))
    hv.hide(guest, PFN)
    hv.write(guest, struct.pack("<Q", mfn))
    assert hv.done(guest, DecreaseReservation(SCRATCH, 1, 0)) == 0, "it cannot leave"


@pytest.mark.parametrize("what", ["a page table", "another's", "free", "none"])
def test_frames_that_cannot_be_one(hv: StandIn, guest: Domain, what: str) -> None:
    free = next(mfn for mfn in range(hv.frames.nr_frames) if not hv.frames.frame[mfn].total)
    mfn = {
        "a page table": guest.space.windows[0], "another's": frame_of(hv.domains[0]), "free": free, "none": 1 << 40,
    }[what]  # fmt: skip
    with pytest.raises(Invalid):
        set_gdt(hv, guest, mfn)
    with pytest.raises(Invalid):
        hv.done(guest, UpdateDescriptor(mfn << PAGE_SHIFT, FLAT))


def test_of_several_frames_the_first_are_let_go_where_one_is_refused(hv: StandIn, guest: Domain) -> None:
    hv.show(guest, PFN, frame_of(guest), TABLE)
    with pytest.raises(Invalid):
        set_gdt(hv, guest, frame_of(guest), frame_of(guest, PFN + 1))
    assert hv.frames.frame[frame_of(guest)].count == 0 and guest.gdt == []
    hv.show(guest, PFN, frame_of(guest), DATA)


# ---- the table


def test_one_table_follows_another(hv: StandIn, guest: Domain) -> None:
    make_table(hv, guest, PFN, PFN + 1)
    make_table(hv, guest, PFN + 1)
    hv.show(guest, PFN, frame_of(guest), DATA)
    with pytest.raises(Invalid):
        set_gdt(hv, guest, frame_of(guest))
    assert guest.gdt == [frame_of(guest, PFN + 1)], "a table that is refused leaves the one before"
    set_gdt(hv, guest)
    hv.show(guest, PFN + 1, frame_of(guest, PFN + 1), DATA)


def test_a_frame_may_stand_in_it_twice(hv: StandIn, guest: Domain) -> None:
    hv.show(guest, PFN, frame_of(guest), TABLE)
    set_gdt(hv, guest, frame_of(guest), frame_of(guest))
    assert hv.frames.frame[frame_of(guest)].count == 2
    hv.quiet()


def test_how_long_it_may_be(hv: StandIn, guest: Domain) -> None:
    hv.show(guest, PFN, frame_of(guest), TABLE)
    set_gdt(hv, guest, *[frame_of(guest)] * GDT_FRAMES, entries=GDT_ENTRIES)
    with pytest.raises(Invalid):
        set_gdt(hv, guest, entries=GDT_ENTRIES + 1)
    with pytest.raises(BadAddress):
        hv.done(guest, SetGdt(0, 1))
    set_gdt(hv, guest, frame_of(guest), entries=1)
    assert hv.frames.frame[frame_of(guest)].count == 1


def test_a_frame_that_is_no_table_is_stored_to(hv: StandIn, guest: Domain) -> None:
    """As Xen does: a kernel fills it with these calls before it is one."""
    hv.done(guest, UpdateDescriptor((frame_of(guest) << PAGE_SHIFT) + 16, FLAT))
    assert hv.read(guest, 8, virt(PFN) + 16) == struct.pack("<Q", FLAT)
    with pytest.raises(Invalid):
        hv.done(guest, UpdateDescriptor((frame_of(guest) << PAGE_SHIFT) + 4, 0))


def test_it_ends_with_its_domain(hv: StandIn, guest: Domain) -> None:
    make_table(hv, guest, PFN)
    hv.kill(1)
    hv.serve_all()
    assert guest.state == "dead" and hv.frames.owned[1] == 0


# ---- and would be seen


def test_without_the_reference_it_could_be_written(hv: StandIn, guest: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(*_: object) -> Iterator[None]:
        yield from ()

    with monkeypatch.context() as seeded:
        seeded.setattr(space, "get_table", unchecked)
        make_table(hv, guest, PFN)
    hv.show(guest, PFN, frame_of(guest), DATA)
    hv.write(guest, struct.pack("<Q", BAD["call gate"]), virt(PFN))
    assert guest.gdt == [frame_of(guest)]
    guest.gdt = []
