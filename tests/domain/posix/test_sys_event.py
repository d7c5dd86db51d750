"""eventfd: the same reads and writes on ours and on the host's."""

from __future__ import annotations

import os
import random
import select

import pytest

from domain.posix import sys_event
from domain.posix.files import POLLIN, POLLOUT
from tests.domain.posix.stand_in import Task, finish


def compare(seed: int) -> None:
    rng = random.Random(seed)
    start, flags = rng.choice((0, 3)), os.EFD_NONBLOCK | rng.choice((0, os.EFD_SEMAPHORE))
    task, theirs = Task(), os.eventfd(start, flags)
    try:
        ours = task.call("eventfd2", start, flags)
        poll = select.poll()
        poll.register(theirs, POLLIN | POLLOUT)
        for step in range(60):
            if rng.random() < 0.5:
                value = rng.choice((0, 1, 5, (1 << 64) - 2, (1 << 64) - 1, 1 << 63))
                data = value.to_bytes(8, "little")[: rng.choice((8, 8, 7))]
                want, got = told(os.write, theirs, data), task.call("write", ours, task.memory.put(data), len(data))
            else:
                size = rng.choice((8, 9, 7))
                want, got = told(os.read, theirs, size), task.read(ours, size)
            assert got == want, f"seed {seed}, step {step}"
            assert task.files.get(ours).poll_events() & (POLLIN | POLLOUT) == dict(poll.poll(0)).get(theirs, 0)
    finally:
        os.close(theirs)


def told(call: object, *arguments: object) -> object:
    try:
        return call(*arguments)  # type: ignore[operator]
    except OSError as error:
        return -(error.errno or 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_host_does_the_same(seed: int) -> None:
    compare(seed)


def test_the_comparison_finds_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: a counter that is full too late."""
    monkeypatch.setattr(sys_event, "MOST", sys_event.MOST + 1)
    with pytest.raises(AssertionError):
        for seed in range(20):
            compare(seed)


def test_a_reader_waits_for_a_writer() -> None:
    task = Task()
    fd = task.call("eventfd2", 0, 0)
    waiting = task.call("read", fd, task.memory.room(8), 8)
    next(waiting)
    assert task.call("write", fd, task.memory.put(bytes([3, 0, 0, 0, 0, 0, 0, 0])), 8) == 8
    assert finish(waiting) == 8
