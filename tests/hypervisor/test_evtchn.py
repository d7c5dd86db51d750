"""Event channels: the states of ports, and delivery into a real shared_info page by the edge rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from domain import _guest
from hypervisor import evtchn
from hypervisor._hv import ffi, lib
from hypervisor.domain import Domain
from hypervisor.public.errors import Exists, Invalid, NoSpace, NoSuchDomain, NotPermitted
from hypervisor.public.evtchn import (
    AllocUnbound,
    BindInterdomain,
    BindIpi,
    BindVirq,
    EvtchnClose,
    EvtchnReset,
    EvtchnSend,
    EvtchnStatus,
    EvtchnStatusReply,
    EvtchnUnmask,
    State,
)
from hypervisor.public.sched import SchedBlock, SetTimer
from hypervisor.public.start_info import SHARED_PENDING_SEL
from hypervisor.public.types import (
    DOMID_SELF,
    MAX_PORTS,
    NR_EVENT_CHANNELS,
    PAGE_SIZE,
    VIRQ_CONSOLE,
    VIRQ_DEBUG,
    VIRQ_DOM_EXC,
    VIRQ_TIMER,
)
from tests.conftest import NIGHTLY
from tests.models.channels import Players, drain, mask, pending, upcalls_masked
from tests.models.stand_in import StandIn

STEPS = 1_000_000 if NIGHTLY else 50_000


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=4)
    yield made
    made.close()


def connect(hv: StandIn, a: int, b: int) -> tuple[int, int]:
    """A channel between two domains: a's port and b's; b's first event is taken."""
    port = hv.done(hv.domains[a], AllocUnbound(DOMID_SELF, b))
    other = hv.done(hv.domains[b], BindInterdomain(a, port))
    drain(hv.domains[b])
    return port, other


def status(hv: StandIn, domid: int, port: int) -> EvtchnStatusReply:
    return EvtchnStatusReply(*hv.done(hv.domains[domid], EvtchnStatus(DOMID_SELF, port)))


# ---- ports


def test_a_channel_has_two_ends_that_name_each_other(hv: StandIn) -> None:
    port = hv.done(hv.domains[1], AllocUnbound(DOMID_SELF, 2))
    assert port == 1 and status(hv, 1, port) == (State.UNBOUND, 2, 0, 0)
    hv.done(hv.domains[2], BindIpi())
    other = hv.done(hv.domains[2], BindInterdomain(1, port))
    assert other == 2
    assert status(hv, 1, port) == (State.INTERDOMAIN, 2, other, 0)
    assert status(hv, 2, other) == (State.INTERDOMAIN, 1, port, 0)
    assert pending(hv.domains[2]) == {other}, "early events may have been lost: it looks once"


def test_only_the_domain_that_it_waits_for_may_bind_it(hv: StandIn) -> None:
    port = hv.done(hv.domains[1], AllocUnbound(DOMID_SELF, 2))
    for domid, remote, remote_port in ((3, 1, port), (0, 1, port), (2, 1, port + 1), (2, 3, port), (2, 1, 0), (2, 1, 1 << 31)):
        with pytest.raises(Invalid):
            hv.done(hv.domains[domid], BindInterdomain(remote, remote_port))
    with pytest.raises(NoSuchDomain):
        hv.done(hv.domains[2], BindInterdomain(77, port))
    hv.done(hv.domains[2], BindInterdomain(1, port))
    with pytest.raises(Invalid):
        hv.done(hv.domains[2], BindInterdomain(1, port))


def test_dom0_makes_ports_of_others(hv: StandIn) -> None:
    port = hv.done(hv.domains[0], AllocUnbound(2, DOMID_SELF))
    assert status(hv, 2, port) == (State.UNBOUND, 0, 0, 0)
    with pytest.raises(NotPermitted):
        hv.done(hv.domains[1], AllocUnbound(2, 1))
    for request in (AllocUnbound(77, 0), AllocUnbound(DOMID_SELF, 77)):
        with pytest.raises(NoSuchDomain):
            hv.done(hv.domains[0], request)


def test_a_domain_may_speak_to_itself(hv: StandIn) -> None:
    domain = hv.domains[1]
    port = hv.done(domain, AllocUnbound(DOMID_SELF, DOMID_SELF))
    other = hv.done(domain, BindInterdomain(DOMID_SELF, port))
    drain(domain)
    hv.done(domain, EvtchnSend(port))
    assert drain(domain) == [other]
    hv.done(domain, EvtchnReset())
    assert not domain.ports


