"""Reservations that shrink and grow, page flips, and copies between domains: counts, contents, and who may."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from hypervisor import memory
from hypervisor.domain import NO_FRAME, Domain
from hypervisor.gate.monitor import MonitorGone
from hypervisor.public.errors import BadAddress, TooBig
from hypervisor.public.grant import (
    COPY,
    ENTRY,
    MAP_REF,
    TRANSFER,
    GrantCopy,
    GrantMap,
    GrantSetupTable,
    GrantStatus,
    GrantTransfer,
    Gtf,
)
from hypervisor.public.layout import GRANT_BASE, GRANT_PFN, KERNEL_PFN, virt
from hypervisor.public.memory import CurrentReservation, DecreaseReservation, MaximumReservation, PopulatePhysmap
from hypervisor.public.types import DOMID_SELF, MAX_BATCH, PAGE_SIZE
from tests.models.stand_in import SCRATCH, StandIn

SOURCE_IS_REF, DEST_IS_REF = 1, 2
DATA = KERNEL_PFN + 2  # a page with something in it


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=3)
    yield made
    made.close()


def frames(hv: StandIn, domid: int) -> int:
    return int(hv.done(hv.domains[domid], CurrentReservation(DOMID_SELF)))


def over(hv: StandIn, domain: Domain, call: Any, pfns: list[int]) -> int:
    hv.write(domain, struct.pack(f"<{len(pfns)}Q", *pfns))
    return int(hv.done(domain, call(SCRATCH, len(pfns))))


def grant(hv: StandIn, domain: Domain, ref: int, flags: int, domid: int, pfn: int) -> None:
    hv.machine.write(domain.p2m[GRANT_PFN], 8 * ref, ENTRY.pack(flags, domid, pfn))


def flags_of(hv: StandIn, domain: Domain, ref: int) -> int:
    return int(ENTRY.unpack(hv.machine.read(domain.p2m[GRANT_PFN], 8 * ref, 8))[0])


# ---- reservations


def test_frames_go_and_come_back_zeroed(hv: StandIn) -> None:
    domain, free = hv.domains[1], hv.frames.nr_free
    before = frames(hv, 1)
    hv.write(domain, b"secret", virt(DATA))
    mfn = domain.p2m[DATA]
    assert over(hv, domain, DecreaseReservation, [DATA, DATA + 1]) == 2
    assert frames(hv, 1) == before - 2 and hv.frames.nr_free == free + 2
    assert hv.machine.read(mfn, 0, PAGE_SIZE) == bytes(PAGE_SIZE), "scrubbed before anybody can have it"
    assert domain.translate(virt(DATA)) is None and virt(DATA) not in domain.monitor.shadow  # type: ignore[union-attr]
    with pytest.raises(BadAddress):
        hv.done(domain, DecreaseReservation(virt(DATA), 1))
    assert over(hv, domain, PopulatePhysmap, [DATA + 1, DATA]) == 2
    assert hv.read(domain, 6, virt(DATA)) == bytes(6) and frames(hv, 1) == before
    assert hv.done(domain, MaximumReservation(DOMID_SELF)) == before
    hv.quiet()


def test_a_batch_stops_at_the_first_that_cannot(hv: StandIn) -> None:
    domain = hv.domains[1]
    for bad in (0, GRANT_PFN, KERNEL_PFN - 1, len(domain.p2m), 1 << 40):
        assert over(hv, domain, DecreaseReservation, [bad, DATA]) == 0
    assert over(hv, domain, DecreaseReservation, [DATA, DATA, DATA + 1]) == 1, "twice is once"
    assert over(hv, domain, PopulatePhysmap, [DATA, DATA]) == 1
    assert over(hv, domain, PopulatePhysmap, [DATA]) == 0, "no hole"
    with pytest.raises(TooBig):
        hv.done(domain, DecreaseReservation(SCRATCH, MAX_BATCH + 1))
    hv.quiet()


def test_what_somebody_maps_cannot_go(hv: StandIn) -> None:
    domain, other = hv.domains[1], hv.domains[2]
    grant(hv, domain, 9, Gtf.PERMIT_ACCESS, 2, DATA)
    hv.write(other, MAP_REF.pack(GRANT_BASE, 2, 9, 1, 0, 0, 0))
    assert hv.done(other, GrantMap(SCRATCH, 1)) == 1
    assert over(hv, domain, DecreaseReservation, [DATA]) == 0
    hv.quiet()


def test_a_domain_that_dies_while_a_frame_goes_loses_nothing(hv: StandIn) -> None:
    domain, free = hv.domains[1], hv.frames.nr_free
    owned = hv.frames.owned[1]
    hv.write(domain, struct.pack("<Q", DATA))
    out = hv.ask(domain, DecreaseReservation(SCRATCH, 1))
    hv.kill(1)
    hv.serve_all()
    assert out and domain.state == "dead" and hv.frames.nr_free == free + owned
    hv.check()


def test_a_count_that_falls_too_early_is_found(hv: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(machine: StandIn, caller: Domain, pfns: list[int]) -> Any:
        for pfn in pfns:
            machine.frames.put(*caller.own_refs.pop(virt(pfn)))
        return
        yield

    monkeypatch.setattr(memory, "unmap_own", at_once)
    domain = hv.domains[1]
    with pytest.raises(AssertionError):
        over(hv, domain, DecreaseReservation, [DATA])
        hv.check()


# ---- page flips


def flip(hv: StandIn, giver: Domain, pfn: int, domid: int, ref: int) -> int:
    hv.write(giver, TRANSFER.pack(pfn, domid, ref, 99))
    hv.done(giver, GrantTransfer(SCRATCH, 1))
    return int(TRANSFER.unpack(hv.read(giver, TRANSFER.size))[3])


def test_a_frame_changes_owner_with_its_contents(hv: StandIn) -> None:
    giver, taker = hv.domains[1], hv.domains[2]
    assert over(hv, taker, DecreaseReservation, [DATA]) == 1
    grant(hv, taker, 9, Gtf.ACCEPT_TRANSFER, 1, DATA)
    hv.write(giver, b"a page", virt(DATA))
    mfn = giver.p2m[DATA]
    assert flip(hv, giver, DATA, 2, 9) == GrantStatus.OKAY
    assert taker.p2m[DATA] == mfn and hv.frames.owner[mfn] == 2 and hv.read(taker, 6, virt(DATA)) == b"a page"
    assert giver.p2m[DATA] == NO_FRAME and flags_of(hv, taker, 9) & Gtf.TRANSFER_COMPLETED
    assert flip(hv, giver, DATA + 1, 2, 9) == GrantStatus.BAD_GNTREF, "an entry takes one"
    hv.quiet()


def test_transfers_that_cannot_be(hv: StandIn) -> None:
    giver, taker = hv.domains[1], hv.domains[2]
    grant(hv, taker, 9, Gtf.ACCEPT_TRANSFER, 1, DATA)
    assert flip(hv, giver, DATA, 2, 9) == GrantStatus.BAD_GNTREF, "no hole there"
    assert flags_of(hv, taker, 9) == Gtf.ACCEPT_TRANSFER, "as it was"
    over(hv, taker, DecreaseReservation, [DATA])
    grant(hv, taker, 10, Gtf.ACCEPT_TRANSFER, 0, DATA)
    grant(hv, taker, 11, Gtf.PERMIT_ACCESS, 1, DATA)
    for ref in (10, 11, 12, 4096, 1 << 31):
        assert flip(hv, giver, DATA, 2, ref) == GrantStatus.BAD_GNTREF
    for domid in (1, 3, 0x7FF0, 0xFFFF):
        assert flip(hv, giver, DATA, domid, 9) == GrantStatus.BAD_DOMAIN
    for pfn in (0, GRANT_PFN, len(giver.p2m), 1 << 50):
        assert flip(hv, giver, pfn, 2, 9) == GrantStatus.BAD_PAGE
    assert flip(hv, giver, DATA, 2, 9) == GrantStatus.OKAY
    hv.quiet()


def test_a_taker_that_dies_meanwhile_leaves_no_frame_behind(hv: StandIn) -> None:
    giver, taker, free = hv.domains[1], hv.domains[2], hv.frames.nr_free
    owned = hv.frames.owned[2]
    over(hv, taker, DecreaseReservation, [DATA])
    grant(hv, taker, 9, Gtf.ACCEPT_TRANSFER, 1, DATA)
    hv.write(giver, TRANSFER.pack(DATA, 2, 9, 0))
    out = hv.ask(giver, GrantTransfer(SCRATCH, 1))
    hv.kill(2)
    hv.serve_all()
    assert out[1] is None and TRANSFER.unpack(hv.read(giver, TRANSFER.size))[3] == GrantStatus.BAD_DOMAIN
    assert hv.frames.nr_free == free + owned + 1, "the giver's frame is lost to it, not to the machine"
    hv.check()


def test_a_giver_that_dies_meanwhile_leaves_the_entry_as_it_was(hv: StandIn) -> None:
    giver, taker = hv.domains[1], hv.domains[2]
    over(hv, taker, DecreaseReservation, [DATA])
    grant(hv, taker, 9, Gtf.ACCEPT_TRANSFER, 1, DATA)
    hv.write(giver, TRANSFER.pack(DATA, 2, 9, 0))
    out = hv.ask(giver, GrantTransfer(SCRATCH, 1))
    assert flags_of(hv, taker, 9) == Gtf.ACCEPT_TRANSFER | Gtf.TRANSFER_COMMITTED
    hv.kill(1)
    hv.serve_all()
    assert isinstance(out[1], MonitorGone) and giver.state == "dead" and not taker.expected
    assert flags_of(hv, taker, 9) == Gtf.ACCEPT_TRANSFER and taker.p2m[DATA] == NO_FRAME
    hv.quiet()


def test_a_hole_is_none_before_its_frame_has_gone(hv: StandIn) -> None:
    """The taker's own frame is still mapped there: what is put in its place would lose its count to it."""
    giver, taker = hv.domains[1], hv.domains[2]
    grant(hv, taker, 9, Gtf.ACCEPT_TRANSFER, 1, DATA)
    hv.write(taker, struct.pack("<Q", DATA))
    out = hv.ask(taker, DecreaseReservation(SCRATCH, 1))
    hv.write(giver, TRANSFER.pack(DATA, 2, 9, 0))
    hv.ask(giver, GrantTransfer(SCRATCH, 1))
    hv.serve_all()
    assert out == [1, None] and TRANSFER.unpack(hv.read(giver, TRANSFER.size))[3] == GrantStatus.BAD_GNTREF
    assert flip(hv, giver, DATA, 2, 9) == GrantStatus.OKAY
    hv.quiet()


