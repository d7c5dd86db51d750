"""A ring in asyncio: both ends or one, several waiters, time, closing, death; and that nothing but a knock wakes anybody."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from ringlib import Broken, Closed, SharedRing, WouldBlock, control, door, shared
from tests.conftest import NIGHTLY, TIMEOUT
from tests.ringlib.defects import CAUGHT, Edit, seed
from tests.ringlib.peers import SIZE, SOON, both, fork, new_name, process, records

DOOR_AT = (64 + 24, 128 + 24)  # in the control page, of each side


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a test does not want it, nobody spins, and a look comes only at TIMEOUT: who waits is woken by a knock, or fails."""
    monkeypatch.setattr(shared, "SPIN_NS", 0)
    monkeypatch.setattr(shared, "LOOK_SECONDS", TIMEOUT)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, TIMEOUT))


async def blocked(task: asyncio.Task[Any]) -> None:
    """Let it run until it waits for the ring."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()


# ---- use


async def echo_async(ring: SharedRing) -> None:
    while batch := await ring.aget(timeout=TIMEOUT):
        await ring.aput(batch)


def echo(name: str, kind: str) -> None:
    with SharedRing.attach(name) as ring:
        if kind == "async":
            run(echo_async(ring))
        else:
            for batch in iter(lambda: ring.get(timeout=TIMEOUT), b""):
                ring.put(batch)


async def ask(ring: SharedRing, hops: int, patience: float) -> None:
    for i in range(hops):
        await ring.aput(records(i, 1), TIMEOUT)
        assert await ring.aget(timeout=patience) == records(i, 1)


def check_each_hop_is_a_knock(kind: str, hops: int, patience: float) -> None:
    with SharedRing.create(new_name(), SIZE, SIZE) as ring, process(echo, ring.name, kind):
        run(ask(ring, hops, patience))
        ring.close()


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_there_and_back(kind: str) -> None:
    check_each_hop_is_a_knock(kind, 100_000 if NIGHTLY else 2_000, TIMEOUT / 2)


def test_the_peer_of_an_async_end_need_not_know() -> None:
    with SharedRing.create(new_name(), SIZE, SIZE) as ring, process(echo, ring.name, "async"):
        for i in range(1_000):
            ring.put(records(i, 1), TIMEOUT)
            assert ring.get(timeout=TIMEOUT) == records(i, 1)
        ring.close()


def consume(name: str, total: int) -> None:
    async def work(ring: SharedRing) -> None:
        i = 0
        async for record in ring:
            assert record == records(i, 1)[:SIZE]
            i += 1
        assert i == total

    with SharedRing.attach(name) as ring:
        run(work(ring))


def test_one_way_record_by_record() -> None:
    total = 20_000 if NIGHTLY else 2_000

    async def produce(ring: SharedRing) -> None:
        for i in range(total):
            await ring.aput(records(i, 1), TIMEOUT)
        await ring.adrain(TIMEOUT)
        assert ring.pending == 0

    with SharedRing.create(new_name(), SIZE, pages=1) as ring, process(consume, ring.name, total):
        run(produce(ring))
        ring.close()


def test_the_loop_runs_on() -> None:
    """Two rings of one loop, which wait for each other: one that blocked the loop would block both."""

    async def work() -> None:
        with both(SIZE, SIZE) as (front, back), both() as (there, here):

            async def serve() -> None:
                while batch := await back.aget():
                    await there.aput(batch)
                    await back.aput(batch)

            served = asyncio.create_task(serve())
            for i in range(200):
                await front.aput(records(i, 1))
                assert await here.aget() == records(i, 1)
                assert await front.aget() == records(i, 1)
            front.close()
            await served

    run(work())


def test_into_a_buffer() -> None:
    async def work() -> None:
        with both() as (front, back):
            room = bytearray(4 * SIZE)
            waiting = asyncio.create_task(back.aget_into(room, TIMEOUT))
            await blocked(waiting)
            front.put(records(0, 6))
            assert await waiting == 4 and room == records(0, 6)[: 4 * SIZE]
            assert await back.aget_into(room) == 2 and room[: 2 * SIZE] == records(0, 6)[4 * SIZE :]
            front.close()
            assert await back.aget_into(room) == 0

    run(work())


def test_what_does_not_fit_and_cannot_is_told() -> None:
    async def work() -> None:
        with both(SIZE, SIZE, pages=1) as (front, back):
            with pytest.raises(ValueError, match="records of"):
                await front.aput(records(0, front.nr_ents + 1))
            with pytest.raises(WouldBlock):
                await back.aput(records(0, 1))
            with pytest.raises(ValueError, match="answers"):
                await front.adrain()
        with both() as (front, _), pytest.raises(ValueError, match="one way"):
            await front.aget()

    run(work())


# ---- several at once


async def a_getter_and_a_putter(patience: float) -> None:
    """The putter wants ten to be answered, the getter one; one is, and it is the getter's."""
    with both(SIZE, SIZE, pages=1) as (front, back):
        front.put(records(0, front.nr_ents))
        getter = asyncio.create_task(front.aget())
        await blocked(getter)
        putter = asyncio.create_task(front.aput(records(0, 10), TIMEOUT))
        await blocked(putter)
        back.put(back.get(1))
        try:
            assert await asyncio.wait_for(getter, patience) == records(0, 1)
            await blocked(putter)
            for _ in range(9):
                back.put(back.get(1))
            await putter
        finally:
            putter.cancel()
        got = b""
        while len(got) < 9 * SIZE:
            got += await front.aget(timeout=TIMEOUT)
        assert got == records(0, 10)[SIZE:]


