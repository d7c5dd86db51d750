"""The system call on futexes, and the list of those that a thread may die with (kernel/futex/)."""

from __future__ import annotations

import errno
import operator
import struct
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.futex import ALL
from domain.posix.sys_process import Result
from domain.posix.table import signed32, syscall

if TYPE_CHECKING:
    from domain.posix.task import Task

WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, LOCK_PI, UNLOCK_PI, TRYLOCK_PI = 0, 1, 3, 4, 5, 6, 7, 8
WAIT_BITSET, WAKE_BITSET, LOCK_PI2, REALTIME = 9, 10, 13, 0x100
CHANGES = [lambda old, arg: arg, operator.add, operator.or_, lambda old, arg: old & ~arg, operator.xor]
TESTS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


def when(task: Task, command: int, operation: int, timeout: int) -> int | None:
    """The deadline in system time. WAIT's is relative, the others' by the monotonic clock or by the wall's."""
    if not timeout:
        return None
    seconds, ns = struct.unpack("<qq", task.memory.copy_in(timeout, 16))
    if seconds < 0 or not 0 <= ns < 10**9:
        raise Errno(errno.EINVAL)
    deadline: int = seconds * 10**9 + ns
    if command == WAIT:
        return deadline + task.system.now_ns()
    if operation & REALTIME or command == LOCK_PI:
        return deadline - task.system.wall_ns() + task.system.now_ns()
    return deadline


@syscall(202, "partial", "priority inheritance without priorities: there are none; no FUTEX_WAIT_REQUEUE_PI")
def sys_futex(task: Task, address: int, operation: int, value: int, timeout: int, address2: int, value3: int) -> Result:
    futexes, memory, command = task.system.futexes, task.memory, operation & 0x7F
    if command in (WAIT, WAIT_BITSET):
        deadline = when(task, command, operation, timeout)
        return futexes.wait(memory, address, value, deadline, value3 & ALL if command == WAIT_BITSET else ALL)
    if command in (WAKE, WAKE_BITSET):
        memory.word(address, 4)
        return futexes.wake(memory, address, max(1, signed32(value)), value3 & ALL if command == WAKE_BITSET else ALL)
    if command in (REQUEUE, CMP_REQUEUE):  # timeout is the second count
        if command == CMP_REQUEUE and memory.word(address, 4) != value3 & ALL:
            raise Errno(errno.EAGAIN)
        return futexes.requeue(memory, address, signed32(value), address2, signed32(timeout))
    if command == WAKE_OP:
        return wake_op(task, address, signed32(value), signed32(timeout), address2, value3)
    if command in (LOCK_PI, LOCK_PI2):
        deadline = when(task, command, operation, timeout)
        return futexes.lock(memory, address, task.tid, task.system.tasks.__contains__, deadline)
    if command == TRYLOCK_PI:
        if not futexes.try_lock(memory, address, task.tid, task.system.tasks.__contains__):
            raise Errno(errno.EAGAIN)
        return 0
    if command == UNLOCK_PI:
        futexes.unlock(memory, address, task.tid)
        return 0
    raise Errno(errno.ENOSYS)


def wake_op(task: Task, address: int, count: int, count2: int, address2: int, code: int) -> int:
    """Change the second word as `code` says, wake on the first, and on the second where its old value passes the test."""
    change, test = code >> 28 & 7, code >> 24 & 0xF
    argument, limit = ((part ^ 0x800) - 0x800 for part in (code >> 12 & 0xFFF, code & 0xFFF))
    if code >> 31 & 1:
        argument = 1 << (argument & 31)
    if change >= len(CHANGES) or test >= len(TESTS):
        raise Errno(errno.ENOSYS)
    old = signed32(task.memory.word(address2, 4))
    task.memory.copy_out(address2, (CHANGES[change](old, argument) & ALL).to_bytes(4, "little"))
    woken = task.system.futexes.wake(task.memory, address, max(1, count))
    return woken + (task.system.futexes.wake(task.memory, address2, max(1, count2)) if TESTS[test](old, limit) else 0)


@syscall(273)
def sys_set_robust_list(task: Task, head: int, size: int) -> int:
    if size != 24:
        raise Errno(errno.EINVAL)
    task.robust_list = head
    return 0


@syscall(274)
def sys_get_robust_list(task: Task, tid: int, head: int, size: int) -> int:
    other = task.system.tasks.get(signed32(tid)) if signed32(tid) else task
    if other is None:
        raise Errno(errno.ESRCH)
    task.memory.copy_out(size, (24).to_bytes(8, "little"))
    task.memory.copy_out(head, other.robust_list.to_bytes(8, "little"))
    return 0
