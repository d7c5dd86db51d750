"""Memory reservation. Source: xen/include/public/memory.h."""

from __future__ import annotations

from hypervisor.public.hypercall import OP_MEMORY, Hypercall
from hypervisor.public.types import U16


class CurrentReservation(Hypercall[int]):
    """Frames that `domid` owns now (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_MEMORY, 3
    domid: U16


class MaximumReservation(Hypercall[int]):
    """Frames that `domid` may own (another's: dom0 only). Raises NoSuchDomain, NotPermitted."""

    OP, CMD = OP_MEMORY, 4
    domid: U16
