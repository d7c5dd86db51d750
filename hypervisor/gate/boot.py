"""From fork to locked: what a domain's process does before its first untrusted instruction. The order is the point.

    step                                               why here
    0  import the program (exec'ed domains)            after 2 the code may be unreadable for this uid
    1  open both queues by name                        as the creator's uid; the last names ever used
    2  take the domain's own uid (root only)           before 3: a credential change clears PDEATHSIG
    3  die with the hypervisor; check the parent       the check closes the race with a parent that died already
    4  not dumpable                                    before any descriptor arrives
    5  descriptors to their fixed numbers, rest closed the monitor's commands name them
    6  upcall signal blocked and opened as a signalfd  "interrupts off"
    7  reserve the windows; map code, commands and M2P no gap of them is ever the kernel's to give away
       in the first, seal them
    8  clone the monitor, tell the hypervisor,         it is born with 3..7 and an open filter, which the hypervisor shuts;
       close 3..7                                      after the clone: the monitor needs the descriptors
    9  heap from brk only, limits; the entry code of   after the last mmap of ours; the filter keeps the handlers
       exceptions
    10 Landlock, then the filter                       after this line the process is the guest's
    11 wait for "go" on the reply queue                nothing of the guest runs before its frames are mapped

A failure before 5 is told to the hypervisor in one message and ends the process; a later one ends it with status 70, which
the hypervisor sees and says.
"""

from __future__ import annotations

import array
import ctypes
import importlib
import os
import resource
import signal
import socket
import traceback
from dataclasses import dataclass
from typing import Any

import msgpack
import posix_ipc

from hypervisor.gate import policy
from hypervisor.gate._gate import ffi, lib
from hypervisor.gate.monitor import (
    FD_CODE,
    FD_COMMANDS,
    FD_M2P,
    FD_MACHINE_RO,
    FD_MACHINE_RW,
    FD_SOCKET,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    SYS_MMAP,
)
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.layout import (
    COMMAND_PAGES,
    COMMANDS,
    FD_DESCRIPTORS,
    FD_FAULT,
    FD_REPLY,
    FD_REQUEST,
    FD_UPCALL,
    KERNEL_WINDOW,
    M2P,
    MONITOR_CODE,
    NR_WINDOWS,
    SPACE_BYTES,
    START_INFO_PFN,
    virt,
)
from hypervisor.public.types import MESSAGE_BYTES, PAGE_SIZE

UPCALL_SIGNAL = signal.SIGUSR2  # a STANDARD signal: it merges with itself; real-time ones exhaust the uid's limit
SYS_MSEAL = 462
WINDOWS_BYTES = NR_WINDOWS * SPACE_BYTES  # 8 TiB, side by side
HEAP_BYTES = 256 << 20
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class BootConfig:
    """What a new process is told, as a msgpack list."""

    domid: int
    name: str
    parent: int  # the hypervisor's pid
    uid: int  # -1: keep
    flags: int
    entry: str  # dotted module of a driver domain or dom0; "": the delivered image
    request_queue: str
    reply_queue: str
    landlock: int  # ABI to use, 0: none
    locked: bool  # dom0 is not
    m2p_bytes: int

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb([getattr(self, name) for name in self.__dataclass_fields__])
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> BootConfig:
        return cls(*msgpack.unpackb(data))


def sys6(nr: int, *args: int) -> int:
    """A raw system call. Raises OSError."""
    words = [a if a < 1 << 63 else a - (1 << 64) for a in args] + [0] * (6 - len(args))
    result = lib.raw6(nr, *words)
    if -4096 < result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def prctl(option: int, argument: int) -> None:
    if libc.prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def boot(config: BootConfig, sock_fd: int, descriptors_fd: int) -> None:
    """Run a domain in this process; never returns."""
    sock = socket.socket(fileno=os.dup(sock_fd))
    try:
        start = prepare(config, sock, sock_fd, descriptors_fd)
    except BaseException:
        try:
            sock.send(msgpack.packb(["failed", traceback.format_exc(limit=-3)[-1500:]]))
        finally:
            os._exit(70)
    start()
    os._exit(0)


def prepare(config: BootConfig, sock: socket.socket, sock_fd: int, descriptors_fd: int) -> Any:
    """Steps 0 to 10; returns what runs the guest."""
    kernel = importlib.import_module("domain.kernel")
    if config.entry:
        importlib.import_module(config.entry)
    queues = [posix_ipc.MessageQueue(name) for name in (config.request_queue, config.reply_queue)]
    if config.uid >= 0:
        os.setgroups([])
        os.setresgid(config.uid, config.uid, config.uid)
        os.setresuid(config.uid, config.uid, config.uid)
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != config.parent:
        os._exit(80)
    if not config.flags & CreateFlags.DEBUG:
        prctl(4, 0)  # PR_SET_DUMPABLE
    libc.prctl(15, config.name.encode()[:15] + b"\0", 0, 0, 0)  # PR_SET_NAME
    place_descriptors(sock, [q.mqd for q in queues], descriptors_fd)
    reserve_windows(config)
    spawn_monitor()
    limits(config)
    serve_traps()
    if config.locked:
        lock(config)
    return lambda: run(config, kernel)


