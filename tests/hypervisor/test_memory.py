"""Reservations that shrink, grow and are exchanged, page flips, and copies between domains: counts, contents, and who may."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from hypervisor import budget, memory
from hypervisor._hv import lib
from hypervisor.domain import Domain
from hypervisor.frames import NO_OWNER, FrameTable
from hypervisor.machine import MachineMemory
from hypervisor.public import layout
from hypervisor.public.boot_tables import TABLE
from hypervisor.public.callring import CallringSetup
from hypervisor.public.errors import BadAddress, Invalid, NoMemory, TooBig
from hypervisor.public.grant import (
    COPY,
    ENTRY,
    MAP_REF,
    TRANSFER,
    UNMAP_REF,
    GrantCopy,
    GrantMap,
    GrantSetupTable,
    GrantStatus,
    GrantTransfer,
    GrantUnmap,
    Gtf,
    MapFlags,
)
from hypervisor.public.layout import GRANT_BASE, KERNEL_PFN, SHARED_INFO_PFN, virt
from hypervisor.public.memory import (
    MAX_EXCHANGE,
    MAX_ORDER,
    CurrentReservation,
    DecreaseReservation,
    Exchange,
    IncreaseReservation,
    MachphysMappingCall,
    MaximumReservation,
    PopulatePhysmap,
)
from hypervisor.public.mmu import EXT_OP, MmuextCommand, MmuextOp
from hypervisor.public.types import DOMID_SELF, INVALID_PFN, MAX_BATCH, PAGE_SIZE
from tests.models.stand_in import DOMAIN_FRAMES, SCRATCH, StandIn, tables_of

SOURCE_IS_REF, DEST_IS_REF = 1, 2
DATA = KERNEL_PFN + 2  # a page with something in it
LIST = SCRATCH + PAGE_SIZE // 2  # where a second array lies
NR_FRAMES = 4096  # enough that 128 lie together, wherever the domains' few do


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_frames=NR_FRAMES, nr_domains=3)
    yield made
    made.close()


def frames(hv: StandIn, domid: int) -> int:
    return int(hv.done(hv.domains[domid], CurrentReservation(DOMID_SELF)))


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def over(hv: StandIn, domain: Domain, call: Any, mfns: list[int], order: int = 0) -> int:
    hv.write(domain, words(*mfns))
    return int(hv.done(domain, call(SCRATCH, len(mfns), order)))


def answer(hv: StandIn, domain: Domain, count: int, at: int = SCRATCH) -> list[int]:
    return list(struct.unpack(f"<{count}Q", hv.read(domain, 8 * count, at)))


def names(hv: StandIn, mfns: range | list[int]) -> list[int]:
    """What the M2P says of frames."""
    return [hv.m2p.pfn[mfn] for mfn in mfns]


def owners(hv: StandIn) -> list[int]:
    return [hv.frames.frame[mfn].owner for mfn in range(NR_FRAMES)]


def is_empty(hv: StandIn, mfn: int) -> bool:
    return hv.machine.read(mfn, 0, PAGE_SIZE) == bytes(PAGE_SIZE)


def an_extent(hv: StandIn, domain: Domain, order: int, pfn: int) -> range:
    """A populated extent, its maximum raised for it."""
    domain.max_frames += 1 << order
    assert over(hv, domain, PopulatePhysmap, [pfn], order) == 1
    (first,) = answer(hv, domain, 1)
    return range(first, first + (1 << order))


def grant(hv: StandIn, domain: Domain, ref: int, flags: int, domid: int, mfn: int) -> None:
    hv.machine.write(domain.grant_frames[0], 8 * ref, ENTRY.pack(flags, domid, mfn))


def entry_of(hv: StandIn, domain: Domain, ref: int) -> tuple[int, int, int]:
    """(flags, domid, frame)."""
    flags, domid, frame = ENTRY.unpack(hv.machine.read(domain.grant_frames[0], 8 * ref, 8))
    return flags, domid, frame


def flags_of(hv: StandIn, domain: Domain, ref: int) -> int:
    return entry_of(hv, domain, ref)[0]


# ---- frames that leave


def test_frames_go_and_come_back_zeroed(hv: StandIn) -> None:
    domain, free, before = hv.domains[1], hv.frames.nr_free, frames(hv, 1)
    gone = domain.mfn_list[DATA : DATA + 2]
    hv.write(domain, b"secret", virt(DATA))
    hv.hide(domain, DATA, DATA + 1)
    assert over(hv, domain, DecreaseReservation, gone) == 2
    assert frames(hv, 1) == before - 2 and hv.frames.nr_free == free + 2
    assert is_empty(hv, gone[0]), "scrubbed before anybody can have it"
    assert names(hv, gone) == [INVALID_PFN] * 2 and [owners(hv)[mfn] for mfn in gone] == [NO_OWNER] * 2
    with pytest.raises(BadAddress):
        hv.done(domain, DecreaseReservation(virt(DATA), 1, 0))
    with pytest.raises(Invalid):
        hv.show(domain, DATA, gone[0])

    assert over(hv, domain, PopulatePhysmap, [DATA + 1, DATA]) == 2
    came = answer(hv, domain, 2)
    assert names(hv, came) == [DATA + 1, DATA] and all(is_empty(hv, mfn) for mfn in came)
    with pytest.raises(BadAddress):
        hv.read(domain, 1, virt(DATA))  # nothing is mapped by it
    hv.show(domain, DATA, came[1])
    hv.write(domain, b"anew", virt(DATA))
    assert hv.machine.read(came[1], 0, 4) == b"anew" and frames(hv, 1) == before
    hv.quiet()


def test_a_batch_stops_at_the_first_that_cannot(hv: StandIn) -> None:
    domain = hv.domains[1]
    hv.hide(domain, DATA, DATA + 1)
    hv.hide(hv.domains[2], DATA)
    one, two = domain.mfn_list[DATA : DATA + 2]
    free = owners(hv).index(NO_OWNER)
    another, shown = hv.domains[2].mfn_list[DATA], domain.mfn_list[DATA + 2]
    for bad in (free, another, shown, NR_FRAMES, 1 << 32 | one, 1 << 40, (1 << 64) - 1):
        assert over(hv, domain, DecreaseReservation, [bad, one]) == 0
    assert owners(hv)[one] == 1
    assert over(hv, domain, DecreaseReservation, [one, one, two]) == 1, "twice is once"
    assert over(hv, domain, DecreaseReservation, []) == 0
    hv.quiet()


def test_lists_and_orders_that_are_refused(hv: StandIn) -> None:
    domain, before = hv.domains[1], owners(hv)
    for call in (DecreaseReservation, IncreaseReservation, PopulatePhysmap):
        with pytest.raises(TooBig):
            hv.done(domain, call(SCRATCH, MAX_BATCH + 1, 0))
        with pytest.raises(Invalid):
            hv.done(domain, call(SCRATCH, 1, MAX_ORDER + 1))
        with pytest.raises(BadAddress):
            hv.done(domain, call(GRANT_BASE, 1, 0))
    assert owners(hv) == before
    hv.quiet()


def mapped(hv: StandIn, domain: Domain, mfn: int) -> None:
    hv.show(domain, DATA, mfn)


def mapped_to_read(hv: StandIn, domain: Domain, mfn: int) -> None:
    hv.show(domain, DATA, mfn, TABLE)


def mapped_by_a_table_in_no_window(hv: StandIn, domain: Domain, mfn: int) -> None:
    """An L1 that nothing shows holds its references too."""
    table = domain.mfn_list[DATA + 1]
    hv.hide(domain, DATA + 1)
    hv.machine.write(table, 0, words(mfn << 12 | TABLE))
    pinned(hv, domain, table)


def pinned(hv: StandIn, domain: Domain, mfn: int) -> None:
    hv.write(domain, EXT_OP.pack(MmuextCommand.PIN_L1, mfn, 0))
    assert hv.done(domain, MmuextOp(SCRATCH, 1, 0, DOMID_SELF)) == 1


def granted(hv: StandIn, domain: Domain, mfn: int, flags: int = 0) -> None:
    other = hv.domains[2]
    grant(hv, domain, 9, Gtf.PERMIT_ACCESS | (Gtf.READONLY if flags else 0), 2, mfn)
    hv.write(other, MAP_REF.pack(GRANT_BASE, MapFlags.HOST_MAP | flags, 9, 1, 0, 0, 0))
    assert hv.done(other, GrantMap(SCRATCH, 1)) == 1


def granted_to_read(hv: StandIn, domain: Domain, mfn: int) -> None:
    granted(hv, domain, mfn, MapFlags.READONLY)


def held(hv: StandIn, domain: Domain, mfn: int) -> None:
    """The hypercall ring: the guest does not show it any more, and the hypervisor writes it."""
    hv.show(domain, DATA, mfn)
    hv.done(domain, CallringSetup(virt(DATA)))
    hv.hide(domain, DATA)


USES = [mapped, mapped_to_read, mapped_by_a_table_in_no_window, pinned, granted, granted_to_read, held]


@pytest.mark.parametrize("use", USES)
def test_what_somebody_uses_cannot_go(hv: StandIn, use: Any) -> None:
    domain, mfn = hv.domains[1], hv.domains[1].mfn_list[DATA]
    hv.hide(domain, DATA)
    use(hv, domain, mfn)
    before = owners(hv)
    assert over(hv, domain, DecreaseReservation, [mfn]) == 0
    assert flip(hv, domain, mfn, 2, 9) == GrantStatus.BAD_PAGE
    hv.write(domain, words(mfn))
    hv.write(domain, words(DATA), LIST)
    with pytest.raises(Invalid):
        hv.done(domain, Exchange(SCRATCH, 1, 0, LIST, 1, 0))
    assert owners(hv) == before
    hv.quiet()


def test_what_the_hypervisor_writes_and_what_tables_lie_in_cannot_go(hv: StandIn) -> None:
    """Hidden from the guest's own tables or not: shared_info, the grant table, tables in use."""
    domain = hv.domains[1]
    for pfn in (SHARED_INFO_PFN, layout.GRANT_PFN, KERNEL_PFN - 1):
        hv.hide(domain, pfn)
        assert over(hv, domain, DecreaseReservation, [domain.mfn_list[pfn]]) == 0, pfn
    tables = tables_of(DOMAIN_FRAMES).tables
    hv.hide(domain, *tables)
    for pfn in tables:
        assert over(hv, domain, DecreaseReservation, [domain.mfn_list[pfn]]) == 0, pfn
        assert flip(hv, domain, domain.mfn_list[pfn], 2, 9) == GrantStatus.BAD_PAGE
    hv.quiet()


