"""Kinds of numbers and every limit of the interface, once, with unit and reason.

Interface:
  * NewTypes: a pfn where an mfn is wanted is a type error.
  * U16, U32, ...: annotations of hypercall fields; their width is checked when a call is decoded.

Source: xen/include/public/xen.h.
"""

from __future__ import annotations

from typing import Annotated, NewType

Domid = NewType("Domid", int)
Mfn = NewType("Mfn", int)
Pfn = NewType("Pfn", int)
Port = NewType("Port", int)
Gref = NewType("Gref", int)

PAGE_SIZE = 4096
PAGE_SHIFT = 12

DOMID_FIRST_RESERVED = 0x7FF0
DOMID_SELF = Domid(0x7FF0)
DOMID_INVALID = Domid(0x7FF4)

VIRQ_TIMER = 0
VIRQ_DEBUG = 1
VIRQ_CONSOLE = 2
VIRQ_DOM_EXC = 3
NR_VIRQS = 24

MESSAGE_BYTES = 256  # one hypercall message: 705 bytes of RLIMIT_MSGQUEUE a queue of two
MESSAGES = 2
NR_EVENT_CHANNELS = 4096  # the 2-level ABI on 64 bits
MAX_PORTS = 1024  # a domain may have this many bound at once
MAX_MAPTRACK = 8192  # grants a domain may have mapped at once
MAX_BATCH = 512  # entries of one array handed over by address
NAME_BYTES = 32  # a domain's name, UTF-8
INVALID_PFN = (1 << 64) - 1  # in the M2P: nobody named this frame
CONSOLE_BYTES = 200  # one console_io write carried in the message itself


class Bits:
    """Width of an integer field: 0 <= value < 2**bits."""

    def __init__(self, bits: int) -> None:
        self.bits = bits


class Text:
    """A UTF-8 string field of at most `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size


class Data:
    """A bytes field of at most `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size


U8 = Annotated[int, Bits(8)]
U16 = Annotated[int, Bits(16)]
U32 = Annotated[int, Bits(32)]
U64 = Annotated[int, Bits(64)]
