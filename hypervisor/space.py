"""Address spaces: which roots a kernel's process is shown, and how its host mappings follow its page tables.

A root that is loaded as base pointer is shown in a window, and stays there while it is pinned, so that a switch changes one
word. The tables are the authority; what the process has mapped is a TLB: filled for what a batch just set, at start, and by
fault. One rule holds everywhere: whoever takes a mapping away drops the references behind it after the acknowledgement.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from hypervisor import budget
from hypervisor._hv import ffi, lib
from hypervisor.frames import NO_MFN, TABLES
from hypervisor.gate.monitor import COMMAND, FD_MACHINE_RO, FD_MACHINE_RW, SYS_MUNMAP, U64_MASK, MonitorError, MonitorGone
from hypervisor.loop import Steps, Wait
from hypervisor.public.errors import BY_ERRNO, Busy, XenError
from hypervisor.public.layout import GRANT_BASE, HYPERVISOR_VIRT_START, KERNEL_WINDOW, NR_WINDOWS, SPACE_BYTES
from hypervisor.public.mmu import ENTRIES, L3_SHIFT, PageType, mfn_of
from hypervisor.public.start_info import SHARED_WINDOW
from hypervisor.public.traps import PF_FETCH, PF_WRITE
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE
from hypervisor.public.user import USER_START

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor
    from hypervisor.domain import Domain
    from hypervisor.user import User

SPACE_SHIFT = 39
TABLES_A_TURN = 64  # validated before others have a turn: 512 entries each, some 0.2 ms together
FLUSH_SLOTS = 16  # entries of a root whose mappings are thrown out in a turn: 512 tables each, some 0.4 ms together
SHOW_CHANGES = 512  # host mappings of one batch at start
TLB_CHANGES = 24_000  # changes since everything was thrown out: each leaves at most two mappings more, of 65,530


class Space:
    """The windows of one domain. `windows[0]` is the root it was started with, for good; `current` the base pointer."""

    def __init__(self) -> None:
        self.windows: list[int] = [NO_MFN] * NR_WINDOWS
        self.used = [0] * NR_WINDOWS  # when it was current last, in switches
        self.current = 0
        self.switches = 0
        self.changes = 0  # see TLB_CHANGES
        self.job: Any = ffi.new("struct mmu_job *", {"room": lib.JOB_REQUESTS})
        self.fills: Any = ffi.new("struct host_change[]", lib.FILL_CHANGES)  # of one fault, until they are asked for
        self.walk: Any = ffi.new("struct table_walk *")

    @property
    def root(self) -> int:
        return self.windows[self.current]

    def window_of(self, root: int) -> int:
        """-1: it is in none."""
        return self.windows.index(root) if root in self.windows else -1


def error_of(status: int) -> XenError:
    """Of a C kernel's negative status."""
    return BY_ERRNO[-status]()


# ---- host mappings


def follow(hv: Hypervisor, domain: Domain, changes: Any, count: int) -> Steps:
    """Steps: let the host mappings follow `count` changes, acknowledged. Where the host has no mapping left, all of them are
    thrown out, and what the tables say comes back by fault."""
    parts, at = [], 0
    while at < count:  # all packed before the first wait: the list is somebody else's by then
        n = lib.host_run(changes + at, count - at)
        window = changes[at].at >> SPACE_SHIFT
        base = KERNEL_WINDOW if window < NR_WINDOWS else -(window << SPACE_SHIFT) & U64_MASK
        parts.append((domain.users.get(window), window, _commands(changes + at, n, base), n))
        at += n
    for user, window, commands, n in parts:
        if window < NR_WINDOWS:
            yield from _follow(hv, domain, commands, n)
        elif user is not None:
            yield from _follow_user(hv, domain, user, commands, n)


def _follow(hv: Hypervisor, domain: Domain, commands: bytearray, count: int) -> Steps:
    """In the kernel's process."""
    assert domain.monitor is not None
    domain.space.changes += count
    try:
        yield domain.monitor.run(commands, count)
    except MonitorError as error:
        if error.errno != errno.ENOMEM:
            domain.fail(f"its monitor could not follow its page tables: {error}")
            raise MonitorGone from None
        yield from flush(hv, domain)
    else:
        if domain.space.changes > TLB_CHANGES:
            yield from flush(hv, domain)


