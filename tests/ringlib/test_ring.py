"""The ring of io/ring.h: layout, notification, bounds, copying once; and a model that both ends must agree with."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from ringlib import BackRing, Broken, FrontRing, WouldBlock
from tests.conftest import NIGHTLY
from tests.ringlib.defects import CAUGHT, Edit, compiled, copy, seed
from tests.ringlib.model import STARTS, Page, RingMachine, records

PAGE = mmap.PAGESIZE
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 4, 8, 12
NEAR_WRAP = 0xFFFFFF00


def ends(request: int = 112, response: int = 16, start: int = 0, pages: int = 1) -> tuple[Page, FrontRing, BackRing]:
    page = Page(pages)
    front = FrontRing(page.address, page.size, request, response, start)
    return page, front, BackRing(page.address, page.size, request, response)


# ---- layout


@pytest.mark.parametrize(
    ("request_size", "response_size", "pages", "entries"),
    [
        *((112, 16, pages, 32 * pages) for pages in (1, 2, 4, 8, 16)),  # blkif
        (12, 4, 1, 256),  # netif transmit
        (8, 8, 1, 256),  # netif receive
        (16, 16, 1, 128),  # netif control
    ],
)
def test_entries_and_slots_lie_where_io_ring_h_has_them(
    request_size: int, response_size: int, pages: int, entries: int
) -> None:
    page, front, back = ends(request_size, response_size, pages=pages)
    slot = max(request_size, response_size)
    assert page.contents[:64] == struct.pack("<4I", 0, 1, 0, 1) + bytes(48)
    assert front.nr_ents == back.nr_ents == entries
    assert 64 + entries * slot <= page.size < 64 + 2 * entries * slot

    front.publish(records(request_size, *range(entries)))
    assert page[REQ_PROD] == entries
    for i in range(entries):
        assert page.contents[64 + i * slot :][:request_size] == records(request_size, i)

    assert back.take() == records(request_size, *range(entries))
    back.publish(records(response_size, *range(entries, 2 * entries)))
    assert page[RSP_PROD] == entries
    for i in range(entries):
        assert page.contents[64 + i * slot :][:response_size] == records(response_size, entries + i)
    assert front.take() == records(response_size, *range(entries, 2 * entries))


def test_only_the_frontend_initialises_and_consumers_are_private() -> None:
    page, front, back = ends()
    front.publish(records(112, 1, 2, 3))
    before = page.contents
    BackRing(page.address, PAGE, 112, 16)
    back.take(2)
    assert page.contents == before
    back.publish(records(16, 1, 2))
    before = page.contents
    front.take(1)
    assert page.contents == before


def test_a_backend_begins_where_the_responses_stand() -> None:
    page, front, back = ends()
    front.publish(records(112, 1, 2, 3))
    assert back.take() == records(112, 1, 2, 3)
    back.publish(records(16, 1))
    assert BackRing(page.address, PAGE, 112, 16).take() == records(112, 2, 3)


@pytest.mark.parametrize(("size", "request_size", "response_size"), [(64, 16, 16), (PAGE, PAGE, 16), (PAGE, 0, 0)])
def test_a_ring_has_an_entry(size: int, request_size: int, response_size: int) -> None:
    page = Page()
    for kind in (FrontRing, BackRing):
        with pytest.raises(ValueError, match="fits"):
            kind(page.address, size, request_size, response_size)


# ---- notification


def check_notify_only_when_asked() -> None:
    for start in STARTS:
        page, front, back = ends(16, 16, start)
        assert [front.publish(records(16, i)) for i in range(3)] == [True, False, False]  # the header asks for the first
        assert len(back.take()) == 48
        assert not back.recheck()  # asks for the next
        assert [front.publish(records(16, i, i)) for i in range(2)] == [True, False]
        assert back.recheck()  # there is work: asks for nothing
        assert not front.publish(records(16, 9))
        assert not front.publish(b"")

        page[REQ_EVENT] = start + 8 + 5  # a threshold further ahead, as a batching backend may set
        assert [front.publish(records(16, i, i)) for i in range(4)] == [False, False, True, False]

        back.take()
        assert [back.publish(records(16, i)) for i in range(2)] == [True, False]
        front.take()
        assert not front.recheck()
        assert [back.publish(records(16, i)) for i in range(2)] == [True, False]


def test_notify_only_when_asked() -> None:
    check_notify_only_when_asked()


def test_final_check_finds_what_came_after_the_last_look() -> None:
    _, front, back = ends(16, 16)
    assert back.take() == b""
    front.publish(records(16, 1))
    assert back.recheck()
    back.publish(back.take())
    assert front.recheck()


def litmus(folder: Path, rounds: int, seconds: float) -> tuple[int, int, int]:
    """Losses, and how often the producer need not notify and the consumer might sleep: of a copy of ring.h in `folder`."""
    ffi: Any = FFI()
    ffi.cdef("int32_t litmus(uint32_t, double, int32_t, int32_t, uint32_t *, uint32_t *);")
    lib = ffi.dlopen(str(compiled(folder, Path(__file__).with_name("litmus.c"))))
    quiet, asleep = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    cpus = sorted(os.sched_getaffinity(0))
    return lib.litmus(rounds, seconds, cpus[0], cpus[-1], quiet, asleep), quiet[0], asleep[0]


two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU sees its own stores in order")


@two_cpus
def test_no_wake_up_is_lost(tmp_path: Path) -> None:
    lost, quiet, asleep = litmus(copy(tmp_path), 10_000_000, 30 if NIGHTLY else 1)
    assert lost == 0
    assert quiet and asleep, "the two never met: nothing was tried"


@two_cpus
@pytest.mark.parametrize(
    "defect",
    [
        pytest.param(
            Edit(
                "ring.h",
                "new, memory_order_release);\n    atomic_thread_fence(memory_order_seq_cst);",
                "new, memory_order_release);",
            ),
            id="no barrier in push",
        ),
        pytest.param(
            Edit(
                "ring.h",
                "cons + want, memory_order_relaxed);\n    atomic_thread_fence(memory_order_seq_cst);",
                "cons + want, memory_order_relaxed);",
            ),
            id="no barrier in final check",
        ),
        pytest.param(
            Edit(
                "ring.h",
                "seq_cst);\n    return (uint32_t)(atomic_load_explicit(prod, memory_order_acquire) - cons) >= want;",
                "seq_cst);\n    return 0;",
            ),
            id="no second look",
        ),
    ],
)
def test_a_lost_wake_up_is_seen(tmp_path: Path, defect: Edit) -> None:
    lost, _, _ = litmus(copy(tmp_path, defect), 100_000_000, 20)
    assert lost


# ---- bounds


def check_overflow_is_refused_without_change() -> None:
    for start in STARTS:
        page, front, back = ends(16, 16, start)
        entries = front.nr_ents
        front.publish(records(16, *range(10)))
        before = page.contents
        with pytest.raises(WouldBlock):
            front.publish(bytes(16) * (entries - 9))
        assert page.contents == before and front.free == entries - 10
        front.publish(records(16, *range(10, entries)))
        with pytest.raises(WouldBlock):
            front.publish(bytes(16))

        assert back.take(7) == records(16, *range(7))
        before = page.contents
        with pytest.raises(WouldBlock):
            back.publish(bytes(16) * 8)
        assert page.contents == before and back.pending == 7
        back.publish(records(16, *range(7)))
        with pytest.raises(WouldBlock):
            front.publish(bytes(16))  # answered, but the answers are not taken
        assert front.take() == records(16, *range(7)) and front.free == 7


def test_overflow_is_refused_without_change() -> None:
    check_overflow_is_refused_without_change()


def check_poisoned(page: Page, offset: int, value: int, end: FrontRing | BackRing, record: bytes) -> None:
    """The peer moved an index to where it cannot be: Broken now, and for ever, whatever the peer does then."""
    right, page[offset] = page[offset], value
    with pytest.raises(Broken):
        end.take()
    page[offset] = right
    before = page.contents
    for _ in range(2):
        with pytest.raises(Broken):
            end.take()
        with pytest.raises(Broken):
            end.publish(record)
    assert end.recheck(), "nobody sleeps on a broken ring"
    assert page.contents == before


def check_an_impossible_request_producer_poisons() -> None:
    for start in STARTS:
        for wrong in (33, 34, 1 << 31, -1, -10):  # 32 entries, 10 taken, 4 of them answered
            page, front, back = ends(112, 16, start)
            front.publish(records(112, *range(12)))
            back.take(10)
            back.publish(records(16, *range(4)))
            value = start + 4 + wrong if wrong > 0 else start + 10 + wrong
            check_poisoned(page, REQ_PROD, value, back, bytes(16))


def check_an_impossible_response_producer_poisons() -> None:
    for start in STARTS:
        for wrong in (13, 33, 1 << 31, 3, 0):  # 12 asked for, 4 answers taken
            page, front, back = ends(112, 16, start)
            front.publish(records(112, *range(12)))
            back.take()
            back.publish(records(16, *range(5)))
            front.take(4)
            check_poisoned(page, RSP_PROD, start + wrong, front, bytes(112))


def test_an_impossible_request_producer_poisons() -> None:
    check_an_impossible_request_producer_poisons()


def test_an_impossible_response_producer_poisons() -> None:
    check_an_impossible_response_producer_poisons()


def test_the_furthest_possible_indexes_do_not() -> None:
    page, front, back = ends(112, 16, NEAR_WRAP)
    front.publish(records(112, *range(12)))
    back.take()
    back.publish(records(16, *range(4)))
    page[REQ_PROD] = NEAR_WRAP + 4 + 32
    assert len(back.take()) == 24 * 112
    page[RSP_PROD] = NEAR_WRAP + 12
    assert len(front.take()) == 12 * 16


# ---- copying


def check_records_are_copied_once() -> None:
    page, front, back = ends(16, 16)
    front.publish(records(16, 1, 2))
    taken = back.take()
    page.fill(0xEE)
    assert taken == records(16, 1, 2)
    back.publish(taken)
    answers = front.take()
    page.fill(0xEE)
    assert answers == records(16, 1, 2)


def test_records_are_copied_once() -> None:
    check_records_are_copied_once()


def test_what_was_published_is_not_the_senders_any_more() -> None:
    _, front, back = ends(16, 16)
    mine = bytearray(records(16, 1, 2))
    front.publish(mine)
    mine[:] = bytes(32)
    assert back.take() == records(16, 1, 2)


def test_a_batch_counts_bytes_whatever_its_items_are() -> None:
    _, front, back = ends(16, 16)
    front.publish(memoryview(records(16, 1, 2)).cast("I"))
    assert back.take() == records(16, 1, 2)
    with pytest.raises(ValueError, match="not records"):
        front.publish(bytes(17))
    with pytest.raises(BufferError):
        front.publish(memoryview(bytes(64))[::2])


def test_take_at_most() -> None:
    _, front, back = ends(16, 16)
    front.publish(records(16, 1, 2, 3))
    assert back.take(0) == b""
    assert back.take(2) == records(16, 1, 2)
    assert back.take(1 << 40) == records(16, 3)
    with pytest.raises(OverflowError):
        back.take(-1)


def check_the_wrap_of_slots_and_of_indexes() -> None:
    """1,000 records in uneven batches, past both ends of the ring and past 2^32."""
    for request_size, response_size in ((112, 16), (12, 4), (16, 16), (4, 16)):
        page, front, back = ends(request_size, response_size, NEAR_WRAP)
        sent = 0
        while sent < 1000:
            batch = range(sent, sent + min(1 + sent % 29, front.nr_ents))
            front.publish(records(request_size, *batch))
            assert back.take() == records(request_size, *batch)
            back.publish(records(response_size, *reversed(batch)))
            assert front.take() == records(response_size, *reversed(batch))
            sent += len(batch)
        assert not any(page.slack)


def test_the_wrap_of_slots_and_of_indexes() -> None:
    check_the_wrap_of_slots_and_of_indexes()


# ---- a model

TestRingModel = RingMachine.TestCase


# ---- what must be noticed


def check_model() -> None:
    run_state_machine_as_test(RingMachine, settings=settings(max_examples=200, phases=[Phase.generate]))


@pytest.mark.parametrize(
    ("check", "edit"),
    [
        pytest.param(
            check_an_impossible_request_producer_poisons,
            Edit(
                "ring.h",
                "n > b->nr_ents - (b->req_cons - b->rsp_prod_pvt)",
                "(uint32_t)(b->req_seen - b->rsp_prod_pvt) > b->nr_ents",
            ),
            id="a producer may go back",
        ),
        pytest.param(
            check_an_impossible_response_producer_poisons,
            Edit("ring.h", "n > f->req_prod_pvt - f->rsp_cons", "n > f->nr_ents"),
            id="answers to what was not asked",
        ),
        pytest.param(
            check_an_impossible_response_producer_poisons,
            Edit("ring.h", "f->req_prod_pvt - f->rsp_cons) {\n        f->broken = 1;", "f->req_prod_pvt - f->rsp_cons) {"),
            id="poison wears off",
        ),
        pytest.param(
            check_overflow_is_refused_without_change,
            Edit("ring.h", "if (n > ring_front_free(f))", "if (n > f->nr_ents)"),
            id="overflow",
        ),
        pytest.param(
            check_overflow_is_refused_without_change,
            Edit("ring.h", "    if (n > b->req_cons - old)\n        return -EAGAIN;\n", ""),
            id="answers before requests",
        ),
        pytest.param(
            check_notify_only_when_asked,
            Edit("ring.h", "< (uint32_t)(new - old)", "<= (uint32_t)(new - old)"),
            id="notify once too often",
        ),
        pytest.param(
            check_notify_only_when_asked,
            Edit("ring.h", "(uint32_t)(new - atomic_load_explicit(event, memory_order_relaxed)) < (uint32_t)(new - old)", "1"),
            id="notify always",
        ),
        pytest.param(
            check_the_wrap_of_slots_and_of_indexes,
            Edit("ring.h", "(index & (nr_ents - 1)) * slot_size", "(index % (nr_ents + 1)) * slot_size"),
            id="wrong slot",
        ),
        pytest.param(
            check_the_wrap_of_slots_and_of_indexes,
            Edit("ring.h", "n < to_wrap ? n : to_wrap", "n"),
            id="a copy past the wrap",
        ),
        pytest.param(
            check_model,
            Edit(
                "ring.h",
                "(uint32_t)(new - atomic_load_explicit(event, memory_order_relaxed)) < (uint32_t)(new - old)",
                "new >= *event && old < *event",
            ),
            id="indexes compared as numbers",
        ),
        pytest.param(
            check_model,
            Edit("ring.h", "atomic_store_explicit(event, cons + want, memory_order_relaxed);", ""),
            id="sleeps without asking",
        ),
    ],
)
def test_seeded_defects_are_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: Callable[[], None], edit: Edit
) -> None:
    seed(monkeypatch, tmp_path, edit)
    with pytest.raises(CAUGHT):
        check()


def test_a_backend_without_bounds_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seed(monkeypatch, tmp_path, macros=("-DRING_DEFECT_NO_BOUNDS",))
    with pytest.raises(CAUGHT):
        check_an_impossible_request_producer_poisons()


def test_a_batch_that_is_a_view_of_the_ring_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: BackRing, max_items: int | None = None) -> memoryview:
        page = FFI().cast("char **", int(FFI().cast("uintptr_t", self.state)))[0]
        return memoryview(FFI().buffer(page, PAGE))[64:96]

    monkeypatch.setattr(BackRing, "take", take)
    with pytest.raises(CAUGHT):
        check_records_are_copied_once()
