"""The paging core without processes: the real kernels, space.py and mmu.py, over a few frames and monitors that are a queue.

`load` gives the modules, or copies with something changed in them, C or Python. A Guest is what they see of a domain; its
Host is the other end of its monitor: what the process would have mapped, and what was asked for and is not acknowledged.
"""

from __future__ import annotations

import errno
import struct
import sys
import types
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypervisor import _hv
from hypervisor.gate.monitor import MAP_ANONYMOUS, SYS_MMAP, MonitorError
from hypervisor.loop import Resume, Steps, Wait
from hypervisor.public.layout import KERNEL_WINDOW
from hypervisor.public.types import PAGE_SIZE
from tests.models.mutant import Changes, changed, library

SOURCES = [f"hypervisor/{name}.c" for name in ("frames", "tables", "mmu", "segments", "machine")]
MODULES = ("frames", "space", "mmu")
ROW = struct.Struct("<IIIHHHBBBBH")  # struct frame: total, count, parent, slot, owner, done, type, pinned, window
WRITABLE = 7
NR_WINDOWS = 4  # few, so that one is in the way soon
COMMAND = struct.Struct("<7Q")


class Core(NamedTuple):
    ffi: Any
    lib: Any
    frames: Any
    space: Any
    mmu: Any


def load(
    changes: Changes | None = None, folder: Path | None = None, tables_a_turn: int = 64, tlb_changes: int = 24_000,
    few_changes: int = 32,
) -> Core:  # fmt: skip
    """Copies of the modules, changed as told ("hypervisor/mmu.c" -> pairs), with few windows."""
    changes = changes or {}
    in_c = {path: pairs for path, pairs in changes.items() if path.endswith(".c")}
    ffi, lib = _hv.ffi, _hv.lib
    if in_c:
        assert folder is not None
        ffi, lib = library(folder / "hv.so", "hypervisor/hv.h", SOURCES, in_c)
    modules = []
    for name in MODULES:
        path = f"hypervisor/{name}.py"
        module = types.ModuleType(f"copy_of_{name}")
        sys.modules[module.__name__] = module
        exec(compile(changed(path, changes.get(path, ())), path, "exec"), module.__dict__)
        module.ffi, module.lib = ffi, lib  # type: ignore[attr-defined]
        modules.append(module)
    frames, space, mmu = modules
    mmu.space = space  # type: ignore[attr-defined]
    mmu.budget = space.budget = types.SimpleNamespace(turn=_turn, take_turns=_take_turns)  # type: ignore[attr-defined]
    space.NR_WINDOWS = NR_WINDOWS  # type: ignore[attr-defined]
    space.TABLES_A_TURN = tables_a_turn  # type: ignore[attr-defined]
    mmu.FEW_CHANGES = few_changes  # type: ignore[attr-defined]
    space.TLB_CHANGES = tlb_changes  # type: ignore[attr-defined]
    return Core(ffi, lib, frames, space, mmu)


def _turn(hv: Any, domain: Any) -> Wait:
    turn: Wait = hv.loop.turn
    return turn


def _take_turns(hv: Any, domain: Any, begin: int) -> Steps:
    """No clock: a turn after everything, where turns are not at once."""
    if not hv.loop.at_once:
        yield hv.loop.turn
    return begin


# ---- a monitor


class _Batch:
    """Commands, decoded: (offset, pages, mfn or None, writable). `applied` of them have been run."""

    def __init__(self, commands: list[tuple[int, int, int | None, bool]], resume: Resume) -> None:
        self.commands, self.resume, self.applied = commands, resume, 0


