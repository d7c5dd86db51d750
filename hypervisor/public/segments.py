"""Descriptor tables: the frames that a guest's processor would load as its GDT.

    descriptor, 8 bytes (x86):  15..0 limit   39..16 base   40 accessed   41 writable/readable   42 expand-down/conforming
    43 code   44 no system segment   46..45 DPL   47 present   51..48 limit   52 own   53 64-bit code   54 size 32
    55 limit in pages   63..56 base

A descriptor is good if it is not present, or is code or data of ring 1 to 3 that ends below the top 64 MB of its 4 GiB; of
64-bit code, base and limit do not count. Gates, task states and local tables are refused, and so are segments that expand
down. A conforming segment of ring 1 to 3 is good: who calls it stays in the ring it is in.

The processor here is the host's, and its own table is the host kernel's: what a guest registers is checked and kept as it
would be loaded, its frames cannot be written, but no selector of it can be loaded. Source: xen/include/public/xen.h.
"""

from __future__ import annotations

from hypervisor.public.hypercall import OP_SET_GDT, OP_UPDATE_DESCRIPTOR, Hypercall
from hypervisor.public.types import U32, U64

DESCRIPTORS = 512  # of a frame
GDT_FRAMES = 14
GDT_ENTRIES = GDT_FRAMES * DESCRIPTORS  # the two frames behind are the hypervisor's


class SetGdt(Hypercall[None]):
    """The caller's table is `entries` long, in the frames whose u64 mfns stand at `address`; 0 entries: it has none.

    Each of the frames is a descriptor table from here on, with all of its 512 descriptors, until another table is set; the
    one before is kept where this one is refused. Raises BadAddress, Invalid (more than GDT_ENTRIES; a frame that is not the
    caller's, is mapped writable or is a page table; a descriptor that is not good).
    """

    OP = OP_SET_GDT
    address: U64
    entries: U32


class UpdateDescriptor(Hypercall[None]):
    """Set the descriptor at the machine address `address`, in a descriptor table or in any frame that is no page table.

    Raises Invalid (an address that is no multiple of 8; a frame that is not the caller's, or is a page table; the descriptor).
    """

    OP = OP_UPDATE_DESCRIPTOR
    address: U64
    descriptor: U64
