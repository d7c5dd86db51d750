"""The frame table against a model that is two dictionaries, by Hypothesis and by a plain loop; and how it scatters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hypervisor import frames
from hypervisor.frames import CHUNK, FrameTable, run_length
from hypervisor.public.errors import NoMemory

NR_FRAMES = 200  # three chunks and a part of one
FEW_FRAMES = 9  # for Hypothesis: so few that it comes back to the same one
OPERATIONS, OPERATIONS_NIGHTLY = 100_000, 1_000_000


class Pair:
    """A frame table and what it should be: mfn -> [owner, writable flag of each mapping]. Every step is asked of both."""

    def __init__(self, table: FrameTable) -> None:
        self.table = table
        self.owned: dict[int, tuple[int, list[bool]]] = {}

    def allocate(self, domid: int, count: int) -> None:
        free = self.table.nr_frames - len(self.owned)
        if count > free:
            with pytest.raises(NoMemory):
                self.table.allocate(domid, count)
            return
        got = self.table.allocate(domid, count)
        assert len(set(got)) == len(got) == count, "a frame was handed out twice"
        for mfn in got:
            assert mfn not in self.owned, f"mfn {mfn} was not free"
            self.owned[mfn] = domid, []

    def get(self, mfn: int, writable: bool) -> None:
        if mfn in self.owned:
            self.table.get(mfn, writable)
            self.owned[mfn][1].append(writable)
        else:
            self.refuses(lambda: self.table.get(mfn, writable))

    def put(self, mfn: int, writable: bool) -> None:
        """Of a mapping that there is; else it must be refused (a read-only one where only writable ones are, is not seen)."""
        mappings = self.owned[mfn][1] if mfn in self.owned else []
        if writable in mappings:
            self.table.put(mfn, writable)
            mappings.remove(writable)
        elif writable or not mappings:
            self.refuses(lambda: self.table.put(mfn, writable))

    def release(self, mfn: int) -> None:
        if mfn in self.owned and not self.owned[mfn][1]:
            self.table.release(mfn)
            del self.owned[mfn]
        else:
            self.refuses(lambda: self.table.release(mfn))

    def refuses(self, act: Callable[[], None]) -> None:
        with pytest.raises(AssertionError, match="mfn"):
            act()

    def agree(self) -> None:
        """What the table keeps, what it recomputes, and the model."""
        table = self.table
        table.check()
        for mfn in range(table.nr_frames):
            owner, mappings = self.owned.get(mfn, (frames.NO_OWNER, None))
            total = 0 if mappings is None else 1 + len(mappings)
            wanted = (owner, total, sum(mappings or []))
            assert (table.owner[mfn], table.total[mfn], table.writable[mfn]) == wanted, f"mfn {mfn}"
        assert table.nr_free == table.nr_frames - len(self.owned)
        assert +table.owned == Counter(owner for owner, _ in self.owned.values())


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

    @initialize()
    def begin(self) -> None:
        self.pair = Pair(self.kind(FEW_FRAMES))

    @rule(domid=st.integers(0, 5), count=st.integers(0, FEW_FRAMES))
    def allocate(self, domid: int, count: int) -> None:
        self.pair.allocate(domid, count)

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

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "pair"):
            self.pair.agree()


TestMachine = Machine.TestCase


def play(kind: type[FrameTable], operations: int, every: int = 500) -> None:
    """A seeded run; the model is compared every so often, and at the end."""
    rng = random.Random(1)
    pair = Pair(kind(NR_FRAMES))
    for i in range(operations):
        mfn, writable = rng.randrange(NR_FRAMES), rng.random() < 0.5
        match rng.randrange(8):
            case 0:
                pair.allocate(rng.randrange(6), rng.randrange(1, 24) if rng.random() < 0.3 else rng.randrange(1, 4))
            case 1 | 2:
                pair.get(mfn, writable)
            case 3 | 4 | 5:
                pair.put(mfn, writable)
            case 6 | 7:
                pair.release(mfn)
        if i % every == 0:
            pair.agree()
    pair.agree()


def test_a_long_run_agrees_with_the_model() -> None:
    play(FrameTable, OPERATIONS)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_very_long_run_agrees_with_the_model() -> None:
    play(FrameTable, OPERATIONS_NIGHTLY)


# ---- the same checks find what is broken


class ForgetsAPut(FrameTable):
    """A mapping that went is still counted, one time in a hundred."""

    puts = 0

    def put(self, mfn: int, writable: bool) -> None:
        self.puts += 1
        if self.puts % 100:
            super().put(mfn, writable)


class ReleasesInUse(FrameTable):
    """A frame changes owner while somebody maps it."""

    def release(self, mfn: int) -> None:
        if self.total[mfn] > 1:
            self.total[mfn], self.writable[mfn] = 1, 0
        super().release(mfn)


class ReleasesTwice(FrameTable):
    """A free frame is put on the free list again, and counted there."""

    def release(self, mfn: int) -> None:
        if self.total[mfn] == 0:
            self.nr_free += 1
        else:
            super().release(mfn)


class KeepsTheOwner(FrameTable):
    """A free frame still says whose it was."""

    def release(self, mfn: int) -> None:
        owner = self.owner[mfn]
        super().release(mfn)
        self.owner[mfn] = owner


FOUND = (AssertionError, pytest.fail.Exception)
DEFECTS = [ForgetsAPut, ReleasesInUse, ReleasesTwice, KeepsTheOwner]


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_loop_finds_a_seeded_defect(defect: type[FrameTable]) -> None:
    with pytest.raises(FOUND, match=r"mfn|DID NOT RAISE|I\d"):
        play(defect, OPERATIONS // 10)


@pytest.mark.parametrize("defect", DEFECTS[1:])  # the first needs a hundred puts, more than Hypothesis plays
def test_hypothesis_finds_a_seeded_defect(defect: type[FrameTable]) -> None:
    broken = type("Broken", (Machine,), {"kind": defect})
    quick = settings(max_examples=1000, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(FOUND, match=r"mfn|DID NOT RAISE|I\d"):
        run_state_machine_as_test(broken, settings=quick)


@pytest.mark.parametrize(
    ("invariant", "spoil"),
    [
        ("I1", lambda t, free, mine: t.total.__setitem__(free, 1)),
        ("I1", lambda t, free, mine: t.owner.__setitem__(free, 3)),
        ("I2", lambda t, free, mine: t.total.__setitem__(mine, 0)),
        ("I3", lambda t, free, mine: t.writable.__setitem__(mine, 1)),
        ("I4", lambda t, free, mine: t.owner.__setitem__(mine, 3)),
        ("I4", lambda t, free, mine: setattr(t, "nr_free", t.nr_free + 1)),
    ],
)
def test_check_recomputes_every_invariant(invariant: str, spoil: Callable[[FrameTable, int, int], None]) -> None:
    table = FrameTable(NR_FRAMES)
    mine = table.allocate(1, 8)[0]
    free = next(mfn for mfn in range(NR_FRAMES) if table.owner[mfn] == frames.NO_OWNER)
    table.check()
    spoil(table, free, mine)
    with pytest.raises(AssertionError, match=invariant):
        table.check()


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


@pytest.mark.parametrize(("nr", "run"), [(1, 4), (4096, 4), (8192, 8), (65536, 64), (1 << 20, CHUNK)])
def test_run_length(nr: int, run: int) -> None:
    assert run_length(nr) == run


@pytest.mark.parametrize("nr", [64, 2048, 16384])
def test_a_reservation_is_scattered_in_runs(nr: int) -> None:
    got = FrameTable(1 << 16).allocate(1, nr)
    lengths, run = runs_of(got), run_length(nr)
    assert all(length % run == 0 for length in lengths), "a run is cut"
    assert len(lengths) > nr // run * 0.9, "frames lie together more than they should"
    assert got != sorted(got)


def test_two_machines_scatter_differently() -> None:
    assert FrameTable(4096).allocate(1, 64) != FrameTable(4096).allocate(1, 64)


def test_short_runs_are_used_when_no_long_one_is_left() -> None:
    table = FrameTable(4 * CHUNK)
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
    table = FrameTable(100)
    with pytest.raises(NoMemory, match="101 frames wanted, 100 free"):
        table.allocate(1, 101)
    assert table.nr_free == 100
    table.check()
