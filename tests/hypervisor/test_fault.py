"""The hypervisor's end of page faults: fill, bounce, end; one at a time, on the bill, and nobody makes it wait.

A domain of these tests is a socket that the test writes the entry code's messages to, and tables that are a dictionary.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hypervisor import fault
from hypervisor._hv import ffi
from hypervisor.budget import Demand, Gate
from hypervisor.callring import BusyRings
from hypervisor.core import Hypervisor
from hypervisor.domain import Domain, Trap
from hypervisor.frames import NO_MFN
from hypervisor.gate.monitor import MonitorError, MonitorGone
from hypervisor.loop import Resume, Steps
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Invalid
from hypervisor.public.layout import KERNEL_WINDOW, NR_WINDOWS, SPACE_BYTES
from hypervisor.public.start_info import SHARED_CR2
from hypervisor.public.traps import (
    BOUNCE,
    EVENT,
    FAILSAFE,
    FAULT,
    PF_DELIVERY,
    PF_FETCH,
    PF_PRESENT,
    PF_STORE,
    PF_UNHANDLED,
    PF_USER,
    PF_WRITE,
    RED_ZONE,
    RETRY,
    SENT,
    SKIP,
    TI_MASK_EVENTS,
    TI_SHIFT,
    VERDICT,
)
from hypervisor.public.types import PAGE_SIZE
from tests.models.address_space import BusyLoop

HANDLER, OUTSIDE = 0x2000_0012_3456, 0x7FFF_0000_0000
END = NR_WINDOWS * SPACE_BYTES  # of the windows
STACK = 0x50_0000
Told = tuple[int, int, int]


class Tables:
    """In hypervisor.space's place. `pages`: offset of a page -> what it may be touched for, of "rwx"; `filled`: what was
    asked."""

    def __init__(self) -> None:
        self.pages: dict[int, str] = {}
        self.filled: list[tuple[int, int]] = []
        self.waiting: list[Resume] | None = None  # a list: fill waits until the test resumes it
        self.tables: dict[int, int] = {}  # offset of a page -> the frame of the table that it shows

    def _allows(self, offset: int, what: str) -> bool:
        return what in self.pages.get(offset - offset % PAGE_SIZE, "")

    def fill(self, hv: Hypervisor, domain: Domain, offset: int, error: int) -> Steps:
        self.filled.append((offset, error))
        if self.waiting is not None:
            yield self.waiting.append
        return int(self._allows(offset, "x" if error & PF_FETCH else "w" if error & PF_WRITE else "r"))

    def table_at(self, hv: Hypervisor, domain: Domain, offset: int) -> int:
        return self.tables.get(offset - offset % PAGE_SIZE, NO_MFN)

    def reachable(self, hv: Hypervisor, domain: Domain, offset: int, size: int, access: int) -> bool:
        return all(self._allows(at, "w" if access & PF_WRITE else "r") for at in (offset, offset + size - 1))


class Bench(Hypervisor):
    """One launched domain; what would end it is in `ends`."""

    loop: BusyLoop

    def __init__(self, tables: Tables) -> None:
        self.loop, self.tables = BusyLoop(), tables
        self.demand, self.gate, self.busy_rings = Demand(), Gate(), BusyRings()
        self.ends: list[str] = []
        self.domain = Domain(1, "dom1", CreateFlags.NONE)
        self.domain.fail = self.ends.append
        self.page = ffi.new("char[]", PAGE_SIZE)
        self.domain.evt.shared_info = self.page
        self.entry_code = fault.door(self.domain)
        self.entry_code.setblocking(False)
        self.domain.state, self.domain.launched = "running", True
        self.listen(self.domain)

    def log(self, line: str) -> None:
        raise AssertionError(line)

    def tell(self, offset: int, error: int = PF_USER, rsp: int = OUTSIDE, value: int = 0) -> None:
        self.entry_code.send(FAULT.pack(KERNEL_WINDOW + offset, error, 0x1234, rsp, value))

    def verdict(self) -> Told | None:
        """What the entry code is told, once everything that can go on did; None: it waits."""
        self.loop.settle()
        try:
            return VERDICT.unpack(self.entry_code.recv(64))
        except BlockingIOError:
            return None

    def word(self, at: int) -> int:
        return int.from_bytes(ffi.buffer(self.page, PAGE_SIZE)[at : at + 8], "little")

    def close(self) -> None:
        fault.hang_up(self, self.domain)
        self.entry_code.close()
        self.loop.close()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    made = Tables()
    monkeypatch.setattr(fault, "space", made)
    return made


@pytest.fixture
def hv(tables: Tables) -> Iterator[Bench]:
    made = Bench(tables)
    yield made
    made.close()


@pytest.fixture
def guest(hv: Bench) -> Domain:
    """With a handler, and a stack of two pages."""
    hv.domain.traps[14] = Trap(HANDLER, 0)
    hv.tables.pages |= {STACK: "rw", STACK + PAGE_SIZE: "rw"}
    return hv.domain


# ---- filled


@pytest.mark.parametrize(("error", "what"), [(PF_USER, "r"), (PF_USER | PF_WRITE, "w"), (PF_USER | PF_FETCH, "x")])
def test_what_the_tables_allow_is_mapped_and_run_again(hv: Bench, tables: Tables, error: int, what: str) -> None:
    offset = 3 * SPACE_BYTES + 0x5008
    tables.pages[offset - 8] = what
    hv.tell(offset, error)
    assert hv.verdict() == (RETRY, 0, 0) and tables.filled == [(offset, error)]
    assert (hv.domain.faults, hv.domain.fills, hv.domain.bounces) == (1, 1, 0) and not hv.ends


def test_the_last_byte_of_the_windows_is_a_guest_address(hv: Bench, tables: Tables) -> None:
    tables.pages[END - PAGE_SIZE] = "r"
    hv.tell(END - 1)
    assert hv.verdict() == (RETRY, 0, 0)


# ---- bounced


def test_the_rest_is_the_handlers(hv: Bench, guest: Domain) -> None:
    hv.tell(SPACE_BYTES + 0x7008, PF_USER | PF_WRITE)
    assert hv.verdict() == (BOUNCE, PF_USER | PF_WRITE, HANDLER)
    assert hv.word(SHARED_CR2) == SPACE_BYTES + 0x7008, "the window too"
    assert (guest.faults, guest.fills, guest.bounces) == (1, 0, 1)


def test_a_handler_may_ask_for_events_to_be_masked(hv: Bench, guest: Domain) -> None:
    """The entry code does it, beside the frame that says what it was before."""
    guest.traps[14] = Trap(HANDLER, TI_MASK_EVENTS)
    hv.tell(0)
    assert hv.verdict() == (BOUNCE, PF_USER, HANDLER | TI_MASK_EVENTS << TI_SHIFT)


@pytest.mark.parametrize(
    ("page", "host_says", "guest_is_told"),
    [
        ("r", PF_USER | PF_WRITE, PF_USER | PF_WRITE | PF_PRESENT),  # a page to be copied on write, which nobody read yet
        ("r", PF_USER | PF_FETCH, PF_USER | PF_FETCH | PF_PRESENT),
        ("", PF_USER | PF_PRESENT, PF_USER),
        ("r", PF_USER | PF_WRITE | PF_PRESENT, PF_USER | PF_WRITE | PF_PRESENT),
        ("", PF_USER | 1 << 5 | 1 << 15 | 1 << 40, PF_USER),  # protection keys, SGX, nonsense
    ],
)
def test_the_error_code_is_as_the_guests_tables_have_it(
    hv: Bench, guest: Domain, page: str, host_says: int, guest_is_told: int
) -> None:
    hv.tables.pages[0x9000] = page
    hv.tell(0x9010, host_says)
    assert hv.verdict() == (BOUNCE, guest_is_told, HANDLER)


@pytest.mark.parametrize(
    ("rsp", "filled"),
    [
        (STACK + 2 * PAGE_SIZE, [STACK + 2 * PAGE_SIZE - 192]),
        (STACK + PAGE_SIZE + 191, [STACK + PAGE_SIZE - 1, STACK + PAGE_SIZE]),
        (STACK + PAGE_SIZE + 192, [STACK + PAGE_SIZE]),
    ],
)
def test_its_stack_is_made_ready(hv: Bench, guest: Domain, rsp: int, filled: list[int]) -> None:
    hv.tell(0, rsp=KERNEL_WINDOW + rsp)
    assert hv.verdict() == (BOUNCE, PF_USER, HANDLER)
    assert hv.tables.filled[1:] == [(at, PF_WRITE | PF_USER) for at in filled]


def test_a_frame_fits_what_is_made_ready() -> None:
    """Wherever the stack pointer is, what the entry code writes lies within."""
    for rsp in range(OUTSIDE, OUTSIDE + 16):
        frame = ((rsp - RED_ZONE) & ~15) - 48
        assert rsp - RED_ZONE - fault.FRAME_ROOM <= frame


def test_a_stack_of_the_process_is_the_processes(hv: Bench, guest: Domain) -> None:
    for rsp in (OUTSIDE, KERNEL_WINDOW, KERNEL_WINDOW + END + 192, 0, 191, (1 << 64) - 1):
        hv.tell(0, rsp=rsp)
        assert hv.verdict() == (BOUNCE, PF_USER, HANDLER), hex(rsp)
    assert len(hv.tables.filled) == 6 and not hv.ends


# ---- stores to page tables


class Updates:
    """In hypervisor.mmu's place: what was asked, whether it is refused, and who waits."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self.refuses = False
        self.waiting: list[Resume] = []

    def update_entry(self, hv: Hypervisor, domain: Domain, table: int, slot: int, value: int) -> Steps:
        self.asked.append((table, slot, value))
        assert domain.busy, "a hypercall of its may run beside it"
        yield self.waiting.append
        if self.refuses:
            raise Invalid


