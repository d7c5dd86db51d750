"""Seeded defects of the hypervisor: each is one check, count or unmapping that is left out, and what lets an attack through.

Those of the C kernels are in one changed copy of them, where `seeded` chooses; the others replace a Python function while a
job runs. A machine that has had one may not be asked whether its counts are right.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hypervisor import budget, domctl, fault, frames, grant, guest_access, memory, mmu, segments, space, traps
from hypervisor._hv import ffi, lib
from hypervisor.core import Hypervisor
from hypervisor.domain import Domain
from hypervisor.gate import monitor
from hypervisor.gate.monitor import Monitor, _Batch
from hypervisor.loop import Resume, Steps, Wait
from hypervisor.public.layout import SPACE_BYTES
from tests.models.mutant import library

SOURCES = [f"hypervisor/{name}.c" for name in ("frames", "tables", "mmu", "segments", "grant", "guest_access")]
TABLES_H = '#include "tables.h"\n'
IN_C = {
    "entries are not counted": 1,  # as writable ones
    "anybody's frames": 2,
    "an entry's own rights": 3,  # without those above
    "a table of any frame": 4,
    "the host does not follow": 5,
    "copies into tables": 6,
    "results into tables": 7,
}
CHANGES = {
    "hypervisor/tables.c": [
        (TABLES_H, TABLES_H + "int seeded;\n"),
        ("frame_get(m, (uint32_t)mfn, !!(entry & PTE_RW))", "frame_get(m, (uint32_t)mfn, (entry & PTE_RW) && seeded != 1)"),
        ("if (entry & ~PTE_L1_ALLOWED || mfn >= m->nr_frames || m->frames[mfn].owner != domid)",
         "if (entry & ~PTE_L1_ALLOWED || mfn >= m->nr_frames || (m->frames[mfn].owner != domid && seeded != 2))"),
        ("if (!whole && (f->count || f->done))", "if (!whole && (f->count || f->done) && seeded != 4)"),
    ],
    "hypervisor/mmu.c": [
        (TABLES_H, TABLES_H + "extern int seeded;\n"),
        (".writable = !!(entry & above & PTE_RW)", ".writable = !!(entry & (seeded == 3 ? PTE_RW : above) & PTE_RW)"),
        ("if (p->at >= 0 && ((value", "if (seeded != 5 && p->at >= 0 && ((value"),
        ("allows(entry, rights, write ? PF_WRITE : 0)", "allows(entry, rights, write && seeded != 7 ? PF_WRITE : 0)"),
    ],
    "hypervisor/grant.c": [
        ("#define GTF_PERMIT_ACCESS", "extern int seeded;\n#define GTF_PERMIT_ACCESS"),
        ("if (writable && frame_get(m, mfn, 1))", "if (writable && seeded != 6 && frame_get(m, mfn, 1))"),
    ],
}  # fmt: skip
LATE_NS = 300_000
USERS = (domctl, frames, grant, guest_access, mmu, segments, space)  # of the kernels of frames and tables


class Changed:
    """The changed copy with the real module's functions: pointers go over as numbers, since the types are another cffi's."""

    def __init__(self, path: Path) -> None:
        self._ffi, self._lib = library(path, "hypervisor/hv.h", SOURCES, CHANGES)
        self.seeded = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "seeded")

    def __getattr__(self, name: str) -> Any:
        real = getattr(lib, name)
        if not callable(real):
            return real
        try:
            changed = getattr(self._lib, name)
        except AttributeError:  # of a file that is not among SOURCES
            return real
        kinds = self._ffi.typeof(changed).args

        def call(*arguments: Any) -> Any:
            return changed(*map(self._convert, kinds, arguments))

        setattr(self, name, call)
        return call

    def _convert(self, kind: Any, value: Any) -> Any:
        return self._ffi.cast(kind, int(ffi.cast("uintptr_t", value))) if isinstance(value, ffi.CData) else value


@functools.cache
def changed() -> Changed:
    with tempfile.TemporaryDirectory() as folder:  # what is loaded needs no name any more
        return Changed(Path(folder) / "changed.so")


@contextlib.contextmanager
def in_c(number: int) -> Iterator[None]:
    copy = changed()
    with contextlib.ExitStack() as stack:
        for module in USERS:
            stack.enter_context(mock.patch.object(module, "lib", copy))
        copy.seeded.value = number
        yield
    copy.seeded.value = 0


# ---- those of Python


def nothing(*_: Any, **__: Any) -> Steps:
    """Steps of a thing that is not done."""
    yield from ()


def evict(hv: Hypervisor, domain: Domain, window: int) -> Steps:
    root = domain.space.windows[window]
    domain.space.windows[window] = frames.NO_MFN
    lib.mmu_unmark(hv.frames.mmu, root)
    hv.frames.frame[root].window = 0
    yield from space.put_table(hv, domain, root, False)


def get(self: frames.FrameTable, mfn: int, writable: bool) -> bool:
    if lib.frame_get(self.mmu, mfn, writable):
        lib.frame_get(self.mmu, mfn, False)
    return True


def put(self: frames.FrameTable, mfn: int, writable: bool) -> None:
    if lib.frame_put(self.mmu, mfn, writable):
        lib.frame_put(self.mmu, mfn, False)


def may_leave(hv: Hypervisor, domain: Domain, mfn: int) -> bool:
    mine = hv.frames.frame[mfn].owner == domain.domid
    if mine:
        hv.frames.reset([mfn])  # so that it is not noticed later either
    return mine


def table_at(hv: Hypervisor, domain: Domain, offset: int) -> int:
    window, va = divmod(offset, SPACE_BYTES)
    return int(lib.mmu_walk(hv.frames.mmu, domain.space.windows[window], va, False))


def hold(self: Hypervisor, domain: Domain, mfn: int) -> None:
    domain.held.append(mfn)


def unmap(self: Monitor, addresses: list[int], zero: bool = False) -> Steps:
    for va in addresses:
        self.shadow.pop(va, None)
    yield from ()


def run(self: Monitor, commands: bytes, count: int) -> Wait:
    """It is taken for done when it is asked for; the monitor, as it may, comes to it a little later."""

    def begin() -> None:
        if not self.gone:
            self._queue.append(_Batch(commands, count, lambda _: None))
            self._start()

    def wait(resume: Resume) -> None:
        self._loop.at(time.monotonic_ns() + LATE_NS, begin)
        self._loop.soon(lambda: resume(None))

    return wait


def patch(target: Any, name: str, value: Any) -> Callable[[], Any]:
    return lambda: mock.patch.object(target, name, value)


@contextlib.contextmanager
def both(*patches: Callable[[], Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for one in patches:
            stack.enter_context(one())
        yield


DEFECTS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(in_c, number) for name, number in IN_C.items()},
    "a lost window stays": patch(space, "evict", evict),
    "a lost table stays": patch(space, "zap_table", nothing),
    "grants of tables": lambda: both(patch(frames.FrameTable, "get", get), patch(frames.FrameTable, "put", put)),
    "any page is a table": patch(space, "table_at", table_at),
    "mapped frames leave": patch(memory, "may_leave", may_leave),
    "held frames are not counted": patch(Hypervisor, "hold", hold),
    "a dead domain's frames stay": patch(Monitor, "unmap", unmap),
    "descriptors are not counted": lambda: both(
        patch(segments, "_release", nothing), patch(segments.space, "get_table", nothing)  # type: ignore[attr-defined]
    ),
    "no acknowledgement": patch(Monitor, "run", run),
    "nothing is charged": patch(budget.Budget, "charge", lambda *_: 0),
    "any handler": patch(traps, "_check", lambda *_: None),
    "double faults are bounced": patch(fault, "_double", lambda *_: ""),
    "a patient deadline": patch(monitor, "ACK_NS", 4_000_000_000),
}
