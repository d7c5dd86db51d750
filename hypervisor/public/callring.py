"""The hypercall ring: multicall entries in a page that guest and hypervisor share, the queue as its doorbell.

One frame of the guest's own, as io/ring.h has it: 32 slots of 64 bytes. A request is a multicall entry (u64 op, s64 unused,
six u64 words as in Multicall); its answer, 16 bytes in the same slot, is u64 op, s64 result. Answers are in the order of
the requests. While the hypervisor is awake it asks for no doorbell (req_event); when it sleeps, pushing past req_event asks
for CallringKick, which returns when everything in the ring was answered. In the header's pad each end says where it last
ran, the guest at 16, the hypervisor at 20: a u32, the host CPU plus 1, 0 for unknown.

Entries that a multicall list refuses are refused here alike. An index that cannot be ends the domain. ring1's own call:
48 is __HYPERVISOR_arch_0 of xen/include/public/xen.h.
"""

from __future__ import annotations

import struct

from hypervisor.public.hypercall import OP_CALLRING, Hypercall
from hypervisor.public.types import U64

ENTRY = struct.Struct("<Qq6Q")
ANSWER = struct.Struct("<Qq")
ENTRY_BYTES, ANSWER_BYTES, NR_ENTRIES = 64, 16, 32
assert (ENTRY.size, ANSWER.size) == (ENTRY_BYTES, ANSWER_BYTES)


class CallringSetup(Hypercall[None]):
    """Use the page at guest-virtual `address`, whose header the guest has initialised, for good.

    Raises BadAddress (not page-aligned, or not the guest's), Exists (it has one).
    """

    OP, CMD = OP_CALLRING, 0
    address: U64


class CallringKick(Hypercall[None]):
    """The doorbell: answer everything in the ring, then reply. Raises Invalid (no ring; or from within the ring)."""

    OP, CMD = OP_CALLRING, 1
