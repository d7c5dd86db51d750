"""From bytes to a handler: who may call, multicall, and that no bytes of a guest get anything but a status."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import msgpack
import msgspec
import pytest

from hypervisor import dispatch, domctl, evtchn, guest_access, lifecycle
from hypervisor.core import MODULES
from hypervisor.dispatch import ENTRY
from hypervisor.domain import Domain, Process
from hypervisor.gate.monitor import MonitorGone
from hypervisor.public.console import ConsoleWrite
from hypervisor.public.domctl import CreateDomain, CreateFlags, DestroyDomain, GetDomainInfo
from hypervisor.public.errors import BadAddress, Invalid, NotImplementedCall, NotPermitted, TooBig, XenError
from hypervisor.public.evtchn import AllocUnbound, BindIpi, EvtchnSend, EvtchnStatus
from hypervisor.public.grant import GrantMap, GrantQuerySize
from hypervisor.public.hypercall import ALL, WITH_CMD, Hypercall, decode_message
from hypervisor.public.layout import GRANT_BASE, KERNEL_PFN, virt
from hypervisor.public.memory import Exchange
from hypervisor.public.sched import SchedBlock, SchedShutdown, SchedYield, SetTimer
from hypervisor.public.scheduler import SchedulerOp
from hypervisor.public.types import CONSOLE_BYTES, DOMID_SELF, MAX_BATCH, MESSAGE_BYTES, NAME_BYTES, Bits, Data
from hypervisor.public.version import Multicall, XenExtraVersion, XenPageSize, XenVersion
from tests.conftest import NIGHTLY
from tests.models.stand_in import DATA_FRAMES, SCRATCH, StandIn

FUZZ = 500_000 if NIGHTLY else 50_000


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=3)
    yield made
    made.close()


def words(request: Hypercall[Any]) -> bytes:
    """A multicall entry; only for requests of integers."""
    fields = list(msgspec.structs.astuple(request))
    if request.OP in WITH_CMD:
        fields.insert(0, request.CMD)
    return ENTRY.pack(request.OP, -12345, *fields, *[0] * (6 - len(fields)))


def multicall(hv: StandIn, domain: Domain, *entries: bytes) -> list[int]:
    """Run them; each one's result."""
    hv.write(domain, b"".join(entries))
    hv.done(domain, Multicall(SCRATCH, len(entries)))
    return results(hv, domain, len(entries))


def results(hv: StandIn, domain: Domain, count: int) -> list[int]:
    return [struct.unpack_from("<q", hv.read(domain, 8, SCRATCH + 64 * i + 8))[0] for i in range(count)]


# ---- the table


def test_every_request_has_one_handler_and_every_handler_a_request() -> None:
    assert set(dispatch.table(MODULES)) == set(ALL.values())
    with pytest.raises(AssertionError, match=r"no handler for .*EvtchnSend"):
        dispatch.table(MODULES[:2])
    double = ModuleType("double")
    double.send = dispatch.hypercall(EvtchnSend)(lambda hv, caller, call: None)
    double.send.__module__ = "double"
    with pytest.raises(AssertionError, match="EvtchnSend has two handlers"):
        dispatch.table([*MODULES, double])


# ---- who may call


def test_a_privileged_call_is_dom0s_whatever_its_arguments_are(hv: StandIn) -> None:
    """EPERM before any argument is looked at: not even its decoder is reached by others."""
    privileged = [kind for kind in ALL.values() if kind.PRIVILEGED]
    assert len(privileged) >= 13
    for kind in privileged:
        for fields in ([1] * len(kind.FIELDS), [], [1.5, None, {}, [], -1, "x"], [b"x"] * 12):
            with pytest.raises(NotPermitted, match="dom0's"):
                hv.ask_raw(hv.domains[1], kind.OP, [kind.CMD, *fields])
        with pytest.raises(Invalid):
            hv.ask_raw(hv.domains[0], kind.OP, [kind.CMD, 1.5])


