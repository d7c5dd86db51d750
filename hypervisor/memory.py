"""Memory reservation: what a domain owns and may own, and frames that leave it or come to it.

A frame leaves when nobody uses it but its allocation: the guest takes it out of its tables first, so nothing here waits for
a monitor. It is scrubbed before anybody else can have it.
"""

from __future__ import annotations

import struct
import time
from array import array
from typing import TYPE_CHECKING

from hypervisor import budget, guest_access
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.loop import Steps
from hypervisor.public import memory as abi
from hypervisor.public.errors import Invalid, NoMemory, TooBig
from hypervisor.public.layout import M2P
from hypervisor.public.types import INVALID_PFN, MAX_BATCH

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

CALL_FRAMES = 1024  # handed out in one call


@hypercall(abi.CurrentReservation)
def current_reservation(hv: Hypervisor, caller: Domain, call: abi.CurrentReservation) -> int:
    return hv.frames.owned[hv.target(caller, call.domid).domid]


@hypercall(abi.MaximumReservation)
def maximum_reservation(hv: Hypervisor, caller: Domain, call: abi.MaximumReservation) -> int:
    return hv.target(caller, call.domid).max_frames


@hypercall(abi.MachphysMappingCall)
def machphys_mapping(hv: Hypervisor, caller: Domain, call: abi.MachphysMappingCall) -> tuple[int, int, int]:
    return M2P, M2P + 8 * hv.frames.nr_frames, hv.frames.nr_frames - 1


# ---- what may leave


def may_leave(hv: Hypervisor, domain: Domain, mfn: int) -> bool:
    """It is the domain's, and nobody uses it."""
    return hv.frames.owned_by(mfn, domain.domid) and hv.frames.is_idle(mfn)


def discard(hv: Hypervisor, mfn: int) -> None:
    """Scrub it, and back to the free list."""
    hv.machine.scrub(mfn)
    hv.m2p.pfn[mfn] = INVALID_PFN
    hv.frames.release(mfn)


def _extents(hv: Hypervisor, caller: Domain, address: int, count: int, order: int) -> list[int]:
    """The list, copied in once. Raises BadAddress, TooBig, Invalid."""
    if count > MAX_BATCH:
        raise TooBig(f"{count} extents, at most {MAX_BATCH}")
    if order > abi.MAX_ORDER:
        raise Invalid(f"extents of order {order}, at most {abi.MAX_ORDER}")
    return list(struct.unpack(f"<{count}Q", guest_access.copy_in(hv, caller, address, 8 * count)))


def _leaving(hv: Hypervisor, caller: Domain, first: int, order: int) -> range | None:
    """The frames of an extent, if all of them may leave."""
    extent = range(first, first + (1 << order))
    return extent if first % len(extent) == 0 and all(may_leave(hv, caller, mfn) for mfn in extent) else None


@hypercall(abi.DecreaseReservation)
def decrease_reservation(hv: Hypervisor, caller: Domain, call: abi.DecreaseReservation) -> Steps:
    done, begin = 0, time.monotonic_ns()
    for first in _extents(hv, caller, call.address, call.count, call.order):
        extent = _leaving(hv, caller, first, call.order)
        if extent is None:
            break
        for mfn in extent:
            discard(hv, mfn)
        done += 1
        begin = yield from budget.take_turns(hv, caller, begin)
        if not caller.alive:
            break
    return done


# ---- what comes


def _allocate(hv: Hypervisor, domain: Domain, count: int, order: int) -> list[int]:
    """The first frames of at most `count` extents: what the maximum and the machine allow. Zeroed since they were freed."""
    count = min(count, max(1, CALL_FRAMES >> order), max(0, domain.max_frames - hv.frames.owned[domain.domid]) >> order)
    if order == 0:
        return hv.frames.allocate(domain.domid, min(count, hv.frames.nr_free))
    got = list[int]()
    try:
        for _ in range(count):
            got.append(hv.frames.allocate_extent(domain.domid, order)[0])
    except NoMemory:
        pass
    return got


def _give_back(hv: Hypervisor, got: list[int], order: int) -> None:
    """Extents that were allocated a moment ago, and that nobody has been told of."""
    for first in got:
        for mfn in range(first, first + (1 << order)):
            hv.frames.release(mfn)


def _name(hv: Hypervisor, first: int, order: int, pfn: int) -> None:
    """Tell the M2P which pfns an extent's frames are; whoever says INVALID_PFN names none."""
    for i in range(1 << order):
        hv.m2p.pfn[first + i] = INVALID_PFN if pfn == INVALID_PFN else (pfn + i) & INVALID_PFN


@hypercall(abi.IncreaseReservation)
def increase_reservation(hv: Hypervisor, caller: Domain, call: abi.IncreaseReservation) -> int:
    nr = len(_extents(hv, caller, call.address, call.count, call.order))
    return _come(hv, caller, call.address, call.order, [INVALID_PFN] * nr)


@hypercall(abi.PopulatePhysmap)
def populate_physmap(hv: Hypervisor, caller: Domain, call: abi.PopulatePhysmap) -> int:
    return _come(hv, caller, call.address, call.order, _extents(hv, caller, call.address, call.count, call.order))


def _come(hv: Hypervisor, caller: Domain, address: int, order: int, pfns: list[int]) -> int:
    got = _allocate(hv, caller, len(pfns), order)
    try:
        guest_access.copy_out(hv, caller, address, array("Q", got).tobytes())
    except Exception:
        _give_back(hv, got, order)
        raise
    for first, pfn in zip(got, pfns, strict=False):
        _name(hv, first, order, pfn)
    return len(got)


@hypercall(abi.Exchange)
def exchange(hv: Hypervisor, caller: Domain, call: abi.Exchange) -> int:
    gone = _extents(hv, caller, call.in_address, call.in_count, call.in_order)
    pfns = _extents(hv, caller, call.out_address, call.out_count, call.out_order)
    size = call.in_count << call.in_order
    if size != call.out_count << call.out_order:
        raise Invalid("the two sides are not of one size")
    if size > abi.MAX_EXCHANGE:
        raise TooBig(f"{size} frames, at most {abi.MAX_EXCHANGE}")
    extents = [_leaving(hv, caller, first, call.in_order) for first in gone]
    leaving = {mfn for extent in extents if extent is not None for mfn in extent}
    if len(leaving) != size:
        raise Invalid("an extent that cannot leave, or one named twice")
    got = list[int]()
    try:
        if call.out_order == 0:
            got = hv.frames.allocate(caller.domid, call.out_count)
        while len(got) < call.out_count:
            got.append(hv.frames.allocate_extent(caller.domid, call.out_order)[0])
        guest_access.copy_out(hv, caller, call.out_address, array("Q", got).tobytes())
    except Exception:
        _give_back(hv, got, call.out_order)
        raise

    for mfn in leaving:
        discard(hv, mfn)
    for first, pfn in zip(got, pfns, strict=True):
        _name(hv, first, call.out_order, pfn)
    return len(gone)
