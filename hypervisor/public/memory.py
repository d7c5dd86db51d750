"""Memory reservation. Source: xen/include/public/memory.h.

A domain's frames are its pfns 0 .. maximum - 1, each a frame or a hole. Arrays of u64 pfns lie in guest memory. A batch
stops at the first bad entry; the calls answer how many entries were done, as Xen does.
"""

from __future__ import annotations

from hypervisor.public.hypercall import OP_MEMORY, Hypercall
from hypervisor.public.types import U16, U32, U64


class DecreaseReservation(Hypercall[int]):
    """Give back the frames of `count` pfns listed at `address`; they become holes. Returns how many.

    Stops at a pfn below KERNEL_PFN, at a hole, and at a frame that somebody else maps or that is a hypercall ring.
    Raises BadAddress (the array), TooBig (MAX_BATCH).
    """

    OP, CMD = OP_MEMORY, 1
    address: U64
    count: U32


class PopulatePhysmap(Hypercall[int]):
    """Fill the holes of `count` pfns listed at `address` with frames, zeroed, mapped writable. Returns how many.

    Stops at a pfn that is no hole, or when the machine has no frame left. Raises BadAddress, TooBig.
    """

    OP, CMD = OP_MEMORY, 6
    address: U64
    count: U32


class CurrentReservation(Hypercall[int]):
    """Frames that `domid` owns now (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_MEMORY, 3
    domid: U16


class MaximumReservation(Hypercall[int]):
    """Frames that `domid` may own (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_MEMORY, 4
    domid: U16
