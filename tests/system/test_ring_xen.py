"""Byte for byte Xen's: the pages of ringlib beside those of the macros in Xen's own io/ring.h, and each end with the other's.

Four pages have the same done to them, by (Xen, Xen), (ringlib, ringlib), (Xen, ringlib), (ringlib, Xen) as front and back.
After every step they are equal, and so is what was taken and whether to notify.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI

from ringlib import BackRing, FrontRing
from tests.conftest import NIGHTLY
from tests.ringlib.defects import CAUGHT, Edit, seed
from tests.ringlib.model import Page

SOURCE = Path(__file__).with_name("ring_xen.c")
LOOK = "#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n#include <xen/xen.h>\n#include <xen/io/ring.h>\n"
KINDS = {"blkif": (112, 16), "netif_tx": (12, 4), "netif_rx": (8, 8)}  # bytes of a request, of a response
ENTRIES = {**{("blkif", pages): 32 * pages for pages in (1, 2, 4, 8, 16)}, ("netif_tx", 1): 256, ("netif_rx", 1): 256}
STARTS = (0, 0xFFFFFFC0)
STEPS = 4_000 if NIGHTLY else 250
FUNCTIONS = """
uint32_t {0}_request(void); uint32_t {0}_response(void);
uint32_t {0}_front(void *, void *, uint32_t, uint32_t); uint32_t {0}_back(void *, void *, uint32_t);
int32_t {0}_front_publish(void *, const char *, uint32_t); int32_t {0}_front_take(void *, char *, uint32_t);
int32_t {0}_front_recheck(void *); int32_t {0}_back_take(void *, char *, uint32_t);
int32_t {0}_back_publish(void *, const char *, uint32_t); int32_t {0}_back_recheck(void *);
"""


@pytest.fixture(scope="module")
def xen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """ffi and lib of the rings that Xen's macros make."""
    look = subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input=LOOK, text=True, capture_output=True, check=False)
    if look.returncode:
        pytest.skip("Xen's headers are not installed: apt-get install libxen-dev has /usr/include/xen/io/ring.h")
    out = tmp_path_factory.mktemp("xen") / "ring_xen.so"
    flags = ["-std=gnu11", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, "-o", str(out), str(SOURCE)], check=True)
    ffi: Any = FFI()
    for kind in KINDS:
        ffi.cdef(FUNCTIONS.format(kind))
    return ffi, ffi.dlopen(str(out))


class XenEnd:
    """A front or a back in the words of FrontRing and BackRing."""

    def __init__(self, xen: tuple[Any, Any], kind: str, side: str, page: Page, start: int = 0) -> None:
        self.ffi, lib = xen
        self.end = self.ffi.new("char[64]")
        address = self.ffi.cast("void *", page.address)
        request, response = getattr(lib, f"{kind}_request")(), getattr(lib, f"{kind}_response")()
        assert (request, response) == KINDS[kind]
        self.sent, self.received = (request, response) if side == "front" else (response, request)
        begin = getattr(lib, f"{kind}_{side}")
        self.nr_ents: int = begin(self.end, address, page.size, *((start,) if side == "front" else ()))
        self.c_publish, self.c_take, self.c_recheck = (
            getattr(lib, f"{kind}_{side}_{what}") for what in ("publish", "take", "recheck")
        )

    def publish(self, batch: bytes) -> bool:
        return bool(self.c_publish(self.end, batch, len(batch) // self.sent))

    def take(self, most: int) -> bytes:
        out = self.ffi.new("char[]", max(1, most * self.received))
        return bytes(self.ffi.buffer(out, self.c_take(self.end, out, most) * self.received))

    def recheck(self) -> bool:
        return bool(self.c_recheck(self.end))


Ends = tuple[Page, XenEnd | FrontRing, XenEnd | BackRing]


def four_pages(xen: tuple[Any, Any], kind: str, pages: int, start: int) -> list[Ends]:
    out: list[Ends] = []
    for theirs in ((True, True), (False, False), (True, False), (False, True)):
        page = Page(pages)
        page.fill(0xA5)  # what was there before is nobody's but the header's
        front = (
            XenEnd(xen, kind, "front", page, start) if theirs[0] else FrontRing(page.address, page.size, *KINDS[kind], start)
        )
        back = XenEnd(xen, kind, "back", page) if theirs[1] else BackRing(page.address, page.size, *KINDS[kind])
        out.append((page, front, back))
    return out


def check_four_pages_stay_equal(xen: tuple[Any, Any], kind: str, pages: int, start: int, steps: int = STEPS) -> None:
    ends, dice = four_pages(xen, kind, pages, start), random.Random(f"{kind} {pages} {start}")
    request, response = KINDS[kind]
    entries = {end.nr_ents for _, front, back in ends for end in (front, back)}
    assert entries == {ENTRIES[kind, pages]}
    room = entries.pop()
    published = taken = answered = ended = 0

    def all_the_same(act: Callable[[Ends], object]) -> None:
        assert len({act(each) for each in ends}) == 1
        assert len({page.contents for page, _, _ in ends}) == 1
        assert not any(any(page.slack) for page, _, _ in ends)

    all_the_same(lambda each: None)
    for _ in range(steps):
        n, what = dice.choice((1, 2, dice.randint(0, room))), dice.randrange(6)
        if what == 0:
            n = min(n, room - (published - ended))
            batch, published = dice.randbytes(n * request), published + n
            all_the_same(lambda each, batch=batch: each[1].publish(batch))  # type: ignore[misc]
        elif what == 1:
            taken += min(n, published - taken)
            all_the_same(lambda each, n=n: each[2].take(n))  # type: ignore[misc]
        elif what == 2:
            n = min(n, taken - answered)
            batch, answered = dice.randbytes(n * response), answered + n
            all_the_same(lambda each, batch=batch: each[2].publish(batch))  # type: ignore[misc]
        elif what == 3:
            ended += min(n, answered - ended)
            all_the_same(lambda each, n=n: each[1].take(n))  # type: ignore[misc]
        else:
            all_the_same(lambda each, side=what - 3: each[side].recheck())  # type: ignore[misc]
    assert min(published, taken, answered, ended) > room, "it went round"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("kind", "pages"), ENTRIES)
def test_pages_are_xens(xen: tuple[Any, Any], kind: str, pages: int, start: int) -> None:
    check_four_pages_stay_equal(xen, kind, pages, start)


# ---- what must be noticed


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(Edit("ring.h", "return (char *)sh + 64 +", "return (char *)sh + 128 +"), id="slots behind another header"),
        pytest.param(Edit("ring.h", "req_prod, req_event;", "req_event, req_prod;"), id="the index where the event is"),
        pytest.param(Edit("ring.h", "    atomic_store(&f->sh->rsp_event, 1);\n", ""), id="nobody asked for the first answer"),
        pytest.param(
            Edit("ring.h", "store_explicit(event, cons + want,", "store_explicit(event, cons,"), id="asks for one too early"
        ),
        pytest.param(Edit("ring.h", "(uint32_t)(new - old);", "(uint32_t)(new - old) + 1;"), id="notifies once too often"),
        pytest.param(Edit("ring.h", "(bytes - 64) / slot_size", "bytes / slot_size"), id="a slot in the header's place"),
    ],
)
def test_seeded_defects_are_caught(xen: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edit: Edit) -> None:
    seed(monkeypatch, tmp_path, edit)
    with pytest.raises(CAUGHT):
        for kind in KINDS:
            check_four_pages_stay_equal(xen, kind, 1, 0)