@pytest.fixture
def updates(hv: Bench, guest: Domain, monkeypatch: pytest.MonkeyPatch) -> Updates:
    made = Updates()
    monkeypatch.setattr(fault, "mmu", made)
    hv.tables.tables[0x8000] = 77
    hv.tables.pages |= {0x8000: "r", 0x9000: "r"}
    guest.writable_tables = True
    return made


WRITE = PF_USER | PF_WRITE | PF_PRESENT
BOUNCED = (BOUNCE, WRITE, HANDLER)


def test_a_store_to_a_table_is_an_update(hv: Bench, guest: Domain, updates: Updates) -> None:
    hv.tell(0x8FF8, WRITE | PF_STORE, value=123)
    assert hv.verdict() is None and updates.asked == [(77, 511, 123)]
    assert guest.busy and not guest.may_call, "its hypercalls wait"
    updates.waiting.pop()(None)
    assert hv.verdict() == (SKIP, 0, 0) and not guest.busy
    assert (guest.fills, guest.bounces) == (0, 0)


def test_what_an_update_refuses_is_the_handlers(hv: Bench, guest: Domain, updates: Updates) -> None:
    updates.refuses = True
    hv.tell(0x8008, WRITE | PF_STORE)
    hv.loop.settle()
    updates.waiting.pop()(None)
    assert hv.verdict() == BOUNCED and not guest.busy
    assert hv.word(SHARED_CR2) == 0x8008


