"""System calls on identity, limits and the machine (kernel/sys.c)."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.limits import NR_LIMITS, RLIMIT_NOFILE, limit
from domain.posix.signals import NSIG
from domain.posix.sys_process import rusage
from domain.posix.table import signed32, syscall
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.posix.task import Task

RELEASE = b"6.1.0-ring1"
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_NAME, PR_GET_NAME = 1, 2, 3, 4, 15, 16
PR_CAPBSET_READ, PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS = 23, 29, 38
LAST_CAPABILITY = 40
MAX_GROUPS = 65_536
RANDOM_MOST = 1 << 25


@syscall(63)
def sys_uname(task: Task, address: int) -> int:
    fields = (b"Linux", task.system.hostname, RELEASE, b"#1 ring1", b"x86_64", b"(none)")
    task.memory.copy_out(address, b"".join(field[:64].ljust(65, b"\0") for field in fields))
    return 0


@syscall(170)
def sys_sethostname(task: Task, address: int, size: int) -> int:
    if size > 64:
        raise Errno(errno.EINVAL)
    task.system.hostname = task.memory.copy_in(address, size)
    return 0


@syscall(102)
def sys_getuid(task: Task) -> int:
    return task.process.uid


@syscall(104)
def sys_getgid(task: Task) -> int:
    return task.process.gid


@syscall(107)
def sys_geteuid(task: Task) -> int:
    return task.process.uid


@syscall(108)
def sys_getegid(task: Task) -> int:
    return task.process.gid


@syscall(115)
def sys_getgroups(task: Task, size: int, address: int) -> int:
    groups, size = task.process.groups, signed32(size)
    if size < 0 or 0 < size < len(groups):
        raise Errno(errno.EINVAL)
    if size:
        task.memory.copy_out(address, struct.pack(f"<{len(groups)}I", *groups))
    return len(groups)


def _root_only(number: int) -> int:
    if signed32(number) not in (0, -1):
        raise Errno(errno.EPERM)
    return 0


@syscall(105, "partial", "uid 0 only: there are no other users")
def sys_setuid(task: Task, uid: int) -> int:
    return _root_only(uid)


@syscall(106, "partial", "gid 0 only")
def sys_setgid(task: Task, gid: int) -> int:
    return _root_only(gid)


NO_OTHERS = "0 or -1 only: there are no other users"


def _root_or_same(*numbers: int) -> int:
    for number in numbers:
        if number & 0xFFFF_FFFF != 0xFFFF_FFFF:
            _root_only(number)
    return 0


@syscall(113, "partial", NO_OTHERS)
def sys_setreuid(task: Task, real: int, effective: int) -> int:
    return _root_or_same(real, effective)


@syscall(114, "partial", NO_OTHERS)
def sys_setregid(task: Task, real: int, effective: int) -> int:
    return _root_or_same(real, effective)


@syscall(117, "partial", NO_OTHERS)
def sys_setresuid(task: Task, real: int, effective: int, saved: int) -> int:
    return _root_or_same(real, effective, saved)


@syscall(119, "partial", NO_OTHERS)
def sys_setresgid(task: Task, real: int, effective: int, saved: int) -> int:
    return _root_or_same(real, effective, saved)


@syscall(118)
def sys_getresuid(task: Task, real: int, effective: int, saved: int) -> int:
    for address in (real, effective, saved):
        task.memory.copy_out(address, bytes(4))
    return 0


@syscall(120)
def sys_getresgid(task: Task, real: int, effective: int, saved: int) -> int:
    return sys_getresuid(task, real, effective, saved)


@syscall(122, "none", "there are no other users")
def sys_setfsuid(task: Task, uid: int) -> int:
    return 0


@syscall(123, "none", "there are no other users")
def sys_setfsgid(task: Task, gid: int) -> int:
    return 0


@syscall(116)
def sys_setgroups(task: Task, size: int, address: int) -> int:
    if size > MAX_GROUPS:
        raise Errno(errno.EINVAL)
    task.process.groups = struct.unpack(f"<{size}I", task.memory.copy_in(address, 4 * size))
    return 0


@syscall(302, "partial", "kept and told; RLIMIT_NOFILE is enforced")
def sys_prlimit64(task: Task, pid: int, which: int, new: int, old: int) -> int:
    process = task.process if not signed32(pid) else task.system.processes.get(signed32(pid))
    if process is None:
        raise Errno(errno.ESRCH)
    if which >= NR_LIMITS:
        raise Errno(errno.EINVAL)
    before = limit(process, which)
    wanted = struct.unpack("<QQ", task.memory.copy_in(new, 16)) if new else None
    if wanted and wanted[0] > wanted[1]:
        raise Errno(errno.EINVAL)
    if old:
        task.memory.copy_out(old, struct.pack("<QQ", *before))
    if wanted:
        process.limits[which] = (wanted[0], wanted[1])
        if which == RLIMIT_NOFILE:
            for each in process.tasks:
                each.files.limit = min(wanted[0], 1 << 16)
    return 0


@syscall(97, "partial", "as prlimit64")
def sys_getrlimit(task: Task, which: int, address: int) -> int:
    return sys_prlimit64(task, 0, which, 0, address)


@syscall(160, "partial", "as prlimit64")
def sys_setrlimit(task: Task, which: int, address: int) -> int:
    return sys_prlimit64(task, 0, which, address, 0)


@syscall(98, "partial", "processor time, which is all a user's, resident pages, faults")
def sys_getrusage(task: Task, who: int, address: int) -> int:
    process, who = task.process, signed32(who)
    if who not in (-1, 0, 1):  # children, the process, the thread
        raise Errno(errno.EINVAL)
    own = rusage(process.cpu_ns, len(task.memory.pages), task.memory.faults)
    task.memory.copy_out(address, rusage(process.children_cpu_ns) if who == -1 else own)
    return 0


@syscall(99)
def sys_sysinfo(task: Task, address: int) -> int:
    system = task.system
    total, free = system.frames.used + system.frames.free, system.frames.free
    head = struct.pack("<q3Q6QHHI", system.now_ns() // 10**9, 0, 0, 0, total * PAGE_SIZE, free * PAGE_SIZE, 0, 0, 0, 0,
                       len(system.processes), 0, 0)  # fmt: skip
    task.memory.copy_out(address, (head + struct.pack("<QQI", 0, 0, 1)).ljust(112, b"\0"))
    return 0


@syscall(318)
def sys_getrandom(task: Task, address: int, size: int, flags: int) -> int:
    if flags & ~7:
        raise Errno(errno.EINVAL)
    size = min(size, RANDOM_MOST)
    task.memory.copy_out(address, os.urandom(size))
    return size


@syscall(157, "partial", "the name, the signal at a parent's death; what is about privileges and dumps is accepted")
def sys_prctl(task: Task, option: int, argument: int) -> int:
    if option == PR_SET_NAME:
        task.process.name = task.memory.copy_in(argument, 16).split(b"\0")[0][:15]
    elif option == PR_GET_NAME:
        task.memory.copy_out(argument, task.process.name.ljust(16, b"\0"))
    elif option == PR_GET_DUMPABLE or (option == PR_CAPBSET_READ and argument <= LAST_CAPABILITY):
        return 1
    elif option == PR_SET_PDEATHSIG and argument <= NSIG:
        task.process.death_signal = argument
    elif option == PR_GET_PDEATHSIG:
        task.memory.copy_out(argument, task.process.death_signal.to_bytes(4, "little"))
    elif option not in (PR_SET_DUMPABLE, PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS):
        raise Errno(errno.EINVAL)
    return 0


@syscall(309)
def sys_getcpu(task: Task, cpu: int, node: int) -> int:
    for address in (cpu, node):
        if address:
            task.memory.copy_out(address, bytes(4))
    return 0
