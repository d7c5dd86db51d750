"""Exceptions in a Python kernel: handlers in C, which the hypervisor's entry code enters without anybody being asked.

    set_traps(kernel, {Vector.INVALID_OPCODE: address})     of code that ends with iretq; fault.c has an example

Python cannot run in a handler: what was interrupted may be the interpreter itself. So the library registers vector 14 alone
(paging.py), and any other exception, a division by zero in a C module say, ends the domain: the hypervisor names the vector and
the instruction as the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hypervisor.public.traps import TI_MASK_EVENTS, TRAP_INFO, SetTrapTable

if TYPE_CHECKING:
    from domain.kernel import Kernel

USER_CODE_SELECTOR = 0x33  # Linux's, of x86-64: the ring that every kernel here runs in


def set_traps(kernel: Kernel, handlers: Mapping[int, int], dpl: int = 0, mask_events: bool = False) -> None:
    """Register handlers: vector -> host address. `dpl` of 1 or more lets `int $vector` enter them too. Raises Invalid."""
    flags = dpl | (TI_MASK_EVENTS if mask_events else 0)
    entries = [TRAP_INFO.pack(vector, flags, USER_CODE_SELECTOR, address) for vector, address in handlers.items()]
    kernel.hypercall(SetTrapTable(kernel.memory.mmu.give(b"".join(entries) + bytes(TRAP_INFO.size))))


def forget_traps(kernel: Kernel) -> None:
    """All of them, that of page faults too."""
    kernel.hypercall(SetTrapTable(0))
