"""Copy on write: a child gets its parent's memory without a copy; whoever writes to a page first gets one of its own.

cmdline: "pages=N" (default 64). The child writes to every second page, the parent to every third; each reads what it should.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from domain import memory
from domain.memory import Pages
from domain.paging import AddressSpace, Fault
from hypervisor.public.boot_tables import DATA
from hypervisor.public.mmu import Pte
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

BASE = 0x4000_0000
SHARED = int(Pte.PRESENT | Pte.NX)


class CopyOnWrite:
    """The policy, of all spaces that share frames: who has which frame at which page, and how many have it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._frames: dict[tuple[AddressSpace, int], Pages] = {}
        self._users: Counter[Pages] = Counter()
        self.copies = self.last_users = 0

    def space(self) -> AddressSpace:
        return AddressSpace.create(self._kernel, self.handle)

    def give(self, space: AddressSpace, va: int) -> None:
        """A fresh page."""
        self._have(space, va, self._kernel.memory.alloc(1), DATA)

    def fork(self, parent: AddressSpace) -> AddressSpace:
        """Two batches: the child's entries, and the parent's, which lose their RW."""
        child = self.space()
        for (space, va), frame in list(self._frames.items()):
            if space is parent:
                self._have(child, va, frame, SHARED)
                parent.protect(va, SHARED)
        parent.flush()
        return child

    async def handle(self, fault: Fault) -> None:
        """Only writes to what is shared come here: nothing else is missing."""
        frame = self._frames[fault.space, fault.page]
        if self._users[frame] == 1:
            self.last_users += 1
            fault.space.map(fault.page, frame.pfn)
            return
        self.copies += 1
        own = self._kernel.memory.alloc(1)
        memory.write(own.address, memory.read(frame.address, PAGE_SIZE))
        self._users[frame] -= 1
        self._have(fault.space, fault.page, own, DATA)

    def end(self, space: AddressSpace) -> None:
        """Its tables, and the frames that nobody else has."""
        space.destroy()
        for key in [key for key in self._frames if key[0] is space]:
            frame = self._frames.pop(key)
            self._users[frame] -= 1
            if not self._users[frame]:
                self._kernel.memory.free(frame)

    def _have(self, space: AddressSpace, va: int, frame: Pages, flags: int) -> None:
        self._frames[space, va] = frame
        self._users[frame] += 1
        space.map(va, frame.pfn, flags)


async def main(kernel: Kernel) -> int:
    options = dict(word.split("=", 1) for word in kernel.cmdline.split())
    addresses = [BASE + i * PAGE_SIZE for i in range(int(options.get("pages", 64)))]
    policy = CopyOnWrite(kernel)
    parent, before = policy.space(), kernel.memory.nr_free
    for va in addresses:
        policy.give(parent, va)
        await parent.write(va, b"parent" + va.to_bytes(8, "little"))
    used = before - kernel.memory.nr_free
    child = policy.fork(parent)
    forked = before - kernel.memory.nr_free - used

    for va in addresses[::2]:
        await child.write(va, b"child!")
    for va in addresses[::3]:
        await parent.write(va, b"PARENT")

    wrong = 0
    for i, va in enumerate(addresses):
        tail = va.to_bytes(8, "little")
        wrong += await parent.read(va, 14) != (b"parent" if i % 3 else b"PARENT") + tail
        wrong += await child.read(va, 14) != (b"parent" if i % 2 else b"child!") + tail
    copies = len(set(addresses[::2]) | set(addresses[::3]))
    both = len(set(addresses[::2]) & set(addresses[::3]))

    print(f"{len(addresses)} pages shared by a fork that took {forked} pages of memory: tables")
    print(f"{policy.copies} pages copied, {policy.last_users} given to their last user, {wrong} wrong")
    policy.end(child)
    policy.end(parent)
    return 0 if not wrong and (policy.copies, policy.last_users) == (copies, both) and forked < 8 else 1
