"""Pipes: the same writes and reads on ours and on the host's, and what ends and FIFOs do."""

from __future__ import annotations

import errno
import os
import random
import signal
from pathlib import Path

import pytest

from domain.posix import pipe, sys_file
from domain.posix.files import POLLERR, POLLHUP, POLLIN, POLLOUT
from tests.domain.posix.stand_in import Task, finish

ROUNDS = 300 if os.environ.get("RING1_NIGHTLY") else 30


def compare(seed: int) -> None:
    rng = random.Random(seed)
    task = Task()
    ours = task.pipe(os.O_NONBLOCK)
    theirs = os.pipe2(os.O_NONBLOCK)
    try:
        for step in range(200):
            size = rng.choice((1, 7, 100, 1000, 3000, 4095, 4096, 4097, 8192, 20_000, 70_000))
            if rng.random() < 0.6:
                data = rng.randbytes(size)
                try:
                    want: int | bytes = os.write(theirs[1], data)
                except OSError as error:
                    want = -(error.errno or 0)
                got: int | bytes = task.call("write", ours[1], task.memory.put(data), size)
            else:
                try:
                    want = os.read(theirs[0], size)
                except OSError as error:
                    want = -(error.errno or 0)
                got = task.read(ours[0], size)
            assert got == want, f"seed {seed}, step {step}, {size} bytes"
    finally:
        for fd in theirs:
            os.close(fd)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_host_does_the_same(seed: int) -> None:
    compare(seed)


