"""Round trips of one record, in microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from ringlib import SharedRing
from ringlib._ring import ffi as ring_ffi
from scripts.benchmarks.channels import Kind, new_name
from scripts.benchmarks.harness import Measure, Meet, cpus, hog, pair
from scripts.benchmarks.limits import ATTACH, RECORD, limit, memory

SPIN_NS = 20_000


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
        return ffi.cast("void *", int(ring_ffi.cast("uintptr_t", ring._state)))

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
