"""SharedRing: both ways of use, what does not fit, closing, time and names, between real processes."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringlib import Broken, Busy, Closed, SharedRing, Statistics, WouldBlock, shared
from tests.conftest import NIGHTLY, TIMEOUT
from tests.ringlib.defects import CAUGHT, Edit, seed
from tests.ringlib.peers import SIZE, SOON, both, fork, new_name, process, records

# ---- use


def consume(name: str, total: int) -> None:
    with SharedRing.attach(name) as ring:
        got = b"".join(iter(lambda: ring.get(timeout=TIMEOUT), b""))
    assert got == b"".join(records(i, 100) for i in range(0, total, 100))


def test_one_way_carries_many_times_its_size() -> None:
    total = 100_000 if NIGHTLY else 10_000
    with SharedRing.create(new_name(), SIZE, pages=2) as ring, process(consume, ring.name, total):
        assert ring.nr_ents == 64
        for first in range(0, total, 100):
            batch = records(first, 100)
            ring.put(batch[: 50 * SIZE], TIMEOUT)
            ring.put(batch[50 * SIZE :], TIMEOUT)
        ring.drain(TIMEOUT)
        assert ring.pending == 0
        ring.close()


def echo(name: str) -> None:
    with SharedRing.attach(name) as ring:
        for batch in iter(lambda: ring.get(timeout=TIMEOUT), b""):
            ring.put(batch)


def check_a_sleeper_is_woken(monkeypatch: pytest.MonkeyPatch, hops: int, patience: float) -> None:
    """Nobody spins, and a look at the peer comes only at TIMEOUT: each hop sleeps, and is woken or fails."""
    monkeypatch.setattr(shared, "SPIN_NS", 0)
    monkeypatch.setattr(shared, "LOOK_SECONDS", TIMEOUT)
    with SharedRing.create(new_name(), SIZE, SIZE) as ring, process(echo, ring.name):
        for i in range(hops):
            ring.put(records(i, 1), TIMEOUT)
            assert ring.get(timeout=patience) == records(i, 1)
        ring.close()


def test_a_sleeper_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_sleeper_is_woken(monkeypatch, 300_000 if NIGHTLY else 3_000, TIMEOUT / 2)


def test_the_front_keeps_what_is_answered_while_it_waits_for_room() -> None:
    with SharedRing.create(new_name(), SIZE, SIZE, pages=1) as ring, process(echo, ring.name):
        count = 2 * ring.nr_ents
        for i in range(count):
            ring.put(records(i, 1), TIMEOUT)
        got = b""
        while len(got) < count * SIZE:
            got += ring.get(7, TIMEOUT)
        assert got == b"".join(records(i, 1) for i in range(count))
        ring.close()


def test_a_front_that_never_takes_its_answers_is_told() -> None:
    with both(SIZE, SIZE, pages=1) as (front, back):
        for _ in range(2):
            front.put(records(0, front.nr_ents), 0)
            back.put(back.get(timeout=0))
        with pytest.raises(WouldBlock):
            front.put(records(0, 1), TIMEOUT)
        for _ in range(2):
            assert front.get(timeout=0) == records(0, front.nr_ents)
        front.put(records(0, 1), 0)


def test_record_by_record() -> None:
    with both() as (front, back):
        front.put(records(0, 3))
        one_by_one = iter(back)
        assert [next(one_by_one) for _ in range(3)] == [records(0, 3)[at : at + SIZE] for at in (0, SIZE, 2 * SIZE)]
        front.put(records(3, 1))
        front.close()
        assert list(one_by_one) == [struct.pack("<Q", 3).ljust(SIZE, b"\0")]


def test_room_comes_back_by_the_quarter_ring() -> None:
    """Or when the back finds nothing more, or closes; not with every record, which would cost a cache line each."""
    with both(pages=1) as (front, back):
        quarter = front.nr_ents // 4
        front.put(records(0, front.nr_ents))
        back.get(quarter - 1)
        with pytest.raises(WouldBlock):
            front.publish(records(0, 1))
        back.get(1)
        front.publish(records(0, quarter))
        assert front.pending == front.nr_ents
        back.get()
        assert front.pending == 0
        front.put(records(0, 1))
        back.get()
        assert front.pending == 1
        assert back.take() == b""
        assert front.pending == 0
        front.put(records(0, 1))
        back.get()
        back.close()
        assert front.pending == 0
        with SharedRing.attach(front.name) as another:
            assert another.take() == b""


def test_payload_is_one_memory() -> None:
    with both(16, 16, payload=100_000) as (front, back):
        assert len(front.payload) == len(back.payload) == 25 * mmap.PAGESIZE
        front.payload[70_000:70_005] = b"hello"
        front.put(struct.pack("<QQ", 70_000, 5))
        at, length = struct.unpack("<QQ", back.get())
        view = back.payload[at : at + length]
        assert bytes(view) == b"hello"
        back.close()
        assert len(back.payload) == 0
        front.payload[70_000] = ord("j")
        assert bytes(view) == b"jello", "a view outlives the ring"


def test_the_peer_is_notified_only_when_it_asked() -> None:
    with both() as (front, back):
        for i in range(100):
            front.put(records(i, 1))
        assert front.statistics.notifications == 1, "the header asks for the first"
        back.get()
        with pytest.raises(TimeoutError):
            back.get(timeout=0.001)  # asked
        front.put(records(0, 1))
        front.put(records(0, 1))
        assert front.statistics.notifications == 2


def check_statistics() -> None:
    with both(SIZE, 16, pages=2) as (front, back):
        front.put(records(0, 5))
        front.publish(records(5, 3))
        front.put(b"")
        assert front.statistics == Statistics(8, 2, 0, 0, notifications=1, sleeps=0, spins=0, spins_won=0, high_water=8)
        back.get(3)
        back.get_into(bytearray(SIZE))
        back.put(bytes(16) * 4)
        with pytest.raises(WouldBlock):
            front.publish(records(0, front.nr_ents - 3))
        assert back.statistics == Statistics(4, 1, 4, 2, notifications=1, sleeps=0, spins=0, spins_won=0, high_water=8)
        back.take()
        back.put(bytes(16) * 4)
        front.get()
        with pytest.raises(TimeoutError):
            front.get(timeout=0.001)
        front.close()
        got = front.statistics
        assert got[:5] == (8, 2, 8, 1, 1 + 1) and got.sleeps >= 1 and got.high_water == 8, "closing notifies too"


def test_statistics() -> None:
    check_statistics()


def test_spins_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer is said to be on another CPU, so that it is worth while."""
    with both() as (front, back):
        for line in (64, 128):
            os.pwrite(back._fd, struct.pack("<I", 1000), line + 8)
        with pytest.raises(TimeoutError):
            back.get(timeout=0)
        assert back.statistics[5:8] == (0, 1, 0)
        with pytest.raises(TimeoutError):
            back.get(timeout=0)
        assert back.statistics[5:8] == (0, 1, 0), "it was not worth it: a wait without"
        monkeypatch.setattr(shared, "SPIN_NS", int(TIMEOUT * 1e9))
        reader = threading.Thread(target=lambda: back.get(timeout=TIMEOUT))
        reader.start()
        while back.statistics.spins < 2:
            pass
        front.publish(records(0, 1))
        reader.join(TIMEOUT)
        assert back.statistics[5:8] == (0, 2, 1)


