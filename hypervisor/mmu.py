"""Page-table hypercalls: updates, pins, base pointers. Rules in hypervisor/public/mmu.py, counts in frames.py.

Entries of L1 tables are C's, a batch at a time; a table above is changed here, since that may validate whole trees, in turns.
The order is the same for both: take the new references, store, let the host mappings follow, drop the old references.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hypervisor import budget, guest_access, space, user
from hypervisor._hv import ffi, lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.frames import NO_MFN
from hypervisor.gate.monitor import MonitorGone
from hypervisor.loop import Steps
from hypervisor.public import mmu as abi
from hypervisor.public.errors import Invalid, NoSuchDomain, NotImplementedCall, NotPermitted, TooBig, XenError
from hypervisor.public.layout import NR_WINDOWS, SPACE_BYTES
from hypervisor.public.mmu import EXT_OP, L2_SHIFT, L3_SHIFT, UPDATE, MmuextCommand, PageType, Pte, mfn_of
from hypervisor.public.types import MAX_BATCH, PAGE_SHIFT

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

SLOTS = abi.ENTRIES - 1
FEW_CHANGES = 32  # of host mappings in a step while others want something
AD = int(Pte.A | Pte.D)
PIN_LEVELS = {MmuextCommand.PIN_L1: PageType.L1, MmuextCommand.PIN_L2: PageType.L2, MmuextCommand.PIN_L3: PageType.L3}


def _tables_of(hv: Hypervisor, caller: Domain, domid: int) -> Domain:
    """SELF, or for dom0 a domain that it builds. Raises NoSuchDomain, NotPermitted, Invalid."""
    domain = hv.target(caller, domid)
    if domain is not caller and (domain.launched or domain.state != "paused"):
        raise NotPermitted(f"domain {domid} is not being built")
    return domain


@contextlib.contextmanager
def _end_of(domain: Domain, caller: Domain) -> Iterator[None]:
    """Of a domain that dom0 builds: an error of this call, so that the calls behind it in dom0's list still run."""
    try:
        yield
    except MonitorGone:
        if domain is caller:
            raise
        raise NoSuchDomain(f"domain {domain.domid} ended meanwhile") from None


def _tell_done(hv: Hypervisor, caller: Domain, address: int, done: int) -> None:
    if address:
        guest_access.copy_out(hv, caller, address, struct.pack("<I", done))


# ---- updates


@hypercall(abi.MmuUpdate)
def mmu_update(hv: Hypervisor, caller: Domain, call: abi.MmuUpdate) -> Steps:
    domain = _tables_of(hv, caller, call.domid)
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} requests, at most {MAX_BATCH}")
    raw = guest_access.copy_in(hv, caller, call.address, call.count * UPDATE.size)
    job = domain.space.job
    ffi.memmove(job.requests, raw, len(raw))
    job.count, job.next, job.domid = call.count, 0, domain.domid

    with _end_of(domain, caller):
        error = yield from _run_job(hv, domain, job)
    _tell_done(hv, caller, call.done, job.next)
    if error is not None:
        raise error
    return int(job.next)


def _run_job(hv: Hypervisor, domain: Domain, job: Any) -> Steps:
    """Steps: every request up to the first bad one, whose error is returned; all is acknowledged then."""
    error: XenError | None = None
    begin = time.monotonic_ns()
    while error is None:
        job.unsettled = domain.monitor is not None and space.busy(domain)
        job.room = FEW_CHANGES if hv.demand.others(domain) else lib.JOB_REQUESTS
        status = lib.mmu_update(hv.frames.mmu, job)
        if status == 0:
            break
        if status < 0:
            error = space.error_of(status)
        yield from _settle(hv, domain, job)
        if status == lib.JOB_UPPER:
            ptr, value = job.requests[job.next]
            try:
                yield from _update_upper(hv, domain, ptr >> PAGE_SHIFT, ptr >> 3 & SLOTS, value, bool(ptr & 2))
                job.next += 1
            except XenError as refused:
                error = refused
            begin = yield from _take_turns(hv, domain, 0 if hv.demand.others(domain) else begin)
    yield from _settle(hv, domain, job)
    return error


def _take_turns(hv: Hypervisor, domain: Domain, begin: int) -> Steps:
    """Steps: as budget.take_turns. Raises MonitorGone."""
    begin = yield from budget.take_turns(hv, domain, begin)
    if not domain.alive:
        raise MonitorGone
    return begin


def _settle(hv: Hypervisor, domain: Domain, job: Any) -> Steps:
    """Steps: the host mappings follow what the job has changed so far; then the old references fall."""
    if job.nr_changes:
        yield from space.follow(hv, domain, job.changes, job.nr_changes)
    elif job.nr_drops:
        yield from space.barrier(domain)
    lib.mmu_commit(hv.frames.mmu, job)


