"""The trap table of a guest kernel: which of its handlers is entered for which exception; and what is done without one.

Checked here once, then copied into the page of the top 64 MB from which the entry code takes it: the hypervisor is not asked
again when an exception happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor import guest_access
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain, Trap
from hypervisor.public import traps as abi
from hypervisor.public.errors import Invalid, TooBig
from hypervisor.public.layout import HYPERVISOR_VIRT_START, KERNEL_WINDOW, SPACE_BYTES, in_windows
from hypervisor.public.traps import VmassCommand, VmassType

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

CANONICAL = 1 << 47  # addresses of a process are below


@hypercall(abi.SetTrapTable)
def set_trap_table(hv: Hypervisor, caller: Domain, call: abi.SetTrapTable) -> None:
    """Entry by entry, so that nothing is read beyond the one that ends the list."""
    if not call.address:
        for vector in list(caller.traps):
            del caller.traps[vector]
            _tell(caller, vector, 0)
        return
    for i in range(abi.MAX_TRAPS + 1):
        entry = guest_access.copy_in(hv, caller, call.address + i * abi.TRAP_INFO.size, abi.TRAP_INFO.size)
        vector, flags, cs, address = abi.TRAP_INFO.unpack(entry)
        if not address:
            return
        if i == abi.MAX_TRAPS:
            raise TooBig(f"more than {abi.MAX_TRAPS} traps")
        _check(vector, flags, cs, address)
        caller.traps[vector] = trap = Trap(address, bool(flags & abi.TI_MASK_EVENTS), flags & abi.TI_DPL)
        _tell(caller, vector, abi.trap_word(*trap))


@hypercall(abi.VmAssist)
def vm_assist(hv: Hypervisor, caller: Domain, call: abi.VmAssist) -> None:
    if call.type != VmassType.WRITABLE_PAGETABLES or call.cmd not in (VmassCommand.ENABLE, VmassCommand.DISABLE):
        raise Invalid(f"vm_assist {call.cmd} of {call.type}")

    caller.writable_tables = call.cmd == VmassCommand.ENABLE


def _tell(domain: Domain, vector: int, word: int) -> None:
    """The entry code: but of vector 14, which the hypervisor delivers."""
    if vector != abi.VECTOR_PAGE_FAULT and domain.monitor is not None:
        domain.monitor.set_trap(vector, word)


def _check(vector: int, flags: int, cs: int, address: int) -> None:
    if vector == abi.VECTOR_INT80:
        raise Invalid(f"vector {vector:#x}: the host takes that interrupt for itself")
    if flags & ~(abi.TI_DPL | abi.TI_MASK_EVENTS):
        raise Invalid(f"flags {flags:#x}")
    if not cs & 3:
        raise Invalid(f"code selector {cs:#x} is of ring 0")
    if address >= CANONICAL:
        raise Invalid(f"handler {address:#x} is not canonical")
    if in_windows(address) and (address - KERNEL_WINDOW) % SPACE_BYTES >= HYPERVISOR_VIRT_START:
        raise Invalid(f"handler {address:#x} is the hypervisor's")
