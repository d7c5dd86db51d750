"""Time: the record against the host's clock and against a writer that never stops, timers, wall clock, accounts."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from domain import _guest
from hypervisor import clock, sched
from hypervisor._hv import ffi, lib
from hypervisor.clock import Clock, run_state, scale, virtual_ns
from hypervisor.core import Hypervisor
from hypervisor.domain import DOM0, Domain, Process
from hypervisor.public.clock import (
    GetRunState,
    RunState,
    SetPeriodicTimer,
    SetTime,
    SetVirtualTimer,
    StopPeriodicTimer,
)
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Invalid
from hypervisor.public.sched import SetTimer
from hypervisor.public.types import PAGE_SIZE, VIRQ_TIMER
from tests.conftest import TIMEOUT
from tests.models.address_space import BusyLoop

US, SECOND = 1000, 10**9


class Bench(Hypervisor):
    """Two domains with a shared_info each, whose timer events are counted instead of sent."""

    loop: BusyLoop

    def __init__(self) -> None:
        self.loop, self.boot_ns = BusyLoop(), time.monotonic_ns()
        self.clock = Clock(self.loop, self.boot_ns)
        self.domains = {}
        self.last = _guest.ffi.new("uint64_t *")
        self.pages = []
        for domid in (DOM0, 1):
            self.domains[domid] = domain = Domain(domid, f"dom{domid}", CreateFlags.NONE)
            self.pages.append(ffi.new("char[]", PAGE_SIZE))
            domain.evt.shared_info = self.pages[-1]
        self.dom0, self.domain = self.domains[DOM0], self.domains[1]
        until(lambda: time.monotonic_ns() - self.boot_ns > clock.LEAST_BASELINE_NS)

    def shared_info(self, domain: Domain) -> Any:
        """As the guest's C has it."""
        return _guest.ffi.cast("void *", int(ffi.cast("uintptr_t", domain.shared_info)))

    def now(self, domain: Domain) -> int:
        return int(_guest.lib.system_time(self.shared_info(domain), self.boot_ns, self.last))


def until(what: Any) -> None:
    end = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < end


