"""SharedRing between two processes (rows a1 to a4), against tight C between the same two, and against other ways.

a1 records of 64 bytes in batches; a2 one Python call a record; a3 payload of 4 and 64 KiB left in place, records saying
where; a4 round trips, with both ends in C, both in Python, asleep, and with a third process on one of the CPUs.
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
                f"{size >> 10} KiB in place, {payloads(size) // 4} a call",
                "payloads/s",
                "more",
                partial(place_rate, size, payloads(size), True, seconds),
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
            partial(place_rate, 64 << 10, payloads(64 << 10), False, seconds),
            partial(place_rate, RECORD, payloads(64 << 10), False, seconds),
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