def place_descriptors(sock: socket.socket, queues: list[int], descriptors_fd: int) -> None:
    """Steps 5 and 6. Everything at a number of its own; 0, 1, 2 are /dev/null: a guest has a console, not a terminal."""
    _, ancillary, _, _ = sock.recvmsg(64, socket.CMSG_SPACE(64))
    received = array.array("i", ancillary[0][2])
    wanted = [sock.detach(), *received, *queues]
    high = [os.dup2(fd, 100 + i) for i, fd in enumerate(wanted)]
    extra = os.dup2(descriptors_fd, 110) if descriptors_fd >= 0 else -1
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    numbers = (FD_SOCKET, FD_MACHINE_RW, FD_MACHINE_RO, FD_CODE, FD_COMMANDS, FD_M2P, FD_FAULT, FD_REQUEST, FD_REPLY)
    for fd, number in zip(high, numbers, strict=True):
        os.dup2(fd, number)
    if extra >= 0:
        os.dup2(extra, FD_DESCRIPTORS)
    else:
        os.closerange(FD_DESCRIPTORS, FD_DESCRIPTORS + 1)  # what an exec'ed process had there
    os.closerange(FD_M2P + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if lib.open_signalfd(UPCALL_SIGNAL, FD_UPCALL) < 0:
        raise OSError("signalfd")


def reserve_windows(config: BootConfig) -> None:
    """Step 7. NOREPLACE: a sanitizer's shadow in the way is an error, not silent damage."""
    flags = MAP_PRIVATE | MAP_FIXED_NOREPLACE | MAP_ANONYMOUS | MAP_NORESERVE
    sys6(SYS_MMAP, KERNEL_WINDOW, WINDOWS_BYTES, PROT_NONE, flags, -1, 0)
    for va, size, prot, fd in (
        (MONITOR_CODE, PAGE_SIZE, PROT_READ | PROT_EXEC, FD_CODE),
        (COMMANDS, COMMAND_PAGES * PAGE_SIZE, PROT_READ, FD_COMMANDS),
        (M2P, config.m2p_bytes, PROT_READ, FD_M2P),
    ):
        sys6(SYS_MMAP, KERNEL_WINDOW + va, size, prot, MAP_SHARED | MAP_FIXED, fd, 0)
        try:
            sys6(SYS_MSEAL, KERNEL_WINDOW + va, size, 0)
        except OSError:
            pass  # before Linux 6.10 the filter alone holds
    os.close(FD_M2P)


def spawn_monitor() -> None:
    """Step 8. The descriptor of smaps goes along: once locked, nobody but the process itself could open it."""
    pid = lib.monitor_spawn(KERNEL_WINDOW + MONITOR_CODE, KERNEL_WINDOW + COMMANDS, FD_SOCKET)
    if pid < 0:
        raise OSError(-pid, "clone of the monitor")
    smaps = os.open("/proc/self/smaps_rollup", os.O_RDONLY)
    with socket.socket(fileno=os.dup(FD_SOCKET)) as sock:
        sock.sendmsg([msgpack.packb(["monitor", pid])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [smaps]))])
    os.close(smaps)
    os.closerange(FD_SOCKET, FD_COMMANDS + 1)


def limits(config: BootConfig) -> None:
    """Step 9."""
    if not config.locked:
        return
    lib.brk_heap_only()
    bounds = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, HEAP_BYTES),
        (resource.RLIMIT_AS, WINDOWS_BYTES + (4 << 30)),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ]
    for what, bound in bounds:
        resource.setrlimit(what, (bound, bound))


def serve_traps() -> None:
    """Still step 9. From here on exceptions enter the guest's handlers, and an access to a page of the windows that is not
    mapped asks the hypervisor."""
    result = lib.traps_install(KERNEL_WINDOW, WINDOWS_BYTES, FD_FAULT)
    if result:
        raise OSError(-result, "handlers of exceptions")


def lock(config: BootConfig) -> None:
    """Step 10."""
    if config.flags & CreateFlags.UNFILTERED:
        return
    if config.landlock and lib.landlock_all(config.landlock) < 0:
        raise OSError("Landlock refused")
    program = policy.domain(os.getpid(), bool(config.flags & CreateFlags.DRIVER))
    result = lib.install_filter(ffi.from_buffer(program), len(program) // 8)
    if result:
        raise OSError(-result, "seccomp filter")


def run(config: BootConfig, kernel: Any) -> None:
    """Step 11, then the guest."""
    buffer = ffi.new("char[]", MESSAGE_BYTES)
    size = lib.raw6(243, FD_REPLY, int(ffi.cast("intptr_t", buffer)), MESSAGE_BYTES, 0, 0, 0)  # mq_timedreceive
    if size <= 0:
        os._exit(81)
    _, _, entry = msgpack.unpackb(bytes(ffi.buffer(buffer, size)))
    start_info = KERNEL_WINDOW + virt(START_INFO_PFN)
    if config.flags & CreateFlags.NATIVE:
        lib.enter_kernel(KERNEL_WINDOW + entry, start_info)
    kernel.start(start_info)
