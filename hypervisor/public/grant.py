"""Grant tables v1: a domain lets one other domain map one of its frames.

Entry, 8 bytes, in the granter's own frames GRANT_PFN.. (xen/include/public/grant_table.h):

    0 u16 flags   [DOM] type, GTF_READONLY      [HV] GTF_READING, GTF_WRITING while mapped
    2 u16 domid   [DOM] who may map
    4 u32 frame   [DOM] the mfn; of an entry that takes one, [HV] the mfn that came

To grant: write domid and frame, barrier, write flags. To end: clear flags by compare-and-swap, which fails while
GTF_READING or GTF_WRITING is set. The hypervisor decides from the entry it copied at map time, never from later reads.
Entries 0 (console) and 1 (xenstore) are filled by the builder; 2..7 are reserved.

map and unmap take arrays in guest memory:

    gnttab_map_grant_ref    32 bytes: u64 host_addr IN guest-virtual; u32 flags IN; u32 ref IN; u16 dom IN; s16 status OUT;
                                      u32 handle OUT; u64 dev_bus_addr OUT (the mfn)
    gnttab_unmap_grant_ref  24 bytes: u64 host_addr IN; u64 dev_bus_addr (unused); u32 handle IN; s16 status OUT; u16 pad
    gnttab_transfer         24 bytes: u64 mfn IN @0; u16 domid IN @8; u32 ref IN @12; s16 status OUT @16
    gnttab_copy             40 bytes: source @0, dest @16, each u64 ref or own mfn, u16 domid @8, u16 offset @10;
                                      u16 len @32, u16 flags @34 (1 source is a ref, 2 dest is); s16 status OUT @36

A frame that is a page table can be granted for reading alone. To take a frame by transfer, a domain writes an entry
ACCEPT_TRANSFER whose domid is the giver's; TRANSFER_COMPLETED says that the entry's frame is now its own, with its contents.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

from hypervisor.public.hypercall import OP_GRANT_TABLE, Hypercall
from hypervisor.public.types import U16, U32, U64

ENTRY = struct.Struct("<HHI")
MAP_REF = struct.Struct("<QIIHhIQ")
UNMAP_REF = struct.Struct("<QQIhH")
TRANSFER = struct.Struct("<QHxxIhxxxxxx")
COPY = struct.Struct("<QHH4xQHH4xHHhxx")
assert (MAP_REF.size, UNMAP_REF.size, TRANSFER.size, COPY.size) == (32, 24, 24, 40)

GREF_CONSOLE = 0
GREF_XENSTORE = 1
NR_RESERVED_ENTRIES = 8


class Gtf(IntFlag):
    """Flags of an entry. The guest sets type and READONLY; READING and WRITING are the hypervisor's, while it is mapped."""

    INVALID = 0
    PERMIT_ACCESS = 1
    ACCEPT_TRANSFER = 2
    TYPE_MASK = 3
    READONLY = 4
    TRANSFER_COMMITTED = 4  # of an ACCEPT_TRANSFER entry: a frame is on its way
    TRANSFER_COMPLETED = 8  # of an ACCEPT_TRANSFER entry: it is there
    READING = 8
    WRITING = 16


class MapFlags(IntFlag):
    """How GrantMap maps: HOST_MAP always (GNTMAP_host_map), READONLY where only that was granted or wanted."""

    HOST_MAP = 2
    READONLY = 4


class GrantStatus(IntEnum):
    """Status of one entry of a map or unmap array (GNTST_*); below 0 that entry changed nothing."""

    OKAY = 0
    GENERAL_ERROR = -1
    BAD_DOMAIN = -2
    BAD_GNTREF = -3
    BAD_HANDLE = -4
    BAD_VIRT_ADDR = -5
    NO_DEVICE_SPACE = -7
    PERMISSION_DENIED = -8
    BAD_PAGE = -9  # a transfer of a frame that cannot leave
    BAD_COPY_ARG = -10
    ADDRESS_TOO_BIG = -11
    EAGAIN = -12
    NO_SPACE = -13  # a transfer to a domain that owns its maximum


class QuerySizeReply(NamedTuple):
    """Size of a grant table in frames: now, and at most."""

    nr_frames: int
    max_nr_frames: int


class GrantMap(Hypercall[int]):
    """Map `count` grants described at guest-virtual `address`. Any domain. Returns how many have status 0.

    Each entry has a status of its own (GrantStatus); a bad entry changes nothing and the rest goes on. host_addr must be
    page-aligned, in [GRANT_BASE, HYPERVISOR_VIRT_START), and free. Raises BadAddress (the array), TooBig (MAX_BATCH).
    """

    OP, CMD = OP_GRANT_TABLE, 0
    address: U64
    count: U32


class GrantUnmap(Hypercall[int]):
    """Unmap `count` handles described at guest-virtual `address`; returns how many have status 0. Raises as GrantMap."""

    OP, CMD = OP_GRANT_TABLE, 1
    address: U64
    count: U32


class GrantSetupTable(Hypercall[None]):
    """Write the mfns of the table of `domid` (another's: dom0 only), `nr_frames` of them, at `address` as u64.

    The table is where it is from the beginning; this is for kernels that ask. Raises NoSuchDomain, NotPermitted,
    Invalid (more frames than GRANT_FRAMES), BadAddress.
    """

    OP, CMD = OP_GRANT_TABLE, 2
    domid: U16
    nr_frames: U32
    address: U64


class GrantTransfer(Hypercall[int]):
    """Give the `count` frames described at guest-virtual `address` to other domains: a page flip. Returns how many went.

    Each entry has a status of its own: BAD_PAGE for a frame that cannot leave (as DecreaseReservation), BAD_DOMAIN,
    BAD_GNTREF (no ACCEPT_TRANSFER entry for us), NO_SPACE. Raises BadAddress, TooBig (MAX_BATCH).
    """

    OP, CMD = OP_GRANT_TABLE, 4
    address: U64
    count: U32


class GrantCopy(Hypercall[int]):
    """Copy bytes between frames, the caller's own or granted to it, as the `count` records at `address` say.

    Nothing is mapped. Each record has a status of its own, and offset + len must stay within a frame. Returns how many
    have status 0. Raises BadAddress, TooBig (MAX_BATCH).
    """

    OP, CMD = OP_GRANT_TABLE, 5
    address: U64
    count: U32


class GrantQuerySize(Hypercall[QuerySizeReply]):
    """Frames of the grant table of `domid` (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_GRANT_TABLE, 6
    domid: U16

    @classmethod
    def result(cls, values: list[Any]) -> QuerySizeReply:
        return QuerySizeReply(*values)
