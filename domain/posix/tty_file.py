"""The open file of a terminal: job control of who reads and writes, and its ioctls."""

from __future__ import annotations

import errno
import os
import signal
import struct
from typing import Any

from domain.posix.errors import Errno, Interrupted
from domain.posix.files import POLLHUP, POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM, File
from domain.posix.inode import Inode
from domain.posix.termios import (
    BAUD,
    FIONREAD,
    ICANON,
    SPEEDS,
    TCFLSH,
    TCGETS,
    TCGETS2,
    TCSBRK,
    TCSETS,
    TCSETS2,
    TCSETSF,
    TCSETSW,
    TCXONC,
    TERMIOS,
    TIOCEXCL,
    TIOCGPGRP,
    TIOCGSID,
    TIOCGWINSZ,
    TIOCNOTTY,
    TIOCNXCL,
    TIOCOUTQ,
    TIOCSCTTY,
    TIOCSPGRP,
    TIOCSWINSZ,
    TOSTOP,
    WINSIZE,
)
from domain.posix.tty import EOF, Tty
from domain.posix.wait import WaitQueue


class TtyFile(File):
    def __init__(self, tty: Tty, inode: Inode, flags: int) -> None:
        super().__init__(inode, flags)
        self.tty = tty

    def background(self, task: Any, signo: int) -> None:
        """Who is not of the foreground group is stopped; one that ignores or blocks the signal is told EIO, for reads."""
        process = task.process
        if process.terminal is not self.tty or process.pgid == self.tty.foreground or not self.tty.foreground:
            return
        if process.ignores(signo) or task.blocks(signo):
            if signo == signal.SIGTTIN:
                raise Errno(errno.EIO)
            return
        self.tty.kill_group(process.pgid, signo)
        raise Interrupted

    def read(self, task: Any, count: int) -> bytes:
        self.background(task, signal.SIGTTIN)
        return self.tty.read(count)

    def put_back(self, data: bytes) -> None:
        self.tty.ready.extendleft(reversed(data))
        if self.tty.termios.lflag & ICANON:
            self.tty.ends.appendleft(len(data))

    def write(self, task: Any, data: bytes) -> int:
        if self.tty.termios.lflag & TOSTOP:
            self.background(task, signal.SIGTTOU)
        return self.tty.write(data)

    def poll_events(self) -> int:
        tty = self.tty
        events = 0 if tty.stopped else POLLOUT | POLLWRNORM
        if tty.ends or (tty.ready and not tty.termios.lflag & ICANON):
            events |= POLLIN | POLLRDNORM
        return events | (POLLHUP | POLLIN if tty.gone else 0)

    def queues(self) -> tuple[WaitQueue, ...]:
        return self.tty.readable, self.tty.writable

    def ioctl(self, task: Any, request: int, argument: int) -> int:
        tty, memory = self.tty, task.memory
        if request == TCGETS:
            memory.copy_out(argument, tty.termios.pack())
        elif request == TCGETS2:
            memory.copy_out(argument, tty.termios.pack() + SPEEDS.pack(BAUD, BAUD))
        elif request in (TCSETS, TCSETSW, TCSETSF, TCSETS2, TCSETS2 + 1, TCSETS2 + 2):
            data = memory.copy_in(argument, TERMIOS.size)
            self.background(task, signal.SIGTTOU)
            tty.set_termios(task, data, flush=request in (TCSETSF, TCSETS2 + 2))
        elif request == TIOCGWINSZ:
            memory.copy_out(argument, WINSIZE.pack(*tty.window))
        elif request == TIOCSWINSZ:
            tty.resize(WINSIZE.unpack(memory.copy_in(argument, WINSIZE.size)))
        elif request == FIONREAD:
            waiting = sum(byte != EOF for byte in tty.ready)
            memory.copy_out(argument, struct.pack("<i", waiting))
        elif request == TIOCOUTQ:
            memory.copy_out(argument, struct.pack("<i", len(tty.held)))
        elif request == TCFLSH:
            if argument > 2:
                raise Errno(errno.EINVAL)
            if argument != 1:
                tty.flush_input()
            if argument != 0:
                tty.held.clear()
        elif request == TCXONC and argument in (0, 1):
            if argument:
                tty.go_on()
            else:
                tty.stopped = True
        elif request not in (TCSBRK, TCXONC, TIOCEXCL, TIOCNXCL):
            return self.job_control(task, request, argument)
        return 0

    def job_control(self, task: Any, request: int, argument: int) -> int:
        tty, process = self.tty, task.process
        if request == TIOCSCTTY:
            if process.terminal is tty:
                return 0
            if process.pid != process.sid or process.terminal is not None:
                raise Errno(errno.EPERM)
            if tty.session and not argument:
                raise Errno(errno.EPERM)
            tty.adopt(process)
            return 0
        if request not in (TIOCGPGRP, TIOCSPGRP, TIOCGSID, TIOCNOTTY) or process.terminal is not tty:
            raise Errno(errno.ENOTTY)
        if request == TIOCSPGRP:
            self.background(task, signal.SIGTTOU)
            (group,) = struct.unpack("<i", task.memory.copy_in(argument, 4))
            if group < 0:
                raise Errno(errno.EINVAL)
            tty.foreground = group
        elif request == TIOCNOTTY:
            process.terminal = None
            if process.pid == process.sid:
                tty.session = tty.foreground = 0
        else:
            value = tty.foreground if request == TIOCGPGRP else tty.session
            task.memory.copy_out(argument, struct.pack("<i", value))
        return 0


def open_tty(tty: Tty, task: Any, inode: Inode, flags: int) -> TtyFile:
    """A leader of a session that has no terminal gets this one, unless O_NOCTTY or it has a session."""
    process = task.process
    if not flags & os.O_NOCTTY and process.terminal is None and process.pid == process.sid and not tty.session:
        tty.adopt(process)
    return TtyFile(tty, inode, flags)
