"""A stand-in for the mechanism: real programs under ptrace, their pages from a memfd, so that the POSIX kernel can be tested by
itself. Slow, and no boundary: the tracer trusts nobody less for it."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from array import array
from types import SimpleNamespace
from typing import Any

from domain._guest import ffi
from domain.memory import Pages
from domain.posix import registers as r
from domain.posix import space as kinds
from domain.posix.space import Space
from hypervisor.public.user import USER_CALL, USER_GATE

TRACEME, CONT, GETREGS, SETREGS, SINGLESTEP, SETOPTIONS, GETSIGINFO, GETREGSET, SETREGSET, SYSEMU, STEP = (
    0, 7, 12, 13, 9, 0x4200, 0x4202, 0x4204, 0x4205, 31, 32,
)  # fmt: skip
EXITKILL, SYSGOOD, XSTATE = 0x10_0000, 1, 0x202
PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, address: Any = None, data: Any = None) -> int:
    value = int(libc.ptrace(request, pid, address, data))
    if value < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")
    return value


class Machine:
    """Memory that both sides see."""

    def __init__(self, pages: int) -> None:
        self.fd = os.memfd_create("machine")
        os.ftruncate(self.fd, pages * PAGE)
        os.set_inheritable(self.fd, True)
        self.map = mmap.mmap(self.fd, pages * PAGE)
        self.base = int(ffi.cast("uintptr_t", ffi.from_buffer(self.map)))
        self.nr_free, self.unused = pages, list(range(pages))

    def alloc(self, nr: int = 1) -> Pages:
        """Those that were freed come last, one at a time."""
        first = self.unused[0] if self.unused else 0
        if nr > self.nr_free or self.unused[:nr] != [*range(first, first + nr)]:
            raise MemoryError
        del self.unused[:nr]
        self.nr_free -= nr
        return Pages(first, nr, self.base + first * PAGE)

    def free(self, pages: Pages) -> None:
        self.unused += pages.pfns
        self.nr_free += pages.nr


class Traced(Space):
    """One address space: a stopped process whose own mappings lie above 512 GiB."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.words = (ctypes.c_uint64 * r.COUNT)()
        self.registers = self.words  # type: ignore[assignment]
        self.edits: dict[int, tuple[int, int] | None] = {}
        self.pid = os.fork()
        if not self.pid:
            libc.ptrace(TRACEME, 0, None, None)
            os.execv("/usr/bin/true", ["true"])
        os.waitpid(self.pid, 0)
        ptrace(SETOPTIONS, self.pid, None, SYSGOOD | EXITKILL)
        self.gadget = self._gadget()
        self.fresh = self._get_fpu()
        self._fpu = self.fresh
        self._gate()

    def _gadget(self) -> int:
        with open(f"/proc/{self.pid}/maps") as maps, open(f"/proc/{self.pid}/mem", "rb") as memory:
            for line in maps:
                if "r-xp" in line and "ld-" in line:
                    start, end = (int(word, 16) for word in line.split()[0].split("-"))
                    memory.seek(start)
                    return start + memory.read(end - start).index(b"\x0f\x05")
        raise AssertionError("no loader")

    def _gate(self) -> None:
        """The gate's page, whose direct entry is a breakpoint here."""
        page = USER_GATE & -PAGE
        self._call(9, page, PAGE, 5, 0x32, (1 << 64) - 1, 0)
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(USER_CALL)
            memory.write(b"\xcc")

    def _call(self, *words: int) -> int:
        regs = (ctypes.c_uint64 * r.COUNT)()
        ptrace(GETREGS, self.pid, None, ctypes.byref(regs))
        for at, word in zip((r.RAX, r.RDI, r.RSI, r.RDX, r.R10, r.R8, r.R9), words, strict=False):
            regs[at] = word
        regs[r.RIP], regs[r.ORIG_RAX], regs[r.CS], regs[r.SS] = self.gadget, (1 << 64) - 1, 0x33, 0x2B
        ptrace(SETREGS, self.pid, None, ctypes.byref(regs))
        while regs[r.RIP] == self.gadget:  # a late preemption, or the end of an emulated call, stops it before it has moved
            ptrace(SINGLESTEP, self.pid)
            os.waitpid(self.pid, 0)
            ptrace(GETREGS, self.pid, None, ctypes.byref(regs))
        value = ctypes.c_int64(regs[r.RAX]).value
        assert value >= 0, (words, value)
        return value

    # ---- tables

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None:
        self.edits[page] = pfn, 1 | (2 if write else 0) | (4 if execute else 0)

    def unmap(self, page: int) -> None:
        self.edits[page] = None

    def clear(self) -> None:
        self.edits.clear()
        if self.pid:
            self._call(11, 0, USER_GATE)

    def flush(self) -> None:
        for page, edit in self.edits.items():
            if edit is None:
                self._call(11, page * PAGE, PAGE)
            else:
                self._call(9, page * PAGE, PAGE, edit[1], 0x11, self.machine.fd, edit[0] * PAGE)
        self.edits.clear()

    # ---- running

    def _get_fpu(self) -> bytes:
        buffer = ctypes.create_string_buffer(16384)
        vector = struct.pack("QQ", ctypes.addressof(buffer), 16384)
        raw = ctypes.create_string_buffer(vector, 16)
        ptrace(GETREGSET, self.pid, XSTATE, raw)
        return buffer.raw[: struct.unpack("QQ", raw.raw)[1]]

    @property
    def fpu(self) -> bytes:  # type: ignore[override]
        return self._get_fpu()

    @fpu.setter
    def fpu(self, state: bytes) -> None:
        buffer = ctypes.create_string_buffer(state or self.fresh, len(state or self.fresh))
        raw = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(buffer), len(buffer)), 16)
        ptrace(SETREGSET, self.pid, XSTATE, raw)

    def run(self, timeout_ns: int) -> int:
        self.words[r.ORIG_RAX] = (1 << 64) - 1
        if timeout_ns >= 0:
            signal.signal(signal.SIGALRM, lambda signo, frame: os.kill(self.pid, signal.SIGUSR1))
            signal.setitimer(signal.ITIMER_REAL, max(1000, timeout_ns) / 1e9)
        status = self._resume(SYSEMU)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return self._why(status)

    def _resume(self, request: int) -> int:
        ptrace(SETREGS, self.pid, None, ctypes.byref(self.words))
        ptrace(request, self.pid)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSTOPPED(status):
            ptrace(GETREGS, self.pid, None, ctypes.byref(self.words))
        return status

    def _why(self, status: int) -> int:
        words = self.words
        if not os.WIFSTOPPED(status):
            self.dead = True
            return kinds.DEAD
        stop = os.WSTOPSIG(status)
        direct = stop == signal.SIGTRAP and words[r.RIP] == USER_CALL + 1
        self.direct = (int(direct),)
        if direct:
            words[r.ORIG_RAX], words[r.RIP] = words[r.RAX], words[r.RCX]
        if stop == signal.SIGTRAP | 0x80 or direct:
            self.number = words[r.ORIG_RAX]
            self.arguments = array("Q", [words[i] for i in (r.RDI, r.RSI, r.RDX, r.R10, r.R8, r.R9)])
            return kinds.SYSCALL
        if stop == signal.SIGUSR1:
            return kinds.TIMEOUT
        info = ctypes.create_string_buffer(128)
        ptrace(GETSIGINFO, self.pid, None, info)
        code, address = struct.unpack_from("<i4xQ", info.raw, 8)
        if stop in (signal.SIGSEGV, signal.SIGBUS) and code in (1, 2):
            fetch = address == words[r.RIP]
            self.address, self.error = address, (16 if fetch else 2 if code == 2 else 0) | 4
            return kinds.FAULT
        self.vector = {signal.SIGFPE: 0, signal.SIGILL: 6, signal.SIGTRAP: 3}.get(signal.Signals(stop), 13)
        return kinds.EXCEPTION

    def destroy(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid = 0


class Kernel(SimpleNamespace):
    """What System asks of the domain's kernel."""
