"""Page tables: a guest's own frames, which it reads directly and changes only through these calls.

Entry, 8 bytes, in all three levels (x86-64's bits):

    0 PRESENT   1 RW   2 US   5 A   6 D   8 G (L1 only)   9..11, 52..62 the guest's own   12..51 mfn   63 NX

Every other bit is refused where PRESENT is set (PS too: an extent that lies together in the machine is one host mapping,
which is what a superpage is to a TLB). Of an entry that is not present, every bit is the guest's own. A and D are never
set by the hypervisor.

    guest va, 39 bits:  38..30 slot in the L3 (the root)   29..21 slot in the L2   20..12 slot in the L1   11..0 offset

What a page may be touched for is what every level allows: RW is the AND of the three entries, NX the OR.

Rules (xen/arch/x86/mm.c, SOSP'03 section 3.3.3). A frame has one type at a time: none, L1, L2, L3, descriptor table,
writable. It becomes a table when it is pinned or when an entry of a table above names it, if every entry of it is good; an
entry with RW makes its frame writable, or is refused because that frame is a table. A table has ONE parent: a second entry
that names it is Busy, one of its own level is refused. Slots that reach into the hypervisor's 64 MB, and of the root that a
domain was started with those from GRANT_BASE on, are the hypervisor's.

    mmu_update request  16 bytes: u64 ptr = machine address of the entry | command; u64 value
    mmuext_op           24 bytes: u32 cmd, u32 pad, u64 arg1 (an mfn or a guest va), u64 arg2 (COPY_PAGE: the source's mfn)

A batch stops at the first bad entry, whose error it raises; what came before it stays done. `done` is the address of a u32
that receives how many (0: nobody asks); nothing of a host mapping is left that the new entries do not allow when the reply
comes. Source: xen/include/public/xen.h.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from hypervisor.public.hypercall import OP_MMU_UPDATE, OP_MMUEXT, OP_UPDATE_VA_MAPPING, Hypercall
from hypervisor.public.types import PAGE_SHIFT, U16, U32, U64

UPDATE = struct.Struct("<QQ")
EXT_OP = struct.Struct("<IxxxxQQ")
assert (UPDATE.size, EXT_OP.size) == (16, 24)

ENTRIES = 512  # of a table
L1_SHIFT, L2_SHIFT, L3_SHIFT = 12, 21, 30
MFN_MASK = ((1 << 52) - 1) & ~((1 << PAGE_SHIFT) - 1)


class Pte(IntFlag):
    """Bits of an entry."""

    PRESENT = 1
    RW = 2
    US = 4
    A = 1 << 5
    D = 1 << 6
    G = 1 << 8
    NX = 1 << 63


class PageType(IntEnum):
    """What a frame is used as; one at a time."""

    NONE = 0
    L1 = 1
    L2 = 2
    L3 = 3
    SEG_DESC = 5
    WRITABLE = 7


class UpdateCommand(IntEnum):
    """The low three bits of a request's ptr."""

    NORMAL = 0  # MMU_NORMAL_PT_UPDATE; of a frame that is no table: a plain store, as if it were mapped writable
    MACHPHYS = 1  # MMU_MACHPHYS_UPDATE: ptr names a frame of ours, value is its pfn
    PRESERVE_AD = 2  # MMU_PT_UPDATE_PRESERVE_AD: A and D stay as they are


class MmuextCommand(IntEnum):
    """What MmuextOp does (MMUEXT_*)."""

    PIN_L1 = 0
    PIN_L2 = 1
    PIN_L3 = 2
    UNPIN = 4
    NEW_BASEPTR = 5
    TLB_FLUSH = 6
    INVLPG = 7
    NEW_USER_BASEPTR = 15
    CLEAR_PAGE = 16
    COPY_PAGE = 17


class MmuUpdate(Hypercall[int]):
    """Apply `count` requests at `address`; returns how many. `domid`: SELF, or for dom0 a domain that it builds.

    Raises BadAddress (the array, or `done`), TooBig (MAX_BATCH), NoSuchDomain, NotPermitted (another's tables; a slot of the
    hypervisor's; M2P of a frame that is not ours), Invalid (bits; a frame that is not ours or has another type), Busy (a
    table with a parent; a table under construction), NotImplementedCall (a command that there is not).
    """

    OP = OP_MMU_UPDATE
    address: U64
    count: U32
    done: U64
    domid: U16


class UpdateVaMapping(Hypercall[None]):
    """Set the L1 entry of `va` (39 bits) in the current space to `value`. `flags`: 0, or 1 flush all, 2 invlpg: no need.

    Raises as MmuUpdate, and Invalid where `va` has no L1.
    """

    OP = OP_UPDATE_VA_MAPPING
    va: U64
    value: U64
    flags: U64


class MmuextOp(Hypercall[int]):
    """Run `count` extended operations at `address`; returns how many. `domid` and errors as MmuUpdate.

    PIN_Ln: the frame is a table of that level from here on (Invalid: it cannot be, or is pinned). UNPIN: Invalid if it is
    not. NEW_BASEPTR: the current space is that root's, which need not be pinned; the hypervisor keeps the last NR_WINDOWS - 1
    pinned ones in windows, so that a switch unmaps nothing, and writes the new window's host address to shared_info.
    TLB_FLUSH, INVLPG: throw out host mappings, which come back by fault. CLEAR_PAGE, COPY_PAGE: the frame must be ours and
    be no table. NEW_USER_BASEPTR: an address space of a program's (user.py); arg1 is its root, arg2 the address of the mfns of
    its control region, CONTROL_PAGES words. NoEntry: vector 0x80 has no fast handler (traps.py); Busy: a window or a space
    shows the root; NoSpace: MAX_USERS, or the host refuses.
    """

    OP = OP_MMUEXT
    address: U64
    count: U32
    done: U64
    domid: U16


def entry(mfn: int, flags: int) -> int:
    """A page-table entry."""
    return mfn << PAGE_SHIFT | flags


def mfn_of(entry: int) -> int:
    """The frame that a page-table entry names."""
    return (entry & MFN_MASK) >> PAGE_SHIFT
