"""The frame table against a model that is a dictionary, by a seeded loop and by Hypothesis; and how it scatters.

Frames that are page tables are test_tables.py's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hypervisor._hv import ffi
from hypervisor.frames import CHUNK, NO_MFN, NO_OWNER, FrameTable, run_length
from hypervisor.public.errors import NoMemory
from hypervisor.public.mmu import PageType
from tests.conftest import NIGHTLY

NR_FRAMES = 200  # three chunks and a part of one
FEW_FRAMES = 9  # for Hypothesis: so few that it comes back to the same one
OPERATIONS = 1_000_000 if NIGHTLY else 100_000
DOMIDS = range(6)


def make(nr_frames: int, kind: type[FrameTable] = FrameTable) -> FrameTable:
    """One without a machine: nothing here looks into a frame."""
    return kind(nr_frames, ffi.NULL, ffi.NULL)


@dataclass
class Owned:
    """What the model knows of a frame that is not free: its owner, and whether each use of it writes."""

    owner: int
    uses: list[bool] = field(default_factory=list)


class Pair:
    """A frame table and what it should be. Every step is asked of both."""

    def __init__(self, table: FrameTable) -> None:
        self.table = table
        self.owned: dict[int, Owned] = {}

    def _take(self, domid: int, got: list[int]) -> None:
        assert len(set(got)) == len(got), "a frame was handed out twice"
        for mfn in got:
            assert mfn not in self.owned, f"mfn {mfn} was not free"
            self.owned[mfn] = Owned(domid)

    def allocate(self, domid: int, count: int) -> None:
        if count > self.table.nr_frames - len(self.owned):
            with pytest.raises(NoMemory):
                self.table.allocate(domid, count)
            return
        got = self.table.allocate(domid, count)
        assert len(got) == count, "a frame too many or too few"
        self._take(domid, got)

    def allocate_extent(self, domid: int, order: int) -> None:
        size = 1 << order
        starts = range(0, self.table.nr_frames - size + 1, size)
        there = any(self.owned.keys().isdisjoint(range(first, first + size)) for first in starts)
        if not there:
            with pytest.raises(NoMemory):
                self.table.allocate_extent(domid, order)
            return
        got = self.table.allocate_extent(domid, order)
        assert got == list(range(got[0], got[0] + size)) and got[0] % size == 0, f"mfn {got[0]}: no extent of order {order}"
        self._take(domid, got)

    def get(self, mfn: int, writable: bool) -> None:
        if mfn in self.owned:
            assert self.table.get(mfn, writable), f"mfn {mfn} is no table"
            self.owned[mfn].uses.append(writable)
        else:
            self.refuses(lambda: self.table.get(mfn, writable))

    def put(self, mfn: int, writable: bool) -> None:
        """Of a use that there is; else it must be refused (a reading one where only writing ones are, is not seen)."""
        uses = self.owned[mfn].uses if mfn in self.owned else []
        if writable in uses:
            self.table.put(mfn, writable)
            uses.remove(writable)
        elif writable or not uses:
            self.refuses(lambda: self.table.put(mfn, writable))

    def release(self, mfn: int) -> None:
        if mfn in self.owned and not self.owned[mfn].uses:
            self.table.release(mfn)
            del self.owned[mfn]
        else:
            self.refuses(lambda: self.table.release(mfn))

    def give(self, mfn: int, domid: int) -> None:
        if mfn in self.owned and not self.owned[mfn].uses:
            self.table.give(mfn, domid)
            self.owned[mfn].owner = domid
        else:
            self.refuses(lambda: self.table.give(mfn, domid))

    def reset(self, domid: int) -> None:
        """The domain is gone: its frames are as if they had just been allocated."""
        mine = self.of(domid)
        self.table.reset(mine)
        for mfn in mine:
            self.owned[mfn].uses.clear()

    def of(self, domid: int) -> list[int]:
        """What the model says, after the table said the same, of the whole and of a part."""
        mine = sorted(mfn for mfn, owned in self.owned.items() if owned.owner == domid)
        part = range(self.table.nr_frames // 3, self.table.nr_frames // 2)
        assert self.table.of(domid, range(self.table.nr_frames)) == mine, f"mfn list of domain {domid}"
        assert self.table.of(domid, part) == [mfn for mfn in mine if mfn in part], f"mfn list of domain {domid}, a part"
        return mine

    def refuses(self, act: Callable[[], object]) -> None:
        with pytest.raises(AssertionError, match="mfn"):
            act()

    def agree(self) -> None:
        """What the table keeps, what it recomputes, and the model."""
        table = self.table
        table.check(Counter((mfn, use) for mfn, owned in self.owned.items() for use in owned.uses))
        for mfn in range(table.nr_frames):
            f, owned = table.frame[mfn], self.owned.get(mfn)
            writing = sum(owned.uses) if owned else 0
            wanted = (owned.owner, 1 + len(owned.uses), writing) if owned else (NO_OWNER, 0, 0)
            assert (f.owner, f.total, f.count) == wanted, f"mfn {mfn}"
            assert (f.parent, f.slot, f.done, f.pinned, f.window) == (NO_MFN, 0, 0, 0, 0), f"mfn {mfn} has become a table"
            assert not writing or f.type == PageType.WRITABLE, f"mfn {mfn}"
            assert not table.is_table(mfn), f"mfn {mfn} is no table"
            assert table.is_idle(mfn) == (owned is not None and not owned.uses), f"mfn {mfn}: idle"
        assert table.nr_free == table.nr_frames - len(self.owned)
        assert dict(table.owned) == Counter(owned.owner for owned in self.owned.values())
        for domid in DOMIDS:
            self.of(domid)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The table's own shuffle, the same every time."""
    state = random.getstate()
    random.seed(2003)
    yield
    random.setstate(state)


class Machine(RuleBasedStateMachine):
    """What Hypothesis plays."""

    kind: type[FrameTable] = FrameTable
    mfns = st.integers(0, FEW_FRAMES - 1)
    domids = st.sampled_from(DOMIDS)

    @initialize()
    def begin(self) -> None:
        self.pair = Pair(make(FEW_FRAMES, self.kind))

    @rule(domid=domids, count=st.integers(0, FEW_FRAMES))
    def allocate(self, domid: int, count: int) -> None:
        self.pair.allocate(domid, count)

    @rule(domid=domids, order=st.integers(0, 4))
    def allocate_extent(self, domid: int, order: int) -> None:
        self.pair.allocate_extent(domid, order)

    @rule(mfn=mfns, writable=st.booleans())
    def get(self, mfn: int, writable: bool) -> None:
        self.pair.get(mfn, writable)

    @rule(mfn=mfns, writable=st.booleans())
    def put(self, mfn: int, writable: bool) -> None:
        self.pair.put(mfn, writable)

    @rule(mfn=mfns, times=st.integers(1, 2))
    def release(self, mfn: int, times: int) -> None:
        for _ in range(times):
            self.pair.release(mfn)

    @rule(mfn=mfns, domid=domids)
    def give(self, mfn: int, domid: int) -> None:
        self.pair.give(mfn, domid)

    @rule(domid=domids)
    def reset(self, domid: int) -> None:
        self.pair.reset(domid)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "pair"):
            self.pair.agree()


TestMachine = Machine.TestCase


def play(kind: type[FrameTable], operations: int, every: int = 500) -> None:
    """A seeded run; the model is compared every so often, and at the end."""
    rng = random.Random(1)
    pair = Pair(make(NR_FRAMES, kind))
    for i in range(operations):
        mfn, writable, domid = rng.randrange(NR_FRAMES), rng.random() < 0.5, rng.choice(DOMIDS)
        match rng.randrange(40):
            case 0 | 1 | 2:
                pair.allocate(domid, rng.randrange(1, 24) if rng.random() < 0.3 else rng.randrange(1, 4))
            case 3 | 4:
                pair.allocate_extent(domid, rng.choice((0, 0, 1, 1, 2, 3, 5, 6, 7)))
            case n if n < 14:
                pair.get(mfn, writable)
            case n if n < 28:
                pair.put(mfn, writable)
            case n if n < 36:
                pair.release(mfn)
            case 39 if rng.random() < 0.1:
                pair.reset(domid)
            case _:
                pair.give(mfn, domid)
        if i % every == 0:
            pair.agree()
    pair.agree()


@pytest.mark.timeout(300)
def test_a_long_run_agrees_with_the_model() -> None:
    play(FrameTable, OPERATIONS)


# ---- the same checks find what is broken


class ForgetsAPut(FrameTable):
    """A use that went is still counted, one time in a hundred."""

    puts = 0

    def put(self, mfn: int, writable: bool) -> None:
        self.puts += 1
        if self.puts % 100:
            super().put(mfn, writable)


class ReleasesInUse(FrameTable):
    """A frame changes owner while somebody maps it."""

    def is_idle(self, mfn: int) -> bool:
        return True


class ReleasesTwice(FrameTable):
    """A free frame is put on the free list again, and counted there."""

    def release(self, mfn: int) -> None:
        if self.frame[mfn].total == 0:
            self.nr_free += 1
        else:
            super().release(mfn)


class KeepsTheOwner(FrameTable):
    """A free frame still says whose it was."""

    def release(self, mfn: int) -> None:
        owner = self.frame[mfn].owner
        super().release(mfn)
        self.frame[mfn].owner = owner


class GivesUncounted(FrameTable):
    """A flipped frame is still among those of the domain that gave it."""

    def give(self, mfn: int, domid: int) -> None:
        assert self.is_idle(mfn), f"mfn {mfn}"
        self.frame[mfn].owner = domid


class Unaligned(FrameTable):
    """Extents lie wherever there is room."""

    def _take(self, chunk: int, run: int, align: int = 1) -> list[int]:
        return super()._take(chunk, run)


FOUND = (AssertionError, pytest.fail.Exception)
WHERE = r"mfn|DID NOT RAISE|I\d|Counter"
DEFECTS = [ForgetsAPut, ReleasesInUse, ReleasesTwice, KeepsTheOwner, GivesUncounted, Unaligned]


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_loop_finds_a_seeded_defect(defect: type[FrameTable]) -> None:
    with pytest.raises(FOUND, match=WHERE):
        play(defect, 10_000)


@pytest.mark.parametrize("defect", DEFECTS[1:])  # the first needs a hundred puts, more than Hypothesis plays
def test_hypothesis_finds_a_seeded_defect(defect: type[FrameTable]) -> None:
    broken = type("Broken", (Machine,), {"kind": defect})
    quick = settings(max_examples=1000, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(FOUND, match=WHERE):
        run_state_machine_as_test(broken, settings=quick)


@pytest.mark.parametrize(
    ("invariant", "spoil"),
    [
        ("I1", lambda t, free, mine: setattr(t.frame[free], "total", 1)),
        ("I1", lambda t, free, mine: setattr(t.frame[free], "owner", 3)),
        ("I1", lambda t, free, mine: setattr(t.frame[free], "pinned", 1)),
        ("I3", lambda t, free, mine: setattr(t.frame[mine], "total", 0)),
        ("I3", lambda t, free, mine: setattr(t.frame[mine], "count", 1)),
        ("I5", lambda t, free, mine: setattr(t.frame[mine], "parent", mine)),
        ("I9", lambda t, free, mine: setattr(t.frame[mine], "owner", 3)),
        ("I9", lambda t, free, mine: setattr(t, "nr_free", t.nr_free + 1)),
    ],
)
def test_check_recomputes_every_invariant(invariant: str, spoil: Callable[[FrameTable, int, int], None]) -> None:
    table = make(NR_FRAMES)
    mine = table.allocate(1, 8)[0]
    free = next(mfn for mfn in range(NR_FRAMES) if table.frame[mfn].owner == NO_OWNER)
    table.check()
    spoil(table, free, mine)
    with pytest.raises(AssertionError, match=invariant):
        table.check()


def test_extents_of_every_order_lie_together() -> None:
    pair = Pair(make(8 * CHUNK * 4))
    for order in range(10):
        pair.allocate_extent(1, order)
    pair.agree()
    pair.allocate_extent(1, 10)  # half of the machine, of which the first half is in use
    pair.allocate_extent(1, 10)  # nowhere left: refused
    pair.agree()


# ---- scattering


def runs_of(mfns: list[int]) -> list[int]:
    """Lengths of the stretches of machine memory in the order of the pseudo-physical one."""
    lengths = [1]
    for a, b in pairwise(mfns):
        if b == a + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


@pytest.mark.parametrize(("nr", "run"), [(1, 4), (1024, 4), (4096, 16), (8192, 32), (65536, 64), (1 << 20, CHUNK)])
def test_run_length(nr: int, run: int) -> None:
    assert run_length(nr) == run


@pytest.mark.parametrize("nr", [64, 2048, 16384])
def test_a_reservation_is_scattered_in_runs(nr: int) -> None:
    got = make(1 << 16).allocate(1, nr)
    lengths, run = runs_of(got), run_length(nr)
    assert all(length % run == 0 for length in lengths), "a run is cut"
    assert len(lengths) > nr // run * 0.9, "frames lie together more than they should"
    assert got != sorted(got)


def test_two_machines_scatter_differently() -> None:
    assert make(4096).allocate(1, 64) != make(4096).allocate(1, 64)


def test_short_runs_are_used_when_no_long_one_is_left() -> None:
    table = make(4 * CHUNK)
    mine = table.allocate(1, 4 * CHUNK)
    for mfn in mine:
        if mfn % 2:
            table.release(mfn)
    got = table.allocate(2, 2 * CHUNK)
    assert sorted(got) == sorted(mfn for mfn in mine if mfn % 2)
    table.check()
    with pytest.raises(NoMemory):
        table.allocate(3, 1)


def test_a_refused_allocation_takes_nothing() -> None:
    table = make(100)
    with pytest.raises(NoMemory, match="101 frames wanted, 100 free"):
        table.allocate(1, 101)
    assert table.nr_free == 100
    table.check()
