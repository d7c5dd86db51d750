"""The hypervisor's end of a monitor: batches of system calls run inside another address space, acknowledged by it.

    hypervisor                                    monitor (a task in the domain's space, see gate.c)
    write commands into the command page
    one byte over the socket ------------------>  run them
    shadow updated, references dropped  <-------  4 + errno bytes: how many were not tried

Nothing here blocks: `batch` is a Wait, `map` and `unmap` are steps of a continuation. Batches run in the order they were
asked for, one at a time per address space, and one of any length runs as a whole: an unmap that was asked for after a map
finds all of its pages there. A monitor that is dead or silent for ACK_SECONDS ends its domain (`on_failure`); its death is
the acknowledgement, so callers then see MonitorGone and leave their references to the teardown.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hypervisor.gate import policy
from hypervisor.gate._gate import ffi, lib
from hypervisor.loop import Loop, Resume, Steps, Timer, Wait
from hypervisor.public.layout import COMMAND_PAGES, COMMANDS, KERNEL_WINDOW, MONITOR_CODE
from hypervisor.public.types import PAGE_SIZE

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 1, 2, 0x10, 0x20, 0x4000, 0x100000
SYS_MMAP, SYS_MPROTECT, SYS_MUNMAP, SYS_PRCTL, SYS_SECCOMP, SYS_CLOSE_RANGE = 9, 10, 11, 157, 317, 436
F_ADD_SEALS, SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_WRITE, SEAL_FUTURE_WRITE = 1033, 1, 2, 4, 8, 16

FD_SOCKET, FD_MACHINE_RW, FD_MACHINE_RO, FD_CODE, FD_COMMANDS = 3, 4, 5, 6, 7  # a monitor's descriptors, in every space
FD_M2P = 13  # until it is mapped
MAX_COMMANDS = 64  # sent at a time
COMMAND = struct.Struct("<7Q")
TABLE, BLOB, TRAPS = PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE
ACK_SECONDS = 2.0
ACK_NS = int(ACK_SECONDS * 1e9)
U64_MASK = (1 << 64) - 1

Command = tuple[int, ...]
Page = tuple[int, int, int]  # guest-virtual address, mfn, protection


class MonitorGone(Exception):
    """The address space is ending: its teardown owns every reference from here on."""


class MonitorError(Exception):
    """A command failed; `done` commands before it hold."""

    def __init__(self, done: int, errno: int) -> None:
        super().__init__(f"monitor command {done}: {os.strerror(errno)}")
        self.done, self.errno = done, errno


def sealed(name: str, data: bytes) -> int:
    """A memfd that nobody can write again; returns its descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, len(data))
    os.pwrite(fd, data, 0)
    fcntl.fcntl(fd, F_ADD_SEALS, SEAL_SEAL | SEAL_SHRINK | SEAL_GROW | SEAL_WRITE)
    return fd


def sealed_code() -> int:
    """The monitor's code page."""
    page = ffi.new("char[4096]")
    assert lib.monitor_code(page, PAGE_SIZE) > 0
    return sealed("ring1-monitor", bytes(ffi.buffer(page, PAGE_SIZE)))


def stub_image() -> int:
    """The gate of application spaces as a program: one page of code, loaded at USER_GATE, in a sealed file; its descriptor."""
    page = ffi.new("char[4096]")
    entry = lib.stub_code(page)
    assert entry >= 0, f"the gate has {-entry} bytes"
    ident = b"\x7fELF\2\1\1" + bytes(9)
    head = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, MONITOR_CODE + entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, PAGE_SIZE, MONITOR_CODE, MONITOR_CODE, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE)
    return sealed("ring1-stub", (head + load).ljust(PAGE_SIZE, b"\0") + bytes(ffi.buffer(page, PAGE_SIZE)))


def runs(pages: Iterable[Page]) -> list[tuple[int, int, int, int]]:
    """(va, mfn, count, protection): neighbours that are neighbours in the machine too are one mmap."""
    out: list[tuple[int, int, int, int]] = []
    for va, mfn, prot in pages:
        if out:
            first, first_mfn, count, last_prot = out[-1]
            if last_prot == prot and first + count * PAGE_SIZE == va and first_mfn + count == mfn:
                out[-1] = (first, first_mfn, count + 1, prot)
                continue
        out.append((va, mfn, 1, prot))
    return out


def packed(commands: list[Command]) -> bytes:
    """As they stand in the command page."""
    return b"".join(COMMAND.pack(*[word & U64_MASK for word in c], *(0,) * (7 - len(c))) for c in commands)


@dataclass
class _Batch:
    """`count` packed commands that run as a whole, MAX_COMMANDS at a time; `done` of them hold, `sent` are being run."""

    commands: bytes | bytearray
    count: int
    resume: Resume
    done: int = 0
    sent: int = 0


