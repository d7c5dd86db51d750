"""The CPU: time (rows t), exceptions (x) and the scheduler (s), against what the host's own kernel does.

t1 a read of system time, no call; t2 how late a timer is on an idle machine; t3 a program's clock_gettime; x1 an exception, its
handler, and back. The rows s have everything on one host CPU: s1 weights 3 to 1; s2 a cap of 30 percent; s3 ten equal domains,
and s4 what that costs; s5 how late a sleeper runs beside busy domains, with warp and without. A share is off by so many percent
of what it should be.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from dom0 import ramdisk
from scripts.benchmarks.guest import BATCH, DOZE_NS, NAP_NS
from scripts.benchmarks.harness import BUILD, ROOT, Row, compiled, cpus, hog, result, start
from scripts.benchmarks.host import Guest, host
from tests.native.build import build

NICE_WEIGHTS = 1024 / 335  # of nice 0 and nice 5, by the host kernel's table
MANY, BUSY, CAP = 10, 3, 30
BEGUN_NS = 30_000_000  # of CPU: it has imported what it needs, and burns
clock = time.perf_counter_ns


def spent(pid: int) -> int:
    """ns of CPU."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def off(used: Sequence[float], wanted: Sequence[float]) -> float:
    """By how many percent of what it should be the worst share is off; never quite 0, since it is divided by."""
    return max(0.01, *(100 * abs(one / sum(used) * sum(wanted) / share - 1) for one, share in zip(used, wanted, strict=True)))


# ---- domains


@contextmanager
def burning(params: Sequence[dict[str, int]]) -> Iterator[list[Guest]]:
    """Busy domains on our CPU, where the hypervisor is too, each with its share; all of them have begun."""
    one, _ = cpus()
    machine, guests = host(), list[Guest]()
    os.sched_setaffinity(machine.pid, {one})
    try:
        for changes in params:
            guests.append(machine.guest("what=burn n=1", one))
            machine.connection.ask("sched", name=guests[-1].name, changes=changes)
        for guest in guests:
            machine.connection.ask("unpause", name=guest.name)
        born = [spent(guest.pid) for guest in guests]
        while any(spent(guest.pid) - was < BEGUN_NS for guest, was in zip(guests, born, strict=True)):
            time.sleep(0.01)
        yield guests
    finally:
        for guest in guests:
            guest.end()


def window(pids: Sequence[int], seconds: float) -> tuple[list[float], float]:
    """What each ran in a while, and how long that was, in ns."""
    begin, before = clock(), [spent(pid) for pid in pids]
    time.sleep(seconds)
    return [float(spent(pid) - was) for pid, was in zip(pids, before, strict=True)], float(clock() - begin)


def shares(params: Sequence[dict[str, int]], seconds: float) -> float:
    with burning(params) as guests:
        used, _ = window([guest.pid for guest in guests], seconds)
    return off(used, [one.get("weight", 256) for one in params])


def capped(seconds: float) -> float:
    """Points that a domain alone is off its cap."""
    with burning([{"cap": CAP}]) as guests:
        (used,), elapsed = window([guests[0].pid], seconds)
    return max(0.01, abs(100 * used / elapsed - CAP))


class Many:
    """Equal domains: the worst share, and what the hypervisor took meanwhile, in percent of a CPU; measured together."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._taken = seconds, [0.0]

    def shares(self) -> float:
        with burning([{}] * MANY) as guests:
            (hypervisor, *used), elapsed = window([host().pid, *(guest.pid for guest in guests)], self._seconds)
        self._taken.append(100 * hypervisor / elapsed)
        return off(used, [1] * MANY)

    def overhead(self) -> float:
        if len(self._taken) < 2:
            self.shares()
        return self._taken.pop()


def late(count: int, warp_us: int) -> float:
    """us, of half of the wake-ups."""
    with burning([{}] * BUSY):
        machine = host()
        guest = machine.guest(f"what=doze n={count}", cpus()[0])
        machine.connection.ask("sched", name=guest.name, changes={"warp_us": warp_us})
        machine.connection.ask("unpause", name=guest.name)
        ns: float = guest.said()["p50"]
    return ns / 1e3


@cache
def exceptions() -> Path:
    """A native kernel that handles its own."""
    folder = BUILD / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return build("exceptions", folder)


def exception() -> float:
    """us."""
    guest = host().guest("case=bench", cpus()[0], exceptions())
    host().connection.ask("unpause", name=guest.name)
    return float(guest.said()["ns"]) / 1e3


def exception_of_the_host() -> float:
    here = Path(__file__).parent
    _, lib = compiled(here / "traps.c", [], here)
    return float(result(*start(lambda: lib.host_exception(100_000), cpus()[0]))) / 1e3


@cache
def clocks() -> tuple[Path, Path]:
    """A static program of Linux that reads clocks, and a root with it."""
    tree, root = BUILD / "clocks", BUILD / "clocks.cpio"
    tree.mkdir(parents=True, exist_ok=True)
    program = tree / "clocks"
    subprocess.run(["gcc", "-O2", "-static", str(ROOT / "tests/domain/posix/clocks.c"), "-o", str(program)], check=True)
    with root.open("wb") as out:
        ramdisk.build(out, tree)
    return program, root


def program_clock(count: int) -> float:
    """ns."""
    guest = host().guest(f"/clocks cost {count}", cpus()[0], clocks()[1], memory=8)
    host().connection.ask("unpause", name=guest.name)
    return float(guest.said()["ns"])


def program_clock_of_the_host(count: int) -> float:
    done = subprocess.run([clocks()[0], "cost", str(count)], capture_output=True, check=True)
    return float(json.loads(done.stdout)["ns"])


def alone(what: str, count: int, figure: str) -> float:
    """ns, of a domain that has a CPU to itself."""
    one, other = cpus()
    said: dict[str, Any] = host().run([f"what={what} n={count}"], [one], other)
    return float(said[figure])


# ---- the host's own


def processes(nice: Sequence[int], seconds: float) -> float:
    """The same of bare processes, by the host's scheduler."""
    one, _ = cpus()

    def burn(level: int) -> None:
        os.nice(level)
        while True:
            pass

    started = [start(partial(burn, level), one) for level in nice]
    try:
        time.sleep(0.05)
        used, _ = window([pid for pid, _ in started], seconds)
    finally:
        for pid, read in started:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            os.close(read)
    return off(used, [NICE_WEIGHTS if max(nice) and not level else 1.0 for level in nice])


