"""What the entry code is told to do: what a guest may register, what stands after a mistake, what is then read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from hypervisor import traps, user
from hypervisor.domain import Domain, Trap
from hypervisor.gate.monitor import Monitor
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import BadAddress, Invalid, NoEntry, TooBig
from hypervisor.public.layout import HYPERVISOR_VIRT_START, KERNEL_WINDOW, NR_WINDOWS, SPACE_BYTES
from hypervisor.public.traps import (
    EVENT,
    FAILSAFE,
    KERNEL_SP,
    MAX_TRAPS,
    TI_DPL,
    TI_FAST,
    TI_MASK_EVENTS,
    TI_SHIFT,
    TRAP_INFO,
    TRAPS,
    SetCallbacks,
    SetTrapTable,
    StackSwitch,
    VmAssist,
)

CS, AT = 0x33, 0x5000  # the code selector of a process; where the list lies
HANDLER = KERNEL_WINDOW + 0x10_0000
LAST = bytes(16)
TOP = KERNEL_WINDOW + HYPERVISOR_VIRT_START
FAST = TI_FAST | TI_DPL  # as an application's system calls want it
NOWHERE = [1 << 47, (1 << 64) - 8, TOP, TOP + (64 << 20) - 1, TOP + (NR_WINDOWS - 1) * SPACE_BYTES]
END = KERNEL_WINDOW + NR_WINDOWS * SPACE_BYTES
SOMEWHERE = [1, TOP - 1, KERNEL_WINDOW - 1, KERNEL_WINDOW + SPACE_BYTES, END, (1 << 47) - 1]


class Memory:
    """The guest's, which ends where the test's data ends; and the page that its entry code reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = b""
        self.domain = Domain(1, "dom1", CreateFlags.NONE)
        self.page = [0] * (TRAPS.size // 8)
        self.domain.monitor = cast(Monitor, SimpleNamespace(set_trap=self.page.__setitem__))
        monkeypatch.setattr(traps.guest_access, "copy_in", self.copy_in)

    def copy_in(self, hv: Any, domain: Domain, va: int, size: int) -> bytes:
        if not 0 <= va - AT <= len(self.data) - size:
            raise BadAddress(f"guest address {va:#x}")
        return self.data[va - AT : va - AT + size]

    def register(self, *entries: bytes) -> dict[int, Trap]:
        self.data = b"".join(entries)
        hv: Any = None
        traps.set_trap_table(hv, self.domain, SetTrapTable(AT if entries else 0))
        return self.domain.traps

    def call(self, request: SetCallbacks | StackSwitch) -> None:
        hv: Any = None
        if isinstance(request, SetCallbacks):
            traps.set_callbacks(hv, self.domain, request)
        else:
            traps.stack_switch(hv, self.domain, request)

    def words(self) -> dict[int, int]:
        """Those of the page that are not 0."""
        return {i: word for i, word in enumerate(self.page) if word}


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


def entry(address: int = HANDLER, vector: int = 14, flags: int = 3, cs: int = CS) -> bytes:
    return TRAP_INFO.pack(vector, flags, cs, address)


def word(address: int = HANDLER, flags: int = 3) -> int:
    return flags << TI_SHIFT | address


# ---- the trap table


def test_a_handler_is_registered_replaced_and_forgotten(guest: Memory) -> None:
    assert guest.register(entry(), LAST) == {14: Trap(HANDLER, 3)}
    assert guest.register(entry(HANDLER + 8, flags=7), LAST) == {14: Trap(HANDLER + 8, 7)}
    assert guest.words() == {14: word(HANDLER + 8, 7)}
    assert guest.register(LAST) == {14: Trap(HANDLER + 8, 7)}, "an empty list changes nothing"
    assert guest.register() == {} and guest.words() == {}


def test_the_entry_code_is_told_of_every_vector(guest: Memory) -> None:
    vectors = sorted({*range(MAX_TRAPS)} - {2, 8, 18, 0x80})
    guest.register(*(entry(HANDLER + v, v, v % 8) for v in vectors), LAST)
    assert guest.words() == {v: word(HANDLER + v, v % 8) for v in vectors}


def test_nothing_is_read_beyond_the_end_of_the_list(guest: Memory) -> None:
    assert guest.register(entry(), entry(HANDLER + 8), LAST) == {14: Trap(HANDLER + 8, 3)}
    assert guest.register(entry(), TRAP_INFO.pack(255, 255, 0, 0)), "address 0 is the end, whatever else is said"


BAD = [
    *(entry(vector=v) for v in (2, 8, 18)),
    *(entry(flags=f) for f in (0x10, 0x20, 0x40, 0x80)),
    *(entry(cs=cs) for cs in (0, 0x10, 0xFFFC)),
    *(entry(vector=v, flags=FAST) for v in (0, 6, 13, 14, 0x7F, 0x81, 255)),
    *(entry(vector=0x80, flags=f) for f in (0, 3, TI_MASK_EVENTS)),  # the host's own
    *(entry(vector=0x80, flags=TI_FAST | dpl) for dpl in (0, 1, 2)),  # no application would reach it
    *(entry(vector=0x80, flags=FAST | f) for f in (TI_MASK_EVENTS, 0x10, 0x80)),
    entry(vector=0x80, flags=FAST, cs=0x10),
    *(entry(address, 0x80, FAST) for address in NOWHERE),
    *(entry(address) for address in NOWHERE),
    *(entry(address, 0) for address in NOWHERE),
]


@pytest.mark.parametrize("bad", BAD)
def test_what_may_not_be_registered_is_refused_and_what_came_before_stands(guest: Memory, bad: bytes) -> None:
    with pytest.raises(Invalid):
        guest.register(entry(), entry(vector=3), bad, entry(HANDLER + 8), LAST)
    assert guest.domain.traps == {14: Trap(HANDLER, 3), 3: Trap(HANDLER, 3)}
    assert guest.words() == {14: word(), 3: word()}


def test_without_the_check_it_would_be_registered(guest: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traps, "_check", lambda *entry: None)
    guest.register(entry(TOP), LAST)
    assert guest.words() == {14: word(TOP)}


@pytest.mark.parametrize("address", SOMEWHERE)
def test_an_address_of_its_process_is_its_own_affair(guest: Memory, address: int) -> None:
    assert guest.register(entry(address), LAST) == {14: Trap(address, 3)}


def test_a_fast_handler_is_no_exceptions(guest: Memory) -> None:
    """The entry code of the kernel's own process is not told: an `int $0x80` there enters nothing, whatever its host does."""
    guest.register(entry(HANDLER + 8, 0x80, FAST), entry(), LAST)
    assert guest.domain.traps[0x80] == Trap(HANDLER + 8, FAST)
    assert guest.words() == {14: word()}


def test_there_is_no_application_before_its_system_calls_have_a_way(guest: Memory) -> None:
    """The first thing that is asked of one, also once the way was there and is forgotten; with it the next thing is asked."""
    hv: Any = None
    with pytest.raises(NoEntry, match="0x80 has no fast handler"):
        next(user.create(hv, guest.domain, 1, AT))
    guest.register(entry(vector=0x80, flags=FAST), LAST)
    with pytest.raises(BadAddress):  # of the control region, which is asked for next
        next(user.create(hv, guest.domain, 1, AT))
    guest.register()
    with pytest.raises(NoEntry):
        next(user.create(hv, guest.domain, 1, AT))


def test_a_list_that_leaves_its_memory(guest: Memory) -> None:
    with pytest.raises(BadAddress):
        guest.register(entry())
    with pytest.raises(BadAddress):
        guest.register(b"short")
    assert guest.domain.traps == {14: Trap(HANDLER, 3)}, "entries before the bad one stand"


def test_a_list_has_an_end(guest: Memory) -> None:
    guest.register(*[entry()] * MAX_TRAPS, LAST)
    with pytest.raises(TooBig, match="more than 256"):
        guest.register(*[entry()] * (MAX_TRAPS + 1), LAST)


# ---- callbacks, the kernel's stack


def test_callbacks_are_registered_and_forgotten(guest: Memory) -> None:
    guest.call(SetCallbacks(HANDLER, HANDLER + 8))
    assert guest.words() == {EVENT: word(HANDLER, TI_MASK_EVENTS), FAILSAFE: HANDLER + 8}
    guest.call(SetCallbacks(HANDLER + 16, 0))
    assert guest.words() == {EVENT: word(HANDLER + 16, TI_MASK_EVENTS)}
    guest.call(SetCallbacks(0, 0))
    assert guest.words() == {}


@pytest.mark.parametrize("bad", NOWHERE)
def test_a_bad_callback_changes_nothing(guest: Memory, bad: int) -> None:
    guest.call(SetCallbacks(HANDLER, HANDLER))
    before = guest.words()
    for call in (SetCallbacks(bad, HANDLER + 8), SetCallbacks(HANDLER + 8, bad), StackSwitch(0x2B, bad)):
        with pytest.raises(Invalid):
            guest.call(call)
    assert guest.words() == before


def test_a_stack_is_registered_and_forgotten(guest: Memory) -> None:
    guest.call(StackSwitch(0x2B, HANDLER))
    assert guest.words() == {KERNEL_SP: HANDLER}
    with pytest.raises(Invalid, match="ring 0"):
        guest.call(StackSwitch(0x28, HANDLER + 8))
    guest.call(StackSwitch(0x2B, 0))
    assert guest.words() == {}


def test_they_stand_where_the_contract_says() -> None:
    assert (EVENT, FAILSAFE, KERNEL_SP) == (MAX_TRAPS, MAX_TRAPS + 1, MAX_TRAPS + 2)
    assert TRAPS.size == 8 * (KERNEL_SP + 1)


# ---- assistance


def test_an_assistance_is_turned_on_and_off(guest: Memory) -> None:
    hv: Any = None
    assert not guest.domain.writable_tables
    for cmd, on in ((0, True), (0, True), (1, False)):
        traps.vm_assist(hv, guest.domain, VmAssist(cmd, 2))
        assert guest.domain.writable_tables is on
    for cmd, kind in ((2, 2), (0, 1), (0, 0), (1, 3)):
        with pytest.raises(Invalid):
            traps.vm_assist(hv, guest.domain, VmAssist(cmd, kind))
    assert not guest.domain.writable_tables
