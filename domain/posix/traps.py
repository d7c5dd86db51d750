"""What brings a program to the kernel besides a system call, and what follows from how one came."""

from __future__ import annotations

import signal
from array import array
from typing import TYPE_CHECKING

from domain.posix import registers as r
from domain.posix import signals
from domain.posix.accesses import ACCERR, BUSERR, OK
from domain.posix.errors import Errno
from domain.posix.signals import Info
from domain.posix.sites import Sites
from domain.posix.space import TIMEOUT, Space
from domain.posix.table import signed32
from domain.posix.windows import lend
from hypervisor.public.traps import PF_FETCH, PF_WRITE

if TYPE_CHECKING:
    from domain.posix.run import System
    from domain.posix.task import Task

EXCEPTIONS = {  # vector: signal, si_code (arch/x86/kernel/traps.c)
    0: (signal.SIGFPE, 1), 1: (signal.SIGTRAP, 2), 3: (signal.SIGTRAP, signals.SI_KERNEL), 6: (signal.SIGILL, 2),
    16: (signal.SIGFPE, 7), 17: (signal.SIGBUS, 1), 19: (signal.SIGFPE, 7),
}  # fmt: skip
INVALID_OPCODE, PAGE_FAULT = 6, 14


def came(sites: Sites, task: Task, space: Space) -> None:
    """A system call has come, and is not served yet: its instruction is one to patch, or its file one to lend."""
    if space.direct[0]:
        lend(task, signed32(space.arguments[0]))
    elif space.native:
        sites.prove(task.memory, task.registers[r.RIP], space.number)


def again(system: System, task: Task, back: int) -> None:
    """The system call that a program stands before, as if it had come by the instruction before `back`."""
    regs = task.registers
    regs[r.RIP] = regs[r.RCX] = back
    words = array("Q", [regs[i] for i in (r.RDI, r.RSI, r.RDX, r.R10, r.R8, r.R9)])
    system.syscall(task, regs[r.RAX] & 0xFFFF_FFFF, words)


def fault(system: System, task: Task, space: Space) -> None:
    """A page fault that the tables in force do not explain."""
    system.counters["faults"] += 1
    address, error, low = space.address, space.error, task.memory.low
    in_call = low is not None and low.place(task.registers)
    try:
        outcome = task.memory.fault(address, bool(error & PF_WRITE), bool(error & PF_FETCH))
    except Errno:
        out_of_memory(system, task)
        return
    if outcome == OK:
        return
    if in_call:  # whatever is wrong with its arguments is told as ever
        again(system, task, task.registers[r.RCX])
        return
    task.fault, task.fault_address = (error, PAGE_FAULT), address
    signo = signal.SIGBUS if outcome == BUSERR else signal.SIGSEGV
    code = 2 if outcome in (BUSERR, ACCERR) else 1
    signals.force(task, Info(int(signo), code, address.to_bytes(8, "little")))


def exception(system: System, task: Task, space: Space) -> None:
    if system.sites is not None and space.vector == INVALID_OPCODE and _patched(system, task):
        return
    if task.memory.low is not None:
        task.memory.low.place(task.registers)
    signo, code = EXCEPTIONS.get(space.vector, (signal.SIGSEGV, signals.SI_KERNEL))
    task.fault, task.fault_address = (space.error, space.vector), 0
    where = task.registers[r.RIP] if code != signals.SI_KERNEL else 0
    signals.force(task, Info(int(signo), code, where.to_bytes(8, "little")))


def _patched(system: System, task: Task) -> bool:
    """An invalid instruction that is one of ours: what the program had there is done."""
    assert system.sites is not None
    rip = task.registers[r.RIP]
    site = system.sites.of_hole(task.memory, rip)
    if site is None:
        return False
    if rip == site.syscall:
        again(system, task, site.back)
    else:
        task.registers[r.RIP] = site.back
    return True


def preempted(system: System, task: Task, kind: int) -> None:
    """Its turn is over, or somebody else is due."""
    if kind == TIMEOUT:
        system.counters["preemptions"] += 1
    if task.memory.low is not None:
        task.memory.low.place(task.registers)
    system.ready(task)


def out_of_memory(system: System, task: Task) -> None:
    process = task.process
    system.say(
        f"out of memory: killed {process.name.decode(errors='replace')}[{process.pid}],"
        f" {len(task.memory.pages)} pages; {system.frames.free} are free"
    )
    process.exit(int(signal.SIGKILL))
