"""The two facing tables: every pair of states that two ends can come to, whatever vanishes when; then real ends on a store."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from dom0.store import Connection, Store, StoreRefusal
from domain import sched, xenbus
from domain.sched import Scheduler, sleep
from domain.store import StoreClient, StoreConflict, StoreError
from domain.xenbus import BACKEND, FRONTEND, Device, DeviceError, Table
from hypervisor.public.io.xenbus import XenbusState
from hypervisor.public.io.xs_wire import XsType

_, INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = XenbusState

# ---- every pair


@dataclass(frozen=True)
class End:
    """One end as the exploration sees it."""

    state: XenbusState = INITIALISING
    node: bool = True  # its node is in the store
    driver: bool = True  # somebody runs it
    event: bool = True  # its watch has something to say (a fresh one has)
    theirs: XenbusState | None = None  # what it read, while it takes the steps that follow from it
    holds: bool = False  # frontend: its pool is given; backend: it has mapped it

    @property
    def shown(self) -> XenbusState:
        return self.state if self.node else CLOSED


World = tuple[End, End]  # frontend, backend
Row = tuple[XenbusState, XenbusState]


class Explorer:
    """Every world that can be reached, breadth first. `used`: rows of each table that a step was taken by."""

    def __init__(self, front: Table = FRONTEND, back: Table = BACKEND) -> None:
        self.tables = front, back
        self.used: tuple[set[Row], set[Row]] = set(), set()
        self.worlds: set[World] = set()

    def explore(self) -> None:
        start = End(), End()
        self.worlds, todo = {start}, deque([start])
        while todo:
            world = todo.popleft()
            moves = list(self.moves(world))
            if not moves:
                self.at_rest(world)
            for after in [*moves, *self.blows(world)]:
                if after not in self.worlds:
                    self.worlds.add(after)
                    todo.append(after)

    def moves(self, world: World) -> Iterator[World]:
        """What the two drivers do next, in any order."""
        for side in (0, 1):
            me, other = world[side], world[1 - side]
            if not me.driver:
                continue
            if me.theirs is not None:
                yield from self.steps(world, side, me.theirs)
            elif me.event and me.state != CLOSED:
                yield self.put(world, side, replace(me, event=False, theirs=other.shown))

    def steps(self, world: World, side: int, theirs: XenbusState) -> Iterator[World]:
        """The row of the table, its step done, or failed with a DeviceError; or back to waiting."""
        me, other = world[side], world[1 - side]
        entry = self.tables[side].get((me.state, theirs))
        if entry is None:
            yield self.put(world, side, replace(me, theirs=None))
            return
        self.used[side].add((me.state, theirs))
        step, after = entry
        if side == 0 and step == "release":
            assert not (other.holds and other.driver and other.node), f"the pool is freed while the backend has it: {world}"
        holds = {"publish": True, "connect": True, "release": False}.get(step, me.holds)
        yield self.say(world, side, replace(me, state=after, holds=holds))
        if step in ("publish", "connect", "announce"):
            if side == 1:
                yield self.say(world, side, replace(me, state=CLOSED, holds=False))
            else:
                yield self.say(world, side, replace(me, state=CLOSED if me.state == INITIALISING else CLOSING))

    def blows(self, world: World) -> Iterator[World]:
        """What may happen to either end at any moment: it wants to close, its node goes, its domain dies and then its node."""
        for side in (0, 1):
            me = world[side]
            if me.driver and me.state == CONNECTED and me.theirs is None:
                yield self.say(world, side, replace(me, state=CLOSING))
            if me.node:
                yield self.gone(world, side, me.driver)
                yield self.gone(world, side, False)

    def gone(self, world: World, side: int, driver: bool) -> World:
        """Without a driver its mappings are gone too: the hypervisor saw to that."""
        me, other = world[side], world[1 - side]
        me = replace(me, node=False, driver=driver, holds=me.holds and driver)
        return self.put(self.put(world, side, me), 1 - side, replace(other, event=True))

    def say(self, world: World, side: int, me: End) -> World:
        """Publish a state, where there still is a node to publish it in."""
        world = self.put(world, side, me)
        return self.put(world, 1 - side, replace(world[1 - side], event=True)) if me.node else world

    def put(self, world: World, side: int, end: End) -> World:
        return (end, world[1]) if side == 0 else (world[0], end)

    def at_rest(self, world: World) -> None:
        """Nobody will move unless something happens: that must be a good place to be."""
        front, back = world
        if front.state == back.state == CONNECTED and front.node and back.node and front.driver and back.driver:
            return
        for end in world:
            assert not end.driver or end.state == CLOSED, f"stuck: {world}"
            assert not end.driver or not end.holds, f"closed, and holds what it had: {world}"


def test_every_pair_ends_connected_or_closed() -> None:
    explorer = Explorer()
    explorer.explore()
    assert len(explorer.worlds) > 500
    shown = {(front.state, back.state) for front, back in explorer.worlds}
    assert (CONNECTED, CONNECTED) in shown and (CLOSED, CLOSED) in shown


# Kept for a backend that is made anew beneath a frontend that lives, as Xen's tables have them; no two fresh ends meet so.
UNREACHABLE = (
    {(INITIALISING, INITIALISED)},
    {(INITIALISING, INITIALISED), (INIT_WAIT, CONNECTED)},
)
PROMPT = {(INIT_WAIT, CLOSING)}  # it would come to the same a moment later


def test_every_row_is_needed() -> None:
    """Take any row away that can be reached: some pair is then stuck, or keeps what it should give back."""
    whole = Explorer()
    whole.explore()
    for side, table in enumerate((FRONTEND, BACKEND)):
        assert set(table) - whole.used[side] == UNREACHABLE[side]
        for row in whole.used[side] - PROMPT:
            less = {key: value for key, value in table.items() if key != row}
            tables = (less, BACKEND) if side == 0 else (FRONTEND, less)
            with pytest.raises(AssertionError, match=r"stuck|holds"):
                Explorer(*tables).explore()


@pytest.mark.parametrize(
    ("row", "entry", "match"),
    [
        ((CONNECTED, CLOSING), ("release", CLOSED), "freed while"),
        ((CONNECTED, CLOSED), ("stop", CLOSED), "holds"),
        ((INITIALISED, CLOSED), ("stop", CLOSED), "holds"),
    ],
)
def test_a_wrong_row_is_found(row: Row, entry: tuple[str, XenbusState], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        Explorer({**FRONTEND, row: entry}, BACKEND).explore()


# ---- real ends, on a real store


class Client(StoreClient):
    """One domain's access to the tree; each request lets the others run first."""

    def __init__(self, store: Store, domid: int) -> None:
        super().__init__()
        self.connection = Connection(store, domid, self._event)

    async def _request(self, kind: XsType, payload: bytes, tx: int = 0) -> bytes:
        await sleep(0)
        try:
            return self.connection.request(kind, tx, payload)
        except StoreRefusal as refusal:
            raise (StoreConflict if refusal.name == "EAGAIN" else StoreError)(refusal.name) from None


