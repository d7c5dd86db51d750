"""System-call policies, one row a call, compiled to classic BPF.

A domain computes, waits and uses its queues; what is not named gets EPERM, what only an attack would call kills. The
address space is the monitor's to change: mmap, munmap, mprotect, mremap, madvise and clone are refused outright, so no
row compares an address of it. The descriptor table is frozen: no call here makes a descriptor, except a driver domain's
recvmsg on the one socket from dom0. sendto and recvfrom are the fault path's, on its one socket and to nobody by name.

Interface:
  * domain(pid, driver): the policy of a locked domain.
  * application(): the policy of an application's process.
  * monitor(): the policy of a monitor.
"""

from __future__ import annotations

import errno
import signal
import struct

from hypervisor.public.layout import FD_DESCRIPTORS, FD_FAULT
from hypervisor.public.traps import FAULT
from hypervisor.public.types import PAGE_SIZE
from hypervisor.public.user import USER_CONTROL, USER_GATE

LOAD, JUMP_EQ, JUMP_GE, RETURN = 0x20, 0x15, 0x35, 0x06
KILL, ALLOW, TRAP = 0x80000000, 0x7FFF0000, 0x00030000
NR, ARCH, IP = 0, 4, 8  # offsets in struct seccomp_data
AUDIT_ARCH_X86_64 = 0xC000003E

Instruction = tuple[int, int, int, int]

NUMBER = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "readv": 19, "writev": 20, "select": 23, "sched_yield": 24,
    "mremap": 25, "nanosleep": 35, "getpid": 39, "sendto": 44, "recvfrom": 45, "recvmsg": 47, "exit": 60, "kill": 62,
    "uname": 63, "fcntl": 72, "fdatasync": 75, "gettimeofday": 96, "ptrace": 101, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
    "personality": 135, "modify_ldt": 154, "mount": 165, "init_module": 175, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "remap_file_pages": 216, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "tgkill": 234, "mq_timedsend": 242, "mq_timedreceive": 243, "kexec_load": 246,
    "add_key": 248, "keyctl": 250, "pselect6": 270, "ppoll": 271, "unshare": 272, "fallocate": 285, "perf_event_open": 298,
    "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "getrandom": 318, "bpf": 321, "userfaultfd": 323,
    "membarrier": 324, "preadv2": 327, "pwritev2": 328, "statx": 332, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435,
    "pidfd_getfd": 438, "process_madvise": 440,
}  # fmt: skip

ALLOWED = """
    read write readv writev close fstat lseek poll ppoll select pselect6 brk rt_sigprocmask rt_sigreturn rt_sigpending
    rt_sigtimedwait rt_sigsuspend sigaltstack sched_yield nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday
    time getpid gettid getppid getuid getgid geteuid getegid uname getrandom sched_getaffinity restart_syscall
    mq_timedsend mq_timedreceive exit exit_group
""".split()
KILLED = """
    ptrace process_vm_readv process_vm_writev process_madvise pidfd_open pidfd_getfd io_uring_setup userfaultfd bpf
    perf_event_open remap_file_pages kexec_load init_module mount unshare setns keyctl add_key modify_ldt personality
""".split()
FALL_BACK = "clone3 membarrier statx mremap".split()  # ENOSYS: libc and CPython have another way
MONITOR = "mmap munmap mprotect sendto recvfrom exit".split()
DRIVER = "preadv2 pwritev2 fdatasync fallocate".split()
FIRST = "mq_timedsend mq_timedreceive ppoll poll read clock_gettime brk".split()  # tested first: the hot ones
EXCEPTIONS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
JOB_CONTROL = (signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
FD_USER_FAULT, FAULT_BYTES, MSG_NOSIGNAL = FD_FAULT, FAULT.size, 0x4000
FUTEX_FLAGS = 0x80 | 0x100  # PRIVATE, CLOCK_REALTIME
CAPABILITIES = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 23  # KILL, SETGID, SETUID, SYS_NICE: all that root's hypervisor keeps


def errno_of(name: str) -> int:
    """The verdict `fail with this errno`."""
    return 0x50000 | int(getattr(errno, name))


def low(argument: int) -> int:
    """Offset of the low word of an argument."""
    return 16 + 8 * argument


def only(argument: int, values: tuple[int, ...], otherwise: int, mask: int = 0xFFFFFFFF) -> list[Instruction]:
    """ALLOW if (argument & mask) is one of `values`, in its low word; the kernel takes these arguments as ints."""
    code: list[Instruction] = [(LOAD, 0, 0, low(argument))]
    if mask != 0xFFFFFFFF:
        code.append((0x54, 0, 0, mask))  # A &= mask
    for i, value in enumerate(values):
        code.append((JUMP_EQ, len(values) - i, 0, value & 0xFFFFFFFF))
    return [*code, (RETURN, 0, 0, otherwise), (RETURN, 0, 0, ALLOW)]


def nameless(fd: int, otherwise: int) -> list[Instruction]:
    """ALLOW sendto or recvfrom on descriptor `fd` whose argument 4, an address, is NULL in both its words."""
    return [
        (LOAD, 0, 0, low(0)), (JUMP_EQ, 0, 4, fd),
        (LOAD, 0, 0, low(4)), (JUMP_EQ, 0, 2, 0),
        (LOAD, 0, 0, low(4) + 4), (JUMP_EQ, 1, 0, 0),
        (RETURN, 0, 0, otherwise), (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip


def none_of(argument: int, values: tuple[int, ...], otherwise: int) -> list[Instruction]:
    """ALLOW unless the argument is one of `values`."""
    code: list[Instruction] = [(LOAD, 0, 0, low(argument))]
    for i, value in enumerate(values):
        code.append((JUMP_EQ, len(values) - i, 0, value))
    return [*code, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, otherwise)]


def compile_policy(rows: dict[str, list[Instruction]], default: int) -> bytes:
    """The program: another architecture or an x32 number kills, then a row for each call, then the default."""
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCH), (JUMP_EQ, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NR), (JUMP_GE, 0, 1, 0x40000000), (RETURN, 0, 0, KILL),
    ]  # fmt: skip
    for name in sorted(rows, key=lambda n: (n not in FIRST, len(rows[n]))):
        body = rows[name]
        assert len(body) < 255
        code += [(JUMP_EQ, 0, len(body), NUMBER[name]), *body]
    code.append((RETURN, 0, 0, default))
    return b"".join(struct.pack("HBBI", *i) for i in code)