def test_virqs(hv: StandIn) -> None:
    one, dom0 = hv.domains[1], hv.domains[0]
    port = hv.done(one, BindVirq(VIRQ_DEBUG))
    assert status(hv, 1, port) == (State.VIRQ, 0, 0, VIRQ_DEBUG)
    with pytest.raises(Exists):
        hv.done(one, BindVirq(VIRQ_DEBUG))
    for virq in (VIRQ_CONSOLE, VIRQ_DOM_EXC):
        with pytest.raises(NotPermitted):
            hv.done(one, BindVirq(virq))
        hv.done(dom0, BindVirq(virq))
    for virq in (4, 24, 1 << 31):
        with pytest.raises(Invalid):
            hv.done(one, BindVirq(virq))
    with pytest.raises(Invalid):
        hv.done(one, EvtchnSend(port))
    evtchn.raise_virq(hv, one, VIRQ_DEBUG)
    evtchn.raise_virq(hv, one, VIRQ_TIMER)  # not bound: nothing
    assert drain(one) == [port]
    hv.done(one, EvtchnClose(port))
    evtchn.raise_virq(hv, one, VIRQ_DEBUG)
    assert not pending(one) and hv.done(one, BindVirq(VIRQ_DEBUG)) == port


def test_the_timer(hv: StandIn) -> None:
    domain = hv.domains[1]
    port = hv.done(domain, BindVirq(VIRQ_TIMER))
    hv.done(domain, SetTimer(1 << 63))
    hv.done(domain, SetTimer(0))
    hv.settle()
    assert not pending(domain)
    hv.done(domain, SetTimer(1))  # the past fires at once
    hv.settle()
    assert drain(domain) == [port]


def test_an_ipi(hv: StandIn) -> None:
    domain = hv.domains[1]
    port = hv.done(domain, BindIpi())
    hv.done(domain, EvtchnSend(port))
    assert status(hv, 1, port) == (State.IPI, 0, 0, 0) and drain(domain) == [port]


def test_sending_where_nobody_is_bound_is_dropped(hv: StandIn) -> None:
    port = hv.done(hv.domains[1], AllocUnbound(DOMID_SELF, 2))
    hv.done(hv.domains[1], EvtchnSend(port))
    assert not pending(hv.domains[1]) and not pending(hv.domains[2])


@pytest.mark.parametrize("request_of", [EvtchnSend, EvtchnClose, EvtchnUnmask])
def test_a_closed_port_is_invalid(hv: StandIn, request_of: Callable[[int], Any]) -> None:
    for port in (0, 1, NR_EVENT_CHANNELS - 1, NR_EVENT_CHANNELS, 1 << 31):
        with pytest.raises(Invalid):
            hv.done(hv.domains[1], request_of(port))
        assert status(hv, 1, port).state == State.CLOSED


def test_a_domain_has_at_most_1024_ports(hv: StandIn) -> None:
    domain = hv.domains[1]
    ports = [hv.done(domain, BindIpi()) for _ in range(MAX_PORTS)]
    assert ports == list(range(1, MAX_PORTS + 1))
    for request in (BindIpi(), AllocUnbound(DOMID_SELF, 2), BindVirq(VIRQ_DEBUG)):
        with pytest.raises(NoSpace):
            hv.done(domain, request)
    waiting = hv.done(hv.domains[2], AllocUnbound(DOMID_SELF, 1))
    with pytest.raises(NoSpace):
        hv.done(domain, BindInterdomain(2, waiting))
    assert status(hv, 2, waiting).state == State.UNBOUND, "a refused call changes nothing"
    hv.done(domain, EvtchnClose(7))
    assert hv.done(domain, BindIpi()) == 7


# ---- closing, and rebinding


