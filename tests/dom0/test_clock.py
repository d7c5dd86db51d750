"""Whether dom0 hears that the host's clock was set, and what it says then."""

from __future__ import annotations

import os
import select
import time
from types import SimpleNamespace
from typing import Any

import pytest

from dom0 import clock
from hypervisor.public.clock import SetTime


class Stop(Exception):
    """No more news."""


def told(monkeypatch: pytest.MonkeyPatch, walls: list[int]) -> list[SetTime]:
    """What dom0 says at its start and at each later jump, by a host's clock that reads `walls`."""
    calls: list[SetTime] = []
    read, write = os.pipe()
    news = [None] * (len(walls) - 1)

    async def readable(fd: int) -> None:
        assert fd == read
        if not news:
            raise Stop
        news.pop()
        os.write(write, bytes(8))

    kernel: Any = SimpleNamespace(readable=readable, call=calls.append, now_ns=lambda: 5_000)
    monkeypatch.setattr(time, "time_ns", iter(walls).__next__)
    with pytest.raises(Stop):
        clock.follow(kernel, read).send(None)
    os.close(read)
    os.close(write)
    return calls


def test_every_jump_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, [10**18 + 7, 5, 2 * 10**18]) == [
        SetTime(10**9, 7, 5_000), SetTime(0, 5, 5_000), SetTime(2 * 10**9, 0, 5_000),
    ]  # fmt: skip


def test_a_clock_that_nobody_sets_says_nothing() -> None:
    fd = clock.watch()
    assert not select.select([fd], [], [], 0)[0] and not os.get_inheritable(fd)
    with pytest.raises(BlockingIOError):
        os.read(fd, 8)
    os.close(fd)