def domain(pid: int, driver: bool) -> bytes:
    """Policy of a locked domain whose process is `pid`; a driver domain also moves bytes between files and memory."""
    no = errno_of("EPERM")
    rows: dict[str, list[Instruction]] = {name: [(RETURN, 0, 0, ALLOW)] for name in ALLOWED}
    rows |= {name: [(RETURN, 0, 0, KILL)] for name in KILLED}
    rows |= {name: [(RETURN, 0, 0, errno_of("ENOSYS"))] for name in FALL_BACK}
    rows["futex"] = only(1, (0, 1), no, mask=0xFFFFFFFF & ~FUTEX_FLAGS)  # WAIT and WAKE: a requeue steals a peer's waiter
    rows["rt_sigaction"] = none_of(0, EXCEPTIONS, no)  # their handlers are the hypervisor's to choose
    rows["fcntl"] = only(1, (1, 3), no)  # F_GETFD, F_GETFL
    rows["kill"], rows["tgkill"] = to_itself(pid, 1, no), to_itself(pid, 2, no)
    for name in ("sendto", "recvfrom"):
        rows[name] = nameless(FD_FAULT, no)
    if driver:
        rows |= {name: [(RETURN, 0, 0, ALLOW)] for name in DRIVER}
        rows["recvmsg"] = only(0, (FD_DESCRIPTORS,), no)
    return compile_policy(rows, no)


def to_itself(pid: int, number: int, otherwise: int) -> list[Instruction]:
    """ALLOW a signal to process `pid`, whose number is argument `number`, unless it stops or continues: a SIGCONT of its own
    would undo the hypervisor's SIGSTOP before that was seen."""
    code: list[Instruction] = [(LOAD, 0, 0, low(0)), (JUMP_EQ, 0, len(JOB_CONTROL) + 1, pid), (LOAD, 0, 0, low(number))]
    for i, signo in enumerate(JOB_CONTROL, 1):
        code.append((JUMP_EQ, len(JOB_CONTROL) - i, 0 if i < len(JOB_CONTROL) else 1, signo))
    return [*code, (RETURN, 0, 0, otherwise), (RETURN, 0, 0, ALLOW)]


def each(words: list[tuple[int, int]]) -> list[Instruction]:
    """ALLOW if each word at an offset has its value; else go on behind."""
    code: list[Instruction] = []
    for i, (offset, value) in enumerate(words):
        code += [(LOAD, 0, 0, offset), (JUMP_EQ, 0, 2 * (len(words) - i) - 1, value)]
    return [*code, (RETURN, 0, 0, ALLOW)]


def wide(argument: int, value: int) -> list[tuple[int, int]]:
    """Both words of an argument."""
    return [(low(argument), value & 0xFFFFFFFF), (low(argument) + 4, value >> 32)]


def application() -> bytes:
    """Policy of an application's process. What is called from anywhere but the gate page is a trap to the guest kernel, in any
    table of the host's; there, the gate's own calls with the gate's own arguments, and death for the rest: the program can
    jump to them."""
    turn = wide(0, USER_CONTROL) + wide(3, 0)  # the cell's first word, no time limit
    fault = [(low(0), FD_USER_FAULT), (low(3), MSG_NOSIGNAL), *wide(4, 0)]
    rows: dict[str, list[Instruction]] = {
        "futex": [
            *each([*turn, (low(1), 0), (low(2), 0)]),  # WAIT while it is the kernel's turn
            *each([*turn, (low(1), 1), (low(2), 1)]),  # WAKE the kernel
            (RETURN, 0, 0, KILL),
        ],
        "sendto": [*each([*fault, *wide(2, FAULT_BYTES)]), (RETURN, 0, 0, KILL)],
        "recvfrom": [*each(fault), (RETURN, 0, 0, KILL)],
        "rt_sigreturn": [(RETURN, 0, 0, ALLOW)],
        "exit_group": [(RETURN, 0, 0, ALLOW)],
    }
    trap = (RETURN, 0, 0, TRAP)
    gate: list[Instruction] = [
        (LOAD, 0, 0, ARCH), (JUMP_EQ, 1, 0, AUDIT_ARCH_X86_64), trap,
        (LOAD, 0, 0, IP + 4), (JUMP_EQ, 1, 0, USER_GATE >> 32), trap,
        (LOAD, 0, 0, IP), (JUMP_GE, 1, 0, USER_GATE & 0xFFFFFFFF), trap,
        (JUMP_GE, 0, 1, (USER_GATE & 0xFFFFFFFF) + PAGE_SIZE), trap,
    ]  # fmt: skip
    return b"".join(struct.pack("HBBI", *i) for i in gate) + compile_policy(rows, KILL)


def monitor() -> bytes:
    """Policy of a monitor: it maps, says so and waits."""
    return compile_policy({name: [(RETURN, 0, 0, ALLOW)] for name in MONITOR}, KILL)