def test_closing_one_end_lets_the_other_be_bound_again(hv: StandIn) -> None:
    port, other = connect(hv, 1, 2)
    hv.done(hv.domains[2], EvtchnSend(other))
    hv.done(hv.domains[1], EvtchnClose(port))
    assert not pending(hv.domains[1]), "what was pending goes with the port"
    assert status(hv, 1, port).state == State.CLOSED and status(hv, 2, other) == (State.UNBOUND, 1, 0, 0)
    with pytest.raises(Invalid):
        hv.done(hv.domains[3], BindInterdomain(2, other))
    again = hv.done(hv.domains[1], BindInterdomain(2, other))
    drain(hv.domains[1])
    hv.done(hv.domains[2], EvtchnSend(other))
    assert drain(hv.domains[1]) == [again]


def test_a_dying_domain_leaves_unbound_ends_and_wakes_them(hv: StandIn) -> None:
    port, other = connect(hv, 1, 2)
    hv.done(hv.domains[1], BindIpi())
    hv.kill(1)
    assert not hv.domains[1].ports and status(hv, 2, other) == (State.UNBOUND, 1, 0, 0)
    assert drain(hv.domains[2]) == [other], "its peer is gone: it is told"
    hv.done(hv.domains[2], EvtchnSend(other))
    page = hv.machine.read(hv.domains[1].mfn_list[0], 0, PAGE_SIZE)
    evtchn.notify(hv, hv.domains[1], port)
    assert hv.machine.read(hv.domains[1].mfn_list[0], 0, PAGE_SIZE) == page, "nothing is delivered into it any more"
    with pytest.raises(Invalid):
        hv.done(hv.domains[2], BindInterdomain(1, port))
    with pytest.raises(Invalid):
        hv.done(hv.domains[0], AllocUnbound(1, 0))
    hv.settle()
    assert hv.domains[1].state == "dead"
    hv.quiet()


def test_reset_closes_everything_of_the_caller(hv: StandIn) -> None:
    port, other = connect(hv, 1, 2)
    hv.done(hv.domains[1], BindVirq(VIRQ_TIMER))
    hv.done(hv.domains[1], EvtchnReset())
    assert not hv.domains[1].ports and not hv.domains[1].virqs
    assert status(hv, 2, other).state == State.UNBOUND and drain(hv.domains[2]) == [other]
    assert hv.done(hv.domains[1], BindVirq(VIRQ_TIMER)) == port


# ---- the edge rule


def test_only_the_edge_signals(hv: StandIn) -> None:
    port, other = connect(hv, 1, 2)
    domain, signals = hv.domains[2], hv.domains[2].evt.delivered
    for _ in range(100):
        hv.done(hv.domains[1], EvtchnSend(port))
    assert domain.evt.delivered == signals + 1 and domain.evt.elided == 99
    assert drain(domain) == [other] and drain(domain) == []
    hv.done(hv.domains[1], EvtchnSend(port))
    assert domain.evt.delivered == signals + 2


def test_a_second_port_rides_on_the_first_ones_signal(hv: StandIn) -> None:
    pairs = [connect(hv, 1, 2) for _ in range(70)]  # two words of the bitmap
    signals = hv.domains[2].evt.delivered
    for port, _ in pairs:
        hv.done(hv.domains[1], EvtchnSend(port))
    assert hv.domains[2].evt.delivered == signals + 1
    assert drain(hv.domains[2]) == [other for _, other in pairs]


def test_a_masked_port_is_pending_and_silent_until_unmasked(hv: StandIn) -> None:
    port, other = connect(hv, 1, 2)
    domain, signals = hv.domains[2], hv.domains[2].evt.delivered
    mask(domain, other)
    hv.done(hv.domains[1], EvtchnSend(port))
    assert domain.evt.delivered == signals and drain(domain) == [] and pending(domain) == {other}
    hv.done(domain, EvtchnUnmask(other))
    assert domain.evt.delivered == signals + 1 and drain(domain) == [other]
    hv.done(domain, EvtchnUnmask(other))
    assert domain.evt.delivered == signals + 1


def test_with_upcalls_masked_no_signal_comes_and_unmasking_looks_once_more(hv: StandIn) -> None:
    port, other = connect(hv, 1, 2)
    domain, signals = hv.domains[2], hv.domains[2].evt.delivered
    _guest.lib.upcall_mask(domain.shared_info)
    hv.done(hv.domains[1], EvtchnSend(port))
    assert domain.evt.delivered == signals
    assert _guest.lib.upcall_unmask(domain.shared_info) == 1 and drain(domain) == [other]
    _guest.lib.upcall_mask(domain.shared_info)
    assert _guest.lib.upcall_unmask(domain.shared_info) == 0


