"""Who has taken too much of the hypervisor's time, by a clock that the test winds."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from hypervisor import budget
from hypervisor.budget import BURST_NS, FREE_NS, GAP_NS, MAX_ASKED, OVERHEAD_NS, SHARE, WANTED_NS, Budget, Demand, Gate
from hypervisor.domain import Domain
from hypervisor.loop import Steps, run_task
from hypervisor.public.domctl import CreateFlags
from tests.models.stand_in import StandIn

CALL = 5_000  # ns of a short call
PAUSE = 7_000  # ns until its caller asks again: it slept in between


def spend(one: Budget, calls: int, length: int, pause: int, start: int = 10**9) -> tuple[int, int]:
    """(the time afterwards, how long it has to wait) after so many calls."""
    now, wait = start, 0
    for _ in range(calls):
        wait = one.charge(now, now + length)
        now += length + pause
    return now, wait


def test_a_neighbour_that_waits_for_short_answers_is_never_charged() -> None:
    assert spend(Budget(lambda: True), 100_000, CALL, PAUSE)[1] == 0


def test_from_another_cpu_every_call_is_charged() -> None:
    _, wait = spend(Budget(lambda: False), 10_000, CALL, PAUSE)
    assert wait > 0


def test_who_does_not_wait_for_answers_is_charged() -> None:
    _, wait = spend(Budget(lambda: True), 10_000, CALL, 1_000)
    assert wait > 0


def test_long_calls_are_charged_beyond_what_is_free() -> None:
    one = Budget(lambda: True)
    length = 200_000
    calls = BURST_NS // (length + OVERHEAD_NS - FREE_NS)
    assert spend(one, calls - 2, length, PAUSE)[1] == 0
    assert spend(one, 200, length, PAUSE, start=2 * 10**9)[1] > 0


def test_it_refills_at_its_share_and_never_beyond_a_burst() -> None:
    one = Budget(lambda: False)
    now, wait = spend(one, 2_000, 100_000, 100_000)
    assert 0 < wait <= BURST_NS / SHARE
    assert one.charge(now + wait, now + wait + 1) <= (OVERHEAD_NS + 1) / SHARE, "refilled"
    later = now + 10**12
    assert one.charge(later, later + BURST_NS + 10**6) > 0, "a long rest saves no more than a burst"


def test_a_share_is_what_it_gets() -> None:
    """Obeying, for ten seconds: it runs when it may, and takes its share and one burst."""
    one, now, used = Budget(lambda: False), 10**9, 0
    while now < 11 * 10**9:
        wait = one.charge(now, now + 50_000)
        used += 50_000 + OVERHEAD_NS
        now += 50_000 + max(wait, PAUSE)
    assert used <= 10**10 * SHARE * 1.05 + BURST_NS


def test_without_the_charge_for_haste_a_flooder_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "HASTE_NS", 0)
    with pytest.raises(AssertionError):
        test_who_does_not_wait_for_answers_is_charged()


@pytest.fixture
def three() -> tuple[Domain, Domain, Domain]:
    a, b, c = (Domain(i, f"dom{i}", CreateFlags.NONE) for i in range(3))
    return a, b, c


def test_somebody_else_wants_it(monkeypatch: pytest.MonkeyPatch, three: tuple[Domain, Domain, Domain]) -> None:
    a, b, _ = three
    demand, now = Demand(), 10**9
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    demand.asked(a, now)
    assert not demand.others(a) and demand.others(b)
    demand.asked(b, now)
    demand.asked(a, now)
    demand.asked(a, now)
    assert demand.others(a), "b asked before"
    now += WANTED_NS
    assert not demand.others(a) and not demand.others(b), "nobody has for a while"


def test_who_was_woken_by_an_event_of_its_has_no_claim_against_it(
    monkeypatch: pytest.MonkeyPatch, three: tuple[Domain, Domain, Domain]
) -> None:
    a, b, c = three
    demand, now = Demand(), 10**9
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    for _ in range(3):
        for one, other in ((a, b), (b, a)):
            one.woken_by = other
            demand.asked(one, now)
    assert not demand.others(a) and not demand.others(b), "each asked because the other did"
    assert demand.others(c)
    demand.asked(c, now)
    assert demand.others(a) and demand.others(b), "a third one has a claim"
    demand.asked(b, now)
    assert demand.others(a), "an event excuses the first thing that is asked for"


def test_it_remembers_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    demand, now = Demand(), 10**9
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    many = [Domain(i, f"dom{i}", CreateFlags.NONE) for i in range(2 * MAX_ASKED)]
    for domain in many:
        demand.asked(domain, now)
    assert len(demand._asked) == MAX_ASKED and demand.others(many[-1])


# ---- a call under way


def under_way(hv: StandIn, domid: int) -> tuple[Domain, list[int]]:
    """A domain's endless call, which notes each time that it goes on, on its own bill."""
    domain, went_on = hv.domains[domid], list[int]()

    def steps() -> Steps:
        while domain.alive:
            went_on.append(len(went_on))
            yield from budget.take_turns(hv, domain, 0)

    run_task(steps(), lambda *_: None)
    return domain, went_on


def test_who_is_parked_stops_where_it_gives_a_turn_and_goes_on_afterwards() -> None:
    hv = StandIn(nr_domains=2)
    try:
        domain, went_on = under_way(hv, 1)
        hv.settle()
        assert len(went_on) > 2
        domain.parked = True
        hv.settle()
        stopped = len(went_on)
        hv.settle()
        assert len(went_on) == stopped and len(domain.held_up) == 1
        budget._unpark(hv, domain)
        hv.settle()
        assert len(went_on) > stopped and not domain.held_up
    finally:
        hv.close()


def test_those_who_have_refilled_are_let_in_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    hv = StandIn(nr_domains=4)
    now, timers, gate = 10**9, list[tuple[int, Any]](), Gate()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    monkeypatch.setattr(hv.loop, "at", lambda when, call: timers.append((when, call)))
    waiting = [hv.domains[i] for i in (1, 2, 3)]
    try:
        for domain in waiting:
            domain.parked = True
            gate.due(hv, domain)
        for i in (1, 2):
            assert [domain.parked for domain in waiting] == [n >= i for n in range(3)]
            ((now, let_in),) = timers
            assert now == 10**9 + i * GAP_NS
            timers.clear()
            let_in()
        assert not timers and not waiting[2].parked
        now += GAP_NS
        waiting[0].parked = True
        gate.due(hv, waiting[0])
        assert not waiting[0].parked, "nobody was let in lately"
    finally:
        hv.close()


def test_within_its_turn_nobody_else_has_one() -> None:
    steps = budget.take_turns(cast(Any, None), cast(Any, None), time.monotonic_ns() + 10**9)
    with pytest.raises(StopIteration):
        next(steps)
