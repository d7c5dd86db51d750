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
        self._posted = False  # the answer to the last call is still to be taken
        self.count = 0

    def __call__(self, request: Hypercall[R]) -> R:
        """Perform `request`; raises the XenError of its status."""
        message = self._next(request)
        size = lib.hypercall_trap(self._request, self._reply, message, len(message), self._answer, MESSAGE_BYTES)
        result: R = request.result(self._values(size))
        return result

    def post(self, request: Hypercall[None]) -> None:
        """Ask, and go on: whoever sleeps next is not woken for an answer that says nothing. For calls that are not refused;
        of one that was after all the next call tells, by raising its XenError."""
        message = self._next(request)
        error = lib.hypercall_post(self._request, message, len(message))
        if error:
            raise OSError(-error, "the hypercall queue")
        self._posted = True

    def settle(self) -> None:
        """Take the answer to what was posted, if it is still to come: whoever uses the queues himself begins with this."""
        if self._posted:
            self._posted = False
            self._values(lib.hypercall_answer(self._reply, self._answer, MESSAGE_BYTES))

    def _next(self, request: Hypercall[Any]) -> bytes:
        """Its message, once the answer to the last one is out of the way."""
        self.settle()
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self.count += 1
        return request.encode(self._sequence)

    def _values(self, size: int) -> list[Any]:
        """Of the answer that was taken."""
        if size < 0:
            raise OSError(-size, "the hypercall queue")
        sequence, status, *values = _decode(ffi.buffer(self._answer, size))
        if sequence != self._sequence:
            raise AssertionError(f"reply {sequence} to hypercall {self._sequence}")
        if status:
            raise from_status(status)
        return values