def test_the_comparison_finds_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: a pipe with one slot less."""
    monkeypatch.setattr(pipe, "SLOTS", 15)
    with pytest.raises(AssertionError):
        for seed in range(20):
            compare(seed)


def test_a_reader_waits_and_gets_what_is_written() -> None:
    task = Task()
    reader, writer = task.pipe()
    waiting = task.call("read", reader, task.memory.room(10), 10)
    queues = next(waiting)
    assert task.files.get(reader).pipe.readable in queues
    assert task.call("write", writer, task.memory.put(b"abc"), 3) == 3
    assert finish(waiting) == 3


def test_a_writer_that_is_interrupted_says_what_it_did() -> None:
    from domain.posix.errors import Interrupted

    task = Task()
    reader, writer = task.pipe()
    waiting = task.call("write", writer, task.memory.put(bytes(100_000)), 100_000)
    next(waiting)
    with pytest.raises(StopIteration) as stop:
        waiting.throw(Interrupted())
    assert stop.value.value == 65536
    assert len(task.read(reader, 65536)) == 65536  # type: ignore[arg-type]
    assert task.call("write", writer, task.memory.put(b"x"), 1) == 1


def test_a_pipe_without_readers_is_a_signal_and_without_writers_an_end() -> None:
    task = Task()
    reader, writer = task.pipe()
    task.call("close", reader)
    assert task.files.get(writer).poll_events() == POLLOUT | 0x100 | POLLERR
    assert task.call("write", writer, task.memory.put(b"x"), 1) == -errno.EPIPE
    assert task.signals == [signal.SIGPIPE]
    reader, writer = task.pipe()
    task.call("write", writer, task.memory.put(b"x"), 1)
    task.call("close", writer)
    assert task.files.get(reader).poll_events() == POLLIN | 0x40 | POLLHUP
    assert task.read(reader, 9) == b"x" and task.read(reader, 9) == b""


def test_nothing_is_lost_where_the_address_is_bad() -> None:
    task = Task()
    reader, writer = task.pipe()
    task.call("write", writer, task.memory.put(b"precious"), 8)
    assert task.call("read", reader, 1, 8) == -errno.EFAULT
    assert task.read(reader, 8) == b"precious"
    assert task.call("write", writer, 1, 8) == -errno.EFAULT


def test_the_two_ends_of_a_fifo_wait_for_each_other(tmp_path: Path) -> None:
    task = Task()
    assert task.call("mknod", "/p", 0o10600, 0) == 0
    assert task.call("open", "/p", os.O_WRONLY | os.O_NONBLOCK) == -errno.ENXIO
    opening = task.call("open", "/p", os.O_RDONLY)
    next(opening)
    writer = task.call("open", "/p", os.O_WRONLY)
    assert writer == 0
    task.call("write", writer, task.memory.put(b"hi"), 2)
    task.call("close", writer)  # gone before the reader ran: its open ends all the same
    reader = finish(opening)
    assert reader == 0 and task.read(reader, 5) == b"hi" and task.read(reader, 5) == b""
    assert task.call("close", reader) == 0
    both = task.call("open", "/p", os.O_RDWR)
    assert both == 0


def test_an_unnamed_pipe_is_opened_without_a_wait() -> None:
    """What /dev/fd/63 of a process substitution leads to, whose writer may have ended before."""
    task = Task()
    reader, writer = task.pipe()
    task.call("write", writer, task.memory.put(b"early"), 5)
    task.call("close", writer)
    again = sys_file.open_inode(task, task.files.get(reader).inode, os.O_RDONLY)
    assert isinstance(again, pipe.PipeFile)
    assert sys_file.open_fifo(task, again, cloexec=False) == writer
    assert task.read(writer, 9) == b"early" and task.read(writer, 9) == b""


def test_a_reader_of_a_fifo_is_hung_up_on_when_its_writer_has_gone() -> None:
    task = Task()
    assert task.call("mknod", "/p", 0o10600, 0) == 0
    early = task.call("open", "/p", os.O_RDONLY | os.O_NONBLOCK)
    assert task.files.get(early).poll_events() == 0
    writer = task.call("open", "/p", os.O_WRONLY)
    late = task.call("open", "/p", os.O_RDONLY)
    assert task.files.get(late).poll_events() == 0
    task.call("close", writer)
    assert task.files.get(early).poll_events() == task.files.get(late).poll_events() == POLLHUP


def test_poll_waits_for_one_of_several_and_for_its_time() -> None:
    import struct

    task = Task()
    first, second = task.pipe(), task.pipe()
    fds = task.memory.put(struct.pack("<ihhihhihh", first[0], POLLIN, 0, second[0], POLLIN, 0, 99, POLLIN, 0))
    assert task.call("poll", fds, 2, 0) == 0
    assert task.call("poll", fds, 3, -1) == 1  # POLLNVAL of what is not open
    waiting = task.call("poll", fds, 2, 5)
    *queues, deadline = next(waiting)
    assert len(queues) == 4 and deadline == 5_000_000
    task.call("write", second[1], task.memory.put(b"x"), 1)
    assert finish(waiting) == 1
    assert struct.unpack("<ihhihh", task.memory.copy_in(fds, 16))[5] == POLLIN
    task.read(second[0], 1)
    waiting = task.call("poll", fds, 2, 5)
    next(waiting)
    assert finish(waiting, None) == 0


def test_epoll_tells_levels_edges_and_one_shots() -> None:
    import struct

    task = Task()
    reader, writer = task.pipe()
    fd = task.call("epoll_create1", 0)
    out = task.memory.room(120)

    def watch(operation: int, events: int) -> int:
        return task.call("epoll_ctl", fd, operation, reader, task.memory.put(struct.pack("<IQ", events, 77)))  # type: ignore[no-any-return]

    assert watch(1, POLLIN) == 0 and watch(1, POLLIN) == -errno.EEXIST
    assert task.call("epoll_wait", fd, out, 10, 0) == 0
    task.call("write", writer, task.memory.put(b"x"), 1)
    assert [task.call("epoll_wait", fd, out, 10, 0) for _ in range(2)] == [1, 1]
    assert struct.unpack("<IQ", task.memory.copy_in(out, 12)) == (POLLIN, 77)
    assert watch(3, POLLIN | 1 << 31) == 0
    assert [task.call("epoll_wait", fd, out, 10, 0) for _ in range(2)] == [1, 0]
    assert watch(3, POLLIN | 1 << 30) == 0
    assert [task.call("epoll_wait", fd, out, 10, 0) for _ in range(2)] == [1, 0]
    assert watch(2, 0) == 0 and watch(2, 0) == -errno.ENOENT
