"""A page that two ends share, and a model of the ring on it that both must agree with."""

from __future__ import annotations

import mmap
import struct
from collections import deque
from typing import Any

import pytest
from cffi import FFI
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ringlib import BackRing, FrontRing, WouldBlock

PAGE = mmap.PAGESIZE
STARTS = (0, 0xFFFFFF00, 0xFFFFFFFF)  # where indexes begin to count


class Page:
    """Memory that both ends have mapped, and a hostile peer may write; with slack behind it for what a defect overruns."""

    def __init__(self, pages: int = 1) -> None:
        self.size = pages * PAGE
        self._map = mmap.mmap(-1, self.size + 2 * PAGE)
        self._view: Any = FFI().from_buffer(self._map)
        self.address = int(FFI().cast("uintptr_t", self._view))

    def __getitem__(self, offset: int) -> int:
        value: int = struct.unpack_from("<I", self._map, offset)[0]
        return value

    def __setitem__(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self._map, offset, value % (1 << 32))

    @property
    def contents(self) -> bytes:
        return self._map[: self.size]

    @property
    def slack(self) -> bytes:
        """Behind the ring: zero for ever."""
        return self._map[self.size :]

    def fill(self, byte: int) -> None:
        self._map[64 : self.size] = bytes([byte]) * (self.size - 64)


def records(size: int, *numbers: int) -> bytes:
    """Packed records that differ in every byte."""
    return b"".join(bytes((number * 7 + i) % 256 for i in range(size)) for number in numbers)


class RingMachine(RuleBasedStateMachine):
    """Two queues and two event indexes that count on without end; the ring must do the same in 32 bits and 16 slots."""

    SIZE, ENTRIES = 16, 16

    @initialize(start=st.sampled_from(STARTS) | st.integers(0, 0xFFFFFFFF))
    def begin(self, start: int) -> None:
        self.page = Page()
        size = 64 + self.SIZE * self.ENTRIES
        self.front = FrontRing(self.page.address, size, self.SIZE, self.SIZE, start)
        self.back = BackRing(self.page.address, size, self.SIZE, self.SIZE)
        self.start, self.made = start, 0
        self.requests: deque[bytes] = deque()  # published, not taken
        self.answers: deque[bytes] = deque()
        self.published = self.taken = self.answered = self.ended = 0
        self.req_event = self.rsp_event = 1
        self.back_sleeps = self.front_sleeps = False

    def fresh(self, n: int) -> list[bytes]:
        self.made += n
        return [records(self.SIZE, i) for i in range(self.made - n, self.made)]

    @rule(n=st.integers(0, 18))
    def ask(self, n: int) -> None:
        batch = self.fresh(n)
        if self.published + n - self.ended > self.ENTRIES:
            with pytest.raises(WouldBlock):
                self.front.publish(b"".join(batch))
            return
        old, self.published = self.published, self.published + n
        notify = self.front.publish(b"".join(batch))
        self.requests += batch
        assert notify == (old < self.req_event <= self.published)
        if n and self.back_sleeps:
            assert notify, "the back sleeps for ever"
        self.back_sleeps &= not notify

    @rule(most=st.none() | st.integers(0, 20))
    def serve(self, most: int | None) -> None:
        expected = [self.requests.popleft() for _ in range(min(len(self.requests), 99 if most is None else most))]
        assert self.back.take(most) == b"".join(expected)
        self.taken += len(expected)
        self.back_sleeps = False

    @rule(n=st.integers(0, 18))
    def answer(self, n: int) -> None:
        batch = self.fresh(n)
        if self.answered + n > self.taken:
            with pytest.raises(WouldBlock):
                self.back.publish(b"".join(batch))
            return
        old, self.answered = self.answered, self.answered + n
        notify = self.back.publish(b"".join(batch))
        self.answers += batch
        assert notify == (old < self.rsp_event <= self.answered)
        if n and self.front_sleeps:
            assert notify, "the front sleeps for ever"
        self.front_sleeps &= not notify

    @rule(most=st.none() | st.integers(0, 20))
    def collect(self, most: int | None) -> None:
        expected = [self.answers.popleft() for _ in range(min(len(self.answers), 99 if most is None else most))]
        assert self.front.take(most) == b"".join(expected)
        self.ended += len(expected)
        self.front_sleeps = False

    @rule()
    def back_would_sleep(self) -> None:
        self.back_sleeps = not self.back.recheck()
        assert self.back_sleeps == (not self.requests)
        if self.back_sleeps:
            self.req_event = self.taken + 1

    @rule()
    def front_would_sleep(self) -> None:
        self.front_sleeps = not self.front.recheck()
        assert self.front_sleeps == (not self.answers)
        if self.front_sleeps:
            self.rsp_event = self.ended + 1

    @rule()
    def another_back_comes(self) -> None:
        """It takes again what was not answered; the front cannot tell."""
        if self.taken == self.answered:
            self.back = BackRing(self.page.address, 64 + self.SIZE * self.ENTRIES, self.SIZE, self.SIZE)

    @invariant()
    def counts_agree(self) -> None:
        assert self.front.pending == self.published - self.ended
        assert self.front.free == self.ENTRIES - self.front.pending
        assert self.back.pending == self.taken - self.answered
        indexes = (self.published, self.req_event, self.answered, self.rsp_event)
        assert struct.unpack("<4I", self.page.contents[:16]) == tuple((self.start + i) % (1 << 32) for i in indexes)
