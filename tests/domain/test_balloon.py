"""The balloon driver against a machine that is three numbers, dom0's real store, and a clock that runs when all sleep."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from dom0.store import Connection, Store, StoreRefusal
from domain import sched
from domain.balloon import CURRENT, FEATURE, KEEP_FREE, TARGET, Balloon
from domain.sched import Scheduler, sleep
from domain.store import StoreClient, StoreError
from hypervisor.public.io.xs_wire import XsType
from hypervisor.public.memory import CurrentReservation
from hypervisor.public.types import DOMID_SELF, MAX_BATCH, PAGE_SIZE
from tests.models.mutant import changed

HOME = "/local/domain/5"
USED, OWNED, ROOM = 100, 1000, 4000  # pages in use, owned at start, with an entry


class Client(StoreClient):
    """One domain's access to the tree. `broken`: dom0 ended the connection."""

    def __init__(self, tree: Store, domid: int) -> None:
        super().__init__()
        self.connection = Connection(tree, domid, self._event)
        self.broken = False

    async def _request(self, kind: XsType, payload: bytes, tx: int = 0) -> bytes:
        await sleep(0)
        if self.broken:
            raise StoreError("EIO")
        try:
            return self.connection.request(kind, tx, payload)
        except StoreRefusal as refusal:
            raise StoreError(refusal.name) from None


class StandIn:
    """A kernel, its memory and its machine, as far as the driver looks at them."""

    def __init__(self) -> None:
        self.memory = self
        self.used, self.owned, self.machine_free = USED, OWNED, 10_000
        self.on_free: Callable[[], None] | None = None
        self.batches: list[int] = []
        self.asked = 0  # how often the machine was asked for pages
        self.now = 0
        self.errors: list[BaseException] = []
        self.scheduler = Scheduler(lambda: self.now, self.idle)
        self.scheduler.on_error = lambda task, error: self.errors.append(error)
        sched.install(self.scheduler)
        tree = Store()
        self.dom0, self.store = Client(tree, 0), Client(tree, 5)

    def idle(self, seconds: float) -> None:
        assert seconds >= 0, "all sleep for ever"
        self.now += int(seconds * 1e9)

    # ---- Memory

    @property
    def nr_pages(self) -> int:
        return self.owned

    @property
    def nr_free(self) -> int:
        return self.owned - self.used

    @property
    def nr_holes(self) -> int:
        return ROOM - self.owned

    def release(self, nr: int) -> int:
        return self._move(-min(nr, self.nr_free))

    def obtain(self, nr: int) -> int:
        self.asked += 1
        return self._move(min(nr, self.nr_holes, self.machine_free))

    def _move(self, nr: int) -> int:
        self.owned += nr
        self.machine_free -= nr
        self.batches.append(nr)
        assert self.nr_free >= 0 and abs(nr) <= MAX_BATCH
        return abs(nr)

    def free(self, nr: int) -> None:
        self.used -= nr
        if self.on_free is not None:
            self.on_free()

    # ---- Kernel

    def call(self, request: Any) -> int:
        assert request == CurrentReservation(DOMID_SELF)
        return self.owned

    async def sleep(self, seconds: float) -> None:
        await sleep(seconds)

    # ---- dom0

    async def target(self, pages: object) -> None:
        kib = pages * PAGE_SIZE >> 10 if isinstance(pages, int) else pages
        await self.dom0.write(f"{HOME}/{TARGET}", str(kib))

    async def said(self) -> int:
        """Pages: what the driver wrote."""
        return int(await self.dom0.read(f"{HOME}/{CURRENT}")) * 1024 // PAGE_SIZE

    async def rest(self) -> None:
        """Until nobody has moved for a while, and no time has passed."""
        for _ in range(60):
            await sleep(0)


Scenario = Callable[[StandIn], Awaitable[None]]


@pytest.fixture
def play() -> Any:
    """Run a scenario beside a driver that has started; neither may fail."""

    def run(scenario: Scenario) -> None:
        kernel = StandIn()

        async def main() -> None:
            for key, perms in (("", ["n0", "r5"]), ("/control", ["n5"]), ("/memory/current", ["n5"])):
                await kernel.dom0.mkdir(HOME + key)
                await kernel.dom0.set_perms(HOME + key, perms)
            await kernel.target(OWNED)
            await kernel.dom0.write(f"{HOME}/{CURRENT}", OWNED * PAGE_SIZE >> 10)
            driver: Any = Balloon(kernel)  # type: ignore[arg-type]
            kernel.scheduler.spawn(driver.run(), "balloon")
            await kernel.rest()
            await scenario(kernel)

        try:
            kernel.scheduler.run(kernel.scheduler.spawn(main(), "main"))
            assert not kernel.errors
        finally:
            for task in list(kernel.scheduler.tasks):
                task.cancel()
                task.step()
            sched._schedulers.pop()

    return run


