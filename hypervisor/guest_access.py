"""Copies between the hypervisor and a guest's memory, by guest-virtual address.

The guest's own map is walked page by page; nothing is believed but the copy. An absent page is EFAULT. Handlers copy in
once, act on the copy, and look the address up again for copying out, since the map may have changed meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.domain import Domain
from hypervisor.public.errors import BadAddress
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor


def _pieces(domain: Domain, va: int, size: int) -> list[tuple[int, int, int]]:
    """(mfn, offset, length) of each stretch that lies together in the machine. Raises BadAddress before any is touched."""
    out: list[tuple[int, int, int]] = []
    after = -1  # the mfn that would go on where the last piece ended
    while size:
        place = domain.translate(va)
        if place is None:
            raise BadAddress(f"guest address {va:#x}")
        mfn, offset = place
        length = min(size, PAGE_SIZE - offset)
        if mfn == after:
            first, start, so_far = out[-1]
            out[-1] = (first, start, so_far + length)
        else:
            out.append((mfn, offset, length))
        after = mfn + 1
        va += length
        size -= length
    return out


def copy_in(hv: Hypervisor, domain: Domain, va: int, size: int) -> bytes:
    """`size` bytes at `va`, each read once. Raises BadAddress. The caller bounds `size`."""
    pieces = _pieces(domain, va, size)
    return hv.machine.read(*pieces[0]) if len(pieces) == 1 else b"".join(hv.machine.read(*piece) for piece in pieces)


def copy_out(hv: Hypervisor, domain: Domain, va: int, data: bytes | bytearray) -> None:
    """Write `data` at `va`; all of it or nothing. Raises BadAddress."""
    done = 0
    for mfn, offset, length in _pieces(domain, va, len(data)):
        hv.machine.write(mfn, offset, data[done : done + length] if length < len(data) else data)
        done += length
