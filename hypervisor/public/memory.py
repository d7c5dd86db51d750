"""Memory reservation. Source: xen/include/public/memory.h.

A domain's frames are machine frames (mfns); which pfn it gives them is its own affair, told to the M2P. Extents are
2**order frames that lie together, aligned to their size; an extent is named by its first frame. Arrays of u64 lie in guest
memory. A batch stops at the first bad extent; the calls answer how many were done, as Xen does.
"""

from __future__ import annotations

from typing import NamedTuple

from hypervisor.public.hypercall import OP_MEMORY, Hypercall
from hypervisor.public.types import U16, U32, U64

MAX_ORDER = 9  # 2 MiB
MAX_EXCHANGE = 512  # frames: an exchange is made at once, while all others wait some 2 ms


class IncreaseReservation(Hypercall[int]):
    """Get `count` extents, zeroed; their mfns are written at `address`, their M2P says INVALID_PFN. Returns how many.

    Fewer: the maximum is reached, the machine has no such extent, or they are 1024 frames. Raises BadAddress, TooBig
    (MAX_BATCH), Invalid (order).
    """

    OP, CMD = OP_MEMORY, 0
    address: U64
    count: U32
    order: U32


class DecreaseReservation(Hypercall[int]):
    """Give back the extents listed at `address`. Returns how many.

    Stops at an extent with a frame that is not the caller's, or is in use: mapped by an entry of any table, a table itself,
    mapped by another domain, or the hypervisor's (shared_info, grant table, hypercall ring). Raises as IncreaseReservation.
    """

    OP, CMD = OP_MEMORY, 1
    address: U64
    count: U32
    order: U32


class CurrentReservation(Hypercall[int]):
    """Frames that `domid` owns now (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_MEMORY, 3
    domid: U16


class MaximumReservation(Hypercall[int]):
    """Frames that `domid` may own (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_MEMORY, 4
    domid: U16


class PopulatePhysmap(Hypercall[int]):
    """As IncreaseReservation, for extents whose first pfns stand at `address`: each is replaced by its first mfn, and the
    M2P says the pfns. Nothing is mapped. Returns how many. Raises as IncreaseReservation."""

    OP, CMD = OP_MEMORY, 6
    address: U64
    count: U32
    order: U32


class Exchange(Hypercall[int]):
    """Give the `in_count` extents of 2**`in_order` frames listed at `in_address` for `out_count` of 2**`out_order`.

    The array at `out_address` holds the first pfn of each new extent and receives its first mfn. Both sides are of one size.
    Returns how many extents went in: all or none. Raises BadAddress, TooBig (MAX_BATCH; MAX_EXCHANGE frames), Invalid (sizes;
    an extent that cannot leave, as DecreaseReservation), NoMemory (the machine has no such extent).
    """

    OP, CMD = OP_MEMORY, 11
    in_address: U64
    in_count: U32
    in_order: U32
    out_address: U64
    out_count: U32
    out_order: U32


class MachphysMapping(NamedTuple):
    """Where the M2P is: guest-virtual, first byte and the one after the last; and the greatest mfn."""

    start: int
    end: int
    max_mfn: int


class MachphysMappingCall(Hypercall[MachphysMapping]):
    """XENMEM_machphys_mapping. Any domain."""

    OP, CMD = OP_MEMORY, 12

    @classmethod
    def result(cls, values: list[int]) -> MachphysMapping:
        return MachphysMapping(*values)
