"""A hypervisor without processes: its own loop, frames, machine memory, tables and handlers, all real, in this process.

A domain of it has memory, page tables, a monitor and an address space that a test drives by hand (address_space.py), but
nobody runs in it: the test writes into its frames and makes its hypercalls. It ends by the same path as a real one.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from typing import Any

from hypervisor import dispatch, guest_access, lifecycle, mmu, space
from hypervisor.clock import Clock
from hypervisor.core import Hypervisor
from hypervisor.domain import DOM0, Domain
from hypervisor.frames import NO_OWNER, FrameTable
from hypervisor.gate.monitor import PROT_WRITE, Monitor
from hypervisor.loop import Steps, run_task
from hypervisor.machine import M2P, MachineMemory
from hypervisor.public.boot_tables import DATA, BootTables, boot_tables
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.hypercall import Hypercall, decode_message
from hypervisor.public.layout import KERNEL_PFN, NR_WINDOWS, SPACE_BYTES, virt
from hypervisor.public.mmu import PageType, UpdateVaMapping, entry
from hypervisor.public.types import PAGE_SIZE
from hypervisor.scheduler import Scheduler
from tests.models.address_space import ZERO, AddressSpace, BusyLoop

DATA_FRAMES = 12  # of each domain, from KERNEL_PFN on; behind them its frame list and its tables
DOMAIN_FRAMES = boot_tables(KERNEL_PFN + DATA_FRAMES, KERNEL_PFN + DATA_FRAMES).tables.stop
SCRATCH_PFN = KERNEL_PFN  # a page of each domain for what it hands over by address
SCRATCH = virt(SCRATCH_PFN)


def tables_of(nr_frames: int) -> BootTables:
    """The boot tables of a domain of `nr_frames`: at its end."""
    return boot_tables(nr_frames - boot_tables(0, nr_frames).tables.stop, nr_frames)


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
        self.clock = Clock(self.loop, self.boot_ns)
        self.scheduler = Scheduler(self.loop, frozenset({0}))
        self.machine = MachineMemory(nr_frames, f"/ring1-test-{secrets.token_hex(8)}")
        self.m2p = M2P(nr_frames)
        self.frames = FrameTable(nr_frames, self.machine.base, self.m2p.pfn)
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
        """A running domain, its reservation mapped from VIRT_BASE on; its tables are its last frames."""
        domain = Domain(domid, f"dom{domid}", CreateFlags.NONE)
        domain.mfn_list = self.frames.allocate(domid, nr_frames)
        for pfn, mfn in enumerate(domain.mfn_list):
            self.m2p.pfn[mfn] = pfn
        domain.max_frames = nr_frames
        domain.fail = lambda why: lifecycle.end(self, domain, why)
        domain.monitor = Monitor(self.loop, domain.fail)
        self.monitors.append(domain.monitor)
        peer, commands = domain.monitor.peer.fileno(), domain.monitor.command_fd
        self.domains[domid], self.spaces[domid] = domain, AddressSpace(peer, commands)
        domain.monitor.handed_over()
        domain.monitor.listen()
        ended: list[BaseException | None] = []
        run_task(self._build(domain), lambda _, error: ended.append(error))
        while not ended:  # by its own monitor alone: what the others were asked for stays asked for
            self.settle()
            if self.spaces[domid].waiting():
                self.spaces[domid].serve()
        assert ended == [None], ended
        domain.state = "running"
        return domain

    def _build(self, domain: Domain) -> Steps:
        """What a builder does for a domain."""
        yield from lifecycle._share(self, domain)
        tables = tables_of(len(domain.mfn_list))
        packed = tables.pack(domain.mfn_list)
        for i in range(0, len(packed), PAGE_SIZE):
            mfn = domain.mfn_list[tables.mfn_list.start + i // PAGE_SIZE]
            self.machine.write(mfn, 0, packed[i : i + PAGE_SIZE])
        root = domain.mfn_list[tables.tables.start]
        yield from mmu.pin(self, domain, root, PageType.L3)
        yield from lifecycle.start_with(self, domain, root)

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
        guest_access.copy_out(self, domain, va, data)

    def read(self, domain: Domain, size: int, va: int = SCRATCH) -> bytes:
        return guest_access.copy_in(self, domain, va, size)

    def show(self, domain: Domain, pfn: int, mfn: int, flags: int = DATA) -> None:
        """The guest maps a frame where its boot mapping has `pfn`, or finds that it may not."""
        self.done(domain, UpdateVaMapping(virt(pfn), entry(mfn, flags), 0))

    def hide(self, domain: Domain, *pfns: int) -> None:
        """The guest takes pages of its boot mapping out of its tables: their frames may leave."""
        for pfn in pfns:
            self.done(domain, UpdateVaMapping(virt(pfn), 0, 0))

    # ---- time

    def settle(self) -> None:
        self.loop.settle(12)

    def serve_all(self) -> None:
        """Every monitor answers until nothing is under way."""
        self.settle()
        while asked := [one for one in self.spaces.values() if not one.dead and one.waiting()]:
            for one in asked:
                one.serve()
            self.settle()

    # ---- what must hold at any moment

    def check(self, audit: bool = True) -> None:
        """What any address space can touch is counted, and its owner still owns it; and the frame table's own invariants,
        which take a look at every entry of every table (`audit`)."""
        if audit:
            self.frames.check()
        touched, written = Counter[int](), Counter[int]()
        for one in self.spaces.values():
            for mfn, writable in one.pages.values():
                touched[mfn] += 1
                written[mfn] += writable
        del touched[ZERO]
        for mfn, times in touched.items():
            frame = self.frames.frame[mfn]
            assert frame.owner != NO_OWNER, f"mfn {mfn} is free, and mapped"
            assert frame.total > times, f"mfn {mfn} is mapped {times} times and not counted"
            assert not written[mfn] or frame.type == PageType.WRITABLE, f"mfn {mfn} is no writable one, and mapped as that"
            assert not written[mfn] or frame.count >= written[mfn], f"mfn {mfn} is mapped writable and not counted"

    def quiet(self) -> None:
        """With nothing under way: what is mapped is what tables and shadow say, and no reference is left over."""
        self.check()
        uses = Counter[tuple[int, bool]]()
        for domain in self.domains.values():
            assert domain.monitor is not None
            if domain.alive:
                uses.update((mfn, True) for mfn in (*domain.held, *domain.gdt))
            for mapping in domain.maptrack.values():
                if not mapping.orphan:
                    uses[mapping.mfn, mapping.writable] += 1
                    assert mapping in mapping.granter.active[mapping.ref]
            if domain.alive:
                real = {va: page for va, page in self.spaces[domain.domid].pages.items() if page[0] != ZERO}
                by_hand = {va: (mfn, bool(prot & PROT_WRITE)) for va, (mfn, prot) in domain.monitor.shadow.items()}
                said = {at: page for at, page in space.dump(self, domain).items() if at < NR_WINDOWS * SPACE_BYTES}
                assert real == said | by_hand, f"{domain}: tables and shadow"
        self.frames.check(uses)

    def close(self) -> None:
        for one in self.spaces.values():
            one.die()
        for monitor in self.monitors:
            monitor.fail_all()
            if monitor.sock.fileno() >= 0:
                self.loop.unwatch(monitor.sock.fileno())
                monitor.sock.close()
        self.loop.close()
        os.close(self.machine.rw)
        os.close(self.machine.ro)
        os.close(self.m2p.ro)


assert DOM0 == 0 and DOMAIN_FRAMES > SCRATCH_PFN