def check_a_getter_and_a_putter(patience: float) -> None:
    run(a_getter_and_a_putter(patience))


def test_a_getter_and_a_putter() -> None:
    check_a_getter_and_a_putter(TIMEOUT)


def test_two_getters_share_what_comes() -> None:
    async def work() -> None:
        with both() as (front, back):
            getters = [asyncio.create_task(back.aget(1, TIMEOUT)) for _ in range(2)]
            for getter in getters:
                await blocked(getter)
            front.put(records(0, 2))
            assert sorted(await asyncio.gather(*getters)) == [records(0, 2)[:SIZE], records(0, 2)[SIZE:]]

    run(work())


# ---- time


def test_timeouts() -> None:
    async def work() -> None:
        with both(pages=1) as (front, back):
            for wait in (0, 0.03):
                with pytest.raises(TimeoutError):
                    await back.aget(timeout=wait)
            front.put(records(0, front.nr_ents))
            for act in (lambda: front.aput(records(0, 1), 0.03), lambda: front.adrain(0.03)):
                with pytest.raises(TimeoutError):
                    await act()
            assert await back.aget(timeout=0) == records(0, front.nr_ents)
            await front.aput(records(0, 1), TIMEOUT)

    run(work())


def test_cancelled_it_has_taken_nothing() -> None:
    async def work() -> None:
        with both() as (front, back):
            for i in range(50):
                waiting = asyncio.create_task(back.aget())
                await blocked(waiting)
                if i % 2:
                    front.put(records(i, 1))  # knocks, and is there when the task is cancelled
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert door_of(back) == 0
                if i % 2:
                    assert back.take() == records(i, 1)

    run(work())


# ---- spinning first


def elsewhere(ring: SharedRing) -> None:
    """Say that its peer is on another CPU, so that spinning may be worth it."""
    os.pwrite(ring._fd, struct.pack("<I", 1000), (128, 64)[ring._side] + 8)


async def wait_in_vain(ring: SharedRing) -> None:
    waiting = asyncio.create_task(ring.aget())
    await blocked(waiting)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def spin_while_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with both() as (front, back):
        elsewhere(back)
        monkeypatch.setattr(shared, "SPIN_NS", 1)
        for waits, spins in ((1, 1), (1, 1), (1, 2), (3, 2), (1, 3), (7, 3), (1, 4), (15, 4), (1, 5)):
            for _ in range(waits):
                await wait_in_vain(back)
            assert back.statistics.spins == spins and back.statistics.spins_won == 0
        for _ in range(31):
            await wait_in_vain(back)
        monkeypatch.setattr(shared, "SPIN_NS", int(TIMEOUT * 1e9))
        sender = threading.Thread(target=publish_to_who_spins, args=(front, back, 6))
        sender.start()
        assert await back.aget() == records(0, 1)
        sender.join(TIMEOUT)
        assert back.statistics.spins_won == 1
        elsewhere(back)
        monkeypatch.setattr(shared, "SPIN_NS", 1)
        await wait_in_vain(back)
        assert back.statistics.spins == 7, "luck is believed at once"


