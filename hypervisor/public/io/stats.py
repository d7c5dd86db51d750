"""A driver domain's statistics page: 64 rows of 64 bytes, written by its movers, granted read-only to dom0.

    0 u16 domid of the frontend (0: the row is free)   2 u16 kind (1 vbd, 2 vif)   4 u32 handle
    kind 1: u64 rd_bytes, wr_bytes, requests, batches, notifies, errors, occupancy (most requests taken at once)
    kind 2: u64 tx_bytes, rx_bytes, tx_packets, batches, notifies, dropped, rx_packets
"""

from __future__ import annotations

import struct
from enum import IntEnum

ROW = struct.Struct("<HHI7Q")
NR_ROWS = 64
assert ROW.size == 64

NAMES = {
    1: ("rd_bytes", "wr_bytes", "requests", "batches", "notifies", "errors", "occupancy"),
    2: ("tx_bytes", "rx_bytes", "tx_packets", "batches", "notifies", "dropped", "rx_packets"),
}


class StatsKind(IntEnum):
    """What a row counts: its seven words are NAMES[kind]."""

    VBD = 1
    VIF = 2


def rows(page: bytes) -> list[dict[str, int]]:
    """The rows in use of a copied page."""
    out = []
    for domid, kind, handle, *values in ROW.iter_unpack(page):
        if kind in NAMES:
            out.append({"domid": domid, "kind": kind, "handle": handle, **dict(zip(NAMES[kind], values, strict=True))})
    return out
