"""System calls on processes and threads (kernel/fork.c, kernel/exit.c, kernel/sys.c)."""

from __future__ import annotations

import errno
import signal
import struct
from collections.abc import Callable, Generator
from typing import Any

from domain.posix import exec as program
from domain.posix import registers as r
from domain.posix.errors import Errno
from domain.posix.signals import NSIG, Info
from domain.posix.table import signed32, syscall
from domain.posix.task import Process, Task
from domain.posix.wait import Wait

CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800
CLONE_VFORK, CLONE_PARENT, CLONE_THREAD, CLONE_SETTLS = 0x4000, 0x8000, 0x1_0000, 0x8_0000
CLONE_PARENT_SETTID, CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID = 0x10_0000, 0x20_0000, 0x100_0000
CLONE_NEW = 0x7E02_0000  # namespaces
CLONE_ARGS_V0 = 64
WNOHANG, WUNTRACED, WEXITED, WCONTINUED, WNOWAIT = 1, 2, 4, 8, 0x0100_0000
P_ALL, P_PID, P_PGID = 0, 1, 2
MAX_PROCESSES = 1024
Result = int | Generator[Wait, Any, int]
STRINGS = 1 << 20  # bytes of arguments and environment


def clone(task: Task, flags: int, stack: int, parent_tid: int, child_tid: int, tls: int, exit_signal: int) -> Result:
    """A new thread, or a new process. Raises Errno(EINVAL, EAGAIN, ENOMEM)."""
    if (flags & CLONE_THREAD and not flags & CLONE_SIGHAND) or (flags & CLONE_SIGHAND and not flags & CLONE_VM):
        raise Errno(errno.EINVAL)
    if exit_signal > NSIG:
        raise Errno(errno.EINVAL)
    if flags & CLONE_NEW:
        raise Errno(errno.EPERM)
    system = task.system
    if len(system.tasks) >= MAX_PROCESSES:
        raise Errno(errno.EAGAIN)
    memory = task.memory
    if flags & CLONE_VM:
        memory.users += 1
        if memory.low is not None and not flags & CLONE_FILES:
            memory.low.take_back()
    else:
        memory = system.fork_memory(memory)
    process = task.process if flags & CLONE_THREAD else _child(task, flags, exit_signal)
    files = task.files.share() if flags & CLONE_FILES else task.files.fork()
    child = Task(process, memory, files, task.fs if flags & CLONE_FS else task.fs.fork())
    child.registers = list(task.registers)
    child.fpu = task.fpu_state()
    child.registers[r.RAX] = 0
    if stack:
        child.registers[r.RSP] = stack
    if flags & CLONE_SETTLS:
        child.registers[r.FS_BASE] = tls
    child.blocked = task.blocked
    child.altstack = (0, 0) if flags & CLONE_VM and not flags & CLONE_VFORK else task.altstack
    number = child.tid.to_bytes(4, "little")
    if flags & CLONE_PARENT_SETTID:
        task.memory.copy_out(parent_tid, number)
    if flags & CLONE_CHILD_SETTID:
        child.memory.copy_out(child_tid, number)
    if flags & CLONE_CHILD_CLEARTID:
        child.clear_tid = child_tid
    system.ready(child)
    return _vfork(process, child.tid) if flags & CLONE_VFORK else child.tid


def _child(task: Task, flags: int, exit_signal: int) -> Process:
    parent = task.process.parent if flags & CLONE_PARENT and task.process.parent else task.process
    process = Process(task.system, parent)
    own = task.process
    process.name, process.executable, process.terminal = own.name, own.executable, own.terminal
    process.pgid, process.sid, process.exit_signal = own.pgid, own.sid, exit_signal
    if flags & CLONE_SIGHAND:
        process.actions = own.actions
    else:
        process.actions = list(own.actions)
    return process


def _vfork(child: Process, tid: int) -> Generator[Wait, Any, int]:
    """Until the child has a program of its own, or has ended."""
    while child.exit_status is None and not child.has_execed:
        yield child.vfork_done
    return tid


@syscall(56, "partial", "no namespaces, no ptrace, no pidfd")
def sys_clone(task: Task, flags: int, stack: int, parent_tid: int, child_tid: int, tls: int) -> Result:
    return clone(task, flags & ~0xFF, stack, parent_tid, child_tid, tls, flags & 0xFF)