def publish_to_who_spins(front: SharedRing, back: SharedRing, spins: int) -> None:
    while back.statistics.spins < spins:
        pass
    front.publish(records(0, 1))


def check_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    run(spin_while_it_is_worth_it(monkeypatch))


def test_an_end_spins_while_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_spinning(monkeypatch)


async def found_at_once() -> None:
    with both() as (_, back):
        order: list[str] = []

        async def other() -> None:
            order.append("other")

        here: Any = back._open_door()
        here._ask = lambda *arguments: 1
        task = asyncio.create_task(other())
        assert await here.wait(1, TIMEOUT, 0) == 1
        order.append("waiter")
        await task
        assert order == ["other", "waiter"]


def check_the_loop_has_a_turn() -> None:
    run(found_at_once())


def test_what_is_found_at_once_leaves_the_loop_a_turn() -> None:
    check_the_loop_has_a_turn()


# ---- closing and death


def test_closing_ends_a_wait() -> None:
    async def work() -> None:
        with both() as (front, back):
            waiting = asyncio.create_task(back.aget())
            await blocked(waiting)
            front.put(records(0, 1))
            front.close()
            assert await waiting == records(0, 1)
            assert await back.aget() == b""
        with both() as (front, back):
            waiting = asyncio.create_task(back.aget())
            await blocked(waiting)
            back.close()
            with pytest.raises(Closed):
                await waiting
            with pytest.raises(Closed):
                await back.aget()

    run(work())


def create_and_hang(name: str, created: Any) -> None:
    async def work() -> None:
        ring = SharedRing.create(name, SIZE, SIZE)
        await ring.aput(records(0, 1))
        waiting = asyncio.create_task(ring.aget())
        await blocked(waiting)
        assert door_of(ring)
        created.set()
        await waiting

    run(work())


def test_a_killed_peer_is_noticed_and_leaves_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LOOK_SECONDS", 0.01)
    name, created = new_name(), fork.Event()
    with process(create_and_hang, name, created) as child:
        assert created.wait(TIMEOUT)
        with SharedRing.attach(name) as ring:
            address = b"@%05x" % (door_of(ring, control.FRONT) - 1)
            assert address in Path("/proc/net/unix").read_bytes()
            child.kill()
            child.join()
            assert address not in Path("/proc/net/unix").read_bytes()

            async def work() -> None:
                assert await ring.aget() == records(0, 1)
                with pytest.raises(Broken, match="died"):
                    await ring.aget()
                await ring.aput(records(0, 1))  # knocks at a door that is no more

            run(work())
    posix_ipc.unlink_shared_memory(name)


# ---- the door


def door_of(ring: SharedRing, side: int | None = None) -> int:
    number: int = struct.unpack("<I", os.pread(ring._fd, 4, DOOR_AT[ring._side if side is None else side]))[0]
    return number


def test_a_door_is_told_only_while_somebody_waits() -> None:
    async def work() -> None:
        with both() as (front, back):
            waiting = asyncio.create_task(back.aget())
            await blocked(waiting)
            assert door_of(back) and not door_of(front)
            front.put(records(0, 1))
            await waiting
            assert not door_of(back)
            assert back.statistics.sleeps == 1 and front.statistics.notifications == 1

    run(work())


