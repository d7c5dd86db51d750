"""Virtual interfaces (xen/include/public/io/netif.h): a transmit and a receive ring of one page each, 256 entries.

    tx request  12 bytes: u32 gref @0, u16 offset @4, u16 flags @6, u16 id @8, u16 size @10
    tx response  4 bytes: u16 id @0, s16 status @2
    rx request   8 bytes: u16 id @0, u32 gref @4
    rx response  8 bytes: u16 id @0, u16 offset @2, u16 flags @4, s16 status @6 (> 0: bytes)

    frontend's keys                                     backend's keys
    tx-ring-ref, rx-ring-ref, event-channel,            feature-rx-copy
    request-rx-copy                                     handle, mac, ip, frontend, frontend-id (the toolstack)
    handle, mac, ip, mtu (the toolstack)

One event channel serves both rings. A frame lies in one page; MORE_DATA and EXTRA_INFO are answered with ERROR. A frame
that the firewall refused, or that found no buffer, is answered DROPPED and OKAY respectively: the sender of a dropped
frame learns of policy, not of its receiver's state.
"""

from __future__ import annotations

import struct
from enum import IntEnum

TX_REQUEST = struct.Struct("<IHHHH")
TX_RESPONSE = struct.Struct("<Hh")
RX_REQUEST = struct.Struct("<HxxI")
RX_RESPONSE = struct.Struct("<HHHh")
assert (TX_REQUEST.size, TX_RESPONSE.size, RX_REQUEST.size, RX_RESPONSE.size) == (12, 4, 8, 8)

MIN_FRAME, MAX_FRAME = 14, 1514
MTU = 1500


class NetStatus(IntEnum):
    """Status of a transmit response (NETIF_RSP_*); a receive response has the frame's bytes instead, or ERROR."""

    OKAY = 0
    ERROR = -1
    DROPPED = -2
