"""The paging core and its model, side by side: every move is made of both, and compared when it has ended.

A move of a guest may wait: for its monitor, or for a turn. Its domain's frames are nobody else's business meanwhile, so that
the model makes the whole move when it ends; that no host mapping is left uncovered is asked after every step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hypervisor.gate.monitor import MonitorGone
from hypervisor.public.errors import XenError
from hypervisor.public.mmu import MmuextCommand
from hypervisor.public.types import PAGE_SIZE
from tests.models.paging import L1, L2, L3, SEG_DESC, Model, Space
from tests.models.paging_core import NR_WINDOWS, ROW, Core, Guest, Task, Turns

NO_MFN = 0xFFFFFFFF
NO_OWNER = 0xFFFF
TYPE_AT = 18  # in a row
PF_WRITE = 2
ZEROS = memoryview(bytes(PAGE_SIZE)).cast("Q")
PIN = {L1: MmuextCommand.PIN_L1, L2: MmuextCommand.PIN_L2, L3: MmuextCommand.PIN_L3}


class Game:
    def __init__(self, core: Core, nr_frames: int = 32, domids: tuple[int, ...] = (1, 2), at_once: bool = True) -> None:
        random.seed(2003)  # the table's own shuffle
        self.core, self.nr_frames, self.at_once = core, nr_frames, at_once
        ffi = core.ffi
        self._memory, self._m2p = ffi.new("uint64_t[]", nr_frames * 512), ffi.new("uint64_t[]", nr_frames)
        self.frames = core.frames.FrameTable(nr_frames, ffi.cast("char *", self._memory), self._m2p)
        self.rows, self.memory = ffi.buffer(self.frames.frame), ffi.buffer(self._memory)
        self.words = memoryview(self.memory).cast("B").cast("Q")
        self.turns = Turns(at_once)
        machine = SimpleNamespace(scrub=self._scrub, copy=self._copy)
        demand = SimpleNamespace(others=lambda domain: not at_once)
        self.hv: Any = SimpleNamespace(frames=self.frames, loop=self.turns, machine=machine, demand=demand)
        self.model = Model(nr_frames, NR_WINDOWS)
        self._rows = bytearray(self.rows)  # as they should be
        self._memory_expected = bytearray(len(self.memory))
        self._words_expected = memoryview(self._memory_expected).cast("Q")
        self._looks = 0
        self.requests = 0  # of batches that were looked at, beyond the first of each
        self.statuses = Counter[int]()
        self.guests: dict[int, Guest] = {}
        self.ended: list[int] = []  # domains that are to be buried
        for domid in domids:
            self.guests[domid] = self._guest(domid)

    def _scrub(self, mfn: int) -> None:
        self.core.lib.scrub(self.core.ffi.cast("char *", self._memory) + mfn * PAGE_SIZE, PAGE_SIZE)

    def _copy(self, mfn: int, source: int) -> None:
        base = self.core.ffi.cast("char *", self._memory)
        self.core.lib.copy_page(base + mfn * PAGE_SIZE, base + source * PAGE_SIZE)

    def _guest(self, domid: int) -> Guest:
        self.model.spaces[domid] = Space([None] * NR_WINDOWS, [0] * NR_WINDOWS)

        def fail(why: str) -> None:
            guest.alive = False
            guest.host.die()
            self.ended.append(domid)

        guest = Guest(self.core, domid, self.at_once, fail)
        return guest

    # ---- what must hold

    def busy(self, domid: int) -> bool:
        return self.guests[domid].call is not None

    def safe(self) -> None:
        """After every step."""
        rows = list(ROW.iter_unpack(self.rows))
        for domid, guest in self.guests.items():
            guest.host.check(domid, rows)

    def _settle_model(self) -> None:
        """What the model did is what is expected from now on. The type of what nobody uses says nothing."""
        rows, real = self._rows, self.rows
        for mfn in self.model.touched:
            f = self.model.frames[mfn]
            parent, slot = f.parent or (NO_MFN, 0)
            kind = f.type if f.typed else real[mfn * ROW.size + TYPE_AT][0]
            owner = NO_OWNER if f.owner is None else f.owner
            window = 0 if f.window is None else f.window + 1
            done = 512 if f.is_table else 0
            ROW.pack_into(rows, mfn * ROW.size, f.total, f.typed, parent, slot, owner, done, kind, f.pinned, window, 0, 0)
        for mfn, at, value in self.model.stored:
            self._words_expected[mfn << 9 | at] = value

    def agree(self) -> None:
        """Rows and words are the model's, but for the domains whose calls are under way, or were when they died."""
        self._settle_model()
        busy = {domid for domid, guest in self.guests.items() if guest.call is not None or not guest.alive}
        if not busy:
            assert self.rows[:] == self._rows, self._difference()
            self._looks += 1
            if self._looks % 8 == 0:  # 10 us
                assert self.memory[:] == self._memory_expected, self._difference()
            return
        for mfn, frame in enumerate(self.model.frames):
            if frame.owner not in busy:
                row, page = slice(mfn * ROW.size, (mfn + 1) * ROW.size), slice(mfn * PAGE_SIZE, (mfn + 1) * PAGE_SIZE)
                assert self.rows[row] == self._rows[row], self._difference()
                assert self.memory[page] == self._memory_expected[page], self._difference()

    def _difference(self) -> str:
        out = []
        for mfn in range(self.nr_frames):
            row, page = slice(mfn * ROW.size, (mfn + 1) * ROW.size), slice(mfn * PAGE_SIZE, (mfn + 1) * PAGE_SIZE)
            if self.rows[row] != self._rows[row]:
                out.append(f"mfn {mfn} is {ROW.unpack(self.rows[row])}, should be {ROW.unpack(self._rows[row])}")
            if self.memory[page] != self._memory_expected[page]:
                out.append(f"mfn {mfn} holds other words")
        return "; ".join(out)

    def audit(self) -> None:
        """From scratch; no call may be under way."""
        self.model.recount()
        segments = Counter({(mfn, True): times for mfn, times in self.model.segments.items()})
        self.frames.check(+Counter(self.model.holds) + segments)
        for mfn, frame in enumerate(self.model.frames):
            if not (frame.is_table and frame.type == L1):
                assert not any(self.frames._mapped[mfn]), f"mfn {mfn} is no L1 and has bits"
        for domid, guest in self.guests.items():
            if guest.fault is None:
                pages = {at: page for at, page in guest.host.pages.items()}
                assert pages == self.core.space.dump(self.hv, guest), f"domain {domid}: bits and host mappings"
            mappable = self.model.mappable(domid)
            for at, (mfn, writable) in guest.host.pages.items():
                assert mappable[at][0] == mfn and mappable[at][1] >= writable, f"domain {domid}: {at:#x}"
            windows = [NO_MFN if root is None else root for root in self.model.spaces[domid].windows]
            assert guest.space.windows == windows and guest.space.current == self.model.spaces[domid].current

    # ---- moves of the hypervisor

    def allocate(self, domid: int, count: int) -> list[int]:
        """As many as there are."""
        self.model.begin()
        got = self.frames.allocate(domid, min(count, self.frames.nr_free))
        self.model.allocated(domid, got)
        self.agree()
        return list(got)

    def release(self, mfn: int) -> bool:
        """Whether it could leave."""
        idle = self._release(mfn)
        self.agree()
        return idle

    def _release(self, mfn: int) -> bool:
        self.model.begin()
        idle = self.model.frames[mfn].owner is not None and self.model.is_idle(mfn)
        assert idle == (self.frames.frame[mfn].owner != NO_OWNER and self.frames.is_idle(mfn)), f"mfn {mfn} is idle"
        if idle:
            self._scrub(mfn)
            self.frames.release(mfn)
            self._words_expected[mfn << 9 : (mfn + 1) << 9] = ZEROS
            self.model.released(mfn)
            self._settle_model()
        return idle

    def give(self, mfn: int, domid: int) -> None:
        if self.model.frames[mfn].owner is not None and self.model.is_idle(mfn):
            self.model.begin()
            self.frames.give(mfn, domid)
            self.model.given(mfn, domid)
            self.agree()

    def get(self, mfn: int, writable: bool) -> None:
        if self.model.frames[mfn].owner is not None:
            self.model.begin()
            assert self.frames.get(mfn, writable) == self.model.get(mfn, writable), f"a use of mfn {mfn}"
            self.agree()

    def put(self, mfn: int, writable: bool) -> None:
        if self.model.holds.get((mfn, writable)):
            self.model.begin()
            self.frames.put(mfn, writable)
            self.model.put(mfn, writable)
            self.agree()

    def start(self, domid: int, root: int) -> None:
        """Show a pinned root in window 0, as lifecycle.start_with does."""
        guest = self.guests[domid]
        self.model.begin()
        self.model.start(domid, root)
        task = Task(self.core.space.get_table(self.hv, guest, root, L3))
        assert task.done and task.error is None
        self.frames.frame[root].window = 1
        guest.space.windows[0] = root
        self.agree()

    # ---- moves of a guest: (steps, what the model does when they have ended)

    def poke(self, mfn: int, slot: int, value: int) -> None:
        """A store through a writable mapping, or from a device: into what is no table."""
        if not self.model.frames[mfn].is_table:
            self.model.begin()
            self.words[mfn << 9 | slot] = value
            self.model.store(mfn, slot, value)
            self._settle_model()

    def update(self, domid: int, requests: list[tuple[int, int]]) -> None:
        guest = self.guests[domid]
        job = guest.space.job
        for i, request in enumerate(requests):
            job.requests[i] = request
        job.count, job.next, job.domid = len(requests), 0, domid

        def expected() -> tuple[int, int]:
            self.requests -= 1
            for i, (ptr, value) in enumerate(requests):
                self.requests += 1
                status = self.model.update(domid, ptr, value)
                self.statuses[status] += 1
                if status:
                    return i, status
            return len(requests), 0

        self._call(guest, self.core.mmu._run_job(self.hv, guest, job), lambda task: (job.next, _errno(task.value)), expected)

    def extended(self, domid: int, command: int, first: int, expected: Callable[[], int], second: int = 0) -> None:
        guest = self.guests[domid]
        steps = self.core.mmu._extended(self.hv, guest, guest, command, first, second)
        self._call(guest, steps, lambda task: _errno(task.error), expected)

    def pin(self, domid: int, mfn: int, level: int) -> None:
        self.extended(domid, PIN[level], mfn, lambda: self.model.pin(domid, mfn, level))

    def unpin(self, domid: int, mfn: int) -> None:
        self.extended(domid, MmuextCommand.UNPIN, mfn, lambda: self.model.unpin(domid, mfn))

    def load(self, domid: int, root: int) -> None:
        self.extended(domid, MmuextCommand.NEW_BASEPTR, root, lambda: self.model.load(domid, root))

    def flush(self, domid: int) -> None:
        self.extended(domid, MmuextCommand.TLB_FLUSH, 0, lambda: 0)

    def invalidate(self, domid: int, va: int) -> None:
        self.extended(domid, MmuextCommand.INVLPG, va, lambda: 0)

    def fill(self, domid: int, mfn: int, source: int | None) -> None:
        """CLEAR_PAGE, COPY_PAGE."""
        command = MmuextCommand.CLEAR_PAGE if source is None else MmuextCommand.COPY_PAGE
        self.extended(domid, command, mfn, lambda: self.model.fill(domid, mfn, source), source or 0)

    def describe(self, domid: int, mfn: int) -> None:
        """It becomes a descriptor table, or cannot; or one is let go of, as segments.py does it."""
        guest, space = self.guests[domid], self.core.space
        if mfn in self.model.segments:
            steps, expected = space.put_table(self.hv, guest, mfn, False), lambda: self.model.undescribe(mfn)
        else:
            steps, expected = space.get_table(self.hv, guest, mfn, SEG_DESC), lambda: self.model.describe(domid, mfn)
        self._call(guest, steps, lambda task: _errno(task.error), expected)

    def _call(self, guest: Guest, steps: Any, outcome: Callable[[Task], Any], expected: Callable[[], Any]) -> None:
        assert guest.call is None
        guest.call = Task(steps)
        guest.outcome, guest.expected = outcome, expected
        self._look(guest)

    def _look(self, guest: Guest) -> None:
        """Whether its call, or its fault, has ended, and how."""
        if guest.fault is not None and guest.fault.done:
            error = guest.fault.error
            assert error is None or (isinstance(error, MonitorGone) and not guest.alive), f"a fault raised {error!r}"
            guest.fault = None
        task = guest.call
        if task is None or not task.done:
            return
        guest.call = None
        if isinstance(task.error, MonitorGone):
            assert not guest.alive
            return
        if task.error is not None and not isinstance(task.error, XenError):
            raise task.error
        self.model.begin()
        expected, got = guest.expected(), guest.outcome(task)
        assert got == expected, f"domain {guest.domid}: {got}, should be {expected}"
        self.agree()

    def touch(self, domid: int, offset: int, access: int) -> None:
        """A page fault: it is filled if the tables allow the access, whatever call is under way."""
        guest = self.guests[domid]
        if guest.fault is None and guest.space.windows[offset >> 39] != NO_MFN:
            guest.fault = task = Task(self.core.space.fill(self.hv, guest, offset, access))
            if guest.call is None and task.done:
                mfn, writable = self.model.mappable(domid).get(offset, (None, False))
                allowed = mfn is not None and (writable or not access & PF_WRITE)
                assert bool(task.value) == allowed, f"domain {domid}: a fault at {offset:#x}, {access}"
                assert not allowed or guest.host.fail_every or guest.host.pages[offset] == (mfn, writable)
            self._look(guest)

    # ---- time, and the end

    def acknowledge(self, domid: int, fail_at: int | None = None, error: int = 12) -> None:
        guest = self.guests[domid]
        if guest.host.queue:
            guest.host.acknowledge(fail_at, error)
            self._look(guest)

    def turn(self) -> None:
        if self.turns.waiting:
            self.turns.waiting.popleft()(None)
            for guest in self.guests.values():
                self._look(guest)

    def kill(self, domid: int) -> None:
        if self.guests[domid].alive:
            self.guests[domid].fail("killed")

    def bury(self) -> list[int]:
        """Of those that ended: who waits is told, references fall, frames leave; a new one has the number. Returns them."""
        buried = []
        while self.ended:
            domid = self.ended.pop()
            guest = self.guests[domid]
            while guest.host.orphans:
                guest.host.orphans.pop(0)(MonitorGone())
            while self.turns.waiting and (guest.call or guest.fault) and not (guest.call and guest.call.done):
                self.turn()
            self._look(guest)
            assert guest.call is None and guest.fault is None, "somebody goes on for a dead domain"
            self.model.begin()
            gone = self.model.died(domid)
            self.frames.reset(gone)
            self._settle_model()
            self.guests[domid] = self._guest(domid)
            for mfn in gone:
                assert self._release(mfn)
            self.agree()
            buried.append(domid)
        return buried

    def quiet(self) -> None:
        """Let everything under way end, and look at all of it."""
        for _ in range(10_000):
            self.bury()
            waiting = [domid for domid, guest in self.guests.items() if guest.host.queue]
            if not waiting and not self.turns.waiting:
                break
            for domid in waiting:
                self.acknowledge(domid)
                self.safe()
            self.turn()
        assert all(guest.call is None and guest.fault is None for guest in self.guests.values()), "somebody waits for ever"
        self.agree()
        self.audit()


def _errno(error: BaseException | None) -> int:
    return error.errno if isinstance(error, XenError) else 0
