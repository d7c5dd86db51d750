"""Machine memory: one POSIX shared memory object, reserved whole, opened read-write and read-only, then nameless.
The M2P beside it is the one table of the hypervisor's that every guest reads.

posix_fallocate makes a full /dev/shm an error at start instead of a SIGBUS later. Read-only mappings are made through the
read-only descriptor, so that the host kernel itself refuses to upgrade them. After fchmod 0 and unlink nobody reopens it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Any

import posix_ipc

from hypervisor._hv import ffi, lib
from hypervisor.gate.monitor import F_ADD_SEALS, SEAL_FUTURE_WRITE, SEAL_GROW, SEAL_SEAL, SEAL_SHRINK
from hypervisor.public.layout import M2P_BYTES
from hypervisor.public.types import PAGE_SIZE

MFD_EXEC = 0x10


class MachineMemory:
    """`nr_frames` frames; `rw` and `ro` are the two descriptors, both close-on-exec.

    Where /dev/shm is mounted noexec (containers), code could not run from it: then the object is a sealed memfd, which has
    no mount to be noexec. `kind` says which.
    """

    def __init__(self, nr_frames: int, name: str) -> None:
        self.nr_frames, self.name, self.kind = nr_frames, name, "POSIX shared memory"
        size = nr_frames * PAGE_SIZE
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
        self.rw: int = shm.fd
        try:
            if may_execute(self.rw):
                _reserve(self.rw, size, "/dev/shm")
                self.ro: int = posix_ipc.SharedMemory(name, read_only=True).fd
            else:
                os.close(self.rw)
                self.kind = "a sealed memfd (/dev/shm is mounted noexec)"
                self.rw, self.ro = _memfd(size)
            os.fchmod(self.rw, 0)
        finally:
            posix_ipc.unlink_shared_memory(name)
        for fd in (self.rw, self.ro):
            os.set_inheritable(fd, False)
        self._map = mmap.mmap(self.rw, size)
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

    def copy(self, mfn: int, source: int) -> None:
        """One frame over another."""
        lib.copy_page(self._base + mfn * PAGE_SIZE, self._base + source * PAGE_SIZE)


class M2P:
    """Machine to physical: the pfn of every frame, as its owner says, read-only in every space at layout.M2P.

    `pfn` is a uint64_t *, the one way to write it: the object is sealed against every mapping but this older one. `ro` is
    the descriptor that spaces map, close-on-exec; `size` its bytes, whole pages. Raises MemoryError.
    """

    def __init__(self, nr_frames: int) -> None:
        self.size = -(-8 * nr_frames // PAGE_SIZE) * PAGE_SIZE
        if self.size > M2P_BYTES:
            raise MemoryError(f"{nr_frames} frames: the machine has at most {M2P_BYTES // 8}, what the M2P has room for")
        fd = os.memfd_create("ring1-m2p", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, self.size)
        _reserve(fd, self.size, "memory")
        self._map = mmap.mmap(fd, self.size)
        self._map[:] = b"\xff" * self.size  # INVALID_PFN
        fcntl.fcntl(fd, F_ADD_SEALS, SEAL_SEAL | SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE)
        self.ro = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(fd)
        self.pfn: Any = ffi.cast("uint64_t *", ffi.from_buffer(self._map))


def may_execute(fd: int) -> bool:
    """Whether code may be mapped from this object."""
    try:
        mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC).close()
    except PermissionError:
        return False
    return True


def _reserve(fd: int, size: int, where: str) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise MemoryError(f"{where} has no {size >> 20} MiB free for machine memory") from None
        raise


def _memfd(size: int) -> tuple[int, int]:
    """Read-write and read-only descriptors of one memfd of a fixed size."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("ring1-machine", flags | MFD_EXEC)
    except OSError:
        fd = os.memfd_create("ring1-machine", flags)  # before Linux 6.3 every memfd may execute
    os.ftruncate(fd, size)
    _reserve(fd, size, "memory")
    fcntl.fcntl(fd, F_ADD_SEALS, SEAL_SEAL | SEAL_SHRINK | SEAL_GROW)
    return fd, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
