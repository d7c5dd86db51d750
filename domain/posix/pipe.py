"""Pipes, named and unnamed.

The buffer is Linux's to the byte (`fs/pipe.c`): sixteen slots of a page; a write begins on the last page where all of its odd
part fits there, and in a fresh slot otherwise. So a write of at most PIPE_BUF is whole or not at all, and a program that counts
on the capacity meets the one it knows.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import deque
from typing import Any

from domain.posix.errors import Errno
from domain.posix.files import (
    O_ACCMODE,
    POLLERR,
    POLLHUP,
    POLLIN,
    POLLOUT,
    POLLRDNORM,
    POLLWRNORM,
    File,
)
from domain.posix.inode import PAGE, Fifo
from domain.posix.wait import WaitQueue

SLOTS = 16
MAX_SLOTS = 256  # 1 MiB, /proc/sys/fs/pipe-max-size


class Pipe:
    def __init__(self) -> None:
        self.slots: deque[list[Any]] = deque()  # [page, start]: what was read stays in front until the slot is empty
        self.size = SLOTS
        self.readers = self.writers = 0
        self.reader_count = self.writer_count = 0  # opens ever: whoever waits for the other end sees one that has left again
        self.readable, self.writable, self.opened = WaitQueue(), WaitQueue(), WaitQueue()

    @property
    def length(self) -> int:
        return sum(len(page) - start for page, start in self.slots)

    @property
    def full(self) -> bool:
        return len(self.slots) >= self.size

    def read(self, count: int) -> bytes:
        parts = []
        while count and self.slots:
            slot = self.slots[0]
            page, start = slot
            part = page[start : start + count]
            parts.append(part)
            count -= len(part)
            slot[1] += len(part)
            if slot[1] == len(page):
                self.slots.popleft()
        if parts:
            self.writable.wake()
        return b"".join(parts)

    def put_back(self, data: bytes) -> None:
        """In front, where it came from: `read` has just made the room."""
        for end in range(len(data), 0, -PAGE):
            self.slots.appendleft([bytearray(data[max(0, end - PAGE) : end]), 0])
        self.readable.wake()

    def write(self, data: bytes) -> int:
        """How many bytes there was room for."""
        done = 0
        odd = len(data) % PAGE
        if odd and self.slots and len(self.slots[-1][0]) + odd <= PAGE:
            self.slots[-1][0] += data[:odd]
            done = odd
        while done < len(data) and not self.full:
            part = bytearray(data[done : done + PAGE])
            self.slots.append([part, 0])
            done += len(part)
        if done:
            self.readable.wake()
        return done

    def resize(self, size: int) -> int:
        """F_SETPIPE_SZ. Errors: EBUSY where the content needs more, EPERM beyond the limit."""
        slots = 1 << max(0, (-(-size // PAGE) - 1)).bit_length() if size else 1
        if slots > MAX_SLOTS:
            raise Errno(errno.EPERM)
        if slots < len(self.slots):
            raise Errno(errno.EBUSY)

        self.size = slots
        self.writable.wake()
        return slots * PAGE


class PipeFile(File):
    """One open end; O_RDWR, which FIFOs allow, is both."""

    inode: Fifo

    def __init__(self, inode: Fifo, flags: int) -> None:
        super().__init__(inode, flags)
        if inode.pipe is None:
            inode.pipe = Pipe()
        assert isinstance(inode.pipe, Pipe)
        self.pipe: Pipe = inode.pipe
        alone = self.named and flags & os.O_NONBLOCK and not self.pipe.writers
        self.writers_seen = self.pipe.writer_count if alone else -1  # who did not wait for a writer is hung up on after one
        if self.readable:
            self.pipe.readers += 1
            self.pipe.reader_count += 1
        if self.writable:
            self.pipe.writers += 1
            self.pipe.writer_count += 1
        self.pipe.opened.wake()

    @property
    def named(self) -> bool:
        return self.inode.fs.kind != "pipefs"

    def read(self, task: Any, count: int) -> bytes:
        if not count:
            return b""
        if not self.pipe.slots:
            if self.pipe.writers:
                raise Errno(errno.EAGAIN)
            return b""

        return self.pipe.read(count)

    def put_back(self, data: bytes) -> None:
        self.pipe.put_back(data)

    def write(self, task: Any, data: bytes) -> int:
        if not data:
            return 0
        if not self.pipe.readers:
            task.process.send_signal(signal.SIGPIPE)
            raise Errno(errno.EPIPE)
        done = self.pipe.write(data)
        if not done:
            raise Errno(errno.EAGAIN)

        return done

    def poll_events(self) -> int:
        events = 0
        if self.readable:
            if self.pipe.slots:
                events |= POLLIN | POLLRDNORM
            if not self.pipe.writers and self.writers_seen != self.pipe.writer_count:
                events |= POLLHUP
        if self.writable:
            if not self.pipe.full:
                events |= POLLOUT | POLLWRNORM
            if not self.pipe.readers:
                events |= POLLERR
        return events

    def queues(self) -> tuple[WaitQueue, ...]:
        return self.pipe.readable, self.pipe.writable

    def released(self) -> None:
        super().released()
        pipe = self.pipe
        pipe.readers -= self.readable
        pipe.writers -= self.writable
        if not pipe.readers and not pipe.writers:
            self.inode.pipe = None
        pipe.readable.wake()
        pipe.writable.wake()


def open_pipe(fifo: Fifo, flags: int) -> tuple[PipeFile, PipeFile]:
    reader = PipeFile(fifo, os.O_RDONLY | flags)
    writer = PipeFile(fifo, os.O_WRONLY | flags)
    return reader, writer


def opened(file: PipeFile) -> bool:
    """Whether the open of a FIFO may return: the other end is there, or was. Errors: ENXIO for a writer that does not wait.

    An unnamed pipe that is opened through /proc waits for nobody: its other end may be gone for good."""
    mode = file.flags & O_ACCMODE
    pipe = file.pipe
    if mode == os.O_RDWR or not file.named:
        return True
    if mode == os.O_RDONLY:
        return bool(pipe.writers or file.flags & os.O_NONBLOCK)
    if not pipe.readers and file.flags & os.O_NONBLOCK:
        raise Errno(errno.ENXIO)
    return bool(pipe.readers)