def test_waiting_lets_other_threads_run() -> None:
    with both() as (front, back):
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(back.get(timeout=TIMEOUT)))
        reader.start()
        front.put(records(1, 1))
        reader.join(TIMEOUT)
        assert got == [records(1, 1)]


EXAMPLE = """
import os
from ringlib import SharedRing

with SharedRing.create("{name}", request_size=64) as ring:
    if os.fork() == 0:
        with SharedRing.attach("{name}") as mine:
            print(sum(int.from_bytes(record, "little") for record in mine), flush=True)
        os._exit(0)
    for i in range(1000):
        ring.put(i.to_bytes(64, "little"))
    ring.drain()
os.wait()
"""


def test_the_example() -> None:
    code = EXAMPLE.format(name=new_name())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert done.stdout == f"{sum(range(1000))}\n"


# ---- what does not fit


def test_overflow_is_refused_without_change() -> None:
    with both(pages=1) as (front, back):
        front.publish(records(0, front.nr_ents - 1))
        with pytest.raises(WouldBlock):
            front.publish(records(0, 2))
        with pytest.raises(TimeoutError):
            front.put(records(0, 2), 0.01)
        for wrong in (records(0, front.nr_ents + 1), bytes(SIZE + 1)):
            with pytest.raises(ValueError, match="records of"):
                front.put(wrong)
        assert front.pending == front.nr_ents - 1
        assert back.get() == records(0, front.nr_ents - 1)
        front.put(records(5, front.nr_ents), 0)
        assert back.get(timeout=0) == records(5, front.nr_ents)