class Ours(Device):
    """An end whose steps do nothing but say so; `fails` names one that raises."""

    def __init__(self, kernel: Any, path: str, otherend: str, fails: str = "") -> None:
        super().__init__(kernel, path, otherend, 0)
        self.done: list[str] = []
        self.fails = fails

    def __getattr__(self, step: str) -> Any:
        if step not in ("announce", "publish", "connect", "stop", "release"):
            raise AttributeError(step)

        async def work() -> None:
            self.done.append(step)
            await sleep(0)
            if step == self.fails:
                raise DeviceError(f"{step} fails")

        return work


class Front(Ours):
    TABLE = FRONTEND


class Back(Ours):
    TABLE = BACKEND


class Bench:
    """dom0's store, domain 5 with a frontend, domain 6 with its backend."""

    FRONT, BACK = "/local/domain/5/device/vbd/1", "/local/domain/6/backend/vbd/5/1"

    def __init__(self, front_fails: str = "", back_fails: str = "") -> None:
        self.tree = Store()
        self.scheduler = Scheduler(lambda: 0, self.idle)
        sched.install(self.scheduler)
        self.errors: list[BaseException] = []
        self.scheduler.on_error = lambda task, error: self.errors.append(error)
        self.dom0, five, six = (Client(self.tree, domid) for domid in (0, 5, 6))
        self.front = Front(SimpleNamespace(store=five), self.FRONT, self.BACK, front_fails)
        self.back = Back(SimpleNamespace(store=six), self.BACK, self.FRONT, back_fails)

    def idle(self, seconds: float) -> None:
        assert seconds == 0, "everybody waits"

    async def begin(self) -> None:
        for path, owner, reader in ((self.FRONT, 5, 6), (self.BACK, 6, 5)):
            await self.dom0.mkdir(path)
            await self.dom0.set_perms(path, [f"n{owner}", f"r{reader}"])
            await self.dom0.write(f"{path}/state", 1)
        self.tasks = [self.scheduler.spawn(end.run()) for end in (self.front, self.back)]

    async def rest(self) -> None:
        """Until nobody has moved for a while."""
        for _ in range(60):
            await sleep(0)

    def play(self, scenario: Any) -> None:
        """Run it, see that nobody crashed."""
        try:
            self.scheduler.run(self.scheduler.spawn(scenario(self), "main"))
            assert not self.errors
        finally:
            for task in list(self.scheduler.tasks):
                task.cancel()
                task.step()
            sched._schedulers.pop()

    def states(self) -> tuple[XenbusState, XenbusState]:
        return self.front.state, self.back.state


