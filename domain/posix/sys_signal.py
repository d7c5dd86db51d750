"""System calls on signals (kernel/signal.c)."""

from __future__ import annotations

import errno
import signal
import struct
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from domain.posix import registers as r
from domain.posix import signals
from domain.posix.errors import Errno, Interrupted
from domain.posix.signals import NEVER_BLOCKED, NSIG, Action, Info, Pending
from domain.posix.sys_process import by_pid
from domain.posix.table import signed32, syscall
from domain.posix.wait import Wait, WaitQueue

if TYPE_CHECKING:
    from domain.posix.task import Process, Task

SIGACTION = struct.Struct("<QQQQ")  # handler, flags, restorer, mask
SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK = range(3)


def _checked(signo: int, least: int = 1) -> int:
    signo = signed32(signo)
    if not least <= signo <= NSIG:
        raise Errno(errno.EINVAL)
    return signo


def _set_size(size: int) -> None:
    if size != 8:
        raise Errno(errno.EINVAL)


@syscall(13)
def sys_rt_sigaction(task: Task, signo: int, new: int, old: int, size: int) -> int:
    signo = _checked(signo)
    _set_size(size)
    action = task.process.actions[signo]
    wanted = SIGACTION.unpack(task.memory.copy_in(new, SIGACTION.size)) if new else None
    if wanted and signo in (signal.SIGKILL, signal.SIGSTOP):
        raise Errno(errno.EINVAL)
    if old:
        task.memory.copy_out(old, SIGACTION.pack(action.handler, action.flags, action.restorer, action.mask))
    if wanted:
        handler, flags, restorer, mask = wanted
        task.process.actions[signo] = Action(handler, flags, restorer, mask & ~NEVER_BLOCKED)
        if handler == signals.SIG_IGN or (handler == signals.SIG_DFL and signo in signals.HARMLESS):
            task.process.drop_pending({signo})
    return 0


@syscall(14)
def sys_rt_sigprocmask(task: Task, how: int, new: int, old: int, size: int) -> int:
    _set_size(size)
    before = task.blocked
    if new:
        mask = task.memory.word(new)
        if how == SIG_BLOCK:
            mask |= before
        elif how == SIG_UNBLOCK:
            mask = before & ~mask
        elif how != SIG_SETMASK:
            raise Errno(errno.EINVAL)
        task.blocked = mask & ~NEVER_BLOCKED
    if old:
        task.memory.copy_out(old, before.to_bytes(8, "little"))
    return 0


@syscall(15)
def sys_rt_sigreturn(task: Task) -> None:
    signals.sigreturn(task)


@syscall(127)
def sys_rt_sigpending(task: Task, address: int, size: int) -> int:
    _set_size(size)
    bits = (task.pending.bits | task.process.pending.bits) & task.blocked
    task.memory.copy_out(address, bits.to_bytes(8, "little"))
    return 0


def suspend(task: Task, mask: int) -> Generator[Wait, Any, int]:
    """Wait with another mask until a handler was entered."""
    task.saved_blocked, task.blocked = task.blocked, mask & ~NEVER_BLOCKED
    nothing = WaitQueue()
    try:
        while not task.signal_pending():
            yield nothing
    except Interrupted:
        pass
    raise Errno(errno.EINTR)


@syscall(130)
def sys_rt_sigsuspend(task: Task, address: int, size: int) -> Generator[Wait, Any, int]:
    _set_size(size)
    return suspend(task, task.memory.word(address))


@syscall(34)
def sys_pause(task: Task) -> Generator[Wait, Any, int]:
    nothing = WaitQueue()
    try:
        while True:
            yield nothing
    except Interrupted:
        raise Errno(errno.EINTR) from None


@syscall(128)
def sys_rt_sigtimedwait(task: Task, address: int, info: int, timeout: int, size: int) -> Generator[Wait, Any, int]:
    _set_size(size)
    wanted = task.memory.word(address) & ~NEVER_BLOCKED
    deadline = None
    if timeout:
        seconds, ns = struct.unpack("<qq", task.memory.copy_in(timeout, 16))
        deadline = task.system.now_ns() + seconds * 10**9 + ns
    while True:
        found = task.pending.take(wanted) or task.process.pending.take(wanted)
        if found:
            if info:
                task.memory.copy_out(info, found.pack())
            return found.signo
        if deadline is not None and task.system.now_ns() >= deadline:
            raise Errno(errno.EAGAIN)
        task.awaited = wanted
        try:
            yield (task.signal_arrived,) if deadline is None else (task.signal_arrived, deadline)
        except Interrupted:
            raise Errno(errno.EINTR) from None
        finally:
            task.awaited = 0


@syscall(131)
def sys_sigaltstack(task: Task, new: int, old: int) -> int:
    base, size = task.altstack
    inside = size and base < task.registers[r.RSP] <= base + size
    wanted = struct.unpack("<QiiQ", task.memory.copy_in(new, 24)) if new else None
    if old:
        flags = signals.SS_DISABLE if not size else signals.SS_ONSTACK if inside else 0
        task.memory.copy_out(old, struct.pack("<QiiQ", base, flags, 0, size))
    if wanted:
        if inside:
            raise Errno(errno.EPERM)
        if wanted[1] & signals.SS_DISABLE:
            task.altstack = (0, 0)
        elif wanted[3] < signals.MINSIGSTKSZ:
            raise Errno(errno.ENOMEM)
        else:
            task.altstack = wanted[0], wanted[3]
    return 0


def _to(process: Process, task: Task, signo: int) -> None:
    if signo:
        signals.send(process, signals.user(task, signo))


@syscall(62)
def sys_kill(task: Task, pid: int, signo: int) -> int:
    signo, number = _checked(signo, 0), signed32(pid)
    chosen = by_pid(task, number)
    targets = [process for process in list(task.system.processes.values()) if chosen(process)]
    if number == -1:
        targets = [process for process in targets if process.pid != 1 and process is not task.process]
    if not targets:
        raise Errno(errno.ESRCH)
    for process in targets:
        _to(process, task, signo)
    return 0


def _thread(task: Task, group: int | None, tid: int) -> Task:
    found = task.system.tasks.get(signed32(tid))
    if found is None or (group is not None and found.process.pid != signed32(group)):
        raise Errno(errno.ESRCH)
    return found


@syscall(200)
def sys_tkill(task: Task, tid: int, signo: int) -> int:
    return _kill_thread(task, _thread(task, None, tid), signo)


@syscall(234)
def sys_tgkill(task: Task, group: int, tid: int, signo: int) -> int:
    return _kill_thread(task, _thread(task, group, tid), signo)


def _kill_thread(task: Task, target: Task, signo: int) -> int:
    signo = _checked(signo, 0)
    if signo:
        signals.send(target.process, signals.user(task, signo, signals.SI_TKILL), target)
    return 0


@syscall(129)
def sys_rt_sigqueueinfo(task: Task, pid: int, signo: int, address: int) -> int:
    signo = _checked(signo, 0)
    process = task.system.processes.get(signed32(pid))
    if process is None:
        raise Errno(errno.ESRCH)
    raw = task.memory.copy_in(address, 128)
    code = int.from_bytes(raw[8:12], "little", signed=True)
    if code >= 0 and process is not task.process:
        raise Errno(errno.EPERM)
    if signo:
        signals.send(process, Info(signo, code, raw[16:]))
    return 0


__all__ = ["Pending", "suspend"]
