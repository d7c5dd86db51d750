"""The trap into the hypervisor: one request out, its reply in."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from domain._guest import ffi, lib
from hypervisor.public.errors import from_status
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.types import MESSAGE_BYTES

R = TypeVar("R")
_decode = msgspec.msgpack.Decoder(list).decode


class Trap:
    """This domain's queue pair."""

    def __init__(self, request_mqd: int, reply_mqd: int) -> None:
        self._request, self._reply = request_mqd, reply_mqd
        self._answer: Any = ffi.new("char[]", MESSAGE_BYTES)
        self._sequence = 0
        self.count = 0

    def __call__(self, request: Hypercall[R]) -> R:
        """Perform `request`; raises the XenError of its status."""
        self._sequence = sequence = (self._sequence + 1) & 0xFFFFFFFF
        self.count += 1
        message = request.encode(sequence)
        size = lib.hypercall_trap(self._request, self._reply, message, len(message), self._answer, MESSAGE_BYTES)
        if size < 0:
            raise OSError(-size, "the hypercall queue")
        reply = _decode(ffi.buffer(self._answer, size))
        if reply[0] != sequence:
            raise AssertionError(f"reply {reply[0]} to hypercall {sequence}")
        if reply[1]:
            raise from_status(reply[1])
        result: R = request.result(reply[2:])
        return result