def test_where_no_knock_comes_a_look_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two network namespaces."""
    monkeypatch.setattr(shared, "LOOK_SECONDS", 0.01)

    async def work() -> None:
        with both() as (front, back):
            waiting = asyncio.create_task(back.aget(timeout=TIMEOUT))
            await blocked(waiting)
            os.pwrite(back._fd, struct.pack("<I", 0xFFFFFFFF), DOOR_AT[control.BACK])
            front.put(records(0, 1))
            assert await waiting == records(0, 1)

    run(work())


def test_a_knock_from_elsewhere_is_a_look() -> None:
    async def work() -> None:
        with both() as (front, back):
            waiting = asyncio.create_task(back.aget())
            await blocked(waiting)
            with door.socket.socket(door.socket.AF_UNIX, door.socket.SOCK_DGRAM) as stranger:
                for _ in range(3):
                    stranger.sendto(b"hello", b"\0%05x" % (door_of(back) - 1))
                    await blocked(waiting)
            front.put(records(0, 1))
            assert await waiting == records(0, 1)

    run(work())


def test_another_loop_and_no_loop() -> None:
    """An end may wait in one loop after the other, and without one in between."""
    with both() as (front, back):
        for i in range(3):

            async def work() -> None:
                waiting = asyncio.create_task(back.aget())
                await blocked(waiting)
                front.put(records(0, 1))
                assert await waiting == records(0, 1)

            run(work())
            front.put(records(i, 1))
            assert back.get(timeout=TIMEOUT) == records(i, 1)


def wait_without_a_loop(name: str) -> None:
    with SharedRing.attach(name) as ring:
        os.pwrite(ring._fd, struct.pack("<I", 1), DOOR_AT[control.BACK])  # as one that was left by a wait
        assert ring.get(timeout=TIMEOUT / 2) == records(0, 1)


def test_who_sleeps_is_woken_whatever_door_was_told() -> None:
    with SharedRing.create(new_name(), SIZE) as ring, process(wait_without_a_loop, ring.name):
        ring.put(records(0, 1))
        ring.drain(TIMEOUT)


def close_inherited(ring: SharedRing) -> None:
    ring.close()


def test_a_forked_childs_close_is_not_ours() -> None:
    async def work() -> None:
        with both() as (front, back):
            waiting = asyncio.create_task(back.aget())
            await blocked(waiting)
            with process(close_inherited, back):
                pass
            front.put(records(0, 1))
            assert await waiting == records(0, 1)

    run(work())


def test_nothing_is_left_open() -> None:
    async def work() -> None:
        with both(SIZE, SIZE) as (front, back):
            served = asyncio.create_task(echo_async(back))
            await ask(front, 3, TIMEOUT)
            front.close()
            await served

    run(work())
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(work())
    assert set(os.listdir("/proc/self/fd")) == before


# ---- what must be noticed


def never_knocks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    seed(monkeypatch, folder, Edit("shared.c", "        knock(s, door);\n", "        (void)knock;\n"))
    check_each_hop_is_a_knock("async", 100, SOON)


def knocks_for_nobody(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    told = "atomic_store(&s->control->end[s->side].door, door);"
    seed(monkeypatch, folder, Edit("shared.c", told, "(void)door;"))
    check_each_hop_is_a_knock("async", 100, SOON)


def waits_without_asking(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    seed(monkeypatch, folder, Edit("shared.c", "r = door && ask(s, want);", "(void)ask; r = 0;"))
    check_each_hop_is_a_knock("async", 100, SOON)


def spins_always(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    seed(monkeypatch, folder, Edit("spin.h", "    s->wait_out = s->unlucky;\n", ""))
    check_spinning(monkeypatch)


def keeps_the_loop(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(asyncio, "sleep", at_once)
    check_the_loop_has_a_turn()


def asks_for_the_last_waiter_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(door, "min", lambda wants: list(wants)[-1], raising=False)
    check_a_getter_and_a_putter(SOON)


@pytest.mark.parametrize(
    "defect",
    [never_knocks, knocks_for_nobody, waits_without_asking, asks_for_the_last_waiter_only, spins_always, keeps_the_loop],
)
def test_seeded_defects_are_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, defect: Callable[[pytest.MonkeyPatch, Path], None]
) -> None:
    with pytest.raises(CAUGHT):
        defect(monkeypatch, tmp_path)
