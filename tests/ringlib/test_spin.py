"""The rule of waiting (spin.h): when an end looks before it sleeps, and for whom it never does."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI

from tests.conftest import TIMEOUT
from tests.ringlib.defects import Edit, compiled, copy

DECLARED = """
struct spin { uint32_t unlucky, wait_out; uint64_t spins, won; };
int wait_for(struct spin *s, uint32_t partner, int64_t ns, int after); uint32_t here(void);
"""
SOURCE = """
#include "spin.h"
static int there(const void *left) { return (*(int *)left)-- <= 0; }
int wait_for(struct spin *s, uint32_t partner, int64_t ns, int after) { return spin(s, partner, ns, there, &after); }
uint32_t here(void) { return spin_cpu(); }
"""
NEVER, AT_ONCE, ELSEWHERE, LONG = 1 << 30, 0, 1000, int(TIMEOUT * 1e9)


def built(folder: Path, *edits: Edit) -> tuple[Any, Any]:
    copy(folder, *edits)
    (folder / "wait.c").write_text(SOURCE)
    ffi: Any = FFI()
    ffi.cdef(DECLARED)
    return ffi, ffi.dlopen(str(compiled(folder, folder / "wait.c")))


def check_luck(ffi: Any, lib: Any) -> None:
    """In vain: 1, 3, 7 ... 255 waits go by without; found: the next one spins again."""
    state = ffi.new("struct spin *")
    tried = []
    for wait in range(1200):
        before = state.spins
        assert not lib.wait_for(state, ELSEWHERE, 1, NEVER)
        if state.spins > before:
            tried.append(wait)
    gaps = [b - a - 1 for a, b in pairwise(tried)]
    assert gaps == [1, 3, 7, 15, 31, 63, 127, 255, 255, 255] and state.won == 0
    state.wait_out = 0
    for won in (1, 2, 3):
        assert lib.wait_for(state, ELSEWHERE, LONG, 1000) and state.won == won, "luck is believed at once"


def check_nobody_spins_for_a_partner_here(ffi: Any, lib: Any) -> None:
    """Pinned, so that `here` stays true."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        state = ffi.new("struct spin *")
        assert not lib.wait_for(state, lib.here(), LONG, AT_ONCE) and state.spins == 0 and state.wait_out == 0
        assert lib.wait_for(state, 0, LONG, AT_ONCE), "where it is, nobody knows"
    finally:
        os.sched_setaffinity(0, allowed)


def test_luck(tmp_path: Path) -> None:
    check_luck(*built(tmp_path))


def test_nobody_spins_for_a_partner_here(tmp_path: Path) -> None:
    check_nobody_spins_for_a_partner_here(*built(tmp_path))


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (check_luck, "    s->wait_out = s->unlucky;\n", ""),
        (check_luck, "2 * s->unlucky + 1", "s->unlucky + 1"),
        (check_luck, "                s->unlucky = 0;\n", "                s->wait_out = 1;\n"),
        (check_nobody_spins_for_a_partner_here, "partner == spin_cpu() || s->wait_out", "s->wait_out"),
    ],
)
def test_seeded_defects_are_caught(tmp_path: Path, check: Callable[[Any, Any], None], old: str, new: str) -> None:
    ffi, lib = built(tmp_path, Edit("spin.h", old, new))
    with pytest.raises(AssertionError):
        check(ffi, lib)