def test_it_says_that_it_is_there_and_moves_nothing(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        assert await kernel.dom0.read(f"{HOME}/{FEATURE}") == "1"
        assert await kernel.said() == OWNED and kernel.batches == []

    play(scenario)


def test_it_shrinks_and_grows_in_batches(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        for pages in (200, 3000, 999, 1000, 1000):
            await kernel.target(pages)
            await kernel.rest()
            assert kernel.owned == pages == await kernel.said()
        assert kernel.batches == [-512, -288, 512, 512, 512, 512, 512, 240, -512, -512, -512, -465, 1]
        assert kernel.now == 0, "nothing of it waits"

    play(scenario)


def test_what_is_in_use_stays_and_what_is_freed_goes(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        await kernel.target(50)
        await kernel.rest()
        assert kernel.owned == USED + KEEP_FREE == await kernel.said()
        kernel.free(30)
        kernel.free(7)
        await kernel.rest()
        assert kernel.owned == USED - 37 + KEEP_FREE == await kernel.said() and kernel.now == 0
        kernel.free(63)
        await kernel.rest()
        assert kernel.owned == 50 == await kernel.said()

    play(scenario)


def test_a_kernel_that_frees_and_allocates_again_is_let_alone(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        await kernel.target(50)
        await kernel.rest()
        kernel.batches.clear()
        for _ in range(20):
            kernel.used += KEEP_FREE
            kernel.free(KEEP_FREE)
            await kernel.rest()
        assert kernel.batches == [] and kernel.owned == USED + KEEP_FREE

    play(scenario)


def test_at_its_target_nobody_is_told_of_free_pages(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        await kernel.target(500)
        await kernel.rest()
        kernel.free(50)
        await kernel.rest()
        assert kernel.owned == 500 and kernel.batches == [-500]

    play(scenario)


def test_a_full_machine_is_asked_again_more_and_more_seldom(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        kernel.machine_free = 100
        await kernel.target(2000)
        await kernel.rest()
        assert (kernel.owned, await kernel.said()) == (1100, 1100)
        kernel.asked = 0
        await sleep(300)
        assert 10 <= kernel.asked <= 15, "after 1, 2, 4, 8, 16, and each 32 s"
        kernel.machine_free = 5000
        await sleep(33)
        assert kernel.owned == 2000 == await kernel.said()
        kernel.asked = 0
        await sleep(300)
        assert kernel.asked == 0

    play(scenario)


def test_a_new_target_is_followed_at_once_whatever_it_waits_for(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        kernel.machine_free = 0
        await kernel.target(2000)
        await sleep(100)
        now = kernel.now
        await kernel.target(300)
        await kernel.rest()
        assert kernel.owned == 300 and kernel.now == now

    play(scenario)


def test_a_new_target_is_heard_in_the_middle(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        await kernel.target(4000)
        while kernel.owned == OWNED:
            await sleep(0)
        await kernel.target(500)
        await kernel.rest()
        assert kernel.owned == 500 and max(sum(kernel.batches[: i + 1]) for i in range(len(kernel.batches))) < 3000

    play(scenario)


def test_it_has_entries_for_no_more(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        await kernel.target(5000)
        await kernel.rest()
        assert kernel.owned == ROOM == await kernel.said()
        kernel.asked = 0
        await sleep(100)
        assert kernel.asked == 0, "it cannot change, and is not tried again"

    play(scenario)


@pytest.mark.parametrize("text", ["", "x", "-4", "4.0", "1" * 30, "\u0664"])
def test_a_target_that_is_no_number_changes_nothing(play: Any, text: str) -> None:
    async def scenario(kernel: StandIn) -> None:
        await kernel.target(text)
        await kernel.rest()
        assert kernel.owned == OWNED and kernel.batches == []
        await kernel.dom0.rm(f"{HOME}/{TARGET}")
        await kernel.rest()
        await kernel.target(800)
        await kernel.rest()
        assert kernel.owned == 800

    play(scenario)


def test_without_a_store_it_ends_and_the_domain_goes_on(play: Any) -> None:
    async def scenario(kernel: StandIn) -> None:
        kernel.store.broken = True
        await kernel.target(800)
        await kernel.rest()
        assert not [task for task in kernel.scheduler.tasks if task.name == "balloon"]
        kernel.free(5)

    play(scenario)


# ---- seeded defects

NUMBER = "if text.isascii() and text.isdigit() and len(text) <= 15 else None"
AGAIN = "return missing < 0 or memory.nr_holes > 0"


@pytest.mark.parametrize(
    ("old", "new", "test"),
    [
        ("memory.nr_free - KEEP_FREE", "memory.nr_free", test_what_is_in_use_stays_and_what_is_freed_goes),
        ("self._takes_more = missing < 0 and not moved", "pass", test_what_is_in_use_stays_and_what_is_freed_goes),
        (AGAIN, "return False", test_a_full_machine_is_asked_again_more_and_more_seldom),
        (AGAIN, "return True", test_it_has_entries_for_no_more),
        ("if len(watch.events):", "if False:", test_a_new_target_is_heard_in_the_middle),
        (NUMBER, "", partial(test_a_target_that_is_no_number_changes_nothing, text="x")),
        ("with suppress(StoreError):", "if True:", test_without_a_store_it_ends_and_the_domain_goes_on),
    ],
)
def test_a_driver_with_a_defect_is_found_out(monkeypatch: pytest.MonkeyPatch, play: Any, old: str, new: str, test: Any) -> None:
    names: dict[str, Any] = {"__name__": "domain.balloon"}
    exec(compile(changed("domain/balloon.py", [(old, new)]), "seeded", "exec"), names)
    monkeypatch.setitem(globals(), "Balloon", names["Balloon"])
    with pytest.raises((AssertionError, ValueError)):
        test(play)
