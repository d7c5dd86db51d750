"""The system-call policies: the compiled program, interpreted, over every call number and the arguments that matter."""

from __future__ import annotations

import errno
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.gate import policy
from hypervisor.gate._gate import ffi, lib
from hypervisor.public.layout import FD_DESCRIPTORS, FD_FAULT

KILL, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x50000
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
X86_64, I386 = 0xC000003E, 0x40000003
PID = 4242
Calls = dict[str, int]
Row = tuple[int, list[int], int, int]
Case = tuple[str, int, tuple[int, ...], int]  # what, number, arguments, verdict

# What a locked domain may do, written down a second time. Not named: EPERM.
TABLE = {
    ALLOW: """
        read write readv writev close fstat lseek poll ppoll select pselect6 mq_timedsend mq_timedreceive brk
        sched_yield sched_getaffinity nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time getrandom uname
        getpid gettid getppid getuid getgid geteuid getegid rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait
        rt_sigsuspend sigaltstack restart_syscall exit exit_group
    """,
    ENOSYS: "clone3 membarrier statx mremap",
    KILL: """
        ptrace process_vm_readv process_vm_writev process_madvise pidfd_open pidfd_getfd io_uring_setup userfaultfd bpf
        perf_event_open remap_file_pages unshare setns mount keyctl add_key kexec_load init_module personality modify_ldt
    """,
}
# Judged by an argument: (number of the argument, values, verdict for these, verdict for all else).
BY_ARGUMENT: dict[str, Row] = {
    "futex": (1, [op | flags for op in (0, 1) for flags in (0, 0x80, 0x100, 0x180)], ALLOW, EPERM),  # WAIT, WAKE
    "fcntl": (1, [1, 3], ALLOW, EPERM),  # F_GETFD, F_GETFL
    "rt_sigaction": (0, [4, 5, 7, 8, 11, 31], EPERM, ALLOW),  # ILL TRAP BUS FPE SEGV SYS
}
SIGNALS = {"kill": 1, "tgkill": 2}  # allowed to PID, unless this argument is a signal that stops or continues
STOP_OR_CONTINUE = [18, 19, 20, 21, 22]  # CONT STOP TSTP TTIN TTOU
NAMELESS = "sendto recvfrom".split()  # allowed on FD_FAULT and without an address
DRIVER: dict[str, Row | None] = {
    "preadv2": None, "pwritev2": None, "fdatasync": None, "fallocate": None, "recvmsg": (0, [FD_DESCRIPTORS], ALLOW, EPERM),
}  # fmt: skip
# Each of these would undo the gate; that they are refused needs no table to be believed.
NEVER = """
    mmap mprotect munmap madvise clone clone3 fork vfork execve execveat open openat openat2 socket connect dup dup2 dup3
    memfd_create shmat pkey_mprotect mremap sendmsg sendto pidfd_open ptrace prctl seccomp setuid mq_open ioctl
""".split()


@pytest.fixture(scope="module")
def calls() -> Calls:
    """Every call's number, from the host's own header: nothing of ours is believed."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        header = Path("/usr/include/asm/unistd_64.h")
    found = re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text())
    assert len(found) > 330
    return {name: int(number) for name, number in found}


class Program:
    """A classic BPF program as seccomp runs it. Refuses what the kernel's own check would refuse."""

    def __init__(self, code: bytes) -> None:
        self.code = list(struct.iter_unpack("HBBI", code))
        assert 0 < len(self.code) <= 4096
        for at, (op, true, false, _) in enumerate(self.code):
            assert at + 1 + max(true, false) < len(self.code) or op == policy.RETURN, f"instruction {at} jumps out"
        assert self.code[-1][0] == policy.RETURN

    def __call__(self, nr: int, args: tuple[int, ...] = (), arch: int = X86_64, ip: int = 0x1234) -> int:
        words = [a & (1 << 64) - 1 for a in (*args, 0, 0, 0, 0, 0, 0)[:6]]
        data = struct.pack("<IIQ6Q", nr & 0xFFFFFFFF, arch, ip, *words)
        a = pc = 0
        while True:
            op, true, false, k = self.code[pc]
            pc += 1
            match op:
                case 0x20:  # ld [k]
                    a = int.from_bytes(data[k : k + 4], "little")
                case 0x54:  # and #k
                    a &= k
                case 0x15:  # jeq
                    pc += true if a == k else false
                case 0x35:  # jge
                    pc += true if a >= k else false
                case 0x06:  # ret
                    return int(k)
                case _:
                    raise AssertionError(f"instruction {pc - 1}: {op:#x} is none of seccomp's")


