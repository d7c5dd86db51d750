"""Exceptions: what a guest kernel registers, and the frame it finds. Source: xen/include/public/arch-x86/xen.h.

    trap_info  16 bytes: u8 vector, u8 flags (bits 0-1 DPL, 2 mask events on entry, 3 fast), u16 cs, u32 pad, u64 address

An array of them ends with one whose address is 0. An address is one of the kernel's process (a host address).

What was registered and found good stands in the page TRAP_TABLE of the top 64 MB, a word an entry, so that it is read whole;
the hypervisor alone can write it. The entry code goes by it and by nothing else:

    u64 trap[256]    by vector: the address, the flags in the highest byte; 0: no handler, or a fast one
    u64 event        the event callback, likewise
    u64 failsafe     the failsafe callback, likewise
    u64 kernel_sp    the stack that the failsafe callback is entered on; 0: the one that the bad frame names

An exception is delivered in the process where it happened, and nobody else hears of it. On entry the handler's stack is that
of the interrupted code, below its red zone, aligned to 16 bytes as by the hardware, and holds what that would push; `iretq`
ends the handler, once it has taken the error code off:

    (0 error code, of vectors 8, 10 to 14, 17, 21, 29, 30)   0 rip   8 cs   16 rflags   24 rsp   32 ss

The cs word has Xen's saved_upcall_mask in its byte 4: evtchn_upcall_mask before the entry. Flags TF, DF, NT, RF and AC are
clear on entry. `int $n` enters vector n, behind the instruction and without an error code, where its DPL is 1 or more; else it
is a general protection fault with error code n * 8 + 2, as it is of a vector without a handler.

Vector 0x80 is the one of applications' system calls, and TI_FAST is its flag: once its handler was found good, the direct path
is installed, and they go from an application's process to the kernel's with no hypervisor in between (user.py). Before that
there is no application (NEW_USER_BASEPTR, NoEntry). Nothing jumps to the address: the kernel waits there, for its cell.

A page fault goes to the hypervisor first. What the guest's tables allow, it maps, and the access runs again; the rest is
bounced to the guest's handler of vector 14, whose error code is this:

    1 the page is present, 2 a write, 4 user, 16 a fetch

shared_info's cr2 says where: an offset from KERNEL_WINDOW, so that it names the window too. Without a handler, or with a
stack that a frame cannot be pushed on ("double fault"), the domain ends, whatever the vector.

    fault message  40 bytes, on FD_FAULT: u64 address (host), u64 error code, u64 rip, u64 rsp, u64 value
    verdict        16 bytes: u32 0 run it again, 1 enter the handler, 2 skip it; u32 error code of its frame; u64 its word

The frame's error code says PRESENT by the guest's own tables, whatever the host had mapped.

Writable page tables (vm_assist, off at start) are how a kernel runs that was not ported: it stores to its tables, which it has
mapped read-only. Where the faulting instruction is a 64-bit `mov %reg,(mem)` (REX.W 89 /r), the message's error code has
PF_STORE, and `value` is what it would store; the hypervisor sets that entry as MmuUpdate would, with the same checks, and the
instruction is skipped. What MmuUpdate would refuse is bounced, and so is every other instruction. It costs a fault an entry,
where a batch costs nanoseconds.

With PF_DELIVERY, the fault was raised while something was delivered, `value`, at `rip`: what the tables do not allow ends the
domain. With PF_UNHANDLED nothing can be done and the message is the domain's last: `value` has no handler, or with
PF_DELIVERY cannot be delivered. There `value` is a vector, EVENT, FAILSAFE, or SENT and the number of a signal that the domain
sent itself.

Messages are the entry code's. Whoever sends one by hand has a page mapped that the tables allow anyway, sets an entry that
MmuUpdate would, or ends his own domain.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from hypervisor.public.hypercall import OP_SET_CALLBACKS, OP_SET_TRAP_TABLE, OP_STACK_SWITCH, OP_VM_ASSIST, Hypercall
from hypervisor.public.types import U16, U32, U64

TRAP_INFO = struct.Struct("<BBH4xQ")
FAULT = struct.Struct("<5Q")
VERDICT = struct.Struct("<IIQ")
TRAPS = struct.Struct("<256QQQQ")
assert (TRAP_INFO.size, FAULT.size, VERDICT.size, TRAPS.size) == (16, 40, 16, 2072)

PF_PRESENT, PF_WRITE, PF_USER, PF_FETCH = 1, 2, 4, 16
PF_STORE, PF_DELIVERY, PF_UNHANDLED = 1 << 32, 1 << 33, 1 << 34  # of a message alone
TI_DPL, TI_MASK_EVENTS, TI_FAST = 3, 4, 8
TI_SHIFT = 56  # of the flags in a word of TRAPS
MAX_TRAPS = 256
EVENT, FAILSAFE, KERNEL_SP = 256, 257, 258  # of a message; and where they stand among the words of TRAPS
SENT = 512
RETRY, BOUNCE, SKIP = 0, 1, 2
RED_ZONE, FRAME_BYTES = 128, 48


class Vector(IntEnum):
    """What the processor raises (X86_EXC_*). Of these NMI, DOUBLE_FAULT and MACHINE_CHECK are never a guest's."""

    DIVIDE_ERROR = 0
    DEBUG = 1
    NMI = 2
    BREAKPOINT = 3
    OVERFLOW = 4
    BOUNDS = 5
    INVALID_OPCODE = 6
    DEVICE_NOT_AVAILABLE = 7
    DOUBLE_FAULT = 8
    INVALID_TSS = 10
    SEGMENT_NOT_PRESENT = 11
    STACK = 12
    GENERAL_PROTECTION = 13
    PAGE_FAULT = 14
    X87 = 16
    ALIGNMENT_CHECK = 17
    MACHINE_CHECK = 18
    SIMD = 19
    SYSTEM_CALL = 0x80


