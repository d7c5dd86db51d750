"""The frame table: who owns each machine frame and how often it is in use. Pure logic, no process, no mapping.

Invariants (FrameTable.check recomputes them):
  I1  a free frame has no owner, no reference and no writable mapping.
  I2  an owned frame has at least one reference, its allocation's.
  I3  writable mappings are references too: writable < total for every owned frame.
  I4  free + owned = all.

Frames are handed out in scattered runs of max(4, n / 1024): a guest sees discontiguous memory, as on real hardware, and
a run is one host mapping of the 65,530 that a process may have. Frames change owner only through the free list, scrubbed.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter

from hypervisor.public.errors import NoMemory

NO_OWNER = 0xFFFF
CHUNK = 64  # frames a free-mask covers
FULL = (1 << CHUNK) - 1


def run_length(nr_frames: int) -> int:
    """Frames that lie together in a reservation of `nr_frames`."""
    return min(CHUNK, max(4, nr_frames // 1024))


class FrameTable:
    def __init__(self, nr_frames: int) -> None:
        self.nr_frames = nr_frames
        self.owner = array("H", [NO_OWNER]) * nr_frames
        self.total = array("I", [0]) * nr_frames
        self.writable = array("I", [0]) * nr_frames
        self.owned: Counter[int] = Counter()
        self.nr_free = nr_frames
        self._masks = [FULL] * (nr_frames // CHUNK)
        if nr_frames % CHUNK:
            self._masks.append((1 << nr_frames % CHUNK) - 1)
        self._order = list(range(len(self._masks)))
        random.shuffle(self._order)  # scattered on purpose
        self._next = 0

    # ---- allocation

    def allocate(self, domid: int, count: int) -> list[int]:
        """`count` frames for `domid`, in scattered runs. Raises NoMemory, taking nothing."""
        if count > self.nr_free:
            raise NoMemory(f"{count} frames wanted, {self.nr_free} free")

        run, left, got = run_length(count), count, list[int]()
        while left:
            before = left
            for _ in range(len(self._order)):
                chunk = self._order[self._next]
                self._next = (self._next + 1) % len(self._order)
                taken = self._take(chunk, min(run, left))
                got += taken
                left -= len(taken)
                if not left:
                    break
            if left == before:  # no run of that length is left anywhere
                run = max(1, run // 2)
        for mfn in got:
            self.owner[mfn], self.total[mfn] = domid, 1
        self.owned[domid] += count
        self.nr_free -= count
        return got

    def _take(self, chunk: int, run: int) -> list[int]:
        starts = mask = self._masks[chunk]
        for i in range(1, run):
            starts &= mask >> i
        if not starts:
            return []
        first = (starts & -starts).bit_length() - 1
        self._masks[chunk] = mask & ~(((1 << run) - 1) << first)
        return [chunk * CHUNK + first + i for i in range(run)]

    def release(self, mfn: int) -> None:
        """Back to the free list; the caller has scrubbed it. Its allocation must be its only reference."""
        domid = self.owner[mfn]
        assert domid != NO_OWNER, f"mfn {mfn} released twice"
        assert self.total[mfn] == 1 and self.writable[mfn] == 0, f"mfn {mfn} released in use"

        self.owner[mfn], self.total[mfn] = NO_OWNER, 0
        self._lose(domid)
        self.nr_free += 1
        self._masks[mfn // CHUNK] |= 1 << mfn % CHUNK

    def give(self, mfn: int, domid: int) -> None:
        """To another owner, with its contents: a page flip. Its allocation must be its only reference."""
        assert self.total[mfn] == 1 and self.writable[mfn] == 0, f"mfn {mfn} given away in use"
        self._lose(self.owner[mfn])
        self.owned[domid] += 1
        self.owner[mfn] = domid

    def _lose(self, domid: int) -> None:
        """One frame fewer. Who has none is forgotten: domains come and go, and their numbers are not used again soon."""
        self.owned[domid] -= 1
        if not self.owned[domid]:
            del self.owned[domid]

    # ---- references

    def get(self, mfn: int, writable: bool) -> None:
        """Count a mapping of an owned frame."""
        assert self.owner[mfn] != NO_OWNER, f"mfn {mfn} is free"
        self.total[mfn] += 1
        self.writable[mfn] += writable

    def put(self, mfn: int, writable: bool) -> None:
        """Forget a mapping, after its monitor acknowledged that it is gone."""
        assert self.total[mfn] > 1 and self.writable[mfn] >= writable, f"mfn {mfn}: count below zero"
        self.total[mfn] -= 1
        self.writable[mfn] -= writable

    # ---- audit

    def check(self) -> None:
        """Recompute I1..I4 from scratch."""
        owned: Counter[int] = Counter()
        for mfn in range(self.nr_frames):
            free = self._masks[mfn // CHUNK] >> mfn % CHUNK & 1
            if free:
                assert self.owner[mfn] == NO_OWNER and not self.total[mfn] and not self.writable[mfn], f"I1: mfn {mfn}"
            else:
                assert self.total[mfn] >= 1, f"I2: mfn {mfn}"
                assert self.writable[mfn] < self.total[mfn], f"I3: mfn {mfn}"
                owned[self.owner[mfn]] += 1
        assert owned == +self.owned and owned.total() + self.nr_free == self.nr_frames, "I4"
