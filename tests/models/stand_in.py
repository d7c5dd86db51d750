"""A hypervisor without processes: its own loop, frames, machine memory, tables and handlers, all real, in this process.

A domain of it has memory, a monitor and an address space that a test drives by hand (address_space.py), but nobody runs
in it: the test writes into its frames and makes its hypercalls. It ends by the same path as a real one.
"""

from __future__ import annotations

import os
import secrets
from array import array
from typing import Any

from hypervisor import dispatch, lifecycle
from hypervisor.core import Hypervisor
from hypervisor.domain import DOM0, Domain
from hypervisor.frames import NO_OWNER, FrameTable
from hypervisor.gate.monitor import Monitor
from hypervisor.loop import run_task
from hypervisor.machine import MachineMemory
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.hypercall import Hypercall, decode_message
from hypervisor.public.layout import KERNEL_PFN, virt
from hypervisor.public.types import PAGE_SIZE
from tests.models.address_space import ZERO, AddressSpace, BusyLoop

DOMAIN_FRAMES = KERNEL_PFN + 12
SCRATCH_PFN = KERNEL_PFN  # a page of each domain for what it hands over by address
SCRATCH = virt(SCRATCH_PFN)


class StandIn(Hypervisor):
    """Real but for __init__, which starts no zygote and probes nothing."""

    loop: BusyLoop

    def __init__(self, nr_frames: int = 512, nr_domains: int = 0) -> None:
        self.boot_ns = 0
        self._stopped = ""
        self.lines: list[str] = []
        self.own_uids = False
        self.make_tables()
        self.loop = BusyLoop()
        self.machine = MachineMemory(nr_frames, f"/ring1-test-{secrets.token_hex(8)}")
        self.frames = FrameTable(nr_frames)
        self.spaces: dict[int, AddressSpace] = {}
        self.monitors: list[Monitor] = []
        for domid in range(nr_domains):
            self.add(domid)

    def log(self, line: str) -> None:
        self.lines.append(line)

    def guest_log(self, domain: Domain, data: bytes) -> None:
        self.lines.append(f"{domain}: {data!r}")

    # ---- domains

    def add(self, domid: int, nr_frames: int = DOMAIN_FRAMES) -> Domain:
        """A running domain, its reservation mapped."""
        domain = Domain(domid, f"dom{domid}", CreateFlags.NONE)
        domain.p2m = array("I", self.frames.allocate(domid, nr_frames))
        domain.max_frames = nr_frames
        domain.fail = lambda why: lifecycle.end(self, domain, why)
        domain.monitor = Monitor(self.loop, domain.fail)
        self.monitors.append(domain.monitor)
        self.domains[domid], self.spaces[domid] = domain, AddressSpace(domain.monitor)
        domain.monitor.handed_over()
        domain.monitor.listen()
        run_task(lifecycle._map_reservation(self, domain), lambda *_: None)
        self.serve_all()
        domain.state = "running"
        return domain

    def kill(self, domid: int) -> None:
        """It is gone at once: process and monitor; `settle` buries it."""
        lifecycle.end(self, self.domains[domid], "killed")
        self.spaces[domid].die()

    def forget(self, domid: int) -> None:
        """dom0 destroys the record of a dead one; its number may be used again."""
        assert self.domains[domid].state == "dead"
        del self.domains[domid]

    # ---- what a guest does

    def ask(self, domain: Domain, request: Hypercall[Any]) -> list[Any]:
        """A hypercall, through its message: [value, error] once it ended. Raises what a call without steps raises."""
        op, _, arguments = decode_message(request.encode(1))
        return self.ask_raw(domain, op, arguments)

    def ask_raw(self, domain: Domain, op: int, arguments: list[Any]) -> list[Any]:
        outcome = dispatch.call(self, domain, op, arguments)
        out: list[Any] = []
        if hasattr(outcome, "send"):
            run_task(outcome, lambda value, error: out.extend((value, error)))
        else:
            out += [outcome, None]
        return out

    def done(self, domain: Domain, request: Hypercall[Any]) -> Any:
        """Its value, with every monitor answering where it waits. Raises what it raised."""
        out = self.ask(domain, request)
        if not out:
            self.serve_all()
        assert out, f"{request} did not end"
        if out[1] is not None:
            raise out[1]
        return out[0]

    def write(self, domain: Domain, data: bytes, va: int = SCRATCH) -> None:
        """The guest writes into its own memory."""
        for at in range(0, len(data), PAGE_SIZE):
            place = domain.translate(va + at)
            assert place is not None and (place[1] == 0 or len(data) <= PAGE_SIZE - place[1])
            self.machine.write(place[0], place[1], data[at : at + PAGE_SIZE])

    def read(self, domain: Domain, size: int, va: int = SCRATCH) -> bytes:
        place = domain.translate(va)
        assert place is not None and place[1] + size <= PAGE_SIZE
        return self.machine.read(place[0], place[1], size)

    # ---- time

    def settle(self) -> None:
        self.loop.settle(12)

    def serve_all(self) -> None:
        """Every monitor answers until nothing is under way."""
        self.settle()
        while asked := [space for space in self.spaces.values() if not space.dead and space.waiting()]:
            for space in asked:
                space.serve()
            self.settle()

    # ---- what must hold at any moment

    def check(self) -> None:
        """The frame table's own invariants, and: what any address space can touch is counted, and its owner still owns it."""
        self.frames.check()
        touched: dict[int, list[bool]] = {}
        for space in self.spaces.values():
            for mfn, writable in space.pages.values():
                if mfn != ZERO:
                    touched.setdefault(mfn, []).append(writable)
        for mfn, writable in touched.items():
            assert self.frames.owner[mfn] != NO_OWNER, f"mfn {mfn} is free, and mapped"
            assert self.frames.total[mfn] > len(writable), f"mfn {mfn} is mapped {len(writable)} times and not counted"
            assert self.frames.writable[mfn] >= sum(writable), f"mfn {mfn} is mapped writable and not counted"

    def quiet(self) -> None:
        """With nothing under way: every shadow is exact and no reference is left over."""
        self.check()
        held: dict[int, list[bool]] = {}
        for domain in self.domains.values():
            assert domain.monitor is not None
            for mfn, writable in domain.own_refs.values():
                held.setdefault(mfn, []).append(writable)
            for mapping in domain.maptrack.values():
                if not mapping.orphan:
                    held.setdefault(mapping.mfn, []).append(mapping.writable)
                    assert mapping in mapping.granter.active[mapping.ref]
            if domain.alive:
                pages = self.spaces[domain.domid].pages
                real = {va: mfn for va, (mfn, _) in pages.items() if mfn != ZERO}
                assert real == {va: mfn for va, (mfn, _) in domain.monitor.shadow.items()}, f"{domain}: shadow"
        for mfn in range(self.frames.nr_frames):
            if self.frames.owner[mfn] != NO_OWNER:
                mine = held.get(mfn, [])
                assert self.frames.total[mfn] == 1 + len(mine), f"mfn {mfn}: {self.frames.total[mfn] - 1 - len(mine)} too many"
                assert self.frames.writable[mfn] == sum(mine), f"mfn {mfn}: writable"

    def close(self) -> None:
        for space in self.spaces.values():
            space.die()
        for monitor in self.monitors:
            monitor.fail_all()
            if monitor.sock.fileno() >= 0:
                self.loop.unwatch(monitor.sock.fileno())
                monitor.sock.close()
        self.loop.close()
        os.close(self.machine.rw)
        os.close(self.machine.ro)


assert DOM0 == 0 and DOMAIN_FRAMES > SCRATCH_PFN
