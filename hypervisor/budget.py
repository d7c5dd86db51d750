"""How much of the hypervisor's time a domain may take from the others: a token bucket of nanoseconds, refilled at SHARE.

A domain on our own CPU that waits for each answer and asks for little pays with its own time: while we serve it, it does not
run. The first FREE_NS of such a call are not charged. What is longer is, and everything of a domain that does not wait for
its answers, or that runs on another CPU and takes this one from whoever is here. Whoever has overdrawn is not listened to
until the bucket has refilled, and a call of its that is under way stops where it gives others a turn; but only while
somebody else wants something: time that nobody wants is free. Round robin alone would give two domains with long calls all
but a few percent of the machine.

Hypercalls and page faults are charged alike: `charge` and `charged` are what their servers call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypervisor.loop import Resume, Steps, Wait
from hypervisor.public.domctl import CreateFlags

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor
    from hypervisor.domain import Domain

SHARE = 0.02  # of one CPU
BURST_NS = 2_000_000
OVERHEAD_NS = 12_000  # of a call beyond its handler: our waking, the look at the queues, the reply, two switches
FREE_NS = 30_000
HASTE_NS = 5_000  # nobody can have slept, woken and asked again in less
HASTY_NS = 1_000_000  # so long is a domain that did not wait taken for one that does not
NEAR_NS = 10_000_000  # how long a look at where it runs is believed
TURN_NS = 200_000  # of a list of things to do, before others have a turn
WANTED_NS = 5_000_000  # somebody else who asked so long ago is still there
GAP_NS = 100_000  # between two that had overdrawn and may ask again
MAX_ASKED = 64  # domains whose last asking is remembered


class Budget:
    """One domain's bucket. Times are CLOCK_MONOTONIC in ns."""

    __slots__ = ("_answered", "_hasty", "_is_near", "_looked", "_near", "_stamp", "_tokens")

    def __init__(self, is_near: Callable[[], bool]) -> None:
        self._tokens, self._stamp = BURST_NS, 0
        self._answered = self._hasty = 0
        self._is_near, self._near, self._looked = is_near, False, -NEAR_NS

    def charge(self, begin: int, end: int) -> int:
        """A call ran from `begin` to `end`; returns how long the domain has to refill, 0 if it has not overdrawn."""
        if begin - self._answered < HASTE_NS:
            self._hasty = end
        self._answered = end
        if end - self._looked >= NEAR_NS:
            self._near, self._looked = self._is_near(), end
        cost = end - begin + OVERHEAD_NS
        if self._near and end - self._hasty >= HASTY_NS:
            cost -= FREE_NS
            if cost <= 0 <= self._tokens:
                return 0  # nearly every call; what was refilled meanwhile is counted when there is something to pay
        tokens = self._tokens + int((end - self._stamp) * SHARE)
        tokens = min(tokens, BURST_NS)
        if cost > 0:
            tokens -= cost
        tokens = max(tokens, -BURST_NS)
        self._tokens, self._stamp = tokens, end
        return int(-tokens / SHARE) if tokens < 0 else 0


class Demand:
    """Who asked lately, and at whose instance: whether anybody wants the hypervisor whom a given domain keeps from it.

    Two domains that do nothing but wake each other have no claim against each other: each asks only because the other did.
    Counted against each other they would both be parked, for something that costs no third one anything.
    """

    def __init__(self) -> None:
        self._asked: dict[Domain, tuple[int, Domain | None]] = {}  # when, and whose event woke it; the latest comes last
        self._last: Domain | None = None

    def asked(self, domain: Domain, now: int) -> None:
        if self._last is not domain:
            self._asked.pop(domain, None)  # to the end of the row
            self._last = domain
        self._asked[domain] = now, domain.woken_by
        domain.woken_by = None
        if len(self._asked) > MAX_ASKED:
            del self._asked[next(iter(self._asked))]

    def others(self, domain: Domain) -> bool:
        """Somebody else asked within WANTED_NS, and not because an event of the domain's had woken it."""
        since = time.monotonic_ns() - WANTED_NS
        for other, (when, woken_by) in reversed(self._asked.items()):
            if when <= since:
                return False
            if other is not domain and woken_by is not domain:
                return True
        return False


def charged(hv: Hypervisor, caller: Domain, steps: Steps, begin: int) -> Steps:
    """`steps`, with every step on the caller's bill before anything of its is sent: a receiver that wakes on this CPU
    would run on our clock."""
    value: Any = None
    wait: Wait
    while True:
        try:
            wait = steps.throw(value) if isinstance(value, BaseException) else steps.send(value)
        except StopIteration as stop:
            return stop.value
        finally:
            charge(hv, caller, begin)
        try:
            value = yield wait
        except BaseException as error:
            value = error
        begin = time.monotonic_ns()


def charge(hv: Hypervisor, caller: Domain, begin: int) -> None:
    """To its budget; whoever has overdrawn is parked while another domain wants something."""
    end = time.monotonic_ns()
    hv.demand.asked(caller, end)
    wait_ns = caller.budget.charge(begin, end)
    if not wait_ns or caller.parked or caller.privileged or caller.flags & CreateFlags.DRIVER:
        return
    if hv.demand.others(caller):
        caller.parked = True
        hv.loop.at(end + wait_ns, lambda: hv.gate.due(hv, caller))
        hv.listen(caller)


def turn(hv: Hypervisor, caller: Domain) -> Wait:
    """A Wait: let everybody else have a turn; who has overdrawn goes on when it is listened to again. Other things may have
    happened by then: the caller may be dead."""

    def wait(resume: Resume) -> None:
        if caller.parked:
            caller.held_up.append(resume)
        else:
            hv.loop.turn(resume)

    return wait


def take_turns(hv: Hypervisor, caller: Domain, begin: int) -> Steps:
    """Steps: a turn for others where the caller has had its own since `begin`. Returns since when it has one now."""
    if time.monotonic_ns() - begin < TURN_NS:
        return begin
    yield turn(hv, caller)
    return time.monotonic_ns()


class Gate:
    """Lets in whoever has refilled, GAP_NS apart: all that have overdrawn together hit a call of another one once, not each."""

    def __init__(self) -> None:
        self._due: deque[Domain] = deque()
        self._open_ns = 0

    def due(self, hv: Hypervisor, caller: Domain) -> None:
        self._due.append(caller)
        if len(self._due) == 1:
            self._wait(hv)

    def _wait(self, hv: Hypervisor) -> None:
        if self._open_ns <= time.monotonic_ns():
            self._let_in(hv)
        else:
            hv.loop.at(self._open_ns, lambda: self._let_in(hv))

    def _let_in(self, hv: Hypervisor) -> None:
        self._open_ns = time.monotonic_ns() + GAP_NS
        _unpark(hv, self._due.popleft())
        if self._due:
            self._wait(hv)


def _unpark(hv: Hypervisor, caller: Domain) -> None:
    caller.parked = False
    held_up, caller.held_up = caller.held_up, []
    for resume in held_up:
        hv.loop.turn(resume)
    hv.busy_rings.catch_up(caller)
    hv.listen(caller)
