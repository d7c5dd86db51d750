"""Grants as a guest uses them: give frames of ours, map frames of others.

A frontend gives a pool once and keeps it; a backend maps it once and keeps it (persistent), so the data path makes no
hypercall. Ending a grant that the peer still maps is refused: the pool is freed after the backend has let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domain import memory
from domain._guest import ffi, lib
from domain.memory import Pages
from hypervisor.public.errors import Busy, NoSpace
from hypervisor.public.grant import MAP_REF, NR_RESERVED_ENTRIES, UNMAP_REF, GrantMap, GrantStatus, GrantUnmap, Gtf, MapFlags
from hypervisor.public.layout import GRANT_BASE, HYPERVISOR_VIRT_START, KERNEL_WINDOW
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

BATCH = 64  # entries a hypercall: two and a half KiB of the scratch page, one monitor batch at worst


class GrantError(Exception):
    """A mapping was refused; `status` is Xen's."""

    def __init__(self, ref: int, status: int) -> None:
        name = GrantStatus(status).name if status in GrantStatus.__members__.values() else str(status)
        super().__init__(f"grant {ref}: {name.lower().replace('_', ' ')}")
        self.ref, self.status = ref, status


@dataclass(frozen=True)
class Mapping:
    """Frames of `domid` mapped side by side; `address` is the host address of the first."""

    domid: int
    grefs: tuple[int, ...]
    handles: tuple[int, ...]
    address: int


class Grants:
    def __init__(self, kernel: Kernel, table: int, nr_entries: int) -> None:
        self._kernel = kernel
        self._table: Any = ffi.cast("void *", table)
        self._free = list(range(nr_entries - 1, NR_RESERVED_ENTRIES - 1, -1))
        self._scratch: Pages | None = None
        self._next_va = GRANT_BASE
        self._free_vas: dict[int, list[int]] = {}  # length in pages -> addresses

    # ---- giving

    def give(self, domid: int, pfn: int, readonly: bool = False) -> int:
        """Let `domid` map our frame; returns the reference. Raises NoSpace."""
        if not self._free:
            raise NoSpace("the grant table is full")
        ref = self._free.pop()
        flags = Gtf.PERMIT_ACCESS | (Gtf.READONLY if readonly else 0)
        if lib.grant_set(self._table, ref, int(flags), domid, self._kernel.memory.p2m[pfn]):
            raise AssertionError(f"grant entry {ref} is in use and on the free list")
        return ref

    def give_pages(self, domid: int, pages: Pages, readonly: bool = False) -> list[int]:
        return [self.give(domid, pfn, readonly) for pfn in pages.pfns]

    def end(self, ref: int) -> None:
        """Take it back. Raises Busy while it is mapped."""
        if lib.grant_end(self._table, ref):
            raise Busy(f"grant {ref} is mapped")
        self._free.append(ref)

    # ---- mapping

    def map(self, domid: int, grefs: Sequence[int], readonly: bool = False) -> Mapping:
        """Map `grefs` of `domid` side by side: one hypercall for 64. Raises GrantError, with nothing left mapped."""
        va = self._take_va(len(grefs))
        flags = int(MapFlags.HOST_MAP | (MapFlags.READONLY if readonly else 0))
        handles: list[int] = []
        refused: GrantError | None = None
        for at in range(0, len(grefs), BATCH):
            part = grefs[at : at + BATCH]
            entries = b"".join(
                MAP_REF.pack(va + (at + i) * PAGE_SIZE, flags, ref, domid, 0, 0, 0) for i, ref in enumerate(part)
            )
            answer = self._array_call(GrantMap, entries, len(part))
            for _, _, ref, _, status, handle, _ in MAP_REF.iter_unpack(answer):
                if status:
                    refused = refused or GrantError(ref, status)
                    handles.append(0)
                else:
                    handles.append(handle)
            if refused:
                break
        mapping = Mapping(domid, tuple(grefs), tuple(handles), KERNEL_WINDOW + va)
        if refused:
            self.unmap(mapping)
            raise refused
        return mapping

    def unmap(self, mapping: Mapping) -> None:
        """Let go of all of it."""
        va = mapping.address - KERNEL_WINDOW
        todo = [(va + i * PAGE_SIZE, handle) for i, handle in enumerate(mapping.handles) if handle]
        for at in range(0, len(todo), BATCH):
            part = todo[at : at + BATCH]
            answer = self._array_call(GrantUnmap, b"".join(UNMAP_REF.pack(a, 0, h, 0, 0) for a, h in part), len(part))
            for _, _, handle, status, _ in UNMAP_REF.iter_unpack(answer):
                assert status == GrantStatus.OKAY, f"unmap of handle {handle}: {status}"
        self._free_vas.setdefault(len(mapping.grefs), []).append(va)

    def _array_call(self, call: type[GrantMap] | type[GrantUnmap], entries: bytes, count: int) -> bytes:
        if self._scratch is None:
            self._scratch = self._kernel.memory.alloc(1)
        memory.write(self._scratch.address, entries)
        self._kernel.hypercall(call(self._scratch.va, count))
        return memory.read(self._scratch.address, len(entries))

    def _take_va(self, nr: int) -> int:
        free = self._free_vas.get(nr)
        if free:
            return free.pop()
        va = self._next_va
        if va + nr * PAGE_SIZE > HYPERVISOR_VIRT_START:
            raise NoSpace("addresses for grants")
        self._next_va = va + nr * PAGE_SIZE
        return va

    def reserve(self, nr: int) -> int:
        """Guest-virtual address of `nr` pages that no mapping of ours uses; dom0's builder maps foreign frames there."""
        return self._take_va(nr)

    def unreserve(self, va: int, nr: int) -> None:
        self._free_vas.setdefault(nr, []).append(va)