def _follow_user(hv: Hypervisor, domain: Domain, user: User, commands: bytearray, count: int) -> Steps:
    """In an application's. If it cannot, or is gone, its end is the acknowledgement, and costs the application alone."""
    user.changes += count
    try:
        yield user.monitor.run(commands, count)
        if user.changes > TLB_CHANGES:
            yield from flush_user(hv, domain, user)
    except MonitorError as error:
        if error.errno == errno.ENOMEM:
            yield from flush_user(hv, domain, user)
        else:
            user.fail(f"its monitor could not follow its page tables: {error}")
            yield user.gone
    except MonitorGone:
        yield user.gone
    if not domain.alive:
        raise MonitorGone


def flush_user(hv: Hypervisor, domain: Domain, user: User) -> Steps:
    """Steps: throw out every host mapping that an application's process has of its tables."""
    user.changes = 0
    unmark_all(hv, user.root)
    try:
        yield user.monitor.batch([(SYS_MUNMAP, USER_START, HYPERVISOR_VIRT_START - USER_START)])
    except MonitorError as error:
        user.fail(f"its monitor could not unmap: {error}")
        yield user.gone
    except MonitorGone:
        yield user.gone
    if not domain.alive:
        raise MonitorGone


def unmark_all(hv: Hypervisor, root: int) -> None:
    """No host mapping stands for an entry below a root. Bounded by the frames of its tables: 10 ns each, and 0.4 us an L2."""
    slot = lib.mmu_next(hv.frames.mmu, root, 0)
    while slot < ENTRIES:
        lib.mmu_unmark(hv.frames.mmu, mfn_of(lib.mmu_entry(hv.frames.mmu, root, slot)))
        slot = lib.mmu_next(hv.frames.mmu, root, slot + 1)


def _commands(changes: Any, count: int, base: int = KERNEL_WINDOW) -> bytearray:
    """As the monitor runs them."""
    out = bytearray(count * COMMAND.size)
    lib.host_commands(changes, count, base, FD_MACHINE_RW, FD_MACHINE_RO, ffi.from_buffer(out))
    return out


def flush(hv: Hypervisor, domain: Domain) -> Steps:
    """Steps: throw out every host mapping of its tables."""
    domain.space.changes = 0
    for window, root in enumerate(domain.space.windows):
        if root != NO_MFN:
            yield from _throw_out(hv, domain, window, root)


def _throw_out(hv: Hypervisor, domain: Domain, window: int, root: int) -> Steps:
    """Steps: nothing of a window is mapped any more, be it that no entry of the root says so: what the monitor was refused for
    one that is gone goes here. Some entries at a time, bits and mappings together: a root that has 512 * 512 tables below it
    would take the hypervisor 90 ms at once."""
    mmu, slot, at = hv.frames.mmu, 0, 0
    end = GRANT_BASE if window == 0 else HYPERVISOR_VIRT_START
    while at < end and hv.frames.frame[root].window == window + 1:  # else somebody else has done it meanwhile
        for _ in range(FLUSH_SLOTS):
            slot = lib.mmu_next(mmu, root, slot)
            if slot == ENTRIES:
                break
            lib.mmu_unmark(mmu, mfn_of(lib.mmu_entry(mmu, root, slot)))
            slot += 1
        to = min(slot << L3_SHIFT, end) if slot < ENTRIES else end
        yield from _take_away(domain, window * SPACE_BYTES + at, to - at)
        at = to


def _unmap(hv: Hypervisor, domain: Domain, offset: int, size: int) -> Steps:
    """Steps: nothing of a stretch is mapped any more; the bits were cleared when this was asked for. It may split a mapping
    in two, so that it is counted, and may be refused, like any other change."""
    yield from follow(hv, domain, _nothing(offset, size), 1)