@syscall(57)
def sys_fork(task: Task) -> Result:
    return clone(task, 0, 0, 0, 0, 0, int(signal.SIGCHLD))


@syscall(58)
def sys_vfork(task: Task) -> Result:
    return clone(task, CLONE_VFORK | CLONE_VM, 0, 0, 0, 0, int(signal.SIGCHLD))


@syscall(435, "partial", "as clone; no set_tid, no cgroup")
def sys_clone3(task: Task, arguments: int, size: int) -> Result:
    if size < CLONE_ARGS_V0:
        raise Errno(errno.EINVAL)
    words = struct.unpack("<8Q", task.memory.copy_in(arguments, CLONE_ARGS_V0))
    flags, _, child_tid, parent_tid, exit_signal, stack, stack_size, tls = words
    if bool(stack) != bool(stack_size):
        raise Errno(errno.EINVAL)
    return clone(task, flags, stack + stack_size, parent_tid, child_tid, tls, exit_signal)


@syscall(59)
def sys_execve(task: Task, path: int, arguments: int, environment: int) -> int | None:
    name = task.memory.string(path)
    argv, envp = _strings(task, arguments), _strings(task, environment)
    task.process.has_execed = False
    try:
        program.execve(task, name, argv or [b""], envp)
    except Errno as error:
        if not task.memory.areas:  # the old program is gone
            task.system.say(f"{name.decode(errors='replace')}[{task.process.pid}]: cannot be loaded: {error}")
            task.process.exit(int(signal.SIGKILL))
            return None
        raise
    task.process.vfork_done.wake()
    return None


def _strings(task: Task, address: int) -> list[bytes]:
    """A null-terminated array of strings. Raises Errno(EFAULT, E2BIG)."""
    found: list[bytes] = []
    left = STRINGS
    while address and (pointer := task.memory.word(address + 8 * len(found))):
        found.append(task.memory.string(pointer, 1 << 17))
        left -= len(found[-1]) + 9
        if left < 0:
            raise Errno(errno.E2BIG)
    return found


@syscall(60)
def sys_exit(task: Task, code: int) -> None:
    task.exit(code)


@syscall(231)
def sys_exit_group(task: Task, code: int) -> None:
    task.process.exit((code & 0xFF) << 8)


# ---- waiting for children


def wait_child(
    task: Task, chosen: Callable[[Process], bool], options: int, found: Callable[[Process, int], int], ended: bool = True
) -> Generator[Wait, Any, int]:
    """Until a child that is `chosen` has news; what `found(child, status)` says of it. Raises Errno(ECHILD)."""
    process = task.process
    while True:
        candidates = [child for child in process.children if chosen(child)]
        if not candidates:
            raise Errno(errno.ECHILD)
        for child in candidates:
            status = _news(child, options, ended)
            if status >= 0:
                result = found(child, status)
                if not options & WNOWAIT:
                    _take(child)
                return result
        if options & WNOHANG:
            return 0
        yield process.child_events


def _news(child: Process, options: int, ended: bool) -> int:
    if child.exit_status is not None:
        return child.exit_status if ended else -1
    if child.stop_news and options & WUNTRACED:
        return child.stopped << 8 | 0x7F
    if child.continue_news and options & WCONTINUED:
        return 0xFFFF
    return -1


def _take(child: Process) -> None:
    if child.exit_status is not None:
        child.reap()
    elif child.stop_news and child.stopped:
        child.stop_news = False
    else:
        child.continue_news = False


def by_pid(task: Task, pid: int) -> Callable[[Process], bool]:
    """Whom wait4 and kill mean by a number."""
    if pid > 0:
        return lambda child: child.pid == pid
    group = -pid if pid < -1 else task.process.pgid
    return (lambda child: True) if pid == -1 else (lambda child: child.pgid == group)


@syscall(61)
def sys_wait4(task: Task, pid: int, status: int, options: int, usage: int) -> Result:
    if options & ~(WNOHANG | WUNTRACED | WCONTINUED | 0xE000_0000):
        raise Errno(errno.EINVAL)

    def found(child: Process, word: int) -> int:
        if status:
            task.memory.copy_out(status, word.to_bytes(4, "little"))
        if usage:
            task.memory.copy_out(usage, rusage(child.cpu_ns + child.children_cpu_ns))
        return child.pid

    return wait_child(task, by_pid(task, signed32(pid)), options, found)


