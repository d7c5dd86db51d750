"""Exceptions in a Python kernel: handlers in C, which the hypervisor's entry code enters without anybody being asked.

    set_traps(kernel, {Vector.INVALID_OPCODE: address})     of code that ends with iretq; fault.c has an example

Python cannot run in a handler: what was interrupted may be the interpreter itself. So the library registers vector 14 alone
(paging.py), and that of applications' system calls before the first one (user.py); any other exception, a division by zero in a
C module say, ends the domain: the hypervisor names the vector and the instruction as the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hypervisor.public.traps import TRAP_INFO, SetTrapTable

if TYPE_CHECKING:
    from domain.kernel import Kernel

USER_CODE_SELECTOR = 0x33  # Linux's, of x86-64: the ring that every kernel here runs in


def set_traps(kernel: Kernel, handlers: Mapping[int, int], flags: int = 0) -> None:
    """Register handlers: vector -> host address. `flags`: a DPL (with 1 or more `int $vector` enters them too), TI_MASK_EVENTS,
    TI_FAST. Raises Invalid."""
    entries = [TRAP_INFO.pack(vector, flags, USER_CODE_SELECTOR, address) for vector, address in handlers.items()]
    kernel.hypercall(SetTrapTable(kernel.memory.mmu.give(b"".join(entries) + bytes(TRAP_INFO.size))))


def forget_traps(kernel: Kernel) -> None:
    """All of them, that of page faults too. Applications that run go on; there are no new ones."""
    kernel.hypercall(SetTrapTable(0))