class Host:
    """`pages`: offset from the first window -> (mfn, writable). `at_once`: every batch is acknowledged when it is asked for."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.pages: dict[int, tuple[int, bool]] = {}
        self.touched, self.written = Counter[int](), Counter[int]()  # by mfn, of `pages`
        self.queue: deque[_Batch] = deque()
        self.gone = False
        self.orphans: list[Resume] = []  # who asked, and the process is gone
        self.batches = 0
        self.fail_every = 0  # of batches that map something: out of host mappings

    @property
    def busy(self) -> bool:
        return bool(self.queue)

    def run(self, commands: bytes, count: int) -> Wait:
        assert len(commands) == COMMAND.size * count > 0
        return lambda resume: self._ask(self._decode(commands), resume)

    def barrier(self) -> Wait:
        return lambda resume: self._ask([(0, 0, None, False)], resume)  # it may fail as well

    def _decode(self, commands: bytes) -> list[tuple[int, int, int | None, bool]]:
        out: list[tuple[int, int, int | None, bool]] = []
        for nr, address, size, prot, flags, _, offset in COMMAND.iter_unpack(commands):
            assert nr == SYS_MMAP and size and not (address | size | offset) % PAGE_SIZE
            mfn = None if flags & MAP_ANONYMOUS else offset // PAGE_SIZE
            out.append((address - KERNEL_WINDOW, size // PAGE_SIZE, mfn, bool(prot & 2)))
        return out

    def _ask(self, commands: list[tuple[int, int, int | None, bool]], resume: Resume) -> None:
        if self.gone:
            self.orphans.append(resume)
            return
        self.batches += 1
        self.queue.append(_Batch(commands, resume))
        if self.at_once:
            fails = self.fail_every and self.batches % self.fail_every == 0 and any(c[2] is not None for c in commands)
            self.acknowledge(len(commands) // 2 if fails else None)

    def progress(self, count: int) -> None:
        """Run some of the first batch, and do not say so."""
        batch = self.queue[0]
        for command in batch.commands[batch.applied : batch.applied + count]:
            self._apply(*command)
            batch.applied += 1

    def acknowledge(self, fail_at: int | None = None, error: int = errno.ENOMEM) -> None:
        """Run the first batch, up to command `fail_at` (not before what was run), which fails."""
        batch = self.queue[0]
        if fail_at is not None and batch.applied <= fail_at < len(batch.commands):
            self.progress(fail_at - batch.applied)
            answer: Exception | None = MonitorError(fail_at, error)
        else:
            self.progress(len(batch.commands))
            answer = None
        self.queue.popleft()
        batch.resume(answer)

    def _apply(self, at: int, pages: int, mfn: int | None, writable: bool) -> None:
        if mfn is None:
            end = at + pages * PAGE_SIZE
            for gone in [at] if pages == 1 else [key for key in self.pages if at <= key < end]:
                self._forget(gone)
            return
        for i in range(pages):
            self._forget(at + i * PAGE_SIZE)
            self.pages[at + i * PAGE_SIZE] = mfn + i, writable
            self.touched[mfn + i] += 1
            self.written[mfn + i] += writable

    def _forget(self, at: int) -> None:
        before = self.pages.pop(at, None)
        if before is not None:
            self.touched[before[0]] -= 1
            self.written[before[0]] -= before[1]

    def die(self) -> None:
        """The process is gone; who waits is to be told so, in a later turn."""
        self.orphans += [batch.resume for batch in self.queue]
        self.gone = True
        self.queue.clear()
        self.pages.clear()
        self.touched.clear()
        self.written.clear()

    # ---- what must hold at every moment

    def check(self, domid: int, rows: list[tuple[int, ...]]) -> None:
        """Whatever is mapped, or was asked to be, is covered by a reference of a frame of the domain's own."""
        for mfn, times in self.touched.items():
            if times:
                total, count, _, _, owner, _, kind, *_ = rows[mfn]
                assert owner == domid, f"mfn {mfn} of {owner} is mapped by {domid}"
                assert total > times, f"mfn {mfn} is mapped {times} times and has {total} references"
                written = self.written[mfn]
                assert not written or (kind == WRITABLE and count >= written), f"mfn {mfn}: type {kind}, mapped writable"
        for batch in self.queue:
            for _, pages, first, writable in batch.commands:
                for mfn in range(first, first + pages) if first is not None else ():
                    total, count, _, _, owner, _, kind, *_ = rows[mfn]
                    assert owner == domid and total > 1, f"mfn {mfn} of {owner} will be mapped by {domid}"
                    assert not writable or (kind == WRITABLE and count), f"mfn {mfn}: type {kind}, will be mapped writable"


# ---- what the modules see of the rest


class Turns:
    """A loop's turns: at once, or when a test says so."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.waiting: deque[Resume] = deque()

    def turn(self, resume: Resume) -> None:
        if self.at_once:
            resume(None)
        else:
            self.waiting.append(resume)


class Guest:
    """A domain, as space.py and mmu.py ask for it. `fail` is called with the reason of its end."""

    def __init__(self, core: Core, domid: int, at_once: bool, fail: Callable[[str], None]) -> None:
        self.domid = domid
        self.space = core.space.Space()
        self.host = self.monitor = Host(at_once)
        self.alive = True
        self.fail = fail
        self._page = core.ffi.new("char[4096]")
        self.shared_info = core.ffi.cast("char *", self._page)
        self.users: dict[int, Any] = {}
        self.call: Task | None = None
        self.fault: Task | None = None


class Task:
    """Steps, and how they ended: `error` is None or what they raised."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self._running = False
        self._answers: list[Any] = [None]
        self._go()

    def _resume(self, value: Any) -> None:
        self._answers.append(value)
        if not self._running:
            self._go()

    def _go(self) -> None:
        self._running = True
        try:
            while self._answers:
                value = self._answers.pop()
                wait = self.steps.throw(value) if isinstance(value, BaseException) else self.steps.send(value)
                wait(self._resume)
        except StopIteration as stop:
            self.done, self.value = True, stop.value
        except Exception as error:
            self.done, self.error = True, error
        finally:
            self._running = False
