"""The hypervisor: one thread, one loop, every table. The only module that names all the others.

It has what handlers ask of each other; what they do is in the modules of the calls, how they are called in hypercall.py.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any, NoReturn

from hypervisor import (
    callring,
    clock,
    console,
    dispatch,
    domctl,
    evtchn,
    fault,
    grant,
    hypercall,
    lifecycle,
    memory,
    mmu,
    sched,
    scheduler,
    segments,
    sysctl,
    traps,
    user,
    version,
)  # fmt: skip
from hypervisor._hv import ffi, lib
from hypervisor.budget import Demand, Gate
from hypervisor.callring import BusyRings
from hypervisor.domain import DOM0, Domain
from hypervisor.frames import FrameTable
from hypervisor.gate.monitor import sealed_code
from hypervisor.host import Host
from hypervisor.loop import Loop, Steps, run_task
from hypervisor.machine import M2P, MachineMemory
from hypervisor.processes import Children
from hypervisor.public.boot_tables import boot_tables
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Invalid, NoSuchDomain, NotPermitted
from hypervisor.public.layout import (
    FD_DESCRIPTORS,
    FD_REPLY,
    FD_REQUEST,
    FD_UPCALL,
    GRANT_ENTRIES,
    GRANT_PFN,
    KERNEL_PFN,
    KERNEL_WINDOW,
    SHARED_INFO,
    START_INFO_PFN,
    VIRT_BASE,
    virt,
)
from hypervisor.public.mmu import PageType
from hypervisor.public.start_info import SIF_INITDOMAIN, SIF_PRIVILEGED, StartInfo
from hypervisor.public.types import DOMID_FIRST_RESERVED, DOMID_SELF, PAGE_SIZE, VIRQ_CONSOLE
from hypervisor.scheduler import Scheduler
from hypervisor.zygote import Zygote

MODULES = [  # who serves calls
    callring, clock, console, dispatch, domctl, evtchn, grant, memory, mmu, sched, scheduler, segments, sysctl, traps, user,
    version,
]  # fmt: skip
DOM0_FRAMES = 2048
SLICE_NS = 100_000  # of the host's scheduler, for us: the shortest that it gives
UID_BASE = 900_000  # as root, domain N runs as uid UID_BASE + N


class Hypervisor:
    def __init__(self, host: Host, nr_frames: int) -> None:
        self.boot_ns = time.monotonic_ns()
        self._stopped = ""  # why the machine ends
        self._log = console.Log(self.boot_ns)
        self.host, self.instance, self.journal = host, host.instance, host.journal
        self.landlock, self.own_uids = host.landlock, host.own_uids
        self.isolation, self.layers = host.isolation, host.layers
        self.loop = Loop()
        self.loop.before_sleep = lambda: hypercall.look_at_rings(self)
        self.make_tables()
        self.clock = clock.Clock(self.loop, self.boot_ns)
        self.scheduler = Scheduler(self.loop, frozenset(os.sched_getaffinity(0)))
        self.children = Children(self.loop)
        name = f"/{self.instance}-machine"
        self.journal(f"shm {name}")
        self.machine = MachineMemory(nr_frames, name)
        self.isolation.append(f"machine memory: {nr_frames * PAGE_SIZE >> 20} MiB of {self.machine.kind}")
        self.m2p = M2P(nr_frames)
        self.frames = FrameTable(nr_frames, self.machine.base, self.m2p.pfn)
        self.code_fd = sealed_code()
        self.smaps_fd = os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
        self.descriptors, self._dom0_descriptors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.descriptors.setblocking(False)
        self.users = user.Zygote(self)
        self.zygote = Zygote(self.loop, self.children.adopt, self.log, self.panic)

    def make_tables(self) -> None:
        """Of calls and of domains, all empty."""
        self.table = dispatch.table(MODULES)
        self.known: tuple[dict[bytes, Any], dict[bytes, Any]] = {}, {}  # list entries decoded before; the second is dom0's
        self.demand, self.gate, self.busy_rings = Demand(), Gate(), BusyRings()
        self.domains: dict[int, Domain] = {}
        self.ends: Any = ffi.new("struct evt_end *[]", DOMID_FIRST_RESERVED)  # by domid, as the C kernels see domains
        self.gnts: Any = ffi.new("struct gnt_domain *[]", DOMID_FIRST_RESERVED)
        self.next_domid = 1

    # ---- dom0 and the run

    def boot_dom0(self, entry: str, cmdline: str) -> None:
        """dom0 is the hypervisor's to build: no builder stands above it."""
        dom0 = Domain(DOM0, "dom0", CreateFlags.DRIVER | CreateFlags.DEBUG)

        def built(_: Any, error: BaseException | None) -> None:
            if error is not None:
                self.panic(f"dom0 cannot start: {error}")
                return
            lifecycle.launch(self, dom0)

        run_task(self._build_dom0(dom0, entry, cmdline), built)

    def _build_dom0(self, dom0: Domain, entry: str, cmdline: str) -> Steps:
        """What dom0's builder does for all others."""
        yield from lifecycle.create(self, dom0, DOM0_FRAMES, entry, self._dom0_descriptors.fileno())
        mfns = dom0.mfn_list
        tables = boot_tables(KERNEL_PFN, DOM0_FRAMES)
        info = StartInfo(
            DOM0_FRAMES, SIF_PRIVILEGED | SIF_INITDOMAIN, 0, 0, 0, 0, 0, 0, cmdline, DOM0, "dom0", VIRT_BASE,
            KERNEL_WINDOW, SHARED_INFO, FD_REQUEST, FD_REPLY, FD_UPCALL, FD_DESCRIPTORS, self.boot_ns,
            virt(GRANT_PFN), GRANT_ENTRIES, entry, virt(tables.tables.start), len(tables.tables),
            virt(tables.mfn_list.start), DOM0_FRAMES,
        )  # fmt: skip
        self.machine.write(mfns[START_INFO_PFN], 0, info.pack())
        packed = tables.pack(mfns)
        for i in range(0, len(packed), PAGE_SIZE):
            self.machine.write(mfns[tables.mfn_list.start + i // PAGE_SIZE], 0, packed[i : i + PAGE_SIZE])
        root = mfns[tables.tables.start]
        yield from mmu.pin(self, dom0, root, PageType.L3)
        yield from lifecycle.start_with(self, dom0, root)

    def run(self) -> str:
        """Until dom0 shuts the machine down or dies; returns why."""
        self.host.drop_privileges()
        self.users.start()
        lib.short_slices(SLICE_NS)
        self.clock.serve(self.domains)
        while not self._stopped:
            self.loop.step()
        self.zygote.stopping = True
        for pid in self.children.live():
            try:
                os.kill(pid, signal.SIGKILL)  # unreaped children: their pids cannot be recycled
            except ProcessLookupError:
                pass
        while self.children.live():
            self.loop.step()
        return self._stopped

    def stop(self, why: str) -> None:
        """End everything in good order: dom0 asked for it."""
        self.log(f"shutting down: {why}")
        self._stopped = self._stopped or why

    def panic(self, why: str) -> None:
        """End everything: what the machine cannot do without is gone."""
        if not self._stopped:
            self.log(f"PANIC: {why}")
            self._stopped = f"panic: {why}"

    def start(self, steps: Steps) -> None:
        """Run a continuation of the hypervisor's own; it may not fail."""

        def done(_: Any, error: BaseException | None) -> None:
            if error is not None:
                self.bug(error)

        run_task(steps, done)

    def bug(self, error: BaseException) -> NoReturn:
        self.log(f"BUG: {type(error).__name__}: {error}")
        raise error

    # ---- what handlers ask

    def listen(self, domain: Domain) -> None:
        """Watch what it may say next, hypercalls and page faults, or stop watching, as its state asks."""
        hypercall.listen(self, domain)
        fault.listen(self, domain)
        user.listen(self, domain)

    def lookup(self, domid: int) -> Domain:
        """A living domain. Raises NoSuchDomain; a dead one's record is found too, as Xen finds a dying domain."""
        domain = self.domains.get(domid)
        if domain is None:
            raise NoSuchDomain(f"no domain {domid}")
        return domain

    def target(self, caller: Domain, domid: int) -> Domain:
        """SELF, or for dom0 anybody. Raises NoSuchDomain, NotPermitted, Invalid (a dead one)."""
        if domid in (DOMID_SELF, caller.domid):
            return caller
        if not caller.privileged:
            raise NotPermitted("another domain's")
        domain = self.lookup(domid)
        if not domain.alive:
            raise Invalid(f"domain {domid} is {domain.state}")
        return domain

    def hold(self, domain: Domain, mfn: int) -> None:
        """A frame of a domain's that we write from now on: it cannot become a table, nor leave. It is writable already."""
        held = self.frames.get(mfn, True)
        assert held, f"mfn {mfn} is a table"
        domain.held.append(mfn)

    def uid_of(self, domain: Domain) -> int:
        return UID_BASE + domain.domid if self.own_uids and not domain.privileged else -1

    def cpu_ns(self, domain: Domain) -> int:
        """CPU time of a domain's process and monitor so far, by their own clocks."""
        total = 0
        for process in (domain.process, domain.monitor_process, *user.processes(domain)):
            if process is None:
                continue
            try:
                total += process.cpu_ns if process.ended else time.clock_gettime_ns((~process.pid << 3) | 2)
            except OSError:
                pass
        total += domain.users_cpu_ns
        domain.cpu_ns = max(domain.cpu_ns, total)
        return domain.cpu_ns

    def log(self, line: str) -> None:
        self._log.add(line)
        dom0 = self.domains.get(DOM0)
        if dom0 is not None:
            evtchn.raise_virq(self, dom0, VIRQ_CONSOLE)

    def guest_log(self, domain: Domain, data: bytes) -> None:
        self._log.guest(domain, data)

    def log_text(self) -> str:
        return self._log.text()
