"""How many records, or payloads left in place, go through a second."""

from __future__ import annotations

import struct
import time

from ringlib import SharedRing
from scripts.benchmarks.channels import Kind, Ring, new_name, yielding
from scripts.benchmarks.harness import Meet, pair
from scripts.benchmarks.limits import ATTACH, RECORD, limit, memory

BATCH = 256
SLOTS = 512  # of the tight ring, as many as SharedRing has of 64 bytes in its 16 pages
PLACE = struct.Struct("<QQ")  # a record of what is left in place: offset, size
PLACE_BYTES = 8 << 20  # of payload, at most

# ---- copied: records a second from the first one sent to the last one taken


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


def ring_rate(batch: int, how: str, seconds: float) -> float:
    """As channel_rate, of SharedRing: its records are RECORD bytes whatever the batch."""
    return channel_rate(lambda size: Ring(RECORD, how), RECORD, batch, seconds)


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


def payloads(size: int) -> int:
    """How many of them one ring has; a quarter goes with a call."""
    return min(PLACE_BYTES // size, SLOTS)


def place_rate(size: int, count: int, touched: bool, seconds: float) -> float:
    """Payloads a second: the front writes one word a cache line in place, the back reads it, its answer gives it back."""
    ffi, lib = limit()
    name, batch_bytes = new_name(), count // 4 * PLACE.size

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
    count = payloads(size)
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
