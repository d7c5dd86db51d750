"""The hypervisor's side of the revocation hammer: while a kernel stores to a page in a loop, the frame behind it is taken away
by one of the hypervisor's own paths, and once that was acknowledged a canary is written into it. Where a store came late, the
canary is gone when the kernel has gone on: when it has stored elsewhere, or has faulted.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from hypervisor import mmu, space
from hypervisor.domain import Domain
from hypervisor.gate.monitor import PROT_READ, PROT_WRITE
from hypervisor.loop import Steps
from hypervisor.public.boot_tables import DATA, UPPER
from hypervisor.public.layout import GRANT_BASE, STORE_PFN
from hypervisor.public.mmu import entry
from hypervisor.public.types import PAGE_SHIFT

if TYPE_CHECKING:
    from tests.native.paging_machine import Machine

SEEN_SLOT = 16  # paging.h
CANARY = struct.pack("<Q", 0xCA9A27_0000_0001)  # odd: no store of the kernel's
WORD = struct.Struct("<Q")
WISHES = ("entry", "transfer", "upper", "window", "flush", "grant")

Path = Callable[[Domain], Steps]


class Hammer:
    """One job's; `late` counts stores that came after the acknowledgement, `rounds` the revocations."""

    def __init__(self, machine: Machine, domain: Domain, numbers: tuple[int, ...]) -> None:
        self.machine, self.hv, self.domain = machine, machine.hv, domain
        self.count, self.frame, *rest = numbers or (0, 0)
        self.other, self.l1, self.l2, self.root = rest or (0, 0, 0, 0)
        self.shared = domain.mfn_list[STORE_PFN]

    def run(self, how: str) -> Steps:
        take: Callable[[], Steps] = getattr(self, f"take_{how}")
        give: Callable[[], Steps] = getattr(self, f"give_{how}")
        late, cpus = 0, os.sched_getaffinity(0)
        self._place()
        for _ in range(self.count):
            self._write_canary()
            while not self._is_written() and self.domain.alive:
                yield self.hv.loop.turn
            yield from take()
            self._write_canary()
            yield from self._until_it_went_on()
            late += self._is_written()
            yield from give()
        os.sched_setaffinity(0, cpus)
        self.machine.seen.append(f"{self.count} rounds, {late} late")
        self.hv.machine.write(self.shared, 0, WORD.pack(1))

    def kill_monitor(self) -> Steps:
        """While the kernel stores and asks for nothing."""
        yield from self._until_it_went_on()
        assert self.domain.monitor_process is not None
        os.kill(self.domain.monitor_process.pid, signal.SIGKILL)

    def _place(self) -> None:
        """The kernel on a CPU, we and its monitor on another: it stores while we take, and an unmapping takes its time."""
        ours, *others = sorted(os.sched_getaffinity(0))
        for process, cpu in ((self.domain.process, (others or [ours])[0]), (self.domain.monitor_process, ours)):
            assert process is not None
            os.sched_setaffinity(process.pid, {cpu})
        os.sched_setaffinity(0, {ours})

    def _write_canary(self) -> None:
        self.hv.machine.write(self.frame, 0, CANARY)

    def _is_written(self) -> bool:
        return self.hv.machine.read(self.frame, 0, 8) != CANARY

    def _until_it_went_on(self) -> Steps:
        """Two stores more, or a fault more that its handler took."""
        before, bounces = self._progress(), self.domain.bounces
        while self._progress() < before + 2 and self.domain.bounces == bounces:
            yield self.hv.loop.turn
            if not self.domain.alive:
                return

    def _progress(self) -> int:
        return int(WORD.unpack(self.hv.machine.read(self.shared, 8, 8))[0])

    # ---- paths: how the frame is taken away, and given back

    def _show(self, mfn: int) -> Steps:
        job = self.domain.space.job
        job.requests[0] = (self.l1 << PAGE_SHIFT | SEEN_SLOT * 8, entry(mfn, DATA))
        job.count, job.next, job.domid = 1, 0, self.domain.domid
        refused = yield from mmu._run_job(self.hv, self.domain, job)
        assert refused is None

    def take_entry(self) -> Steps:
        """An L1 entry names another frame."""
        yield from self._show(self.other)

    def give_entry(self) -> Steps:
        yield from self._show(self.frame)

    def take_transfer(self) -> Steps:
        """And then the frame is another domain's."""
        yield from self._show(self.other)
        self.hv.frames.give(self.frame, self.machine.the_granter.domid)

    def give_transfer(self) -> Steps:
        self.hv.frames.give(self.frame, self.domain.domid)
        yield from self._show(self.frame)

    def take_upper(self) -> Steps:
        """The L2 entry above it goes, and with it the whole table."""
        yield from mmu._update_upper(self.hv, self.domain, self.l2, 0, 0, False)

    def give_upper(self) -> Steps:
        yield from mmu._update_upper(self.hv, self.domain, self.l2, 0, entry(self.l1, UPPER), False)

    def take_window(self) -> Steps:
        """Its root loses its window."""
        yield from space.evict(self.hv, self.domain, 1)

    def give_window(self) -> Steps:
        yield from space.load(self.hv, self.domain, self.root)

    def take_flush(self) -> Steps:
        """Everything is thrown out, and comes back by fault, while the entry changes."""
        yield from space.flush(self.hv, self.domain)
        yield from self._show(self.other)

    def give_flush(self) -> Steps:
        yield from space.flush(self.hv, self.domain)
        yield from self._show(self.frame)

    def take_grant(self) -> Steps:
        """As when its granter dies: zeros in its place."""
        assert self.domain.monitor is not None
        yield from self.domain.monitor.unmap([GRANT_BASE], zero=True)

    def give_grant(self) -> Steps:
        assert self.domain.monitor is not None
        yield from self.domain.monitor.map([(GRANT_BASE, self.frame, PROT_READ | PROT_WRITE)])
