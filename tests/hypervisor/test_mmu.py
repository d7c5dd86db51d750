"""The paging core against its model (tests/models/paging.py): counts, types, entries, and what stays mapped.

The kernels, space.py and mmu.py are the real ones; the monitor is a queue that the test answers. At once, a million moves;
late, with faults, turns, failures and deaths in between; by Hypothesis; and with one defect each, which must be found.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.models.paging import L1, L2, L3, NX, PS, RW, P
from tests.models.paging_core import Core, load
from tests.models.paging_defects import DEFECTS
from tests.models.paging_game import Game
from tests.models.paging_player import Player

OPERATIONS, OPERATIONS_NIGHTLY = 1_000_000, 10_000_000
STEPS, STEPS_NIGHTLY = 100_000, 1_000_000
LATE_CHANGES = 20  # host mappings until all are thrown out: so few that it happens while a call is under way


def late(core: Core, seed: int, steps: int) -> None:
    Player(Game(core, at_once=False), seed).play_late(steps)


def late_core(defect: str | None = None, folder: Path | None = None) -> Core:
    """Others have a turn after every table, and after every other host mapping."""
    return load(DEFECTS[defect] if defect else None, folder, tables_a_turn=1, tlb_changes=LATE_CHANGES, few_changes=2)


@pytest.mark.timeout(300)
def test_a_million_operations_agree_with_the_model() -> None:
    Player(Game(load()), 1).play(OPERATIONS)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_ten_million_operations_agree_with_the_model() -> None:
    Player(Game(load()), 2).play(OPERATIONS_NIGHTLY)


def test_no_mapping_is_left_uncovered_however_late_the_answers_are() -> None:
    late(late_core(), 1, STEPS)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_no_mapping_is_left_uncovered_in_a_long_run() -> None:
    for seed in range(10):
        late(late_core(), seed, STEPS_NIGHTLY)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(defect: str, tmp_path: Path) -> None:
    """By late answers, or by many calls: each finds what the other one is not made for."""
    with pytest.raises(AssertionError):
        for seed in range(6):
            late(late_core(defect, tmp_path), seed, STEPS // 5)
        Player(Game(load(DEFECTS[defect], tmp_path)), 1).play(OPERATIONS // 20, audit_every=1000)


# ---- Hypothesis: short games, which it makes shorter

NR_FRAMES = 10
mfns = st.integers(0, NR_FRAMES)  # one that there is not
slots = st.sampled_from((0, 1, 256, 480, 511))
entries = st.builds(
    lambda mfn, bits: mfn << 12 | bits, mfns, st.sampled_from((0, P, P, P | RW, P | RW, P | RW, P | RW | NX, P | PS))
)
requests = st.builds(
    lambda mfn, slot, command, entry: (mfn << 12 | slot << 3 | command, entry),
    mfns, slots, st.sampled_from((0, 0, 0, 0, 1, 2, 3)), entries,
)  # fmt: skip


class Machine(RuleBasedStateMachine):
    """One guest with nine frames of ten; its root, an L2 and an L1 are in window 0."""

    core: Core | None = None

    @initialize()
    def begin(self) -> None:
        self.game = Game(self.core or load(), NR_FRAMES, (1,))
        own = self.game.allocate(1, NR_FRAMES - 1)
        for table, child in ((own[0], own[1]), (own[1], own[2])):
            self.game.poke(table, 0, child << 12 | P | RW)
        self.game.pin(1, own[0], L3)
        self.game.start(1, own[0])

    def teardown(self) -> None:
        if hasattr(self, "game"):
            self.game.quiet()

    @rule(batch=st.lists(requests, min_size=1, max_size=4))
    def update(self, batch: list[tuple[int, int]]) -> None:
        self.game.update(1, batch)
        self.game.safe()

    @rule(mfn=mfns, level=st.sampled_from((L1, L2, L3)))
    def pin(self, mfn: int, level: int) -> None:
        self.game.pin(1, mfn, level)

    @rule(mfn=mfns)
    def unpin(self, mfn: int) -> None:
        self.game.unpin(1, mfn)
        self.game.safe()

    @rule(mfn=mfns)
    def load(self, mfn: int) -> None:
        self.game.load(1, mfn)
        self.game.safe()

    @rule(mfn=st.integers(0, NR_FRAMES - 1), writable=st.booleans(), put=st.booleans())
    def use(self, mfn: int, writable: bool, put: bool) -> None:
        (self.game.put if put else self.game.get)(mfn, writable)

    @rule(mfn=st.integers(0, NR_FRAMES - 1), slot=slots, entry=entries)
    def poke(self, mfn: int, slot: int, entry: int) -> None:
        if self.game.model.frames[mfn].owner is not None:
            self.game.poke(mfn, slot, entry)

    @rule(window=st.integers(0, 3), slot=slots, write=st.booleans())
    def touch(self, window: int, slot: int, write: bool) -> None:
        self.game.touch(1, window << 39 | slot << 12, 2 * write)
        self.game.safe()

    @rule()
    def flush(self) -> None:
        self.game.flush(1)

    @rule(mfn=st.integers(0, NR_FRAMES - 1))
    def release(self, mfn: int) -> None:
        if not self.game.release(mfn):
            self.game.allocate(1, 1)


TestMachine = Machine.TestCase


@pytest.mark.parametrize("defect", ["a second parent", "RW is ignored at L1", "a frame is pinned twice"])
def test_hypothesis_finds_a_seeded_defect(defect: str, tmp_path: Path) -> None:
    broken = type("Broken", (Machine,), {"core": load(DEFECTS[defect], tmp_path)})
    quick = settings(max_examples=500, stateful_step_count=30, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(broken, settings=quick)