def naps(count: int, ns: int, busy: int, figure: Callable[[list[int]], float]) -> float:
    """ns that a bare process is late after a sleep, beside busy ones or alone."""
    one, _ = cpus()

    def sleeper() -> list[int]:
        out = []
        for _ in range(count):
            due = time.monotonic_ns() + ns
            time.sleep(ns / 1e9)
            out.append(time.monotonic_ns() - due)
        return sorted(out)

    with ExitStack() as stack:
        for _ in range(busy):
            stack.enter_context(hog(one))
        return figure(result(*start(sleeper, one)))


def read_host(count: int) -> float:
    out = []
    for _ in range(count):
        begin = clock()
        for _ in range(BATCH):
            time.monotonic_ns()
        out.append((clock() - begin) / BATCH)
    return statistics.median(out)


def p99(ns: list[int]) -> float:
    return float(ns[int(len(ns) * 0.99)])


def rows(quick: bool) -> list[Row]:
    short, long, count = (1.0, 1.5, 16) if quick else (10.0, 20.0, 400)
    many, three = Many(long), [{"weight": 768}, {"weight": 256}]
    cfs, woken = "the host's scheduler", f"a woken domain beside {BUSY} busy ones"
    beside = f"a sleeper beside {BUSY} busy processes, by {cfs}"
    wake = partial(naps, count, DOZE_NS, BUSY, lambda ns: statistics.median(ns) / 1e3)
    return [
        Row("t1", "a read of system time", "ns", "less", partial(alone, "read_clock", 500, "p50"), partial(read_host, 500),
            "time.monotonic_ns()"),
        Row("t2", "p99 of how late a timer is, idle machine", "us", "less",
            lambda: max(1.0, alone("nap", 6 * count, "p99")) / 1e3,
            partial(naps, 6 * count, NAP_NS, 0, lambda ns: p99(ns) / 1e3),
            "a bare process's time.sleep", gate=2000, absolute=True),
        Row("t3", "a clock read by a program of Linux", "ns", "less", partial(program_clock, 1_000_000),
            partial(program_clock_of_the_host, 1_000_000), "the same program on the host"),
        Row("x1", "a breakpoint, the guest's handler, and back", "us", "less", exception, exception_of_the_host,
            "a SIGTRAP handler of a bare process"),
        Row("s1", "weights 3 to 1", "% off", "less", partial(shares, three, short), partial(processes, [0, 5], short / 2),
            f"nice 0 and 5, by {cfs}", gate=5, absolute=True),
        Row("s2", f"a cap of {CAP} %", "points off", "less", partial(capped, short), lambda: 1.0, "one point", gate=1,
            absolute=True),
        Row("s3", f"{MANY} equal domains", "% off", "less", many.shares,
            partial(processes, [0] * MANY, long / 2), f"{MANY} processes, by {cfs}", gate=5, absolute=True),
        Row("s4", f"the hypervisor beside {MANY} busy domains", "% of a CPU", "less", many.overhead, lambda: 2.0,
            "two percent", gate=2, absolute=True),
        Row("s5-warp", f"{woken}, warped", "us", "less", partial(late, count, 10_000), wake, beside),
        Row("s5-plain", f"{woken}, not warped", "us", "less", partial(late, count, 0), wake, beside),
    ]  # fmt: skip
