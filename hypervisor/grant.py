"""Grant tables: who maps whose frame. Rules in hypervisor/public/grant.py.

Every mapping, a foreign one of the builder's too, is a GrantMapping that stands in the grantee's maptrack and in the
granter's `active` BEFORE the monitor is asked, with its references taken: whoever dies meanwhile finds it there. Counts
fall only after the grantee's monitor acknowledged the unmapping, or after the grantee's address space is gone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypervisor import guest_access, memory
from hypervisor._hv import ffi, lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.gate.monitor import PROT_READ, PROT_WRITE, MonitorError, MonitorGone
from hypervisor.loop import Steps
from hypervisor.public import grant as abi
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Invalid, TooBig
from hypervisor.public.grant import COPY, MAP_REF, TRANSFER, UNMAP_REF, GrantStatus, MapFlags
from hypervisor.public.layout import GRANT_BASE, GRANT_ENTRIES, GRANT_FRAMES, HYPERVISOR_VIRT_START
from hypervisor.public.types import DOMID_SELF, INVALID_PFN, MAX_BATCH, MAX_MAPTRACK, PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

FOREIGN = -1  # the "reference" of a mapping the builder made
DRIVER_MAPTRACK = 5 * MAX_MAPTRACK  # a driver domain serves 64 devices, whose pools have up to 512 frames each
MAX_HANDLE = 0xFFFFFFFF  # 0 is none; a patient guest comes round


@dataclass(eq=False)
class GrantMapping:
    """One frame of `granter` in the space of `grantee`."""

    granter: Domain
    grantee: Domain
    ref: int
    mfn: int
    va: int
    writable: bool
    handle: int
    leaving: bool = False  # an unmap is under way: no second one may begin
    orphan: bool = False  # the granter died: a zero page stands here


@dataclass
class _Refusal(Exception):
    status: GrantStatus = field(default=GrantStatus.GENERAL_ERROR)


# ---- taking and dropping


def address_is_free(domain: Domain, va: int) -> bool:
    """Page-aligned, in the half a domain maps grants in, nothing there and nothing coming."""
    assert domain.monitor is not None
    return (
        va % PAGE_SIZE == 0
        and GRANT_BASE <= va < HYPERVISOR_VIRT_START
        and va not in domain.reserved_vas
        and va not in domain.monitor.shadow
    )


def hold(
    hv: Hypervisor, granter: Domain, grantee: Domain, ref: int, mfn: int, va: int, writable: bool
) -> GrantMapping | None:
    """Record a mapping and take its references; None, and nothing taken, if it would be writable and the frame is a table."""
    if not hv.frames.get(mfn, writable):
        return None
    while grantee.next_handle in grantee.maptrack:
        grantee.next_handle = grantee.next_handle % MAX_HANDLE + 1
    mapping = GrantMapping(granter, grantee, ref, mfn, va, writable, grantee.next_handle)
    grantee.next_handle = grantee.next_handle % MAX_HANDLE + 1
    grantee.maptrack[mapping.handle] = mapping
    grantee.reserved_vas.add(va)
    granter.active.setdefault(ref, []).append(mapping)
    return mapping


def drop(hv: Hypervisor, mapping: GrantMapping) -> None:
    """Forget a mapping that no address space holds any more."""
    mapping.grantee.maptrack.pop(mapping.handle, None)
    mapping.grantee.reserved_vas.discard(mapping.va)
    if mapping.orphan:
        return
    hv.frames.put(mapping.mfn, mapping.writable)
    granter = mapping.granter
    others = granter.active[mapping.ref]
    others.remove(mapping)
    if mapping.ref != FOREIGN and granter.alive:
        lib.grant_release(granter.gnt, mapping.ref, not any(m.writable for m in others), not others)
    if not others:
        del granter.active[mapping.ref]


def drop_all(hv: Hypervisor, grantee: Domain) -> None:
    """The grantee's space is gone, and its mappings with it."""
    for mapping in list(grantee.maptrack.values()):
        drop(hv, mapping)


def take_back(hv: Hypervisor, granter: Domain) -> Steps:
    """The granter died: put a private zero page in the place of each of its frames, wherever it is mapped."""
    while granter.active:
        mapping = next(iter(granter.active.values()))[0]
        grantee = mapping.grantee
        group = [m for group in granter.active.values() for m in group if m.grantee is grantee]
        try:
            if not grantee.alive or grantee.monitor is None:
                raise MonitorGone
            group = [m for m in group if not m.leaving]
            yield from grantee.monitor.unmap([m.va for m in group], zero=True)
            if not group:
                yield grantee.monitor.barrier()  # every one of them is being unmapped already: let that be acknowledged
        except MonitorError as error:
            grantee.fail(f"its monitor could not take back a dead domain's frame: {error}")
            yield grantee.dead
        except MonitorGone:
            yield grantee.dead  # its own burial drops them
        for m in group:
            if m in granter.active.get(m.ref, []):
                orphan(hv, m)