def test_a_grant_is_in_the_way_until_its_unmapping_is_acknowledged(hv: StandIn) -> None:
    domain, other, mfn = hv.domains[1], hv.domains[2], hv.domains[1].mfn_list[DATA]
    hv.hide(domain, DATA)
    granted(hv, domain, mfn)
    ((handle, _),) = other.maptrack.items()
    hv.write(other, UNMAP_REF.pack(GRANT_BASE, 0, handle, 0, 0))
    out = hv.ask(other, GrantUnmap(SCRATCH, 1))
    assert over(hv, domain, DecreaseReservation, [mfn]) == 0 and not out
    hv.serve_all()
    assert out == [1, None] and over(hv, domain, DecreaseReservation, [mfn]) == 1
    hv.quiet()


def test_an_extent_goes_whole_or_not_at_all(hv: StandIn) -> None:
    domain = hv.domains[1]
    hv.hide(domain, DATA)
    extent = an_extent(hv, domain, 3, 100)
    before = owners(hv)
    hv.show(domain, DATA, extent[5])
    assert over(hv, domain, DecreaseReservation, [extent.start], 3) == 0
    hv.hide(domain, DATA)
    assert over(hv, domain, DecreaseReservation, [extent.start + 1], 3) == 0, "not aligned"
    assert over(hv, domain, DecreaseReservation, [extent.start], 4) == 0, "twice as many as are ours"
    assert owners(hv) == before
    hv.machine.write(extent[7], 0, b"secret")
    assert over(hv, domain, DecreaseReservation, [extent.start, extent.start + 4], 2) == 2, "in halves"
    assert all(is_empty(hv, mfn) for mfn in extent) and {owners(hv)[mfn] for mfn in extent} == {NO_OWNER}
    hv.quiet()