# ---- copies


def copy(hv: StandIn, caller: Domain, record: bytes) -> int:
    hv.write(caller, record)
    hv.done(caller, GrantCopy(SCRATCH, 1))
    return int(COPY.unpack(hv.read(caller, COPY.size))[8])


def test_bytes_go_both_ways_and_nothing_is_left_marked(hv: StandIn) -> None:
    mine, other = hv.domains[1], hv.domains[2]
    grant(hv, other, 9, Gtf.PERMIT_ACCESS, 1, DATA)
    hv.write(mine, b"hello", virt(DATA))
    assert copy(hv, mine, COPY.pack(DATA, DOMID_SELF, 0, 9, 2, 100, 5, DEST_IS_REF, 0)) == GrantStatus.OKAY
    assert hv.read(other, 5, virt(DATA) + 100) == b"hello"
    assert copy(hv, mine, COPY.pack(9, 2, 100, DATA, DOMID_SELF, 7, 5, SOURCE_IS_REF, 0)) == GrantStatus.OKAY
    assert hv.read(mine, 12, virt(DATA)) == b"hello\0\0hello"
    assert flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS, "neither reading nor writing"
    hv.quiet()


def test_a_mapping_keeps_its_marks_through_a_copy(hv: StandIn) -> None:
    mine, other = hv.domains[1], hv.domains[2]
    grant(hv, other, 9, Gtf.PERMIT_ACCESS, 1, DATA)
    hv.write(mine, MAP_REF.pack(GRANT_BASE, 2, 9, 2, 0, 0, 0))
    assert hv.done(mine, GrantMap(SCRATCH, 1)) == 1
    assert copy(hv, mine, COPY.pack(9, 2, 0, DATA, DOMID_SELF, 0, 64, SOURCE_IS_REF, 0)) == GrantStatus.OKAY
    assert flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS | Gtf.READING | Gtf.WRITING


