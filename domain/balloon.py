"""The balloon driver: this domain owns as much memory as dom0 asks it to, as far as it can.

    memory/target             KiB, dom0's     what it should own
    memory/current            KiB, ours       where we stopped: at the target, or as near to it as we came
    control/feature-balloon   "1", ours       there is such a driver here

A target is a request. What is in use is never taken away: where too little is free it goes as far as it can, and on as soon
as pages are freed. Where the machine has too little it asks again, after 1 s, 2 s, at last every 32 s, as Linux's does. What
a domain may own at most is the hypervisor's to enforce; it has entries for no more than start_info's max_pages.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from domain.sched import TimeoutExpired, timeout
from domain.store import StoreError, Watch
from hypervisor.public.memory import CurrentReservation
from hypervisor.public.types import DOMID_SELF, MAX_BATCH, PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

TARGET, CURRENT, FEATURE = "memory/target", "memory/current", "control/feature-balloon"
KEEP_FREE = 32  # pages that are left to the kernel, whatever the target: without any its next allocation ends it
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 32.0
FREED = "freed"  # put among the paths of the watch: look again


class Balloon:
    """One kernel thread. Nobody calls it: it hears of targets from the store, and of free pages from the allocator."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel, self._memory = kernel, kernel.memory
        self._target: int | None = None  # pages
        self._said = kernel.memory.nr_pages  # dom0 wrote it for us, at creation
        self._takes_more = False  # it gave all it could, and that was too little

    async def run(self) -> None:
        """For ever; where dom0 ends our connection to the store, this domain keeps what it has."""
        with suppress(StoreError):
            await self._kernel.store.write(FEATURE, 1)
            await self._follow(await self._kernel.store.watch(TARGET))

    async def _follow(self, watch: Watch) -> None:
        def freed() -> None:
            if self._takes_more and self._memory.nr_free > KEEP_FREE:
                watch.put(FREED)

        self._memory.on_free = freed
        short, pause = False, RETRY_SECONDS
        while True:
            try:
                heard = await (timeout(pause, watch.next()) if short else watch.next())
                pause = RETRY_SECONDS
            except TimeoutExpired:
                heard, pause = FREED, min(2 * pause, MAX_RETRY_SECONDS)
            if heard != FREED:
                self._target = pages(await self._kernel.store.get(TARGET))
            short = await self._approach(watch)
            await self._say()

    async def _approach(self, watch: Watch) -> bool:
        """Towards the target, a batch a turn, until something new is heard. True: it has to be tried again."""
        memory = self._memory
        while self._target is not None and (missing := self._target - self._owned()):
            if missing > 0:
                moved = memory.obtain(min(missing, MAX_BATCH))
            else:
                moved = memory.release(max(0, min(-missing, MAX_BATCH, memory.nr_free - KEEP_FREE)))
            self._takes_more = missing < 0 and not moved
            if not moved:
                return missing < 0 or memory.nr_holes > 0
            if len(watch.events):
                return True
            await self._kernel.sleep(0)
        self._takes_more = False
        return False

    def _owned(self) -> int:
        """As the hypervisor counts: pages that came or went by transfer, too."""
        return self._kernel.call(CurrentReservation(DOMID_SELF))

    async def _say(self) -> None:
        if (owned := self._owned()) != self._said:
            self._said = owned
            await self._kernel.store.write(CURRENT, owned * PAGE_SIZE >> 10)


def pages(text: str) -> int | None:
    """Of a number of KiB; None: no such number, and nothing is to be done."""
    return (int(text) << 10) // PAGE_SIZE if text.isascii() and text.isdigit() and len(text) <= 15 else None
