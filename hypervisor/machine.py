"""Machine memory: one POSIX shared memory object, reserved whole, opened read-write and read-only, then nameless.

posix_fallocate makes a full /dev/shm an error at start instead of a SIGBUS later. Read-only mappings are made through the
read-only descriptor, so that the host kernel itself refuses to upgrade them. After fchmod 0 and unlink nobody reopens it.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import posix_ipc

from hypervisor._hv import ffi, lib
from hypervisor.public.types import PAGE_SIZE


class MachineMemory:
    """`nr_frames` frames; `rw` and `ro` are the two descriptors, both close-on-exec."""

    def __init__(self, nr_frames: int, name: str) -> None:
        self.nr_frames, self.name = nr_frames, name
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=nr_frames * PAGE_SIZE)
        self.rw: int = shm.fd
        try:
            try:
                os.posix_fallocate(self.rw, 0, nr_frames * PAGE_SIZE)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise MemoryError(f"/dev/shm has no {nr_frames * PAGE_SIZE >> 20} MiB free for machine memory") from None
                raise
            self.ro: int = posix_ipc.SharedMemory(name, read_only=True).fd
            os.fchmod(self.rw, 0)
        finally:
            posix_ipc.unlink_shared_memory(name)
        for fd in (self.rw, self.ro):
            os.set_inheritable(fd, False)
        self._map = mmap.mmap(self.rw, nr_frames * PAGE_SIZE)
        self._base: Any = ffi.cast("char *", ffi.from_buffer(self._map))

    @property
    def base(self) -> Any:
        """char * to frame 0."""
        return self._base

    def pointer(self, mfn: int) -> Any:
        """char * to a frame, for the C that touches what a guest may be changing."""
        return self._base + mfn * PAGE_SIZE

    def read(self, mfn: int, offset: int, size: int) -> bytes:
        """One copy of bytes within a frame, or frames that follow it."""
        start = mfn * PAGE_SIZE + offset
        return self._map[start : start + size]

    def write(self, mfn: int, offset: int, data: bytes | bytearray) -> None:
        start = mfn * PAGE_SIZE + offset
        self._map[start : start + len(data)] = data

    def scrub(self, mfn: int, count: int = 1) -> None:
        """Zero frames, before they change owner."""
        lib.scrub(self._base + mfn * PAGE_SIZE, count * PAGE_SIZE)
