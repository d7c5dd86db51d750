"""Page tables (rows p1 to p10), against what the host kernel does for a process of its own, and C against Python.

p1 one entry that is live; p2 a batch of 512 that is not; p3, p4 mapping at once, frames that lie together and scattered ones;
p5 one page by fault, p6 with the fifteen around it; p7 one page revoked; p8 a fault that is the guest's own affair; p9 from one
address space to another; p10 512 live entries by stores that trap, one by one; p14 is what others notice (hostile.py). Guest,
monitor and hypervisor share one CPU.

p11 to p13: what the C kernels cost against the same rules in plain Python.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from scripts.benchmarks import hostile, validation
from scripts.benchmarks.harness import Measure, Meet, Row, compiled, cpus, pair, result, start
from scripts.benchmarks.host import host

HERE = Path(__file__).parent
GUEST = HERE / "paging_guest.py"
PAGES = 512
MEMORY = 8  # MiB
RUN, FAULT, UNMAP = "an mmap of one page of shared memory", "a minor fault on shared memory", "unmapping such a page"
TRIP = "a round trip over two pipes on the same CPU, in C"
TRAP = "such a store whose SIGSEGV handler makes the page writable"
PEERS = {
    "trip": TRIP, "fault": FAULT, "protect": "mprotect of one page", "one": "mmu_update of one (p1)",
    "many": "mmu_update of 512 that are not live (p2)", "eager": "mmu_update of 512 that are live (p4)",
}  # fmt: skip


@cache
def pages() -> tuple[Any, Any]:
    return compiled(HERE / "pages.c", [], HERE)


@cache
def shared() -> int:
    """A descriptor of shared memory whose pages are all there."""
    fd = os.memfd_create("ring1-bench", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * mmap.PAGESIZE)
    with mmap.mmap(fd, PAGES * mmap.PAGESIZE) as area:
        area.write(b"x" * len(area))
    return fd


def ours(what: str, count: int, scale: float = 1e3) -> float:
    """us of one, or with scale 1 ns."""
    one, _ = cpus()
    machine = host()
    os.sched_setaffinity(machine.pid, {one})
    guest = machine.guest(f"what={what} n={count}", one, GUEST, MEMORY)
    os.sched_setaffinity(machine.connection.ask("info", name=guest.name)["monitor_pid"], {one})
    machine.connection.ask("unpause", name=guest.name)
    ns: float = guest.said()["ns"]
    return ns / scale


def bare(name: str) -> float:
    """us of one operation of the host's, in C."""
    fd, (_, lib) = shared(), pages()
    ns: float = result(*start(lambda: getattr(lib, name)(fd, PAGES), cpus()[0]))
    return ns / 1e3


def trip(count: int) -> float:
    """us of a round trip over two pipes, both ends on our CPU."""
    there, back = os.pipe(), os.pipe()
    _, lib = pages()

    def server(meet: Meet) -> int:
        meet()
        return int(lib.pipe_pong(there[0], back[1], count))

    def client(meet: Meet) -> float:
        meet()
        return float(lib.pipe_ping(back[0], there[1], count))

    def forget() -> None:
        for fd in (*there, *back):
            os.close(fd)

    one, _ = cpus()
    return float(pair(server, client, where=(one, one), forget=forget)[1]) / 1e3


def rows(quick: bool) -> list[Row]:
    n = 1 if quick else 4
    fault, one_map, protect, unmap = (partial(bare, f"host_{name}") for name in ("fault", "map", "protect", "unmap"))
    trap = partial(bare, "host_trap")
    trips: Callable[[], float] = partial(trip, 2000)

    def row(
        id: str, what: str, ours: Measure, limit: Measure, limit_is: str, gate: float | None = None, **peers: Measure
    ) -> Row:
        return Row(id, what, "us", "less", ours, limit, limit_is, {PEERS[name]: peer for name, peer in peers.items()}, gate)

    def against_python(id: str, what: str, ours: Measure, python: Measure) -> Row:
        return Row(id, what, "ns", "less", ours, python, "the same rules in plain Python")

    batch = partial(ours, "batch", 60 * n, 1.0)
    return [
        row("p1", "mmu_update of one entry that is live", partial(ours, "update", 300 * n), one_map, RUN, trip=trips),
        Row(
            "p2", "an entry of a batch of 512 that is not live", "ns", "less", batch, lambda: 1e3 * fault(), FAULT, gate=2000,
            absolute=True,
        ),
        row("p3", "mapping a page at once, frames together", partial(ours, "eager", 60 * n), fault, FAULT, 0.1),
        row("p4", "mapping a page at once, frames scattered", partial(ours, "eager_scattered", 20 * n), fault, FAULT, 3),
        row("p5", "one page by fault", partial(ours, "fill", 200 * n), trips, TRIP, 10, fault=fault),
        row("p6", "a page by fault, sixteen at a time", partial(ours, "fill_around", 20 * n), trips, TRIP, 3, fault=fault),
        row("p7", "one page revoked", partial(ours, "revoke", 300 * n), unmap, UNMAP, protect=protect, trip=trips),
        row("p8", "a fault, the guest's handler, mmu_update, again", partial(ours, "bounce", 200 * n), trips, TRIP, 35),
        row("p9", "from one loaded address space to another", partial(ours, "switch", 300 * n), trips, TRIP),
        row(
            "p10", "one entry that is live, by a store that traps", partial(ours, "store", n), trap, TRAP,
            one=partial(ours, "update", 300 * n), many=partial(ours, "batch", 60 * n),
            eager=partial(ours, "eager_scattered", 20 * n),
        ),
        against_python("p11", "the C of a batch, an entry", validation.update_c, validation.update_python),
        against_python("p12", "the C of a pin, an entry", validation.validate_c, validation.validate_python),
        against_python("p13", "a walk through three levels in C", validation.walk_c, validation.walk_python),
        *hostile.rows(quick),
    ]  # fmt: skip
