"""The trap table: what a guest may register, and what stands after a mistake."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from hypervisor import traps
from hypervisor.domain import Domain, Trap
from hypervisor.gate.monitor import TRAPS, Monitor
from hypervisor.loop import Loop
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import BadAddress, Invalid, TooBig
from hypervisor.public.layout import HYPERVISOR_VIRT_START, KERNEL_WINDOW, NR_WINDOWS, SPACE_BYTES
from hypervisor.public.traps import MAX_TRAPS, TRAP_INFO, SetTrapTable, VmAssist

CS, AT = 0x33, 0x5000  # the code selector of a process; where the list lies
HANDLER = KERNEL_WINDOW + 0x10_0000
LAST = bytes(16)
TOP = KERNEL_WINDOW + HYPERVISOR_VIRT_START


class Memory:
    """The guest's, which ends where the test's data ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = b""
        self.domain = Domain(1, "dom1", CreateFlags.NONE)
        self.domain.monitor = self.monitor = Monitor(Loop(), pytest.fail)
        monkeypatch.setattr(traps.guest_access, "copy_in", self.copy_in)

    def copy_in(self, hv: Any, domain: Domain, va: int, size: int) -> bytes:
        if not 0 <= va - AT <= len(self.data) - size:
            raise BadAddress(f"guest address {va:#x}")
        return self.data[va - AT : va - AT + size]

    def words(self) -> dict[int, int]:
        """What the entry code would find, by vector."""
        table = struct.unpack_from("<512Q", self.monitor._page, TRAPS)
        assert not any(table[MAX_TRAPS:])
        return {vector: word for vector, word in enumerate(table) if word}

    def close(self) -> None:
        self.monitor.handed_over()
        self.monitor.sock.close()
        self.monitor._page.close()
        self.monitor._loop._epoll.close()

    def register(self, *entries: bytes) -> dict[int, Trap]:
        self.data = b"".join(entries)
        hv: Any = None
        traps.set_trap_table(hv, self.domain, SetTrapTable(AT if entries else 0))
        return self.domain.traps


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    made = Memory(monkeypatch)
    yield made
    made.close()


def entry(address: int = HANDLER, vector: int = 14, flags: int = 3, cs: int = CS) -> bytes:
    return TRAP_INFO.pack(vector, flags, cs, address)


def test_a_handler_is_registered_replaced_and_forgotten(guest: Memory) -> None:
    assert guest.register(entry(), LAST) == {14: Trap(HANDLER, False, 3)}
    assert guest.register(entry(HANDLER + 8, flags=7), LAST) == {14: Trap(HANDLER + 8, True, 3)}
    assert guest.register(LAST) == {14: Trap(HANDLER + 8, True, 3)}, "an empty list changes nothing"
    assert guest.register() == {}


def test_nothing_is_read_beyond_the_end_of_the_list(guest: Memory) -> None:
    assert guest.register(entry(), entry(HANDLER + 8), LAST) == {14: Trap(HANDLER + 8, False, 3)}
    assert guest.register(entry(), TRAP_INFO.pack(255, 255, 0, 0)), "address 0 is the end, whatever else is said"


@pytest.mark.parametrize(
    "bad",
    [
        entry(vector=0x80), entry(flags=8), entry(flags=0x80), entry(cs=0x10), entry(cs=0),
        entry(1 << 47), entry((1 << 64) - 8), entry(TOP), entry(TOP + (64 << 20) - 1),
        entry(TOP + (NR_WINDOWS - 1) * SPACE_BYTES),
    ],
)  # fmt: skip
def test_what_may_not_be_registered_is_refused_and_what_came_before_stands(guest: Memory, bad: bytes) -> None:
    with pytest.raises(Invalid):
        guest.register(entry(), bad, entry(HANDLER + 8), LAST)
    assert guest.domain.traps == {14: Trap(HANDLER, False, 3)}


@pytest.mark.parametrize(
    "address",
    [1, TOP - 1, KERNEL_WINDOW - 1, KERNEL_WINDOW + SPACE_BYTES, KERNEL_WINDOW + NR_WINDOWS * SPACE_BYTES, (1 << 47) - 1],
)
def test_an_address_of_its_process_is_its_own_affair(guest: Memory, address: int) -> None:
    assert guest.register(entry(address), LAST) == {14: Trap(address, False, 3)}


def test_a_list_that_leaves_its_memory(guest: Memory) -> None:
    with pytest.raises(BadAddress):
        guest.register(entry())
    with pytest.raises(BadAddress):
        guest.register(b"short")
    assert guest.domain.traps == {14: Trap(HANDLER, False, 3)}, "entries before the bad one stand"


def test_a_list_has_an_end(guest: Memory) -> None:
    guest.register(*[entry()] * MAX_TRAPS, LAST)
    with pytest.raises(TooBig, match="more than 256"):
        guest.register(*[entry()] * (MAX_TRAPS + 1), LAST)


def test_the_entry_code_finds_what_was_checked(guest: Memory) -> None:
    """Every vector but 14, which the hypervisor delivers, and 0x80; what is refused leaves the entry as it was."""
    for vector in range(MAX_TRAPS):
        if vector != 0x80:
            guest.register(entry(HANDLER + vector, vector=vector, flags=vector & 7), LAST)
    wanted = {n: HANDLER + n | bool(n & 4) << 48 | (n & 3) << 49 for n in range(MAX_TRAPS) if n not in (14, 0x80)}
    assert guest.words() == wanted and set(guest.domain.traps) == {*wanted, 14}
    for bad in (entry(TOP, vector=6), entry(vector=6, flags=8), entry(vector=6, cs=0x10)):
        with pytest.raises(Invalid):
            guest.register(bad, LAST)
    assert guest.words() == wanted
    guest.register(entry(HANDLER, vector=6, flags=0), LAST)
    assert guest.words() == wanted | {6: HANDLER}
    guest.register()
    assert guest.words() == {} == guest.domain.traps


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
