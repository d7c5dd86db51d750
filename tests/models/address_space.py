"""The other end of a monitor's socket, in this process: an address space that is a dictionary, and obeys when told to.

It does what gate.c's loop does with a batch, so that a test decides when a monitor acknowledges, where it fails and when
it dies, and can then ask what the domain could really touch.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from collections.abc import Callable

from hypervisor.gate.monitor import (
    FD_MACHINE_RO,
    FD_MACHINE_RW,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    SYS_MMAP,
    SYS_MPROTECT,
)
from hypervisor.loop import Loop
from hypervisor.public.layout import COMMAND_PAGES, KERNEL_WINDOW, NR_WINDOWS, SPACE_BYTES
from hypervisor.public.types import PAGE_SIZE
from tests.conftest import TIMEOUT

ZERO = -1  # the mfn of a private zero page
ENOMEM = 12


class AddressSpace:
    """`pages`: offset from the first window -> (mfn or ZERO, writable), what the host kernel would have mapped."""

    base, size = KERNEL_WINDOW, NR_WINDOWS * SPACE_BYTES  # in the host's address space

    def __init__(self, peer: int, command_fd: int) -> None:
        """Of the descriptors that the hypervisor hands over."""
        self.sock = socket.socket(fileno=os.dup(peer))
        self.sock.setblocking(False)
        self._page = mmap.mmap(command_fd, COMMAND_PAGES * PAGE_SIZE, prot=mmap.PROT_READ)
        self.pages: dict[int, tuple[int, bool]] = {}
        self.commands = 0
        self.dead = False

    def waiting(self) -> bool:
        """A batch came and was not run yet."""
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, OSError):
            return False

    def serve(self, fail_at: int | None = None, error: int = ENOMEM) -> int:
        """Run one batch, up to command `fail_at`, which fails; acknowledge it. Returns how many were run."""
        assert self.sock.recv(64) == b"!"
        (count,) = struct.unpack_from("<I", self._page, 0)
        assert 0 < count <= 64
        done, ack = count, 4
        for i in range(count):
            if i == fail_at:
                done, ack = i, 4 + error
                break
            self._run(*struct.unpack_from("<7Q", self._page, 64 + 56 * i))
        left = count - done - (ack > 4)
        self.commands += done
        at = PAGE_SIZE + 4 * left  # the table of answers
        self.sock.send(self._page[at : at + ack])
        return done

    def _run(self, nr: int, address: int, size: int, prot: int, flags: int, fd: int, offset: int) -> None:
        if nr == SYS_MPROTECT and size == 0:
            return
        assert nr == SYS_MMAP and flags & MAP_FIXED and size % PAGE_SIZE == 0 and offset % PAGE_SIZE == 0, (nr, flags, size)
        first = address - self.base
        assert first % PAGE_SIZE == 0 and first >= 0 and first + size <= self.size
        if flags & MAP_ANONYMOUS and prot == PROT_NONE:  # of any size: half a window at once
            gone = range(first, first + size)
            few = gone[::PAGE_SIZE] if size <= PAGE_SIZE * len(self.pages) else [va for va in self.pages if va in gone]
            for va in few:
                self.pages.pop(va, None)
            return
        for i in range(size // PAGE_SIZE):
            if flags & MAP_ANONYMOUS:
                assert prot == PROT_READ | PROT_WRITE
                self.pages[first + i * PAGE_SIZE] = ZERO, True
            else:
                assert flags & MAP_SHARED and fd == (FD_MACHINE_RW if prot & PROT_WRITE else FD_MACHINE_RO)
                self.pages[first + i * PAGE_SIZE] = offset // PAGE_SIZE + i, bool(prot & PROT_WRITE)

    def die(self) -> None:
        """The task ends: its memory first, then its descriptors."""
        if not self.dead:
            self.dead = True
            self.pages.clear()
            self._page.close()
            self.sock.close()


class BusyLoop(Loop):
    """A loop that never sleeps, because something is always ready; `until` turns it, `settle` turns it a few times."""

    def __init__(self) -> None:
        super().__init__()
        self._ready = os.eventfd(1)
        self.watch(self._ready, lambda: None)

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not done():
            self.step()
            assert time.monotonic() < deadline, "it never came"

    def settle(self, turns: int = 4) -> None:
        """What is under way inside this process goes as far as it can: each turn takes everything that is ready."""
        for _ in range(turns):
            self.step()

    def close(self) -> None:
        self._epoll.close()
        os.close(self._ready)