async def connected(bench: Bench) -> None:
    await bench.begin()
    await bench.rest()
    assert bench.states() == (CONNECTED, CONNECTED)
    assert bench.front.done == ["publish", "connect"] and bench.back.done == ["announce", "connect"]


def test_two_ends_connect_and_the_frontend_closes() -> None:
    async def scenario(bench: Bench) -> None:
        await connected(bench)
        await bench.front.switch(CLOSING)
        await bench.rest()
        assert bench.states() == (CLOSED, CLOSED) and all(task.done for task in bench.tasks)
        assert bench.back.done[-1] == bench.front.done[-1] == "release"

    Bench().play(scenario)


def test_the_backend_closes() -> None:
    async def scenario(bench: Bench) -> None:
        await connected(bench)
        await bench.back.switch(CLOSING)
        await bench.rest()
        assert bench.states() == (CLOSED, CLOSED) and bench.front.done[-2:] == ["stop", "release"]

    Bench().play(scenario)


@pytest.mark.parametrize("path", [Bench.FRONT, Bench.BACK])
def test_a_node_vanishes_at_any_turn(path: str) -> None:
    async def scenario(bench: Bench, turns: int) -> None:
        await bench.begin()
        for _ in range(turns):
            await sleep(0)
        await bench.dom0.rm(path)
        await bench.rest()
        assert bench.states() == (CLOSED, CLOSED) and all(task.done for task in bench.tasks)
        held = {"publish", "connect"} & set(bench.front.done)
        assert not held or bench.front.done[-1] == "release"
        assert path not in bench.tree.nodes, "it was made again by its own driver"

    for turns in range(40):
        Bench().play(partial(scenario, turns=turns))


@pytest.mark.parametrize(("front_fails", "back_fails"), [("publish", ""), ("connect", ""), ("", "announce"), ("", "connect")])
def test_a_step_that_fails_closes_the_device_and_says_why(front_fails: str, back_fails: str) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.begin()
        await bench.rest()
        assert bench.states() == (CLOSED, CLOSED) and all(task.done for task in bench.tasks)
        end = bench.front if front_fails else bench.back
        assert await bench.dom0.read(f"{end.path}/error") == f"{front_fails or back_fails} fails" == end.error

    Bench(front_fails, back_fails).play(scenario)


@pytest.mark.parametrize("text", ["", "0", "7", "x", "-1", "\u00b2", "\u0664", "5\0", "9" * 5000, b"\xff", " 4", "+4", "4.0"])
def test_a_state_that_is_none_closes_and_nothing_else(text: str | bytes) -> None:
    """What the other end writes is its own affair: our domain lives, this device is closed."""

    async def scenario(bench: Bench) -> None:
        await connected(bench)
        raw = text if isinstance(text, bytes) else text.encode()
        bench.front.store.connection.request(XsType.WRITE, 0, f"{bench.FRONT}/state".encode() + b"\0" + raw[:2000])
        await bench.rest()
        assert bench.back.state == CLOSED and bench.back.done[-1] == "release"

    Bench().play(scenario)


def test_a_node_that_may_not_be_read_counts_as_gone() -> None:
    async def scenario(bench: Bench) -> None:
        await connected(bench)
        await bench.front.store.set_perms(f"{bench.FRONT}/state", ["n5"])
        bench.tree.fire(f"{bench.FRONT}/state")
        await bench.back.follow(xenbus.STATES.get(await bench.back.other("state"), CLOSED))
        assert bench.back.state == CLOSED

    Bench().play(scenario)


@pytest.mark.parametrize("text", ["", "-1", "1.0", "0x10", "4294967296", "\u00b2", "1_0", " 1", "1 ", "9" * 30, "9" * 1500])
def test_a_number_that_is_none_is_the_devices_error(text: str) -> None:
    async def scenario(bench: Bench) -> None:
        await connected(bench)
        await bench.front.store.write(f"{bench.FRONT}/ring-ref", text)
        with pytest.raises(DeviceError, match="ring-ref is no number of 32 bits") as caught:
            await bench.back.other_number("ring-ref")
        assert len(str(caught.value)) < 200
        await bench.front.store.write(f"{bench.FRONT}/ring-ref", "4294967295")
        assert await bench.back.other_number("ring-ref") == 0xFFFFFFFF

    Bench().play(scenario)


def test_a_failing_end_that_was_closed_already_stays_so() -> None:
    async def scenario(bench: Bench) -> None:
        await connected(bench)
        await bench.front.switch(CLOSING)
        await bench.rest()
        done = list(bench.front.done)
        await bench.front.fail("too late")
        assert bench.front.state == CLOSED and bench.front.done == done and bench.front.error == "too late"

    Bench().play(scenario)
