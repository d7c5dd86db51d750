"""System calls on memory (mm/mmap.c, mm/mremap.c, mm/madvise.c)."""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from domain.posix.errors import Errno
from domain.posix.table import signed32, syscall
from domain.posix.vma import PROT_WRITE, USER_START, page_up
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.posix.task import Task

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_32BIT = 1, 2, 0x10, 0x20, 0x10_0000, 0x40
MAP_TYPE, SHARED_VALIDATE = 0xF, 3
MAP_POPULATE = 0x8000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED, MADV_FREE = 4, 8
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4


@syscall(9, "partial", "who has a page mapped keeps it when the file is truncated; its mtime changes with msync")
def sys_mmap(task: Task, address: int, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
    memory, kind = task.memory, flags & MAP_TYPE
    if not size or kind not in (MAP_SHARED, MAP_PRIVATE, SHARED_VALIDATE) or offset % PAGE_SIZE:
        raise Errno(errno.EINVAL)
    inode = None
    if not flags & MAP_ANONYMOUS:
        file = task.files.get(signed32(fd))
        if not file.readable or (kind != MAP_PRIVATE and prot & 2 and not file.writable):
            raise Errno(errno.EACCES)
        inode = file.inode
        if stat.S_ISCHR(inode.mode) and file.pread(task, 1, 0) == b"\0":  # /dev/zero
            inode = None
        elif not stat.S_ISREG(inode.mode):
            raise Errno(errno.ENODEV)
    size = page_up(size)
    if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
        if address % PAGE_SIZE or not address:
            raise Errno(errno.EINVAL if address else errno.EPERM)
        if flags & MAP_FIXED_NOREPLACE and memory.areas.overlapping(address, address + size):
            raise Errno(errno.EEXIST)
    elif address:
        address &= -PAGE_SIZE
        if address < USER_START or memory.areas.overlapping(address, address + size) or address + size > 0x7F_F000_0000:
            address = 0
    if not flags & MAP_FIXED and flags & MAP_32BIT and not address:
        address = memory.areas.gap(size, 1 << 31) or 0
    where = memory.map(address, size, prot, kind != MAP_PRIVATE, inode, offset)
    if flags & MAP_POPULATE:
        for at in range(where, where + size, 16 * PAGE_SIZE):
            memory.fault(at, bool(prot & 2))
    return where


@syscall(10)
def sys_mprotect(task: Task, address: int, size: int, prot: int) -> int:
    if address % PAGE_SIZE:
        raise Errno(errno.EINVAL)
    if size:
        task.memory.protect(address, size, prot)
    return 0


@syscall(11)
def sys_munmap(task: Task, address: int, size: int) -> int:
    if address % PAGE_SIZE or not size or address + size > 1 << 39:
        raise Errno(errno.EINVAL)
    task.memory.unmap(address, size)
    return 0


@syscall(12)
def sys_brk(task: Task, address: int) -> int:
    return task.memory.brk(address)


@syscall(25)
def sys_mremap(task: Task, address: int, old: int, new: int, flags: int, target: int) -> int:
    if address % PAGE_SIZE or not new or flags & ~3:
        raise Errno(errno.EINVAL)
    if flags & MREMAP_FIXED and (not flags & MREMAP_MAYMOVE or target % PAGE_SIZE):
        raise Errno(errno.EINVAL)
    return task.memory.remap(address, old, new, bool(flags & MREMAP_MAYMOVE), target if flags & MREMAP_FIXED else 0)


@syscall(26)
def sys_msync(task: Task, address: int, size: int, flags: int) -> int:
    """The file has the bytes already; that it was changed it learns here."""
    if address % PAGE_SIZE or flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC) or (flags & MS_ASYNC and flags & MS_SYNC):
        raise Errno(errno.EINVAL)
    end = address + page_up(size)
    areas = task.memory.areas.overlapping(address, end)
    for vma in areas:
        if vma.shared and vma.file is not None and vma.prot & PROT_WRITE:
            vma.file.modified()
    if sum(min(vma.end, end) - max(vma.start, address) for vma in areas) != end - address:
        raise Errno(errno.ENOMEM)
    return 0


@syscall(28, "partial", "DONTNEED and FREE empty private pages; other advice is accepted")
def sys_madvise(task: Task, address: int, size: int, advice: int) -> int:
    if address % PAGE_SIZE:
        raise Errno(errno.EINVAL)
    if advice in (MADV_DONTNEED, MADV_FREE):
        task.memory.discard(address, address + page_up(size))
    return 0


@syscall(149, "none", "nothing is ever paged out")
def sys_mlock(task: Task, address: int, size: int) -> int:
    return 0


@syscall(150, "none", "nothing is ever paged out")
def sys_munlock(task: Task, address: int, size: int) -> int:
    return 0
