"""SharedRing: a Xen ring between two processes of one user, by name, with no domain in sight.

    with SharedRing.create("/jobs", 64, 64) as front:           with SharedRing.attach("/jobs") as back:
        front.put(b"..." * 64)                                       for batch in iter(back.get, b""): ...

The object is a control page and then the ring exactly as io/ring.h has it. The creator is the front (it asks, or only
sends: one-way use answers with nothing and the front counts slots back by empty responses), the attacher the back. Both
ends hold the descriptor, so the peer is trusted not to shrink the object; inside ring1 no domain holds one.

Control page: u32 magic, request_size, response_size, pages @0..15; u32 front_word @64, back_word @128 (bumped to wake that
side), u32 front_sleeps @192, back_sleeps @256; u32 front_pid @320, back_pid @324; u32 closed @328.
"""

from __future__ import annotations

import mmap
import os
import time
from types import TracebackType
from typing import Any

import posix_ipc

from ringlib._ring import ffi, lib
from ringlib.ring import BackRing, Broken, Closed, FrontRing, WouldBlock

PAGE = mmap.PAGESIZE
MAGIC = 0x31676E72
FRONT, BACK = 0, 1
WORD, SLEEPS, PID, CLOSED = (64, 128), (192, 256), (320, 324), 328
SPINS = 4000  # about 20 us: less than what a sleep and a wake-up across cores cost
LOOK_SECONDS = 0.05  # a sleeper looks this often whether its peer still lives


class SharedRing:
    """One end. `put` publishes what this end sends, `get` takes what the other end sent, each a packed batch."""

    def __init__(self, name: str, fd: int, side: int, sizes: tuple[int, int, int]) -> None:
        self.name, self._side = name, side
        request, response, pages = sizes
        self._map: mmap.mmap | None = mmap.mmap(fd, (1 + pages) * PAGE)
        os.close(fd)
        base = int(ffi.cast("uintptr_t", ffi.from_buffer(self._map)))
        self._base = base
        self._ring: FrontRing | BackRing
        if side == FRONT:
            self._ring = FrontRing(base + PAGE, pages * PAGE, request, response)
        else:
            self._ring = BackRing(base + PAGE, pages * PAGE, request, response)
        lib.word_store(self._at(PID[side]), os.getpid())
        self.notifications = self.sleeps = 0

    # ---- life

    @classmethod
    def create(cls, name: str, request_size: int, response_size: int, pages: int = 16) -> SharedRing:
        """Make the object `name` ("/..."), mode 0600, and be its front. Raises FileExistsError, MemoryError (no room)."""
        try:
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=(1 + pages) * PAGE)
        except posix_ipc.ExistentialError:
            raise FileExistsError(f"shared memory {name}") from None
        try:
            os.posix_fallocate(shm.fd, 0, (1 + pages) * PAGE)  # a full /dev/shm is an error now, not SIGBUS later
            ring = cls(name, shm.fd, FRONT, (request_size, response_size, pages))
        except BaseException:
            posix_ipc.unlink_shared_memory(name)
            raise
        for i, value in enumerate((request_size, response_size, pages)):
            lib.word_store(ring._at(4 + 4 * i), value)
        lib.word_store(ring._at(0), MAGIC)  # last: the ring is ready
        return ring

    @classmethod
    def attach(cls, name: str) -> SharedRing:
        """Be the back of `name`. Raises FileNotFoundError, Broken (not a ring of ours)."""
        try:
            shm = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError:
            raise FileNotFoundError(f"shared memory {name}") from None
        head = [int.from_bytes(os.pread(shm.fd, 4, 4 * i), "little") for i in range(4)]
        size = os.fstat(shm.fd).st_size
        if head[0] != MAGIC or not 0 < head[3] <= 1 << 16 or size != (1 + head[3]) * PAGE or not 0 < max(head[1:3]) <= PAGE:
            os.close(shm.fd)
            raise Broken(f"{name} is not a ring")
        return cls(name, shm.fd, BACK, (head[1], head[2], head[3]))

    def close(self) -> None:
        """Tell the peer and let go; the creator unlinks. Idempotent."""
        if self._map is None:
            return
        lib.word_store(self._at(CLOSED), 1)
        self._wake_peer()
        self._map = None  # unmapped when the last view of it goes
        if self._side == FRONT:
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
    def nr_ents(self) -> int:
        return self._ring.nr_ents

    def publish(self, batch: bytes | memoryview) -> None:
        """Publish a packed batch without waiting. Raises WouldBlock, Broken, Closed."""
        self._open()
        if self._ring.publish(batch):
            self._wake_peer()

    def take(self, max_items: int | None = None) -> bytes:
        """What is there, without waiting; b"" if nothing. Raises Broken, Closed."""
        self._open()
        return self._ring.take(max_items)

    def put(self, batch: bytes | memoryview, timeout: float | None = None) -> None:
        """Publish, waiting for room: the front drops responses it has no use for. Raises TimeoutError, Broken."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                self.publish(batch)
                return
            except WouldBlock:
                if not (self._side == FRONT and self._ring.take()):
                    self._wait(end)

    def get(self, max_items: int | None = None, timeout: float | None = None) -> bytes:
        """A packed batch of at least one; b"" once the peer closed and nothing is left. Raises TimeoutError, Broken."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            batch = self.take(max_items)
            if batch or (self._closed_by_peer() and not (batch := self.take(max_items))):
                return batch
            self._wait(end)

    # ---- waiting: look, spin, publish that we sleep, look again, sleep

    def _wait(self, end: float | None) -> None:
        word = self._at(WORD[self._side])
        seen = lib.word_load(word)
        if self._ring.recheck() or self._closed_by_peer():
            return
        left = LOOK_SECONDS if end is None else min(LOOK_SECONDS, end - time.monotonic())
        if left <= 0:
            raise TimeoutError("the ring")
        lib.word_store(self._at(SLEEPS[self._side]), 1)
        self.sleeps += 1
        woken = lib.word_wait(word, seen, int(left * 1e9), SPINS if (os.cpu_count() or 1) > 1 else 0)
        lib.word_store(self._at(SLEEPS[self._side]), 0)
        if not woken and not self._closed_by_peer() and not self._peer_lives():
            raise Broken("the peer died")

    def _wake_peer(self) -> None:
        """A shared line if it is awake, a system call only if it says that it sleeps."""
        peer = 1 - self._side
        lib.word_add(self._at(WORD[peer]), 1)
        if lib.word_load(self._at(SLEEPS[peer])):
            self.notifications += 1
            lib.word_wake(self._at(WORD[peer]))

    def _closed_by_peer(self) -> bool:
        return lib.word_load(self._at(CLOSED)) != 0

    def _peer_lives(self) -> bool:
        pid = lib.word_load(self._at(PID[1 - self._side]))
        if pid == 0:
            return True  # it has not come yet
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _open(self) -> None:
        if self._map is None:
            raise Closed(self.name)

    def _at(self, offset: int) -> Any:
        return ffi.cast("void *", self._base + offset)
