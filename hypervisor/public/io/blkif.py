"""Virtual block devices (xen/include/public/io/blkif.h, x86-64), one page of ring: 32 entries of 112 bytes.

    request  112 bytes: u8 operation @0, u8 nr_segments @1, u16 handle @2, u64 id @8, u64 sector_number @16,
             11 segments of 8 bytes @24: u32 gref @0, u8 first_sect @4, u8 last_sect @5 (inclusive, 0..7)
    response  16 bytes: u64 id @0, u8 operation @8, s16 status @10

    frontend's keys                                 backend's keys
    ring-ref, event-channel, protocol               sectors (512 bytes each), sector-size, info (4: read-only),
    feature-persistent                              feature-flush-cache, feature-persistent
    virtual-device (the toolstack)                  mode, params, extents, frontend, frontend-id (the toolstack)

READ sees every WRITE acknowledged before. An acknowledged WRITE is in the host's page cache: it survives every process of
ring1, not a power loss. FLUSH answered 0: every WRITE acknowledged before it was submitted is on stable storage. What is
not listed in `features` is answered EOPNOTSUPP, never silently.
"""

from __future__ import annotations

import struct
from enum import IntEnum

SECTOR = 512
SECTORS_PER_PAGE = 8
MAX_SEGMENTS = 11
HEAD = struct.Struct("<BBH4xQQ")
SEGMENT = struct.Struct("<IBB2x")
RESPONSE = struct.Struct("<QBxh4x")
REQUEST_BYTES, RESPONSE_BYTES = 112, 16
assert HEAD.size + MAX_SEGMENTS * SEGMENT.size == REQUEST_BYTES and RESPONSE.size == RESPONSE_BYTES

MAX_SECTORS = MAX_SEGMENTS * SECTORS_PER_PAGE  # of one request
INFO_READONLY = 4
XVDA = 51712  # 202 << 8; xvdb is 16 on


class BlkOp(IntEnum):
    """Operations that are served (BLKIF_OP_*); any other number is answered EOPNOTSUPP."""

    READ = 0
    WRITE = 1
    FLUSH = 3


class BlkStatus(IntEnum):
    """Status of a response (BLKIF_RSP_*)."""

    OKAY = 0
    ERROR = -1
    EOPNOTSUPP = -2


def vdev(name: str) -> int:
    """The device number of "xvda".."xvdz". Raises ValueError."""
    if len(name) == 4 and name.startswith("xvd") and "a" <= name[3] <= "z":
        return XVDA + 16 * (ord(name[3]) - ord("a"))
    raise ValueError(f"{name}: a virtual disk is called xvda to xvdz")
