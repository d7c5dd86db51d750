"""Descriptor tables: a guest's frames that hold nothing but good descriptors, and cannot be written. segments.c judges them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypervisor import guest_access, space
from hypervisor._hv import lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.loop import Steps
from hypervisor.public import segments as abi
from hypervisor.public.errors import Invalid
from hypervisor.public.mmu import PageType
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor


@hypercall(abi.SetGdt)
def set_gdt(hv: Hypervisor, caller: Domain, call: abi.SetGdt) -> Steps:
    if call.entries > abi.GDT_ENTRIES:
        raise Invalid(f"{call.entries} descriptors, at most {abi.GDT_ENTRIES}")
    count = -(-call.entries // abi.DESCRIPTORS)
    mfns = struct.unpack(f"<{count}Q", guest_access.copy_in(hv, caller, call.address, 8 * count))
    for mfn in mfns:
        _check_own(hv, caller, mfn)

    taken: list[int] = []
    try:
        for mfn in mfns:
            yield from space.get_table(hv, caller, mfn, PageType.SEG_DESC)
            taken.append(mfn)
    except Invalid:
        yield from _release(hv, caller, taken)
        raise
    before, caller.gdt = caller.gdt, taken
    yield from _release(hv, caller, before)


def _check_own(hv: Hypervisor, caller: Domain, mfn: int) -> None:
    if not hv.frames.owned_by(mfn, caller.domid):
        raise Invalid(f"frame {mfn:#x} is not the domain's")


def _release(hv: Hypervisor, caller: Domain, mfns: list[int]) -> Steps:
    for mfn in mfns:
        yield from space.put_table(hv, caller, mfn, False)


@hypercall(abi.UpdateDescriptor)
def update_descriptor(hv: Hypervisor, caller: Domain, call: abi.UpdateDescriptor) -> None:
    mfn, offset = call.address >> PAGE_SHIFT, call.address % PAGE_SIZE
    _check_own(hv, caller, mfn)
    if offset % 8 or not lib.descriptor_is_safe(call.descriptor):
        raise Invalid(f"descriptor {call.descriptor:#x} at {call.address:#x}")
    frame = hv.frames.frame[mfn]
    in_force = frame.count and frame.type == PageType.SEG_DESC
    if not in_force and not hv.frames.get(mfn, True):
        raise Invalid(f"frame {mfn:#x} is a page table")

    lib.mmu_store(hv.frames.mmu, mfn, offset // 8, call.descriptor)
    if not in_force:
        hv.frames.put(mfn, True)
