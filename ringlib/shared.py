"""SharedRing: a ring between two processes of one user, by name, with no domain in sight.

    with SharedRing.create("/jobs", 64) as ring:           with SharedRing.attach("/jobs", timeout=5) as ring:
        for i in range(1000):                                  for record in ring:
            ring.put(bytes(64))                                    ...
        ring.drain()

The creator is the front and sends requests of `request_size` bytes, the attacher the back and sends responses of
`response_size`. With no response size the ring goes one way: what the back takes is answered by ringlib with nothing, by the
quarter ring or when the back comes for more and there is none.

A batch is packed records in one buffer (bytes, a memoryview, a numpy array), published whole or not at all; a call costs the
same for one record or a hundred. An end belongs to one thread of one process: a forked child attaches by name.

The object is a control page, the ring as io/ring.h has it, and, where asked for, `payload`: memory that records may point
into, so that large things need not be copied (Slots).

Both ends hold the object, so a peer can shrink it: the ring then raises Broken, but a touch of `payload` is SIGBUS.

GUIDE.md, beside this file, goes through all of it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from ringlib import control
from ringlib._ring import ffi, lib
from ringlib.control import BACK, FRONT, PAGE, Peer, Sizes
from ringlib.ring import Broken, Buffer, Busy, Closed, WouldBlock

if TYPE_CHECKING:
    from ringlib.door import Door

SPIN_NS: int = lib.SPIN_NS  # how long an end looks before it sleeps, while that proves worth it (spin.h)
LOOK_SECONDS = 0.05  # a sleeper looks this often whether its peer still lives
ATTACH_SECONDS = 0.001  # and an attacher whether the ring is there


class Statistics(NamedTuple):
    """What one end did since it was opened: counts, each from 0 to 2^64 - 1."""

    records_sent: int
    batches_sent: int  # records / batches: how much a call moved
    records_taken: int
    batches_taken: int
    notifications: int  # times this end woke its peer by a system call; all else was seen by one that was awake
    sleeps: int  # times this end slept, or began to wait in an event loop
    spins: int  # times it looked for up to SPIN_NS before that; not where the peer shares its CPU
    spins_won: int  # of these, how many found what they waited for
    high_water: int  # the most records that this end saw in the ring: the front's not answered, the back's not taken


class SharedRing:
    """One end. `put` publishes what this end sends, `get` takes what the other end sent; `aput` and `aget` in asyncio."""

    def __init__(self, name: str, fd: int, side: int, sizes: Sizes) -> None:
        """create and attach call this; `fd` is ours once it returns."""
        self.name, self._fd, self._side = name, fd, side
        self.sent_size, self.received_size = sizes[:2] if side == FRONT else sizes[1::-1]
        self._owner = os.getpid()
        self._peer = Peer(fd, 1 - side)
        self._door: Door | None = None
        self._kept = b""
        self._map: mmap.mmap | None = mmap.mmap(fd, sizes.bytes)
        self._payload = memoryview(self._map)[(1 + sizes.ring) * PAGE : (1 + sizes.ring + sizes.payload) * PAGE]
        self._state: Any = ffi.new("char[]", lib.SHARED_STATE)
        self._c_publish: Callable[[Any, Any, int, int], int] = lib.shared_publish
        self._c_take: Callable[[Any, Any, int, int], int] = lib.shared_take
        base, ring = ffi.from_buffer(self._map), sizes.ring * PAGE
        self.nr_ents = lib.shared_open(self._state, base, sizes.bytes, ring, side, sizes.request, sizes.response)
        if self.nr_ents < 0:
            raise Broken("no record fits the ring, or somebody shrank it")
        self._out: Any = ffi.new("char[]", max(1, self.nr_ents * self.received_size))
        self._taken: Any = ffi.buffer(self._out)

    # ---- life

    @classmethod
    def create(
        cls,
        name: str,
        request_size: int,
        response_size: int = 0,
        *,
        pages: int = 16,
        payload: int = 0,
        replace: bool = False,
    ) -> SharedRing:
        """Make the object `name` ("/..."), mode 0600, and be its front.

        pages: of the ring; entries are the power of two of records that fits. payload: bytes. replace: also where a front
        that died left its ring under that name; who holds the old one is told that its front died.

        Raises FileExistsError, ValueError, OSError (ENOSPC: no room); with replace, Busy (that front lives) and Broken (what
        is there is not a ring).
        """
        sizes = Sizes(request_size, response_size, pages, -(-payload // PAGE))
        if not sizes.possible:
            raise ValueError(f"impossible sizes: request {request_size}, response {response_size}, {pages} pages, {payload}")
        fd = control.make(name, sizes, replace)
        try:
            ring = cls(name, fd, FRONT, sizes)
        except BaseException:
            control.discard(name, fd)
            raise
        control.ready(fd, sizes)
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
        fd, sizes = control.find(name)
        try:
            if (pidfd := control.living(*control.who(fd, BACK))) is not None:
                os.close(pidfd)
                raise Busy(f"{name} has a back")
            ring = cls(name, fd, BACK, sizes)
            control.sign(fd, BACK, os.getpid())
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
        if self._door is not None:
            self._door.close(ours)
        self._map, self._payload = None, memoryview(b"")  # unmapped when the last view of it goes
        self._peer.forget()
        if ours and self._side == BACK:
            control.sign(self._fd, BACK, 0)  # another may come
        if ours and self._side == FRONT:
            control.discard(self.name, self._fd)
        else:
            os.close(self._fd)

    def __enter__(self) -> SharedRing:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- what there is to know

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
    def statistics(self) -> Statistics:
        """What this end did so far, also of a ring that is closed."""
        counts = ffi.new("uint64_t[]", lib.SHARED_COUNTS)
        lib.shared_statistics(self._state, counts)
        return Statistics(*counts)

    # ---- without waiting

    def publish(self, batch: Buffer) -> None:
        """Publish a batch. Raises WouldBlock (nothing was published), ValueError (no whole records), Broken, Closed."""
        self._publish(batch, 0)

    def take(self, max_items: int | None = None) -> bytes:
        """What is there; b"" if nothing. Raises Broken, Closed, ValueError (the front of a one-way ring)."""
        return self._take(max_items, 0) or b""

    def take_into(self, buffer: Buffer) -> int:
        """What is there, into `buffer`: writable, contiguous, with room for at least one record of `received_size` bytes.

        Returns the records taken, 0 if there are none. Raises as take does, and BufferError.
        """
        return self._take_into(buffer, 0) or 0

    # ---- waiting; timeouts in seconds, None: for ever

    def put(self, batch: Buffer, timeout: float | None = None) -> None:
        """Publish, waiting for room. Raises as publish does, and TimeoutError.

        The front of a two-way ring keeps what is answered meanwhile for its next get, at most a ring full: WouldBlock then
        says that only a get of its own makes room. The back never waits: there is room for every answer to what it took.
        """
        publish = self._c_publish
        if type(batch) is bytes and publish(self._state, batch, len(batch), SPIN_NS) == 0:
            return  # a call each of ours and of C's: at a record a call all else would be most of the time
        end = _end(timeout)
        for want in self._putting(batch, SPIN_NS):
            self._sleep(want, end)

    def get(self, max_items: int | None = None, timeout: float | None = None) -> bytes:
        """A packed batch of at least one; b"" once the peer closed and nothing is left. Raises TimeoutError, and as take."""
        if not self._kept:
            take = self._c_take
            n = take(self._state, self._out, self.nr_ents if max_items is None else max_items, SPIN_NS)
            if n > 0:
                batch: bytes = self._taken[: n * self.received_size]
                return batch
        end = _end(timeout)
        while (got := self._take(max_items, 0)) == b"":
            self._sleep(1, end)
        return got or b""

    def get_into(self, buffer: Buffer, timeout: float | None = None) -> int:
        """As take_into, waiting for at least one record; 0 once the peer closed and nothing is left. Raises TimeoutError."""
        if n := self._take_into(buffer, SPIN_NS):
            return n
        end = _end(timeout)
        while (n := self._take_into(buffer, 0)) == 0:
            self._sleep(1, end)
        return n or 0

    def __iter__(self) -> Iterator[bytes]:
        """Record by record, until the peer closed; taken in batches, so that a record costs a slice."""
        while batch := self.get():
            yield from self._records(batch)

    def drain(self, timeout: float | None = None) -> None:
        """Wait until the back has taken all that was put and comes for more: closing loses nothing then. One way only.

        Raises TimeoutError, Broken.
        """
        end = _end(timeout)
        for want in self._draining():
            self._sleep(want, end)

    # ---- waiting in asyncio: the loop runs on, but for the 20 us that are spun while that proves worth it (door.py)

    async def aput(self, batch: Buffer, timeout: float | None = None) -> None:
        """As put; cancelled, it has published nothing."""
        end = _end(timeout)
        for want in self._putting(batch, 0):
            await self._asleep(want, end)

    async def aget(self, max_items: int | None = None, timeout: float | None = None) -> bytes:
        """As get; cancelled, it has taken nothing."""
        end = _end(timeout)
        while (batch := self._take(max_items, 0)) == b"":
            await self._asleep(1, end)
        return batch or b""

    async def aget_into(self, buffer: Buffer, timeout: float | None = None) -> int:
        """As get_into; cancelled, it has taken nothing."""
        end = _end(timeout)
        while (n := self._take_into(buffer, 0)) == 0:
            await self._asleep(1, end)
        return n or 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """As __iter__."""
        while batch := await self.aget():
            for record in self._records(batch):
                yield record

    async def adrain(self, timeout: float | None = None) -> None:
        """As drain."""
        end = _end(timeout)
        for want in self._draining():
            await self._asleep(want, end)

    # ---- both ways of waiting have these in common; what is yielded is the record, from here, to wait for

    def _putting(self, batch: Buffer, spin_ns: int) -> Iterator[int]:
        n = len(ffi.from_buffer(batch)) // max(1, self.sent_size)
        while True:
            try:
                return self._publish(batch, spin_ns)
            except WouldBlock:
                if self._side == BACK or not self._may_wait():
                    raise
            pending = self.pending  # once: to ask takes answers, and whoever waits for those that were taken waits for ever
            short = pending + n - self.nr_ents
            if short > 0:
                yield max(short, pending // 2) if not self.received_size else short

    def _draining(self) -> Iterator[int]:
        if self.received_size or self._side == BACK:
            raise ValueError("the answers say what was taken")
        while pending := self.pending:
            yield pending

    def _publish(self, batch: Buffer, spin_ns: int) -> None:
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
        taken: bytes = self._taken[: n * self.received_size]
        return taken

    def _take_into(self, buffer: Buffer, spin_ns: int) -> int | None:
        """0: nothing yet; None: nothing, and the peer closed."""
        out, take = ffi.from_buffer("char[]", buffer, True), self._c_take  # True: or a BufferError
        most = len(out) // (self.received_size or 1)
        if self._kept and most > 0:
            batch = self._take(most, 0) or b""
            ffi.memmove(out, batch, len(batch))
            return len(batch) // self.received_size
        n = take(self._state, out, most if most < self.nr_ents else self.nr_ents, spin_ns)
        return n if n > 0 else None if n == -errno.EPIPE else self._checked(n)

    def _may_wait(self) -> bool:
        """Make what room we can: keep answers, up to a ring full."""
        if self.received_size and len(self._kept) < self.nr_ents * self.received_size:
            kept, self._kept = self._kept, b""
            self._kept = kept + (self._take(None, 0) or b"")
            return True
        return not self.received_size

    def _records(self, batch: bytes) -> Iterator[bytes]:
        size = self.received_size
        return (batch[at : at + size] for at in range(0, len(batch), size))

    def _sleep(self, want: int, end: float | None) -> None:
        """Until the `want`th record from here, or a look at the clock and at the peer. Raises TimeoutError, Broken."""
        left = _left(end)
        if left <= 0 or not self._checked(lib.shared_sleep(self._state, want, int(left * 1e9))):
            self._look(want, left)

    async def _asleep(self, want: int, end: float | None) -> None:
        left, door = _left(end), self._door
        if door is None or not door.here():
            door = self._open_door()
        if left <= 0 or not self._checked(await door.wait(want, left, SPIN_NS)):
            self._look(want, left)

    def _look(self, want: int, left: float) -> None:
        """What a peer published before it died is there to be seen, now that it is known to be dead."""
        if not self._peer.lives() and not self._checked(lib.shared_sleep(self._state, want, 0)):
            raise Broken("the peer died")
        if left <= 0:
            raise TimeoutError(f"{self.name}: nothing in the time given")

    def _open_door(self) -> Door:
        """In the event loop that runs now."""
        from ringlib.door import Door  # asyncio is large; who does not wait in it does without

        if self._door is not None:
            self._door.close(True)
        self._door = Door(self._state)
        return self._door

    def _checked(self, result: int) -> int:
        if result >= 0:
            return result
        if result == -errno.EAGAIN:
            raise WouldBlock("the whole batch does not fit")
        if result == -errno.EINVAL:
            sizes = f"{self.sent_size} bytes sent, {self.received_size} received"
            raise ValueError(f"not 1 to {self.nr_ents} whole records of {sizes}, or against the ring's one way")
        if result == -errno.EBADF:
            raise Closed(self.name)
        why = {errno.EPIPE: "closed", errno.EFAULT: "shrank the object"}.get(-result, "moved an index to where it cannot be")
        raise Broken(f"the peer {why}")


def _end(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(end: float | None) -> float:
    """Seconds to sleep before the next look."""
    return LOOK_SECONDS if end is None else min(LOOK_SECONDS, end - time.monotonic())
