"""How the kernel reads and writes a program's memory: with the program's rights, page by page, as a fault of it would go."""

from __future__ import annotations

import errno

from domain import memory
from domain._guest import ffi
from domain.posix.errors import Errno
from domain.posix.frames import Frames
from domain.posix.vma import USER_END, USER_START
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE

OK, MAPERR, ACCERR, BUSERR = range(4)  # what a fault comes to; 1 and 2 are SEGV_MAPERR and SEGV_ACCERR
READABLE, WRITABLE = 2, 1  # low bits of a value of `pages`; the frame is above them
STRING_MAX = 4096


class Accesses:
    """What memory.Memory has of it."""

    frames: Frames
    pages: dict[int, int]

    def fault(self, address: int, write: bool, fetch: bool = False) -> int:
        raise NotImplementedError

    def copy_in(self, address: int, size: int) -> bytes:
        """A copy of what the program has there. Raises Errno(EFAULT)."""
        offset = address & PAGE_SIZE - 1
        if offset + size <= PAGE_SIZE:
            value = self.pages.get(address >> PAGE_SHIFT, 0)
            if value & READABLE or self._touch(address, size, False):
                at = self.frames.address(self.pages[address >> PAGE_SHIFT] >> 2) + offset
                return bytes(ffi.buffer(ffi.cast("char *", at), size))
            return b""
        parts = []
        while size:
            count = min(size, PAGE_SIZE - (address & PAGE_SIZE - 1))
            parts.append(self.copy_in(address, count))
            address, size = address + count, size - count
        return b"".join(parts)

    def copy_out(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Raises Errno(EFAULT); what came before the page that cannot be written is written."""
        view, size, done = memoryview(data), len(data), 0
        while done < size:
            offset = address & PAGE_SIZE - 1
            count = min(size - done, PAGE_SIZE - offset)
            if not self.pages.get(address >> PAGE_SHIFT, 0) & WRITABLE:
                self._touch(address, count, True)
            memory.write(self.frames.address(self.pages[address >> PAGE_SHIFT] >> 2) + offset, view[done : done + count])
            address, done = address + count, done + count

    def string(self, address: int, limit: int = STRING_MAX) -> bytes:
        """Up to the null byte. Raises Errno(EFAULT), Errno(ENAMETOOLONG): none within `limit`."""
        found = b""
        while len(found) < limit:
            count = PAGE_SIZE - (address & PAGE_SIZE - 1)
            part = self.copy_in(address, count)
            end = part.find(0)
            if end >= 0:
                found += part[:end]
                break
            found, address = found + part, address + count
        if len(found) >= limit:
            raise Errno(errno.ENAMETOOLONG)
        return found

    def word(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.copy_in(address, size), "little")

    def _touch(self, address: int, size: int, write: bool) -> bool:
        """Make one page accessible to us as it is to the program; False: nothing is to be copied."""
        if not size:
            return False
        if not USER_START <= address < USER_END or self.fault(address, write) != OK:
            raise Errno(errno.EFAULT)
        return True