def test_copies_that_may_not_be(hv: StandIn) -> None:
    mine, other = hv.domains[1], hv.domains[2]
    grant(hv, other, 9, Gtf.PERMIT_ACCESS | Gtf.READONLY, 1, DATA)
    grant(hv, other, 10, Gtf.PERMIT_ACCESS, 0, DATA)
    grant(hv, other, 11, Gtf.PERMIT_ACCESS, 1, GRANT_PFN)
    page = hv.read(other, PAGE_SIZE, virt(DATA))
    refused = {
        "for writing": (COPY.pack(DATA, DOMID_SELF, 0, 9, 2, 0, 4, DEST_IS_REF, 0), GrantStatus.PERMISSION_DENIED),
        "another's": (COPY.pack(10, 2, 0, DATA, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.PERMISSION_DENIED),
        "without a ref": (COPY.pack(DATA, 2, 0, DATA, DOMID_SELF, 0, 4, 0, 0), GrantStatus.PERMISSION_DENIED),
        "its table": (COPY.pack(11, 2, 0, DATA, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_GNTREF),
        "no entry": (COPY.pack(1 << 40, 2, 0, DATA, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_GNTREF),
        "nobody's": (COPY.pack(9, 77, 0, DATA, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_DOMAIN),
        "beyond the page": (COPY.pack(9, 2, 4093, DATA, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "beyond ours": (COPY.pack(9, 2, 0, DATA, DOMID_SELF, 4095, 2, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "no frame": (COPY.pack(9, 2, 0, 1 << 33, DOMID_SELF, 0, 4, SOURCE_IS_REF, 0), GrantStatus.BAD_COPY_ARG),
        "flags": (COPY.pack(9, 2, 0, DATA, DOMID_SELF, 0, 4, SOURCE_IS_REF | 4, 0), GrantStatus.BAD_COPY_ARG),
    }
    for what, (record, status) in refused.items():
        assert copy(hv, mine, record) == status, what
    assert hv.read(other, PAGE_SIZE, virt(DATA)) == page and flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS | Gtf.READONLY


def test_a_long_run_of_nonsense_leaves_counts_and_marks_as_they_were(hv: StandIn) -> None:
    rng, mine, other = random.Random(1), hv.domains[1], hv.domains[2]
    grant(hv, other, 9, Gtf.PERMIT_ACCESS, 1, DATA)
    small = [0, 1, 2, 9, DATA, GRANT_PFN, 0xFFFF, 1 << 32, (1 << 64) - 1]
    for _ in range(3000):
        side = [(rng.choice(small), rng.choice([1, 2, 0x7FF0, 9]), rng.randrange(5000)) for _ in range(2)]
        copy(hv, mine, COPY.pack(*side[0], *side[1], rng.randrange(5000), rng.randrange(5), 0))
    assert flags_of(hv, other, 9) == Gtf.PERMIT_ACCESS
    hv.quiet()


def test_setup_says_where_the_table_is(hv: StandIn) -> None:
    hv.done(hv.domains[1], GrantSetupTable(DOMID_SELF, 8, SCRATCH))
    assert struct.unpack("<8Q", hv.read(hv.domains[1], 64)) == tuple(range(GRANT_PFN, GRANT_PFN + 8))
