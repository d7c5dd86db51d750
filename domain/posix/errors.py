"""How a system call fails, and how a wait ends early.

A handler raises Errno; the run loop gives the program the negative number, as Linux does in rax.
"""

from __future__ import annotations

import errno
import os


class Errno(Exception):
    """One of Linux's error numbers (asm-generic/errno.h)."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"{errno.errorcode.get(self.number, self.number)}: {os.strerror(self.number)}"


class Interrupted(Exception):
    """Raised at the `yield` of a handler that waits: a signal with a handler is to be delivered first.

    One that lets it pass is restarted where the action has SA_RESTART, and is EINTR otherwise. One that must never be
    restarted (signal(7): sleeps, poll, select, sigsuspend) catches it and raises Errno(EINTR). One that has done part of
    its work (a write to a pipe) catches it and returns what it did.
    """


class Killed(BaseException):
    """Raised at the `yield` of a handler whose task ends: `finally` undoes what it holds. Not to be caught."""
