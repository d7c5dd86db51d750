"""The block mover in C: requests over a real file against a byte string, and guests whose requests and rings lie."""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dom0 import _blk
from dom0.vbd import Extent, fill
from hypervisor.public.io.blkif import HEAD, REQUEST_BYTES, RESPONSE, RESPONSE_BYTES, SECTOR, SEGMENT, BlkOp, BlkStatus
from hypervisor.public.types import PAGE_SIZE
from ringlib.ring import FrontRing
from tests.conftest import NIGHTLY
from tests.models.mutant import library

BLK = "dom0/blk.c"
BATCHES = 20_000 if NIGHTLY else 1_500
HANDLE = 51712
OKAY, ERROR, EOPNOTSUPP = BlkStatus
READ, WRITE, FLUSH = BlkOp
NR_PAGES = 12  # of the guest, granted as 100..


@dataclass
class Request:
    """One request: segments are (gref, first sector, last sector) of a page."""

    op: int
    sector: int = 0
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    ident: int = 1
    handle: int = HANDLE
    nr: int | None = None

    def pack(self) -> bytes:
        nr = len(self.segments) if self.nr is None else self.nr
        head = HEAD.pack(self.op, nr & 0xFF, self.handle, self.ident, self.sector)
        return (head + b"".join(SEGMENT.pack(*s) for s in self.segments[:11])).ljust(REQUEST_BYTES, b"\0")

    @property
    def sectors(self) -> int:
        return sum(last - first + 1 for _, first, last in self.segments)