def orphan(hv: Hypervisor, mapping: GrantMapping) -> None:
    """A zero page stands there now: the frame is nobody's but its owner's; the handle stays until it is unmapped."""
    hv.frames.put(mapping.mfn, mapping.writable)
    others = mapping.granter.active[mapping.ref]
    others.remove(mapping)
    if not others:
        del mapping.granter.active[mapping.ref]
    mapping.orphan = True


# ---- hypercalls


@hypercall(abi.GrantMap)
def map_refs(hv: Hypervisor, caller: Domain, call: abi.GrantMap) -> Steps:
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} entries, at most {MAX_BATCH}")
    raw = guest_access.copy_in(hv, caller, call.address, call.count * MAP_REF.size)
    assert caller.monitor is not None

    held: list[GrantMapping | GrantStatus] = []
    for entry in MAP_REF.iter_unpack(raw):
        try:
            held.append(_claim(hv, caller, *entry[:4]))
        except _Refusal as refusal:
            held.append(refusal.status)
    good = [m for m in held if isinstance(m, GrantMapping)]
    try:
        yield from caller.monitor.map([(m.va, m.mfn, PROT_READ | (PROT_WRITE if m.writable else 0)) for m in good])
    except MonitorError as error:  # its host mappings are exhausted: nothing of ours can be trusted to unmap either
        caller.fail(f"its monitor could not map a grant: {error}")
        raise MonitorGone from None

    out = b"".join(_answer(entry, m) for entry, m in zip(MAP_REF.iter_unpack(raw), held, strict=True))
    guest_access.copy_out(hv, caller, call.address, out)
    return len(good)


def _answer(entry: tuple[int, ...], result: GrantMapping | GrantStatus) -> bytes:
    va, flags, ref, dom, _, _, _ = entry
    if isinstance(result, GrantMapping):
        return MAP_REF.pack(va, flags, ref, dom, GrantStatus.OKAY, result.handle, result.mfn)
    return MAP_REF.pack(va, flags, ref, dom, result, 0, 0)


def _claim(hv: Hypervisor, caller: Domain, va: int, flags: int, ref: int, dom: int) -> GrantMapping:
    """Check one entry and take its references. Raises _Refusal."""
    granter = hv.domains.get(caller.domid if dom == DOMID_SELF else dom)
    if granter is None or not granter.alive or not granter.gnt.alive:
        raise _Refusal(GrantStatus.BAD_DOMAIN)
    if flags & ~int(MapFlags.READONLY) != MapFlags.HOST_MAP:
        raise _Refusal(GrantStatus.GENERAL_ERROR)
    if not address_is_free(caller, va):
        raise _Refusal(GrantStatus.BAD_VIRT_ADDR)
    if ref >= GRANT_ENTRIES:
        raise _Refusal(GrantStatus.BAD_GNTREF)
    if len(caller.maptrack) >= (DRIVER_MAPTRACK if caller.flags & CreateFlags.DRIVER else MAX_MAPTRACK):
        raise _Refusal(GrantStatus.NO_DEVICE_SPACE)
    writable = not flags & MapFlags.READONLY
    frame = ffi.new("uint32_t *")
    if lib.grant_claim(granter.gnt, ref, caller.domid, writable, frame):
        raise _Refusal(GrantStatus.PERMISSION_DENIED)
    mfn = frame[0]
    owned = mfn < hv.frames.nr_frames and hv.frames.frame[mfn].owner == granter.domid
    mapping = hold(hv, granter, caller, ref, mfn, va, writable) if owned else None
    if mapping is None:
        others = granter.active.get(ref, [])
        lib.grant_release(granter.gnt, ref, not any(m.writable for m in others), not others)
        raise _Refusal(GrantStatus.PERMISSION_DENIED if owned else GrantStatus.BAD_GNTREF)
    return mapping


