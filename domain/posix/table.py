"""The table of system calls: number, handler, and how much of Linux's call it is.

    @syscall(0)
    def sys_read(task: Task, fd: int, buffer: int, count: int) -> int: ...

A handler takes the task and as many of the six arguments as it names, each an unsigned 64-bit word (`signed32` for a C int).
It returns what goes to rax, raises Errno, or is a generator: what it yields it waits for (wait.py), what it returns is the
result. A handler that changed the registers itself (execve, rt_sigreturn) returns None.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Level = Literal["full", "partial", "none"]
Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)
MAX_ARGUMENTS = 6


@dataclass(frozen=True, slots=True)
class Call:
    """One system call. `level` full: what programs use of it behaves as on Linux; partial: `note` says what does
    not; none: accepted and without effect, `note` says why that is harmless."""

    number: int
    name: str
    handler: Handler
    arguments: int
    level: Level
    note: str
    words: Callable[[Any], tuple[int, ...]]  # as many of the six as it takes


TABLE: dict[int, Call] = {}


def syscall(number: int, level: Level = "full", note: str = "") -> Callable[[H], H]:
    """Register `sys_NAME` as system call `number`."""

    def register(handler: H) -> H:
        name = handler.__name__.removeprefix("sys_")
        assert number not in TABLE, f"system call {number} is {TABLE[number].name} already, and {name} too"
        assert level == "full" or note, f"{name}: what is missing is not said"
        arguments = len(inspect.signature(handler).parameters) - 1
        assert arguments <= MAX_ARGUMENTS, f"{name} takes more than six arguments"
        TABLE[number] = Call(number, name, handler, arguments, level, note, struct.Struct(f"<{arguments}Q").unpack_from)
        return handler

    return register


def signed32(word: int) -> int:
    """The C int in an argument's low half."""
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >> 31 else word


def signed64(word: int) -> int:
    """The C long of an argument."""
    return word - (1 << 64) if word >> 63 else word


def documentation() -> str:
    """The table as Markdown, by number: domain/posix/SYSCALLS.md. `calls` must be imported."""
    levels = {level: sum(call.level == level for call in TABLE.values()) for level in ("full", "partial", "none")}
    lines = [
        "# System calls of the POSIX kernel", "",
        "Made from the decorators of the handlers: `python -m domain.posix.calls >domain/posix/SYSCALLS.md`.", "",
        f"{len(TABLE)} calls: {levels['full']} full (what programs use of it behaves as on Linux), {levels['partial']}",
        f"partial (the last column says what does not), {levels['none']} none (accepted or refused, and without effect).",
        "Every other number is ENOSYS.", "", "| nr | call | level | |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {call.number} | {call.name} | {call.level} | {call.note} |" for _, call in sorted(TABLE.items())]
    return "\n".join(lines) + "\n"