@pytest.mark.parametrize(
    ("offset", "error"),
    [
        (0x8008, WRITE),  # no store that was understood
        (0x800C, WRITE | PF_STORE),  # half of two entries
        (0x9008, WRITE | PF_STORE),  # a page that is no table
        (0x7008, WRITE | PF_STORE),
    ],
)
def test_every_other_write_is_the_handlers(hv: Bench, updates: Updates, offset: int, error: int) -> None:
    hv.tell(offset, error)
    verdict = hv.verdict()
    assert verdict and verdict[0] == BOUNCE and not updates.asked


def test_a_store_is_no_request_before_it_is_asked_for(hv: Bench, guest: Domain, updates: Updates) -> None:
    guest.writable_tables = False
    hv.tell(0x8008, WRITE | PF_STORE)
    assert hv.verdict() == BOUNCED and not updates.asked


def check_never_beside_a_hypercall(hv: Bench, guest: Domain, updates: Updates) -> None:
    guest.busy = True
    hv.listen(guest)
    hv.tell(0x8008, WRITE | PF_STORE)
    assert hv.verdict() == (RETRY, 0, 0) and not updates.asked, "beside its hypercall"
    assert guest.busy


def test_never_beside_a_hypercall(hv: Bench, guest: Domain, updates: Updates) -> None:
    check_never_beside_a_hypercall(hv, guest, updates)


