"""The hypercall ring: the same calls with the same results as by any other way in, and rings that cannot be."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from domain.callring import packed
from hypervisor import callring, guest_access
from hypervisor._hv import ffi, lib
from hypervisor.domain import Domain
from hypervisor.loop import run_task
from hypervisor.public.callring import ANSWER, ANSWER_BYTES, ENTRY, ENTRY_BYTES, NR_ENTRIES, CallringKick, CallringSetup
from hypervisor.public.domctl import DestroyDomain
from hypervisor.public.errors import BadAddress, Exists, Invalid, XenError
from hypervisor.public.evtchn import BindIpi, EvtchnSend
from hypervisor.public.hypercall import ALL, Hypercall
from hypervisor.public.layout import KERNEL_PFN, virt
from hypervisor.public.sched import SchedBlock, SchedPoll, SchedYield
from hypervisor.public.sysctl import GetDomainInfoList, Ledger, PhysInfo, ProcessMemory, ReadConsole
from hypervisor.public.types import DOMID_SELF, PAGE_SIZE
from hypervisor.public.version import Multicall, XenPageSize, XenVersion
from ringlib.ring import FrontRing
from tests.models.stand_in import SCRATCH, StandIn

PAGE = virt(KERNEL_PFN + 3)  # of the ring


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=3)
    yield made
    made.close()


def page_of(hv: StandIn, domain: Domain) -> Any:
    return hv.machine.pointer(guest_access.translate(hv, domain, PAGE, True))


def ring_of(hv: StandIn, domain: Domain) -> FrontRing:
    """The guest's end, set up."""
    front = FrontRing(int(ffi.cast("uintptr_t", page_of(hv, domain))), PAGE_SIZE, ENTRY_BYTES, ANSWER_BYTES)
    hv.done(domain, CallringSetup(PAGE))
    return front


def push(hv: StandIn, domain: Domain, front: FrontRing, entries: bytes) -> list[int]:
    """Through the ring, with the doorbell; each one's result."""
    out: list[int] = []
    for at in range(0, len(entries), ENTRY_BYTES * NR_ENTRIES):
        front.publish(entries[at : at + ENTRY_BYTES * NR_ENTRIES])
        ended: list[Any] = []
        run_task(callring.drain(hv, domain, 0), lambda value, error, ended=ended: ended.append(error))  # type: ignore[misc]
        hv.serve_all()
        assert ended == [None]
        out += [result for _, result in ANSWER.iter_unpack(front.take())]
    return out


def test_entries_are_answered_in_order_each_with_its_own_result(hv: StandIn) -> None:
    domain = hv.domains[1]
    calls = [XenVersion(), BindIpi(), EvtchnSend(1), EvtchnSend(99), XenPageSize(), EvtchnSend(1), SchedYield(), BindIpi()]
    assert push(hv, domain, ring_of(hv, domain), b"".join(map(packed, calls))) == [1, 1, 0, -22, 4096, 0, 0, 2]
    assert domain.evt.sent == 2


def test_it_is_set_up_once_in_a_page_of_the_guests_own(hv: StandIn) -> None:
    for address in (PAGE + 1, virt(len(hv.domains[1].mfn_list)), 0):
        with pytest.raises(BadAddress):
            hv.done(hv.domains[1], CallringSetup(address))
    ring_of(hv, hv.domains[1])
    with pytest.raises(Exists):
        hv.done(hv.domains[1], CallringSetup(PAGE))
    with pytest.raises(Invalid):
        hv.done(hv.domains[2], CallringKick())


def test_a_doorbell_within_the_ring_and_a_list_within_it_are_refused(hv: StandIn) -> None:
    domain = hv.domains[1]
    entries = packed(CallringKick()) + packed(Multicall(SCRATCH, 1)) + packed(XenVersion())
    assert push(hv, domain, ring_of(hv, domain), entries) == [-22, -22, 1]


def test_sends_that_c_does_not_take_are_refused_like_any_call(hv: StandIn) -> None:
    """A send with a field that is too wide, or with words behind it, is left to Python, which refuses it, and goes on."""
    domain = hv.domains[1]
    odd = [ENTRY.pack(32, 0, 4, 1 << 32, 0, 0, 0, 0), ENTRY.pack(32, 0, 4, 1, 0, 0, 0, 7)]
    odd += [packed(EvtchnSend(5)), packed(XenVersion())]
    assert push(hv, domain, ring_of(hv, domain), b"".join(odd)) == [-22, -22, -22, 1]


