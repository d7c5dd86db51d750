"""Events (rows b and b3), against a bare signal between two Python processes at the same placement, plus one hypercall.

b an event to a receiver that sleeps: there and back over two channels, halved; b3 the share of sends that cost no signal
while the receiver is awake.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from functools import partial

from scripts.benchmarks.harness import Meet, Row, cpus, pair
from scripts.benchmarks.host import host

SIGNAL = signal.SIGUSR2
clock = time.perf_counter_ns


def event(count: int, where: tuple[int, int], hypervisor: int) -> float:
    """us of one event, both ends asleep before it."""
    value: float = host().run([f"what=ping n={count}", "what=pong n=1"], list(where), hypervisor)["p50"]
    return value / 1e3


def bare(count: int, where: tuple[int, int], hypervisor: int) -> float:
    """us of one kill + sigwaitinfo between two Python processes, and of one hypercall."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
    there = os.pipe(), os.pipe()

    def meet_pid(mine: int) -> int:
        os.write(there[1 - mine][1], str(os.getpid()).ljust(16).encode())
        return int(os.read(there[mine][0], 16))

    def server(meet: Meet) -> None:
        meet()
        peer = meet_pid(0)
        for _ in range(count):
            signal.sigwaitinfo({SIGNAL})
            os.kill(peer, SIGNAL)

    def client(meet: Meet) -> list[int]:
        meet()
        peer, out = meet_pid(1), []
        for _ in range(count):
            begin = clock()
            os.kill(peer, SIGNAL)
            signal.sigwaitinfo({SIGNAL})
            out.append(clock() - begin)
        return out[count // 10 :]

    def forget() -> None:
        for ends in there:
            os.close(ends[0])
            os.close(ends[1])

    _, ns = pair(server, client, where=where, forget=forget)
    call: float = host().run([f"what=call n={count}"], [where[0]], hypervisor)["p50"]
    return statistics.median(ns) / 2e3 + call / 1e3


def elided(count: int) -> float:
    """Percent of the sends to a receiver at work that needed no signal."""
    one, other = cpus()
    result = host().run([f"what=load n={count}", "what=worker n=1"], [one, one], other)
    receiver = result["others"][0]
    return 100 - 100.0 * int(receiver["events_delivered"]) / int(result["sent"])


def rows(quick: bool) -> list[Row]:
    one, other = cpus()
    count, storm = (600, 200_000) if quick else (3000, 1_000_000)
    out = []
    for name, where, hypervisor in (("same", (one, one), one), ("split", (one, other), other)):
        ours, limit = partial(event, count, where, hypervisor), partial(bare, count, where, hypervisor)
        what = "kill + sigwaitinfo between two Python processes at the same placement, plus one hypercall"
        out.append(Row(f"b-{name}", f"an event to a sleeping domain, {name}", "us", "less", ours, limit, what, gate=1.25))
    text = "sends that need no signal, to a receiver at work"
    out.append(Row("b3", text, "%", "more", partial(elided, storm), lambda: 100.0, "all of them", gate=95, absolute=True))
    return out
