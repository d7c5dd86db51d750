"""A virtual disk's translation table: the text it comes from, and every sector of it against a list."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0 import _blk, vbd
from dom0.vbd import Extent, parse_extents, translate
from tests.models.mutant import library

MANY = 1 << 60  # sectors of an image larger than any
EDGES = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 2, (1 << 64) // 512, (1 << 55) - 1, 1 << 55, 1 << 32]


def test_extents_read_as_they_are_written() -> None:
    assert parse_extents("", 100) == (Extent(0, 100),)
    assert parse_extents("10:5;0:10;99:1", 100) == (Extent(10, 5), Extent(0, 10), Extent(99, 1))
    assert len(parse_extents(";".join(f"{2 * i}:1" for i in range(16)), 100)) == 16


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "'5' is not first:count"),
        ("5:", "'5:' is not first:count"),
        ("-1:5", "'-1:5' is not first:count"),
        ("1:2:3", "'1:2:3' is not first:count"),
        ("0:1;", "'' is not first:count"),
        ("0:1 ;2:1", "'0:1 ' is not first:count"),
        ("0x1:1", "is not first:count"),
        ("\u0661:1", "is not first:count"),
        ("1" * 19 + ":1", "is not first:count"),
        ("0:0", "extent 0:0 lies outside"),
        ("0:101", "extent 0:101 lies outside the image's 100 sectors"),
        ("100:1", "extent 100:1 lies outside"),
        ("9" * 18 + ":" + "9" * 18, "lies outside"),
        ("0:1;3:3;5:1", "extent 5:1 overlaps another"),
        ("5:5;5:5", "extent 5:5 overlaps another"),
        ("5:1;0:10", "extent 0:10 overlaps another"),
        (";".join(f"{2 * i}:1" for i in range(17)), "17 extents, at most 16"),
    ],
)
def test_extents_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_extents(text, 100)
    assert said in str(caught.value)


extents = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=16).map(
    lambda gaps: tuple(
        Extent(sum(g + c for g, c in gaps[:i]) + gap, count) for i, (gap, count) in enumerate(gaps)
    )
)  # fmt: skip


def check(table: tuple[Extent, ...], sector: int, count: int) -> None:
    """The pieces are the sectors of the list, each a stretch of one extent; or there are none where one is missing."""
    listed = [e.first + i for e in table for i in range(e.count)]
    if not count or sector + count > len(listed):
        with pytest.raises(ValueError, match="are not the VBD's"):
            translate(table, sector, count)
        return
    pieces = translate(table, sector, count)
    assert [first + i for first, n in pieces for i in range(n)] == listed[sector : sector + count]
    assert len(pieces) <= len(table)


@given(extents, st.randoms(use_true_random=False), st.integers(0, 200), st.integers(0, 90))
def test_translation_against_a_list(table: tuple[Extent, ...], rng: random.Random, sector: int, count: int) -> None:
    shuffled = list(table)
    rng.shuffle(shuffled)
    check(tuple(shuffled), sector, count)


def test_every_request_of_a_small_disk() -> None:
    table = (Extent(7, 3), Extent(0, 1), Extent(20, 5), Extent(2, 2))
    for sector in range(14):
        for count in range(14):
            check(table, sector, count)


def check_edges(lib: Any, ffi: Any) -> None:
    """64-bit numbers that wrap if they are added: no sum brings a request back into the disk."""
    where, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    for table in ((Extent(MANY - 100, 50), Extent(0, 10), Extent(MANY - 40, 40)), (Extent(0, MANY),)):
        disk = ffi.new("struct blk_vbd *")
        vbd.fill(disk, table)
        size = sum(e.count for e in table)
        for sector in [*EDGES, size - 1, size, size + 1, size // 2]:
            for count in [*EDGES, size, size - 1, size + 1]:
                refused = lib.blk_translate(disk, sector, count, where, length) != 0
                assert refused == (count == 0 or sector + count > size), f"{sector}+{count} of {size}"
                if not refused:
                    assert any(e.first <= where[0] and where[0] + length[0] <= e.first + e.count for e in table)


def test_no_sum_wraps() -> None:
    check_edges(_blk.lib, _blk.ffi)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("!count || ", ""),
        ("sector >= v->sectors || count > v->sectors - sector", "sector + count > v->sectors"),
        ("count > v->sectors - sector", "0"),
        ("count < e->count - sector ? count : e->count - sector", "count"),
    ],
)
def test_a_seeded_defect_is_found(tmp_path: Path, old: str, new: str) -> None:
    ffi, lib = library(tmp_path / "blk.so", "dom0/blk.h", ["dom0/blk.c"], {"dom0/blk.c": [(old, new)]})
    with pytest.raises(AssertionError):
        check_edges(lib, ffi)
