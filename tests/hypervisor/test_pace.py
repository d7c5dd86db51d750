"""What a flood of events may cost its receiver: a burst of signals, then a few a second, and no event is lost by that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from domain.callring import packed
from hypervisor import callring, evtchn
from hypervisor._hv import ffi, lib
from hypervisor.domain import PACE, Domain
from hypervisor.loop import run_task
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.evtchn import EvtchnSend
from hypervisor.public.sched import SchedPoll
from tests.hypervisor.test_callring import ring_of
from tests.hypervisor.test_evtchn import Broken, connect
from tests.models.channels import drain, pending, upcalls_masked
from tests.models.stand_in import SCRATCH, StandIn

HOUR = 3_600_000_000_000  # ns: nothing is paid for while a test runs


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=4)
    for domain in made.domains.values():
        assert domain.evt.pace_ns == (0 if domain.privileged else 1_000_000_000 // PACE)
        domain.evt.pace_ns = HOUR
    yield made
    made.close()


def channel(hv: StandIn, a: int, b: int) -> tuple[int, int]:
    """Both ends with a full bucket, however short a time this machine is up."""
    port, other = connect(hv, a, b)
    hv.ends[a].ports[port].due = hv.ends[b].ports[other].due = -100 * HOUR
    return port, other


def timers(hv: StandIn) -> int:
    return len(hv.loop._timers)


def send_to_a_sleeper(hv: StandIn, sender: int, port: int, receiver: int) -> bool:
    """One event to a domain that sleeps; whether that cost a signal. It is not awake afterwards: that is the test's."""
    before = hv.domains[receiver].evt.delivered
    hv.done(hv.domains[sender], EvtchnSend(port))
    return bool(hv.domains[receiver].evt.delivered - before)


def test_the_bucket() -> None:
    port, pace = ffi.new("struct evt_port *"), 1000
    now = 5_000_000
    assert [lib.evtchn_pace(port, pace, now) for _ in range(lib.EVT_BURST)] == [0] * lib.EVT_BURST
    due = lib.evtchn_pace(port, pace, now)
    assert due == now + pace and lib.evtchn_pace(port, pace, due - 1) == due, "asking costs nothing"
    assert lib.evtchn_pace(port, pace, due) == 0 and lib.evtchn_pace(port, pace, due) == due + pace, "one every `pace`"
    later = due + 1000 * pace
    assert sum(not lib.evtchn_pace(port, pace, later) for _ in range(1000)) == lib.EVT_BURST, "no more than a burst is saved up"


def check_a_flood_is_bounded(hv: StandIn) -> None:
    """The receiver sleeps again after each; the signals that it had, then the one that came late."""
    port, other = channel(hv, 1, 2)
    receiver = hv.domains[2]
    hv.settle()
    before = timers(hv)
    signals = 0
    for _ in range(10 * lib.EVT_BURST):
        signals += send_to_a_sleeper(hv, 1, port, 2)
        if signals < lib.EVT_BURST or receiver.evt.late == 0:
            assert drain(receiver) == [other]
    assert signals == lib.EVT_BURST and receiver.evt.late
    assert timers(hv) == before + 1, "one timer, however many are late"
    assert pending(receiver) == {other}, "late, not lost"
    evtchn.release(receiver)
    assert receiver.evt.delivered == signals + 1 + 1, "connecting cost one"
    assert drain(receiver) == [other] and not receiver.evt.late


def test_a_flood_is_bounded(hv: StandIn) -> None:
    check_a_flood_is_bounded(hv)


def held_back(hv: StandIn) -> tuple[int, int]:
    """A flood of domain 1's to domain 2, whose signal is held back: its port, and the receiver's."""
    port, other = channel(hv, 1, 2)
    while send_to_a_sleeper(hv, 1, port, 2):
        drain(hv.domains[2])
    assert hv.domains[2].evt.late
    return port, other


def check_others_are_not_late(hv: StandIn) -> None:
    innocent, theirs = channel(hv, 3, 2)
    _, other = held_back(hv)
    assert send_to_a_sleeper(hv, 3, innocent, 2), "told at once, although the flood's edge was not"
    assert drain(hv.domains[2]) == [theirs, other], "and with it what was held back"


def test_others_are_not_late(hv: StandIn) -> None:
    check_others_are_not_late(hv)


def check_events_that_are_answered_are_free(hv: StandIn) -> None:
    port, other = channel(hv, 1, 2)
    drain(hv.domains[1])
    for _ in range(10 * lib.EVT_BURST):
        assert send_to_a_sleeper(hv, 1, port, 2)
        drain(hv.domains[2])
        assert send_to_a_sleeper(hv, 2, other, 1)
        drain(hv.domains[1])


def test_events_that_are_answered_are_free(hv: StandIn) -> None:
    check_events_that_are_answered_are_free(hv)


def test_answers_are_not_saved_up(hv: StandIn) -> None:
    port, other = channel(hv, 1, 2)
    upcalls_masked(hv.domains[1], True)
    for _ in range(10 * lib.EVT_BURST):
        hv.done(hv.domains[2], EvtchnSend(other))
    check = [send_to_a_sleeper(hv, 1, port, 2) for _ in range(10 * lib.EVT_BURST) if drain(hv.domains[2]) is not None]
    assert sum(check) == lib.EVT_BURST