def test_a_back_answers_what_it_took() -> None:
    with both(SIZE, 16) as (front, back):
        front.put(records(0, 3))
        back.get(2)
        with pytest.raises(WouldBlock):
            back.put(bytes(16) * 3)
        assert back.pending == 2
        back.put(bytes(16) * 2)
        assert back.pending == 0
        assert front.get() == bytes(32)


def test_one_way_is_one_way() -> None:
    with both() as (front, back):
        with pytest.raises(ValueError, match="one way"):
            front.get(timeout=0)
        with pytest.raises(ValueError, match="one way"):
            back.put(b"")
        with pytest.raises(ValueError, match="answers"):
            back.drain()
    with both(SIZE, SIZE) as (front, _), pytest.raises(ValueError, match="answers"):
        front.drain()


def test_get_takes_at_least_one() -> None:
    with both() as (front, back):
        front.put(records(0, 1))
        with pytest.raises(ValueError, match="not 1 to"):
            back.get(0)
        with pytest.raises(OverflowError):
            back.get(-1)
        assert back.get(1) == records(0, 1)


@pytest.mark.parametrize(
    "sizes", [(0, 0, 1), (-1, 0, 1), (SIZE, -1, 1), (SIZE, 0, 0), (mmap.PAGESIZE, 0, 1), (SIZE, 1 << 30, 1), (SIZE, 0, 1 << 30)]
)
def test_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="impossible sizes"):
        SharedRing.create(new_name(), sizes[0], sizes[1], pages=sizes[2])


# ---- closing


def test_closing_ends_the_peers_get_after_what_is_left() -> None:
    with both() as (front, back):
        front.put(records(0, 5))
        front.close()
        front.close()
        assert back.get(3) == records(0, 5)[: 3 * SIZE]
        assert back.get() == records(0, 5)[3 * SIZE :]
        assert back.get() == back.get() == back.take() == b""
        for act in (front.take, front.get, front.drain, lambda: front.put(records(0, 1)), lambda: front.pending):
            with pytest.raises(Closed):
                act()


def close_when_told(name: str, told: Any) -> None:
    with SharedRing.attach(name):
        told.wait(TIMEOUT)


def test_a_full_ring_whose_back_closes() -> None:
    told = fork.Event()
    with SharedRing.create(new_name(), SIZE, pages=1) as ring, process(close_when_told, ring.name, told):
        ring.put(records(0, ring.nr_ents))
        with pytest.raises(TimeoutError):
            ring.put(records(0, 1), 0.01)
        told.set()
        with pytest.raises(Broken, match="closed"):
            ring.put(records(0, 1), TIMEOUT)
        with pytest.raises(Broken, match="closed"):
            ring.publish(records(0, 1))
        with pytest.raises(Broken, match="closed"):
            ring.drain(TIMEOUT)


def put_and_close(name: str, count: int) -> None:
    with SharedRing.attach(name) as ring:
        batch = ring.get(timeout=TIMEOUT)
        for _ in range(count):
            ring.put(batch[:SIZE])


def test_nothing_is_lost_when_the_peer_closes_meanwhile() -> None:
    for i in range(500 if NIGHTLY else 50):
        with SharedRing.create(new_name(), SIZE, SIZE) as ring, process(put_and_close, ring.name, 1 + i % 7):
            ring.put(records(0, 7))
            got = b"".join(iter(lambda: ring.get(timeout=TIMEOUT), b""))
            assert got == records(0, 1) * (1 + i % 7)


def close_inherited(ring: SharedRing) -> None:
    ring.close()
    with pytest.raises(Closed):
        ring.take()


def test_a_forked_childs_close_is_not_ours() -> None:
    with both() as (front, back):
        for ring in (front, back):
            with process(close_inherited, ring):
                pass
        front.put(records(0, 1))
        assert back.get(timeout=TIMEOUT) == records(0, 1)
        with pytest.raises(Busy):
            SharedRing.attach(front.name)


# ---- time


