"""One-way channels between two forked processes, ours and the peers', each with the same three words.

A channel is made before the fork. `sender()` and `receiver()` are called in one process each and return a function that
sends one bytes object, or waits for one (its like, where a ring fills a buffer); a receiver's b"" or single byte says that
the sender called `end()`. The parent calls `forget()` once both processes have the channel.
"""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from ringlib import SharedRing

F_SETPIPE_SZ = 1031
PIPE_BYTES = 1 << 20
QUEUE_ITEMS = 64
MEMBRIDGE_BYTES = 1 << 22
MISSES = 200
numbers = itertools.count()


def new_name() -> str:
    return f"/ring1-bench-{os.getpid()}-{next(numbers)}"


def yielding(missed: int) -> int:
    """After a look in vain, for what can only be polled: the CPU is given away each MISSES times."""
    if missed < MISSES:
        return missed + 1
    os.sched_yield()
    return 0


class Channel(Protocol):
    """What the measurements know of one."""

    pinned: bool  # whether its processes are held on a CPU each; not those with threads of their own

    def sender(self) -> Callable[[bytes], object]: ...
    def receiver(self) -> Callable[[], Any]: ...
    def end(self) -> None: ...
    def forget(self) -> None: ...


Kind = Callable[[int], Channel]  # by the size of what is sent


class Ring:
    """SharedRing, one way, records of `record` bytes; received in batches, one by one, or in a buffer of the receiver's."""

    pinned = True

    def __init__(self, record: int, how: str = "batches") -> None:
        self.name, self.record, self.how = new_name(), record, how

    def sender(self) -> Callable[[bytes], object]:
        self.ring = SharedRing.create(self.name, self.record)
        return self.ring.put

    def receiver(self) -> Callable[[], Any]:
        ring = SharedRing.attach(self.name, timeout=10)
        if self.how == "singly":
            return partial(next, iter(ring), b"")
        if self.how == "batches":
            return ring.get
        room, get, record = bytearray(ring.nr_ents * self.record), ring.get_into, self.record
        view = memoryview(room)
        return lambda: view[: get(room) * record]

    def end(self) -> None:
        self.ring.drain(10)
        self.ring.close()

    def forget(self) -> None:
        """Its sender did, in end()."""


class Pipe:
    """os.pipe, a write and a read each."""

    pinned = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.read, self.write = os.pipe()
        fcntl.fcntl(self.write, F_SETPIPE_SZ, PIPE_BYTES)

    def sender(self) -> Callable[[bytes], object]:
        os.close(self.read)
        fd, write = self.write, os.write
        return lambda data: write(fd, data)

    def receiver(self) -> Callable[[], bytes]:
        os.close(self.write)
        fd, read, size = self.read, os.read, self.size
        return lambda: read(fd, size)

    def end(self) -> None:
        os.close(self.write)

    def forget(self) -> None:
        os.close(self.read)
        os.close(self.write)


class Queue:
    """multiprocessing.Queue, whose sender has a thread."""

    pinned = False

    def __init__(self, size: int) -> None:
        self.queue: Any = multiprocessing.get_context("fork").Queue(QUEUE_ITEMS)

    def sender(self) -> Callable[[bytes], object]:
        put: Callable[[bytes], object] = self.queue.put
        return put

    def receiver(self) -> Callable[[], bytes]:
        get: Callable[[], bytes] = self.queue.get
        return get

    def end(self) -> None:
        self.queue.put(b"")
        self.queue.close()
        self.queue.join_thread()

    def forget(self) -> None:
        self.queue.close()


class Membridge:
    """membridge's ring, polled: it has no way to wait."""

    pinned = True

    def __init__(self, size: int) -> None:
        self.module: Any = importlib.import_module("membridge")
        self.name = new_name()
        self.memory = self.module.SharedMemory.create(self.name, MEMBRIDGE_BYTES + 24)
        self.ring = self.memory.spsc()

    def sender(self) -> Callable[[bytes], object]:
        push = self.ring.push

        def put(data: bytes) -> None:
            missed = 0
            while not push(data):
                missed = yielding(missed)

        self.put = put
        return put

    def receiver(self) -> Callable[[], bytes]:
        pop = self.ring.pop

        def get() -> bytes:
            missed = 0
            while (data := pop()) is None:
                missed = yielding(missed)
            return data  # type: ignore[no-any-return]

        return get

    def end(self) -> None:
        self.put(b"\0")

    def forget(self) -> None:
        self.module.SharedMemory.remove(self.name)


def absent(module: str) -> str | None:
    """Why it cannot be measured, if so."""
    return None if importlib.util.find_spec(module) else "not installed"
