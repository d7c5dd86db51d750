"""The object behind a SharedRing: how it comes to be, its control page, and the processes at its two ends.

It is a control page, the ring, payload, and, where the ring goes two ways, as many pages again to keep requests in. On the
control page: u32 magic, request_size, response_size, ring pages, payload pages; a line of each side @64 and @128
(shared.h), of which u32 pid @12 and u64 start time @16 say who that side is.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import struct
from pathlib import Path
from typing import NamedTuple

import posix_ipc

from ringlib.ring import Broken, Busy

PAGE = mmap.PAGESIZE
RING_HEADER = 64
FRONT, BACK = 0, 1
HEAD = struct.Struct("<5I")
MAGIC = 0x33676E72
WHO = struct.Struct("<IQ")  # as it lies in the file: pid @12 of a side's line, start time @16
WHO_AT = (64 + 12, 128 + 12)
MAX_PAGES = 1 << 20


class Sizes(NamedTuple):
    """What the control page says of the rest: records in bytes, the parts behind it in pages."""

    request: int
    response: int
    ring: int
    payload: int

    @property
    def bytes(self) -> int:
        """Of the whole object."""
        return (1 + self.ring + self.payload + self.kept) * PAGE

    @property
    def kept(self) -> int:
        """Pages at the end: requests, while a back writes answers over them. One way there are no answers."""
        return self.ring if self.response else 0

    @property
    def possible(self) -> bool:
        room = self.ring * PAGE - RING_HEADER
        return 0 < self.request <= room and 0 <= self.response <= room and max(0, self.ring, self.payload) <= MAX_PAGES


# ---- names


def make(name: str, sizes: Sizes, replace: bool) -> int:
    """A descriptor of a new object, locked and signed by its front, every page of it allotted; `ready` ends its making.

    replace: in the place of a ring whose front has ended. Raises FileExistsError, OSError; to replace, Busy and Broken.
    """
    while True:
        try:
            fd: int = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=sizes.bytes).fd
        except posix_ipc.ExistentialError:
            if not replace:
                raise FileExistsError(errno.EEXIST, "shared memory exists", name) from None
            _remove_dead(name)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            sign(fd, FRONT, os.getpid())
            os.posix_fallocate(fd, 0, sizes.bytes)  # a full /dev/shm is an error now, not SIGBUS later
        except BaseException:
            discard(name, fd)
            raise
        return fd


def ready(fd: int, sizes: Sizes) -> None:
    """It is a ring from now on."""
    os.pwrite(fd, HEAD.pack(MAGIC, *sizes), 0)
    fcntl.flock(fd, fcntl.LOCK_UN)


def find(name: str) -> tuple[int, Sizes]:
    """A descriptor of the object, locked, since of two that attach at once one is first. Raises FileNotFoundError, Broken."""
    fd = _open(name)
    try:
        magic, *numbers = _head(fd)
        if magic == 0:
            raise FileNotFoundError(errno.ENOENT, "shared memory is not a ring yet", name)
        sizes = Sizes(*numbers)
        if magic != MAGIC or not sizes.possible or os.fstat(fd).st_size != sizes.bytes:
            raise Broken(f"{name} is not a ring")
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException:
        os.close(fd)
        raise
    return fd, sizes


def discard(name: str, fd: int) -> None:
    """Close it, and unlink the name if it is still this object's."""
    try:
        if os.fstat(fd).st_nlink:
            posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        pass
    finally:
        os.close(fd)


def _open(name: str) -> int:
    try:
        fd: int = posix_ipc.SharedMemory(name).fd
    except posix_ipc.ExistentialError:
        raise FileNotFoundError(errno.ENOENT, "no shared memory", name) from None
    return fd


def _head(fd: int) -> tuple[int, ...]:
    return HEAD.unpack(os.pread(fd, HEAD.size, 0).ljust(HEAD.size, b"\0"))


def _remove_dead(name: str) -> None:
    """Unlink a ring, or what was to become one, whose front has ended. Raises Busy, Broken."""
    try:
        fd = _open(name)
    except FileNotFoundError:
        return  # somebody else was faster
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # waits for one that is being made
        if os.fstat(fd).st_nlink == 0:
            return
        pid, born = who(fd, FRONT)
        if _head(fd)[0] not in (0, MAGIC) or not pid:
            raise Broken(f"{name} is not a ring")
        if (pidfd := living(pid, born)) is not None:
            os.close(pidfd)
            raise Busy(f"{name} has a front")
        posix_ipc.unlink_shared_memory(name)
    finally:
        os.close(fd)


# ---- processes


def sign(fd: int, side: int, pid: int) -> None:
    """Say who that side is, 0: nobody; the number last, so that nobody reads it beside another's start time."""
    at = WHO_AT[side]
    os.pwrite(fd, bytes(4), at)
    os.pwrite(fd, WHO.pack(0, born(pid)), at)
    os.pwrite(fd, pid.to_bytes(4, "little"), at)


def who(fd: int, side: int) -> tuple[int, int]:
    """The process at that side and when it started, as it says; 0: it has not come yet, or has gone."""
    pid, since = WHO.unpack(os.pread(fd, WHO.size, WHO_AT[side]).ljust(WHO.size, b"\0"))
    return pid, since


def living(pid: int, since: int) -> int | None:
    """A descriptor of the process, if it lives; the start time tells it from a later one of that number."""
    try:
        fd = os.pidfd_open(pid) if pid else None
    except (ProcessLookupError, OverflowError):  # the latter: a number that a peer made up
        return None
    if fd is not None and (ended(fd) or born(pid) != since):
        os.close(fd)
        return None
    return fd


def ended(pidfd: int) -> bool:
    """Also of a zombie, which a kill(pid, 0) still finds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def born(pid: int) -> int:
    """When it started, in clock ticks since boot; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return 0


class Peer:
    """Whoever is at a side: looked up each time, since another may have come, and held by a descriptor while the same."""

    def __init__(self, fd: int, side: int) -> None:
        self._fd, self._side = fd, side
        self._who = (0, 0)
        self._pidfd: int | None = None

    def lives(self) -> bool:
        """True also of one that has not come yet."""
        found = who(self._fd, self._side)
        if found[0] == 0:
            return True
        if found != self._who:
            self.forget()
            self._who, self._pidfd = found, living(*found)
        return self._pidfd is not None and not ended(self._pidfd)

    def forget(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._who, self._pidfd = (0, 0), None
