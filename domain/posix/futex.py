"""Futexes: waits on a word of a program's memory (kernel/futex/).

A futex is named by what the word is: in private memory by space and address, in a shared mapping by frame and offset, so that
processes that share it meet.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.wait import Blocking, WaitQueue
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from domain.posix.memory import Memory

ALL = 0xFFFF_FFFF
WAITERS, DIED, OWNER = 1 << 31, 1 << 30, (1 << 30) - 1  # of such a word
MOST_ROBUST = 2048
Key = tuple[int, int]


class Futexes:
    """The queues, each there while somebody waits on it. One queue a (futex, bitset)."""

    def __init__(self) -> None:
        self._queues: dict[Key, dict[int, WaitQueue]] = {}

    def wait(self, memory: Memory, address: int, value: int, deadline: int | None, bits: int = ALL) -> Blocking:
        """Until woken, if the word still is `value`. Raises Errno(EAGAIN, ETIMEDOUT, EINVAL, EFAULT), Interrupted."""
        if not bits:
            raise Errno(errno.EINVAL)
        key = self._key(memory, address)
        if memory.word(address, 4) != value & ALL:
            raise Errno(errno.EAGAIN)
        queue = self._queues.setdefault(key, {}).setdefault(bits, WaitQueue())
        try:
            woken = yield (queue,) if deadline is None else (queue, deadline)
        finally:
            self._tidy(key)
        if woken is None and deadline is not None:
            raise Errno(errno.ETIMEDOUT)
        return 0

    def wake(self, memory: Memory, address: int, count: int, bits: int = ALL) -> int:
        """Wake at most `count` of those whose bitset meets `bits`; how many."""
        try:
            key = self._key(memory, address)
        except Errno:
            return 0
        woken = 0
        for mask, queue in list(self._queues.get(key, {}).items()):
            if mask & bits and woken < count:
                woken += queue.wake(count - woken)
        self._tidy(key)
        return woken

    def requeue(self, memory: Memory, address: int, wake: int, target: int, move: int) -> int:
        """Wake some, let others wait on `target` instead; how many in all. Raises Errno(EFAULT, EINVAL)."""
        key, other = self._key(memory, address), self._key(memory, target)
        done = self.wake(memory, address, wake)
        for mask, queue in list(self._queues.get(key, {}).items()):
            moved = queue.move(self._queues.setdefault(other, {}).setdefault(mask, WaitQueue()), move)
            done, move = done + moved, move - moved
        self._tidy(key)
        self._tidy(other)
        return done

    # ---- locks whose word has its owner's number, so that we know whose they are (PI futexes; robust ones at a death)

    def lock(self, memory: Memory, address: int, tid: int, alive: Callable[[int], bool], deadline: int | None) -> Blocking:
        """Until it is ours. Nobody has a priority here that another could inherit, and who was woken may find it taken again.
        Raises Errno(EDEADLK, ESRCH, ETIMEDOUT, EFAULT), Interrupted."""
        while not self.try_lock(memory, address, tid, alive):
            word = memory.word(address, 4) | WAITERS
            memory.copy_out(address, word.to_bytes(4, "little"))
            yield from self.wait(memory, address, word, deadline)
        return 0

    def try_lock(self, memory: Memory, address: int, tid: int, alive: Callable[[int], bool]) -> bool:
        word = memory.word(address, 4)
        owner = word & OWNER
        if owner == tid:
            raise Errno(errno.EDEADLK)
        if owner and not alive(owner):
            raise Errno(errno.ESRCH)
        if owner:
            return False
        waited = WAITERS if self._queues.get(self._key(memory, address)) else 0
        memory.copy_out(address, (tid | word & DIED | waited).to_bytes(4, "little"))
        return True

    def unlock(self, memory: Memory, address: int, tid: int) -> None:
        """Raises Errno(EPERM): it is somebody else's."""
        if memory.word(address, 4) & OWNER != tid:
            raise Errno(errno.EPERM)
        memory.copy_out(address, bytes(4))
        self.wake(memory, address, 1)

    def bury(self, memory: Memory, head: int, tid: int) -> None:
        """What a dead thread still had is marked so, and one who waits for it is told (exit_robust_list). The list is the
        program's: it may be anything."""
        try:
            entry, offset, pending = struct.unpack("<QqQ", memory.copy_in(head, 24))
            for _ in range(MOST_ROBUST):
                if entry & ~1 == head:
                    break
                following = memory.word(entry & ~1)
                if entry != pending:
                    self._bury(memory, (entry & ~1) + offset, tid)
                entry = following
            if pending & ~1:
                self._bury(memory, (pending & ~1) + offset, tid)
        except Errno:
            pass

    def _bury(self, memory: Memory, address: int, tid: int) -> None:
        address &= (1 << 64) - 1
        word = memory.word(address, 4)
        if word & OWNER == tid:
            memory.copy_out(address, (word & WAITERS | DIED).to_bytes(4, "little"))
            self.wake(memory, address, 1)

    def _key(self, memory: Memory, address: int) -> Key:
        if address & 3:
            raise Errno(errno.EINVAL)
        vma = memory.areas.find(address)
        if vma is None:
            raise Errno(errno.EFAULT)
        if vma.shared:
            memory.word(address, 4)  # so that there is a frame
            return -1, (memory.pages[address >> PAGE_SHIFT] >> 2) * PAGE_SIZE + (address & PAGE_SIZE - 1)
        return id(memory), address

    def _tidy(self, key: Key) -> None:
        queues = self._queues.get(key)
        if queues is not None:
            for mask in [mask for mask, queue in queues.items() if not queue]:
                del queues[mask]
            if not queues:
                del self._queues[key]