def _update_upper(hv: Hypervisor, domain: Domain, table: int, slot: int, value: int, keep_ad: bool) -> Steps:
    """Steps: one entry of a validated L2 or L3. Raises XenError, with nothing changed."""
    mmu, level = hv.frames.mmu, hv.frames.frame[table].type
    old = lib.mmu_entry(mmu, table, slot)
    if keep_ad:
        value = value & ~AD | old & AD
    status = lib.mmu_upper_entry(mmu, table, slot, value)
    if status:
        raise space.error_of(status)
    same = bool(old & value & Pte.PRESENT) and mfn_of(old) == mfn_of(value)
    if value & Pte.PRESENT and not same:
        yield from space.get_table(hv, domain, mfn_of(value), level - 1, table, slot)

    lib.mmu_store(mmu, table, slot, value)
    if level == PageType.L2 and value & Pte.PRESENT and not old & Pte.PRESENT:
        yield from space.show(hv, domain, mfn_of(value))
    if old & Pte.PRESENT:
        yield from space.zap_table(hv, domain, mfn_of(old), 1 << (L2_SHIFT if level == PageType.L2 else L3_SHIFT))
        if not same:
            yield from space.put_table(hv, domain, mfn_of(old), True)


@hypercall(abi.UpdateVaMapping)
def update_va_mapping(hv: Hypervisor, caller: Domain, call: abi.UpdateVaMapping) -> Steps:
    l1 = lib.mmu_l1(hv.frames.mmu, caller.space.root, call.va) if caller.space.root != NO_MFN else NO_MFN
    if l1 == NO_MFN or call.va >= SPACE_BYTES:
        raise Invalid(f"no L1 for {call.va:#x}")

    yield from update_entry(hv, caller, l1, call.va >> PAGE_SHIFT & SLOTS, call.value)


def update_entry(hv: Hypervisor, domain: Domain, table: int, slot: int, value: int) -> Steps:
    """Steps: one entry of a table, as mmu_update has it. Nothing else of the domain's runs. Raises XenError."""
    job = domain.space.job
    job.requests[0] = (table << PAGE_SHIFT | slot << 3, value)
    job.count, job.next, job.domid = 1, 0, domain.domid

    error = yield from _run_job(hv, domain, job)
    if error is not None:
        raise error


# ---- extended operations


@hypercall(abi.MmuextOp)
def mmuext_op(hv: Hypervisor, caller: Domain, call: abi.MmuextOp) -> Steps:
    domain = _tables_of(hv, caller, call.domid)
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} operations, at most {MAX_BATCH}")
    raw = guest_access.copy_in(hv, caller, call.address, call.count * EXT_OP.size)

    done, error, begin = 0, None, time.monotonic_ns()
    try:
        for command, first, second in EXT_OP.iter_unpack(raw):
            with _end_of(domain, caller):
                yield from _extended(hv, caller, domain, command, first, second)
                done += 1
                begin = yield from _take_turns(hv, domain, begin)
    except XenError as refused:
        error = refused
    _tell_done(hv, caller, call.done, done)
    if error is not None:
        raise error
    return done


def _extended(hv: Hypervisor, caller: Domain, domain: Domain, command: int, first: int, second: int) -> Steps:
    if command in PIN_LEVELS:
        yield from pin(hv, domain, _own(hv, domain, first), PIN_LEVELS[MmuextCommand(command)])
    elif command == MmuextCommand.UNPIN:
        yield from _unpin(hv, domain, _own(hv, domain, first))
    elif domain is not caller:
        raise NotPermitted("a base pointer, a flush or a page is its own domain's affair")
    elif command == MmuextCommand.NEW_BASEPTR:
        yield from space.load(hv, domain, _own(hv, domain, first))
    elif command == MmuextCommand.NEW_USER_BASEPTR:
        yield from user.create(hv, domain, _own(hv, domain, first), second)
    elif command == MmuextCommand.TLB_FLUSH:
        yield from space.flush(hv, domain)
    elif command == MmuextCommand.INVLPG:
        yield from space.invalidate(hv, domain, first)
    elif command in (MmuextCommand.CLEAR_PAGE, MmuextCommand.COPY_PAGE):
        source = _own(hv, domain, second) if command == MmuextCommand.COPY_PAGE else None
        _fill_page(hv, _own(hv, domain, first), source)
    else:
        raise NotImplementedCall(f"mmuext_op {command}")


def _own(hv: Hypervisor, domain: Domain, mfn: int) -> int:
    if not hv.frames.owned_by(mfn, domain.domid):
        raise Invalid(f"frame {mfn:#x} is not the domain's")
    return mfn


def pin(hv: Hypervisor, domain: Domain, mfn: int, level: int) -> Steps:
    """Steps: a table of that level from here on. Raises XenError."""
    if hv.frames.frame[mfn].pinned:
        raise Invalid(f"frame {mfn:#x} is pinned")
    yield from space.get_table(hv, domain, mfn, level)

    hv.frames.frame[mfn].pinned = 1


def _unpin(hv: Hypervisor, domain: Domain, mfn: int) -> Steps:
    frame = hv.frames.frame[mfn]
    if not frame.pinned:
        raise Invalid(f"frame {mfn:#x} is not pinned")

    frame.pinned = 0
    window = frame.window - 1
    if 0 < window < NR_WINDOWS and window != domain.space.current:
        yield from space.evict(hv, domain, window)
    yield from space.put_table(hv, domain, mfn, False)


def _fill_page(hv: Hypervisor, mfn: int, source: int | None) -> None:
    """Zeros, or a copy of a frame of the same domain, as if the guest did it through a writable mapping."""
    if not hv.frames.get(mfn, True):
        raise Invalid(f"frame {mfn:#x} is a table")

    if source is None:
        hv.machine.scrub(mfn)
    else:
        hv.machine.copy(mfn, source)
    hv.frames.put(mfn, True)
