"""The frame table: who owns each machine frame, what it is used as and how often. Pure logic, no process, no mapping.

Invariants (FrameTable.check recomputes every count):
  I1  a free frame has no owner, no reference, no type and no place in a table.
  I2  an owned frame has at least one reference, its allocation's.
  I3  a frame has one type at a time: count is the references of that type, count < total, and it changes only at count 0
      and with no entry's references left (done 0).
  I4  a table (L1, L2, L3) in force has count > 0 and done = 512: each of its present entries holds the references that it
      says, a plain one of its frame, a writable one where it has RW, one of the next lower type where it names a table.
  I5  a table has at most one parent, and is that parent's entry `slot`; the root in a window has none.
  I6  an entry's frame belongs to the table's owner.
  I7  no frame is writable and a table: follows from I3 and I4, and is what everything else is for.
  I8  a bit in `mapped` stands for a present entry of a table that a window shows.
  I9  free + owned = all.

The arrays and whatever is done per entry are C's (frames.c, tables.c, mmu.c). Frames are handed out in scattered runs of
max(4, n / 256): a guest sees discontiguous memory, as on real hardware, and a run is one host mapping of the 65,530 that a
process may have. Frames change owner only through the free list, scrubbed, or with their contents by a page flip.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from typing import Any

from hypervisor._hv import ffi, lib
from hypervisor.public.errors import NoMemory
from hypervisor.public.mmu import ENTRIES, PageType, Pte, mfn_of

NO_OWNER: int = lib.NO_OWNER
NO_MFN: int = lib.NO_MFN
CHUNK = 64  # frames a free-mask covers
FULL = (1 << CHUNK) - 1
GROUP = 8  # chunks, 2 MiB, that are opened for scattered runs together: an extent of the greatest order
OPENED = 4  # groups opened at a time
TABLES = (PageType.L1, PageType.L2, PageType.L3)
CHECKED = (*TABLES, PageType.SEG_DESC)  # every entry of theirs is good


def run_length(nr_frames: int) -> int:
    """Frames that lie together in a reservation of `nr_frames`."""
    return min(CHUNK, max(4, nr_frames // 256))


class FrameTable:
    """`machine`: char * to frame 0, `m2p`: uint64_t *, both of `nr_frames`; the table keeps no other hold on them."""

    def __init__(self, nr_frames: int, machine: Any, m2p: Any) -> None:
        self.nr_frames = nr_frames
        self.frame: Any = ffi.new("struct frame[]", nr_frames)
        self._mapped: Any = ffi.new("uint64_t[][8]", nr_frames)
        self.mmu: Any = ffi.new("struct mmu *", (self.frame, self._mapped, machine, m2p, nr_frames))
        lib.frame_disown(self.mmu, 0, nr_frames)
        self.owned: Counter[int] = Counter()
        self.nr_free = nr_frames
        self._masks = [FULL] * (nr_frames // CHUNK)
        if nr_frames % CHUNK:
            self._masks.append((1 << nr_frames % CHUNK) - 1)
        self._closed = list(range(0, len(self._masks), GROUP))
        random.shuffle(self._closed)  # scattered on purpose
        self._open: list[int] = []  # chunks that runs are taken from, in turn
        self._next = 0

    # ---- allocation

    def allocate(self, domid: int, count: int) -> list[int]:
        """`count` frames for `domid`, in scattered runs. Raises NoMemory, taking nothing."""
        if count > self.nr_free:
            raise NoMemory(f"{count} frames wanted, {self.nr_free} free")

        run, left, got = run_length(count), count, list[int]()
        while left:
            before = left
            for _ in range(len(self._open)):
                self._next = (self._next + 1) % len(self._open)
                taken = self._take(self._open[self._next], min(run, left))
                got += taken
                left -= len(taken)
                if not left:
                    break
            if left == before and not self._open_more():  # no run of that length is left anywhere
                run = max(1, run // 2)
        self._own(got, domid)
        return got

    def _open_more(self) -> bool:
        """Scatter over some more of the machine; what is closed stays whole, for extents. False: nothing is."""
        groups, self._closed = self._closed[:OPENED], self._closed[OPENED:]
        more = [chunk for first in groups for chunk in range(first, min(first + GROUP, len(self._masks)))]
        random.shuffle(more)
        self._open += more
        return bool(more)

    def allocate_extent(self, domid: int, order: int) -> list[int]:
        """2**order frames that lie together, aligned to their size. Raises NoMemory."""
        size = 1 << order
        if size < CHUNK:
            while True:
                for i in range(len(self._open)):
                    at = (self._next + i) % len(self._open)  # where the last one was found: what was full before still is
                    got = self._take(self._open[at], size, size)
                    if got:
                        self._next = at
                        self._own(got, domid)
                        return got
                if not self._open_more():
                    break
        else:
            chunks = size // CHUNK
            for first in range(0, len(self._masks) - chunks + 1, chunks):
                if all(mask == FULL for mask in self._masks[first : first + chunks]):
                    self._masks[first : first + chunks] = [0] * chunks
                    got = list(range(first * CHUNK, first * CHUNK + size))
                    self._own(got, domid)
                    return got
        raise NoMemory(f"no {size} frames lie together")

    def _take(self, chunk: int, run: int, align: int = 1) -> list[int]:
        starts = mask = self._masks[chunk]
        for i in range(1, run):
            starts &= mask >> i
        if align > 1:
            starts &= FULL // ((1 << align) - 1)
        if not starts:
            return []
        first = (starts & -starts).bit_length() - 1
        self._masks[chunk] = mask & ~(((1 << run) - 1) << first)
        return [chunk * CHUNK + first + i for i in range(run)]

    def _own(self, mfns: list[int], domid: int) -> None:
        if mfns:
            lib.frame_own(self.mmu, ffi.from_buffer("uint32_t[]", array("I", mfns)), len(mfns), domid)
            self.owned[domid] += len(mfns)
            self.nr_free -= len(mfns)

    def owned_by(self, mfn: int, domid: int) -> bool:
        """It is a frame of the machine, and of that domain. Any number will do."""
        return mfn < self.nr_frames and bool(self.frame[mfn].owner == domid)

    def is_idle(self, mfn: int) -> bool:
        """Its allocation is its only reference: it may leave."""
        f = self.frame[mfn]
        return bool(f.total == 1 and not f.count and not f.done)

    def is_table(self, mfn: int) -> bool:
        """It cannot be written by a guest now."""
        f = self.frame[mfn]
        return bool((f.count or f.done) and f.type != PageType.WRITABLE)

    def release(self, mfn: int) -> None:
        """Back to the free list; the caller has scrubbed it. Its allocation must be its only reference."""
        domid = self.frame[mfn].owner
        assert domid != NO_OWNER, f"mfn {mfn} released twice"
        assert self.is_idle(mfn), f"mfn {mfn} released in use"

        lib.frame_disown(self.mmu, mfn, 1)
        self._lose(domid)
        self.nr_free += 1
        self._masks[mfn // CHUNK] |= 1 << mfn % CHUNK

    def give(self, mfn: int, domid: int) -> None:
        """To another owner, with its contents: a page flip. Its allocation must be its only reference."""
        assert self.is_idle(mfn), f"mfn {mfn} given away in use"
        self._lose(self.frame[mfn].owner)
        self.owned[domid] += 1
        self.frame[mfn].owner = domid

    def _lose(self, domid: int) -> None:
        """One frame fewer. Who has none is forgotten: domains come and go, and their numbers are not used again soon."""
        self.owned[domid] -= 1
        if not self.owned[domid]:
            del self.owned[domid]

    def of(self, domid: int, mfns: range) -> list[int]:
        """The frames of a domain among `mfns`, in order. Costs 1 ns a frame looked at."""
        room = min(len(mfns), self.owned[domid])
        out: Any = ffi.new("uint32_t[]", max(1, room))
        return list(out[0 : lib.frame_list(self.mmu, domid, mfns.start, mfns.stop, out, room)])

    def reset(self, mfns: list[int]) -> None:
        """Their domain is gone, its processes reaped and its grants taken back: whatever its tables, pins and windows held
        falls at once. Costs 20 ns a frame, where taking the tables apart would cost 3 ns an entry."""
        lib.frame_reset(self.mmu, ffi.from_buffer("uint32_t[]", array("I", mfns)), len(mfns))

    # ---- references

    def get(self, mfn: int, writable: bool) -> bool:
        """Count a use of an owned frame; False, and nothing counted, if it would be writable and is a table."""
        assert self.frame[mfn].owner != NO_OWNER, f"mfn {mfn} is free"
        return not lib.frame_get(self.mmu, mfn, writable)

    def put(self, mfn: int, writable: bool) -> None:
        """Forget a use, after the monitor acknowledged that it is gone."""
        assert not lib.frame_put(self.mmu, mfn, writable), f"mfn {mfn}: count below zero"

    # ---- audit

    def check(self, uses: Counter[tuple[int, bool]] | None = None) -> None:
        """Recompute I1..I9 from scratch. `uses`: what get() and the descriptor tables count and nobody has put yet, (mfn, of
        its type) -> how often; None: not known here, and any surplus that is none of a page table is taken for such."""
        total, count, parents = Counter[int](), Counter[int](), dict[int, tuple[int, int]]()
        for mfn in range(self.nr_frames):
            f = self.frame[mfn]
            if self._masks[mfn // CHUNK] >> mfn % CHUNK & 1:
                state = (f.total, f.count, f.parent, f.owner, f.done, f.pinned, f.window)
                assert state == (0, 0, NO_MFN, NO_OWNER, 0, 0, 0), f"I1: mfn {mfn}"
                continue
            total[mfn] += 1 + f.pinned + bool(f.window)
            count[mfn] += f.pinned + bool(f.window)
            if f.type in TABLES and f.done:
                self._count_entries(mfn, total, count, parents)
        for (mfn, writable), times in (uses or Counter[tuple[int, bool]]()).items():
            total[mfn] += times
            count[mfn] += times * writable
        owned = Counter[int]()
        for mfn in total:
            f = self.frame[mfn]
            owned[f.owner] += 1
            surplus = (f.total - total[mfn], f.count - count[mfn])
            others_allowed = uses is None and 0 <= surplus[1] <= surplus[0] and (not surplus[1] or f.type not in TABLES)
            assert surplus == (0, 0) or others_allowed, f"I3, I4: mfn {mfn}: {surplus} too many references, and of its type"
            assert f.total >= 1 and f.count < f.total, f"I2, I3: mfn {mfn}"
            assert (f.parent, f.slot) == parents.get(mfn, (NO_MFN, 0)), f"I5: mfn {mfn}"
            assert f.type not in CHECKED or not f.count or f.done == ENTRIES, f"I4: mfn {mfn}"
            assert not (f.window and f.type != PageType.L3), f"I5: mfn {mfn}"
        assert owned == +self.owned and owned.total() + self.nr_free == self.nr_frames, "I9"

    def _count_entries(
        self, table: int, total: Counter[int], count: Counter[int], parents: dict[int, tuple[int, int]]
    ) -> None:
        f = self.frame[table]
        live = lib.mmu_offset(self.mmu, table) >= 0
        for slot in range(f.done):
            entry = lib.mmu_entry(self.mmu, table, slot)
            mapped = f.type == PageType.L1 and self._mapped[table][slot // 64] >> slot % 64 & 1
            assert not mapped or (live and entry & Pte.PRESENT), f"I8: mfn {table}, entry {slot}"
            if not entry & Pte.PRESENT:
                continue
            mfn = mfn_of(entry)
            child = self.frame[mfn]
            total[mfn] += 1
            assert child.owner == f.owner, f"I6: mfn {table}, entry {slot}"
            if f.type == PageType.L1:
                count[mfn] += bool(entry & Pte.RW)
                assert not entry & Pte.RW or child.type == PageType.WRITABLE, f"I7: mfn {mfn}"
            else:
                count[mfn] += 1
                assert child.type == f.type - 1 and mfn not in parents, f"I4, I5: mfn {mfn}"
                parents[mfn] = table, slot