def _nothing(offset: int, size: int) -> Any:
    return ffi.new("struct host_change *", (offset, size // PAGE_SIZE, NO_MFN, 0, 0))


def _take_away(domain: Domain, offset: int, size: int) -> Steps:
    """Steps: as _unmap, of a great stretch. A monitor that cannot even do that, or a barrier, ends its domain."""
    assert domain.monitor is not None
    yield from _insist(domain, domain.monitor.run(_commands(_nothing(offset, size), 1), 1))


def busy(domain: Domain) -> bool:
    """One of its monitors was asked for something that it has not acknowledged."""
    assert domain.monitor is not None
    return domain.monitor.busy or any(user.monitor.busy or user.dying for user in domain.users.values())


def barrier(domain: Domain) -> Steps:
    """Steps: everything that was asked for before is acknowledged, by all monitors."""
    assert domain.monitor is not None
    if domain.monitor.busy:
        yield from _insist(domain, domain.monitor.barrier())
    for user in list(domain.users.values()):
        if not user.monitor.busy and not user.dying:
            continue
        try:
            yield user.monitor.barrier()
        except (MonitorError, MonitorGone):
            yield user.gone
    if not domain.alive:
        raise MonitorGone


def _insist(domain: Domain, wait: Wait) -> Steps:
    try:
        yield wait
    except MonitorError as error:
        domain.fail(f"its monitor could not unmap: {error}")
        raise MonitorGone from None


def zap_table(hv: Hypervisor, domain: Domain, table: int, size: int) -> Steps:
    """Steps: unmap what a table that is about to lose its place shows: `size` bytes of a window, or nothing."""
    offset = lib.mmu_offset(hv.frames.mmu, table)
    if offset >= 0:
        lib.mmu_unmark(hv.frames.mmu, table)
        yield from _unmap(hv, domain, offset, min(size, HYPERVISOR_VIRT_START - offset % SPACE_BYTES))  # the last GiB is shared
    elif domain.monitor is not None and busy(domain):
        yield from barrier(domain)


def fill(hv: Hypervisor, domain: Domain, offset: int, error: int) -> Steps:
    """Steps: after a fault, map the page and its neighbours if the tables allow the access. Returns how many changes, 0: they
    do not. `offset` from the first window."""
    window, va = divmod(offset, SPACE_BYTES)
    root = domain.space.windows[window] if window < NR_WINDOWS else domain.users[window].root
    if root == NO_MFN:
        return 0
    count = lib.mmu_fill(hv.frames.mmu, root, va, error & (PF_WRITE | PF_FETCH), domain.space.fills)
    if count:
        yield from follow(hv, domain, domain.space.fills, count)
    return count


def reachable(hv: Hypervisor, domain: Domain, offset: int, size: int, access: int) -> bool:
    """Whether the tables allow an access to all of a stretch."""
    for at in range(offset & -PAGE_SIZE, offset + size, PAGE_SIZE):
        window, va = divmod(at, SPACE_BYTES)
        root = domain.space.windows[window] if window < NR_WINDOWS else NO_MFN
        if root == NO_MFN or not lib.mmu_allows(hv.frames.mmu, root, va, access):
            return False
    return True


def table_at(hv: Hypervisor, domain: Domain, offset: int) -> int:
    """The page table that is shown at an offset from the first window, or NO_MFN."""
    window, va = divmod(offset, SPACE_BYTES)
    root = domain.space.windows[window]
    mfn = lib.mmu_walk(hv.frames.mmu, root, va, False) if root != NO_MFN else NO_MFN
    is_one = mfn != NO_MFN and hv.frames.frame[mfn].type in TABLES and hv.frames.is_table(mfn)
    return int(mfn) if is_one else NO_MFN


def show_all(hv: Hypervisor, domain: Domain, table: int) -> Steps:
    """Steps: map everything below a live table that is not mapped, in turns."""
    mmu = hv.frames.mmu
    changes, slot = ffi.new("struct host_change[]", SHOW_CHANGES), ffi.new("uint32_t *")
    if hv.frames.frame[table].type != PageType.L1:
        i = lib.mmu_next(mmu, table, 0)
        while i < ENTRIES and domain.space.changes < TLB_CHANGES // 2:
            yield from show_all(hv, domain, mfn_of(lib.mmu_entry(mmu, table, i)))
            i = lib.mmu_next(mmu, table, i + 1)
        return
    while slot[0] < ENTRIES:
        count = lib.mmu_show(mmu, table, slot, changes, SHOW_CHANGES)
        if count:
            yield from follow(hv, domain, changes, count)


def show(hv: Hypervisor, domain: Domain, table: int) -> Steps:
    """Steps: map what a new L1 of a program's space says, as a fault there would: it is made for what runs next."""
    if lib.mmu_offset(hv.frames.mmu, table) >> SPACE_SHIFT < NR_WINDOWS:
        return
    count = lib.mmu_show(hv.frames.mmu, table, ffi.new("uint32_t *"), domain.space.fills, lib.FILL_CHANGES)
    if count:
        yield from follow(hv, domain, domain.space.fills, count)


def dump(hv: Hypervisor, domain: Domain) -> dict[int, tuple[int, bool]]:
    """What its page tables have mapped in its process now: offset from the first window -> (mfn, writable)."""
    out: dict[int, tuple[int, bool]] = {}
    mmu, frame = hv.frames.mmu, hv.frames.frame

    def below(table: int, rights: int) -> None:
        base, level = lib.mmu_offset(mmu, table), frame[table].type
        for slot in range(ENTRIES):
            entry = lib.mmu_entry(mmu, table, slot)
            if not entry & 1:
                continue
            mfn = mfn_of(entry)
            if level != PageType.L1:
                below(mfn, rights & entry)
            elif lib.mmu_is_mapped(mmu, table, slot):
                out[base + slot * PAGE_SIZE] = mfn, bool(rights & entry & 2)

    for root in [*domain.space.windows, *(user.root for user in domain.users.values() if not user.dying)]:
        if root != NO_MFN:
            below(root, 2)
    return out


# ---- tables: references that may take many turns


def get_table(hv: Hypervisor, domain: Domain, mfn: int, level: int, parent: int = NO_MFN, slot: int = 0) -> Steps:
    """Steps: a reference to `mfn` as a table of `level`. Raises XenError, with everything undone."""
    status = lib.table_get(hv.frames.mmu, domain.space.walk, mfn, level, domain.domid, parent, slot)
    yield from _finish(hv, domain, status)


def put_table(hv: Hypervisor, domain: Domain, mfn: int, hooked: bool) -> Steps:
    """Steps: give one back, that an entry held (`hooked`), or a pin or a window. Nothing below it is mapped on its account."""
    lib.table_put(hv.frames.mmu, domain.space.walk, mfn, hooked)
    yield from _finish(hv, domain, lib.table_step(hv.frames.mmu, domain.space.walk, TABLES_A_TURN))


def _finish(hv: Hypervisor, domain: Domain, status: int) -> Steps:
    while status == -errno.EAGAIN:
        status = lib.table_step(hv.frames.mmu, domain.space.walk, TABLES_A_TURN)
        if status == -errno.EAGAIN:
            yield budget.turn(hv, domain)
            if not domain.alive:
                raise MonitorGone
    if status:
        raise error_of(status)


# ---- windows


def load(hv: Hypervisor, domain: Domain, root: int) -> Steps:
    """Steps: make `root` the base pointer. Raises XenError (it is no L3 and cannot be one)."""
    space, before = domain.space, domain.space.current
    window = space.window_of(root)
    if window < 0:
        if hv.frames.frame[root].window:
            raise Busy("the root is an application's")
        yield from get_table(hv, domain, root, PageType.L3)
        window = yield from _free_window(hv, domain)
        space.windows[window] = root
        hv.frames.frame[root].window = window + 1
    space.switches += 1
    space.used[window] = space.switches
    space.current = window
    tell_window(domain)
    if window != before and before and not hv.frames.frame[space.windows[before]].pinned:
        yield from evict(hv, domain, before)


def tell_window(domain: Domain) -> None:
    """The word that a switch writes."""
    word = ffi.cast("uint64_t *", domain.shared_info + SHARED_WINDOW)
    word[0] = KERNEL_WINDOW + domain.space.current * SPACE_BYTES


def _free_window(hv: Hypervisor, domain: Domain) -> Steps:
    """Steps: an empty window, of the root that has not been current for longest if need be."""
    space = domain.space
    for window in range(1, NR_WINDOWS):
        if space.windows[window] == NO_MFN:
            return window
    oldest = min((w for w in range(1, NR_WINDOWS) if w != space.current), key=lambda w: space.used[w])
    yield from evict(hv, domain, oldest)
    return oldest


def evict(hv: Hypervisor, domain: Domain, window: int) -> Steps:
    """Steps: show nothing in a window any more, and let go of its root."""
    root = domain.space.windows[window]
    domain.space.windows[window] = NO_MFN  # first: no fault fills it any more
    yield from _throw_out(hv, domain, window, root)
    hv.frames.frame[root].window = 0
    yield from put_table(hv, domain, root, False)


def invalidate(hv: Hypervisor, domain: Domain, va: int) -> Steps:
    """Steps: throw out the host mapping of one page of the current space."""
    space, mmu = domain.space, hv.frames.mmu
    l1 = lib.mmu_l1(mmu, space.root, va) if space.root != NO_MFN else NO_MFN
    if l1 == NO_MFN:
        return
    lib.mmu_unmark_one(mmu, l1, va >> PAGE_SHIFT & ENTRIES - 1)
    yield from _unmap(hv, domain, space.current * SPACE_BYTES + (va & -PAGE_SIZE), PAGE_SIZE)