def test_a_domain_that_dies_in_the_middle_of_many_loses_nothing(hv: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "TURN_NS", 0)
    domain, free, owned = hv.domains[1], hv.frames.nr_free, hv.frames.owned[1]
    hv.hide(domain, DATA, DATA + 1)
    hv.write(domain, words(*domain.mfn_list[DATA : DATA + 2]))
    out = hv.ask(domain, DecreaseReservation(SCRATCH, 2, 0))
    assert not out and hv.frames.nr_free == free + 1
    hv.kill(1)
    hv.serve_all()
    assert out and domain.state == "dead" and hv.frames.nr_free == free + owned
    assert all(is_empty(hv, mfn) for mfn, owner in enumerate(owners(hv)) if owner == NO_OWNER)
    hv.check()


# ---- frames that come


def test_nobody_gets_more_than_its_maximum(hv: StandIn) -> None:
    domain, before = hv.domains[1], owners(hv)
    assert hv.done(domain, MaximumReservation(DOMID_SELF)) == frames(hv, 1) == DOMAIN_FRAMES
    for call in (IncreaseReservation, PopulatePhysmap):
        assert over(hv, domain, call, [100] * 5) == 0 and owners(hv) == before
    domain.max_frames += 3
    assert over(hv, domain, IncreaseReservation, [100] * 5) == 3
    assert names(hv, answer(hv, domain, 3)) == [INVALID_PFN] * 3 and frames(hv, 1) == DOMAIN_FRAMES + 3
    assert answer(hv, domain, 5)[3:] == [100, 100], "the rest of the list is as it was"
    domain.max_frames += 7
    assert over(hv, domain, PopulatePhysmap, [100] * 3, 2) == 1, "one extent of four fits into seven"
    hv.quiet()


