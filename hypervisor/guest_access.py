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
    """(mfn, offset, length) of each page's part. Raises BadAddress before anything is touched."""
    out = []
    while size:
        place = domain.translate(va)
        if place is None:
            raise BadAddress(f"guest address {va:#x}")
        mfn, offset = place
        length = min(size, PAGE_SIZE - offset)
        out.append((mfn, offset, length))
        va += length
        size -= length
    return out


def copy_in(hv: Hypervisor, domain: Domain, va: int, size: int) -> bytes:
    """`size` bytes at `va`, each read once. Raises BadAddress. The caller bounds `size`."""
    return b"".join(hv.machine.read(*piece) for piece in _pieces(domain, va, size))


def copy_out(hv: Hypervisor, domain: Domain, va: int, data: bytes) -> None:
    """Write `data` at `va`; all of it or nothing. Raises BadAddress."""
    done = 0
    for mfn, offset, length in _pieces(domain, va, len(data)):
        hv.machine.write(mfn, offset, data[done : done + length])
        done += length