class Disk:
    """A guest's ring and pages, the mover's VBD, and the image."""

    def __init__(self, ffi: Any, lib: Any, image: Path, extents: tuple[Extent, ...], writable: bool = True) -> None:
        self.ffi, self.lib, self.extents = ffi, lib, extents
        self.fd = os.open(image, os.O_RDWR if writable else os.O_RDONLY)
        self.memory = ffi.new("char[]", (NR_PAGES + 2) * PAGE_SIZE)
        self.base = -(-int(ffi.cast("uintptr_t", self.memory)) // PAGE_SIZE) * PAGE_SIZE
        self.ring = FrontRing(self.base, PAGE_SIZE, REQUEST_BYTES, RESPONSE_BYTES)
        self.vbd = ffi.new("struct blk_vbd *", {"fd": self.fd, "handle": HANDLE, "writable": writable})
        self.counters = ffi.new("uint64_t[]", 7)
        self.vbd.stats = self.counters
        fill(self.vbd, extents)
        assert lib.blk_attach(self.vbd, ffi.cast("void *", self.base), PAGE_SIZE) == 0
        self.pages = {100 + i: self.base + (1 + i) * PAGE_SIZE for i in range(NR_PAGES)}

    def close(self) -> None:
        os.close(self.fd)

    def write_page(self, gref: int, data: bytes, offset: int = 0) -> None:
        self.ffi.memmove(self.ffi.cast("void *", self.pages[gref] + offset), data, len(data))

    def read_page(self, gref: int, offset: int = 0, size: int = PAGE_SIZE) -> bytes:
        return bytes(self.ffi.buffer(self.ffi.cast("char *", self.pages[gref] + offset), size))

    def turn(self) -> int:
        """One batch, as blkback runs it; its result, or what take said where that was negative."""
        taken = self.lib.blk_take(self.vbd)
        if taken < 0:
            return int(taken)
        scratch = self.ffi.new("uint32_t[]", 32 * 11)
        for i in range(self.lib.blk_missing(self.vbd, scratch, 32 * 11)):
            self.vbd.address[scratch[i]] = self.pages.get(scratch[i], 1)
        return int(self.lib.blk_run(self.vbd))

    def ask(self, *requests: Request) -> list[int]:
        """Their statuses, asked in one batch."""
        self.ring.publish(b"".join(request.pack() for request in requests))
        assert self.turn() >= 0
        answers = list(RESPONSE.iter_unpack(self.ring.take()))
        assert [(ident, op) for ident, op, _ in answers] == [(r.ident, r.op) for r in requests]
        return [status for _, _, status in answers]


def make_image(folder: Path, sectors: int) -> Path:
    """Every sector says which it is."""
    image = folder / "image"
    image.write_bytes(b"".join(struct.pack("<Q", s) * 64 for s in range(sectors)))
    return image


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A whole image of 256 sectors."""
    made = Disk(_blk.ffi, _blk.lib, make_image(tmp_path, 256), (Extent(0, 256),))
    yield made
    made.close()


def sector_of(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data)[0])


# ---- one request


def test_read_write_flush(disk: Disk, tmp_path: Path) -> None:
    assert disk.ask(Request(READ, 5, [(100, 0, 7), (101, 2, 3)], 77)) == [OKAY]
    assert [sector_of(disk.read_page(100, i * SECTOR)) for i in range(8)] == list(range(5, 13))
    assert sector_of(disk.read_page(101, 2 * SECTOR)) == 13 and disk.read_page(101, 0, 2 * SECTOR) == bytes(2 * SECTOR)
    disk.write_page(102, b"A" * SECTOR + b"B" * SECTOR)
    assert disk.ask(Request(WRITE, 9, [(102, 0, 1)])) == [OKAY] == disk.ask(Request(FLUSH))
    image = (tmp_path / "image").read_bytes()
    assert image[9 * SECTOR : 11 * SECTOR] == b"A" * SECTOR + b"B" * SECTOR and sector_of(image[11 * SECTOR :]) == 11
    assert list(disk.counters)[:4] == [10 * SECTOR, 2 * SECTOR, 3, 3]


def test_the_largest_request(disk: Disk) -> None:
    segments = [(100 + i, 0, 7) for i in range(11)]
    assert disk.ask(Request(READ, 256 - 88, segments)) == [OKAY]
    assert [sector_of(disk.read_page(100 + i)) for i in range(11)] == list(range(168, 256, 8))


def lies() -> dict[str, tuple[Request, int]]:
    one = [(100, 0, 0)]
    return {
        "past the end": (Request(READ, 256, one), ERROR),
        "across the end": (Request(READ, 255, [(100, 0, 1)]), ERROR),
        "a sector that wraps": (Request(READ, (1 << 64) - 1, one), ERROR),
        "a byte that wraps": (Request(WRITE, 1 << 55, one), ERROR),
        "a negative byte": (Request(WRITE, (1 << 63) // SECTOR, one), ERROR),
        "a sum that wraps": (Request(WRITE, (1 << 64) - 2, [(100, 0, 7)]), ERROR),
        "no segment": (Request(READ, 0, []), ERROR),
        "twelve segments": (Request(READ, 0, one * 11, nr=12), ERROR),
        "255 segments": (Request(WRITE, 0, one * 11, nr=255), ERROR),
        "a segment that ends before it begins": (Request(READ, 0, [(100, 3, 2)]), ERROR),
        "one of two that runs backwards": (Request(READ, 0, [(100, 0, 7), (101, 5, 1)]), ERROR),
        "a segment beyond its page": (Request(WRITE, 0, [(100, 0, 8)]), ERROR),
        "a segment far beyond its page": (Request(READ, 0, [(100, 200, 255)]), ERROR),
        "a frame that was not granted": (Request(WRITE, 0, [(999, 0, 0)]), ERROR),
        "one frame of two that was not granted": (Request(READ, 0, [(100, 0, 0), (999, 0, 0)]), ERROR),
        "a reference beyond the table": (Request(READ, 0, [(4096, 0, 0)]), ERROR),
        "a reference far beyond it": (Request(READ, 0, [(0xFFFFFFFF, 0, 0)]), ERROR),
        "another's device": (Request(READ, 0, one, handle=HANDLE + 16), ERROR),
        "a barrier": (Request(2, 0, one), EOPNOTSUPP),
        "a discard": (Request(5, 0, one), EOPNOTSUPP),
        "indirect segments": (Request(6, 0, one), EOPNOTSUPP),
        "no operation": (Request(255, 0, one), EOPNOTSUPP),
    }


def check_lies(disk: Disk) -> None:
    """Each is answered, moves nothing, and spoils no honest neighbour in its batch."""
    image = os.pread(disk.fd, 1 << 20, 0)
    for lie, (request, status) in lies().items():
        for gref in disk.pages:
            disk.write_page(gref, b"\xee" * PAGE_SIZE)
        honest = Request(READ, 7, [(105, 0, 0)], 2)
        assert disk.ask(request, honest) == [status, OKAY] == disk.ask(honest, request)[::-1], lie
        assert os.pread(disk.fd, 1 << 20, 0) == image, f"{lie}: the image changed"
        touched = [gref for gref in disk.pages if gref != 105 and disk.read_page(gref) != b"\xee" * PAGE_SIZE]
        assert not touched and sector_of(disk.read_page(105)) == 7, lie


def check_twelve(disk: Disk) -> None:
    """The twelfth segment of one request would be the first words of the next, which a guest may choose to suit."""
    suits = Request(100, 0, [], 2, handle=0)
    assert disk.ask(Request(READ, 0, [(100, 0, 0)])) == [OKAY]
    assert disk.ask(Request(READ, 0, [(100, 0, 0)] * 11, nr=12), suits) == [ERROR, EOPNOTSUPP]


def test_lies_in_a_request(disk: Disk) -> None:
    check_lies(disk)
    assert disk.counters[5] == 2 * len(lies())
    check_twelve(disk)


def check_read_only(disk: Disk) -> None:
    image = os.pread(disk.fd, 1 << 20, 0)
    disk.vbd.writable = 0
    requests = Request(WRITE, 0, [(100, 0, 0)]), Request(READ, 0, [(101, 0, 0)], 2), Request(FLUSH, ident=3)
    assert disk.ask(*requests) == [ERROR, OKAY, OKAY]
    assert os.pread(disk.fd, 1 << 20, 0) == image


def test_a_read_only_disk_is_not_written(disk: Disk) -> None:
    check_read_only(disk)


def test_a_descriptor_opened_read_only_is_the_second_lock(tmp_path: Path) -> None:
    disk = Disk(_blk.ffi, _blk.lib, make_image(tmp_path, 8), (Extent(0, 8),), writable=False)
    disk.vbd.writable = 1
    assert disk.ask(Request(WRITE, 0, [(100, 0, 0)])) == [ERROR]
    disk.close()


def test_a_refused_grant_stays_refused(disk: Disk) -> None:
    assert disk.ask(Request(READ, 0, [(999, 0, 0)])) == [ERROR]
    disk.pages[999] = disk.pages[100]
    assert disk.ask(Request(READ, 0, [(999, 0, 0)])) == [ERROR]


def test_an_image_that_was_cut_short_reads_as_an_error(disk: Disk) -> None:
    os.ftruncate(disk.fd, 10 * SECTOR)
    assert disk.ask(Request(READ, 8, [(100, 0, 1)]), Request(READ, 20, [(101, 0, 3)], 2)) == [OKAY, ERROR]
    assert disk.ask(Request(READ, 8, [(100, 0, 3)])) == [ERROR]


# ---- batches


def test_neighbours_are_one_call(disk: Disk) -> None:
    """Sorted and merged: what is contiguous in the image is moved at once, in whatever order it was asked for."""
    requests = [Request(READ, 8 * i, [(100 + i, 0, 7)], i) for i in (3, 0, 2, 1)]
    assert disk.ask(*requests) == [OKAY] * 4
    assert [sector_of(disk.read_page(100 + i)) for i in range(4)] == [0, 8, 16, 24]


def check_the_last_write_holds(disk: Disk) -> None:
    """Writes of one batch that overlap, wholly or in part, in the order they came in."""
    rng = random.Random(18)
    for gref in disk.pages:
        disk.write_page(gref, bytes([gref]) * PAGE_SIZE)
    for _ in range(200):
        want = bytearray(os.pread(disk.fd, 64 * SECTOR, 0))
        requests = []
        for i in range(rng.randrange(2, 20)):
            gref, at, n = rng.choice(list(disk.pages)), rng.randrange(40), rng.randrange(1, 9)
            requests.append(Request(WRITE, at, [(gref, 0, n - 1)], i))
            want[at * SECTOR : (at + n) * SECTOR] = bytes([gref]) * SECTOR * n
        assert disk.ask(*requests) == [OKAY] * len(requests)
        assert os.pread(disk.fd, 64 * SECTOR, 0) == want, "an earlier write came last"


def test_the_last_write_holds(disk: Disk) -> None:
    check_the_last_write_holds(disk)


class Model:
    """The VBD as a byte string, and what each request of a batch does to it, writes before reads, nothing across a flush."""

    def __init__(self, disk: Disk) -> None:
        image = os.pread(disk.fd, 1 << 20, 0)
        self.place = [s for e in disk.extents for s in range(e.first, e.first + e.count)]
        self.image = bytearray(image)
        self.pages = {gref: bytearray(disk.read_page(gref)) for gref in disk.pages}

    def run(self, requests: list[Request]) -> list[int]:
        group: list[Request] = []
        out: dict[int, int] = {}
        for request in [*requests, None]:
            if request is None or request.op == FLUSH:
                for kind in (WRITE, READ):
                    for r in [r for r in group if r.op == kind]:
                        out[r.ident] = self.move(r)
                group = []
                if request:
                    out[request.ident] = OKAY
            else:
                group.append(request)
        return [out[request.ident] for request in requests]

    def move(self, request: Request) -> int:
        if request.sector + request.sectors > len(self.place):
            return ERROR
        sector = request.sector
        for gref, first, last in request.segments:
            for i in range(first, last + 1):
                image = slice(self.place[sector] * SECTOR, (self.place[sector] + 1) * SECTOR)
                page = slice(i * SECTOR, (i + 1) * SECTOR)
                if request.op == WRITE:
                    self.image[image] = self.pages[gref][page]
                else:
                    self.pages[gref][page] = self.image[image]
                sector += 1
        return OKAY


EXTENTS = {
    "the whole image": (Extent(0, 200),),
    "three, out of order": (Extent(100, 50), (Extent(10, 3)), Extent(160, 30)),
    "sixteen of one sector": tuple(Extent(190 - 7 * i, 1) for i in range(16)),
    "sixteen neighbours": tuple(Extent(5 * i, 5) for i in range(16)),
}


def play(disk: Disk, batches: int) -> None:
    """Random batches; a page takes part in one request of a batch, so that the order of reads is nobody's business."""
    rng, model = random.Random(19), Model(disk)
    size = len(model.place)
    for _ in range(batches):
        pages = rng.sample(list(disk.pages), NR_PAGES)
        requests: list[Request] = []
        while pages and len(requests) < 32 and rng.random() < 0.9:
            op = rng.choice((READ, READ, WRITE, WRITE, FLUSH))
            segments = []
            for gref in [pages.pop() for _ in range(min(len(pages), rng.choice((1, 1, 2, 4, 11))))] if op != FLUSH else []:
                first = rng.randrange(8)
                segments.append((gref, first, rng.randrange(first, 8)) if rng.random() < 0.6 else (gref, 0, 7))
            requests.append(Request(op, rng.randrange(size + 2) if op != FLUSH else 0, segments, len(requests)))
        for gref in disk.pages:
            data = rng.randbytes(16) * (PAGE_SIZE // 16)
            disk.write_page(gref, data)
            model.pages[gref][:] = data
        assert disk.ask(*requests) == model.run(requests), "statuses"
        assert all(disk.read_page(gref) == page for gref, page in model.pages.items()), "what was read"
    assert os.pread(disk.fd, 1 << 20, 0) == model.image, "what was written"


@pytest.mark.parametrize("extents", EXTENTS)
def test_batches_against_the_model(tmp_path: Path, extents: str) -> None:
    disk = Disk(_blk.ffi, _blk.lib, make_image(tmp_path, 200), EXTENTS[extents])
    play(disk, BATCHES // len(EXTENTS))
    disk.close()


def test_the_most_pieces_that_a_batch_can_have(tmp_path: Path) -> None:
    """Sixteen extents that are neighbours, cut within segments, and 32 requests of eleven: one call of all their parts."""
    extents = tuple(Extent(first, count) for first, count in zip(range(3, 3000, 171), [171] * 16, strict=False))
    disk = Disk(_blk.ffi, _blk.lib, make_image(tmp_path, 3000), extents)
    requests = [Request(READ, 88 * i, [(100 + s, 0, 7) for s in range(11)], i) for i in range(31)]
    assert disk.ask(*requests) == [OKAY] * 31
    assert [sector_of(disk.read_page(100 + s)) for s in range(11)] == [3 + 88 * 30 + 8 * s for s in range(11)]
    disk.close()


# ---- durability


@pytest.fixture
def broken(disk: Disk) -> Iterator[Disk]:
    """Its descriptor is one whose fdatasync fails, and which takes no write at an offset either: a pipe."""
    read, write = os.pipe()
    os.dup2(write, disk.fd)
    yield disk
    os.close(read)
    os.close(write)


def check_a_flush_error_latches(disk: Disk, image: Path) -> None:
    """The host may have forgotten the error by the next call: nothing succeeds any more until the disk is attached anew."""
    assert disk.ask(Request(FLUSH)) == [ERROR]
    fd = os.open(image, os.O_RDWR)
    os.dup2(fd, disk.fd)
    os.close(fd)
    one = [(100, 0, 0)]
    assert disk.ask(Request(FLUSH), Request(WRITE, 0, one, 2), Request(READ, 0, [(101, 0, 0)], 3)) == [ERROR] * 3, "it healed"
    assert disk.vbd.broken and sector_of(image.read_bytes()) == 0


def test_a_flush_error_latches(broken: Disk, tmp_path: Path) -> None:
    check_a_flush_error_latches(broken, tmp_path / "image")


def test_a_write_error_is_the_requests_alone(broken: Disk) -> None:
    assert broken.ask(Request(WRITE, 0, [(100, 0, 0)]), Request(WRITE, 9, [(101, 0, 0)], 2)) == [ERROR] * 2
    assert not broken.vbd.broken


def test_nothing_moves_across_a_flush(disk: Disk) -> None:
    """A write after a flush may not be merged with one before it: the model says so for whole batches, this for the bytes."""
    disk.write_page(100, b"1" * PAGE_SIZE)
    disk.write_page(101, b"2" * PAGE_SIZE)
    requests = [
        Request(WRITE, 0, [(100, 0, 7)], 1), Request(FLUSH, ident=2), Request(READ, 0, [(102, 0, 7)], 3),
        Request(FLUSH, ident=4), Request(WRITE, 0, [(101, 0, 7)], 5),
    ]  # fmt: skip
    assert disk.ask(*requests) == [OKAY] * 5
    assert disk.read_page(102) == b"1" * PAGE_SIZE and os.pread(disk.fd, 4, 0) == b"2222"


# ---- rings that cannot be


@pytest.mark.parametrize("index", [33, 1 << 31, 0xFFFFFFFF])
def test_an_index_that_cannot_be_poisons_the_ring(disk: Disk, index: int) -> None:
    disk.ffi.cast("uint32_t *", disk.base)[0] = index
    assert disk.turn() == -errno.EPROTO
    disk.ffi.cast("uint32_t *", disk.base)[0] = 0
    assert disk.turn() == -errno.EPROTO, "for good"


def test_requests_are_read_once(disk: Disk) -> None:
    """What the guest writes into its ring after the batch was taken changes nothing."""
    disk.ring.publish(Request(WRITE, 3, [(100, 0, 0)]).pack())
    disk.write_page(100, b"W" * SECTOR)
    assert disk.lib.blk_take(disk.vbd) == 1
    disk.ffi.memmove(disk.ffi.cast("void *", disk.base + 64), Request(WRITE, 200, [(4095, 0, 7)] * 11).pack(), REQUEST_BYTES)
    scratch = disk.ffi.new("uint32_t[]", 352)
    assert disk.lib.blk_missing(disk.vbd, scratch, 352) == 1 and scratch[0] == 100
    disk.vbd.address[100] = disk.pages[100]
    disk.lib.blk_run(disk.vbd)
    assert os.pread(disk.fd, 1, 3 * SECTOR) == b"W" and sector_of(os.pread(disk.fd, 8, 200 * SECTOR)) == 200


# ---- each check finds what is broken

OVERLAP = "    if (op == WRITE && overlap(order, n))\n        for (i = 0; i < n; i++)\n            order[i] = &pieces[i];\n"
DEFECTS: dict[str, tuple[Callable[..., None], str, str]] = {
    "segments are not counted": (check_twelve, "!r->nr_segments || r->nr_segments > SEGMENTS || ", "!r->nr_segments || "),
    "a segment may leave its page": (check_lies, " || g->last > 7", ""),
    "a segment may end before it begins": (check_lies, "g->first > g->last || ", ""),
    "a refused grant is used": (check_lies, "v->address[g->gref] <= 1", "0"),
    "any handle will do": (check_lies, "r->handle != v->handle || ", ""),
    "a read-only disk is written": (check_read_only, " || (r->op == WRITE && !v->writable)", ""),
    "writes are sorted whatever they overlap": (check_the_last_write_holds, OVERLAP, "    (void)overlap;\n"),
    "only equal places count as overlapping": (
        check_the_last_write_holds, "order[i]->at < order[i - 1]->at + order[i - 1]->bytes", "order[i]->at == order[i - 1]->at"
    ),
    "too few pieces": (play, "n == BLK_EXTENTS || ", "n == SEGMENTS || "),
    "an extent begins elsewhere": (play, "*where = e->first + sector;", "*where = e->first + sector + (i > 4);"),
    "an extent ends elsewhere": (play, "if (sector < e->count) {", "if (sector <= e->count) {"),
    "a skip is forgotten": (play, "                skip = 0;\n", ""),
    "neighbours are merged across a gap": (play, "order[j]->at == end", "order[j]->at >= end"),
    "reads before writes": (
        play, "transfer(v, from, i, WRITE, status);\n            transfer(v, from, i, READ, status);",
        "transfer(v, from, i, READ, status);\n            transfer(v, from, i, WRITE, status);",
    ),
    "flush is no fence": (play, "            from = i + 1;\n", "            from = i == v->taken ? i : 0;\n"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(tmp_path: Path, defect: str) -> None:
    check, old, new = DEFECTS[defect]
    ffi, lib = library(tmp_path / "blk.so", "dom0/blk.h", [BLK], {BLK: [(old, new)]})
    many = check is play
    disk = Disk(ffi, lib, make_image(tmp_path, 256), EXTENTS["sixteen of one sector"] if many else (Extent(0, 256),))
    pid = os.fork()  # a child: it may also crash
    if pid == 0:
        faulthandler.disable()
        try:
            check(disk, *([BATCHES] if many else []))
        finally:
            os._exit(sys.exc_info()[0] is not None)
    disk.close()
    assert os.waitpid(pid, 0)[1] != 0, "it passed"


def test_a_flush_error_that_does_not_latch_is_found(broken: Disk, tmp_path: Path) -> None:
    ffi, lib = library(tmp_path / "blk.so", "dom0/blk.h", [BLK], {BLK: [("        v->broken = 1;\n", "")]})
    disk = Disk(ffi, lib, tmp_path / "image", (Extent(0, 256),))
    os.dup2(broken.fd, disk.fd)
    with pytest.raises(AssertionError, match="healed"):
        check_a_flush_error_latches(disk, tmp_path / "image")
    disk.close()
