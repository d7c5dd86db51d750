"""SharedRing between two processes (rows a1 to a6), against tight C between the same two, and against other ways.

a1 records of 64 bytes in batches; a2 one Python call a record; a3 payload of 4 and 64 KiB left in place, records saying
where; a4 round trips, with both ends in C, both in Python, asleep; a5 with a third process on one of the CPUs; a6 between
two event loops of asyncio.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from scripts.benchmarks.channels import Kind, Membridge, Pipe, Queue, absent
from scripts.benchmarks.harness import Absent, Measure, Row
from scripts.benchmarks.limits import RECORD, limit
from scripts.benchmarks.streams import (
    BATCH,
    bare_rate,
    channel_rate,
    payloads,
    place_rate,
    ring_rate,
    tight_place_rate,
    tight_rate,
)
from scripts.benchmarks.trips import (
    SPIN_NS,
    Summary,
    c_ring_trip,
    c_trip,
    channel_trip,
    mean_us,
    median_us,
    ring_trip,
    with_hog,
)
from scripts.benchmarks.trips_asyncio import async_ring_trip, loop_trip, stream_trip, threaded_ring_trip

SLICE_US = 4_000.0  # what a poller that yields loses, each time it does, to a process that wants its CPU
TRIP = "us, median"


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
    limit()  # built before anything is measured
    return [*copied(seconds), *in_place(seconds), *round_trips(seconds, quick), *hogged(seconds), *event_loops(seconds)]


def rate(record: int, seconds: float) -> Callable[[Kind], float]:
    return lambda kind: channel_rate(kind, record, 1, seconds)


def copied(seconds: float) -> list[Row]:
    return [
        Row(
            "a1",
            f"64 B records, {BATCH} a call",
            "records/s",
            "more",
            partial(ring_rate, BATCH, "batches", seconds),
            partial(tight_rate, seconds),
            "tight C ring, copies in and out",
            peers(rate(RECORD, seconds), **{f"os.pipe, {BATCH} a call": partial(channel_rate, Pipe, RECORD, BATCH, seconds)}),
            gate=0.4,
            peer_gates={"os.pipe": 10, "multiprocessing.Queue": 50, "membridge": 6},
        ),
        Row(
            "a1-into",
            f"64 B records, {BATCH} a call, into a buffer",
            "records/s",
            "more",
            partial(ring_rate, BATCH, "into", seconds),
            partial(tight_rate, seconds),
            "tight C ring, copies in and out",
            gate=0.4,
        ),
        Row(
            "a2",
            "64 B records, one a call",
            "records/s",
            "more",
            partial(ring_rate, 1, "singly", seconds),
            partial(bare_rate, seconds),
            "tight C ring, one cffi call a record",
            peers(rate(RECORD, seconds)),
            gate=0.4,
            peer_gates={"membridge": 0.5},
        ),
    ]


def in_place(seconds: float) -> list[Row]:
    return [
        *(
            Row(
                f"a3-{size >> 10}k",
                f"{size >> 10} KiB in place, {payloads(size) // 4} a call",
                "payloads/s",
                "more",
                partial(place_rate, size, payloads(size), True, seconds),
                partial(tight_place_rate, size, seconds),
                "tight C loop in place",
                peers(rate(size, seconds)),
                gate=0.7,
            )
            for size in (4 << 10, 64 << 10)
        ),
        Row(
            "a3-descriptors",
            "64 KiB payloads, not touched",
            "payloads/s",
            "more",
            partial(place_rate, 64 << 10, payloads(64 << 10), False, seconds),
            partial(place_rate, RECORD, payloads(64 << 10), False, seconds),
            "the same with 64 B payloads",
            gate=0.7,
        ),
    ]


def round_trips(seconds: float, quick: bool) -> list[Row]:
    many, sleeps = (2_000, 300) if quick else (10_000, 1_000)
    spinning = partial(c_trip, "tight_ping", "tight_pong", many)
    return [
        Row(
            "a4-c",
            "round trip, C ends, awake",
            TRIP,
            "less",
            partial(c_ring_trip, SPIN_NS, many),
            spinning,
            "tight C ring, spinning",
            gate=2.0,
        ),
        Row(
            "a4-c-asleep",
            "round trip, C ends, asleep",
            TRIP,
            "less",
            partial(c_ring_trip, 0, sleeps),
            partial(c_trip, "futex_ping", "futex_pong", sleeps),
            "bare futexes",
            gate=1.2,
        ),
        Row(
            "a4-python",
            "round trip, Python ends",
            TRIP,
            "less",
            partial(ring_trip, seconds),
            spinning,
            "tight C ring, spinning",
            peers(lambda kind: channel_trip(kind, seconds)),
            peer_gates={"membridge": 1.5},
        ),
    ]


def hogged(seconds: float) -> list[Row]:
    """Python ends, one of them on the CPU of a process that computes all the time."""

    def ours(summary: Summary) -> Measure:
        return partial(with_hog, partial(ring_trip, seconds, summary))

    def theirs(summary: Summary) -> Callable[[Kind], float]:
        return lambda kind: with_hog(partial(channel_trip, kind, seconds, summary))

    idle = "the same without the hog"
    return [
        Row(
            "a5-p50",
            "round trip beside a hog",
            TRIP,
            "less",
            ours(median_us),
            partial(ring_trip, seconds, median_us),
            idle,
            peers(theirs(median_us)),
            gate=3.0,
        ),
        Row(
            "a5-mean",
            "round trip beside a hog",
            "us, mean",
            "less",
            ours(mean_us),
            partial(ring_trip, seconds, mean_us),
            idle,
            peers(theirs(mean_us)),
            gate=4.0,
        ),
        Row(
            "a5-collapse",
            "round trip beside a hog",
            "us, mean",
            "less",
            ours(mean_us),
            lambda: SLICE_US,
            "a slice of the scheduler's, lost a trip",
            gate=0.1,
        ),
    ]


def event_loops(seconds: float) -> list[Row]:
    bare = "two bare event loops, an eventfd each"
    return [
        Row(
            "a6",
            "round trip, asyncio ends, awake",
            TRIP,
            "less",
            partial(async_ring_trip, seconds),
            partial(loop_trip, seconds),
            bare,
            {"get in a thread": partial(threaded_ring_trip, seconds), "asyncio streams": partial(stream_trip, seconds)},
            gate=0.5,
        ),
        Row(
            "a6-asleep",
            "round trip, asyncio ends, asleep",
            TRIP,
            "less",
            partial(async_ring_trip, seconds, asleep=True),
            partial(loop_trip, seconds),
            bare,
            {"get in a thread": partial(threaded_ring_trip, seconds, asleep=True)},
            gate=1.6,
        ),
    ]