class VmassCommand(IntEnum):
    """What VmAssist does (VMASST_CMD_*)."""

    ENABLE = 0
    DISABLE = 1


class VmassType(IntEnum):
    """With what (VMASST_TYPE_*): Xen's other ones are of 32 bits, or always on."""

    WRITABLE_PAGETABLES = 2


class SetTrapTable(Hypercall[None]):
    """Register the handlers listed at `address`, entry by entry; 0 forgets them all. Entries before a bad one stand.

    Raises BadAddress, TooBig (MAX_TRAPS), Invalid (a vector that is never raised, a flag, a code selector whose ring is 0, an
    address that is not canonical or is the hypervisor's; TI_FAST of another vector than 0x80, or that one without TI_FAST and
    DPL 3, or with TI_MASK_EVENTS).
    """

    OP = OP_SET_TRAP_TABLE
    address: U64


class StackSwitch(Hypercall[None]):
    """The kernel's stack: where a frame is pushed for what did not interrupt the kernel itself. Here that is the failsafe
    callback alone, since the traps of an application reach a kernel that waits for them on its own stack. `sp` is a host
    address, 0 none. Raises Invalid (a selector whose ring is 0, an address that is not canonical or is the hypervisor's)."""

    OP = OP_STACK_SWITCH
    ss: U16
    sp: U64


class SetCallbacks(Hypercall[None]):
    """Register both, or 0 for none. Raises Invalid (not canonical, or the hypervisor's), and then neither has changed.

    event: entered, with evtchn_upcall_mask set, by an upcall that comes while that is clear and the signal is unblocked: a
    frame without an error code. failsafe: entered where a frame cannot be returned to (an iretq that faults, an rt_sigreturn
    that the host refuses), with the error code of a general protection fault; without one, vector 13 is.
    """

    OP = OP_SET_CALLBACKS
    event: U64
    failsafe: U64


class VmAssist(Hypercall[None]):
    """Turn an assistance on or off: `cmd` of VmassCommand, `type` of VmassType. Raises Invalid for any other."""

    OP = OP_VM_ASSIST
    cmd: U32
    type: U32
