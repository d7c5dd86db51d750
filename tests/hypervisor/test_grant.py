"""Grants: claims, holds, releases over real tables and frames, with monitors that answer when the test says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hypervisor import evtchn, grant, lifecycle, mmu, space
from hypervisor.domain import Domain
from hypervisor.frames import NO_OWNER, FrameTable
from hypervisor.gate.monitor import MAX_COMMANDS, Monitor, MonitorGone, Page
from hypervisor.grant import GrantMapping
from hypervisor.loop import Steps
from hypervisor.public.domctl import MapForeign
from hypervisor.public.errors import BadAddress, Invalid, NotPermitted, TooBig
from hypervisor.public.grant import GrantMap, GrantQuerySize, GrantStatus, GrantUnmap, Gtf, MapFlags
from hypervisor.public.layout import (
    GRANT_BASE,
    GRANT_ENTRIES,
    GRANT_FRAMES,
    GRANT_PFN,
    HYPERVISOR_VIRT_START,
    SHARED_INFO,
    virt,
)
from hypervisor.public.mmu import EXT_OP, MmuextCommand, MmuextOp
from hypervisor.public.types import DOMID_SELF, MAX_BATCH, PAGE_SIZE
from tests.conftest import NIGHTLY
from tests.models import stand_in
from tests.models.address_space import ZERO
from tests.models.grants import (
    DOMIDS,
    FIRST_PFN,
    FIRST_REF,
    Game,
    MapRef,
    end,
    entry,
    give,
    give_frame,
    map_now,
    play,
    start_map,
    start_unmap,
    unmap_now,
)
from tests.models.stand_in import DOMAIN_FRAMES, SCRATCH, StandIn, tables_of

MOVES = 100_000 if NIGHTLY else 6_000
OKAY, DENIED = GrantStatus.OKAY, GrantStatus.PERMISSION_DENIED
READ_ONLY = int(MapFlags.HOST_MAP | MapFlags.READONLY)
VA = GRANT_BASE


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=4)
    yield made
    made.close()


@pytest.fixture
def pair(hv: StandIn) -> tuple[Domain, Domain]:
    """A granter whose reference 8 is domain 2's to map, and domain 2."""
    give(hv, hv.domains[1], FIRST_REF, 2, FIRST_PFN)
    return hv.domains[1], hv.domains[2]


def counts(hv: StandIn, granter: Domain) -> tuple[int, int]:
    """References of the granted frame beyond its owner's mapping: (all, writable)."""
    frame = hv.frames.frame[granter.mfn_list[FIRST_PFN]]
    return frame.total - 2, frame.count - 1


def flags(hv: StandIn, granter: Domain) -> int:
    return entry(hv, granter, FIRST_REF)[0] & ~int(Gtf.TYPE_MASK)


# ---- mapping


