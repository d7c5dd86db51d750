"""Exceptions: what a guest kernel registers, and the frame it finds. Source: xen/include/public/arch-x86/xen.h.

    trap_info  16 bytes: u8 vector, u8 flags (bits 0-1 DPL, 2 mask events on entry), u16 cs, u32 pad, u64 address

An array of them ends with one whose address is 0. An address is one of the kernel's process (a host address).

A page fault goes to the hypervisor first. What the guest's tables allow, it maps, and the access runs again; the rest is
bounced to the guest's handler of vector 14. On entry the handler's stack is that of the interrupted code, below its red
zone, and holds what the hardware would push; `iretq` ends it:

    0 error code (1 the page is present, 2 a write, 4 user, 16 a fetch)   8 rip   16 cs   24 rflags   32 rsp   40 ss

shared_info's cr2 says where: an offset from KERNEL_WINDOW, so that it names the window too. Without a handler, or with a
stack that a frame cannot be pushed on, the domain ends ("double fault").

    fault message  40 bytes, on FD_FAULT: u64 address (host), u64 error code, u64 rip, u64 rsp, u64 value
    verdict        16 bytes: u32 0 run it again, 1 enter the handler, 2 skip it; u32 error code of its frame; u64 its address

The frame's error code says PRESENT by the guest's own tables, whatever the host had mapped.

Writable page tables (vm_assist, off at start) are how a kernel runs that was not ported: it stores to its tables, which it has
mapped read-only. Where the faulting instruction is a 64-bit `mov %reg,(mem)` (REX.W 89 /r), the message's error code has
PF_STORE, and `value` is what it would store; the hypervisor sets that entry as MmuUpdate would, with the same checks, and the
instruction is skipped. What MmuUpdate would refuse is bounced, and so is every other instruction. It costs a fault an entry,
where a batch costs nanoseconds.

Messages are the entry code's. Whoever sends one by hand has a page mapped that the tables allow anyway, or sets an entry that
MmuUpdate would.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from hypervisor.public.hypercall import OP_SET_TRAP_TABLE, OP_VM_ASSIST, Hypercall
from hypervisor.public.types import U32, U64

TRAP_INFO = struct.Struct("<BBH4xQ")
FAULT = struct.Struct("<5Q")
VERDICT = struct.Struct("<IIQ")
assert (TRAP_INFO.size, FAULT.size, VERDICT.size) == (16, 40, 16)

VECTOR_PAGE_FAULT = 14
PF_PRESENT, PF_WRITE, PF_USER, PF_FETCH = 1, 2, 4, 16
PF_STORE = 1 << 32  # of a message alone
TI_DPL, TI_MASK_EVENTS = 3, 4
MAX_TRAPS = 256
RETRY, BOUNCE, SKIP = 0, 1, 2
RED_ZONE, FRAME_BYTES = 128, 48


class VmassCommand(IntEnum):
    """What VmAssist does (VMASST_CMD_*)."""

    ENABLE = 0
    DISABLE = 1


class VmassType(IntEnum):
    """With what (VMASST_TYPE_*): Xen's other ones are of 32 bits, or always on."""

    WRITABLE_PAGETABLES = 2


class SetTrapTable(Hypercall[None]):
    """Register the handlers listed at `address`, entry by entry; 0 forgets them all. Entries before a bad one stand.

    This version delivers vector 14 alone; every other is Invalid. Raises BadAddress, TooBig (MAX_TRAPS), Invalid (a vector, a
    flag, a code selector whose ring is 0, an address that is not canonical or is the hypervisor's).
    """

    OP = OP_SET_TRAP_TABLE
    address: U64


class VmAssist(Hypercall[None]):
    """Turn an assistance on or off: `cmd` of VmassCommand, `type` of VmassType. Raises Invalid for any other."""

    OP = OP_VM_ASSIST
    cmd: U32
    type: U32