def test_an_index_that_cannot_be_ends_the_domain_and_nobody_else(hv: StandIn) -> None:
    domain = hv.domains[1]
    ring_of(hv, domain)
    ffi.buffer(page_of(hv, domain), 4)[:] = struct.pack("<I", 1000)  # req_prod
    run_task(callring.drain(hv, domain, 0), lambda value, error: None)
    assert not domain.alive and "violated its hypercall ring" in domain.reason
    assert hv.domains[2].alive


def test_an_awake_hypervisor_asks_for_no_doorbell_and_owes_a_look(hv: StandIn) -> None:
    domain = hv.domains[1]
    front = ring_of(hv, domain)
    assert front.publish(packed(XenVersion())), "asleep at first: ring"
    run_task(callring.drain(hv, domain, 0), lambda value, error: None)
    assert domain in hv.busy_rings.owed and not front.publish(packed(XenVersion())), "it looks before it sleeps"
    assert hv.busy_rings.look() is domain
    run_task(callring.drain(hv, domain, 10), lambda value, error: None)
    assert [result for _, result in ANSWER.iter_unpack(front.take())] == [1, 1]
    assert hv.busy_rings.look() is None and front.publish(packed(XenVersion())), "it slept: ring again"


def test_a_look_that_a_busy_domain_could_not_be_given_is_made_up_for(hv: StandIn) -> None:
    domain = hv.domains[1]
    front = ring_of(hv, domain)
    hv.busy_rings.owed[domain] = None
    domain.busy = True
    assert hv.busy_rings.look() is None and domain.callring.missed
    front.publish(packed(XenVersion()))
    domain.busy = False
    hv.busy_rings.catch_up(domain)
    assert hv.busy_rings.look() is domain


# ---- every way in


LEFT_OUT = {Multicall, CallringSetup, CallringKick, SchedBlock, SchedPoll, DestroyDomain}  # different, or waiting for ever
FIGURES = {GetDomainInfoList, PhysInfo, Ledger, ReadConsole, ProcessMemory}  # of a running host, and of the moment


def plausible(rng: random.Random, kind: type[Hypercall[Any]]) -> Hypercall[Any]:
    """Numbers that mean something often enough."""
    assert kind.LIMITS is not None
    numbers = [0, 1, 2, 3, 5, DOMID_SELF, SCRATCH, PAGE_SIZE, 64, 0xFFFF, 1 << 31]
    return kind(*(min(limit, rng.choice(numbers)) for limit in kind.LIMITS))


def by_message(hv: StandIn, domain: Domain, calls: list[Hypercall[Any]]) -> list[int]:
    from hypervisor.dispatch import result_word

    out = []
    for call in calls:
        try:
            out.append(result_word(hv.done(domain, call)))
        except XenError as error:
            out.append(-error.errno)
    return out


def by_list(hv: StandIn, domain: Domain, calls: list[Hypercall[Any]]) -> list[int]:
    out = []
    for call in calls:
        where = PAGE + PAGE_SIZE
        hv.write(domain, packed(call), where)
        hv.done(domain, Multicall(where, 1))
        out.append(struct.unpack_from("<q", hv.read(domain, 8, where + 8))[0])
    return out


def by_ring(hv: StandIn, domain: Domain, calls: list[Hypercall[Any]]) -> list[int]:
    front = ring_of(hv, domain)
    return [push(hv, domain, front, packed(call))[0] for call in calls]


@pytest.mark.parametrize("domid", [0, 1])
def test_every_call_has_one_result_by_every_way_in(domid: int) -> None:
    """All calls that fit in words, privileged ones too, by a caller that may and one that may not."""
    rng = random.Random(domid)
    kinds = [ALL[key] for key in sorted(ALL)]  # whichever module was imported first
    kinds = [kind for kind in kinds if kind.LIMITS is not None and kind not in LEFT_OUT | FIGURES]
    calls = [plausible(rng, kind) for kind in kinds * 12]
    rng.shuffle(calls)
    answers = []
    for way in (by_message, by_list, by_ring):
        random.seed(domid)  # who has which frame is the same in all of them
        machine = StandIn(nr_domains=3)
        try:
            answers.append(way(machine, machine.domains[domid], calls))
        finally:
            machine.close()
    differ = [(call, *row) for call, *row in zip(calls, *answers, strict=True) if len(set(row)) > 1]
    assert not differ, differ[:5]
    assert len({type(call) for call, result in zip(calls, answers[0], strict=True) if result >= 0}) > 8, "most are refused"


def test_a_way_in_that_answers_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lib.callring_answer

    class Lying:
        def __getattr__(self, name: str) -> Any:
            return (lambda ring, result: real(ring, result + 1)) if name == "callring_answer" else getattr(lib, name)

    monkeypatch.setattr(callring, "lib", Lying())
    with pytest.raises(AssertionError):
        test_every_call_has_one_result_by_every_way_in(1)


