"""Terminals: Linux's line discipline (`n_tty`) between a byte sink and a feed.

What is typed goes to `input`; what programs write goes out through `output`. In canonical mode a line is handed over when it
is complete; erase, kill and word-erase edit it until then. Signals go to the foreground group.
"""

from __future__ import annotations

import errno
import signal
from collections import deque
from collections.abc import Callable
from typing import Any

from domain.posix.errors import Errno
from domain.posix.termios import (
    ECHO,
    ECHOCTL,
    ECHOE,
    ECHOK,
    ECHOKE,
    ECHONL,
    ICANON,
    ICRNL,
    IEXTEN,
    IGNCR,
    IMAXBEL,
    INLCR,
    ISIG,
    ISTRIP,
    IXANY,
    IXON,
    NOFLSH,
    OCRNL,
    OLCUC,
    ONLCR,
    OPOST,
    TERMIOS,
    VEOF,
    VEOL,
    VEOL2,
    VERASE,
    VINTR,
    VKILL,
    VLNEXT,
    VMIN,
    VQUIT,
    VREPRINT,
    VSTART,
    VSTOP,
    VSUSP,
    VWERASE,
    Termios,
)
from domain.posix.wait import WaitQueue

LIMIT = 4096  # bytes of input that wait for a reader; what is typed beyond is lost, with a bell where IMAXBEL asks for it
EOF = -1  # in the queue of complete input: where a read ends without a byte