def test_a_grant_is_mapped_and_counted_and_let_go(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    ((status, handle, bus),) = map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    assert (status, bus) == (OKAY, one.mfn_list[FIRST_PFN]) and counts(hv, one) == (1, 1)
    assert hv.spaces[2].pages[VA] == (bus, True) and flags(hv, one) == Gtf.READING | Gtf.WRITING
    assert end(hv, one, FIRST_REF) != 0, "it is mapped"
    hv.quiet()
    assert unmap_now(hv, two, (VA, handle)) == [OKAY]
    assert counts(hv, one) == (0, 0) and flags(hv, one) == 0 and VA not in hv.spaces[2].pages
    assert end(hv, one, FIRST_REF) == 0
    hv.quiet()


def test_read_only_is_mapped_through_the_read_only_descriptor(hv: StandIn) -> None:
    one, two = hv.domains[1], hv.domains[2]
    give(hv, one, FIRST_REF, 2, FIRST_PFN, readonly=True)
    got = map_now(hv, two, MapRef(VA, FIRST_REF, 1), MapRef(VA, FIRST_REF, 1, READ_ONLY))
    assert [status for status, _, _ in got] == [DENIED, OKAY]
    assert hv.spaces[2].pages[VA] == (one.mfn_list[FIRST_PFN], False)
    assert counts(hv, one) == (1, 0) and flags(hv, one) == Gtf.READING | Gtf.READONLY
    hv.quiet()


@pytest.mark.parametrize(
    ("ref", "wanted"),
    [
        (MapRef(VA, FIRST_REF, 1), OKAY),
        (MapRef(VA, FIRST_REF + 1, 1), DENIED),  # not granted
        (MapRef(VA, GRANT_ENTRIES, 1), GrantStatus.BAD_GNTREF),
        (MapRef(VA, 0xFFFFFFFF, 1), GrantStatus.BAD_GNTREF),
        (MapRef(VA, FIRST_REF, 3), DENIED),  # of another domain's table
        (MapRef(VA, FIRST_REF, 77), GrantStatus.BAD_DOMAIN),
        (MapRef(VA, FIRST_REF, DOMID_SELF), DENIED),
        (MapRef(VA, FIRST_REF, 1, 0), GrantStatus.GENERAL_ERROR),
        (MapRef(VA, FIRST_REF, 1, 0xFFFFFFFF), GrantStatus.GENERAL_ERROR),
        (MapRef(VA, FIRST_REF, 1, int(MapFlags.READONLY)), GrantStatus.GENERAL_ERROR),
        (MapRef(VA + 1, FIRST_REF, 1), GrantStatus.BAD_VIRT_ADDR),
        (MapRef(VA - PAGE_SIZE, FIRST_REF, 1), GrantStatus.BAD_VIRT_ADDR),
        (MapRef(virt(0), FIRST_REF, 1), GrantStatus.BAD_VIRT_ADDR),
        (MapRef(0, FIRST_REF, 1), GrantStatus.BAD_VIRT_ADDR),
        (MapRef(HYPERVISOR_VIRT_START, FIRST_REF, 1), GrantStatus.BAD_VIRT_ADDR),
        (MapRef(SHARED_INFO, FIRST_REF, 1), GrantStatus.BAD_VIRT_ADDR),
        (MapRef((1 << 64) - PAGE_SIZE, FIRST_REF, 1), GrantStatus.BAD_VIRT_ADDR),
        (MapRef(HYPERVISOR_VIRT_START - PAGE_SIZE, FIRST_REF, 1), OKAY),
    ],
)
def test_what_may_be_mapped_where(hv: StandIn, pair: tuple[Domain, Domain], ref: MapRef, wanted: int) -> None:
    one, two = pair
    ((status, handle, _),) = map_now(hv, two, ref)
    assert status == wanted and counts(hv, one) == ((1, 1) if status == OKAY else (0, 0)) and bool(handle) == (status == OKAY)
    hv.quiet()


def test_only_the_domain_it_names_may_map_it(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    assert map_now(hv, hv.domains[3], MapRef(VA, FIRST_REF, 1))[0][0] == DENIED
    assert map_now(hv, hv.domains[0], MapRef(VA, FIRST_REF, 1))[0][0] == DENIED, "dom0 neither"


@pytest.mark.parametrize("whose", ["another's", "nobody's", "beyond", "a pfn"])
def test_a_frame_that_is_not_the_granters_to_give(hv: StandIn, whose: str) -> None:
    """The entry is let go again."""
    one, three = hv.domains[1], hv.domains[3]
    free = next(mfn for mfn in range(hv.frames.nr_frames) if hv.frames.frame[mfn].owner == NO_OWNER)
    pfn = next(pfn for pfn in range(DOMAIN_FRAMES) if pfn not in one.mfn_list)
    mfns = {"another's": three.mfn_list[FIRST_PFN], "nobody's": free, "beyond": 0xFFFFFFFF, "a pfn": pfn}
    give_frame(hv, one, FIRST_REF, 2, mfns[whose])
    assert map_now(hv, hv.domains[2], MapRef(VA, FIRST_REF, 1))[0][0] == GrantStatus.BAD_GNTREF
    assert flags(hv, one) == 0 and end(hv, one, FIRST_REF) == 0
    hv.quiet()


@pytest.mark.parametrize("level", range(3))
def test_a_table_is_given_for_reading_alone(hv: StandIn, level: int) -> None:
    one, two = hv.domains[1], hv.domains[2]
    table = tables_of(DOMAIN_FRAMES).tables[level]
    give(hv, one, FIRST_REF, 2, table)
    assert [got[0] for got in map_now(hv, two, MapRef(VA, FIRST_REF, 1), MapRef(VA, FIRST_REF, 1, READ_ONLY))] == [DENIED, OKAY]
    assert hv.spaces[2].pages[VA] == (one.mfn_list[table], False)
    assert flags(hv, one) == Gtf.READING, "what was refused left no mark"
    hv.quiet()


def test_what_another_can_write_becomes_no_table(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    """Not even when its owner has let go of it; and a frame that is read may."""
    one, two = pair
    mfn = one.mfn_list[FIRST_PFN]
    ((_, handle, _),) = map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    hv.hide(one, FIRST_PFN)
    hv.write(one, EXT_OP.pack(MmuextCommand.PIN_L1, mfn, 0))
    with pytest.raises(Invalid):
        hv.done(one, MmuextOp(SCRATCH, 1, 0, DOMID_SELF))
    unmap_now(hv, two, (VA, handle))
    map_now(hv, two, MapRef(VA, FIRST_REF, 1, READ_ONLY))
    assert hv.done(one, MmuextOp(SCRATCH, 1, 0, DOMID_SELF)) == 1
    assert map_now(hv, two, MapRef(VA + PAGE_SIZE, FIRST_REF, 1))[0][0] == DENIED
    hv.quiet()


def test_bad_entries_do_not_stop_the_others(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    refs = [MapRef(VA, FIRST_REF, 1), MapRef(VA, FIRST_REF, 1), MapRef(VA + PAGE_SIZE, 9, 1), MapRef(VA + 8192, FIRST_REF, 1)]
    out = start_map(hv, two, refs)
    hv.serve_all()
    assert out == [2, None] and counts(hv, one) == (2, 2)
    assert sorted(va for va in hv.spaces[2].pages if va >= VA and va < SHARED_INFO) == [VA, VA + 8192]
    hv.quiet()


def test_an_address_is_taken_while_it_comes_and_while_it_goes(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    _, two = pair
    ((_, handle, _),) = map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    assert map_now(hv, two, MapRef(VA, FIRST_REF, 1))[0][0] == GrantStatus.BAD_VIRT_ADDR
    start_unmap(hv, two, [(VA, handle)])
    assert not grant.address_is_free(two, VA)
    hv.serve_all()
    assert grant.address_is_free(two, VA)
    assert map_now(hv, two, MapRef(VA, FIRST_REF, 1))[0][0] == OKAY


def test_several_mappings_of_one_grant(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    refs = [MapRef(VA, FIRST_REF, 1), MapRef(VA + 4096, FIRST_REF, 1, READ_ONLY), MapRef(VA + 8192, FIRST_REF, 1)]
    got = map_now(hv, two, *refs)
    handles = [handle for _, handle, _ in got]
    assert counts(hv, one) == (3, 2)
    unmap_now(hv, two, (VA, handles[0]))
    assert flags(hv, one) == Gtf.READING | Gtf.WRITING
    unmap_now(hv, two, (VA + 8192, handles[2]))
    assert flags(hv, one) == Gtf.READING and counts(hv, one) == (1, 0)
    unmap_now(hv, two, (VA + 4096, handles[1]))
    assert flags(hv, one) == 0 and counts(hv, one) == (0, 0)
    hv.quiet()


def test_a_domain_may_map_its_own_grant(hv: StandIn) -> None:
    one = hv.domains[1]
    give(hv, one, FIRST_REF, 1, FIRST_PFN)
    assert [s for s, _, _ in map_now(hv, one, MapRef(VA, FIRST_REF, DOMID_SELF), MapRef(VA + 4096, FIRST_REF, 1))] == [OKAY] * 2
    hv.quiet()
    hv.kill(1)
    hv.settle()
    assert one.state == "dead"
    hv.quiet()


def test_later_changes_of_the_entry_change_nothing(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    """The hypervisor decides from what it copied when it mapped, never from the guest's copy."""
    one, two = pair
    ((_, handle, mfn),) = map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    hv.machine.write(one.mfn_list[GRANT_PFN], FIRST_REF * 8, b"\xff" * 8)
    assert unmap_now(hv, two, (VA, handle)) == [OKAY] and counts(hv, one) == (0, 0) and mfn == one.mfn_list[FIRST_PFN]
    hv.quiet()


# ---- unmapping, arrays, limits


def test_handles(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    ((_, handle, _),) = map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    bad = GrantStatus.BAD_HANDLE
    assert unmap_now(hv, two, (VA, handle + 1), (VA, 0), (VA, 0xFFFFFFFF)) == [bad, bad, bad]
    assert unmap_now(hv, two, (VA + 4096, handle)) == [GrantStatus.BAD_VIRT_ADDR] and counts(hv, one) == (1, 1)
    assert unmap_now(hv, hv.domains[3], (VA, handle)) == [bad], "another's handle"
    assert unmap_now(hv, two, (VA, handle), (VA, handle)) == [OKAY, bad], "twice in one array"
    assert unmap_now(hv, two, (VA, handle)) == [bad] and counts(hv, one) == (0, 0)
    hv.quiet()


def test_handles_come_round(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    """Four thousand million mappings later: the number fits its field, and none that is in use comes again."""
    _, two = pair
    first = map_now(hv, two, MapRef(VA, FIRST_REF, 1))[0][1]
    assert first == 1
    two.next_handle = 0xFFFFFFFF
    got = map_now(hv, two, *(MapRef(VA + i * PAGE_SIZE, FIRST_REF, 1) for i in range(1, 4)))
    assert [handle for _, handle, _ in got] == [0xFFFFFFFF, 2, 3]


def test_the_builders_mappings_are_not_the_guests_to_unmap(hv: StandIn) -> None:
    dom0, one = hv.domains[0], hv.domains[1]
    one.state = "paused"
    hv.done(dom0, MapForeign(1, FIRST_PFN, 2, VA))
    handles = [(m.va, m.handle) for m in dom0.maptrack.values()]
    assert unmap_now(hv, dom0, *handles) == [GrantStatus.BAD_HANDLE] * 2
    hv.quiet()


def test_arrays_and_limits(hv: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = hv.domains[1], hv.domains[2]
    for kind in (GrantMap, GrantUnmap):
        with pytest.raises(TooBig):
            hv.done(two, kind(SCRATCH, MAX_BATCH + 1))
        for address in (0, VA, SHARED_INFO, virt(len(two.mfn_list)), (1 << 64) - 8):
            with pytest.raises(BadAddress):
                hv.done(two, kind(address, 1))
        assert hv.done(two, kind(0, 0)) == 0
    assert hv.done(two, GrantQuerySize(DOMID_SELF)) == (GRANT_FRAMES, GRANT_FRAMES)
    with pytest.raises(NotPermitted):
        hv.done(two, GrantQuerySize(1))
    give(hv, one, FIRST_REF, 2, FIRST_PFN)
    monkeypatch.setattr(grant, "MAX_MAPTRACK", 3)
    got = map_now(hv, two, *(MapRef(VA + i * PAGE_SIZE, FIRST_REF, 1) for i in range(5)))
    assert [status for status, _, _ in got] == [OKAY] * 3 + [GrantStatus.NO_DEVICE_SPACE] * 2


def test_a_full_array_is_several_batches(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    out = start_map(hv, two, [MapRef(VA + i * PAGE_SIZE, FIRST_REF, 1) for i in range(MAX_BATCH)])
    served = []
    while hv.spaces[2].waiting():
        served.append(hv.spaces[2].serve())
        hv.settle()
    assert served == [MAX_COMMANDS] * 8 and out == [MAX_BATCH, None] and counts(hv, one) == (MAX_BATCH, MAX_BATCH)
    hv.quiet()


# ---- deaths


def test_counts_fall_only_after_the_acknowledgement(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    start_map(hv, two, [MapRef(VA, FIRST_REF, 1)])
    assert counts(hv, one) == (1, 1), "taken before the monitor is asked"
    hv.serve_all()
    ((handle, _),) = two.maptrack.items()
    out = start_unmap(hv, two, [(VA, handle)])
    hv.settle()
    assert out == [] and counts(hv, one) == (1, 1)
    hv.spaces[2].serve()
    assert counts(hv, one) == (1, 1), "not acknowledged yet"
    hv.settle()
    assert out == [1, None] and counts(hv, one) == (0, 0)


def test_a_dead_granters_frame_becomes_a_zero_page(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    ((_, handle, mfn),) = map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    hv.machine.write(mfn, 0, b"secret")
    hv.kill(1)
    hv.settle()
    assert one.state == "dying" and hv.frames.frame[mfn].owner == 1 and hv.machine.read(mfn, 0, 6) == b"secret"
    hv.spaces[2].serve()
    assert hv.spaces[2].pages[VA] == (ZERO, True)
    hv.settle()
    assert one.state == "dead" and hv.machine.read(mfn, 0, 6) == bytes(6)
    assert two.maptrack[handle].orphan and not grant.address_is_free(two, VA)
    hv.quiet()
    assert unmap_now(hv, two, (VA, handle)) == [OKAY] and VA not in hv.spaces[2].pages
    assert grant.address_is_free(two, VA)
    hv.quiet()


def test_a_dead_grantees_mappings_die_with_its_space(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    lifecycle.end(hv, two, "killed")
    hv.settle()
    assert counts(hv, one) == (1, 1) and two.state == "dying", "its process may still be running"
    hv.spaces[2].die()
    hv.settle()
    assert counts(hv, one) == (0, 0) and flags(hv, one) == 0 and two.state == "dead"
    hv.quiet()


@pytest.mark.parametrize("count", [1, 3 * MAX_COMMANDS])
def test_the_granter_dies_while_it_is_being_mapped(hv: StandIn, pair: tuple[Domain, Domain], count: int) -> None:
    one, two = pair
    out = start_map(hv, two, [MapRef(VA + i * PAGE_SIZE, FIRST_REF, 1) for i in range(count)])
    hv.spaces[2].serve()
    hv.kill(1)
    hv.serve_all()
    assert one.state == "dead" and out == [count, None]
    assert {hv.spaces[2].pages[VA + i * PAGE_SIZE] for i in range(count)} == {(ZERO, True)}
    hv.quiet()


@pytest.mark.parametrize("count", [1, 3 * MAX_COMMANDS])
def test_the_granter_dies_while_it_is_being_unmapped(hv: StandIn, pair: tuple[Domain, Domain], count: int) -> None:
    one, two = pair
    start_map(hv, two, [MapRef(VA + i * PAGE_SIZE, FIRST_REF, 1) for i in range(count)])
    hv.serve_all()
    out = start_unmap(hv, two, [(m.va, m.handle) for m in two.maptrack.values()])
    hv.kill(1)
    hv.settle()
    assert one.state == "dying", "the unmap is under way: it is waited for"
    hv.serve_all()
    assert one.state == "dead" and out == [count, None] and not two.maptrack
    hv.quiet()


def test_both_die(hv: StandIn) -> None:
    one, two = hv.domains[1], hv.domains[2]
    for a, b in ((one, two), (two, one)):
        give(hv, a, FIRST_REF, b.domid, FIRST_PFN)
        map_now(hv, b, MapRef(VA, FIRST_REF, a.domid))
    hv.kill(1)
    hv.kill(2)
    hv.settle()
    assert one.state == two.state == "dead"
    hv.quiet()


def test_a_monitor_that_cannot_unmap_ends_its_domain(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    ((_, handle, _),) = map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    out = start_unmap(hv, two, [(VA, handle)])
    hv.spaces[2].serve(fail_at=0)
    hv.settle()
    assert two.state == "dying" and "could not unmap" in two.reason and isinstance(out[1], MonitorGone)
    assert counts(hv, one) == (1, 1)
    hv.spaces[2].die()
    hv.settle()
    assert counts(hv, one) == (0, 0)
    hv.quiet()


def test_a_monitor_that_cannot_take_back_ends_its_domain(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    one, two = pair
    map_now(hv, two, MapRef(VA, FIRST_REF, 1))
    hv.kill(1)
    hv.settle()
    hv.spaces[2].serve(fail_at=0)
    hv.settle()
    assert two.state == "dying" and one.state == "dying"
    hv.spaces[2].die()
    hv.settle()
    assert two.state == one.state == "dead"
    hv.quiet()


def test_a_dead_domains_grants_are_nobodys(hv: StandIn, pair: tuple[Domain, Domain]) -> None:
    hv.kill(1)
    assert map_now(hv, hv.domains[2], MapRef(VA, FIRST_REF, 1))[0][0] == GrantStatus.BAD_DOMAIN
    with pytest.raises(Invalid):
        hv.done(hv.domains[0], GrantQuerySize(1))


# ---- a long game


def test_a_long_game() -> None:
    play(Game(), MOVES)


class Machine(RuleBasedStateMachine):
    """The same game, played by Hypothesis."""

    who = st.sampled_from(DOMIDS)
    number = st.integers(0, 200)

    @initialize()
    def begin(self) -> None:
        self.game = Game()

    @rule(a=who, b=who, ref=number, pfn=number, readonly=st.booleans())
    def give(self, a: int, b: int, ref: int, pfn: int, readonly: bool) -> None:
        self.game.give(a, b, ref, pfn, readonly)

    @rule(a=who, ref=number)
    def end(self, a: int, ref: int) -> None:
        self.game.end(a, ref)

    @rule(a=who, b=who, ref=number, va=number, count=st.sampled_from([1, 3, 100]), readonly=st.booleans())
    def map(self, a: int, b: int, ref: int, va: int, count: int, readonly: bool) -> None:
        """Of `b`; where it has nothing for `a`, of whoever has."""
        self.game.map(a, b, ref, va, count, readonly)
        if self.game.alive(a) and not self.game.hv.domains[a].maptrack:
            self.game.map(a, self.game.granter_for(a) or b, ref, va, count, readonly)

    @rule(a=who, first=number, count=st.integers(1, 70))
    def unmap(self, a: int, first: int, count: int) -> None:
        self.game.unmap(a, first, count)

    @rule(a=who, pfn=number, mfn=number, kind=st.integers(0, 23))
    def place(self, a: int, pfn: int, mfn: int, kind: int) -> None:
        self.game.place(a, pfn, mfn, kind)

    @rule(a=who, pfn=number, write=st.booleans())
    def touch(self, a: int, pfn: int, write: bool) -> None:
        self.game.touch(a, pfn, write)

    @rule(a=who, first=number, count=st.integers(1, 3))
    def shrink(self, a: int, first: int, count: int) -> None:
        self.game.shrink(a, first, count)

    @rule(a=who, count=st.integers(1, 3))
    def grow(self, a: int, count: int) -> None:
        self.game.grow(a, count)

    @rule(a=who, b=who, ref=number)
    def accept(self, a: int, b: int, ref: int) -> None:
        self.game.accept(a, b, ref)

    @rule(a=who, b=who, first=number, count=st.integers(1, 3))
    def flip(self, a: int, b: int, first: int, count: int) -> None:
        self.game.flip(a, b, first, count)

    @rule(a=who, fail_at=st.none() | st.integers(0, 63))
    def serve(self, a: int, fail_at: int | None) -> None:
        self.game.serve(a, fail_at)

    @rule(a=who)
    def kill(self, a: int) -> None:
        self.game.kill(a)

    @rule(a=who)
    def die(self, a: int) -> None:
        self.game.die(a)

    @invariant()
    def check(self) -> None:
        if hasattr(self, "game"):
            self.game.check()

    def teardown(self) -> None:
        if hasattr(self, "game"):
            try:
                self.game.quiet()
            finally:
                self.game.close()


TestMachine = Machine.TestCase


def release_first(hv: StandIn, grantee: Domain, mappings: list[GrantMapping]) -> Steps:
    """Counts fall before the acknowledgement."""
    assert grantee.monitor is not None
    for mapping in mappings:
        grant.drop(hv, mapping)
    yield from grantee.monitor.unmap([m.va for m in mappings])


def orphan_at_once(hv: StandIn, granter: Domain) -> Steps:
    """A dead granter's frames are free before they are taken back."""
    for mapping in [m for group in list(granter.active.values()) for m in list(group)]:
        grant.orphan(hv, mapping)
    yield hv.loop.turn


def drop_too_early(hv: StandIn, domain: Domain) -> None:
    """A dying grantee's mappings are forgotten while its process may still run."""
    grant.drop_all(hv, domain)


def forget_the_count(hv: StandIn, mapping: GrantMapping, real: Any = grant.drop) -> None:
    """It is unmapped, and the frame is still counted as mapped."""
    if not mapping.orphan:
        hv.frames.get(mapping.mfn, mapping.writable)
    real(hv, mapping)


def settle_late(hv: StandIn, domain: Domain, job: Any) -> Steps:
    """The references of an old entry fall before its host mapping is gone."""
    changes = job.changes[0 : job.nr_changes]
    grant.lib.mmu_commit(hv.frames.mmu, job)
    if changes:
        yield from space.follow(hv, domain, space.ffi.new("struct host_change[]", changes), len(changes))


def never_follow(hv: StandIn, domain: Domain, changes: Any, count: int) -> Steps:
    """Host mappings stay as they are."""
    yield hv.loop.turn


def writers_only(frames: FrameTable, mfn: int) -> bool:
    """A frame that is only read may leave."""
    return not frames.frame[mfn].count and not frames.frame[mfn].done


def no_maximum(hv: StandIn, caller: Domain, mfn: int, domid: int, ref: int, real: Any = grant._transfer_one) -> GrantStatus:
    """A flip to whoever owns enough already."""
    taker = hv.domains[domid]
    maximum, taker.max_frames = taker.max_frames, 1 << 20
    status: GrantStatus = real(hv, caller, mfn, domid, ref)
    taker.max_frames = maximum
    return status


class Interleaves(Monitor):
    """Queues a long map 64 pages at a time."""

    def map(self, pages: list[Page]) -> Steps:
        for at in range(0, len(pages), MAX_COMMANDS):
            yield from super().map(pages[at : at + MAX_COMMANDS])


class ReleasesTooMuch:
    """The C, but a release clears both flags."""

    def __init__(self) -> None:
        self.__dict__.update({name: getattr(grant.lib, name) for name in dir(grant.lib)})
        self.grant_release = lambda granter, ref, writing, reading, release=grant.lib.grant_release: release(granter, ref, 1, 1)


DEFECTS: dict[str, tuple[Any, str, Any]] = {
    "counts fall before the acknowledgement": (grant, "release", release_first),
    "freed before it is taken back": (grant, "take_back", orphan_at_once),
    "a dying grantee is forgotten": (evtchn, "close_all", drop_too_early),
    "a count is forgotten": (grant, "drop", forget_the_count),
    "a long map lets others in between": (stand_in, "Monitor", Interleaves),
    "flags are cleared while it is mapped": (grant, "lib", ReleasesTooMuch()),
    "an address that is coming counts as free": (grant, "address_is_free", lambda domain, va: va not in domain.monitor.shadow),
    "a frame that is read leaves": (FrameTable, "is_idle", writers_only),
    "an entry's references fall too early": (mmu, "_settle", settle_late),
    "host mappings do not follow": (space, "follow", never_follow),
    "a flip over the maximum": (grant, "_transfer_one", no_maximum),
    "frames are not scrubbed": (stand_in.MachineMemory, "scrub", lambda self, mfn, count=1: None),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_game_finds_a_seeded_defect(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    monkeypatch.setattr(*DEFECTS[defect])
    with pytest.raises((AssertionError, KeyError, ValueError)):
        for seed in range(10):
            play(Game(), 6_000, seed)
