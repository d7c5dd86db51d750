"""The CPU scheduler: by SIGSTOP and SIGCONT, over what bvt.py decides and what the host's CPU clocks say.

It stays out of the way while there is nothing to arbitrate: with no cap set and no more domains than CPUs there is not even
a timer; with no more of them wanting to run than CPUs it looks at their clocks now and then, and stops nobody. Otherwise it
looks every TICK_NS, and those that run are pinned, each to one CPU of those that its process may use.

Who sleeps is never stopped, so that it wakes without us; an event of ours that wakes it is a time to decide. What a domain
says of itself is not asked for: its clocks tell what it ran, the host's schedstat how long it waited for a CPU. A domain that
is stopped runs no instruction; its monitor does, and its time is on the domain's bill.

dom0 and driver domains are never stopped, unless they were given a cap.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from hypervisor import bvt
from hypervisor.bvt import Share
from hypervisor.clock import virtual_ns
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.loop import Loop, Timer
from hypervisor.public import scheduler as abi
from hypervisor.public.clock import RunState
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Invalid
from hypervisor.public.scheduler import SchedulerCommand

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

TICK_NS = 4_000_000  # a look costs some 30 us
RELAXED_NS = 25_000_000
LOOKS = 16  # at clocks of those that sleep, in a tick
LONG_NS = 8_000_000
LEAST_NS = 500_000  # a shorter while says nothing of what one would use
ASLEEP, AWAKE = 0.02, 0.05  # parts of a CPU: less is sleeping, more is not
UNKNOWN = -1
KERNEL_NICE = 2  # of a domain with programs: 0.64 of their weight
WOKEN_NS = 1_000_000  # so long has whoever is woken a CPU to itself, though it may sleep again: then it is looked at


class State(Enum):
    ON = 1  # it may run
    OFF = 2  # it would, and is stopped
    IDLE = 3  # it sleeps


class Seat:
    """What is known of a domain that is scheduled."""

    def __init__(self, domain: Domain, cpus: frozenset[int]) -> None:
        assert domain.process is not None
        self.domain, self.share, self.process = domain, domain.share, domain.process
        self.state = State.ON
        self.allowed = cpus
        self.cpu = -1  # where we pinned it
        self.clock = self.looked = 0
        self.waited = UNKNOWN
        self.settled = False  # stopped, and charged all that it ran before
        try:
            self._schedstat = os.open(f"/proc/{self.process.pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._schedstat = -1

    def close(self) -> None:
        if self._schedstat >= 0:
            os.close(self._schedstat)

    def waiting(self) -> int:
        """ns that it was ready to run and did not, so far; as Process.waited_ns, for a third of what that costs."""
        try:
            own = int(os.pread(self._schedstat, 64, 0).split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return own + sum(process.waited_ns() for process in self.domain.programs)

    def spent(self) -> int:
        """ns so far: its processes and its monitor."""
        total = virtual_ns(self.domain)
        monitor = self.domain.monitor_process
        if monitor is not None and not monitor.ended:
            try:
                total += time.clock_gettime_ns((~monitor.pid << 3) | 2)
            except OSError:
                pass
        return total


class Scheduler:
    def __init__(self, loop: Loop, cpus: frozenset[int]) -> None:
        self._loop, self.cpus = loop, cpus
        self._seats: dict[Domain, Seat] = {}
        self._timer: Timer | None = None
        self.arbitrating = False
        self.switches = 0

    # ---- who takes part

    def enter(self, domain: Domain) -> None:
        """It is launched, or goes on after a pause."""
        exempt = domain.privileged or domain.flags & CreateFlags.DRIVER
        if domain.process is None or (exempt and not domain.share.params.cap):
            return
        seat = self._seats[domain] = Seat(domain, self._affinity(domain))
        seat.share.catch_up(self._wanting())
        self._begin(seat, time.monotonic_ns())
        self._wind()

    def leave(self, domain: Domain) -> None:
        """It is paused, or ends. Idempotent."""
        seat = self._seats.pop(domain, None)
        if seat is None:
            return
        domain.on_wake = None
        seat.close()
        if seat.state is State.OFF:
            self._credit_stolen(seat)
        if not seat.process.ended:
            self._pin(seat, -1)
        self._wind()

    def changed(self, domain: Domain) -> None:
        """Its parameters: they hold from now on."""
        if domain.state != "running":
            return
        seat = self._seats.get(domain)
        self.leave(domain)
        if seat is not None and seat.state is State.OFF:
            domain.signal(signal.SIGCONT)
        self.enter(domain)

    def _wind(self) -> None:
        """A timer where one is needed; else nobody is stopped, nobody pinned."""
        needed = _crowded(list(self._seats.values()))
        if needed and self._timer is None:
            now = time.monotonic_ns()
            for seat in self._seats.values():
                self._begin(seat, now)
            self._wind_at(now + TICK_NS)
        elif not needed and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._relax()

    def _wind_at(self, when: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.at(when, self._tick)

    def _awake_seats(self) -> list[Seat]:
        return [seat for seat in self._seats.values() if seat.state is not State.IDLE]

    def _wanting(self) -> list[Share]:
        return [seat.share for seat in self._awake_seats()]

    def _begin(self, seat: Seat, now: int) -> None:
        seat.clock, seat.looked, seat.waited = seat.spent(), now, UNKNOWN

    # ---- a look

    def _tick(self) -> None:
        now = time.monotonic_ns()
        asleep = [seat for seat in self._seats.values() if seat.state is State.IDLE]
        asleep.sort(key=lambda seat: seat.looked)
        awake = [seat for seat in self._seats.values() if seat.state is not State.IDLE and not seat.settled]
        for seat in awake + asleep[:LOOKS]:
            self._look(seat, now)
        wanting = self._awake_seats()
        self.arbitrating = _crowded(wanting)
        if self.arbitrating:
            self._decide(wanting, now)
        else:
            self._relax()
        self._wind_at(now + (TICK_NS if self.arbitrating else RELAXED_NS))

    def _look(self, seat: Seat, now: int) -> None:
        """Charge it what it ran, and see what it would have."""
        clock, elapsed = seat.spent(), now - seat.looked
        ran = max(0, clock - seat.clock)
        seat.clock, seat.looked = clock, now
        seat.share.charge(ran, now)
        seat.settled = seat.state is State.OFF
        if seat.settled or elapsed < LEAST_NS:
            return
        used = ran / elapsed
        if used < bvt.FULL:
            before, seat.waited = seat.waited, seat.waiting()
            used = used + (seat.waited - before) / elapsed if before != UNKNOWN else seat.share.demand
        if seat.state is State.IDLE:
            if used > AWAKE:
                self._awake(seat, now, min(1.0, used))
            return
        weight = min(1.0, elapsed / LONG_NS)  # a short look says less than what was seen before
        seat.share.demand += (min(1.0, used) - seat.share.demand) * weight
        if seat.share.demand < bvt.FULL:
            seat.share.catch_up(self._wanting(), bvt.LAG_NS)
        processes = (seat.process, *seat.domain.programs)
        if seat.share.demand < ASLEEP and any(process.run_state() != RunState.BLOCKED for process in processes):
            seat.share.demand = 1.0  # a busy host let it wait, which schedstat says only once it has run
        elif seat.share.demand < ASLEEP:
            seat.state = State.IDLE
            seat.share.unwarp(now)
            seat.domain.on_wake = lambda: self._woken(seat)

    def _awake(self, seat: Seat, now: int, demand: float) -> None:
        seat.share.wake(now, self._wanting())
        seat.share.demand = demand
        seat.state = State.ON
        seat.domain.on_wake = None

    def _woken(self, seat: Seat) -> None:
        """By an event, before it runs: perhaps somebody else has to give way, perhaps it has to wait."""
        now = time.monotonic_ns()
        for one in self._awake_seats():
            if one.state is State.ON:
                self._look(one, now)
        self._awake(seat, now, 1.0)
        self.arbitrating = _crowded(self._awake_seats())
        if self.arbitrating:
            self._decide(self._awake_seats(), now)
            self._wind_at(now + WOKEN_NS)

    # ---- what follows

    def _decide(self, wanting: list[Seat], now: int) -> None:
        """Stop first, so that nobody runs beside one whose place he has taken."""
        for seat in wanting:
            if seat.cpu < 0:
                seat.allowed = self._affinity(seat.domain)
        bvt.settle([seat.share for seat in wanting], len(frozenset().union(*(seat.allowed for seat in wanting))), now)
        running = {seat.share: seat.cpu for seat in wanting if seat.state is State.ON}
        chosen = bvt.choose([seat.share for seat in wanting], running, {seat.share: seat.allowed for seat in wanting}, now)
        for seat in wanting:
            if seat.share not in chosen and seat.state is State.ON:
                self._stop(seat, now)
        for seat in wanting:
            if seat.share in chosen:
                self._pin(seat, chosen[seat.share])
                if seat.state is State.OFF:
                    self._go_on(seat)

    def _stop(self, seat: Seat, now: int) -> None:
        seat.domain.signal(signal.SIGSTOP)
        seat.state, seat.settled, seat.domain.stopped_ns = State.OFF, False, now
        seat.share.unwarp(now)

    def _go_on(self, seat: Seat) -> None:
        """What it ran although it was stopped, by its monitor or before the signal came, is on its bill."""
        self._credit_stolen(seat)
        now, before = time.monotonic_ns(), seat.clock
        self._begin(seat, now)
        seat.share.charge(max(0, seat.clock - before), now)
        seat.domain.signal(signal.SIGCONT)
        seat.state, seat.settled = State.ON, False
        self.switches += 1

    def _credit_stolen(self, seat: Seat) -> None:
        seat.domain.stolen_ns += time.monotonic_ns() - seat.domain.stopped_ns
        seat.domain.stopped_ns = 0

    def _relax(self) -> None:
        """Everybody has what it wants: nobody owes anybody anything."""
        latest = max((seat.share.virtual for seat in self._seats.values()), default=0)
        for seat in self._seats.values():
            seat.share.virtual = latest
            self._pin(seat, -1)
            if seat.state is State.OFF:
                self._go_on(seat)
        self.arbitrating = False

    def _affinity(self, domain: Domain) -> frozenset[int]:
        """The CPUs that its processes may use, and we arbitrate."""
        assert domain.process is not None
        own = domain.cpus
        if domain.home < 0:
            try:
                own = frozenset(os.sched_getaffinity(domain.process.pid))
            except OSError:
                return self.cpus
        return own & self.cpus or own

    def house(self, domain: Domain, pid: int, domains: Iterable[Domain]) -> None:
        """An application's process of the domain runs where its kernel does, on one CPU: a hand-over between two costs five
        times as much, and a domain is one virtual CPU. The first one decides where: on the CPU with the fewest such domains."""
        assert domain.process is not None
        if domain.home < 0:
            cpus, here = self._affinity(domain), domain.process.cpu()
            homes = [other.home for other in domains if other.alive]
            domain.cpus = cpus
            domain.home = min(cpus, key=lambda cpu: (homes.count(cpu), cpu != here))
            _move(domain.process.pid, frozenset((domain.home,)))
            _lighten(domain.process.pid)
        _move(pid, frozenset((domain.home,)))

    def _pin(self, seat: Seat, cpu: int) -> None:
        """To one CPU, or -1: to all that it may use."""
        if cpu == seat.cpu:
            return
        seat.cpu, domain = cpu, seat.domain
        if len(seat.allowed) == 1:
            return
        if domain.home < 0:
            _move(seat.process.pid, frozenset((cpu,)) if cpu >= 0 else seat.allowed)
        elif cpu >= 0 and cpu != domain.home:
            domain.home = cpu
            for process in (seat.process, *domain.programs):
                _move(process.pid, frozenset((cpu,)))

    def state_of(self, domain: Domain) -> tuple[str, int]:
        """For those who look on: on, off, idle, or - (not scheduled); and the CPU it is pinned to, or -1."""
        seat = self._seats.get(domain)
        return (seat.state.name.lower(), seat.cpu) if seat else ("-", -1)


def _move(pid: int, cpus: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(pid, cpus)
    except OSError:
        pass  # it is gone, or the host does not let us: its kernel places it


def _lighten(pid: int) -> None:
    """A kernel weighs less than its programs, for the host's scheduler: of two that take turns, that one lets the woken run at
    once only if it has not had more than its part. A hand-over is then one switch; else its giver goes on, falls asleep and has
    to be woken, which costs a system call 1 to 3 us more. Among domains it is their shares that count, as ever."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid) + KERNEL_NICE)
    except OSError:
        pass  # it is gone


