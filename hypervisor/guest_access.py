"""Copies between the hypervisor and a guest's memory, by guest-virtual address: an offset from the first window.

The guest's own tables are walked page by page (guest_access.c); nothing is believed but the copy. An absent page is EFAULT,
and so is one that the tables show read-only where the hypervisor would write. Handlers copy in once, act on the copy, and look
the address up again for copying out, since the map may have changed meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor._hv import ffi, lib
from hypervisor.domain import Domain
from hypervisor.frames import NO_MFN
from hypervisor.public.errors import BadAddress
from hypervisor.public.layout import NR_WINDOWS, SPACE_BYTES

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor


def _root(domain: Domain, address: int) -> tuple[int, int]:
    """Of the window that shows an address: its root, and the address within. Raises BadAddress."""
    window, va = divmod(address, SPACE_BYTES)
    root = domain.space.windows[window] if window < NR_WINDOWS else NO_MFN
    if root == NO_MFN:
        raise _bad(address)
    return root, va


def _bad(address: int) -> BadAddress:
    return BadAddress(f"guest address {address:#x}")


def translate(hv: Hypervisor, domain: Domain, address: int, write: bool) -> int:
    """The frame at an address, if the tables of its window allow the access. Raises BadAddress."""
    root, va = _root(domain, address)
    mfn = int(lib.mmu_walk(hv.frames.mmu, root, va, write))
    if mfn == NO_MFN:
        raise _bad(address)
    return mfn


def copy_in(hv: Hypervisor, domain: Domain, address: int, size: int) -> bytes:
    """`size` bytes, each read once. Raises BadAddress. The caller bounds `size`."""
    if not size:
        return b""
    root, va = _root(domain, address)
    out = ffi.new("char[]", size)
    if lib.guest_read(hv.frames.mmu, root, va, size, out):
        raise _bad(address)
    return ffi.buffer(out)[:]  # type: ignore[no-any-return]


def copy_out(hv: Hypervisor, domain: Domain, address: int, data: bytes | bytearray) -> None:
    """Write `data`; all of it or nothing. Raises BadAddress."""
    if not data:
        return
    root, va = _root(domain, address)
    if lib.guest_write(hv.frames.mmu, root, va, len(data), ffi.from_buffer(data)):
        raise _bad(address)
