"""Rows a1 to a4: SharedRing between two processes, against a tight C ring between the same two, and other ways.

a1 records of 64 bytes in batches; a2 one Python call a record; a3 payload of 4 and 64 KiB left in place, records saying
where; a4 round trips, with both ends in C, both in Python, asleep, and with a third process on one of the CPUs.
"""

from __future__ import annotations

import mmap
import statistics
import struct
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from ringlib import SharedRing
from scripts.benchmarks.channels import Kind, Membridge, Pipe, Queue, Ring, absent, new_name, yielding
from scripts.benchmarks.harness import ROOT, Absent, Measure, Meet, Row, compiled, cpus, hog, pair

RINGLIB = ROOT / "ringlib"
RECORD = 64
BATCH = 256
SLOTS = 512  # of the tight ring, as many as SharedRing has of 64 bytes in its 16 pages
PLACE = struct.Struct("<QQ")  # a record of a3: offset, size
PLACE_BYTES = 8 << 20  # of payload, at most; a quarter of it a call
SPIN_NS = 20_000
ATTACH = 10  # seconds


@cache
def limit() -> tuple[Any, Any]:
    here = ROOT / "scripts" / "benchmarks"
    return compiled(here / "limit.c", [RINGLIB / "ring.c", RINGLIB / "shared.c"], RINGLIB)


def memory(size: int) -> Any:
    """Shared by the processes forked after this, and touched, so that no page fault is measured."""
    ffi, _ = limit()
    area = mmap.mmap(-1, size)
    area.write(bytes(size))
    return ffi.from_buffer(area)


# ---- throughput: records a second from the first one sent to the last one taken


def channel_rate(kind: Kind, record: int, batch: int, seconds: float) -> float:
    """`batch` records a send. The clock stops when the receiver has seen the end."""

    def receive(meet: Meet) -> tuple[int, int]:
        get = channel.receiver()
        meet()
        count = 0
        while (n := len(get())) > 1:
            count += n
        return count // record, time.monotonic_ns()

    def send(meet: Meet) -> int:
        put, data = channel.sender(), bytes(record * batch)
        meet()
        begin = time.monotonic_ns()
        end = begin + int(seconds * 1e9)
        while time.monotonic_ns() < end:
            for _ in range(16):
                put(data)
        channel.end()
        return begin

    channel = kind(record * batch)
    (count, end), begin = pair(receive, send, pinned=channel.pinned, forget=channel.forget)
    return float(count / (end - begin) * 1e9)


def ring_rate(batch: int, singly: bool, seconds: float) -> float:
    """As channel_rate, of SharedRing: its records are RECORD bytes whatever the batch."""
    return channel_rate(lambda size: Ring(RECORD, singly), RECORD, batch, seconds)


def tight_rate(seconds: float) -> float:
    """The limit of a1: batches copied into and out of the tight ring."""
    ffi, lib = limit()
    ring = memory(lib.TIGHT_HEADER + SLOTS * RECORD)

    def receive(meet: Meet) -> tuple[int, int]:
        out = ffi.new("char[]", BATCH * RECORD)
        meet()
        return lib.tight_receive(ring, SLOTS, RECORD, BATCH, out), time.monotonic_ns()

    def send(meet: Meet) -> int:
        data = ffi.new("char[]", BATCH * RECORD)
        meet()
        begin = time.monotonic_ns()
        lib.tight_send(ring, SLOTS, RECORD, BATCH, data, seconds)
        return begin

    (count, end), begin = pair(receive, send)
    return float(count / (end - begin) * 1e9)


def bare_rate(seconds: float) -> float:
    """The limit of a2: the tight ring, one cffi call a record, in a Python loop that does nothing else but yield at last."""
    ffi, lib = limit()
    ring = memory(lib.TIGHT_HEADER + SLOTS * RECORD)

    def receive(meet: Meet) -> tuple[int, int]:
        out, pop, count = ffi.new("char[]", RECORD), lib.tight_pop, 0
        meet()
        while True:
            missed = 0
            while pop(ring, SLOTS, RECORD, out):
                count += 1
            while not pop(ring, SLOTS, RECORD, out):
                if lib.tight_ended(ring) and not pop(ring, SLOTS, RECORD, out):
                    return count, time.monotonic_ns()
                missed = yielding(missed)
            count += 1

    def send(meet: Meet) -> int:
        data, push = ffi.new("char[]", RECORD), lib.tight_push
        meet()
        begin = time.monotonic_ns()
        end = begin + int(seconds * 1e9)
        while time.monotonic_ns() < end:
            for _ in range(16):
                missed = 0
                while not push(ring, SLOTS, RECORD, data):
                    missed = yielding(missed)
        lib.tight_end(ring)
        return begin

    (count, end), begin = pair(receive, send)
    return float(count / (end - begin) * 1e9)


# ---- in place


