"""Who runs next: Borrowed Virtual Time, and caps. Nothing here touches a process or a clock; times are ns, given by the caller.

A domain's virtual time goes on while it runs, the slower the more weight it has; the domains of least effective virtual time
run. Source: Duda and Cheriton, SOSP'99; SOSP'03 section 3.3.1.

    weight     its virtual time goes WEIGHT / weight as fast as its CPU clock. One that is worth more than a CPU counts for
               what a CPU is worth: its virtual time would stay behind for ever, and it would be owed what nobody can give
    allowance  a running domain stays until it is ALLOWANCE_NS (of its own running) beyond the next one: the switch is paid for
    warp       a domain that is woken is looked at as if it were `warp` earlier, until it sleeps again or has run `warp_limit`
               so; it is not warped again within `unwarp`. It gets no more CPU for it, since what it runs is charged: it is
               ahead of its share by `warp` at most
    cap        percent of one CPU that it gets at most, though nobody else wants it: a bucket of CAP_PERIOD_NS, refilled. Who
               waits for it to fill is owed nothing for that
    demand     the part of a CPU that it would use. A domain that sleeps much leaves room: the next one is let run beside it

A domain that slept gets no credit for it: on waking, its virtual time is at least that of whoever is furthest behind. Weights
that a machine can give: Chandra et al., OSDI'00, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

WEIGHT = 256
ALLOWANCE_NS = 5_000_000
CAP_PERIOD_NS = 30_000_000
LAG_NS = 50_000_000  # of virtual time, that one which sleeps a little may be behind
FULL = 0.75  # of a CPU: what is used beyond that leaves no room for another


@dataclass(frozen=True)
class Params:
    """What dom0 sets. Times in microseconds, 0: no cap, no limit, no wait."""

    weight: int = WEIGHT
    cap: int = 0
    warp_us: int = 10_000
    warp_limit_us: int = 0
    unwarp_us: int = 0


class Share:
    """One domain's account."""

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or Params()
        self.rate = self.params.weight  # what its weight counts for
        self.virtual = 0
        self.demand = 1.0
        self.warping = False
        self._warped = 0  # run since it was warped
        self._unwarped_at = -(1 << 62)
        self._credit, self._refilled_at = 0, -1

    def set(self, **changes: int) -> None:
        self.params = replace(self.params, **changes)
        self.rate = self.params.weight
        self._refilled_at = -1

    # ---- what it ran, and when it slept

    def charge(self, ran: int, now: int) -> None:
        self.virtual += ran * WEIGHT // self.rate
        if self.params.cap:
            self._refill(now)
            self._credit -= ran
        if self.warping and self.params.warp_limit_us:
            self._warped += ran
            if self._warped >= self.params.warp_limit_us * 1000:
                self.unwarp(now)

    def catch_up(self, others: Iterable[Share], lag: int = 0) -> None:
        """It slept, or was not there: that is no credit, beyond `lag`. `others`: those that want to run."""
        first = min((other.virtual for other in others if other is not self), default=self.virtual)
        self.virtual = max(self.virtual, first - lag)

    def wake(self, now: int, others: Iterable[Share]) -> None:
        """It wants to run again."""
        self.catch_up(others)
        if self.params.warp_us and now - self._unwarped_at >= self.params.unwarp_us * 1000:
            self.warping, self._warped = True, 0

    def unwarp(self, now: int) -> None:
        """It sleeps, or had its time."""
        if self.warping:
            self.warping, self._unwarped_at = False, now

    # ---- what it may

    @property
    def effective(self) -> int:
        return self.virtual - (self.params.warp_us * 1000 if self.warping else 0)

    def within_cap(self, now: int) -> bool:
        if not self.params.cap:
            return True
        self._refill(now)
        return self._credit > 0

    def _refill(self, now: int) -> None:
        full = CAP_PERIOD_NS * self.params.cap // 100
        if self._refilled_at < 0:
            self._credit, self._refilled_at = full, now
        self._credit = min(full, self._credit + (now - self._refilled_at) * self.params.cap // 100)
        self._refilled_at = now


def settle(wanting: list[Share], nr_cpus: int, now: int) -> None:
    """Before a choice: nobody counts for more than it can get, nor is it owed what it could not have had.

    The heaviest is worth more than a CPU if its part of all weights is more than a CPU's part of all CPUs. Then it has one to
    itself, and the rest share the others likewise.
    """
    order = sorted(wanting, key=lambda share: -share.params.weight)
    rest, left = sum(share.params.weight for share in order), nr_cpus
    heavy = 0
    for share in order:
        if left <= 1 or share.params.weight * left <= rest:
            break
        rest, left, heavy = rest - share.params.weight, left - 1, heavy + 1
    light = order[heavy:]
    worth = rest // left if light else min((share.params.weight for share in order), default=1)
    for share in order[:heavy]:
        share.rate = max(1, worth)
    for share in light:
        share.rate = share.params.weight
    free = [share for share in wanting if share.within_cap(now)]
    for share in wanting:
        if share not in free:
            share.catch_up(free, LAG_NS)


def choose(
    wanting: Iterable[Share], running: dict[Share, int], cpus: dict[Share, frozenset[int]], now: int
) -> dict[Share, int]:
    """Who runs, and on which CPU: the least effective virtual time first, each where it runs already if it can.

    `running`: where those run that do; `cpus`: where each may.
    """
    order = sorted((share for share in wanting if share.within_cap(now)), key=lambda share: _claim(share, share in running))
    load: dict[int, float] = {}
    chosen: dict[Share, int] = {}
    for share in order:
        free = [cpu for cpu in cpus[share] if load.get(cpu, 0.0) < FULL]
        if free:
            at = running.get(share, -1)
            cpu = at if at in free else min(free, key=lambda cpu: (load.get(cpu, 0.0), cpu))
            load[cpu] = load.get(cpu, 0.0) + share.demand
            chosen[share] = cpu
    return chosen


def _claim(share: Share, runs: bool) -> int:
    return share.effective - (ALLOWANCE_NS * WEIGHT // share.rate if runs else 0)