def test_who_has_looked_meanwhile_gets_no_signal(hv: StandIn) -> None:
    held_back(hv)
    receiver = hv.domains[2]
    before = receiver.evt.delivered
    drain(receiver)
    evtchn.release(receiver)
    assert receiver.evt.delivered == before and not receiver.evt.late


def test_who_is_awake_gets_no_signal(hv: StandIn) -> None:
    """He looks before he sleeps: unmasking says that something is there."""
    held_back(hv)
    receiver = hv.domains[2]
    before = receiver.evt.delivered
    upcalls_masked(receiver, True)
    evtchn.release(receiver)
    assert receiver.evt.delivered == before and pending(receiver)


def test_the_timer_delivers_it(hv: StandIn) -> None:
    port, other = channel(hv, 1, 2)
    sender, receiver = hv.domains[1], hv.domains[2]
    sender.evt.pace_ns = 1  # paid for at once, and yet held back: it is asked for earlier than the burst allows
    sender.evt.ports[port].due = 1 << 62
    before = receiver.evt.delivered
    assert not send_to_a_sleeper(hv, 1, port, 2)
    receiver.evt.late = 1
    hv.loop._timers = [(0, order, timer) for _, order, timer in hv.loop._timers]  # its time has come
    hv.settle()
    assert receiver.evt.delivered == before + 1 and drain(receiver) == [other]


def test_the_dead_get_none(hv: StandIn) -> None:
    held_back(hv)
    receiver = hv.domains[2]
    before, receiver.state = receiver.evt.delivered, "dying"
    evtchn.release(receiver)
    assert receiver.evt.delivered == before
    receiver.state = "running"


def test_a_poll_ends_late_too(hv: StandIn) -> None:
    port, other = held_back(hv)
    receiver = hv.domains[2]
    evtchn.release(receiver)
    drain(receiver)
    upcalls_masked(receiver, True)
    hv.write(receiver, other.to_bytes(4, "little"))
    out = hv.ask(receiver, SchedPoll(SCRATCH, 1, 0))
    hv.done(hv.domains[1], EvtchnSend(port))
    assert not out and receiver.evt.late
    evtchn.release(receiver)
    assert out == [None, None] and drain(receiver) == [other]


def test_by_the_ring_too(hv: StandIn) -> None:
    port, other = channel(hv, 1, 2)
    front = ring_of(hv, hv.domains[1])
    for _ in range(2 * lib.EVT_BURST):
        drain(hv.domains[2])
        front.publish(packed(EvtchnSend(port)))
        run_task(callring.drain(hv, hv.domains[1], 0), lambda value, error: None)
        hv.serve_all()
        front.take()
    assert hv.domains[2].evt.delivered == lib.EVT_BURST + 1 and hv.domains[2].evt.late
    assert pending(hv.domains[2]) == {other}


def test_dom0_and_driver_domains_are_trusted_with_it() -> None:
    paces = [Domain(*each).evt.pace_ns for each in ((0, "dom0", CreateFlags.NONE), (1, "d", CreateFlags.DRIVER))]
    assert paces == [0, 0] and Domain(2, "g", CreateFlags.NONE).evt.pace_ns > 0


# ---- what must be noticed


def signals_all(ends: Any, domid: int, port: int, signal: Any) -> int:
    ends[domid].pace_ns = 0
    return lib.evtchn_send(ends, domid, port, signal)


def forgets_the_late(ends: Any, domid: int, port: int, signal: Any) -> int:
    result = lib.evtchn_send(ends, domid, port, signal)
    if signal[0] != lib.NO_DOMAIN and signal[0] & lib.EVT_LATE:
        signal[0] = lib.NO_DOMAIN
    return result


def drops_the_late(end: Any) -> int:
    end.late = 0
    return 0


def holds_all_back(ends: Any, domid: int, port: int, signal: Any) -> int:
    late, before = ends[2].late, ends[2].delivered
    result = lib.evtchn_send(ends, domid, port, signal)
    if late and signal[0] == 2:
        signal[0], ends[2].delivered = lib.NO_DOMAIN, before
    return result


def thanks_nobody(ends: Any, domid: int, port: int, signal: Any) -> int:
    other = ends[domid].ports[port]
    peer = ends[other.remote_domid].ports[other.remote_port]
    kept, result = peer.due, lib.evtchn_send(ends, domid, port, signal)
    peer.due = kept
    return result


@pytest.mark.parametrize(
    ("check", "name", "replaced"),
    [
        (check_a_flood_is_bounded, "evtchn_send", signals_all),
        (check_a_flood_is_bounded, "evtchn_send", forgets_the_late),
        (check_a_flood_is_bounded, "evtchn_release", drops_the_late),
        (check_others_are_not_late, "evtchn_send", holds_all_back),
        (check_events_that_are_answered_are_free, "evtchn_send", thanks_nobody),
    ],
)
def test_seeded_defects_are_caught(
    hv: StandIn, monkeypatch: pytest.MonkeyPatch, check: Callable[[StandIn], None], name: str, replaced: Callable[..., Any]
) -> None:
    monkeypatch.setattr(evtchn, "lib", Broken(**{name: replaced}))
    with pytest.raises(AssertionError):
        check(hv)
