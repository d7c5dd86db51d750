"""sched_op poll: waiting for ports without upcalls, masked ones too, or until a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from domain import _guest
from hypervisor.domain import Domain
from hypervisor.public.errors import BadAddress, Invalid, TooBig
from hypervisor.public.evtchn import AllocUnbound, BindInterdomain, BindIpi, EvtchnSend
from hypervisor.public.sched import SchedPoll
from hypervisor.public.types import DOMID_SELF
from tests.models.stand_in import SCRATCH, StandIn


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=3)
    yield made
    made.close()


def poll(hv: StandIn, domain: Domain, ports: list[int], timeout_ns: int = 0) -> list[Any]:
    hv.write(domain, struct.pack(f"<{len(ports)}I", *ports))
    return hv.ask(domain, SchedPoll(SCRATCH, len(ports), timeout_ns))


def test_it_waits_for_any_of_its_ports_masked_or_not(hv: StandIn) -> None:
    domain, other = hv.domains[1], hv.domains[2]
    port = hv.done(domain, AllocUnbound(DOMID_SELF, 2))
    theirs = hv.done(other, BindInterdomain(1, port))
    mine = hv.done(domain, BindIpi())
    _guest.lib.event_mask(domain.shared_info, port)
    _guest.lib.upcall_mask(domain.shared_info)
    out = poll(hv, domain, [port])
    assert out == []
    hv.done(domain, EvtchnSend(mine))
    assert out == [], "not one of those it waits for"
    hv.done(other, EvtchnSend(theirs))
    assert out == [None, None] and not domain.evt.polling
    assert poll(hv, domain, [port]) == [None, None], "pending already"


def test_it_ends_in_time(hv: StandIn) -> None:
    domain = hv.domains[1]
    port = hv.done(domain, BindIpi())
    out = poll(hv, domain, [port], timeout_ns=1)
    hv.settle()
    assert out == [None, None]


def test_what_it_refuses(hv: StandIn) -> None:
    domain = hv.domains[1]
    with pytest.raises(Invalid):
        hv.done(domain, SchedPoll(SCRATCH, 1, 1))
    with pytest.raises(TooBig):
        hv.done(domain, SchedPoll(SCRATCH, 129, 1))
    with pytest.raises(BadAddress):
        hv.done(domain, SchedPoll(0, 1, 1))


def test_a_dead_poller_is_nobodys(hv: StandIn) -> None:
    domain = hv.domains[1]
    port = hv.done(domain, BindIpi())
    out = poll(hv, domain, [port])
    hv.kill(1)
    hv.serve_all()
    assert out == [] and domain.polled is None and domain.state == "dead"
