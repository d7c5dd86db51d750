"""Exceptions: what a guest kernel registers, and the frame it finds. Source: xen/include/public/arch-x86/xen.h.

    trap_info  16 bytes: u8 vector, u8 flags (bits 0-1 DPL, 2 mask events on entry), u16 cs, u32 pad, u64 address

An array of them ends with one whose address is 0. An address is one of the kernel's process (a host address).

An exception that is no page fault enters its handler at once, in the process where it happened: no message, no hypercall. The
table is read from TRAP_TABLE, a page that only the hypervisor can write: a word for each vector, 0 where there is no handler

    bits 0-47 address   48 mask events on entry   49-50 DPL

Raised by the host are 0 divide error, 1 debug (single step), 3 breakpoint, 4 overflow (int $4), 6 invalid opcode, 12 stack, 13
general protection (a privileged instruction, an address that is not canonical), 16 and 19 floating point, 17 alignment. Any
other n is entered by `int n` if its DPL is not 0, as from ring 1; 0x80 is the host's own. The frame is as the hardware pushes
it, without the error code where the vector has none (Intel SDM, volume 3, 6.13); rip is that of the instruction, or behind it
for 1, 3, 4 and `int n`. Without a handler, or where a frame cannot be pushed ("double fault"), the domain ends.

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

VECTOR_PAGE_FAULT, VECTOR_INT80 = 14, 0x80
PF_PRESENT, PF_WRITE, PF_USER, PF_FETCH = 1, 2, 4, 16
PF_STORE = 1 << 32  # of a message alone, as the next two:
PF_DELIVERY = 1 << 33  # while the frame of the exception `error >> PF_VECTOR_SHIFT & 255` was pushed
PF_UNHANDLED = 1 << 34  # no page fault: that exception has no handler
PF_VECTOR_SHIFT = 40
TI_DPL, TI_MASK_EVENTS = 3, 4
MAX_TRAPS = 256
RETRY, BOUNCE, SKIP = 0, 1, 2
RED_ZONE, FRAME_BYTES = 128, 48


NAMES = {
    0: "divide error", 1: "debug", 3: "breakpoint", 4: "overflow", 5: "bound range", 6: "invalid opcode", 12: "stack fault",
    13: "general protection", 14: "page fault", 16: "floating point", 17: "alignment check", 19: "SIMD floating point",
}  # fmt: skip


def trap_word(address: int, masks_events: bool, dpl: int) -> int:
    """An entry of TRAP_TABLE."""
    return address | masks_events << 48 | dpl << 49


class VmassCommand(IntEnum):
    """What VmAssist does (VMASST_CMD_*)."""

    ENABLE = 0
    DISABLE = 1


class VmassType(IntEnum):
    """With what (VMASST_TYPE_*): Xen's other ones are of 32 bits, or always on."""

    WRITABLE_PAGETABLES = 2


class SetTrapTable(Hypercall[None]):
    """Register the handlers listed at `address`, entry by entry; 0 forgets them all. Entries before a bad one stand.

    Raises BadAddress, TooBig (MAX_TRAPS), Invalid (vector 0x80, a flag, a code selector whose ring is 0, an address that is not
    canonical or is the hypervisor's).
    """

    OP = OP_SET_TRAP_TABLE
    address: U64


class VmAssist(Hypercall[None]):
    """Turn an assistance on or off: `cmd` of VmassCommand, `type` of VmassType. Raises Invalid for any other."""

    OP = OP_VM_ASSIST
    cmd: U32
    type: U32
