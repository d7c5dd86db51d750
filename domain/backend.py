"""What every backend in a driver domain is made of: nodes that appear under its path, and its statistics page."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from domain import memory
from domain.memory import Pages
from domain.xenbus import DeviceError
from hypervisor.public.io.stats import NR_ROWS, ROW, StatsKind

if TYPE_CHECKING:
    from domain.kernel import Kernel

DOM0 = 0
MAX_KEPT = 1056  # grants that a backend keeps mapped for one device, as Xen's: a disk's ring needs 352, a vif's two 512


class Statistics:
    """This driver domain's page of counters, which dom0 reads."""

    def __init__(self, page: Pages) -> None:
        self._page = page
        self._free = list(range(NR_ROWS - 1, -1, -1))

    @classmethod
    async def publish(cls, kernel: Kernel) -> Statistics:
        page = kernel.memory.alloc(1)
        ref = kernel.grants.give(DOM0, page.pfn, readonly=True)
        await kernel.store.write(f"/local/domain/{kernel.domid}/data/stats-ref", ref)
        return cls(page)

    def open(self, domid: int, kind: StatsKind, handle: int) -> tuple[int, int]:
        """(row, host address of its seven counters). Raises DeviceError when all rows are taken."""
        if not self._free:
            raise DeviceError(f"this driver domain serves {NR_ROWS} devices already")
        row = self._free.pop()
        at = self._page.address + row * ROW.size
        memory.write(at, ROW.pack(domid, kind, handle, *([0] * 7)))
        return row, at + 8

    def close(self, row: int) -> None:
        memory.zero(self._page.address + row * ROW.size, ROW.size)
        self._free.append(row)


Begin = Callable[[str, str, int, int], Coroutine[Any, Any, None]]


async def serve_nodes(kernel: Kernel, kind: str, begin: Begin) -> None:
    """Run begin(path, frontend's path, its domid, handle) in a task for every node backend/<kind>/<domid>/<handle>."""
    base = f"/local/domain/{kernel.domid}/backend/{kind}"
    known: dict[str, object] = {}
    await kernel.store.mkdir(base)
    watch = await kernel.store.watch(base)
    while True:
        await watch.next()
        present = set()
        for domid in await kernel.store.ls(base):
            for handle in await kernel.store.ls(f"{base}/{domid}"):
                path = f"{base}/{domid}/{handle}"
                frontend = await kernel.store.get(f"{path}/frontend")  # written last: the node is whole
                if not (domid.isdigit() and handle.isdigit() and frontend):
                    continue
                present.add(path)
                if path not in known:
                    known[path] = kernel.spawn(begin(path, frontend, int(domid), int(handle)), name=path)
        for path in set(known) - present:
            del known[path]