class Monitor:
    """One address space as the hypervisor sees it: what is mapped where (`shadow`), and the way to change it."""

    def __init__(self, loop: Loop, on_failure: Callable[[str], None], base: int = KERNEL_WINDOW) -> None:
        """`base`: the host address of its address 0."""
        self._loop, self._on_failure, self.base = loop, on_failure, base
        self.shadow: dict[int, tuple[int, int]] = {}  # va -> (mfn, protection): what is mapped by hand, outside page tables
        self.sock, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.command_fd = os.memfd_create("ring1-commands", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.command_fd, COMMAND_PAGES * PAGE_SIZE)
        self._page = mmap.mmap(self.command_fd, COMMAND_PAGES * PAGE_SIZE)
        fcntl.fcntl(self.command_fd, F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE)  # only this map can write
        struct.pack_into(f"<{MAX_COMMANDS + 1}I", self._page, TABLE, *range(MAX_COMMANDS + 1))
        self._queue: deque[_Batch] = deque()
        self._in_flight: _Batch | None = None
        self._deadline: Timer | None = None
        self._sent_ns = 0
        self.gone = False
        self.on_gone: Callable[[], None] | None = None  # who waits for the child's first message

    def handed_over(self) -> None:
        """The child has its copies of what the hypervisor needs no longer."""
        self.peer.close()
        if self.command_fd >= 0:
            os.close(self.command_fd)
            self.command_fd = -1

    def listen(self) -> None:
        """From now on the socket carries acknowledgements."""
        self._loop.watch(self.sock.fileno(), self._acknowledged)

    def first_word(self, seconds: float) -> Wait:
        """A Wait for (message, descriptors) of the child, or MonitorGone. Its death is seen by fail_all."""

        def wait(resume: Resume) -> None:
            if self.gone:  # it died before we were told its pid: its burial waits on this very socket already
                self._loop.soon(lambda: resume(MonitorGone("died before it was ready")))
                return
            fd = self.sock.fileno()

            def finish(value: object) -> None:
                if timer.call is not None:
                    timer.cancel()
                    self._loop.unwatch(fd)
                    self.on_gone = None
                    resume(value)

            def look() -> None:
                try:
                    finish(first_message(self.sock))
                except BlockingIOError:
                    return
                except (MonitorGone, OSError):
                    finish(MonitorGone("died before it was ready"))

            late = time.monotonic_ns() + int(seconds * 1e9)
            timer = self._loop.at(late, lambda: finish(MonitorGone("start-up timed out")))
            self.on_gone = lambda: finish(MonitorGone("died before it was ready"))
            self._loop.watch(fd, look)

        return wait

    # ---- batches

    @property
    def busy(self) -> bool:
        """Something was asked for that has not been acknowledged."""
        return self._in_flight is not None

    def batch(self, commands: list[Command]) -> Wait:
        """Run them all, up to the first that fails; resumed with None, a MonitorError or MonitorGone."""
        return self.run(packed(commands), len(commands))

    def run(self, commands: bytes | bytearray, count: int) -> Wait:
        """As `batch`, for `count` packed commands."""
        assert count and len(commands) == count * COMMAND.size

        def wait(resume: Resume) -> None:
            if self.gone:
                self._loop.soon(lambda: resume(MonitorGone()))
                return
            self._queue.append(_Batch(commands, count, resume))
            self._start()

        return wait

    def _start(self) -> None:
        if self._in_flight is None and self._queue:
            self._in_flight = self._queue.popleft()
            self._send(self._in_flight)

    def _send(self, batch: _Batch) -> None:
        batch.sent = min(MAX_COMMANDS, batch.count - batch.done)
        part = batch.commands[batch.done * COMMAND.size : (batch.done + batch.sent) * COMMAND.size]
        struct.pack_into("<I", self._page, 0, batch.sent)
        self._page[64 : 64 + len(part)] = part
        self._sent_ns = time.monotonic_ns()
        if self._deadline is None:
            self._deadline = self._loop.at(self._sent_ns + ACK_NS, self._look_at_clock)
        try:
            self.sock.send(b"!")
        except OSError:
            self._loop.soon(lambda: self._on_failure("monitor died"))

    def _look_at_clock(self) -> None:
        """One timer for all batches, set anew when it finds a younger one: a timer a batch would cost 2 us each."""
        self._deadline = None
        if self._in_flight is None:
            return
        if time.monotonic_ns() - self._sent_ns >= ACK_NS:
            self._on_failure("monitor silent for 2 s")
        else:
            self._deadline = self._loop.at(self._sent_ns + ACK_NS, self._look_at_clock)

    def _acknowledged(self) -> None:
        try:
            ack = self.sock.recv(8192)
        except BlockingIOError:
            return
        except OSError:
            ack = b""
        if not ack or self._in_flight is None:
            self._on_failure("monitor died" if not ack else "monitor spoke out of turn")
            return
        batch = self._in_flight
        error, left = len(ack) - 4, int.from_bytes(ack[:4], "little")
        batch.done += batch.sent - left - bool(error)
        if not error and batch.done < batch.count:
            self._send(batch)
            return
        self._in_flight = None
        self._start()
        batch.resume(MonitorError(batch.done, error) if error else None)

    def fail_all(self) -> None:
        """The address space ends: nobody waits for it any more. Idempotent."""
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()
        if self._deadline is not None:
            self._deadline.cancel()
        waiting = [self._in_flight] if self._in_flight else []
        waiting += self._queue
        self._in_flight = None
        self._queue.clear()
        for batch in waiting:
            self._loop.soon(lambda batch=batch: batch.resume(MonitorGone()))  # type: ignore[misc]

    # ---- mappings

    def map(self, pages: list[Page]) -> Steps:
        """Map frames; the shadow follows what was done, to the page. Raises MonitorError, MonitorGone."""
        todo = runs(pages)
        if not todo:
            return
        try:
            yield self.batch([
                (SYS_MMAP, self.base + va, n * PAGE_SIZE, prot, MAP_SHARED | MAP_FIXED,
                 FD_MACHINE_RW if prot & PROT_WRITE else FD_MACHINE_RO, mfn * PAGE_SIZE)
                for va, mfn, n, prot in todo
            ])  # fmt: skip
        except MonitorError as error:
            self._mapped(todo[: error.done])
            raise
        self._mapped(todo)

    def _mapped(self, done: list[tuple[int, int, int, int]]) -> None:
        for va, mfn, n, prot in done:
            for i in range(n):
                self.shadow[va + i * PAGE_SIZE] = (mfn + i, prot)

    def unmap(self, addresses: list[int], zero: bool = False) -> Steps:
        """Take pages away, or put a private zero page in their place; the shadow forgets them after the acknowledgement."""
        if not addresses:
            return
        prot = PROT_READ | PROT_WRITE if zero else PROT_NONE
        flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE
        try:
            yield self.batch([(SYS_MMAP, self.base + va, PAGE_SIZE, prot, flags, U64_MASK, 0) for va in addresses])
        except MonitorError as error:
            self._unmapped(addresses[: error.done])
            raise
        self._unmapped(addresses)

    def _unmapped(self, done: list[int]) -> None:
        for va in done:
            self.shadow.pop(va, None)

    def barrier(self) -> Wait:
        """A Wait for everything queued before it: a command that changes nothing (mprotect of no bytes)."""
        return self.batch([(SYS_MPROTECT, self.base, 0, PROT_NONE)])

    def lock(self, name: str) -> Steps:
        """First batch: drop descriptors, die with the hypervisor, take a name, shut its own filter."""
        program = policy.monitor()
        self._blob(0, name.encode()[:15] + b"\0")
        self._blob(64, program)
        self._blob(32, struct.pack("<HxxxxxxQ", len(program) // 8, self.base + COMMANDS + BLOB + 64))
        yield self.batch([
            (SYS_CLOSE_RANGE, 0, FD_SOCKET - 1, 0),
            (SYS_CLOSE_RANGE, FD_CODE, 0xFFFFFFFF, 0),
            (SYS_PRCTL, 1, 9),  # PR_SET_PDEATHSIG
            (SYS_PRCTL, 15, self.base + COMMANDS + BLOB),  # PR_SET_NAME
            (SYS_PRCTL, 38, 1, 0, 0, 0),  # PR_SET_NO_NEW_PRIVS
            (SYS_SECCOMP, 1, 0, self.base + COMMANDS + BLOB + 32),
        ])  # fmt: skip

    def set_trap(self, index: int, word: int) -> None:
        """A word of public.traps.TRAPS, which the entry code reads, in one store: an exception may be entering it now."""
        with memoryview(self._page)[TRAPS : TRAPS + PAGE_SIZE] as page, page.cast("Q") as words:
            words[index] = word

    def _blob(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= PAGE_SIZE
        self._page[BLOB + offset : BLOB + offset + len(data)] = data

    # ---- the end

    def hang_up(self) -> Wait:
        """Tell the monitor to leave; resumed when NOBODY holds the other end.

        A task drops its memory before its descriptors, so end-of-file proves that no holder can touch a frame any more,
        even a monitor whose pid was never learnt.
        """

        def wait(resume: Resume) -> None:
            self._loop.unwatch(self.sock.fileno())
            self.sock.shutdown(socket.SHUT_WR)

            def look() -> None:
                try:
                    while self.sock.recv(8192):
                        pass
                except BlockingIOError:
                    return
                except OSError:
                    pass
                self._loop.unwatch(self.sock.fileno())
                self.sock.close()
                self._page.close()
                resume(None)

            self._loop.watch(self.sock.fileno(), look)

        return wait


def first_message(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The child's one message and its descriptors. Raises MonitorGone at end-of-file; BlockingIOError if there is none."""
    data, ancillary, _, _ = sock.recvmsg(8192, socket.CMSG_SPACE(16))
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += list(memoryview(payload[: len(payload) // 4 * 4]).cast("i"))
    if not data:
        raise MonitorGone
    return data, fds