@hypercall(abi.GrantUnmap)
def unmap_refs(hv: Hypervisor, caller: Domain, call: abi.GrantUnmap) -> Steps:
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} entries, at most {MAX_BATCH}")
    raw = guest_access.copy_in(hv, caller, call.address, call.count * UNMAP_REF.size)

    statuses: list[int] = []
    leaving: list[GrantMapping] = []
    for va, _, handle, _, _ in UNMAP_REF.iter_unpack(raw):
        mapping = caller.maptrack.get(handle)
        if mapping is None or mapping.leaving or mapping.ref == FOREIGN:
            statuses.append(GrantStatus.BAD_HANDLE)
        elif mapping.va != va:
            statuses.append(GrantStatus.BAD_VIRT_ADDR)
        else:
            mapping.leaving = True
            leaving.append(mapping)
            statuses.append(GrantStatus.OKAY)
    yield from release(hv, caller, leaving)

    out = b"".join(
        UNMAP_REF.pack(va, bus, handle, status, 0)
        for (va, bus, handle, _, _), status in zip(UNMAP_REF.iter_unpack(raw), statuses, strict=True)
    )
    guest_access.copy_out(hv, caller, call.address, out)
    return len(leaving)


def release(hv: Hypervisor, grantee: Domain, mappings: list[GrantMapping]) -> Steps:
    """Unmap, then drop; `leaving` is set on all. A monitor that cannot unmap ends its domain."""
    assert grantee.monitor is not None
    try:
        yield from grantee.monitor.unmap([m.va for m in mappings])
    except MonitorError as error:
        grantee.fail(f"its monitor could not unmap: {error}")
        raise MonitorGone from None
    for mapping in mappings:
        drop(hv, mapping)


@hypercall(abi.GrantCopy)
def copy(hv: Hypervisor, caller: Domain, call: abi.GrantCopy) -> int:
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} entries, at most {MAX_BATCH}")
    records = bytearray(guest_access.copy_in(hv, caller, call.address, call.count * COPY.size))

    done = lib.grant_copy(hv.gnts, caller.domid, hv.frames.mmu, ffi.from_buffer(records), call.count)
    guest_access.copy_out(hv, caller, call.address, bytes(records))
    return done


@hypercall(abi.GrantTransfer)
def transfer(hv: Hypervisor, caller: Domain, call: abi.GrantTransfer) -> int:
    if call.count > MAX_BATCH:
        raise TooBig(f"{call.count} entries, at most {MAX_BATCH}")
    raw = guest_access.copy_in(hv, caller, call.address, call.count * TRANSFER.size)

    entries = [(mfn, domid, ref) for mfn, domid, ref, _ in TRANSFER.iter_unpack(raw)]
    statuses = [_transfer_one(hv, caller, *entry) for entry in entries]
    out = b"".join(TRANSFER.pack(*entry, status) for entry, status in zip(entries, statuses, strict=True))
    guest_access.copy_out(hv, caller, call.address, out)
    return statuses.count(GrantStatus.OKAY)


def _transfer_one(hv: Hypervisor, caller: Domain, mfn: int, domid: int, ref: int) -> GrantStatus:
    """A frame that nobody uses changes its owner, with what is in it; what it is called there is the taker's affair."""
    taker = hv.domains.get(domid)
    if taker is None or not taker.alive or not taker.gnt.alive or taker is caller:
        return GrantStatus.BAD_DOMAIN
    if not memory.may_leave(hv, caller, mfn):
        return GrantStatus.BAD_PAGE
    if hv.frames.owned[taker.domid] >= taker.max_frames:
        return GrantStatus.NO_SPACE
    if lib.grant_accept(taker.gnt, ref, caller.domid):
        return GrantStatus.BAD_GNTREF

    hv.frames.give(mfn, taker.domid)
    hv.m2p.pfn[mfn] = INVALID_PFN
    lib.grant_accepted(taker.gnt, ref, caller.domid, mfn)
    return GrantStatus.OKAY


@hypercall(abi.GrantSetupTable)
def setup_table(hv: Hypervisor, caller: Domain, call: abi.GrantSetupTable) -> None:
    target = hv.target(caller, call.domid)
    if call.nr_frames > GRANT_FRAMES:
        raise Invalid(f"{call.nr_frames} frames, the table has {GRANT_FRAMES}")

    mfns = target.grant_frames[: call.nr_frames]
    guest_access.copy_out(hv, caller, call.address, struct.pack(f"<{len(mfns)}Q", *mfns))


@hypercall(abi.GrantQuerySize)
def query_size(hv: Hypervisor, caller: Domain, call: abi.GrantQuerySize) -> tuple[int, int]:
    hv.target(caller, call.domid)
    return GRANT_FRAMES, GRANT_FRAMES
