"""Applications: the processes in which a guest kernel runs programs, and the cell by which they hand over to each other.

A guest lays out page tables for a *user root* (an L3 of its own, pinned) and names CONTROL_PAGES frames of its own. The
extended operation NEW_USER_BASEPTR (mmu.py) makes of them an address space in a process of its own, once vector 0x80 has its
handler (traps.py): `va` is the host's `va`, from USER_START to the hypervisor's 64 MB, where the program finds the gate page
and the control region, and nothing else. Host mappings follow the root's tables as a kernel's do.

    0x7F_FC00_0000  USER_GATE: the gate's code and the monitor's, the only page from which the host takes a system call
    0x7F_FC00_1000  commands of the space's monitor, read-only
    0x7F_FC02_0000  USER_CONTROL: the cell, 64 bytes, registers of a direct call, 128; from the second page on, to the end
                    of CONTROL_PAGES, the stack of signals

    cell   u32 turn @0   u32 signal @4   u64 number @8   u32 arch @16   u32 error @20   u64 address @24   u64 vector @32
           u64 frame @40   u64 fs_base @48   u64 gs_base @56

The program, or the kernel, runs, as `turn` says: 1 the program, 0 its kernel, 2 the space is gone (the hypervisor's word).
Both wait for it with FUTEX_WAIT and wake each other with FUTEX_WAKE; the gate only where the u32 at WAITS_AT is not 0, which
the kernel sets before it looks at the turn a last time, and waits: on one CPU the program runs at once, and there is no need.
When the gate gives the turn to the kernel, `signal` is the host's signal that took the program there: 31 a system call
(`number`, and the table it is of in `arch`), 10 the CPU is taken away (UserInterrupt), else an exception (`vector`, `error`,
and `address` of vector 14). `frame` is where in the region the host's kernel put all registers (Linux's struct ucontext, the
vector registers behind a pointer in it); they go back from there when the program has the turn. FS and GS base are beside it.
A program begins as an exception of the gate's own: whoever made the space sets `turn` to 1 before, waits for it to be 0, and
finds a frame there.

A program whose kernel rewrote its system calls hands over without the host: it jumps to USER_CALL, in the gate page, with the
number in rax, where it will go on in rcx, and r11 free. `signal` is 0 then, `frame` as it was, and the registers but RIP (in
rcx) and RFLAGS are at CALL_AT. If the kernel changes rax alone, turn 1 goes on there. With turn 3 the gate raises an exception
(vector 6) instead: there is a frame then, with the vector registers, and all can be changed.

    call   u64 r15 @0, r14, r13, r12, rbp, rbx, r11 (not kept), r10, r9, r8, rax @80, rcx @88, rdx, rsi, rdi, rsp @120

The program can write all of this at any time: whoever reads it copies it once, checks, and bounds what it follows.

No hypercall is made from one system call of a program to the next. A page fault goes to the hypervisor first, as a kernel's
does; the rest arrives as vector 14.
"""

from __future__ import annotations

import struct

from hypervisor.public.hypercall import OP_USER, Hypercall
from hypervisor.public.layout import HYPERVISOR_VIRT_START
from hypervisor.public.types import PAGE_SIZE, U64

USER_START = 0x1_0000  # the host maps nothing below
USER_GATE = HYPERVISOR_VIRT_START
USER_CALL = USER_GATE + 0xE00
USER_CONTROL = HYPERVISOR_VIRT_START + 0x2_0000
CONTROL_PAGES = 8
CONTROL_BYTES = CONTROL_PAGES * PAGE_SIZE
MAX_USERS = 128  # spaces of a domain

CELL = struct.Struct("<IIQIIQQQQQ")
assert CELL.size == 64
CALL_AT = CELL.size
WAITS_AT = CALL_AT + 128
TURN_KERNEL, TURN_PROGRAM, TURN_DEAD, TURN_FRAME = 0, 1, 2, 3
ARCH_X86_64, X32_BIT = 0xC000003E, 1 << 30


class UserInterrupt(Hypercall[None]):
    """Take the CPU from the program in the space of `root` (an mfn): its gate gives the turn to the kernel, unless it has.
    A program can block that signal for itself: then nothing comes, and UserDestroy is left. Raises NoEntry (no such space)."""

    OP = OP_USER
    CMD = 0
    root: U64


class UserDestroy(Hypercall[None]):
    """End the space of `root`, dead or alive: when the reply comes, its process is gone, and its frames are held by nobody.
    Raises NoEntry."""

    OP = OP_USER
    CMD = 1
    root: U64
