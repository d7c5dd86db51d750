"""Copies between the hypervisor and a guest's memory, by guest-virtual address: an offset from the first window.

The guest's own tables are walked page by page; nothing is believed but the copy. An absent page is EFAULT, and so is one that
the tables show read-only where the hypervisor would write. Handlers copy in
once, act on the copy, and look the address up again for copying out, since the map may have changed meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor._hv import lib
from hypervisor.domain import Domain
from hypervisor.frames import NO_MFN
from hypervisor.public.errors import BadAddress
from hypervisor.public.layout import NR_WINDOWS, SPACE_BYTES
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor


def _pieces(hv: Hypervisor, domain: Domain, address: int, size: int, write: bool) -> list[tuple[int, int, int]]:
    """(mfn, offset, length) of each stretch that lies together in the machine. Raises BadAddress before any is touched."""
    out: list[tuple[int, int, int]] = []
    after = -1  # the mfn that would go on where the last piece ended
    while size:
        mfn = translate(hv, domain, address, write)
        offset = address % PAGE_SIZE
        length = min(size, PAGE_SIZE - offset)
        if mfn == after:
            first, start, so_far = out[-1]
            out[-1] = (first, start, so_far + length)
        else:
            out.append((mfn, offset, length))
        after = mfn + 1
        address += length
        size -= length
    return out


def translate(hv: Hypervisor, domain: Domain, address: int, write: bool) -> int:
    """The frame at an address, if the tables of its window allow the access. Raises BadAddress."""
    window, va = divmod(address, SPACE_BYTES)
    root = domain.space.windows[window] if window < NR_WINDOWS else NO_MFN
    mfn = lib.mmu_walk(hv.frames.mmu, root, va, write) if root != NO_MFN else NO_MFN
    if mfn == NO_MFN:
        raise BadAddress(f"guest address {address:#x}")
    return int(mfn)


def copy_in(hv: Hypervisor, domain: Domain, va: int, size: int) -> bytes:
    """`size` bytes at `va`, each read once. Raises BadAddress. The caller bounds `size`."""
    if va % PAGE_SIZE + size <= PAGE_SIZE and size:  # nearly always, and 1 us less
        return hv.machine.read(translate(hv, domain, va, False), va % PAGE_SIZE, size)
    pieces = _pieces(hv, domain, va, size, False)
    return hv.machine.read(*pieces[0]) if len(pieces) == 1 else b"".join(hv.machine.read(*piece) for piece in pieces)


def copy_out(hv: Hypervisor, domain: Domain, va: int, data: bytes | bytearray) -> None:
    """Write `data` at `va`; all of it or nothing. Raises BadAddress."""
    done = 0
    for mfn, offset, length in _pieces(hv, domain, va, len(data), True):
        hv.machine.write(mfn, offset, data[done : done + length] if length < len(data) else data)
        done += length
