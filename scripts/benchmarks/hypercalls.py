"""Hypercalls (rows c1 to c3), against a bare echo over POSIX queues with msgpack at the same placement; and fairness (R12).

c1 one call by a message; c2 a list of 128 calls, each through its Python handler; c3 128 event sends over the hypercall ring,
to a port that is pending already; R12 a domain's calls while two neighbours flood, one with short calls, one with lists of 256.
"""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack
import posix_ipc

from domain.callring import packed
from hypervisor._hv import ffi, lib
from hypervisor.public.callring import ANSWER_BYTES, ENTRY_BYTES
from hypervisor.public.evtchn import EvtchnSend, State
from ringlib.ring import FrontRing
from scripts.benchmarks.harness import Meet, Row, cpus, hog, pair
from scripts.benchmarks.host import host

BATCH = 128
OPERATIONS = [lambda domain, a, b: a + b] * 64
LIST = [(i & 63, 7, i, 3) for i in range(BATCH)]
clock = time.perf_counter_ns


def ours(what: str, count: int, mine: int, hypervisor: int) -> float:
    """us of a call, or ns of one of a list."""
    value: float = host().run([f"what={what} n={count}"], [mine], hypervisor)["p50"]
    return value / 1e3 if what == "call" else value


def echo(request: Any, serve: Callable[[Any], Any], count: int, where: tuple[int, int]) -> float:
    """ns of a bare round trip: posix_ipc and msgpack, and nothing else, in two Python processes."""
    names = [f"/ring1-bench-{secrets.token_hex(8)}" for _ in range(2)]
    pack, unpack = msgpack.packb, msgpack.unpackb
    queues = [posix_ipc.MessageQueue(name, posix_ipc.O_CREX, 0o600, 2, 8192) for name in names]
    for name in names:
        posix_ipc.unlink_message_queue(name)
    ask, answer = queues

    def server(meet: Meet) -> None:
        meet()
        for _ in range(count):
            message, _ = ask.receive()
            answer.send(pack(serve(unpack(message))))

    def client(meet: Meet) -> list[int]:
        meet()
        out = []
        for _ in range(count):
            begin = clock()
            ask.send(pack(request))
            unpack(answer.receive()[0])
            out.append(clock() - begin)
        return out[count // 10 :]

    def forget() -> None:
        for queue in queues:
            queue.close()

    return statistics.median(pair(server, client, where=where, forget=forget)[1])


def bare_call(count: int, where: tuple[int, int]) -> float:
    return echo([17, 1, 0], lambda request: [request[1], 0, 1], count, where) / 1e3


def bare_list(count: int, where: tuple[int, int]) -> float:
    def serve(operations: list[tuple[int, ...]]) -> list[int]:
        table = OPERATIONS
        return [table[o](d, a, b) for o, d, a, b in operations]

    return echo(LIST, serve, count, where) / BATCH


def kernel_alone(count: int) -> float:
    """ns an entry: the ring's C on both ends in one process, nobody else involved."""
    page = ffi.new("char[]", 2 * 4096)
    start = int(ffi.cast("uintptr_t", page))
    start += -start % 4096
    front = FrontRing(start, 4096, ENTRY_BYTES, ANSWER_BYTES)
    ring, end, ends = ffi.new("struct callring *"), ffi.new("struct evt_end *"), ffi.new("struct evt_end *[]", 2)
    shared = ffi.new("uint64_t[]", 512)
    end.shared_info, ends[1] = shared, end
    shared[0] = 1 << 8  # upcalls masked: nobody is there to be signalled
    end.ports[1].state = int(State.IPI)
    lib.callring_attach(ring, ffi.cast("void *", start))
    entries = packed(EvtchnSend(1)) * front.nr_ents
    out = []
    for _ in range(count):
        begin = clock()
        front.publish(entries)
        lib.callring_run(ring, ends, 1, 0, 2)
        front.take()
        out.append((clock() - begin) / front.nr_ents)
    return statistics.median(out)


# ---- fairness


def attacked(count: int, what: str) -> float:
    """The victim's calls a second, or its p99 in us, with two flooders on the other CPU."""
    _, other = cpus()
    machine = host()
    flooders = [machine.guest(f"what=flood n={n}", other) for n in (1, 256)]
    for flooder in flooders:
        machine.connection.ask("unpause", name=flooder.name)
    try:
        return victim(count, what)
    finally:
        for flooder in flooders:
            flooder.end()


def undisturbed(count: int, what: str) -> float:
    """The same without them, and the other CPU as busy as they would keep it."""
    with hog(cpus()[1]):
        return victim(count, what)


def victim(count: int, what: str) -> float:
    mine, _ = cpus()
    result = host().run([f"what=call n={count}"], [mine], mine)
    return 1e9 / result["mean"] if what == "rate" else result["p99"] / 1e3


def rows(quick: bool) -> list[Row]:
    one, other = cpus()
    few, many = (60, 1500) if quick else (200, 6000)
    split, same = (one, other), (one, one)
    bare = "a bare posix_ipc + msgpack echo at the same placement"
    out = [
        Row(
            f"c1-{name}", f"one hypercall, {name}", "us", "less",
            partial(ours, "call", many, where[0], where[1]), partial(bare_call, many, where), bare, gate=gate,
        )
        for name, where, gate in (("same", same, 1.7), ("split", split, 1.45))
    ]  # fmt: skip
    out += [
        Row(
            f"c2-{name}", f"an entry of a multicall of {BATCH}, {name}", "ns", "less",
            partial(ours, "multicall", few, where[0], where[1]), partial(bare_list, few, where), f"{bare}, {BATCH} a message",
            gate=1.3,
        )
        for name, where in (("same", same), ("split", split))
    ]  # fmt: skip
    alone = partial(kernel_alone, 2000)
    limit = "the same C in one process, with nobody to wait for"
    split_ring, same_ring = partial(ours, "ring", 10 * few, one, other), partial(ours, "ring", few, one, one)
    text = f"an entry of the hypercall ring, {BATCH} a batch"
    out.append(Row("c3", f"{text}, split", "ns", "less", split_ring, alone, limit, gate=60, absolute=True))
    out.append(Row("c3-same", f"{text}, same", "ns", "less", same_ring, alone, limit))
    quiet = "the same without flooders, the other CPU kept busy"
    for what, unit, better, gate in (("rate", "calls/s", "more", 0.8), ("p99", "us", "less", 3.0)):
        text = f"{what} of a domain's calls beside two flooders"
        ours_, limit_ = partial(attacked, 2 * many, what), partial(undisturbed, 2 * many, what)
        out.append(Row(f"R12-{what}", text, unit, better, ours_, limit_, quiet, gate=gate))
    return out if len(os.sched_getaffinity(0)) > 1 else out[:1]
