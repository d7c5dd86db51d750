"""Signals: who gets one, what it does, and the frame that a program's handler sees, laid out as Linux does.

A signal whose default ends or stops the process acts where it is sent: on one virtual CPU everybody else is at rest, so nobody
has to be interrupted for it. Only one that has a handler waits, pending, until its task goes back to its program.
Source: kernel/signal.c, arch/x86/kernel/signal_64.c.
"""

from __future__ import annotations

import signal
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from domain.posix import registers as r
from domain.posix.errors import Errno

if TYPE_CHECKING:
    from domain.posix.task import Process, Task

SIG_DFL, SIG_IGN = 0, 1
NSIG = 64
SA_NOCLDSTOP, SA_NOCLDWAIT, SA_SIGINFO, SA_RESTORER = 1, 2, 4, 0x0400_0000
SA_ONSTACK, SA_RESTART, SA_NODEFER, SA_RESETHAND = 0x0800_0000, 0x1000_0000, 0x4000_0000, 0x8000_0000
SI_USER, SI_KERNEL, SI_TKILL, SI_TIMER = 0, 0x80, -6, -2
CLD_EXITED, CLD_KILLED, CLD_DUMPED, CLD_TRAPPED, CLD_STOPPED, CLD_CONTINUED = range(1, 7)
SS_ONSTACK, SS_DISABLE, MINSIGSTKSZ = 1, 2, 2048
STOPS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
HARMLESS = frozenset({signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT})
FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS})
NEVER_BLOCKED = 1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1

