"""SharedRing: a ring between two processes of one user, by name, with no domain in sight.

    with SharedRing.create("/jobs", 64) as ring:           with SharedRing.attach("/jobs", timeout=5) as ring:
        for i in range(1000):                                  for record in ring:
            ring.put(bytes(64))                                    ...
        ring.drain()

The creator is the front and sends requests of `request_size` bytes, the attacher the back and sends responses of
`response_size`. With no response size the ring goes one way: what the back takes is answered by ringlib with nothing, by the
quarter ring or when the back comes for more and there is none.

A batch is one bytes-like object of packed records, published whole or not at all; a call costs the same for one record or
a hundred. An end belongs to one thread of one process: a forked child attaches by name.

The object is a control page, the ring as io/ring.h has it, and, where asked for, `payload`: memory that records may point
into, so that large things need not be copied.

Both ends hold the object, so a peer can shrink it: the ring then raises Broken, but a touch of `payload` is SIGBUS.

Control page: u32 magic, request_size, response_size, ring pages, payload pages; a line of each side @64 and @128
(shared.c), of which u32 pid @12 and u64 start time @16 say who that side is.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import posix_ipc

from ringlib._ring import ffi, lib
from ringlib.ring import Broken, Busy, Closed, Records, WouldBlock

PAGE = mmap.PAGESIZE
RING_HEADER = 64
FRONT, BACK = 0, 1
HEAD = struct.Struct("<5I")
MAGIC = 0x32676E72
WHO = struct.Struct("<IQ")  # as it lies in the file: pid @12 of a side's line, start time @16
WHO_AT = (64 + 12, 128 + 12)
MAX_PAGES = 1 << 20
SPIN_NS = 20_000  # less than a sleep and a wake-up across CPUs cost
LOOK_SECONDS = 0.05  # a sleeper looks this often whether its peer still lives
ATTACH_SECONDS = 0.001  # and an attacher whether the ring is there


class SharedRing:
    """One end. `put` publishes what this end sends, `get` takes what the other end sent."""

    def __init__(self, name: str, fd: int, side: int, sizes: Sequence[int]) -> None:
        """create and attach call this; `fd` is ours once it returns. sizes: request, response, ring pages, payload pages."""
        self.name, self._fd, self._side = name, fd, side
        request, response, ring, payload = sizes
        self.sent_size, self.received_size = (request, response) if side == FRONT else (response, request)
        self._owner = os.getpid()
        self._peer: tuple[int, int] = (0, 0)
        self._pidfd: int | None = None
        self._kept = b""
        size = (1 + ring + payload) * PAGE
        self._map: mmap.mmap | None = mmap.mmap(fd, size)
        self._payload = memoryview(self._map)[(1 + ring) * PAGE :]
        self._state: Any = ffi.new("char[]", lib.SHARED_STATE)
        self._c_publish: Callable[[Any, Any, int, int], int] = lib.shared_publish
        self._c_take: Callable[[Any, Any, int, int], int] = lib.shared_take
        self._unpack: Callable[[Any, int], bytes] = ffi.unpack
        base = ffi.from_buffer(self._map)
        self.nr_ents = lib.shared_open(self._state, base, size, ring * PAGE, side, request, response)
        if self.nr_ents < 0:
            raise Broken("no record fits the ring, or somebody shrank it")
        self._out: Any = ffi.new("char[]", max(1, self.nr_ents * self.received_size))
        _sign(fd, side, self._owner, _born(self._owner))

    # ---- life

    @classmethod
    def create(cls, name: str, request_size: int, response_size: int = 0, *, pages: int = 16, payload: int = 0) -> SharedRing:
        """Make the object `name` ("/..."), mode 0600, and be its front.

        pages: of the ring; entries are the power of two of records that fits. payload: bytes. Raises FileExistsError (a
        creator that was killed leaves its name: posix_ipc.unlink_shared_memory), ValueError, OSError (ENOSPC: no room).
        """
        sizes = (request_size, response_size, pages, -(-payload // PAGE))
        if not _possible(*sizes):
            raise ValueError(f"impossible sizes: request {request_size}, response {response_size}, {pages} pages, {payload}")
        try:
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=(1 + sizes[2] + sizes[3]) * PAGE)
        except posix_ipc.ExistentialError:
            raise FileExistsError(errno.EEXIST, "shared memory exists", name) from None
        try:
            os.posix_fallocate(shm.fd, 0, shm.size)  # a full /dev/shm is an error now, not SIGBUS later
            ring = cls(name, shm.fd, FRONT, sizes)
        except BaseException:
            os.close(shm.fd)
            posix_ipc.unlink_shared_memory(name)
            raise
        os.pwrite(shm.fd, HEAD.pack(MAGIC, *sizes), 0)  # last: the ring is ready
        return ring

    @classmethod
    def attach(cls, name: str, timeout: float = 0) -> SharedRing:
        """Be the back of `name`, waiting `timeout` seconds for it to be made.

        What a back that died took and did not answer is taken again. Raises FileNotFoundError, Busy (it has a living back),
        Broken (not a ring).
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return cls._attach(name)
            except FileNotFoundError:
                if time.monotonic() >= end:
                    raise
                time.sleep(ATTACH_SECONDS)

    @classmethod
    def _attach(cls, name: str) -> SharedRing:
        try:
            fd = posix_ipc.SharedMemory(name).fd
        except posix_ipc.ExistentialError:
            raise FileNotFoundError(errno.ENOENT, "no shared memory", name) from None
        try:
            magic, *sizes = HEAD.unpack(os.pread(fd, HEAD.size, 0).ljust(HEAD.size, b"\0"))
            if magic == 0:
                raise FileNotFoundError(errno.ENOENT, "shared memory is not a ring yet", name)
            if magic != MAGIC or not _possible(*sizes) or os.fstat(fd).st_size != (1 + sizes[2] + sizes[3]) * PAGE:
                raise Broken(f"{name} is not a ring")
            fcntl.flock(fd, fcntl.LOCK_EX)  # of two that attach at once, one is first
            if (pidfd := _pidfd(*WHO.unpack(os.pread(fd, WHO.size, WHO_AT[BACK])))) is not None:
                os.close(pidfd)
                raise Busy(f"{name} has a back")
            ring = cls(name, fd, BACK, sizes)
        except BaseException:
            os.close(fd)
            raise
        fcntl.flock(fd, fcntl.LOCK_UN)
        return ring

    def close(self) -> None:
        """Tell the peer, which still takes what is there, and let go; the creator unlinks the name. Idempotent."""
        if self._map is None:
            return
        ours = os.getpid() == self._owner  # a forked child only lets go of its copy
        lib.shared_close(self._state, ours)
        if ours and self._side == BACK:
            _sign(self._fd, BACK, 0, 0)  # another may come
        self._map, self._payload = None, memoryview(b"")  # unmapped when the last view of it goes
        os.close(self._fd)
        if self._pidfd is not None:
            os.close(self._pidfd)
        if ours and self._side == FRONT:
            try:
                posix_ipc.unlink_shared_memory(self.name)
            except posix_ipc.ExistentialError:
                pass

    def __enter__(self) -> SharedRing:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- data

    @property
    def payload(self) -> memoryview:
        """The memory beside the ring, shared and writable by both ends; whose turn it is, records say. Empty once closed."""
        return self._payload

    @property
    def pending(self) -> int:
        """Front: records sent whose answer was not taken; one way: not known to be taken. Back: taken and not answered.

        Raises Broken, also where a one-way back closed and left some.
        """
        return self._checked(lib.shared_pending(self._state))

    @property
    def notifications(self) -> int:
        """How often this end woke its peer by a system call."""
        return lib.shared_notifications(self._state)

    def publish(self, batch: Records) -> None:
        """Publish without waiting. Raises WouldBlock (nothing was published), ValueError, Broken, Closed."""
        self._publish(batch, 0)

    def take(self, max_items: int | None = None) -> bytes:
        """What is there, without waiting; b"" if nothing. Raises Broken, Closed, ValueError (the front of a one-way ring)."""
        return self._take(max_items, 0) or b""

    def put(self, batch: Records, timeout: float | None = None) -> None:
        """Publish, waiting for room. Raises as publish does, and TimeoutError.

        The front of a two-way ring keeps what is answered meanwhile for its next get, at most a ring full: WouldBlock then
        says that only a get of its own makes room. The back never waits: there is room for every answer to what it took.
        """
        if type(batch) is bytes and self._c_publish(self._state, batch, len(batch), SPIN_NS) == 0:
            return  # a call each of ours and of C's: at a record a call all else would be most of the time
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return self._publish(batch, SPIN_NS)
            except WouldBlock:
                if self._side == BACK or not self._may_wait():
                    raise
            short = self.pending + memoryview(batch).nbytes // self.sent_size - self.nr_ents
            if short > 0:
                self._sleep(max(short, self.pending // 2) if not self.received_size else short, end)

    def get(self, max_items: int | None = None, timeout: float | None = None) -> bytes:
        """A packed batch of at least one; b"" once the peer closed and nothing is left. Raises TimeoutError, and as take."""
        if not self._kept:
            n = self._c_take(self._state, self._out, self.nr_ents if max_items is None else max_items, SPIN_NS)
            if n > 0:
                return self._unpack(self._out, n * self.received_size)
        batch, end = self._take(max_items, 0), None if timeout is None else time.monotonic() + timeout
        while batch == b"":
            self._sleep(1, end)
            batch = self._take(max_items, 0)
        return batch or b""

    def __iter__(self) -> Iterator[bytes]:
        """Record by record, until the peer closed; taken in batches, so that a record costs a slice."""
        size = self.received_size
        while batch := self.get():
            for at in range(0, len(batch), size):
                yield batch[at : at + size]

    def drain(self, timeout: float | None = None) -> None:
        """Wait until the back has taken all that was put and comes for more: closing loses nothing then. One way only.

        Raises TimeoutError, Broken.
        """
        if self.received_size or self._side == BACK:
            raise ValueError("the answers say what was taken")
        end = None if timeout is None else time.monotonic() + timeout
        while pending := self.pending:
            self._sleep(pending, end)

    def _publish(self, batch: Records, spin_ns: int) -> None:
        data = batch if type(batch) is bytes else ffi.from_buffer(batch)
        if (result := self._c_publish(self._state, data, len(data), spin_ns)) < 0:
            self._checked(result)

    def _take(self, max_items: int | None, spin_ns: int) -> bytes | None:
        """b"": nothing yet; None: nothing, and the peer closed."""
        most = self.nr_ents if max_items is None else max_items
        if self._kept and most > 0:
            batch, self._kept = self._kept[: most * self.received_size], self._kept[most * self.received_size :]
            return batch
        if (n := self._c_take(self._state, self._out, most, spin_ns)) <= 0:
            return None if n == -errno.EPIPE else self._checked(n) * b""
        return self._unpack(self._out, n * self.received_size)

    def _may_wait(self) -> bool:
        """Make what room we can: keep answers, up to a ring full."""
        if self.received_size and len(self._kept) < self.nr_ents * self.received_size:
            kept, self._kept = self._kept, b""
            self._kept = kept + (self._take(None, 0) or b"")
            return True
        return not self.received_size

    # ---- waiting

    def _sleep(self, want: int, end: float | None) -> None:
        """Until the `want`th record from here, or a look at the clock and at the peer. Raises TimeoutError, Broken."""
        left = LOOK_SECONDS if end is None else min(LOOK_SECONDS, end - time.monotonic())
        if left > 0 and self._checked(lib.shared_sleep(self._state, want, int(left * 1e9))):
            return
        # What a peer published before it died is there to be seen, now that it is known to be dead.
        if not self._peer_lives() and not self._checked(lib.shared_sleep(self._state, want, 0)):
            raise Broken("the peer died")
        if left <= 0:
            raise TimeoutError(f"{self.name}: nothing in the time given")

    def _peer_lives(self) -> bool:
        who: tuple[int, int] = WHO.unpack(os.pread(self._fd, WHO.size, WHO_AT[1 - self._side]).ljust(WHO.size, b"\0"))
        if who[0] == 0:
            return True  # it has not come yet
        if who != self._peer:
            if self._pidfd is not None:
                os.close(self._pidfd)
            self._peer, self._pidfd = who, _pidfd(*who)
        return self._pidfd is not None and not _ended(self._pidfd)

    def _checked(self, result: int) -> int:
        if result >= 0:
            return result
        if result == -errno.EAGAIN:
            raise WouldBlock("the whole batch does not fit")
        if result == -errno.EINVAL:
            raise ValueError(f"not 1 to {self.nr_ents} records of {self.sent_size} bytes, or against the ring's one way")
        if result == -errno.EBADF:
            raise Closed(self.name)
        why = {errno.EPIPE: "closed", errno.EFAULT: "shrank the object"}.get(-result, "moved an index to where it cannot be")
        raise Broken(f"the peer {why}")


def _possible(request: int, response: int, pages: int, payload: int) -> bool:
    fits = 0 < request <= pages * PAGE - RING_HEADER and 0 <= response <= pages * PAGE - RING_HEADER
    return fits and pages <= MAX_PAGES and 0 <= payload <= MAX_PAGES


def _sign(fd: int, side: int, pid: int, born: int) -> None:
    """Say who that side is; the number last, so that nobody reads it beside another's start time."""
    at = WHO_AT[side]
    os.pwrite(fd, bytes(4), at)
    os.pwrite(fd, WHO.pack(0, born), at)
    os.pwrite(fd, pid.to_bytes(4, "little"), at)


def _pidfd(pid: int, born: int) -> int | None:
    """A descriptor of the process, if it lives; the start time tells it from a later one of that number."""
    try:
        fd = os.pidfd_open(pid) if pid else None
    except (ProcessLookupError, OverflowError):  # the latter: a number that a peer made up
        return None
    if fd is not None and (_ended(fd) or _born(pid) != born):
        os.close(fd)
        return None
    return fd


def _ended(pidfd: int) -> bool:
    """Also of a zombie, which a kill(pid, 0) still finds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _born(pid: int) -> int:
    """When it started, in clock ticks since boot; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return 0
