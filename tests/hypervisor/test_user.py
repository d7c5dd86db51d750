"""Spaces of applications: games against a model (tests/models/programs_game.py), by chance and by Hypothesis.

Each check of hypervisor/user.py, and what it asks of others, is left out once, and a game finds it.
"""

from __future__ import annotations

import struct
from types import FunctionType, ModuleType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hypervisor import lifecycle, space, user
from hypervisor.public.errors import XenError
from tests.conftest import NIGHTLY
from tests.models.mutant import changed
from tests.models.programs_game import ADDRESSES, CONTROLS, DATA, HOW, OTHERS, ROOTS, SLOTS, Game, control_of, play

MOVES, GAMES, GAMES_NIGHTLY = 150, 6, 1000
pytestmark = pytest.mark.timeout(1800 if NIGHTLY else 120)


def games(count: int) -> None:
    for seed in range(count):
        game = Game()
        try:
            play(game, seed, MOVES)
            game.end()
        finally:
            game.close()


def test_games_agree_with_the_model() -> None:
    games(GAMES_NIGHTLY if NIGHTLY else GAMES)


class Machine(RuleBasedStateMachine):
    """The same moves, chosen by Hypothesis, which makes a lost game short."""

    roots, slots, how = st.integers(0, ROOTS - 1), st.sampled_from(SLOTS), st.sampled_from(HOW)

    @initialize()
    def begin(self) -> None:
        self.game = Game()

    def teardown(self) -> None:
        if hasattr(self, "game"):
            try:
                self.game.end()
            finally:
                self.game.close()

    @rule(root=roots, which=st.integers(0, CONTROLS - 1), at=st.integers(0, 7), other=st.sampled_from(OTHERS), how=how)
    def create(self, root: int, which: int, at: int, other: str, how: str) -> None:
        self.game.create(root, control_of(self.game, which, at, other), how)

    @rule(root=roots, slot=slots, page=st.none() | st.integers(0, DATA - 1), writable=st.booleans(), how=how)
    def update(self, root: int, slot: int, page: int | None, writable: bool, how: str) -> None:
        self.game.update(root, slot, None if page is None else self.game.data[page], writable, how)

    @rule(root=roots, address=st.sampled_from(ADDRESSES), write=st.booleans())
    def fault(self, root: int, address: int, write: bool) -> None:
        self.game.fault(root, address, write)

    @rule(root=roots, how=how)
    def hook(self, root: int, how: str) -> None:
        self.game.hook(root, how)

    @rule(page=st.integers(0, DATA - 1), way=st.sampled_from(("down", "over")))
    def leave(self, page: int, way: str) -> None:
        self.game.leave(self.game.data[page], way)

    @rule()
    def come(self) -> None:
        self.game.come()

    @rule(root=roots, which=st.integers(0, 1))
    def kill(self, root: int, which: int) -> None:
        self.game.kill(root, which)

    @rule(root=roots)
    def destroy(self, root: int) -> None:
        self.game.destroy(root)

    @rule(root=roots)
    def interrupt(self, root: int) -> None:
        self.game.interrupt(root)

    @rule()
    def settled(self) -> None:
        self.game.settled()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=settings.default.max_examples // 2, stateful_step_count=30)  # type: ignore[union-attr]


# ---- what is left out is found

MODULES: dict[str, ModuleType] = {"user": user, "space": space, "lifecycle": lifecycle}
DEFECTS: dict[str, tuple[str, str, str]] = {  # the module, what stands there, what stands there instead
    "a root is shown twice": ("user", "if hv.frames.frame[root].window:", "if False:"),
    "anybody's frames": ("user", "not all(hv.frames.owned_by(mfn, domain.domid) for mfn in control)", "False"),
    "a frame twice": ("user", "len(set(control)) != CONTROL_PAGES or", ""),
    "a table as control region": ("user", "if not hv.frames.get(mfn, True):", "if not hv.frames.get(mfn, False):"),
    "a refusal keeps frames": ("user", "                hv.frames.put(held, True)\n", "                pass\n"),
    "a refusal keeps the root": ("user", "            yield from space.put_table(hv, domain, root, False)\n", ""),
    "a refusal keeps the space": ("user", "        yield from destroy(hv, user)\n", ""),
    "the root is kept": ("user", "    yield from space.put_table(hv, domain, user.root, False)", ""),
    "the control region is kept": ("user", "    for mfn in user.control:\n", "    for mfn in [0][1:]:\n"),
    "references fall before the process has ended": ("user", "    yield user.gone\n", ""),
    "marks stay": ("user", "    space.unmark_all(hv, user.root)\n", ""),
    "the window stays": ("user", "    hv.frames.frame[user.root].window = 0\n", ""),
    "the program's address is believed": ("user", "if USER_START <= address < HYPERVISOR_VIRT_START:", "if True:"),
    "a message of any length": ("user", "if len(message) != traps.FAULT.size:", "if not message:"),
    "the half-dead are not ended": ("user", "            process.signal(signal.SIGKILL)\n", "            pass\n"),
    "it is gone before it is hung up on": ("user", "    yield user.monitor.hang_up()\n", "    user.went()\n    return\n"),
    "changes are not followed": ("space", "        elif user is not None:\n", "        elif False:\n"),
    "the end is not waited for": (
        "space", "            yield user.gone\n    except MonitorGone:\n        yield user.gone\n",
        "            yield user.gone\n    except MonitorGone:\n        pass\n",
    ),
    "a refusal of the host is overlooked": (
        "space", 'page tables: {error}")\n            yield user.gone\n', 'page tables: {error}") if False else None\n',
    ),
    "what is thrown out stays mapped": (
        "space", "user.monitor.batch([(SYS_MUNMAP, USER_START, HYPERVISOR_VIRT_START - USER_START)])", "user.monitor.barrier()",
    ),
    "programs outlive their domain": ("lifecycle", "        user.fall(hv, one, \"its domain ended\")\n", "        pass\n"),
    "nor are they waited for": ("lifecycle", "        yield one.gone\n", "        pass\n"),
}  # fmt: skip


def leave_out(patch: pytest.MonkeyPatch, defect: str) -> None:
    """The functions of a changed copy of the module in place of its own."""
    name, old, new = DEFECTS[defect]
    module = MODULES[name]
    namespace = dict(vars(module))
    exec(compile(changed(f"hypervisor/{name}.py", [(old, new)]), f"changed {name}.py", "exec"), namespace)
    for function in [key for key, value in namespace.items() if isinstance(value, FunctionType)]:
        patch.setattr(module, function, namespace[function])


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out(monkeypatch, defect)
    with pytest.raises((AssertionError, pytest.fail.Exception, XenError, LookupError, struct.error)):
        games(6 * GAMES)  # how soon a game meets it is chance; most end in the first
