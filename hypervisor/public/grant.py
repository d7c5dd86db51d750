"""Grant tables v1: a domain lets one other domain map one of its frames.

Entry, 8 bytes, in the granter's own frames GRANT_PFN.. (xen/include/public/grant_table.h):

    0 u16 flags   [DOM] type, GTF_READONLY      [HV] GTF_READING, GTF_WRITING while mapped
    2 u16 domid   [DOM] who may map
    4 u32 frame   [DOM] PSEUDO-physical frame number (a guest of ring1 names its own frames; Xen has the mfn here)

To grant: write domid and frame, barrier, write flags. To end: clear flags by compare-and-swap, which fails while
GTF_READING or GTF_WRITING is set. The hypervisor decides from the entry it copied at map time, never from later reads.
Entries 0 (console) and 1 (xenstore) are filled by the builder; 2..7 are reserved.

map and unmap take arrays in guest memory:

    gnttab_map_grant_ref    32 bytes: u64 host_addr IN guest-virtual; u32 flags IN; u32 ref IN; u16 dom IN; s16 status OUT;
                                      u32 handle OUT; u64 dev_bus_addr OUT (the mfn)
    gnttab_unmap_grant_ref  24 bytes: u64 host_addr IN; u64 dev_bus_addr (unused); u32 handle IN; s16 status OUT; u16 pad
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

GREF_CONSOLE = 0
GREF_XENSTORE = 1
NR_RESERVED_ENTRIES = 8


class Gtf(IntFlag):
    """Flags of an entry. The guest sets type and READONLY; READING and WRITING are the hypervisor's, while it is mapped."""

    INVALID = 0
    PERMIT_ACCESS = 1
    TYPE_MASK = 3
    READONLY = 4
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


class GrantQuerySize(Hypercall[QuerySizeReply]):
    """Frames of the grant table of `domid` (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_GRANT_TABLE, 6
    domid: U16

    @classmethod
    def result(cls, values: list[Any]) -> QuerySizeReply:
        return QuerySizeReply(*values)
