"""The wall clock of every domain is the host's: dom0 says so at its start, and again whenever somebody has set the host's, or
the host has slept, which stops real time and not the wall clock."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from typing import TYPE_CHECKING

from hypervisor.public.clock import SetTime

if TYPE_CHECKING:
    from domain.kernel import Kernel

SECOND = 10**9
NEVER = struct.pack("<4q", 0, 0, 1 << 40, 0)  # struct itimerspec
ABSOLUTE, CANCEL_ON_SET = 1, 2


def watch() -> int:
    """A descriptor that becomes readable when CLOCK_REALTIME jumps (timerfd_create(2)). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0 or libc.timerfd_settime(fd, ABSOLUTE | CANCEL_ON_SET, NEVER, None):
        raise OSError(ctypes.get_errno(), "timerfd")
    return fd


def set_wall(kernel: Kernel, unix_ns: int) -> None:
    """It is so late now. Raises XenError, OverflowError."""
    seconds, ns = divmod(unix_ns, SECOND)
    kernel.call(SetTime(seconds, ns, kernel.now_ns()))


async def follow(kernel: Kernel, fd: int) -> None:
    """For ever."""
    while True:
        set_wall(kernel, time.time_ns())
        await kernel.readable(fd)
        try:
            os.read(fd, 8)
        except OSError:
            pass  # ECANCELED is what it says
