"""What page tables, pins and base pointers should do: a model of dictionaries, written from the rules and not from the code.

Nothing here is done in turns and nothing has a host mapping: a call is one step that says its status (0 or an errno) and
leaves the state that must be found afterwards. A call that fails leaves what was before; the journal of the frames that it
touched is how, and tells who compares where to look.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from errno import EBUSY, EINVAL, ENOSYS, EPERM

NONE, L1, L2, L3, SEG_DESC, WRITABLE = 0, 1, 2, 3, 5, 7
P, RW, US, A, D, PS, G, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 63
ADDRESS = ((1 << 52) - 1) & ~0xFFF
UPPER_BITS = P | RW | US | A | D | NX | ADDRESS | 0b111 << 9 | 0x7FF << 52
LEAF_BITS = UPPER_BITS | G
TOP = range(480, 512)  # slots of the L2 at slot 511: the hypervisor's 64 MB
GRANTS = 256  # the first slot of the started root that is for grants


def mfn_of(entry: int) -> int:
    return (entry & ADDRESS) >> 12


@dataclass(slots=True)
class Frame:
    """`typed` of the `total` references are those of `type`; a table is in force while it has one."""

    owner: int | None = None
    total: int = 0
    typed: int = 0
    type: int = NONE
    parent: tuple[int, int] | None = None  # (table, slot)
    pinned: bool = False
    window: int | None = None

    def __copy__(self) -> Frame:
        return Frame(self.owner, self.total, self.typed, self.type, self.parent, self.pinned, self.window)

    @property
    def is_table(self) -> bool:
        return self.typed > 0 and self.type != WRITABLE


@dataclass
class Space:
    """The windows of one domain, and when each was current last."""

    windows: list[int | None]
    used: list[int]
    current: int = 0
    switches: int = 0


class Refused(Exception):
    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


@dataclass
class Model:
    nr_frames: int
    nr_windows: int
    frames: list[Frame] = field(default_factory=list)
    words: list[dict[int, int]] = field(default_factory=list)  # of each frame, slot -> what is not 0
    m2p: dict[int, int] = field(default_factory=dict)
    segments: dict[int, int] = field(default_factory=dict)  # uses as a descriptor table, by mfn
    spaces: dict[int, Space] = field(default_factory=dict)
    holds: dict[tuple[int, bool], int] = field(default_factory=dict)  # of grants and the hypervisor: (mfn, writable)
    touched: dict[int, Frame] = field(default_factory=dict)  # since begin(): what each frame was
    stored: list[tuple[int, int, int]] = field(default_factory=list)  # since begin(): (mfn, slot, value)

    def __post_init__(self) -> None:
        self.frames = [Frame() for _ in range(self.nr_frames)]
        self.words = [{} for _ in range(self.nr_frames)]

    # ---- the journal

    def begin(self) -> None:
        self.touched, self.stored = {}, []

    def _touch(self, mfn: int) -> Frame:
        frame = self.frames[mfn]
        if mfn not in self.touched:
            self.touched[mfn] = copy(frame)
        return frame

    def _undo(self, touched: dict[int, Frame]) -> None:
        for mfn, before in touched.items():
            self.frames[mfn] = before

    # ---- who owns what

    def allocated(self, domid: int, mfns: list[int]) -> None:
        """The choice is the table's; that they were free is not."""
        for mfn in mfns:
            frame = self._touch(mfn)
            assert frame.owner is None, f"mfn {mfn} was not free"
            assert not self.words[mfn], f"mfn {mfn} was not scrubbed"
            frame.owner, frame.total = domid, 1

    def is_idle(self, mfn: int) -> bool:
        return self.frames[mfn].total == 1

    def released(self, mfn: int) -> None:
        assert self.is_idle(mfn)
        self._touch(mfn)
        self.frames[mfn] = Frame()
        self.words[mfn].clear()

    def given(self, mfn: int, domid: int) -> None:
        """A page flip."""
        assert self.is_idle(mfn)
        self._touch(mfn).owner = domid

    def died(self, domid: int) -> list[int]:
        """Its frames, which only their allocation holds; scrubbed they are when they are released."""
        gone = [mfn for mfn, frame in enumerate(self.frames) if frame.owner == domid]
        for mfn in gone:
            self._touch(mfn)
            self.frames[mfn] = Frame(owner=domid, total=1)
            self.holds.pop((mfn, False), None)
            self.holds.pop((mfn, True), None)
            self.segments.pop(mfn, None)
        self.spaces[domid] = Space([None] * self.nr_windows, [0] * self.nr_windows)
        return gone

    # ---- uses

    def get(self, mfn: int, writable: bool) -> bool:
        """A grant's, or the hypervisor's own."""
        if not self._use(mfn, writable):
            return False
        self.holds[mfn, writable] = self.holds.get((mfn, writable), 0) + 1
        return True

    def put(self, mfn: int, writable: bool) -> None:
        self.holds[mfn, writable] -= 1
        self._unuse(mfn, writable)

    def _use(self, mfn: int, writable: bool) -> bool:
        frame = self._touch(mfn)
        if writable:
            if frame.is_table:
                return False
            frame.type = WRITABLE
            frame.typed += 1
        frame.total += 1
        return True

    def _unuse(self, mfn: int, writable: bool) -> None:
        frame = self._touch(mfn)
        frame.total -= 1
        frame.typed -= writable

    # ---- entries

    def _take_leaf(self, domid: int, entry: int) -> None:
        if entry & P:
            mfn = mfn_of(entry)
            good = not entry & ~LEAF_BITS and mfn < self.nr_frames and self.frames[mfn].owner == domid
            if not good or not self._use(mfn, bool(entry & RW)):
                raise Refused(EINVAL)

    def _drop_leaf(self, entry: int) -> None:
        if entry & P:
            self._unuse(mfn_of(entry), bool(entry & RW))

    def _check_upper(self, table: int, slot: int, entry: int) -> None:
        """What can be said of an entry above L1 without a look at the table it names."""
        frame = self.frames[table]
        if not entry & P:
            return
        if frame.type == L3 and frame.window == 0 and slot >= GRANTS:
            raise Refused(EPERM)
        if frame.type == L2 and frame.parent is not None and frame.parent[1] == 511 and slot in TOP:
            raise Refused(EPERM)
        if entry & ~UPPER_BITS or mfn_of(entry) >= self.nr_frames:
            raise Refused(EINVAL)

    def _take_table(self, domid: int, mfn: int, level: int, parent: tuple[int, int] | None = None) -> None:
        """One more reference to a table of that level; the first makes it one, and everything below it."""
        if self.frames[mfn].owner != domid:
            raise Refused(EINVAL)
        frame = self._touch(mfn)
        first = frame.typed == 0
        if not first and frame.type != level:
            raise Refused(EINVAL)
        if parent is not None:
            if frame.parent is not None:
                raise Refused(EBUSY)
            if level == L2 and parent[1] == 511 and any(self.words[mfn].get(slot, 0) & P for slot in TOP):
                raise Refused(EPERM)
            frame.parent = parent
        frame.type = level
        frame.typed += 1
        frame.total += 1
        if not first:
            return
        for slot, entry in sorted(self.words[mfn].items()):
            if level == SEG_DESC:
                if entry >> 47 & 1:  # present: good ones are another test's affair (test_segments.py)
                    raise Refused(EINVAL)
            elif level == L1:
                self._take_leaf(domid, entry)
            elif entry & P:
                self._check_upper(mfn, slot, entry)
                self._take_table(domid, mfn_of(entry), level - 1, (mfn, slot))

    def _drop_table(self, mfn: int, from_entry: bool) -> None:
        frame = self._touch(mfn)
        if from_entry:
            frame.parent = None
        frame.typed -= 1
        frame.total -= 1
        if frame.typed:
            return
        for entry in self.words[mfn].values():
            if frame.type == L1:
                self._drop_leaf(entry)
            elif entry & P and frame.type != SEG_DESC:
                self._drop_table(mfn_of(entry), True)

    # ---- calls

    def update(self, domid: int, ptr: int, value: int) -> int:
        """One request of mmu_update."""
        before, self.touched = self.touched, {}
        try:
            self._update(domid, ptr, value)
            status = 0
        except Refused as refused:
            self._undo(self.touched)
            status = refused.errno
        self.touched |= before
        return status

    def _update(self, domid: int, ptr: int, value: int) -> None:
        mfn, slot, command = ptr >> 12, ptr >> 3 & 511, ptr & 7
        if command > 2:
            raise Refused(ENOSYS)
        if mfn >= self.nr_frames or self.frames[mfn].owner != domid:
            raise Refused(EINVAL)
        if command == 1:
            self.m2p[mfn] = value
            return
        frame, old = self.frames[mfn], self.words[mfn].get(slot, 0)
        if not frame.is_table:
            self._touch(mfn)
            self.store(mfn, slot, value)
            return
        if frame.type == SEG_DESC:
            raise Refused(EINVAL)
        if command == 2:
            value = value & ~(A | D) | old & (A | D)
        if frame.type == L1:
            self._take_leaf(domid, value)
            self._drop_leaf(old)
        else:
            self._check_upper(mfn, slot, value)
            if not (old & value & P and mfn_of(old) == mfn_of(value)):
                if value & P:
                    self._take_table(domid, mfn_of(value), frame.type - 1, (mfn, slot))
                if old & P:
                    self._drop_table(mfn_of(old), True)
        self.store(mfn, slot, value)

    def store(self, mfn: int, slot: int, value: int) -> None:
        self.stored.append((mfn, slot, value))
        if value:
            self.words[mfn][slot] = value
        else:
            self.words[mfn].pop(slot, None)

    def take(self, domid: int, mfn: int, level: int) -> int:
        """A reference that is no entry's: a pin's, a window's, a descriptor table's."""
        before, self.touched = self.touched, {}
        try:
            self._take_table(domid, mfn, level)
            status = 0
        except Refused as refused:
            self._undo(self.touched)
            status = refused.errno
        self.touched |= before
        return status

    def describe(self, domid: int, mfn: int) -> int:
        """It holds descriptors, and nothing else, until undescribe()."""
        status = self.take(domid, mfn, SEG_DESC)
        if not status:
            self.segments[mfn] = self.segments.get(mfn, 0) + 1
        return status

    def undescribe(self, mfn: int) -> int:
        self.segments[mfn] -= 1
        if not self.segments[mfn]:
            del self.segments[mfn]
        self._drop_table(mfn, False)
        return 0

    def pin(self, domid: int, mfn: int, level: int) -> int:
        if mfn >= self.nr_frames or self.frames[mfn].owner != domid or self.frames[mfn].pinned:
            return EINVAL
        status = self.take(domid, mfn, level)
        if not status:
            self._touch(mfn).pinned = True
        return status

    def unpin(self, domid: int, mfn: int) -> int:
        if mfn >= self.nr_frames or self.frames[mfn].owner != domid or not self.frames[mfn].pinned:
            return EINVAL
        frame = self._touch(mfn)
        frame.pinned = False
        if frame.window and frame.window != self.spaces[domid].current:
            self._evict(domid, frame.window)
        self._drop_table(mfn, False)
        return 0

    def fill(self, domid: int, mfn: int, source: int | None) -> int:
        """Zeros, or a copy of another frame of its own, into what is no table."""
        for named in (mfn,) if source is None else (mfn, source):
            if named >= self.nr_frames or self.frames[named].owner != domid:
                return EINVAL
        if self.frames[mfn].is_table:
            return EINVAL
        self._touch(mfn)
        words = {} if source is None else dict(self.words[source])
        for slot in list(self.words[mfn]):
            self.store(mfn, slot, 0)
        for slot, value in words.items():
            self.store(mfn, slot, value)
        return 0

    # ---- windows

    def may_start(self, domid: int, root: int) -> bool:
        frame = self.frames[root]
        own = frame.owner == domid and frame.pinned and frame.type == L3 and frame.window is None
        return own and not any(slot >= GRANTS and entry & P for slot, entry in self.words[root].items())

    def start(self, domid: int, root: int) -> None:
        assert self.may_start(domid, root) and not self.take(domid, root, L3)
        self._show(domid, root, 0)

    def _show(self, domid: int, root: int, window: int) -> None:
        self.spaces[domid].windows[window] = root
        self._touch(root).window = window

    def _evict(self, domid: int, window: int) -> None:
        root = self.spaces[domid].windows[window]
        assert root is not None
        self.spaces[domid].windows[window] = None
        self._touch(root).window = None
        self._drop_table(root, False)

    def load(self, domid: int, root: int) -> int:
        """NEW_BASEPTR."""
        if root >= self.nr_frames or self.frames[root].owner != domid:
            return EINVAL
        space = self.spaces[domid]
        if self.frames[root].window is None:
            status = self.take(domid, root, L3)
            if status:
                return status
            self._show(domid, root, self._free_window(domid))
        window, before = self.frames[root].window, space.windows[space.current]
        assert window is not None and before is not None
        left = space.current
        space.switches += 1
        space.used[window], space.current = space.switches, window
        if left not in (0, window) and not self.frames[before].pinned:
            self._evict(domid, left)
        return 0

    def _free_window(self, domid: int) -> int:
        space = self.spaces[domid]
        free = [w for w in range(1, self.nr_windows) if space.windows[w] is None]
        if free:
            return free[0]
        oldest = min((w for w in range(1, self.nr_windows) if w != space.current), key=lambda w: space.used[w])
        self._evict(domid, oldest)
        return oldest

    # ---- what it all means, from scratch

    def recount(self) -> None:
        """Every count is what entries, pins, windows and holds say: the model's own arithmetic is not believed either."""
        total, typed = [0] * self.nr_frames, [0] * self.nr_frames
        for mfn, frame in enumerate(self.frames):
            total[mfn] += (frame.owner is not None) + frame.pinned + (frame.window is not None)
            typed[mfn] += frame.pinned + (frame.window is not None)
            for slot, entry in self.words[mfn].items() if frame.is_table and frame.type != SEG_DESC else ():
                if entry & P:
                    child = self.frames[mfn_of(entry)]
                    total[mfn_of(entry)] += 1
                    typed[mfn_of(entry)] += frame.type != L1 or bool(entry & RW)
                    assert child.owner == frame.owner and (frame.type == L1 or child.parent == (mfn, slot))
        for (mfn, writable), times in self.holds.items():
            total[mfn] += times
            typed[mfn] += times * writable
        for mfn, times in self.segments.items():
            total[mfn] += times
            typed[mfn] += times
        for mfn, frame in enumerate(self.frames):
            assert (frame.total, frame.typed) == (total[mfn], typed[mfn]), f"the model is wrong about mfn {mfn}"

    def mappable(self, domid: int) -> dict[int, tuple[int, bool]]:
        """What its tables allow: offset from the first window -> (mfn, writable)."""
        out: dict[int, tuple[int, bool]] = {}
        for window, root in enumerate(self.spaces[domid].windows):
            if root is None:
                continue
            for s3, e3 in self.words[root].items():
                for s2, e2 in self.words[mfn_of(e3)].items() if e3 & P else ():
                    for s1, e1 in self.words[mfn_of(e2)].items() if e2 & P else ():
                        if e1 & P:
                            at = window << 39 | s3 << 30 | s2 << 21 | s1 << 12
                            out[at] = mfn_of(e1), bool(e1 & e2 & e3 & RW)
        return out
