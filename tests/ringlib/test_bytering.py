"""Byte rings: order, the wraps, what fits, and indexes that cannot be, as Xen's console and store pages have them."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.public.io import console, xs_wire
from ringlib.bytering import ByteRing
from ringlib.ring import Broken
from tests.ringlib.defects import CAUGHT, Edit, seed

SIZE = 64
BUFFER, CONS, PROD = 128, 8, 12  # where this page has them, with zeros all around
STARTS = (0, 0xFFFFFFF0, 0xFFFFFFFF)


class Page:
    """A page with one byte ring on it, whose ends are two objects, as two processes have them."""

    def __init__(self, start: int = 0) -> None:
        self._map = mmap.mmap(-1, mmap.PAGESIZE)
        self._view: Any = FFI().from_buffer(self._map)
        base = int(FFI().cast("uintptr_t", self._view))
        self[CONS] = self[PROD] = start
        self.writer, self.reader = (ByteRing(base + BUFFER, base + CONS, base + PROD, SIZE) for _ in range(2))

    def __getitem__(self, offset: int) -> int:
        value: int = struct.unpack_from("<I", self._map, offset)[0]
        return value

    def __setitem__(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self._map, offset, value % (1 << 32))

    @property
    def contents(self) -> bytes:
        return self._map[:]

    @property
    def around(self) -> bytes:
        """What is neither buffer nor index."""
        return self._map[:CONS] + self._map[PROD + 4 : BUFFER] + self._map[BUFFER + SIZE :]


def check_order_through_the_wraps() -> None:
    for start in STARTS:
        page, sent, received = Page(start), b"", b""
        for i in range(200):
            data = bytes((i + j) % 256 for j in range(1 + i % SIZE))
            assert page.writer.write(data) == len(data)
            sent += data
            received += page.reader.read()
            assert page[CONS] == page[PROD] == (start + len(sent)) % (1 << 32)
        assert received == sent
        assert not any(page.around)


def test_order_through_the_wraps() -> None:
    check_order_through_the_wraps()


def check_what_does_not_fit_stays_out() -> None:
    for start in STARTS:
        page = Page(start)
        assert page.reader.read() == b""
        assert page.writer.write(bytes(range(40))) == 40
        assert page.writer.write(bytes(range(40, 80))) == SIZE - 40
        assert page.writer.write(b"x") == page.writer.write(b"") == 0
        assert page.reader.read() == bytes(range(SIZE))
        assert page.writer.write(bytes(10 * SIZE)) == SIZE
        assert not any(page.around)


def test_what_does_not_fit_stays_out() -> None:
    check_what_does_not_fit_stays_out()


def check_an_impossible_index_is_refused_without_change() -> None:
    for start in STARTS:
        for wrong in (SIZE + 1, 1 << 31, -1):
            page = Page(start)
            page.writer.write(b"abc")
            page[PROD] = page[CONS] + wrong
            before = page.contents
            with pytest.raises(Broken):
                page.reader.read()
            assert page.contents == before

            page = Page(start)
            page.writer.write(b"abc")
            page[CONS] = page[PROD] - wrong
            before = page.contents
            with pytest.raises(Broken):
                page.writer.write(b"x")
            assert page.contents == before


def test_an_impossible_index_is_refused_without_change() -> None:
    check_an_impossible_index_is_refused_without_change()


def test_the_size_is_a_power_of_two() -> None:
    for size in (0, 3, 100, -1, -64):
        with pytest.raises(ValueError, match="power of two"):
            ByteRing(0, 0, 0, size)


def test_the_rings_of_the_contract_are_powers_of_two() -> None:
    for size in (console.IN_BYTES, console.OUT_BYTES, xs_wire.RING_BYTES):
        ByteRing(0, 0, 0, size)


@given(
    start=st.sampled_from(STARTS) | st.integers(0, 0xFFFFFFFF),
    steps=st.lists(st.none() | st.binary(max_size=SIZE + 10), max_size=60),
)
def test_a_model(start: int, steps: list[bytes | None]) -> None:
    """Against a plain bytes object: None reads, anything else is written."""
    page, held = Page(start), b""
    for step in steps:
        if step is None:
            assert page.reader.read() == held
            held = b""
        else:
            n = page.writer.write(step)
            assert n == min(len(step), SIZE - len(held))
            held += step[:n]
    assert not any(page.around)


@given(cons=st.integers(0, 0xFFFFFFFF), prod=st.integers(0, 0xFFFFFFFF), near=st.none() | st.integers(-2, SIZE + 2))
def test_whatever_the_peer_writes_only_the_buffer_is_touched(cons: int, prod: int, near: int | None) -> None:
    """Also where it overwrites our own index: both lie in the shared page."""
    page = Page()
    page[CONS], page[PROD] = cons, prod if near is None else cons + near
    try:
        assert page.writer.write(b"x" * SIZE) <= SIZE
        assert len(page.reader.read()) <= SIZE
    except Broken:
        assert (page[PROD] - page[CONS]) % (1 << 32) > SIZE
    assert not any(page.around)


@pytest.mark.parametrize(
    ("check", "edit"),
    [
        pytest.param(
            check_an_impossible_index_is_refused_without_change,
            Edit(
                "ring.c",
                "prod, memory_order_relaxed), part;\n\n    if (p - c > size)\n        return -EPROTO;",
                "prod, memory_order_relaxed), part;\n\n    if (p - c > size)\n        return 0;",
            ),
            id="writer believes the reader",
        ),
        pytest.param(
            check_an_impossible_index_is_refused_without_change,
            Edit(
                "ring.c",
                "cons, memory_order_relaxed), part;\n\n    if (p - c > size)\n        return -EPROTO;",
                "cons, memory_order_relaxed), part;\n\n    if (p - c > size)\n        c = p - size;",
            ),
            id="reader believes the writer",
        ),
        pytest.param(
            check_what_does_not_fit_stays_out,
            Edit("ring.c", "n > size - (p - c)", "n > size"),
            id="overrun",
        ),
        pytest.param(
            check_order_through_the_wraps,
            Edit("ring.c", "part = size - (p & (size - 1));", "part = size;"),
            id="written past the end",
        ),
        pytest.param(
            check_order_through_the_wraps,
            Edit("ring.c", "memcpy((char *)out + part, buffer, n - part);", ""),
            id="the second half not read",
        ),
    ],
)
def test_seeded_defects_are_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: Callable[[], None], edit: Edit
) -> None:
    seed(monkeypatch, tmp_path, edit)
    with pytest.raises(CAUGHT):
        check()
