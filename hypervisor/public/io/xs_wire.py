"""The store's wire protocol (xen/include/public/io/xs_wire.h): messages over two byte rings in one page.

    header  u32 type, u32 req_id, u32 tx_id, u32 len; then len bytes
    page    req[1024] @0  rsp[1024] @1024  u32 req_cons @2048, req_prod @2052, rsp_cons @2056, rsp_prod @2060

A reply has its request's type, req_id and tx_id, or type ERROR with the errno's name. Paths are [A-Za-z0-9-/_@.:],
absolute or relative to /local/domain/<domid>. Limits: a payload of 4096 bytes, an absolute path of 3072, relative 2048.
"""

from __future__ import annotations

import struct
from enum import IntEnum

HEADER = struct.Struct("<IIII")
RING_BYTES = 1024
REQ, RSP = 0, 1024
REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = 2048, 2052, 2056, 2060
PAYLOAD_MAX = 4096
ABS_PATH_MAX = 3072
REL_PATH_MAX = 2048


class XsType(IntEnum):
    """Message types that drivers use."""

    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
