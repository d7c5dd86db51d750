"""Futexes: waits on a word of a program's memory (kernel/futex/).

A futex is named by what the word is: in private memory by space and address, in a shared mapping by frame and offset, so that
processes that share it meet.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.wait import Blocking, WaitQueue
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from domain.posix.memory import Memory

ALL = 0xFFFF_FFFF
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