@pytest.mark.parametrize("order", [0, 1, 3, 6, 7])
def test_extents_lie_together_and_are_named(hv: StandIn, order: int) -> None:
    domain = hv.domains[1]
    extent = an_extent(hv, domain, order, 1000)
    assert extent.start % len(extent) == 0 and {owners(hv)[mfn] for mfn in extent} == {1}
    assert names(hv, extent) == list(range(1000, 1000 + len(extent)))
    nameless = an_extent(hv, domain, order, INVALID_PFN)
    assert set(names(hv, nameless)) == {INVALID_PFN}
    hv.quiet()


def test_fewer_where_the_machine_has_no_more(hv: StandIn) -> None:
    domain = hv.domains[1]
    domain.max_frames = NR_FRAMES
    some = 0
    while got := over(hv, domain, IncreaseReservation, [0] * 64, 6):
        assert got <= 1024 // 64, "more than a call may have"
        some += got
    assert 0 < some < NR_FRAMES // 64 and over(hv, domain, PopulatePhysmap, [0], 6) == 0
    rest = hv.frames.nr_free
    assert rest == NR_FRAMES - 3 * DOMAIN_FRAMES - 64 * some
    table = tables_of(DOMAIN_FRAMES).tables.start
    hv.show(domain, table, domain.mfn_list[DATA])  # room for a long list
    hv.show(domain, table + 1, domain.mfn_list[DATA + 1])
    came = [int(hv.done(domain, IncreaseReservation(virt(table), MAX_BATCH, 0))) for _ in range(-(-rest // MAX_BATCH))]
    assert sum(came) == rest and all(n == MAX_BATCH for n in came[:-1]) and hv.frames.nr_free == 0
    assert over(hv, domain, IncreaseReservation, [0]) == 0
    hv.quiet()


@pytest.mark.parametrize("order", [0, 3])
@pytest.mark.parametrize("call", [IncreaseReservation, PopulatePhysmap])
def test_what_cannot_be_told_does_not_come(hv: StandIn, call: Any, order: int) -> None:
    """The list can be read and not be written: it begins in memory and ends in a page table."""
    domain = hv.domains[1]
    domain.max_frames += 64
    before, told = owners(hv), names(hv, range(NR_FRAMES))
    at = virt(tables_of(DOMAIN_FRAMES).tables.start) - 8
    first = hv.read(domain, 8, at)
    with pytest.raises(BadAddress):
        hv.done(domain, call(at, 2, order))
    assert (owners(hv), names(hv, range(NR_FRAMES)), hv.read(domain, 8, at)) == (before, told, first)
    hv.quiet()


def test_where_the_m2p_is(hv: StandIn) -> None:
    assert hv.done(hv.domains[1], MachphysMappingCall()) == (layout.M2P, layout.M2P + 8 * NR_FRAMES, NR_FRAMES - 1)


# ---- an exchange


def exchange(hv: StandIn, domain: Domain, gone: list[int], order: int, pfns: list[int], out_order: int) -> int:
    hv.write(domain, words(*gone))
    hv.write(domain, words(*pfns), LIST)
    return int(hv.done(domain, Exchange(SCRATCH, len(gone), order, LIST, len(pfns), out_order)))


def test_scattered_frames_for_one_that_lies_together_and_back(hv: StandIn) -> None:
    """At the maximum all the time."""
    domain, before = hv.domains[1], frames(hv, 1)
    gone = domain.mfn_list[DATA : DATA + 4]
    hv.machine.write(gone[0], 0, b"secret")
    hv.hide(domain, *range(DATA, DATA + 4))
    assert exchange(hv, domain, gone, 0, [DATA], 2) == 4
    (first,) = answer(hv, domain, 1, LIST)
    extent = range(first, first + 4)
    assert first % 4 == 0 and names(hv, extent) == list(range(DATA, DATA + 4)) and frames(hv, 1) == before
    assert all(is_empty(hv, mfn) for mfn in (*gone, *extent)) and names(hv, gone) == [INVALID_PFN] * 4
    assert exchange(hv, domain, [first], 2, [DATA + 3, DATA + 2, DATA + 1, DATA], 0) == 1
    assert names(hv, answer(hv, domain, 4, LIST)) == [DATA + 3, DATA + 2, DATA + 1, DATA] and frames(hv, 1) == before
    hv.quiet()


def test_exchanges_that_change_nothing(hv: StandIn) -> None:
    domain = hv.domains[1]
    hv.hide(domain, DATA, DATA + 1)
    one, two, shown = domain.mfn_list[DATA : DATA + 3]
    before, told = owners(hv), names(hv, range(NR_FRAMES))
    for gone in ([one, shown], [one, one], [one, hv.domains[2].mfn_list[DATA]], [one, 1 << 50]):
        with pytest.raises(Invalid):
            exchange(hv, domain, gone, 0, [DATA, DATA + 1], 0)
    with pytest.raises(Invalid):
        exchange(hv, domain, [one, two], 0, [DATA], 0)
    with pytest.raises(Invalid):
        exchange(hv, domain, [one, two], 0, [DATA], MAX_ORDER + 1)
    hv.write(domain, words(one, two))
    for at in (GRANT_BASE, virt(tables_of(DOMAIN_FRAMES).tables.start) - 8):
        with pytest.raises(BadAddress):
            hv.done(domain, Exchange(SCRATCH, 2, 0, at, 2, 0))
        with pytest.raises(BadAddress):
            hv.done(domain, Exchange(GRANT_BASE, 2, 0, at, 2, 0))
    with pytest.raises(TooBig):
        hv.done(domain, Exchange(SCRATCH, MAX_BATCH + 1, 0, SCRATCH, 1, 0))
    with pytest.raises(TooBig):  # while it is made, nobody else is served
        hv.done(domain, Exchange(SCRATCH, 2, MAX_ORDER, SCRATCH, 2, MAX_ORDER))
    assert 1 << MAX_ORDER == MAX_EXCHANGE
    assert (owners(hv), names(hv, range(NR_FRAMES))) == (before, told)
    hv.frames.allocate(77, hv.frames.nr_free - 1)
    before = owners(hv)
    with pytest.raises(NoMemory):
        exchange(hv, domain, [one, two], 0, [DATA, DATA + 1], 0)
    assert (owners(hv), names(hv, range(NR_FRAMES))) == (before, told), "what was there for half of it is free again"


# ---- what must be found


DEFECTS = {
    "a frame in use leaves": (FrameTable, "is_idle", lambda frames, mfn: True),
    "another's frame leaves": (memory, "may_leave", lambda hv, domain, mfn: mfn < NR_FRAMES and hv.frames.is_idle(mfn)),
    "frames are not scrubbed": (MachineMemory, "scrub", lambda machine, mfn, count=1: None),
    "the M2P is not told": (memory, "_name", lambda hv, first, order, pfn: None),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    """By the tests above, which are its judges."""
    judges: list[Any] = [
        test_frames_go_and_come_back_zeroed,
        test_a_batch_stops_at_the_first_that_cannot,
        test_what_the_hypervisor_writes_and_what_tables_lie_in_cannot_go,
    ]
    found = 0
    for judge in judges:
        hv = StandIn(nr_frames=NR_FRAMES, nr_domains=3)
        with monkeypatch.context() as patch:
            patch.setattr(*DEFECTS[defect])
            try:
                judge(hv)
            except AssertionError:
                found += 1
        hv.close()
    assert found


# ---- page flips


def flip(hv: StandIn, giver: Domain, mfn: int, domid: int, ref: int) -> int:
    hv.write(giver, TRANSFER.pack(mfn, domid, ref, 99))
    done = hv.done(giver, GrantTransfer(SCRATCH, 1))
    status = int(TRANSFER.unpack(hv.read(giver, TRANSFER.size))[3])
    assert done == (status == GrantStatus.OKAY)
    return status


def ready_to_flip(hv: StandIn) -> tuple[Domain, Domain, list[int]]:
    """A giver, some frames of its that nobody uses, and a taker that owns one fewer than it may."""
    giver, taker = hv.domains[1], hv.domains[2]
    hv.write(giver, b"a page", virt(DATA))
    hv.hide(giver, DATA, DATA + 1)
    hv.hide(taker, DATA)
    assert over(hv, taker, DecreaseReservation, [taker.mfn_list[DATA]]) == 1
    return giver, taker, giver.mfn_list[DATA : DATA + 2]


def test_a_frame_changes_owner_with_its_contents(hv: StandIn) -> None:
    giver, taker, (mfn, other) = ready_to_flip(hv)
    grant(hv, taker, 9, Gtf.ACCEPT_TRANSFER, 1, 0xDEAD)
    assert flip(hv, giver, mfn, 2, 9) == GrantStatus.OKAY
    assert owners(hv)[mfn] == 2 and names(hv, [mfn]) == [INVALID_PFN] and frames(hv, 1) == frames(hv, 0) - 1
    flags, domid, frame = entry_of(hv, taker, 9)
    assert flags & Gtf.TRANSFER_COMPLETED and (domid, frame) == (1, mfn)
    hv.show(taker, DATA, mfn)
    assert hv.read(taker, 6, virt(DATA)) == b"a page"
    with pytest.raises(Invalid):
        hv.show(giver, DATA, mfn)
    taker.max_frames += 1
    assert flip(hv, giver, other, 2, 9) == GrantStatus.BAD_GNTREF, "an entry takes one"
    hv.quiet()


def test_a_taker_at_its_maximum_gets_nothing(hv: StandIn) -> None:
    giver, taker, mfns = ready_to_flip(hv)
    for ref in (9, 10):
        grant(hv, taker, ref, Gtf.ACCEPT_TRANSFER, 1, 0)
    hv.write(giver, b"".join(TRANSFER.pack(mfn, 2, ref, 99) for mfn, ref in zip(mfns, (9, 10), strict=True)))
    assert hv.done(giver, GrantTransfer(SCRATCH, 2)) == 1
    statuses = [status for _, _, _, status in TRANSFER.iter_unpack(hv.read(giver, 2 * TRANSFER.size))]
    assert statuses == [GrantStatus.OKAY, GrantStatus.NO_SPACE]
    assert [owners(hv)[mfn] for mfn in mfns] == [2, 1] and flags_of(hv, taker, 10) == Gtf.ACCEPT_TRANSFER, "as it was"
    hv.quiet()


def test_transfers_that_cannot_be(hv: StandIn) -> None:
    giver, taker, (mfn, _) = ready_to_flip(hv)
    free = owners(hv).index(NO_OWNER)
    grant(hv, taker, 9, Gtf.ACCEPT_TRANSFER, 1, 0)
    grant(hv, taker, 10, Gtf.ACCEPT_TRANSFER, 0, 0)
    grant(hv, taker, 11, Gtf.PERMIT_ACCESS, 1, mfn)
    before, told = owners(hv), names(hv, range(NR_FRAMES))
    for ref in (10, 11, 12, 4096, 1 << 31):
        assert flip(hv, giver, mfn, 2, ref) == GrantStatus.BAD_GNTREF
    for domid in (1, 3, 0x7FF0, 0xFFFF):
        assert flip(hv, giver, mfn, domid, 9) == GrantStatus.BAD_DOMAIN
    for bad in (giver.mfn_list[DATA + 2], giver.grant_frames[0], taker.mfn_list[DATA + 1], free, NR_FRAMES, 1 << 32 | mfn):
        assert flip(hv, giver, bad, 2, 9) == GrantStatus.BAD_PAGE
    assert (owners(hv), names(hv, range(NR_FRAMES)), flags_of(hv, taker, 9)) == (before, told, Gtf.ACCEPT_TRANSFER)
    with pytest.raises(BadAddress):
        hv.done(giver, GrantTransfer(GRANT_BASE, 1))
    with pytest.raises(TooBig):
        hv.done(giver, GrantTransfer(SCRATCH, MAX_BATCH + 1))
    hv.kill(2)
    assert flip(hv, giver, mfn, 2, 9) == GrantStatus.BAD_DOMAIN, "dying"
    hv.serve_all()
    assert flip(hv, giver, mfn, 2, 9) == GrantStatus.BAD_DOMAIN and owners(hv)[mfn] == 1
    hv.quiet()


# ---- copies


def copy(hv: StandIn, caller: Domain, record: bytes) -> int:
    hv.write(caller, record)
    hv.done(caller, GrantCopy(SCRATCH, 1))
    return int(COPY.unpack(hv.read(caller, COPY.size))[8])


def test_bytes_go_both_ways_and_nothing_is_left_marked(hv: StandIn) -> None:
    mine, other = hv.domains[1], hv.domains[2]
    own = mine.mfn_list[DATA]
    grant(hv, other, 9, Gtf.PERMIT_ACCESS, 1, other.mfn_list[DATA])
    hv.write(mine, b"hello", virt(DATA))
    assert copy(hv, mine, COPY.pack(own, DOMID_SELF, 0, 9, 2, 100, 5, DEST_IS_REF, 0)) == GrantStatus.OKAY
    assert hv.read(other, 5, virt(DATA) + 100) == b"hello"
    assert copy(hv, mine, COPY.pack(9, 2, 100, own, DOMID_SELF, 7, 5, SOURCE_IS_REF, 0)) == GrantStatus.OKAY
    assert hv.read(mine, 12, virt(DATA)) == b"hello\0\0hello"
    assert flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS, "neither reading nor writing"
    hv.quiet()


def test_a_mapping_keeps_its_marks_through_a_copy(hv: StandIn) -> None:
    mine, other = hv.domains[2], hv.domains[1]
    granted(hv, other, other.mfn_list[DATA])
    record = COPY.pack(9, 1, 0, mine.mfn_list[DATA], DOMID_SELF, 0, 64, SOURCE_IS_REF, 0)
    assert copy(hv, mine, record) == GrantStatus.OKAY
    assert flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS | Gtf.READING | Gtf.WRITING
    hv.quiet()


def test_copies_that_may_not_be(hv: StandIn) -> None:
    mine, other = hv.domains[1], hv.domains[2]
    own, its, free = mine.mfn_list[DATA], other.mfn_list[DATA], owners(hv).index(NO_OWNER)
    grant(hv, other, 9, Gtf.PERMIT_ACCESS | Gtf.READONLY, 1, its)
    grant(hv, other, 10, Gtf.PERMIT_ACCESS, 0, its)
    grant(hv, other, 11, Gtf.PERMIT_ACCESS, 1, free)
    grant(hv, other, 12, Gtf.PERMIT_ACCESS, 1, hv.domains[0].mfn_list[DATA])
    page = hv.read(other, PAGE_SIZE, virt(DATA))
    refused = {
        "for writing": (COPY.pack(own, DOMID_SELF, 0, 9, 2, 0, 4, DEST_IS_REF, 0), GrantStatus.PERMISSION_DENIED),
        "another's": (COPY.pack(10, 2, 0, own, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.PERMISSION_DENIED),
        "without a ref": (COPY.pack(its, 2, 0, own, DOMID_SELF, 0, 4, 0, 0), GrantStatus.PERMISSION_DENIED),
        "nobody's frame": (COPY.pack(11, 2, 0, own, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_GNTREF),
        "a third's frame": (COPY.pack(12, 2, 0, own, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_GNTREF),
        "no entry": (COPY.pack(1 << 40, 2, 0, own, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_GNTREF),
        "nobody's": (COPY.pack(9, 77, 0, own, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_DOMAIN),
        "beyond the page": (COPY.pack(9, 2, 4093, own, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "beyond ours": (COPY.pack(9, 2, 0, own, DOMID_SELF, 4095, 2, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "its frame as ours": (COPY.pack(9, 2, 0, its, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "no frame": (COPY.pack(9, 2, 0, NR_FRAMES, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "beyond u32": (COPY.pack(9, 2, 0, 1 << 32 | own, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "flags": (COPY.pack(9, 2, 0, own, DOMID_SELF, 0, 4, SOURCE_IS_REF | 4, 0), GrantStatus.BAD_COPY_ARG),
    }
    for what, (record, status) in refused.items():
        assert copy(hv, mine, record) == status, what
    assert hv.read(other, PAGE_SIZE, virt(DATA)) == page and flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS | Gtf.READONLY
    hv.quiet()


def test_a_page_table_is_copied_from_and_never_into(hv: StandIn) -> None:
    """Our own or another's; and a frame that was copied into may become one afterwards."""
    mine, other = hv.domains[1], hv.domains[2]
    own, table, its = mine.mfn_list[DATA], mine.space.root, lib.mmu_l1(hv.frames.mmu, other.space.root, SCRATCH)
    grant(hv, other, 9, Gtf.PERMIT_ACCESS, 1, its)
    before = [hv.machine.read(mfn, 0, PAGE_SIZE) for mfn in (table, its)]
    denied = GrantStatus.PERMISSION_DENIED
    assert copy(hv, mine, COPY.pack(own, DOMID_SELF, 0, table, DOMID_SELF, 0, 8, 0, 0)) == denied
    assert copy(hv, mine, COPY.pack(own, DOMID_SELF, 0, 9, 2, 0, 8, DEST_IS_REF, 0)) == denied
    assert copy(hv, mine, COPY.pack(9, 2, 0, 9, 2, 64, 8, SOURCE_IS_REF | DEST_IS_REF, 0)) == denied
    assert copy(hv, mine, COPY.pack(9, 2, 0, own, DOMID_SELF, 0, PAGE_SIZE, SOURCE_IS_REF, 0)) == GrantStatus.OKAY
    assert [hv.machine.read(mfn, 0, PAGE_SIZE) for mfn in (table, its)] == before
    assert hv.read(mine, PAGE_SIZE, virt(DATA)) == before[1]
    assert flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS
    hv.quiet()
    hv.write(mine, bytes(PAGE_SIZE), virt(DATA))
    hv.hide(mine, DATA)
    pinned(hv, mine, own)
    assert copy(hv, mine, COPY.pack(9, 2, 0, own, DOMID_SELF, 0, 8, SOURCE_IS_REF, 0)) == denied
    hv.quiet()


def test_a_long_run_of_nonsense_leaves_counts_and_marks_as_they_were(hv: StandIn) -> None:
    rng, mine, other = random.Random(1), hv.domains[1], hv.domains[2]
    grant(hv, other, 9, Gtf.PERMIT_ACCESS, 1, other.mfn_list[DATA])
    small = [0, 1, 2, 9, mine.mfn_list[DATA], mine.space.root, other.mfn_list[DATA], 0xFFFF, 1 << 32, (1 << 64) - 1]
    for _ in range(3000):
        side = [(rng.choice(small), rng.choice([1, 2, 0x7FF0, 9]), rng.randrange(5000)) for _ in range(2)]
        copy(hv, mine, COPY.pack(*side[0], *side[1], rng.randrange(5000), rng.randrange(5), 0))
    assert flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS
    hv.quiet()


def test_setup_says_where_the_table_is(hv: StandIn) -> None:
    domain = hv.domains[1]
    hv.done(domain, GrantSetupTable(DOMID_SELF, 8, SCRATCH))
    assert answer(hv, domain, 8) == domain.grant_frames == domain.mfn_list[layout.GRANT_PFN : layout.GRANT_PFN + 8]
