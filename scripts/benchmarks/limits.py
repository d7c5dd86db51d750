"""The C that every ring is measured against, and the figures that its measurements share."""

from __future__ import annotations

import mmap
from functools import cache
from typing import Any

from scripts.benchmarks.harness import ROOT, compiled

RECORD = 64
ATTACH = 10  # seconds: for an end to be made


@cache
def limit() -> tuple[Any, Any]:
    here, ringlib = ROOT / "scripts" / "benchmarks", ROOT / "ringlib"
    return compiled(here / "limit.c", [ringlib / "ring.c", ringlib / "shared.c"], ringlib)


def memory(size: int) -> Any:
    """Shared by the processes forked after this, and touched, so that no page fault is measured."""
    ffi, _ = limit()
    area = mmap.mmap(-1, size)
    area.write(bytes(size))
    return ffi.from_buffer(area)
