"""The hypercall ring, the hypervisor's end. Rules in hypervisor/public/callring.py.

Event sends run in C, a batch at a time; every other entry goes through the one handler that a message reaches. The ring is
drained by its doorbell, or, while its guest keeps it busy, by the loop that looks at it before it sleeps: a look costs a
load, a doorbell two system calls and a wake-up.
"""

from __future__ import annotations

import struct
import time
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from hypervisor import budget, evtchn, guest_access
from hypervisor._hv import ffi, lib
from hypervisor.dispatch import hypercall, result_word, run_entry
from hypervisor.domain import Domain
from hypervisor.loop import Steps
from hypervisor.public import callring as abi
from hypervisor.public.errors import BadAddress, Exists, Invalid, XenError
from hypervisor.public.evtchn import EvtchnSend
from hypervisor.public.hypercall import OP_EVENT_CHANNEL
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

SPIN_NS: int = lib.SPIN_NS
MAX_LOOKS = 64  # rings looked at together
SEND = struct.pack("<QqQ", OP_EVENT_CHANNEL, 0, EvtchnSend.CMD)  # how an entry that is C's begins
TURN = 64  # batches of 32 before everybody else has a turn


class CallRing:
    """One domain's ring in its frame at `page`, which is held; `c` is what the C kernel knows of it."""

    def __init__(self, page: Any) -> None:
        self.c: Any = ffi.new("struct callring *")
        self.entries: Any = ffi.buffer(self.c.entries)  # our copies, not the guest's page
        self.draining = False
        self.missed = False  # it was owed a look that its domain could not be given
        lib.callring_attach(self.c, page)


class BusyRings:
    """Rings whose guests were not told to ring: the loop owes each a look before it sleeps."""

    def __init__(self) -> None:
        self.owed: dict[Domain, None] = {}
        self._spin: Any = ffi.new("struct spin *")
        self._pointers: Any = ffi.new("struct callring *[]", MAX_LOOKS)

    def stay_awake(self, domain: Domain) -> bool:
        """True: it is owed a look, and its guest need not ring. By the rule of spin.h: looks that found nothing make the next
        ones rarer, and there is none for a guest on our own CPU."""
        if len(self.owed) >= MAX_LOOKS or not lib.callring_worth(domain.callring.c, self._spin):
            return False
        self.owed[domain] = None
        return True

    def catch_up(self, domain: Domain) -> None:
        """It may be served again: the look that it could not be given is owed anew."""
        if domain.callring is not None and domain.callring.missed:
            domain.callring.missed = False
            self.owed[domain] = None

    def look(self) -> Domain | None:
        """Spin over the rings that are owed it: whose has work. None: all were told to ring, nobody is owed anything."""
        for domain in [domain for domain in self.owed if not domain.may_call]:
            del self.owed[domain]
            domain.callring.missed = True
        ready = list(self.owed)
        for i, domain in enumerate(ready):
            self._pointers[i] = domain.callring.c
        found = lib.callring_spin(self._pointers, len(ready), self._spin) if ready else -1
        if found >= 0:
            del self.owed[ready[found]]
            return ready[found]
        while self.owed:
            domain, _ = self.owed.popitem()
            if lib.callring_recheck(domain.callring.c):
                return domain
        return None


@hypercall(abi.CallringSetup)
def setup(hv: Hypervisor, caller: Domain, call: abi.CallringSetup) -> None:
    mfn = guest_access.translate(hv, caller, call.address, write=True)
    if call.address % PAGE_SIZE:
        raise BadAddress(f"guest address {call.address:#x}")
    if caller.callring is not None:
        raise Exists("a hypercall ring")

    hv.hold(caller, mfn)
    caller.callring = CallRing(hv.machine.pointer(mfn))


@hypercall(abi.CallringKick)
def kick(hv: Hypervisor, caller: Domain, call: abi.CallringKick) -> Steps:
    if caller.callring is None or caller.callring.draining:
        raise Invalid("no hypercall ring, or asked from within it")

    yield from drain(hv, caller, 0)


def drain(hv: Hypervisor, caller: Domain, spin_ns: int) -> Steps:
    """Answer what is there and what comes within `spin_ns`. For a doorbell that is 0: its guest waits for our reply,
    and is owed a look afterwards."""
    ring: CallRing = caller.callring
    ring.draining = True
    begin = time.monotonic_ns()
    try:
        while caller.alive:
            left = lib.callring_run(ring.c, hv.ends, caller.domid, spin_ns, TURN)
            for i in range(ring.c.nr_signals):
                evtchn.deliver(hv, caller, ring.c.signals[i])
            ring.c.nr_signals = 0
            if left > 0:
                yield from _run_others(hv, caller, ring)
                begin = yield from budget.take_turns(hv, caller, begin)
            elif left < 0:
                caller.fail("violated its hypercall ring: an index that cannot be")
            elif ring.c.taken:
                yield budget.turn(hv, caller)
            elif (not spin_ns and hv.busy_rings.stay_awake(caller)) or not lib.callring_recheck(ring.c):
                return
    finally:
        ring.draining = False


def _run_others(hv: Hypervisor, caller: Domain, ring: CallRing) -> Steps:
    """The entry that C left to us, and those after it up to the next event send, through the handlers of messages."""
    first = ring.c.next
    for at in range(first, ring.c.taken):
        entry = ring.entries[at * abi.ENTRY_BYTES : (at + 1) * abi.ENTRY_BYTES]
        if at > first and entry.startswith(SEND):
            return
        try:
            outcome = run_entry(hv, caller, entry)
            if type(outcome) is GeneratorType:
                outcome = yield from outcome
            result = result_word(outcome)
        except XenError as error:
            result = -error.errno
        if not caller.alive:
            return
        lib.callring_answer(ring.c, result)