SIGINFO_BYTES, REDZONE = 128, 128
# flags link, stack, registers, cs gs fs ss, err trapno oldmask cr2, fpstate and 8 reserved, mask
UCONTEXT = struct.Struct("<QQ QiiQ 18Q 4H 4Q 9Q Q")
assert UCONTEXT.size == 304
FRAME_BYTES = 8 + 304 + SIGINFO_BYTES
UC_FLAGS = 1 | 2 | 4  # FP_XSTATE, SIGCONTEXT_SS, STRICT_RESTORE_SS
GREGS = (
    r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15, r.RDI, r.RSI, r.RBP, r.RBX, r.RDX, r.RAX, r.RCX, r.RSP, r.RIP,
    r.EFLAGS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Info:
    """siginfo: number, code, and the union that follows as bytes at offset 16."""

    signo: int
    code: int = SI_KERNEL
    rest: bytes = b""

    def pack(self) -> bytes:
        return struct.pack("<iiii", self.signo, 0, self.code, 0) + self.rest.ljust(SIGINFO_BYTES - 16, b"\0")


@dataclass(slots=True, frozen=True)
class Action:
    handler: int = SIG_DFL
    flags: int = 0
    restorer: int = 0
    mask: int = 0


@dataclass(slots=True)
class Pending:
    """What waits to be delivered, a standard signal once, a real-time one as often as it was sent."""

    infos: list[Info] = field(default_factory=list)
    bits: int = 0

    def add(self, info: Info) -> None:
        bit = 1 << info.signo - 1
        if info.signo >= 32 or not self.bits & bit:
            self.infos.append(info)
            self.bits |= bit

    def take(self, allowed: int) -> Info | None:
        """The first that may be delivered: faults, then the lowest number."""
        ready = self.bits & allowed
        if not ready:
            return None
        chosen = min((i for i in self.infos if ready >> i.signo - 1 & 1), key=lambda i: (i.signo not in FAULTS, i.signo))
        self.infos.remove(chosen)
        if not any(i.signo == chosen.signo for i in self.infos):
            self.bits &= ~(1 << chosen.signo - 1)
        return chosen

    def drop(self, signals: frozenset[int] | set[int]) -> None:
        self.infos = [i for i in self.infos if i.signo not in signals]
        for signo in signals:
            self.bits &= ~(1 << signo - 1)


def user(task: Task, signo: int, code: int = SI_USER) -> Info:
    """Sent by a program: its pid, and uid 0."""
    return Info(signo, code, struct.pack("<iI", task.process.pid, 0))


def send(process: Process, info: Info, to: Task | None = None) -> None:
    """To a process, or to one thread of it. It has acted, or is pending, on return."""
    signo = info.signo
    if process.exit_status is not None or not process.tasks:
        return
    if signo == signal.SIGCONT:
        process.resume()
        process.drop_pending(STOPS)
    elif signo in STOPS:
        process.drop_pending({int(signal.SIGCONT)})
    action = process.actions[signo]
    bit = 1 << signo - 1
    takers = [to] if to is not None else process.tasks
    taker = next((task for task in takers if not task.blocked & bit), None)
    waiting = next((task for task in takers if task.awaited & bit), None)
    acts = signo in (signal.SIGKILL, signal.SIGSTOP) or (taker is not None and waiting is None and action.handler == SIG_DFL)
    if acts and default(process, signo):
        return
    if waiting is None and taker is not None and (
        action.handler == SIG_IGN or (action.handler == SIG_DFL and signo in HARMLESS)
    ):  # fmt: skip
        return
    if to is None and taker is not None and waiting is None and taker.waiting():
        to = taker  # whose wait ends for it: another thread that took it first would leave that a wait without a reason
    (to.pending if to is not None else process.pending).add(info)
    if waiting is not None:
        waiting.signal_arrived.wake()
    elif taker is not None:
        taker.interrupt()


def default(process: Process, signo: int) -> bool:
    """What a signal does that has no handler; False: nothing."""
    if process.pid == 1 and signo not in FAULTS and signo != signal.SIGKILL and not process.system.init_is_mortal:
        return True  # as on Linux: init is spared what it did not ask for
    if signo in STOPS:
        process.stop(signo)
    elif signo in HARMLESS:
        return False
    else:
        process.exit(signo)  # never with a core: no file is written
    return True


def force(task: Task, info: Info) -> None:
    """A fault of the program's own: it cannot be blocked or ignored (force_sig_info)."""
    action, bit = task.process.actions[info.signo], 1 << info.signo - 1
    if task.blocked & bit or action.handler == SIG_IGN:
        action = task.process.actions[info.signo] = replace(action, handler=SIG_DFL)
    task.blocked &= ~bit
    if action.handler == SIG_DFL:
        task.process.exit(info.signo)
    else:
        task.pending.add(info)


def deliver(task: Task) -> None:
    """Enter the handlers of what is pending, the last one first to run; then what an interrupted call comes to.

    A task that ends by it is dead on return.
    """
    process = task.process
    while True:
        allowed = ~task.blocked
        info = task.pending.take(allowed) or process.pending.take(allowed)
        if info is None:
            break
        action = process.actions[info.signo]
        if action.handler == SIG_DFL:
            default(process, info.signo)
            if task.dead or process.stopped:
                return
        elif action.handler != SIG_IGN:
            task.end_interrupted(restart=bool(action.flags & SA_RESTART))
            _enter(task, action, info)
            if task.dead:
                return
    task.end_interrupted(restart=True)
    if task.saved_blocked is not None:  # sigsuspend or ppoll ended without a handler
        task.blocked, task.saved_blocked = task.saved_blocked, None


def _enter(task: Task, action: Action, info: Info) -> None:
    """Lay the frame and go to the handler. No stack to lay it on is SIGSEGV, by default action."""
    regs, memory = task.registers, task.memory
    if memory.low is not None:
        memory.low.place(regs)
    top = regs[r.RSP] - REDZONE
    base, size = task.altstack
    if action.flags & SA_ONSTACK and size and not base < regs[r.RSP] <= base + size:
        top = base + size
    fpu = task.fpu_state()
    fpstate = top - len(fpu) & -64 if fpu else 0
    at = ((fpstate or top) - FRAME_BYTES & -16) - 8
    mask = task.blocked if task.saved_blocked is None else task.saved_blocked
    task.saved_blocked = None
    on_stack = SS_DISABLE if not size else SS_ONSTACK if base < regs[r.RSP] <= base + size else 0
    context = UCONTEXT.pack(
        UC_FLAGS, 0, base, on_stack, 0, size, *(regs[i] for i in GREGS), r.USER_CS, 0, 0, r.USER_SS,
        *task.fault, mask, task.fault_address, fpstate, *(0,) * 8, mask,
    )  # fmt: skip
    try:
        memory.copy_out(fpstate, fpu) if fpu else None
        memory.copy_out(at, action.restorer.to_bytes(8, "little") + context + info.pack())
    except Errno:
        task.process.exit(int(signal.SIGSEGV))
        return
    if not action.flags & SA_NODEFER:
        task.blocked |= 1 << info.signo - 1
    task.blocked = (task.blocked | action.mask) & ~NEVER_BLOCKED
    regs[r.RDI], regs[r.RSI], regs[r.RDX], regs[r.RAX] = info.signo, at + 8 + 304, at + 8, 0
    regs[r.RIP], regs[r.RSP] = action.handler, at
    regs[r.EFLAGS] = regs[r.EFLAGS] & ~(r.FLAG_DF | r.FLAG_RF | r.FLAG_TF)
    if action.flags & SA_RESETHAND:
        task.process.actions[info.signo] = replace(action, handler=SIG_DFL)


def sigreturn(task: Task) -> None:
    """Back to what a handler interrupted. The frame is the program's: only what it may set is taken from it."""
    regs, memory = task.registers, task.memory
    try:
        words = UCONTEXT.unpack(memory.copy_in(regs[r.RSP], UCONTEXT.size))
        fpstate = words[32]
        fpu = memory.copy_in(fpstate, len(task.fpu_state())) if fpstate else b""
    except Errno:
        force(task, Info(signal.SIGSEGV, SI_KERNEL))
        return
    flags = regs[r.EFLAGS]
    for register, word in zip(GREGS, words[6:24], strict=True):
        regs[register] = word
    regs[r.EFLAGS] = flags & ~r.USER_FLAGS | regs[r.EFLAGS] & r.USER_FLAGS | r.FLAG_IF
    regs[r.CS], regs[r.SS] = r.USER_CS, r.USER_SS
    if fpu:
        task.set_fpu_state(fpu)
    task.blocked = words[41] & ~NEVER_BLOCKED