def test_block_ends_with_an_event_or_at_once(hv: StandIn) -> None:
    port, other = connect(hv, 1, 2)
    domain = hv.domains[2]
    upcalls_masked(domain, True)
    out = hv.ask(domain, SchedBlock())
    hv.settle()
    assert out == [] and not bytes(ffi.buffer(domain.shared_info, 2))[1], "blocking unmasks upcalls"
    hv.done(hv.domains[1], EvtchnSend(port))
    assert out == [None, None] and domain.blocked is None
    assert hv.ask(domain, SchedBlock()) == [None, None], "one is pending"
    assert drain(domain) == [other]


def test_what_a_guest_writes_into_its_page_harms_only_itself(hv: StandIn) -> None:
    domain = hv.domains[2]
    port, _ = connect(hv, 1, 2)
    rng = random.Random(6)
    for _ in range(200):
        hv.machine.write(domain.mfn_list[0], 0, rng.randbytes(4096))
        hv.done(hv.domains[1], EvtchnSend(port))
        drain(domain)
        hv.done(domain, BindIpi())
        hv.done(domain, EvtchnUnmask(1))
    assert status(hv, 1, port).state == State.INTERDOMAIN
    hv.quiet()


# ---- a long run against a model


def test_a_long_run_agrees_with_the_model(hv: StandIn) -> None:
    Players(hv).play(STEPS)


class Broken:
    """evtchn.c with one function replaced."""

    def __init__(self, **replaced: Callable[..., Any]) -> None:
        self.__dict__.update({name: getattr(lib, name) for name in dir(lib)} | replaced)


def receiver(ends: Any, domid: int, port: int) -> tuple[Any, int]:
    """The end, and its port, that an event of `domid`'s would reach."""
    channel = ends[domid].ports[port]
    return (ends[channel.remote_domid], channel.remote_port) if channel.state == State.INTERDOMAIN else (ends[domid], port)


def signals_every_event(ends: Any, domid: int, port: int, signal: Any) -> int:
    result = lib.evtchn_send(ends, domid, port, signal)
    if result == 0 and signal[0] == lib.NO_DOMAIN:
        receiver(ends, domid, port)[0].delivered += 1
    return result


def ignores_the_mask(ends: Any, domid: int, port: int, signal: Any) -> int:
    if port and ends[domid].ports[port].state in (State.INTERDOMAIN, State.IPI):
        lib.evtchn_unmask(*receiver(ends, domid, port))
    return lib.evtchn_send(ends, domid, port, signal)


def forgets_the_selector(ends: Any, domid: int, port: int, signal: Any) -> int:
    page = ffi.cast("char *", receiver(ends, domid, port)[0].shared_info)
    selector = page[SHARED_PENDING_SEL : SHARED_PENDING_SEL + 8]
    before = bytes(ffi.buffer(selector))
    result = lib.evtchn_send(ends, domid, port, signal)
    ffi.buffer(selector)[:] = before
    return result


def forgets_the_other_end(hv: StandIn, domain: Domain, port: int) -> None:
    del domain.ports[port]
    lib.evtchn_clear(domain.evt, port)


def binds_for_anybody(hv: StandIn, caller: Domain, call: BindInterdomain) -> int:
    evtchn._channel(hv.lookup(call.remote_domid), call.remote_port).remote_domid = caller.domid
    return evtchn.bind_interdomain(hv, caller, call)


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("evtchn_send", signals_every_event),
        ("evtchn_send", ignores_the_mask),
        ("evtchn_send", forgets_the_selector),
        ("evtchn_unmask", lambda page, port: 0),
        ("evtchn_clear", lambda page, port: None),
        ("_close", forgets_the_other_end),
        ("bind_interdomain", binds_for_anybody),
    ],
)
def test_the_long_run_finds_a_seeded_defect(
    hv: StandIn, monkeypatch: pytest.MonkeyPatch, name: str, replaced: Callable[..., Any]
) -> None:
    if name.startswith("evtchn_"):
        monkeypatch.setattr(evtchn, "lib", Broken(**{name: replaced}))
    elif name.startswith("_"):
        monkeypatch.setattr(evtchn, name, replaced)
    else:
        hv.table[BindInterdomain] = replaced
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        Players(hv).play(STEPS)
