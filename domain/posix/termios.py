"""The layout and the bits of struct termios, and the requests of terminals (asm-generic/termbits.h, ioctls.h)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

TCGETS, TCSETS, TCSETSW, TCSETSF = 0x5401, 0x5402, 0x5403, 0x5404
TCSBRK, TCXONC, TCFLSH, TIOCEXCL, TIOCNXCL, TIOCSCTTY = 0x5409, 0x540A, 0x540B, 0x540C, 0x540D, 0x540E
TIOCGPGRP, TIOCSPGRP, TIOCOUTQ, TIOCGWINSZ, TIOCSWINSZ = 0x540F, 0x5410, 0x5411, 0x5413, 0x5414
FIONREAD, TIOCNOTTY, TIOCGSID, TCGETS2, TCSETS2 = 0x541B, 0x5422, 0x5429, 0x802C542A, 0x402C542B

IGNBRK, ISTRIP, INLCR, IGNCR, ICRNL, IUCLC, IXON, IXANY, IMAXBEL = 1, 0x20, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800, 0x2000
OPOST, OLCUC, ONLCR, OCRNL, ONOCR, ONLRET = 1, 2, 4, 8, 0x10, 0x20
ISIG, ICANON, ECHO, ECHOE, ECHOK, ECHONL, NOFLSH, TOSTOP = 1, 2, 8, 0x10, 0x20, 0x40, 0x80, 0x100
ECHOCTL, ECHOKE, IEXTEN = 0x200, 0x800, 0x8000
VINTR, VQUIT, VERASE, VKILL, VEOF, VTIME, VMIN, VSTART, VSTOP, VSUSP = 0, 1, 2, 3, 4, 5, 6, 8, 9, 10
VEOL, VREPRINT, VWERASE, VLNEXT, VEOL2 = 11, 12, 14, 15, 16
TERMIOS = struct.Struct("<IIIIB19s")  # c_iflag, c_oflag, c_cflag, c_lflag, c_line, c_cc
SPEEDS = struct.Struct("<II")
WINSIZE = struct.Struct("<HHHH")  # rows, columns, and two of pixels
BAUD = 38400


@dataclass(slots=True)
class Termios:
    iflag: int = ICRNL | IXON
    oflag: int = OPOST | ONLCR
    cflag: int = 0x4BF  # B38400 | CS8 | CREAD | HUPCL
    lflag: int = ISIG | ICANON | ECHO | ECHOE | ECHOK | ECHOCTL | ECHOKE | IEXTEN
    line: int = 0
    cc: bytes = field(default=bytes([3, 28, 127, 21, 4, 0, 1, 0, 17, 19, 26, 0, 18, 15, 23, 22, 0, 0, 0]))

    def pack(self) -> bytes:
        return TERMIOS.pack(self.iflag, self.oflag, self.cflag, self.lflag, self.line, self.cc)
