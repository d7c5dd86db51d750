"""The guest of the benchmarks. cmdline: "what=NAME n=COUNT ..."; it prints one JSON object and ends."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from domain import memory
from domain.callring import CallRing, packed
from domain.sched import sleep_until
from hypervisor.public.evtchn import EvtchnSend
from hypervisor.public.version import Multicall, XenVersion

if TYPE_CHECKING:
    from domain.kernel import Kernel

BATCH = 128
NAP_NS, DOZE_NS = 7_000_000, 45_000_000
QUIET = 0.02  # seconds: who made this domain has nothing more to ask by then
clock = time.perf_counter_ns


def times(action: Callable[[], object], count: int) -> list[int]:
    """ns of each, the first tenth left out."""
    out = []
    for _ in range(count + count // 10):
        begin = clock()
        action()
        out.append(clock() - begin)
    return sorted(out[count // 10 :])


def told(ns: list[int], each: int = 1) -> dict[str, Any]:
    return {"p50": statistics.median(ns) / each, "p99": ns[int(len(ns) * 0.99)] / each, "mean": statistics.fmean(ns) / each}


async def call(kernel: Kernel, n: int) -> dict[str, Any]:
    """One hypercall by a message."""
    return told(times(lambda: kernel.hypercall(XenVersion()), n))


async def multicall(kernel: Kernel, n: int) -> dict[str, Any]:
    """A list of calls that a Python handler serves, ns each."""
    pages = kernel.memory.alloc(2)
    memory.write(pages.address, packed(XenVersion()) * BATCH)
    return told(times(lambda: kernel.hypercall(Multicall(pages.va, BATCH)), n), BATCH)


async def ring(kernel: Kernel, n: int) -> dict[str, Any]:
    """Event sends over the hypercall ring, to a port already pending, ns each."""
    calls = CallRing(kernel)
    entries = packed(EvtchnSend(kernel.evtchn.bind_ipi())) * BATCH
    return told(times(lambda: calls.run(entries), n), BATCH) | {"doorbells": calls.doorbells}


async def flood(kernel: Kernel, n: int) -> dict[str, Any]:
    """A neighbour that asks for ever: short calls, or with n > 1 lists of n."""
    pages = kernel.memory.alloc(8)
    memory.write(pages.address, packed(XenVersion()) * min(n, 512))
    while True:
        kernel.hypercall(Multicall(pages.va, n) if n > 1 else XenVersion())


async def ping(kernel: Kernel, n: int) -> dict[str, Any]:
    """Events there and back, both ends asleep in between; ns of one."""
    peer = int(await kernel.store.read("data/peer"))
    port = kernel.evtchn.alloc_unbound(peer)
    await kernel.store.write("data/port", port)
    await kernel.store.set_perms("data/port", [f"n{kernel.domid}", f"r{peer}"])
    await kernel.evtchn.wait(port)  # it is bound
    out = []
    for _ in range(n + n // 10):
        begin = clock()
        kernel.evtchn.send(port)
        await kernel.evtchn.wait(port)
        out.append(clock() - begin)
    return told(sorted(out[n // 10 :]), 2)


async def pong(kernel: Kernel, n: int) -> dict[str, Any]:
    """The other end of `ping`."""
    peer = int(await kernel.store.read("data/peer"))
    path = f"/local/domain/{peer}/data/port"
    watch = await kernel.store.watch(path)
    while not (said := await _port(kernel, path)):
        await watch.next()
    port = kernel.evtchn.bind_interdomain(peer, said)
    await kernel.evtchn.wait(port)  # every port is pending once when it is bound
    kernel.evtchn.send(port)
    while True:
        await kernel.evtchn.wait(port)
        kernel.evtchn.send(port)


async def _port(kernel: Kernel, path: str) -> int:
    try:
        return int(await kernel.store.get(path, "0"))
    except Exception:  # not readable for us yet
        return 0


async def load(kernel: Kernel, n: int) -> dict[str, Any]:
    """`n` events to a receiver that is awake most of the time: how many signals that took."""
    calls = CallRing(kernel)
    peer = int(await kernel.store.read("data/peer"))
    ports = [kernel.evtchn.alloc_unbound(peer) for _ in range(8)]
    await kernel.store.write("data/ports", " ".join(map(str, ports)))
    await kernel.store.set_perms("data/ports", [f"n{kernel.domid}", f"r{peer}"])
    await kernel.evtchn.wait(ports[-1])
    entries = b"".join(packed(EvtchnSend(port)) for port in ports)
    for _ in range(n // len(ports)):
        calls.run(entries)
    return {"sent": n // len(ports) * len(ports)}


async def worker(kernel: Kernel, n: int) -> dict[str, Any]:
    """The receiver of `load`: it works on each event for a little while."""
    peer = int(await kernel.store.read("data/peer"))
    path = f"/local/domain/{peer}/data/ports"
    watch = await kernel.store.watch(path)
    while True:
        try:
            names = (await kernel.store.get(path)).split()
        except Exception:  # not readable for us yet
            names = []
        if names:
            break
        await watch.next()
    ports = [kernel.evtchn.bind_interdomain(peer, int(name)) for name in names]

    async def work(port: int) -> None:
        while True:
            await kernel.evtchn.wait(port)
            sum(range(200))

    tasks = [kernel.spawn(work(port)) for port in ports]
    kernel.evtchn.send(ports[-1])
    for task in tasks:
        await task
    return {}


async def burn(kernel: Kernel, n: int) -> dict[str, Any]:
    """Never sleeps, never ends."""
    while True:
        pass


async def nap(kernel: Kernel, n: int, ns: int = NAP_NS) -> dict[str, Any]:
    """How late it runs after a timer that was due while it slept."""
    out = []
    for _ in range(n):
        due = kernel.now_ns() + ns
        await sleep_until(due)
        out.append(kernel.now_ns() - due)
    return told(sorted(out)) | {"early": sum(late < 0 for late in out)}


async def doze(kernel: Kernel, n: int) -> dict[str, Any]:
    """The same, asleep for so long that the scheduler takes it for idle."""
    return await nap(kernel, n, DOZE_NS)


async def read_clock(kernel: Kernel, n: int) -> dict[str, Any]:
    """System time from the record in shared_info, ns a read."""

    def some() -> None:
        for _ in range(BATCH):
            kernel.now_ns()

    return told(times(some, n), BATCH)


WHAT = {f.__name__: f for f in (call, multicall, ring, flood, ping, pong, load, worker, burn, nap, doze, read_clock)}


async def main(kernel: Kernel) -> int:
    options = dict(word.split("=", 1) for word in kernel.cmdline.split())
    await kernel.sleep(QUIET)
    print(json.dumps(await WHAT[options["what"]](kernel, int(options["n"]))))
    return 0