def _crowded(seats: list[Seat]) -> bool:
    """Not all of them can have a CPU to themselves, or one has a cap."""
    places = [seat.allowed for seat in seats]
    return any(seat.share.params.cap for seat in seats) or any(
        sum(other <= place for other in places) > len(place) for place in set(places)
    )


# ---- hypercalls


@hypercall(abi.SchedulerOp)
def scheduler_op(hv: Hypervisor, caller: Domain, call: abi.SchedulerOp) -> tuple[int, ...]:
    domain = hv.lookup(call.domid)
    if not domain.alive:
        raise Invalid(f"domain {call.domid} is {domain.state}")
    if call.cmd not in SchedulerCommand.__members__.values():
        raise Invalid(f"scheduler_op {call.cmd}")
    if call.cmd == SchedulerCommand.PUTINFO:
        _check(call)

        domain.share.set(
            weight=call.weight, cap=call.cap, warp_us=call.warp_us, warp_limit_us=call.warp_limit_us, unwarp_us=call.unwarp_us
        )
        hv.scheduler.changed(domain)
    params = domain.share.params
    return params.weight, params.cap, params.warp_us, params.warp_limit_us, params.unwarp_us


def _check(call: abi.SchedulerOp) -> None:
    if not 1 <= call.weight <= abi.MAX_WEIGHT:
        raise Invalid(f"weight {call.weight}: 1 to {abi.MAX_WEIGHT}")
    if call.cap > abi.MAX_CAP:
        raise Invalid(f"cap {call.cap}: percent of one CPU, 0 for none")
    if max(call.warp_us, call.warp_limit_us, call.unwarp_us) > abi.MAX_WARP_US:
        raise Invalid(f"warp, its limit and the wait after it are at most {abi.MAX_WARP_US} us")