class Tty:
    def __init__(self, output: Callable[[bytes], object], kill_group: Callable[[int, int], object]) -> None:
        """`kill_group(pgid, signo)` is how signals leave."""
        self.output, self.kill_group = output, kill_group
        self.termios = Termios()
        self.window = (24, 80, 0, 0)
        self.line = bytearray()  # canonical input that may still be edited
        self.ready: deque[int] = deque()  # bytes for readers, with EOF marks
        self.ends: deque[int] = deque()  # how many entries of `ready` each complete line has
        self.column = 0
        self.literal = self.stopped = self.gone = False
        self.held = bytearray()  # output while ctrl-S holds it
        self.readable, self.writable = WaitQueue(), WaitQueue()
        self.session = 0  # whose controlling terminal it is
        self.foreground = 0

    def adopt(self, process: Any) -> None:
        self.session, self.foreground = process.sid, process.pgid
        process.terminal = self

    def hang_up(self) -> None:
        self.gone = True
        if self.foreground:
            self.kill_group(self.foreground, signal.SIGHUP)
            self.kill_group(self.foreground, signal.SIGCONT)
        self.readable.wake()
        self.writable.wake()

    # What comes in

    def input(self, data: bytes) -> None:
        """Typed bytes. Never blocks, never fails."""
        for byte in data:
            self.key(byte)
        if self.ready:
            self.readable.wake()

    def key(self, byte: int) -> None:
        t = self.termios
        if t.iflag & ISTRIP:
            byte &= 0x7F
        if self.literal:
            self.literal = False
            self.accept(byte, literal=True)
            return
        if t.iflag & IXON and self.flow(byte):
            return
        if t.lflag & ISIG and self.interrupt(byte):
            return
        if byte == 13:
            if t.iflag & IGNCR:
                return
            if t.iflag & ICRNL:
                byte = 10
        elif byte == 10 and t.iflag & INLCR:
            byte = 13
        if t.lflag & ICANON and self.edit(byte):
            return
        self.accept(byte)

    def is_char(self, byte: int, which: int) -> bool:
        return byte != 0 and self.termios.cc[which] == byte

    def flow(self, byte: int) -> bool:
        if self.is_char(byte, VSTART):
            self.go_on()
            return True
        if self.is_char(byte, VSTOP):
            self.stopped = True
            return True
        if self.stopped and self.termios.iflag & IXANY:
            self.go_on()
        return False

    def go_on(self) -> None:
        self.stopped = False
        held, self.held = bytes(self.held), bytearray()
        if held:
            self.output(held)
        self.writable.wake()

    def interrupt(self, byte: int) -> bool:
        for which, signo in ((VINTR, signal.SIGINT), (VQUIT, signal.SIGQUIT), (VSUSP, signal.SIGTSTP)):
            if self.is_char(byte, which):
                if not self.termios.lflag & NOFLSH:
                    self.flush_input()
                    self.held.clear()
                if self.stopped:
                    self.go_on()
                self.echo(byte)
                if self.foreground:
                    self.kill_group(self.foreground, signo)
                return True
        return False

    def flush_input(self) -> None:
        self.line.clear()
        self.ready.clear()
        self.ends.clear()

    def edit(self, byte: int) -> bool:
        """Whether it was one of the keys that edit or end a line."""
        extended = self.termios.lflag & IEXTEN
        if self.is_char(byte, VERASE):
            self.erase(1)
        elif self.is_char(byte, VKILL):
            self.kill_line()
        elif extended and self.is_char(byte, VWERASE):
            self.erase(self.word())
        elif extended and self.is_char(byte, VLNEXT):
            self.literal = True
            if self.termios.lflag & ECHO and self.termios.lflag & ECHOCTL:
                self.emit(b"^\b")
        elif extended and self.is_char(byte, VREPRINT) and self.termios.lflag & ECHO:
            self.echo(byte)
            self.emit(b"\n")
            for old in self.line:
                self.echo(old)
        elif self.is_char(byte, VEOF):
            self.finish(EOF)
        elif byte == 10 or self.is_char(byte, VEOL) or (extended and self.is_char(byte, VEOL2)):
            if self.termios.lflag & ECHO or (byte == 10 and self.termios.lflag & ECHONL):
                self.echo(byte, force=True, as_is=byte == 10)
            self.finish(byte)
        else:
            return False
        return True

    def finish(self, end: int) -> None:
        self.ready.extend(self.line)
        self.ready.append(end)
        self.ends.append(len(self.line) + 1)
        self.line.clear()

    def accept(self, byte: int, *, literal: bool = False) -> None:
        if len(self.line) + len(self.ready) >= LIMIT - 1:
            if self.termios.iflag & IMAXBEL:
                self.output(b"\a")
            return

        self.echo(byte, as_is=byte == 10 and not literal)
        if self.termios.lflag & ICANON:
            self.line.append(byte)
        else:
            self.ready.append(byte)

    def word(self) -> int:
        """How many bytes of the line word-erase takes: blanks at the end and the word before them."""
        kept = len(self.line)
        seen = False
        while kept:
            alphanumeric = bytes([self.line[kept - 1]]).isalnum() or self.line[kept - 1] == ord("_")
            if seen and not alphanumeric:
                break
            seen = seen or alphanumeric
            kept -= 1
        return len(self.line) - kept

    def erase(self, count: int) -> None:
        for _ in range(min(count, len(self.line))):
            byte = self.line.pop()
            if self.termios.lflag & ECHO:
                if self.termios.lflag & ECHOE:
                    self.emit(b"\b \b" * self.width(byte))
                else:
                    self.echo(self.termios.cc[VERASE])
                    break

    def kill_line(self) -> None:
        lflag = self.termios.lflag
        if lflag & ECHO and lflag & ECHOK and lflag & ECHOKE and lflag & ECHOE:
            self.erase(len(self.line))
            return
        self.line.clear()
        self.echo(self.termios.cc[VKILL])
        if lflag & ECHO and lflag & ECHOK:
            self.emit(b"\n")

    def width(self, byte: int) -> int:
        """Columns that its echo took. A tab counts as one: where it began is not remembered."""
        return 2 if self.termios.lflag & ECHOCTL and control(byte) else 1

    # What goes out

    def echo(self, byte: int, *, force: bool = False, as_is: bool = False) -> None:
        """`as_is`: a newline that ends a line; one that was quoted shows as ^J."""
        if not force and not self.termios.lflag & ECHO:
            return
        if self.termios.lflag & ECHOCTL and control(byte) and byte != 9 and not as_is:
            self.emit(bytes([94, byte ^ 0x40]))
        else:
            self.emit(bytes([byte]))

    def emit(self, data: bytes) -> None:
        """Through output processing."""
        out = self.process(data)
        if self.stopped:
            self.held += out[: max(0, LIMIT - len(self.held))]
        else:
            self.output(out)

    def process(self, data: bytes) -> bytes:
        oflag = self.termios.oflag
        if not oflag & OPOST:
            return data
        if oflag & OLCUC:
            data = data.upper()
        if oflag & OCRNL:
            data = data.replace(b"\r", b"\n")
        if oflag & ONLCR:
            data = data.replace(b"\n", b"\r\n")
        return data

    def write(self, data: bytes) -> int:
        """Errors: EAGAIN while ctrl-S holds the output, EIO after a hang-up."""
        if self.gone:
            raise Errno(errno.EIO)
        if self.stopped:
            raise Errno(errno.EAGAIN)

        self.emit(data)
        return len(data)

    def read(self, count: int) -> bytes:
        """Canonical: at most one line. Raw: what is there, at least VMIN bytes. Errors: EAGAIN."""
        if not count:
            return b""
        if self.ends:
            return self.read_line(count)
        least = 1 if self.termios.lflag & ICANON else min(self.termios.cc[VMIN], count)
        if len(self.ready) < least or (self.termios.lflag & ICANON):
            if self.gone:
                return b""
            raise Errno(errno.EAGAIN)

        return bytes(self.ready.popleft() for _ in range(min(count, len(self.ready))))

    def read_line(self, count: int) -> bytes:
        out = bytearray()
        while self.ends[0] and len(out) < count:
            self.ends[0] -= 1
            entry = self.ready.popleft()
            if entry != EOF:
                out.append(entry)
        # A line whose bytes are all read but for its mark ends with this read, as a line and an EOF after it do in one.
        if self.ends[0] == 1 and self.ready[0] == EOF and out:
            self.ends[0] = 0
            self.ready.popleft()
        if not self.ends[0]:
            self.ends.popleft()
        return bytes(out)

    # Control

    def set_termios(self, task: Any, data: bytes, flush: bool) -> None:
        iflag, oflag, cflag, lflag, line, cc = TERMIOS.unpack(data[: TERMIOS.size])
        was = self.termios.lflag & ICANON
        self.termios = Termios(iflag, oflag, cflag, lflag, line, cc)
        if flush:
            self.flush_input()
        if was and not lflag & ICANON:  # what was typed but not ended is raw input now
            self.ready.extend(self.line)
            self.line.clear()
            self.ready = deque(byte for byte in self.ready if byte != EOF)
            self.ends.clear()
        elif not was and lflag & ICANON and self.ready:
            self.ends.append(len(self.ready))
        if self.stopped and not iflag & IXON:
            self.go_on()
        self.readable.wake()

    def resize(self, window: tuple[int, int, int, int]) -> None:
        if window != self.window:
            self.window = window
            if self.foreground:
                self.kill_group(self.foreground, signal.SIGWINCH)


def control(byte: int) -> bool:
    return byte < 32 or byte == 127
