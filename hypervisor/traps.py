"""What a guest kernel has the entry code do: its handlers of exceptions, its callbacks, its stack. Each is checked, then
written where that code reads it (hypervisor/gate/traps.c); nothing here runs when an exception is delivered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor import guest_access
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain, Trap
from hypervisor.public import traps as abi
from hypervisor.public.errors import Invalid, TooBig
from hypervisor.public.layout import is_hypervisors
from hypervisor.public.traps import Vector, VmassCommand, VmassType

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

CANONICAL = 1 << 47  # addresses of a process are below
FLAGS = abi.TI_DPL | abi.TI_MASK_EVENTS | abi.TI_FAST
NEVER = {Vector.NMI, Vector.DOUBLE_FAULT, Vector.MACHINE_CHECK}  # the host's, or the domain's end


@hypercall(abi.SetTrapTable)
def set_trap_table(hv: Hypervisor, caller: Domain, call: abi.SetTrapTable) -> None:
    """Entry by entry, so that nothing is read beyond the one that ends the list."""
    if not call.address:
        for vector in caller.traps:
            _tell(caller, vector, 0)
        caller.traps.clear()
        return
    for i in range(abi.MAX_TRAPS + 1):
        entry = guest_access.copy_in(hv, caller, call.address + i * abi.TRAP_INFO.size, abi.TRAP_INFO.size)
        vector, flags, cs, address = abi.TRAP_INFO.unpack(entry)
        if not address:
            return
        if i == abi.MAX_TRAPS:
            raise TooBig(f"more than {abi.MAX_TRAPS} traps")
        _check(vector, flags, cs, address)

        caller.traps[vector] = trap = Trap(address, flags)
        _tell(caller, vector, trap.word)


@hypercall(abi.StackSwitch)
def stack_switch(hv: Hypervisor, caller: Domain, call: abi.StackSwitch) -> None:
    _check_ring(call.ss)
    _check_address("stack", call.sp)

    _tell(caller, abi.KERNEL_SP, call.sp)


@hypercall(abi.SetCallbacks)
def set_callbacks(hv: Hypervisor, caller: Domain, call: abi.SetCallbacks) -> None:
    _check_address("event callback", call.event)
    _check_address("failsafe callback", call.failsafe)

    _tell(caller, abi.EVENT, Trap(call.event, abi.TI_MASK_EVENTS).word if call.event else 0)
    _tell(caller, abi.FAILSAFE, call.failsafe)


@hypercall(abi.VmAssist)
def vm_assist(hv: Hypervisor, caller: Domain, call: abi.VmAssist) -> None:
    if call.type != VmassType.WRITABLE_PAGETABLES or call.cmd not in (VmassCommand.ENABLE, VmassCommand.DISABLE):
        raise Invalid(f"vm_assist {call.cmd} of {call.type}")

    caller.writable_tables = call.cmd == VmassCommand.ENABLE


def _tell(domain: Domain, index: int, word: int) -> None:
    """One store of 64 bits: the domain may be in its entry code right now, and finds the one or the other."""
    assert domain.monitor is not None
    domain.monitor.set_trap(index, word)


def _check(vector: int, flags: int, cs: int, address: int) -> None:
    if vector in NEVER:
        raise Invalid(f"vector {vector} is never delivered")
    if flags & ~FLAGS:
        raise Invalid(f"flags {flags:#x}")
    _check_ring(cs)
    _check_address("handler", address)
    if flags & abi.TI_FAST and vector != Vector.SYSTEM_CALL:
        raise Invalid(f"vector {vector} cannot be fast: system calls of applications alone are")
    if vector == Vector.SYSTEM_CALL and not flags & abi.TI_FAST:
        raise Invalid("vector 0x80 must be fast: in the kernel's own process the host takes that interrupt for itself")
    if flags & abi.TI_FAST and flags & (abi.TI_DPL | abi.TI_MASK_EVENTS) != abi.TI_DPL:
        raise Invalid(f"a fast handler with flags {flags:#x}: applications are of ring 3, and nobody is there to mask events")


def _check_ring(selector: int) -> None:
    if not selector & 3:
        raise Invalid(f"selector {selector:#x} is of ring 0")


def _check_address(what: str, address: int) -> None:
    if address >= CANONICAL:
        raise Invalid(f"{what} {address:#x} is not canonical")
    if is_hypervisors(address):
        raise Invalid(f"{what} {address:#x} is the hypervisor's")