def place_rate(size: int, touched: bool, seconds: float) -> float:
    """Payloads a second: the front writes one word a cache line in place, the back reads it, its answer gives it back."""
    ffi, lib = limit()
    name, count = new_name(), min(PLACE_BYTES // size, SLOTS)
    batch_bytes = count // 4 * PLACE.size

    def receive(meet: Meet) -> tuple[int, int]:
        meet()
        with SharedRing.attach(name, ATTACH) as ring:
            base, taken = ffi.from_buffer(ring.payload), 0
            while batch := ring.get(count // 4):
                n = len(batch) // PLACE.size
                if touched:
                    lib.place_read(base, batch, n)
                ring.put(batch)
                taken += n
            return taken, time.monotonic_ns()

    def send(meet: Meet) -> int:
        with SharedRing.create(name, PLACE.size, PLACE.size, payload=count * size) as ring:
            ring.payload[:] = bytes(count * size)
            base = ffi.from_buffer(ring.payload)
            free = b"".join(PLACE.pack(i * size, size) for i in range(count))
            meet()
            begin = time.monotonic_ns()
            end = begin + int(seconds * 1e9)
            while time.monotonic_ns() < end:
                batch, free = free[:batch_bytes], free[batch_bytes:]
                if touched:
                    lib.place_write(base, batch, len(batch) // PLACE.size)
                ring.put(batch)
                free += ring.take() if free else ring.get()
            while len(free) < count * PLACE.size:
                free += ring.get()
            return begin

    (taken, end), begin = pair(receive, send)
    return float(taken / (end - begin) * 1e9)


def tight_place_rate(size: int, seconds: float) -> float:
    """The limit of a3: the same words written and read, of as much memory, handed over by two indexes."""
    _, lib = limit()
    count = min(PLACE_BYTES // size, SLOTS)
    ring, payload = memory(lib.TIGHT_HEADER), memory(count * size)

    def receive(meet: Meet) -> tuple[int, int]:
        meet()
        return lib.place_receive(ring, payload, count, size, count // 4), time.monotonic_ns()

    def send(meet: Meet) -> int:
        meet()
        begin = time.monotonic_ns()
        lib.place_send(ring, payload, count, size, count // 4, seconds)
        return begin

    (taken, end), begin = pair(receive, send)
    return float(taken / (end - begin) * 1e9)


# ---- round trips, in microseconds


def median_us(ns: list[int]) -> float:
    return statistics.median(ns) / 1e3


def mean_us(ns: list[int]) -> float:
    return statistics.fmean(ns) / 1e3


Summary = Callable[[list[int]], float]


def channel_trip(kind: Kind, seconds: float, summary: Summary = median_us) -> float:
    """A record there and back over two channels, both ends in Python."""

    def serve(meet: Meet) -> None:
        put, get = back.sender(), there.receiver()
        meet()
        while len(data := get()) > 1:
            put(data)
        back.end()

    def ask(meet: Meet) -> list[int]:
        put, get = there.sender(), back.receiver()
        meet()
        ns = trips(put, get, seconds)
        there.end()
        get()
        return ns

    def forget() -> None:
        there.forget()
        back.forget()

    there, back = kind(RECORD), kind(RECORD)
    return summary(pair(serve, ask, pinned=there.pinned, forget=forget)[1])


def trips(put: Callable[[bytes], object], get: Callable[[], bytes], seconds: float) -> list[int]:
    record, ns, clock = bytes(RECORD), [], time.monotonic_ns
    now = clock()
    end = now + int(seconds * 1e9)
    while now < end:
        before = now
        put(record)
        get()
        now = clock()
        ns.append(now - before)
    return ns


def ring_trip(seconds: float, summary: Summary = median_us) -> float:
    """One two-way SharedRing, both ends in Python."""
    name = new_name()

    def serve(meet: Meet) -> None:
        meet()
        with SharedRing.attach(name, ATTACH) as ring:
            while data := ring.get():
                ring.put(data)

    def ask(meet: Meet) -> list[int]:
        with SharedRing.create(name, RECORD, RECORD) as ring:
            meet()
            ring.put(bytes(RECORD))
            ring.get()
            return trips(ring.put, ring.get, seconds)

    return summary(pair(serve, ask)[1])


def c_ring_trip(spin_ns: int, count: int) -> float:
    """One two-way SharedRing, opened in Python and used in C."""
    ffi, lib = limit()
    name = new_name()

    def state(ring: SharedRing) -> Any:
        from ringlib._ring import ffi as theirs

        return ffi.cast("void *", int(theirs.cast("uintptr_t", ring._state)))

    def serve(meet: Meet) -> int:
        meet()
        with SharedRing.attach(name, ATTACH) as ring:
            code: int = lib.ring_pong(state(ring), RECORD, count + 1, spin_ns)
            return code

    def ask(meet: Meet) -> list[int]:
        with SharedRing.create(name, RECORD, RECORD) as ring:
            meet()
            ns = ffi.new("uint32_t[]", count + 1)
            if lib.ring_ping(state(ring), RECORD, count + 1, spin_ns, ns):
                raise RuntimeError("the ring broke")
            return list(ns)[1:]  # the first waits for the back to attach

    return median_us(pair(serve, ask)[1])


def c_trip(ping: str, pong: str, count: int) -> float:
    """A limit of a4: both ends in C on bare words."""
    ffi, lib = limit()
    areas = [memory(lib.TIGHT_HEADER + 16 * RECORD) for _ in range(2)]
    arguments: list[Any] = [*areas, RECORD, count] if ping == "tight_ping" else [areas[0], count]

    def serve(meet: Meet) -> None:
        meet()
        getattr(lib, pong)(*arguments)

    def ask(meet: Meet) -> list[int]:
        ns = ffi.new("uint32_t[]", count)
        meet()
        getattr(lib, ping)(*arguments, ns)
        return list(ns)

    return median_us(pair(serve, ask)[1])


def with_hog(measure: Measure) -> float:
    with hog(cpus()[1]):
        return measure()


# ---- the rows


def peers(measure: Callable[[Kind], float], **more: Measure) -> dict[str, Measure | Absent]:
    """The three that are always asked for, by what measures a kind of channel."""
    why = absent("membridge")
    return {
        "os.pipe": partial(measure, Pipe),
        **more,
        "multiprocessing.Queue": partial(measure, Queue),
        "membridge": why or partial(measure, Membridge),
    }


def rows(quick: bool) -> list[Row]:
    seconds = 0.05 if quick else 0.1
    trips_c = 2_000 if quick else 10_000
    sleeps = 300 if quick else 1_000
    limit()  # built before anything is measured

    def rate(record: int) -> Callable[[Kind], float]:
        return lambda kind: channel_rate(kind, record, 1, seconds)

    def trip(summary: Summary = median_us) -> Callable[[Kind], float]:
        return lambda kind: channel_trip(kind, seconds, summary)

    return [
        Row(
            "a1",
            f"64 B records, {BATCH} a call",
            "records/s",
            "more",
            partial(ring_rate, BATCH, False, seconds),
            partial(tight_rate, seconds),
            "tight C ring, copies in and out",
            peers(rate(RECORD), **{f"os.pipe, {BATCH} a call": partial(channel_rate, Pipe, RECORD, BATCH, seconds)}),
            gate=0.4,
        ),
        Row(
            "a2",
            "64 B records, one a call",
            "records/s",
            "more",
            partial(ring_rate, 1, True, seconds),
            partial(bare_rate, seconds),
            "tight C ring, one cffi call a record",
            peers(rate(RECORD)),
            gate=0.4,
        ),
        *(
            Row(
                f"a3-{size >> 10}k",
                f"{size >> 10} KiB in place, {min(PLACE_BYTES // size, SLOTS) // 4} a call",
                "payloads/s",
                "more",
                partial(place_rate, size, True, seconds),
                partial(tight_place_rate, size, seconds),
                "tight C loop in place",
                peers(rate(size)),
                gate=0.7,
            )
            for size in (4 << 10, 64 << 10)
        ),
        Row(
            "a3-descriptors",
            "64 KiB payloads, not touched",
            "payloads/s",
            "more",
            partial(place_rate, 64 << 10, False, seconds),
            partial(place_rate, RECORD, False, seconds),
            "the same with 64 B payloads",
            gate=0.7,
        ),
        Row(
            "a4-c",
            "round trip, C ends, awake",
            "us, median",
            "less",
            partial(c_ring_trip, SPIN_NS, trips_c),
            partial(c_trip, "tight_ping", "tight_pong", trips_c),
            "tight C ring, spinning",
            gate=2.0,
        ),
        Row(
            "a4-c-asleep",
            "round trip, C ends, asleep",
            "us, median",
            "less",
            partial(c_ring_trip, 0, sleeps),
            partial(c_trip, "futex_ping", "futex_pong", sleeps),
            "bare futexes",
            gate=1.2,
        ),
        Row(
            "a4-python",
            "round trip, Python ends",
            "us, median",
            "less",
            partial(ring_trip, seconds),
            partial(c_trip, "tight_ping", "tight_pong", trips_c),
            "tight C ring, spinning",
            peers(trip()),
        ),
        Row(
            "a4-hog",
            "round trip, Python ends, a hog on one CPU",
            "us, mean",
            "less",
            partial(with_hog, partial(ring_trip, seconds, mean_us)),
            partial(ring_trip, seconds, mean_us),
            "the same without the hog",
            peers(lambda kind: with_hog(partial(channel_trip, kind, seconds, mean_us))),
            gate=4.0,
        ),
    ]