@syscall(247)
def sys_waitid(task: Task, kind: int, which: int, info: int, options: int, usage: int) -> Result:
    if not options & (WEXITED | WUNTRACED | WCONTINUED) or kind not in (P_ALL, P_PID, P_PGID):
        raise Errno(errno.EINVAL)

    def chosen(child: Process) -> bool:
        return kind == P_ALL or (child.pid if kind == P_PID else child.pgid) == which

    def found(child: Process, word: int) -> int:
        if info:
            if word == 0xFFFF:
                code, value = 6, int(signal.SIGCONT)
            elif word & 0xFF == 0x7F:
                code, value = 5, word >> 8
            else:
                code, value = (1, word >> 8) if not word & 0x7F else (3 if word & 0x80 else 2, word & 0x7F)
            task.memory.copy_out(info, Info(int(signal.SIGCHLD), code, struct.pack("<iIi", child.pid, 0, value)).pack())
        if usage:
            task.memory.copy_out(usage, rusage(child.cpu_ns))
        return 0

    if options & WNOHANG and info:
        task.memory.copy_out(info, bytes(128))
    return wait_child(task, chosen, options, found, bool(options & WEXITED))


def rusage(cpu_ns: int, pages: int = 0, faults: int = 0) -> bytes:
    """struct rusage: user time, resident KiB, faults; the rest is not counted."""
    times = struct.pack("<qqqqq", cpu_ns // 10**9, cpu_ns % 10**9 // 1000, 0, 0, pages * 4)
    return (times + struct.pack("<24xq", faults)).ljust(144, b"\0")


# ---- numbers


@syscall(39)
def sys_getpid(task: Task) -> int:
    return task.process.pid


@syscall(186)
def sys_gettid(task: Task) -> int:
    return task.tid


@syscall(110)
def sys_getppid(task: Task) -> int:
    return task.process.ppid


def _find(task: Task, pid: int) -> Process:
    pid = signed32(pid)
    process = task.process if not pid else task.system.processes.get(pid)
    if process is None:
        raise Errno(errno.ESRCH)
    return process


@syscall(109)
def sys_setpgid(task: Task, pid: int, pgid: int) -> int:
    process, group = _find(task, pid), signed32(pgid)
    if group < 0:
        raise Errno(errno.EINVAL)
    if process is not task.process and process.parent is not task.process:
        raise Errno(errno.ESRCH)
    if process is not task.process and process.has_execed:
        raise Errno(errno.EACCES)
    group = group or process.pid
    members = [other for other in task.system.processes.values() if other.pgid == group]
    if process.sid == process.pid or process.sid != task.process.sid:
        raise Errno(errno.EPERM)
    if group != process.pid and not any(other.sid == process.sid for other in members):
        raise Errno(errno.EPERM)
    process.pgid = group
    return 0


@syscall(111)
def sys_getpgrp(task: Task) -> int:
    return task.process.pgid


@syscall(121)
def sys_getpgid(task: Task, pid: int) -> int:
    return _find(task, pid).pgid


@syscall(112)
def sys_setsid(task: Task) -> int:
    process = task.process
    if any(other.pgid == process.pid for other in task.system.processes.values()):
        raise Errno(errno.EPERM)
    process.sid = process.pgid = process.pid
    process.terminal = None
    return process.pid


@syscall(124)
def sys_getsid(task: Task, pid: int) -> int:
    return _find(task, pid).sid


@syscall(218)
def sys_set_tid_address(task: Task, address: int) -> int:
    task.clear_tid = address
    return task.tid


@syscall(158)
def sys_arch_prctl(task: Task, code: int, address: int) -> int:
    if code in (0x1002, 0x1001):
        if address >= 1 << 47:
            raise Errno(errno.EPERM)
        task.registers[r.FS_BASE if code == 0x1002 else r.GS_BASE] = address
    elif code in (0x1003, 0x1004):
        task.memory.copy_out(address, task.registers[r.FS_BASE if code == 0x1003 else r.GS_BASE].to_bytes(8, "little"))
    else:
        raise Errno(errno.EINVAL)
    return 0