def test_a_handler_without_its_check_is_found(hv: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_authorise", lambda caller, kind: None)
    with pytest.raises((XenError, pytest.fail.Exception), match=r"wants|arguments|DID NOT"):
        test_a_privileged_call_is_dom0s_whatever_its_arguments_are(hv)


def test_anothers_business_is_dom0s(hv: StandIn) -> None:
    for request in (GrantQuerySize(2), EvtchnStatus(2, 1), AllocUnbound(2, 1)):
        with pytest.raises(NotPermitted):
            hv.ask(hv.domains[1], request)
        hv.ask(hv.domains[0], request)
        hv.ask(hv.domains[2], request)


# ---- multicall


def test_a_multicall_runs_its_list_in_order_each_with_its_own_result(hv: StandIn) -> None:
    got = multicall(
        hv, hv.domains[1], words(XenVersion()), words(BindIpi()), words(EvtchnSend(99)), words(BindIpi()), words(XenPageSize()),
        words(GrantQuerySize(DOMID_SELF)), words(EvtchnSend(1)), words(SchedYield()), words(SetTimer(0)),
    )  # fmt: skip
    assert got == [1, 1, -22, 2, 4096, 8, 0, 0, 0]
    assert hv.domains[1].evt.sent == 1


def test_values_that_are_no_word_are_0(hv: StandIn) -> None:
    assert multicall(hv, hv.domains[1], words(XenExtraVersion())) == [0]


def test_a_multicall_in_a_multicall_is_refused(hv: StandIn) -> None:
    assert multicall(hv, hv.domains[1], words(Multicall(SCRATCH, 1)), words(XenPageSize())) == [-22, 4096]


def test_text_and_a_seventh_word_do_not_fit(hv: StandIn) -> None:
    kinds = [kind for kind in ALL.values() if not all(isinstance(f, Bits) for f in kind.FIELDS)]
    assert {CreateDomain, SchedShutdown, ConsoleWrite} == set(kinds)
    kinds += [kind for kind in ALL.values() if len(kind.FIELDS) + (kind.OP in WITH_CMD) > 6 and kind is not CreateDomain]
    assert set(kinds[3:]) == {Exchange, SchedulerOp}
    entries = [ENTRY.pack(kind.OP, 0, kind.CMD, 0, 0, 0, 0, 0) for kind in kinds]
    assert multicall(hv, hv.domains[0], *entries) == [-22] * len(kinds)
    assert hv.domains[0].alive


def test_privilege_is_checked_for_each(hv: StandIn) -> None:
    entries = [ENTRY.pack(kind.OP, 0, kind.CMD, 2, 0, 0, 0, 0) for kind in ALL.values() if kind.PRIVILEGED]
    assert multicall(hv, hv.domains[1], *entries) == [-1] * len(entries)
    assert hv.domains[2].alive


def test_unused_words_are_0(hv: StandIn) -> None:
    for at in range(2, 6):
        row = [4, 1, 0, 0, 0, 0]
        row[at] = 1
        assert multicall(hv, hv.domains[1], ENTRY.pack(32, 0, *row)) == [-22]
    assert multicall(hv, hv.domains[1], ENTRY.pack(15, 0, 0, 0, 0, 0, 0, 1)) == [-22]


def test_words_are_as_wide_as_the_field(hv: StandIn) -> None:
    wide = [(32, 0, 4, 1 << 32, 0, 0, 0, 0), (32, 0, 4 | 1 << 32, 1, 0, 0, 0, 0), (1 << 40, 0, 0, 0, 0, 0, 0, 0)]
    assert multicall(hv, hv.domains[1], *(ENTRY.pack(*row) for row in wide)) == [-22, -38, -38]


def test_a_list_may_cross_pages_but_not_leave_memory(hv: StandIn) -> None:
    domain = hv.domains[1]
    entries = words(XenPageSize()) * 100
    hv.write(domain, entries[:4096])
    hv.write(domain, entries[4096:], SCRATCH + 4096)
    hv.done(domain, Multicall(SCRATCH, 100))
    assert results(hv, domain, 100) == [4096] * 100

    last = KERNEL_PFN + DATA_FRAMES - 1
    end = virt(last)
    hv.hide(domain, last)
    hv.write(domain, words(BindIpi()) * 2, end - 128)
    with pytest.raises(BadAddress):
        hv.done(domain, Multicall(end - 128, 3))
    assert not domain.ports, "the list is read before its first entry runs"
    for address in (0, virt(0) - 1, end, GRANT_BASE, (1 << 64) - 1, (1 << 64) - 64):
        with pytest.raises(BadAddress):
            hv.done(domain, Multicall(address, 1))


def test_a_list_has_at_most_512_entries(hv: StandIn) -> None:
    hv.done(hv.domains[1], Multicall(SCRATCH, 0))
    with pytest.raises(TooBig, match="at most 512"):
        hv.done(hv.domains[1], Multicall(SCRATCH, MAX_BATCH + 1))


def test_an_entry_that_waits_is_waited_for(hv: StandIn) -> None:
    domain = hv.domains[1]
    hv.write(domain, words(BindIpi()) + words(SchedBlock()) + words(EvtchnSend(1)))
    out = hv.ask(domain, Multicall(SCRATCH, 3))
    hv.settle()
    assert out == [] and results(hv, domain, 3) == [-12345] * 3, "written back at the end"
    evtchn.notify(hv, domain, 1)
    hv.settle()
    assert out == [None, None] and results(hv, domain, 3) == [1, 0, 0]


def check_a_dead_callers_memory_is_left_alone(hv: StandIn) -> None:
    """While an entry waits, the caller dies and its first frames are scrubbed; the entry's result must not land there."""
    domain = hv.domains[1]
    hv.write(domain, words(SchedYield()) + words(SchedYield()))
    mfn = guest_access.translate(hv, domain, SCRATCH, True)
    out = hv.ask(domain, Multicall(SCRATCH, 2))
    domain.state = "dying"  # as lifecycle.end says first of all
    hv.machine.scrub(mfn)
    hv.settle()
    assert out == [None, None] and hv.machine.read(mfn, 0, 4096) == bytes(4096), "written after its death"


def test_a_dead_callers_memory_is_left_alone(hv: StandIn) -> None:
    check_a_dead_callers_memory_is_left_alone(hv)


def test_a_late_result_is_found(hv: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Domain, "alive", property(lambda self: True))
    with pytest.raises(AssertionError, match="after its death"):
        check_a_dead_callers_memory_is_left_alone(hv)


def test_a_multicall_whose_caller_ends_ends(hv: StandIn) -> None:
    domain = hv.domains[0]
    hv.write(domain, words(DestroyDomain(1)) + words(XenPageSize()))
    out = hv.ask(domain, Multicall(SCRATCH, 2))
    assert not hv.domains[1].alive and out == []
    hv.spaces[1].die()
    hv.settle()
    assert out == [None, None] and results(hv, domain, 2) == [0, 4096] and 1 not in hv.domains


# ---- replies


def check_the_longest_reply_fits(hv: StandIn) -> None:
    """A guest chooses much of what dom0 is told of it, the last words of its shutdown above all."""
    domain = Domain(0x7FEF, "n" * NAME_BYTES, CreateFlags(15))
    hv.domains[domain.domid] = domain
    lifecycle.end(hv, domain, "crash: " + "\u20ac" * (CONSOLE_BYTES // 3))
    domain.process = domain.monitor_process = Process(1 << 22, -1, ended=True, cpu_ns=1 << 62)
    domain.exit_code, domain.max_frames = 255, 1 << 31
    domain.hypercalls = domain.evt.sent = domain.events_delivered = domain.events_elided = 1 << 63
    reply = msgpack.packb([0xFFFFFFFF, 0, *hv.done(hv.domains[0], GetDomainInfo(domain.domid))])
    assert len(reply) <= MESSAGE_BYTES, f"a reply of {len(reply)} bytes"


def test_the_longest_reply_fits_a_message(hv: StandIn) -> None:
    check_the_longest_reply_fits(hv)


def test_a_reason_cut_by_characters_is_found(hv: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domctl, "_cut", lambda text: text[: domctl.REASON_BYTES])
    with pytest.raises(AssertionError, match="a reply of"):
        check_the_longest_reply_fits(hv)


# ---- no bytes of a guest get anything but a status


def interesting(rng: random.Random, field: Any) -> Any:
    """A value that the calls may find plausible, more often than not."""
    if isinstance(field, Bits):
        pool = [0, 1, 2, 3, 7, 8, 513, SCRATCH, SCRATCH + 4000, GRANT_BASE, DOMID_SELF, (1 << field.bits) - 1]
        return rng.choice(pool) & ((1 << field.bits) - 1) if rng.random() < 0.9 else rng.getrandbits(field.bits)
    return rng.randbytes(rng.randrange(20)) if isinstance(field, Data) else rng.choice(["", "x", "\u20ac" * 60, "\0\n\x1b["])


def test_no_bytes_of_a_guest_get_anything_but_a_status(hv: StandIn) -> None:
    """Real handlers, an unprivileged caller: a value or a XenError comes out, and the machine stays whole."""
    fuzz(hv, FUZZ)


def test_a_handler_that_does_not_check_is_found(hv: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evtchn, "_channel", lambda domain, port: domain.ports[port])
    with pytest.raises(KeyError):
        fuzz(hv, FUZZ)


def anew(hv: StandIn) -> Domain:
    """Domain 1 has come to its end: another one has its number."""
    hv.kill(1)
    hv.settle()
    hv.forget(1)
    return hv.add(1)


def fuzz(hv: StandIn, rounds: int) -> None:
    rng, kinds, seen = random.Random(5), sorted(ALL.values(), key=lambda k: (k.OP, k.CMD)), set()
    unmapped = 0
    for i in range(rounds):
        domain = hv.domains[1]
        kind = rng.choice(kinds)
        items: list[Any] = [kind.OP, i, *([kind.CMD] if kind.OP in WITH_CMD else [])]
        message = bytearray(msgpack.packb([*items, *(interesting(rng, f) for f in kind.FIELDS)]))
        if rng.random() < 0.2:
            message[rng.randrange(len(message))] = rng.randrange(256)
        if kind is Multicall or kind.OP == GrantMap.OP:
            data = rng.choice([rng.randbytes(64) * 8, words(EvtchnSend(1)) * 4, words(BindIpi()) * 4])
            try:
                hv.write(domain, data)
            except BadAddress:  # it has unmapped its own page
                unmapped += 1
                domain.fail("nothing to fuzz with")
                domain = anew(hv)
                hv.write(domain, data)
        try:
            op, _, arguments = decode_message(bytes(message))
            out = hv.ask_raw(domain, op, arguments)
            hv.serve_all()
            error = out[1] if out else None
        except XenError as refusal:
            error = refusal
        assert error is None or isinstance(error, (XenError, MonitorGone)), f"{kind.__name__} {bytes(message)!r}: {error!r}"
        seen.add(type(error))
        if not domain.alive:
            anew(hv)
        elif domain.blocked is not None:
            domain.blocked = None
        if i % 500 == 0:
            hv.quiet()
    hv.quiet()
    assert {type(None), Invalid, NotPermitted, NotImplementedCall, BadAddress, TooBig} <= seen
    assert unmapped, "no page table was changed"
    assert hv.domains[0].alive and hv.domains[2].alive and not hv._stopped
