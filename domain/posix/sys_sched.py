"""System calls on the scheduler (kernel/sched/). One virtual CPU, and every task has its turn: priorities are kept and told."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.table import signed32, syscall

if TYPE_CHECKING:
    from domain.posix.task import Process, Task

SCHED_OTHER, SCHED_FIFO, SCHED_RR, SCHED_BATCH, SCHED_IDLE, SCHED_RESET_ON_FORK = 0, 1, 2, 3, 5, 0x4000_0000
PRIO_PROCESS, PRIO_PGRP, PRIO_USER = range(3)
NONE = "every task has the same turns"


def find(task: Task, tid: int) -> Task:
    """The thread of that number, 0: the caller. Raises Errno(EINVAL, ESRCH)."""
    tid = signed32(tid)
    if tid < 0:
        raise Errno(errno.EINVAL)
    other = task.system.tasks.get(tid) if tid else task
    if other is None:
        raise Errno(errno.ESRCH)
    return other


@syscall(24)
def sys_sched_yield(task: Task) -> int:
    task.system.yielding = True
    return 0


def of_thread(task: Task, tid: int) -> Task:
    if signed32(tid) < 0:
        raise Errno(errno.ESRCH)
    return find(task, tid)


@syscall(203, "none", "there is one virtual CPU")
def sys_sched_setaffinity(task: Task, tid: int, size: int, address: int) -> int:
    of_thread(task, tid)
    if not int.from_bytes(task.memory.copy_in(address, min(size, 128)), "little") & 1:
        raise Errno(errno.EINVAL)
    return 0


@syscall(204)
def sys_sched_getaffinity(task: Task, tid: int, size: int, address: int) -> int:
    of_thread(task, tid)
    if size < 8 or size % 8:
        raise Errno(errno.EINVAL)
    task.memory.copy_out(address, (1).to_bytes(8, "little"))
    return 8


# ---- nice values


def chosen(task: Task, which: int, who: int) -> list[Process]:
    which, who = signed32(which), signed32(who)
    if which not in (PRIO_PROCESS, PRIO_PGRP, PRIO_USER):
        raise Errno(errno.EINVAL)
    if which == PRIO_PROCESS:
        return [find(task, who).process] if who >= 0 else []
    group = who or task.process.pgid
    living = [each for each in task.system.processes.values() if each.exit_status is None]
    found = [each for each in living if each.uid == who] if which == PRIO_USER else [e for e in living if e.pgid == group]
    if not found:
        raise Errno(errno.ESRCH)
    return found


@syscall(140, "none", NONE + "; what setpriority set is told")
def sys_getpriority(task: Task, which: int, who: int) -> int:
    found = chosen(task, which, who)
    if not found:
        raise Errno(errno.ESRCH)
    return 20 - min(process.nice for process in found)


@syscall(141, "none", NONE + "; what is set is told")
def sys_setpriority(task: Task, which: int, who: int, value: int) -> int:
    found = chosen(task, which, who)
    if not found:
        raise Errno(errno.ESRCH)
    for process in found:
        process.nice = max(-20, min(19, signed32(value)))
    return 0


# ---- policies


@syscall(145, "none", NONE)
def sys_sched_getscheduler(task: Task, tid: int) -> int:
    find(task, tid)
    return SCHED_OTHER


@syscall(144, "none", NONE + ": SCHED_OTHER, SCHED_BATCH and SCHED_IDLE are accepted, a real-time policy is EPERM")
def sys_sched_setscheduler(task: Task, tid: int, policy: int, parameter: int) -> int:
    find(task, tid)
    policy = signed32(policy) & ~SCHED_RESET_ON_FORK
    priority = int.from_bytes(task.memory.copy_in(parameter, 4), "little", signed=True)
    if policy not in (SCHED_OTHER, SCHED_FIFO, SCHED_RR, SCHED_BATCH, SCHED_IDLE):
        raise Errno(errno.EINVAL)
    if priority not in (range(1, 100) if policy in (SCHED_FIFO, SCHED_RR) else range(1)):
        raise Errno(errno.EINVAL)
    if policy in (SCHED_FIFO, SCHED_RR):
        raise Errno(errno.EPERM)
    return 0


@syscall(143, "none", NONE)
def sys_sched_getparam(task: Task, tid: int, parameter: int) -> int:
    find(task, tid)
    task.memory.copy_out(parameter, bytes(4))
    return 0


@syscall(142, "none", NONE)
def sys_sched_setparam(task: Task, tid: int, parameter: int) -> int:
    return sys_sched_setscheduler(task, tid, SCHED_OTHER, parameter)


@syscall(146)
def sys_sched_get_priority_max(task: Task, policy: int) -> int:
    return priorities(policy)[1]


@syscall(147)
def sys_sched_get_priority_min(task: Task, policy: int) -> int:
    return priorities(policy)[0]


def priorities(policy: int) -> tuple[int, int]:
    policy = signed32(policy)
    if policy not in (SCHED_OTHER, SCHED_FIFO, SCHED_RR, SCHED_BATCH, SCHED_IDLE):
        raise Errno(errno.EINVAL)
    return (1, 99) if policy in (SCHED_FIFO, SCHED_RR) else (0, 0)


@syscall(252, "none", "there are no disks to have priorities at")
def sys_ioprio_get(task: Task, which: int, who: int) -> int:
    chosen(task, signed32(which) - 1 & (1 << 64) - 1, who)
    return 0


@syscall(251, "none", "there are no disks to have priorities at")
def sys_ioprio_set(task: Task, which: int, who: int, value: int) -> int:
    chosen(task, signed32(which) - 1 & (1 << 64) - 1, who)
    return 0