def test_timeouts() -> None:
    with both(pages=1) as (front, back):
        front.put(records(0, front.nr_ents))
        for wait in (0, 0.03, SOON):
            begin = time.monotonic()
            with pytest.raises(TimeoutError):
                front.put(records(0, 1), wait)
            with pytest.raises(TimeoutError):
                front.drain(wait)
            assert 2 * wait <= time.monotonic() - begin < 2 * wait + TIMEOUT
        back.get()
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            back.get(timeout=SOON)
        assert time.monotonic() - begin >= SOON
        front.put(records(7, 1), 0)
        assert back.get(timeout=0) == records(7, 1)


def test_a_front_waits_for_a_back_that_has_not_come() -> None:
    with SharedRing.create(new_name(), SIZE, SIZE) as ring:
        ring.put(records(0, 1))
        with pytest.raises(TimeoutError):
            ring.get(timeout=2 * shared.LOOK_SECONDS)
        with SharedRing.attach(ring.name) as back:
            back.put(back.get())
        assert ring.get() == records(0, 1)


def test_a_signal_handler_runs_while_we_wait() -> None:
    """SIGALRM's handler raises out of a get without a timeout."""

    def ring_out(number: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, ring_out)
    remaining = signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's own
    try:
        with both() as (_, back), pytest.raises(InterruptedError):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            back.get()
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *remaining)


# ---- what is left


def test_nothing_is_left_open() -> None:
    with both():
        pass
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with both(payload=1) as (front, back):
            with pytest.raises(TimeoutError):
                front.put(records(0, front.nr_ents - 1))
                front.put(records(0, 2), 0.001)
            with pytest.raises(Busy):
                SharedRing.attach(front.name)
            back.get()
    assert set(os.listdir("/proc/self/fd")) == before


# ---- what must be noticed


def never_rings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    wake = "syscall(SYS_futex, &peer->bell, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0);"
    seed(monkeypatch, folder, Edit("shared.c", wake, ";"))
    check_a_sleeper_is_woken(monkeypatch, 3_000, SOON)


def sleeps_without_asking(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    ask = "ring_final_check(producer(s), event, consumer(s), want) || closed(s)"
    seed(monkeypatch, folder, Edit("shared.c", ask, "(void)event, (void)want, closed(s)"))
    check_a_sleeper_is_woken(monkeypatch, 3_000, SOON)


def counts_what_was_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    early = "    if (r < 0)\n        return r;\n    if (r == 1)\n        ring_the_bell(s);\n    s->counts.records_sent += n;\n"
    late = "    s->counts.records_sent += n;\n    if (r < 0)\n        return r;\n    if (r == 1)\n        ring_the_bell(s);\n"
    seed(monkeypatch, folder, Edit("shared.c", early, late))
    check_statistics()


@pytest.mark.parametrize("defect", [never_rings, sleeps_without_asking, counts_what_was_refused])
def test_seeded_defects_are_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, defect: Callable[[pytest.MonkeyPatch, Path], None]
) -> None:
    with pytest.raises(CAUGHT):
        defect(monkeypatch, tmp_path)


def putting_that_asks_twice(ring: SharedRing, batch: bytes, spin_ns: int) -> Iterator[int]:
    """The seeded defect: the answers that the second asking takes are waited for afterwards."""
    while True:
        try:
            return ring._publish(batch, spin_ns)
        except WouldBlock:
            pass
        if (short := ring.pending + len(batch) // SIZE - ring.nr_ents) > 0:
            yield max(short, ring.pending // 2)


@pytest.mark.parametrize("defect", [False, True])
def test_who_waits_for_room_waits_for_answers_that_are_still_to_come(monkeypatch: pytest.MonkeyPatch, defect: bool) -> None:
    """Whoever asks how many are pending takes the answers that are there; here the peer answers right behind each asking."""
    monkeypatch.setattr(shared, "LOOK_SECONDS", TIMEOUT)
    if defect:
        monkeypatch.setattr(SharedRing, "_putting", putting_that_asks_twice)
    with both(pages=1) as (front, back):
        front.put(records(0, front.nr_ents))
        asked = SharedRing.pending.fget
        assert asked is not None

        def pending(ring: SharedRing) -> int:
            number: int = asked(ring)
            while back.take():  # and once more, which tells the front that all were taken
                pass
            return number

        monkeypatch.setattr(SharedRing, "pending", property(pending))
        front.put(records(1, 1), SOON)
        monkeypatch.undo()
        assert front.statistics.sleeps == defect, "there was room all the time"