def test_an_update_beside_a_hypercall_is_found(
    hv: Bench, guest: Domain, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update_table(hv: Hypervisor, domain: Domain, offset: int, value: int) -> Steps:
        yield from updates.update_entry(hv, domain, 77, 1, value)
        return SKIP

    monkeypatch.setattr(fault, "_update_table", update_table)
    with pytest.raises(AssertionError, match="beside its hypercall"):
        check_never_beside_a_hypercall(hv, guest, updates)


# ---- ended


@pytest.mark.parametrize(("error", "what"), [(4, "read"), (6, "write"), (20, "execute"), (7, "write")])
def test_without_a_handler_it_ends(hv: Bench, error: int, what: str) -> None:
    hv.tell(0x1234, error)
    assert hv.verdict() is None
    assert hv.ends == [f"page fault at guest address 0x1234 ({what}): not mapped, and no handler"]


def test_what_is_raised_while_a_frame_is_pushed_is_filled_or_the_end(hv: Bench, guest: Domain) -> None:
    hv.tell(STACK + 8, PF_USER | PF_WRITE | PF_DELIVERY, value=6)
    assert hv.verdict() == (RETRY, 0, 0) and not hv.ends
    hv.tell(STACK - 8, PF_USER | PF_WRITE | PF_DELIVERY, KERNEL_WINDOW + STACK + 100, 6)
    assert hv.verdict() is None
    assert hv.ends == ["double fault: no stack at 0x200000500064 for vector 6 (invalid opcode) at 0x1234"]


@pytest.mark.parametrize(
    ("error", "value", "reason"),
    [
        (0, 0, "no handler for vector 0 (divide error) at 0x1234, error code 0x0"),
        (0x33, 13, "no handler for vector 13 (general protection) at 0x1234, error code 0x33"),
        (0, 200, "no handler for vector 200 at 0x1234, error code 0x0"),
        (6, 14, "page fault that nobody can fill, at 0x200000000005, error code 0x6, instruction 0x1234"),
        (0, SENT + 5, "SIGTRAP, which it sent itself"),
        (0, SENT + 77, "signal 77, which it sent itself"),
        (0, (1 << 64) - 1, "signal 18446744073709551103, which it sent itself"),
        (PF_DELIVERY, 1, "double fault: no stack at 0x8 for vector 1 (debug) at 0x1234"),
        (PF_DELIVERY, EVENT, "double fault: no stack at 0x8 for the event callback at 0x1234"),
        (PF_DELIVERY, FAILSAFE, "double fault: no stack at 0x8 for the failsafe callback at 0x1234"),
    ],
)
def test_last_words(hv: Bench, guest: Domain, error: int, value: int, reason: str) -> None:
    hv.tell(5, error | PF_UNHANDLED, 8, value)
    assert hv.verdict() is None and hv.ends == [reason]
    assert guest.faults == 0, "no page fault"


def test_last_words_of_a_page_fault_elsewhere(hv: Bench, guest: Domain) -> None:
    hv.tell(8 - KERNEL_WINDOW, 6 | PF_UNHANDLED, value=14)
    assert hv.verdict() is None
    assert hv.ends == ["page fault outside the windows, at 0x8, error code 0x6, instruction 0x1234"]


@pytest.mark.parametrize("rsp", [STACK + 100, STACK + 2 * PAGE_SIZE + 1, 8, 191, 0x10_0000, END, END + 191])
def test_without_a_stack_it_ends(hv: Bench, guest: Domain, rsp: int) -> None:
    hv.tell(0x1000, rsp=KERNEL_WINDOW + rsp)
    assert hv.verdict() is None
    assert hv.ends == [f"double fault: no stack at {rsp:#x} for the page fault at guest address 0x1000"]


@pytest.mark.parametrize("size", [1, 39, 41, 64, 5000])
def test_a_message_of_another_size_ends_it(hv: Bench, size: int) -> None:
    hv.entry_code.send(b"x" * size)
    hv.loop.settle()
    assert hv.ends == [f"a page fault told in {min(size, 41)} bytes, not 40"] and not hv.domain.faults


@pytest.mark.parametrize("address", [0, KERNEL_WINDOW - 1, KERNEL_WINDOW + END, (1 << 64) - 1])
def test_a_fault_elsewhere_ends_it(hv: Bench, guest: Domain, address: int) -> None:
    hv.entry_code.send(FAULT.pack(address, 4, 0, OUTSIDE, 0))
    assert hv.verdict() is None and hv.ends == [f"a page fault outside the windows, at {address:#x}"]


def test_a_mapping_that_fails_ends_it(hv: Bench, tables: Tables) -> None:
    tables.waiting = []
    hv.tell(0)
    hv.loop.settle()
    tables.waiting[0](MonitorError(0, 12))
    assert hv.ends == ["page fault: monitor command 0: Cannot allocate memory"] and hv.verdict() is None


def test_our_own_mistake_is_loud(hv: Bench, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hv, "log", lambda line: None)
    tables.waiting = []
    hv.tell(0)
    hv.loop.settle()
    with pytest.raises(KeyError):
        tables.waiting[0](KeyError())


# ---- hanging up


@pytest.mark.parametrize("how", ["close", "shutdown", "nothing"])
def test_who_hangs_up_is_hung_up_on(hv: Bench, how: str) -> None:
    if how == "nothing":
        hv.entry_code.send(b"")
    elif how == "shutdown":
        hv.entry_code.shutdown(socket.SHUT_WR)
    else:
        hv.entry_code.close()
    hv.loop.settle()
    assert hv.domain.fault_socket is None and not hv.ends, "how its process ends is for the process to say"
    assert how == "close" or hv.entry_code.recv(64) == b"", "entry code that waits does not wait for ever"
    hv.listen(hv.domain)


def test_the_end_of_a_domain_in_the_middle_of_a_fault(hv: Bench, tables: Tables) -> None:
    tables.waiting = []
    hv.tell(0)
    hv.loop.settle()
    hv.domain.state = "dying"
    hv.listen(hv.domain)
    fault.hang_up(hv, hv.domain)
    tables.waiting[0](MonitorGone())
    assert not hv.ends and hv.entry_code.recv(64) == b""


# ---- when it is served


def test_one_at_a_time(hv: Bench, tables: Tables) -> None:
    tables.waiting, tables.pages = [], {0: "r", PAGE_SIZE: "r"}
    hv.tell(8)
    hv.tell(PAGE_SIZE)
    hv.loop.settle()
    assert tables.filled == [(8, PF_USER)] and hv.verdict() is None
    tables.waiting.pop()(None)
    assert hv.verdict() == (RETRY, 0, 0) and tables.filled[1:] == [(PAGE_SIZE, PF_USER)]
    tables.waiting.pop()(None)
    assert hv.verdict() == (RETRY, 0, 0)


def test_beside_a_hypercall(hv: Bench, tables: Tables) -> None:
    tables.pages[0] = "r"
    hv.domain.busy = True
    hv.listen(hv.domain)
    hv.tell(0)
    assert hv.verdict() == (RETRY, 0, 0)


@pytest.mark.parametrize(("field", "value"), [("launched", False), ("state", "dying"), ("parked", True)])
def test_not_before_its_time_nor_after(hv: Bench, tables: Tables, field: str, value: Any) -> None:
    before, tables.pages[0] = getattr(hv.domain, field), "r"
    setattr(hv.domain, field, value)
    hv.listen(hv.domain)
    hv.tell(0)
    assert hv.verdict() is None
    setattr(hv.domain, field, before)
    hv.listen(hv.domain)
    assert hv.verdict() == (RETRY, 0, 0)


def check_who_overdraws_by_faults_waits(hv: Bench) -> None:
    """It has to wait as long as its budget says, if another domain wants something; then it is served again."""
    hv.tables.pages[0] = "r"
    hv.domain.budget = SimpleNamespace(charge=lambda begin, end: 1_000_000)  # type: ignore[assignment]
    hv.demand = SimpleNamespace(asked=lambda domain, now: None, others=lambda domain: True)  # type: ignore[assignment]
    hv.tell(0)
    assert hv.verdict() == (RETRY, 0, 0), "what was served is answered"
    assert hv.domain.parked and not hv.domain.faults_watched, "it is served on and on"
    hv.tell(0)
    hv.loop.until(lambda: hv.domain.faults == 2)


def test_who_overdraws_by_faults_waits(hv: Bench) -> None:
    check_who_overdraws_by_faults_waits(hv)


def test_faults_that_cost_nothing_are_found(hv: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault.budget, "charged", lambda hv, domain, steps, begin: steps)
    with pytest.raises(AssertionError, match="on and on"):
        check_who_overdraws_by_faults_waits(hv)


def test_who_reads_no_verdicts_loses_them(hv: Bench, tables: Tables) -> None:
    """Thousands of faults told by hand; the hypervisor never waits."""
    tables.pages[0] = "r"
    for _ in range(1000):
        hv.tell(0)
        hv.loop.step()
    assert hv.domain.fills == 1000
    read = 0
    while hv.verdict() is not None:
        read += 1
    assert 0 < read < 1000