def interesting(argument: int, values: list[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """(arguments, value as the kernel's int sees it): those that are named, their neighbours, every bit and its own."""
    for value in sorted({*values, *(v + d for v in values for d in (-1, 1)), *(1 << b for b in range(32)), *range(70), -1}):
        for high in (0, 1 << 32, 0xFFFFFFFF << 32):  # an int: the high word is not looked at by the kernel either
            args = [0xDEAD_BEEF_0BAD_F00D] * 6
            args[argument] = value & 0xFFFFFFFF | high
            yield tuple(args), value


def nameless() -> Iterator[tuple[tuple[int, ...], int]]:
    """(arguments, verdict) of sendto and recvfrom: every descriptor near ours, every bit of an address; the rest is free."""
    for args, fd in interesting(0, [FD_FAULT]):
        for address in (0, 1, 1 << 32):
            yield (*args[:4], address, args[5]), ALLOW if fd == FD_FAULT and not address else EPERM
    for bit in range(64):
        yield (FD_FAULT, 0, 0, 0, 1 << bit, 0), EPERM
    yield (FD_FAULT, *(0xFFFFFFFFFFFFFFFF,) * 3, 0, 0xFFFFFFFFFFFFFFFF), ALLOW


def signals(number: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(arguments, verdict) of a call that sends signal args[number]: to everybody, and every signal to oneself."""
    for args, pid in interesting(0, [PID]):
        yield args, ALLOW if pid == PID else EPERM
    for args, signo in interesting(number, STOP_OR_CONTINUE):
        yield (PID, *args[1:]), EPERM if signo in STOP_OR_CONTINUE else ALLOW
        yield (PID ^ 2, *args[1:]), EPERM


def cases(calls: Calls, driver: bool) -> Iterator[Case]:
    """Everything that is asked of a domain's policy."""
    verdict = {name: verdict for verdict, names in TABLE.items() for name in names.split()}
    rows: dict[str, Row | None] = {**BY_ARGUMENT, **(DRIVER if driver else {})}
    verdict |= dict.fromkeys((name for name, row in rows.items() if row is None), ALLOW)
    for name, number in calls.items():
        row = rows.get(name)
        if name in NAMELESS:
            yield from ((name, number, args, wanted) for args, wanted in nameless())
        elif name in SIGNALS:
            yield from ((name, number, args, wanted) for args, wanted in signals(SIGNALS[name]))
        elif row is not None:
            argument, values, these, others = row
            for args, value in interesting(argument, values):
                yield name, number, args, these if value in values else others
        else:
            for args in ((), (0xFFFFFFFFFFFFFFFF,) * 6, (PID,) * 6):
                yield name, number, args, verdict.get(name, EPERM)
    named = set(calls.values())
    for number in [*range(600), 0x1F00, 0x3FFFFFFF]:
        if number not in named:
            yield "no call", number, (), EPERM
    for number in (0x40000000, 0x40000001, 0x40000009, 0x40000200, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        yield "x32, or none", number, (), KILL


def check(program: Program, wanted: list[Case]) -> None:
    for what, number, args, verdict in wanted:
        found = program(number, args)
        assert found == verdict, f"{what} ({number}) {[hex(a) for a in args]}: {found:#x}, wanted {verdict:#x}"
        assert program(number, args, I386) == KILL, f"{number} by another entry"


@pytest.mark.parametrize("driver", [False, True])
def test_every_call_has_the_verdict_of_the_table(calls: Calls, driver: bool) -> None:
    check(Program(policy.domain(PID, driver)), list(cases(calls, driver)))


@pytest.mark.parametrize("driver", [False, True])
def test_what_would_undo_the_gate_is_refused(calls: Calls, driver: bool) -> None:
    program = Program(policy.domain(PID, driver))
    for name in NEVER:
        for args, _ in interesting(0, [0, 3, PID]):
            assert program(calls[name], args) in (EPERM, ENOSYS, KILL), name


def test_a_monitor_maps_and_talks_and_nothing_else(calls: Calls) -> None:
    program = Program(policy.monitor())
    for name, number in calls.items():
        wanted = ALLOW if name in ("mmap", "munmap", "mprotect", "sendto", "recvfrom", "exit") else KILL
        assert program(number, (PID,) * 6) == wanted, name
    for number in (600, 0x1F00, 0x40000009, 0xFFFFFFFF):
        assert program(number) == KILL
    assert program(9, (), I386) == KILL


def test_numbers_are_the_hosts(calls: Calls) -> None:
    assert {name: calls[name] for name in policy.NUMBER} == policy.NUMBER


def test_hot_calls_come_first() -> None:
    code = Program(policy.domain(PID, False)).code
    tested = [k for op, _, _, k in code if op == policy.JUMP_EQ][1:]
    assert set(tested[: len(policy.FIRST)]) == {policy.NUMBER[name] for name in policy.FIRST}


# ---- the check finds what is broken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALLOWED", [*policy.ALLOWED, "mmap"]),
        ("ALLOWED", [name for name in policy.ALLOWED if name != "brk"]),
        ("KILLED", [name for name in policy.KILLED if name != "pidfd_getfd"]),
        ("FALL_BACK", []),
        ("EXCEPTIONS", policy.EXCEPTIONS[1:]),
        ("JOB_CONTROL", policy.JOB_CONTROL[1:]),  # a SIGCONT of its own undoes the scheduler's SIGSTOP
        ("FUTEX_FLAGS", policy.FUTEX_FLAGS | 2),  # a requeue passes for a wait
        ("FD_FAULT", FD_FAULT - 1),
        ("nameless", lambda fd, no: policy.only(0, (fd,), no)),  # to anybody by name
        ("DRIVER", [*policy.DRIVER, "mprotect"]),
        ("KILL", EPERM),
    ],
)
def test_a_seeded_hole_is_found(monkeypatch: pytest.MonkeyPatch, calls: Calls, name: str, value: Any) -> None:
    monkeypatch.setattr(policy, name, value)
    with pytest.raises(AssertionError, match=r"wanted|another entry"):
        check(Program(policy.domain(PID, True)), list(cases(calls, True)))


def test_any_changed_instruction_is_found(calls: Calls) -> None:
    """The table leaves no instruction unquestioned: change a constant or a comparison anywhere, and it is noticed."""
    wanted = list(cases(calls, True))
    assert not missed_changes(policy.domain(PID, True), lambda program: check(program, wanted))


def missed_changes(good: bytes, check: Callable[[Program], None]) -> list[tuple[int, Any]]:
    """Changes of one instruction that `check` does not object to."""
    missed = []
    for at in range(len(good) // 8):
        op, true, false, k = struct.unpack_from("HBBI", good, at * 8)
        changed = [(op, true, false, k ^ 2)]
        if op in (policy.JUMP_EQ, policy.JUMP_GE):
            changed.append((op, false, true, k))
        for instruction in changed:
            code = bytearray(good)
            struct.pack_into("HBBI", code, at * 8, *instruction)
            try:
                check(Program(bytes(code)))
                missed.append((at, instruction))
            except (AssertionError, IndexError):
                pass
    return missed


# ---- the host's kernel agrees with the interpreter


def test_the_kernel_reads_it_as_we_do(calls: Calls) -> None:
    """Every call that is refused with an errno, made for real in a child under the filter."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            code = policy.domain(os.getpid(), False)
            program = Program(code)
            refused = [(nr, v & 0xFFFF) for nr in sorted(calls.values()) if (v := program(nr)) in (EPERM, ENOSYS)]
            assert lib.install_filter(ffi.from_buffer(code), len(code) // 8) == 0
            wrong = [nr for nr, error in refused if lib.raw6(nr, 0, 0, 0, 0, 0, 0) != -error]
            os.write(write, f"{len(refused)} calls, wrong: {wrong}".encode())
        finally:
            lib.raw6(calls["exit_group"], 0, 0, 0, 0, 0, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    assert re.fullmatch(r"[23]\d\d calls, wrong: \[\]", text), text


@pytest.mark.parametrize(("name", "arch"), [("ptrace", "x86_64"), ("pidfd_getfd", "x86_64"), ("getpid", "x32")])
def test_the_kernel_kills_what_only_an_attack_would_call(calls: Calls, name: str, arch: str) -> None:
    child = os.fork()
    if child == 0:
        code = policy.domain(os.getpid(), False)
        lib.install_filter(ffi.from_buffer(code), len(code) // 8)
        lib.raw6(calls[name] | (0x40000000 if arch == "x32" else 0), 0, 0, 0, 0, 0, 0)
        lib.raw6(calls["exit_group"], 0, 0, 0, 0, 0, 0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS
