"""Time: the records that guests read without a call, timers beside the one-shot one, and where a domain's time went.

The rate of the cycle counter is measured against CLOCK_MONOTONIC between samples at least BASELINE_NS apart, so what a guest
computes is off by the jitter of two samples, some tens of ns, not by a drift. A new record goes on where the old one is at that
moment, and at the rate that meets the host's clock when the next one is due: guests' time has no steps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypervisor import evtchn
from hypervisor._hv import ffi, lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain, Process
from hypervisor.loop import Loop
from hypervisor.public import clock as abi
from hypervisor.public.clock import TIME_STABLE, RunState, RunStateInfo
from hypervisor.public.errors import Invalid
from hypervisor.public.types import VIRQ_TIMER

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

EVERY_NS = 500_000_000  # between two records; NTP slews CLOCK_MONOTONIC by 500 ppm at most, seldom by 1
BASELINE_NS = 1_000_000_000
LEAST_BASELINE_NS = 5_000_000  # two samples this close say the rate to 20 ppm
STEP_NS = 1000  # who is further behind catches up at once
VIRTUAL_LEAST_NS = 500_000  # between two looks at a CPU clock


def counter_is_clock() -> bool:
    """The host itself keeps time by the cycle counter: it counts alike on every CPU, and always."""
    try:
        return Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip() == "tsc"
    except OSError:
        return False


def scale(ns: int, tsc: int) -> tuple[int, int]:
    """(mul, shift) such that ns = (tsc << shift) * mul >> 32, mul of 32 bits with the highest one set."""
    shift = 0
    while ns >= tsc:
        tsc, shift = 2 * tsc, shift + 1
    while 2 * ns < tsc:
        ns, shift = 2 * ns, shift - 1
    return (ns << 32) // tsc, shift


class Clock:
    """The hypervisor's own: `boot_ns` is CLOCK_MONOTONIC at system time 0."""

    def __init__(self, loop: Loop, boot_ns: int) -> None:
        self._loop, self._boot_ns = loop, boot_ns
        self._stable = TIME_STABLE * counter_is_clock()
        self._since = self._sample()
        self._rate = (0, 0)  # ns, and the cycles that they took; nobody can say yet
        self.wall_ns = time.time_ns() - (time.monotonic_ns() - boot_ns)  # Unix time of system time 0
        self._domains: dict[int, Domain] = {}

    @staticmethod
    def _sample() -> tuple[int, int]:
        pair: Any = ffi.new("struct clock_pair *")
        lib.clock_sample(pair)
        return pair.tsc, pair.ns

    def _look(self) -> tuple[int, int]:
        """A sample, which also says the rate where it is the better one to do so."""
        new = tsc, ns = self._sample()
        baseline = ns - self._since[1]
        if baseline >= min(BASELINE_NS, max(LEAST_BASELINE_NS, self._rate[0])):
            self._rate = baseline, tsc - self._since[0]
        if baseline >= 2 * BASELINE_NS:
            self._since = new
        return new

    def serve(self, domains: dict[int, Domain]) -> None:
        """From now on, write the records of these again and again."""
        self._domains = domains
        self._again()

    def _again(self) -> None:
        for domain in self._domains.values():
            self.tell(domain)
        self._loop.at(time.monotonic_ns() + EVERY_NS, self._again)

    def tell(self, domain: Domain) -> None:
        """Its records, if it has a shared_info."""
        if not domain.shared_info:
            return
        tsc, ns = self._look()
        now, line = ns - self._boot_ns, domain.time
        ahead = lib.clock_at(line, tsc) - now
        if not self._rate[0]:
            line.tsc, line.ns, mul, shift = tsc, now, 0, 0
        else:
            if not line.mul or ahead < -STEP_NS:
                line.tsc, line.ns, ahead = tsc, now, 0
                line.mul, line.shift = scale(*self._rate)
            ahead = min(ahead, EVERY_NS // 2)
            mul, shift = scale(self._rate[0] * (EVERY_NS - ahead) // EVERY_NS, self._rate[1])
            line.stable = self._stable
        lib.clock_tell(domain.shared_info, line, mul, shift)
        lib.clock_tell_wall(domain.shared_info, self.wall_ns // 10**9, self.wall_ns % 10**9)


@hypercall(abi.SetTime)
def set_time(hv: Hypervisor, caller: Domain, call: abi.SetTime) -> None:
    wall_ns = call.sec * 10**9 + call.nsec - call.system_time
    if call.nsec >= 10**9 or wall_ns < 0:
        raise Invalid("no such time")

    hv.clock.wall_ns = wall_ns
    for domain in hv.domains.values():
        hv.clock.tell(domain)


# ---- timers


@hypercall(abi.SetPeriodicTimer)
def set_periodic(hv: Hypervisor, caller: Domain, call: abi.SetPeriodicTimer) -> None:
    if call.period_ns < abi.MIN_PERIOD_NS:
        raise Invalid(f"a period of {call.period_ns} ns: at least {abi.MIN_PERIOD_NS}")

    caller.stop_timer("periodic")
    _tick(hv, caller, time.monotonic_ns() + call.period_ns, call.period_ns)


def _tick(hv: Hypervisor, domain: Domain, due: int, period: int) -> None:
    """What was missed while nobody could run is not made up for: the guest sees one event either way."""

    def fire() -> None:
        evtchn.raise_virq(hv, domain, VIRQ_TIMER)
        now = time.monotonic_ns()
        _tick(hv, domain, due + period * max(1, -(-(now - due) // period)), period)

    domain.timers["periodic"] = hv.loop.at(due, fire)


@hypercall(abi.StopPeriodicTimer)
def stop_periodic(hv: Hypervisor, caller: Domain, call: abi.StopPeriodicTimer) -> None:
    caller.stop_timer("periodic")


@hypercall(abi.SetVirtualTimer)
def set_virtual(hv: Hypervisor, caller: Domain, call: abi.SetVirtualTimer) -> None:
    caller.stop_timer("virtual")
    if call.deadline_ns:
        _look_at_virtual(hv, caller, call.deadline_ns)


def _look_at_virtual(hv: Hypervisor, domain: Domain, deadline: int) -> None:
    """Virtual time is never faster than real time: what is left of it is the least that must pass before another look."""
    left = deadline - virtual_ns(domain)
    if left <= 0:
        evtchn.raise_virq(hv, domain, VIRQ_TIMER)
        return
    due = time.monotonic_ns() + max(left, VIRTUAL_LEAST_NS)
    domain.timers["virtual"] = hv.loop.at(due, lambda: _look_at_virtual(hv, domain, deadline))


# ---- accounts


def virtual_ns(domain: Domain) -> int:
    """What its processes have run."""
    return domain.users_cpu_ns + sum(map(_ran, (domain.process, *domain.programs)))


def _ran(process: Process | None) -> int:
    if process is None:
        return 0
    if process.ended:
        return process.cpu_ns
    try:
        return time.clock_gettime_ns((~process.pid << 3) | 2)
    except OSError:
        return 0


def run_state(domain: Domain) -> RunStateInfo:
    """Since its launch. What waited for a CPU is known to the host alone (schedstat), or the scheduler had it
    stopped; what is left over was spent asleep."""
    if not domain.launched:
        return RunStateInfo(RunState.OFFLINE, 0, 0, 0, 0)
    now = time.monotonic_ns()
    elapsed = now - domain.launched_ns
    offline = min(elapsed, domain.offline_ns + (now - domain.paused_ns if domain.paused_ns else 0))
    running = min(elapsed - offline, virtual_ns(domain))
    process = domain.process
    stolen = domain.stolen_ns + (now - domain.stopped_ns if domain.stopped_ns else 0)
    runnable = min(elapsed - offline - running, stolen + (process.waited_ns() if process else 0))
    state = process.run_state() if process and domain.state == "running" else RunState.OFFLINE
    return RunStateInfo(state, running, runnable, elapsed - offline - running - runnable, offline)


@hypercall(abi.GetRunState)
def get_run_state(hv: Hypervisor, caller: Domain, call: abi.GetRunState) -> tuple[int, ...]:
    info = run_state(caller)
    return (int(RunState.RUNNING), *info[1:])  # whoever asks runs
