"""How much of the hypervisor's time a domain may take from the others: a token bucket of nanoseconds, refilled at SHARE.

A domain that waits for each answer and asks for little pays with its own waiting: the first FREE_NS of such a call are not
charged. What is longer, and everything of a domain that does not wait for its answers, is. Whoever has overdrawn is not
listened to until the bucket has refilled, but only while somebody else wants something: time that nobody wants is free.
Round robin alone would give two domains with long calls all but a few percent of the machine.
"""

from __future__ import annotations

import time

SHARE = 0.05  # of one CPU
BURST_NS = 2_000_000
FREE_NS = 15_000
HASTE_NS = 5_000  # nobody can have slept, woken and asked again in less
HASTY_NS = 1_000_000  # so long is a domain that did not wait taken for one that does not
WANTED_NS = 5_000_000  # somebody else who asked so long ago is still there


class Budget:
    """One domain's bucket. Times are CLOCK_MONOTONIC in ns."""

    __slots__ = ("_answered", "_hasty", "_stamp", "_tokens")

    def __init__(self) -> None:
        self._tokens, self._stamp = BURST_NS, 0
        self._answered = self._hasty = 0

    def charge(self, begin: int, end: int) -> int:
        """A call ran from `begin` to `end`; returns how long the domain has to refill, 0 if it has not overdrawn."""
        if begin - self._answered < HASTE_NS:
            self._hasty = end
        free = 0 if end - self._hasty < HASTY_NS else FREE_NS
        self._answered = end
        tokens = min(BURST_NS, self._tokens + int((end - self._stamp) * SHARE))
        tokens -= max(0, end - begin - free)
        self._tokens, self._stamp = max(tokens, -BURST_NS), end
        return int(-tokens / SHARE) if tokens < 0 else 0


class Demand:
    """Who asked last: whether anybody but a given domain wants the hypervisor."""

    def __init__(self) -> None:
        self._last: tuple[object, int] = (None, 0)
        self._before: tuple[object, int] = (None, 0)

    def asked(self, domain: object, now: int) -> None:
        if self._last[0] is not domain:
            self._before = self._last
        self._last = (domain, now)

    def others(self, domain: object) -> bool:
        """Somebody else asked within WANTED_NS."""
        _, when = self._before if self._last[0] is domain else self._last
        return time.monotonic_ns() - when < WANTED_NS
