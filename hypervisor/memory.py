"""Memory reservation: what a domain owns and may own, and frames that leave it or come to it.

A frame that leaves is taken out of the p2m first, so that nothing new can refer to it, then unmapped; its references fall
when the monitor has acknowledged. If the domain ends meanwhile, its burial finds the frame in `leaving`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypervisor import guest_access
from hypervisor.dispatch import hypercall
from hypervisor.domain import NO_FRAME, Domain
from hypervisor.gate.monitor import PROT_READ, PROT_WRITE, MonitorError, MonitorGone
from hypervisor.loop import Steps
from hypervisor.public import memory as abi
from hypervisor.public.errors import NoMemory, TooBig
from hypervisor.public.layout import KERNEL_PFN, virt
from hypervisor.public.types import MAX_BATCH

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

OWN = 2  # references of a frame that nobody but its owner uses: its allocation and its owner's mapping


@hypercall(abi.CurrentReservation)
def current_reservation(hv: Hypervisor, caller: Domain, call: abi.CurrentReservation) -> int:
    return hv.frames.owned[hv.target(caller, call.domid).domid]


@hypercall(abi.MaximumReservation)
def maximum_reservation(hv: Hypervisor, caller: Domain, call: abi.MaximumReservation) -> int:
    return hv.target(caller, call.domid).max_frames


def pfns_at(hv: Hypervisor, caller: Domain, address: int, count: int) -> tuple[int, ...]:
    """The list, copied in once. Raises BadAddress, TooBig."""
    if count > MAX_BATCH:
        raise TooBig(f"{count} entries, at most {MAX_BATCH}")
    return struct.unpack(f"<{count}Q", guest_access.copy_in(hv, caller, address, 8 * count))


def take_out(hv: Hypervisor, caller: Domain, pfn: int) -> int | None:
    """Out of the p2m, if it may leave: the mfn, which is in `leaving` from here on; else None, and nothing changed."""
    if not KERNEL_PFN <= pfn < len(caller.p2m) or caller.p2m[pfn] == NO_FRAME:
        return None
    mfn = caller.p2m[pfn]
    if hv.frames.total[mfn] != OWN or virt(pfn) not in caller.own_refs or is_callring(caller, mfn):
        return None

    caller.p2m[pfn] = NO_FRAME
    caller.leaving[pfn] = mfn
    return mfn


def is_hole(domain: Domain, pfn: int) -> bool:
    """A frame may be put there: none is, none is coming, and the last one has been unmapped."""
    return (
        pfn < len(domain.p2m) and domain.p2m[pfn] == NO_FRAME and pfn not in domain.expected and pfn not in domain.leaving
    )


def is_callring(caller: Domain, mfn: int) -> bool:
    """The hypervisor reads and writes this frame for as long as the domain lives, and counts no reference for it."""
    return caller.callring is not None and caller.callring.mfn == mfn


def unmap_own(hv: Hypervisor, caller: Domain, pfns: list[int]) -> Steps:
    """Steps: unmap frames that were taken out; acknowledged, their mapping's references fall."""
    assert caller.monitor is not None
    try:
        yield from caller.monitor.unmap([virt(pfn) for pfn in pfns])
    except MonitorError as error:
        caller.fail(f"its monitor could not unmap: {error}")
        raise MonitorGone from None
    for pfn in pfns:
        hv.frames.put(*caller.own_refs.pop(virt(pfn)))


@hypercall(abi.DecreaseReservation)
def decrease_reservation(hv: Hypervisor, caller: Domain, call: abi.DecreaseReservation) -> Steps:
    pfns, mfns = list[int](), list[int]()
    for pfn in pfns_at(hv, caller, call.address, call.count):
        mfn = take_out(hv, caller, pfn)
        if mfn is None:
            break
        pfns.append(pfn)
        mfns.append(mfn)

    yield from unmap_own(hv, caller, pfns)
    for pfn, mfn in zip(pfns, mfns, strict=True):
        del caller.leaving[pfn]
        hv.machine.scrub(mfn)
        hv.frames.release(mfn)
    return len(mfns)


@hypercall(abi.PopulatePhysmap)
def populate_physmap(hv: Hypervisor, caller: Domain, call: abi.PopulatePhysmap) -> Steps:
    wanted = list[int]()
    for pfn in pfns_at(hv, caller, call.address, call.count):
        if not is_hole(caller, pfn) or pfn in wanted:
            break
        wanted.append(pfn)
    try:
        frames = hv.frames.allocate(caller.domid, len(wanted))
    except NoMemory:
        frames = hv.frames.allocate(caller.domid, hv.frames.nr_free)

    placed = list(zip(wanted, frames, strict=False))
    yield from put_in(hv, caller, placed)
    return len(placed)


def put_in(hv: Hypervisor, domain: Domain, placed: list[tuple[int, int]]) -> Steps:
    """Steps: frames that `domain` owns into holes of its p2m, mapped writable; cannot fail but with the domain."""
    assert domain.monitor is not None
    for pfn, mfn in placed:
        domain.p2m[pfn] = mfn
        hv.frames.get(mfn, True)
        domain.own_refs[virt(pfn)] = (mfn, True)
    try:
        yield from domain.monitor.map([(virt(pfn), mfn, PROT_READ | PROT_WRITE) for pfn, mfn in placed])
    except MonitorError as error:
        domain.fail(f"its monitor could not map: {error}")
        raise MonitorGone from None
