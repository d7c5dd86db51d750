"""The line discipline beside the host's: what is typed into a pseudo-terminal echoes and reads the same."""

from __future__ import annotations

import errno
import os
import pty
import random
import select
import signal
import struct
import termios

import pytest

from domain.posix.inode import Inode
from domain.posix.termios import ECHO, ICANON, TCGETS, TIOCGWINSZ, TIOCSPGRP, TIOCSWINSZ
from domain.posix.tty_file import TtyFile
from tests.domain.posix.stand_in import Task, finish

KEYS = b"abc X_.\x7f\x7f\x15\x17\x16\x04\r\n\n\x01\x12"
LINES = 60


def drain(fd: int) -> bytes:
    out = b""
    while select.select([fd], [], [], 0)[0]:
        try:
            out += os.read(fd, 4096)
        except OSError:
            break
    return out


def ours(task: Task) -> TtyFile:
    file = TtyFile(task.tty, Inode(task.vfs.pipes, 0o20600), os.O_RDWR | os.O_NONBLOCK)
    task.files.install(file)
    return file


@pytest.mark.parametrize("raw", [False, True])
def test_typing_is_the_same_as_at_the_host(raw: bool) -> None:
    rng = random.Random(5)
    for _ in range(LINES):
        master, slave = pty.openpty()
        task = Task()
        ours(task)
        try:
            os.set_blocking(slave, False)
            state = termios.tcgetattr(slave)
            if raw:
                state[3] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(slave, termios.TCSANOW, state)
            task.tty.termios.lflag = state[3]
            typed = bytes(rng.choice(KEYS) for _ in range(rng.randrange(1, 25)))
            os.write(master, typed)
            task.tty.input(typed)
            termios.tcgetattr(slave)
            select.select([slave], [], [], 0.02)  # the host hands typed bytes over in a work queue
            while True:
                try:
                    want: bytes | int = os.read(slave, 5)
                except OSError as error:
                    want = -(error.errno or 0)
                got = task.read(0, 5)
                assert got == want, (typed, got, want)
                if isinstance(want, int):
                    break
            assert bytes(task.output) == drain(master), typed
        finally:
            os.close(master)
            os.close(slave)


def test_ctrl_c_goes_to_the_foreground_group() -> None:
    task = Task()
    task.process.sid = task.process.pid
    task.tty.adopt(task.process)
    task.tty.input(b"half a line\x03")
    assert task.groups == [(7, signal.SIGINT)] and task.output.endswith(b"^C")
    task.tty.input(b"ok\n")
    ours(task)
    assert task.read(0, 100) == b"ok\n"


def test_ioctls_have_the_layout_of_linux() -> None:
    task = Task()
    ours(task)
    buffer = task.memory.room(64)
    assert task.call("ioctl", 0, TCGETS, buffer) == 0
    assert struct.unpack_from("<IIII", task.memory.copy_in(buffer, 36)) == (0x500, 5, 0x4BF, 0x8A3B)
    assert task.call("ioctl", 0, TIOCSWINSZ, task.memory.put(struct.pack("<HHHH", 50, 132, 0, 0))) == 0
    assert task.call("ioctl", 0, TIOCGWINSZ, buffer) == 0
    assert struct.unpack("<HH", task.memory.copy_in(buffer, 4)) == (50, 132)
    assert task.call("ioctl", 0, TIOCSPGRP, buffer) == -errno.ENOTTY  # not its terminal


def test_a_reader_waits_for_the_end_of_the_line() -> None:
    task = Task()
    file = ours(task)
    file.flags &= ~os.O_NONBLOCK
    assert file.tty.termios.lflag & ICANON and file.tty.termios.lflag & ECHO
    waiting = task.call("read", 0, task.memory.room(10), 10)
    next(waiting)
    task.tty.input(b"ab")
    assert finish(waiting) is None
    task.tty.input(b"\r")
    assert finish(waiting) == 3


def test_who_reads_in_the_background_is_stopped() -> None:
    task = Task()
    file = ours(task)
    task.process.terminal = task.tty
    task.tty.foreground = 8
    from domain.posix.errors import Interrupted

    with pytest.raises(Interrupted):
        file.read(task, 1)
    assert task.groups == [(7, signal.SIGTTIN)]
    task.ignored.add(signal.SIGTTIN)
    assert task.read(0, 1) == -errno.EIO