@pytest.fixture
def hv(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench()
    made.fired = fired = []  # type: ignore[attr-defined]
    monkeypatch.setattr(
        clock.evtchn, "raise_virq", lambda hv, domain, virq: fired.append((domain.domid, virq, time.monotonic_ns()))
    )
    yield made
    made.loop.close()


def fired(hv: Bench) -> list[tuple[int, int, int]]:
    return hv.fired  # type: ignore[attr-defined, no-any-return]


# ---- the record


@pytest.mark.parametrize(("ns", "tsc"), [(10**9, 3 * 10**9), (10**9, 10**8), (10**9, 10**9), (7, 5_000_000_000), (10**12, 3)])
def test_a_scale_turns_cycles_into_ns(ns: int, tsc: int) -> None:
    mul, shift = scale(ns, tsc)
    assert 1 << 31 <= mul < 1 << 32
    cycles = 1 << 40
    shifted = cycles << shift if shift >= 0 else cycles >> -shift
    assert abs((shifted * mul >> 32) - cycles * ns // tsc) <= 1 + (cycles * ns // tsc >> 30)


def test_a_guest_reads_the_hosts_clock(hv: Bench) -> None:
    """Within 1 us in the quietest of many readings: others may run in between the two clocks."""
    hv.clock.tell(hv.domain)
    errors = []
    for _ in range(2000):
        before = time.monotonic_ns()
        now = hv.now(hv.domain) + hv.boot_ns
        after = time.monotonic_ns()
        errors.append(0 if before <= now <= after else min(abs(now - before), abs(now - after)))
    assert sorted(errors)[len(errors) // 2] < US


@pytest.mark.parametrize("steps", [False, True])
def test_time_never_runs_backwards_over_a_new_record(hv: Bench, monkeypatch: pytest.MonkeyPatch, steps: bool) -> None:
    """For a reader without a memory, however bad the samples are. `steps`: the seeded defect, records that begin where the
    newest sample says, whose steps must be seen."""
    sample, late = hv.clock._sample, itertools.cycle((0, 5 * US))

    def noisy() -> tuple[int, int]:
        tsc, ns = sample()
        return tsc, ns + next(late)

    monkeypatch.setattr(Clock, "_sample", staticmethod(noisy))
    if steps:
        monkeypatch.setattr(clock, "STEP_NS", -SECOND)
    last = back = 0
    for _ in range(500):
        hv.clock.tell(hv.domain)
        for _ in range(3):
            hv.last[0] = 0
            now = hv.now(hv.domain)
            back += now < last
            last = now
    assert (back > 0) == steps


def test_what_a_record_is_ahead_or_behind_is_gone_with_the_next(hv: Bench) -> None:
    """Ahead, its time goes slower for the while of a record; far behind, it catches up at once."""
    hv.clock.tell(hv.domain)
    line = hv.domain.time
    line.ns += 100 * US
    hv.clock.tell(hv.domain)
    ns, cycles = hv.clock._rate
    goes = lib.clock_at(line, line.tsc + clock.EVERY_NS * cycles // ns) - line.ns
    assert abs(goes - (clock.EVERY_NS - 100 * US)) < 20 * US
    line.ns -= 1000 * US
    hv.clock.tell(hv.domain)
    tsc, host = hv.clock._sample()
    assert abs(lib.clock_at(line, tsc) - (host - hv.boot_ns)) < 20 * US


def test_before_the_rate_is_known_the_record_says_that_it_is_no_clock() -> None:
    page = ffi.new("char[]", PAGE_SIZE)
    domain = Domain(1, "dom1", CreateFlags.NONE)
    domain.evt.shared_info = page
    boot_ns = time.monotonic_ns()
    young = Clock(BusyLoop(), boot_ns)
    young.tell(domain)
    if ffi.buffer(page, PAGE_SIZE)[32 + 29] == b"\0":
        guest = _guest.ffi.cast("void *", int(ffi.cast("uintptr_t", page)))
        now = _guest.lib.system_time(guest, boot_ns, _guest.ffi.new("uint64_t *"))
        assert abs(now + boot_ns - time.monotonic_ns()) < SECOND


@pytest.mark.parametrize("torn", [False, True])
def test_a_reader_never_mixes_two_records(torn: bool) -> None:
    """A writer in a loop, in another process. Both records say the same time; a mixture is off by nine minutes. `torn`: the
    seeded defect, a writer that leaves the version alone, whose mixtures must be seen."""
    page = mmap.mmap(-1, PAGE_SIZE)
    pair = ffi.new("struct clock_pair *")
    lib.clock_sample(pair)
    apart, mul, base = 1 << 40, 1 << 31, 10**12
    records = [(pair.tsc, base), (pair.tsc - apart, base - apart // 2)]
    pid = os.fork()
    if pid == 0:
        keep_writing(ffi.from_buffer(page), records, mul, torn)
    guest, mixtures = _guest.ffi.cast("void *", _guest.ffi.from_buffer(page)), 0
    try:
        until(lambda: page[32 + 29] == 1)
        last = _guest.ffi.new("uint64_t *")
        end = time.monotonic() + (TIMEOUT if torn else 0.2)
        while time.monotonic() < end and not mixtures:
            for _ in range(1000):
                last[0] = 0
                mixtures += abs(_guest.lib.system_time(guest, 0, last) - base) > 100 * SECOND
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (mixtures > 0) == torn


def keep_writing(page: Any, records: list[tuple[int, int]], mul: int, torn: bool) -> None:
    words = ffi.cast("uint64_t *", page) + 4
    lines = [ffi.new("struct clock_line *", (stamp, base, mul, 0, 1)) for stamp, base in records]
    lib.clock_tell(page, lines[0], 0, 0)
    while True:
        for line in lines:
            if torn:
                words[1] = line.tsc
                words[2] = line.ns
            else:
                lib.clock_tell(page, line, 0, 0)


# ---- wall clock


def test_the_wall_clock_is_unix_time(hv: Bench) -> None:
    hv.clock.tell(hv.domain)
    wall = _guest.lib.wall_base(hv.shared_info(hv.domain)) + hv.now(hv.domain)
    assert abs(wall - time.time_ns()) < SECOND // 10


def test_dom0_sets_the_wall_clock_of_all_and_real_time_stays(hv: Bench) -> None:
    before = hv.now(hv.domain) if not hv.clock.tell(hv.domain) else 0
    clock.set_time(hv, hv.dom0, SetTime(1_000_000_000, 500, 7))
    assert _guest.lib.wall_base(hv.shared_info(hv.domain)) == 10**18 + 493
    assert _guest.lib.wall_base(hv.shared_info(hv.dom0)) == 10**18 + 493
    assert 0 <= hv.now(hv.domain) - before < SECOND
    for call in (SetTime(1, 10**9, 0), SetTime(0, 0, 1)):
        with pytest.raises(Invalid):
            clock.set_time(hv, hv.dom0, call)


# ---- timers


def test_a_one_shot_timer_is_never_early(hv: Bench) -> None:
    for ns in (1, 1000, 300_000, 2_000_000, 2_000_001):
        hv.fired.clear()  # type: ignore[attr-defined]
        deadline = time.monotonic_ns() - hv.boot_ns + ns
        sched.set_timer(hv, hv.domain, SetTimer(deadline))
        until(lambda: hv.loop.step() or fired(hv))
        ((domid, virq, at),) = fired(hv)
        assert (domid, virq) == (1, VIRQ_TIMER) and at - hv.boot_ns >= deadline


def test_a_periodic_timer_ticks_and_stops(hv: Bench) -> None:
    begin = time.monotonic_ns()
    clock.set_periodic(hv, hv.domain, SetPeriodicTimer(2_000_000))
    until(lambda: hv.loop.step() or len(fired(hv)) >= 5)
    times = [at - begin for _, _, at in fired(hv)]
    assert all(at >= (i + 1) * 2_000_000 for i, at in enumerate(times)), "never early"
    assert {(domid, virq) for domid, virq, _ in fired(hv)} == {(1, VIRQ_TIMER)}
    clock.stop_periodic(hv, hv.domain, StopPeriodicTimer())
    assert not hv.domain.timers
    with pytest.raises(Invalid):
        clock.set_periodic(hv, hv.domain, SetPeriodicTimer(999_999))


def test_a_virtual_timer_waits_for_the_domain_to_run(hv: Bench) -> None:
    pid = os.fork()
    if pid == 0:
        while True:
            pass
    try:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        hv.domain.process = Process(pid, -1)
        start = virtual_ns(hv.domain)
        assert virtual_ns(hv.domain) == start, "the virtual time of a domain that does not run stands still"
        clock.set_virtual(hv, hv.domain, SetVirtualTimer(start + 5_000_000))
        end = time.monotonic_ns() + 20_000_000
        until(lambda: hv.loop.step() or time.monotonic_ns() > end)
        assert not fired(hv), "it has not run"
        os.kill(pid, signal.SIGCONT)
        until(lambda: hv.loop.step() or fired(hv))
        assert virtual_ns(hv.domain) >= start + 5_000_000, "never early"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---- accounts


def test_the_four_states_add_up(hv: Bench) -> None:
    domain = hv.domain
    assert run_state(domain).state == RunState.OFFLINE
    domain.process, domain.launched, domain.state = Process(os.getpid(), -1), True, "running"
    domain.launched_ns = time.monotonic_ns() - 10 * SECOND
    domain.offline_ns = 3 * SECOND
    begin = time.monotonic_ns()
    info = clock.RunStateInfo(*clock.get_run_state(hv, domain, GetRunState()))
    assert info.state == RunState.RUNNING
    total = sum(info[1:])
    assert 0 <= total - 10 * SECOND - (begin - begin) < SECOND
    assert info.offline == 3 * SECOND and info.running > 0 and min(info) >= 0
    domain.state, domain.paused_ns = "paused", time.monotonic_ns() - SECOND
    paused = run_state(domain)
    assert paused.state == RunState.OFFLINE and paused.offline >= 4 * SECOND
