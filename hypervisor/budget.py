"""How much of the hypervisor's time a domain may take from the others: a token bucket of nanoseconds, refilled at SHARE.

A domain on our own CPU that waits for each answer and asks for little pays with its own time: while we serve it, it does not
run. The first FREE_NS of such a call are not charged. What is longer is, and everything of a domain that does not wait for
its answers, or that runs on another CPU and takes this one from whoever is here. Whoever has overdrawn is not listened to
until the bucket has refilled, but only while somebody else wants something: time that nobody wants is free. Round robin
alone would give two domains with long calls all but a few percent of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.04  # of one CPU
BURST_NS = 2_000_000
OVERHEAD_NS = 12_000  # of a call beyond its handler: our waking, the look at the queues, the reply, two switches
FREE_NS = 30_000
HASTE_NS = 5_000  # nobody can have slept, woken and asked again in less
HASTY_NS = 1_000_000  # so long is a domain that did not wait taken for one that does not
NEAR_NS = 10_000_000  # how long a look at where it runs is believed
WANTED_NS = 5_000_000  # somebody else who asked so long ago is still there


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
        if end - self._looked >= NEAR_NS:
            self._near, self._looked = self._is_near(), end
        free = FREE_NS if self._near and end - self._hasty >= HASTY_NS else 0
        self._answered = end
        tokens = min(BURST_NS, self._tokens + int((end - self._stamp) * SHARE))
        tokens -= max(0, end - begin + OVERHEAD_NS - free)
        self._tokens, self._stamp = max(tokens, -BURST_NS), end
        return int(-self._tokens / SHARE) if tokens < 0 else 0


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
