"""The guest's end of its hypercall ring: many calls for one trap, or for none while the hypervisor is awake.

    ring = CallRing(kernel)
    results = ring([EvtchnSend(port), XenVersion()])        a result each; minus a status where a call was refused
    answers = ring.run(packed)                              64 bytes an entry in, 16 an answer out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from domain._guest import ffi, lib
from hypervisor.public.callring import ANSWER, ANSWER_BYTES, ENTRY, ENTRY_BYTES, CallringKick, CallringSetup
from hypervisor.public.hypercall import WITH_CMD, Hypercall
from hypervisor.public.types import PAGE_SIZE
from ringlib.ring import Broken, FrontRing

if TYPE_CHECKING:
    from domain.kernel import Kernel


class CallRing:
    """One a domain: the hypervisor refuses a second."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        page = kernel.memory.alloc(1)
        self._front = FrontRing(page.address, PAGE_SIZE, ENTRY_BYTES, ANSWER_BYTES)
        self._pushed: Any = ffi.new("uint32_t *")
        self._answered: Any = ffi.new("uint32_t *")
        self._spin: Any = ffi.new("struct spin *")
        self.doorbells = 0
        kernel.hypercall(CallringSetup(page.va))

    def __call__(self, calls: Sequence[Hypercall[Any]]) -> list[int]:
        """Run them in order. Raises ValueError for one that does not fit in words."""
        return [result for _, result in ANSWER.iter_unpack(self.run(b"".join(map(packed, calls))))]

    def run(self, entries: bytes | bytearray) -> bytes:
        """Run packed entries, in order; the packed answers. Raises Broken (the hypervisor does not do that)."""
        count = len(entries) // ENTRY_BYTES
        answers: Any = ffi.new("char[]", count * ANSWER_BYTES)
        self._pushed[0] = self._answered[0] = 0
        source = ffi.from_buffer(entries)
        progress = self._pushed, answers, self._answered, self._spin
        while state := lib.callring_round(self._front.state, source, count, *progress):
            if state < 0:
                raise Broken("the hypervisor's answer index cannot be")
            self.doorbells += 1
            self._kernel.hypercall(CallringKick())
        return bytes(ffi.buffer(answers, count * ANSWER_BYTES))


def packed(call: Hypercall[Any]) -> bytes:
    """One multicall entry. Raises ValueError for a call with text or bytes."""
    if call.LIMITS is None:
        raise ValueError(f"{type(call).__name__} does not fit in words")
    words = [call.CMD, *msgspec.structs.astuple(call)] if call.OP in WITH_CMD else list(msgspec.structs.astuple(call))
    return ENTRY.pack(call.OP, 0, *words, *[0] * (6 - len(words)))
