"""What dom0 does to domains: create, build, launch, stop, destroy, ask."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING

from hypervisor import clock, grant, guest_access, lifecycle
from hypervisor._hv import lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import DOM0, Domain
from hypervisor.frames import NO_MFN
from hypervisor.gate.monitor import PROT_READ, PROT_WRITE, MonitorError, MonitorGone
from hypervisor.loop import Steps
from hypervisor.public import domctl as abi
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Busy, Exists, Invalid, NoMemory, NoSpace, NotPermitted, TooBig
from hypervisor.public.layout import KERNEL_PFN
from hypervisor.public.traps import PF_FETCH
from hypervisor.public.types import DOMID_FIRST_RESERVED, MAX_BATCH, PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
MAX_FRAMES = 48_000 * 64  # 48,000 host mappings of the longest run
REASON_BYTES = 100  # of a DomainInfo, which is one message; a guest chooses the words


@hypercall(abi.CreateDomain)
def create(hv: Hypervisor, caller: Domain, call: abi.CreateDomain) -> Steps:
    flags = CreateFlags(call.flags & 15)
    if call.flags != flags or call.nr_descriptors > 1 or not NAME.match(call.name):
        raise Invalid("flags, nr_descriptors or name")
    if bool(call.entry) != bool(flags & CreateFlags.DRIVER) or (call.entry and not call.entry.startswith("dom0.")):
        raise Invalid("an entry is for driver domains, and one of dom0's")
    if any(d.name == call.name and d.state != "dead" for d in hv.domains.values()):
        raise Exists(f"a domain named {call.name}")
    if not KERNEL_PFN < call.nr_frames <= MAX_FRAMES:
        raise NoMemory(f"{call.nr_frames} frames: at least {KERNEL_PFN + 1}, at most {MAX_FRAMES}")
    domid = _free_domid(hv)
    fd = _take_descriptor(hv) if call.nr_descriptors else -1

    domain = Domain(domid, call.name, flags)
    try:
        yield from lifecycle.create(hv, domain, call.nr_frames, call.entry, fd)
    finally:
        if fd >= 0:
            os.close(fd)
    return domid


def _free_domid(hv: Hypervisor) -> int:
    """The next number, as Xen counts; not one whose record still stands."""
    for _ in range(1, DOMID_FIRST_RESERVED):
        domid = hv.next_domid
        hv.next_domid = domid + 1 if domid + 1 < DOMID_FIRST_RESERVED else 1
        if domid not in hv.domains:
            return domid
    raise NoSpace("domids")


def _take_descriptor(hv: Hypervisor) -> int:
    """The one that dom0 sent just before this call."""
    try:
        _, fds, _, _ = socket.recv_fds(hv.descriptors, 64, 4)
    except BlockingIOError:
        fds = []
    for fd in fds[1:]:
        os.close(fd)
    if not fds:
        raise Invalid("no descriptor came before this call")
    return fds[0]


@hypercall(abi.DestroyDomain)
def destroy(hv: Hypervisor, caller: Domain, call: abi.DestroyDomain) -> Steps:
    domain = _other(hv, call.domid)
    lifecycle.end(hv, domain, "destroyed")
    yield domain.dead
    if hv.domains.get(domain.domid) is domain:
        del hv.domains[domain.domid]


def _other(hv: Hypervisor, domid: int) -> Domain:
    domain = hv.lookup(domid)
    if domain.domid == DOM0:
        raise Invalid("not dom0")
    return domain


@hypercall(abi.PauseDomain)
def pause(hv: Hypervisor, caller: Domain, call: abi.PauseDomain) -> None:
    domain = _other(hv, call.domid)
    if domain.state != "running" or domain.process is None:
        raise Invalid(f"domain {domain.domid} is {domain.state}")

    hv.scheduler.leave(domain)
    domain.signal(signal.SIGSTOP)
    domain.state, domain.paused_ns = "paused", time.monotonic_ns()


@hypercall(abi.UnpauseDomain)
def unpause(hv: Hypervisor, caller: Domain, call: abi.UnpauseDomain) -> None:
    domain = _other(hv, call.domid)
    if domain.state != "paused" or domain.process is None:
        raise Invalid(f"domain {domain.domid} is {domain.state}")
    if domain.active.get(grant.FOREIGN):
        raise Busy("its frames are still mapped by the builder")
    if domain.space.windows[0] == NO_MFN:
        raise Invalid("a domain without launch_info")

    if domain.launched:
        domain.offline_ns += time.monotonic_ns() - domain.paused_ns
        domain.state, domain.paused_ns = "running", 0
        domain.signal(signal.SIGCONT)
        hv.scheduler.enter(domain)
    else:
        lifecycle.launch(hv, domain)


@hypercall(abi.GetDomainInfo)
def get_info(hv: Hypervisor, caller: Domain, call: abi.GetDomainInfo) -> tuple[object, ...]:
    return info(hv, hv.lookup(call.domid))


@hypercall(abi.GetVcpuInfo)
def get_vcpu_info(hv: Hypervisor, caller: Domain, call: abi.GetVcpuInfo) -> tuple[object, ...]:
    domain = hv.lookup(call.domid)
    state, *times = clock.run_state(domain)
    scheduled, pinned = hv.scheduler.state_of(domain)
    return int(state), scheduled, domain.process.cpu() if domain.process else -1, pinned, *times


def info(hv: Hypervisor, d: Domain) -> abi.DomainInfo:
    """A snapshot."""
    return abi.DomainInfo(
        d.domid, d.name, d.state, _cut(d.reason), d.exit_code, d.process.pid if d.process else 0,
        d.monitor_process.pid if d.monitor_process else 0, hv.frames.owned[d.domid] if d.state != "dead" else 0, d.max_frames,
        len({m.mfn for group in d.active.values() for m in group}), hv.cpu_ns(d), d.hypercalls, d.evt.sent,
        d.evt.delivered, d.evt.elided, int(d.flags),
    )  # fmt: skip


def _cut(text: str) -> str:
    return text.encode()[:REASON_BYTES].decode(errors="ignore")


# ---- building


def _being_built(hv: Hypervisor, domid: int) -> Domain:
    domain = _other(hv, domid)
    if domain.launched or domain.state != "paused":
        raise NotPermitted(f"domain {domid} is not being built")
    return domain


@hypercall(abi.MapForeign)
def map_foreign(hv: Hypervisor, caller: Domain, call: abi.MapForeign) -> Steps:
    domain = _being_built(hv, call.domid)
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} frames, at most {MAX_BATCH}")
    if call.pfn + call.count > len(domain.mfn_list):
        raise Invalid(f"pfn {call.pfn}+{call.count}: the domain has {len(domain.mfn_list)}")
    addresses = [call.address + i * PAGE_SIZE for i in range(call.count)]
    if not all(grant.address_is_free(caller, va) for va in addresses):
        raise Invalid("the address is not free")
    mfns = domain.mfn_list[call.pfn : call.pfn + call.count]
    if any(hv.frames.is_table(mfn) for mfn in mfns):
        raise Invalid("one of them is a table")
    assert caller.monitor is not None

    pages = []
    for mfn, va in zip(mfns, addresses, strict=True):
        grant.hold(hv, domain, caller, grant.FOREIGN, mfn, va, writable=True)
        pages.append((va, mfn, PROT_READ | PROT_WRITE))
    try:
        yield from caller.monitor.map(pages)
    except MonitorError as error:
        caller.fail(f"its monitor could not map: {error}")
        raise MonitorGone from None


@hypercall(abi.UnmapForeign)
def unmap_foreign(hv: Hypervisor, caller: Domain, call: abi.UnmapForeign) -> Steps:
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} pages, at most {MAX_BATCH}")
    at = {m.va: m for m in caller.maptrack.values() if m.ref == grant.FOREIGN and not m.leaving}
    wanted = [at.get(call.address + i * PAGE_SIZE) for i in range(call.count)]
    if not all(wanted):
        raise Invalid("not a foreign mapping")

    mappings = [m for m in wanted if m is not None]
    for mapping in mappings:
        mapping.leaving = True
    yield from grant.release(hv, caller, mappings)


@hypercall(abi.LaunchInfo)
def launch_info(hv: Hypervisor, caller: Domain, call: abi.LaunchInfo) -> Steps:
    domain = _being_built(hv, call.domid)
    if domain.space.windows[0] != NO_MFN:
        raise Exists("launch_info was given already")
    if not lifecycle.may_start_with(hv, domain, call.root):
        raise Invalid("no pinned root of its own, or one with entries in the half of grants")
    if domain.flags & CreateFlags.NATIVE and not lib.mmu_allows(hv.frames.mmu, call.root, call.entry, PF_FETCH):
        raise Invalid("the entry is not in an executable page")

    domain.entry = call.entry
    yield from lifecycle.start_with(hv, domain, call.root)


@hypercall(abi.GetMemList)
def get_mem_list(hv: Hypervisor, caller: Domain, call: abi.GetMemList) -> int:
    domain = _being_built(hv, call.domid)
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} frames, at most {MAX_BATCH}")

    mfns = domain.mfn_list[call.first : call.first + call.count]
    guest_access.copy_out(hv, caller, call.address, struct.pack(f"<{len(mfns)}Q", *mfns))
    return len(mfns)


@hypercall(abi.SetMaxMem)
def set_max_mem(hv: Hypervisor, caller: Domain, call: abi.SetMaxMem) -> None:
    domain = hv.lookup(call.domid)
    if not domain.alive:
        raise Invalid(f"domain {call.domid} is {domain.state}")

    domain.max_frames = call.max_frames
