"""A task without a program: real files, names and descriptors over memory that is a bytearray."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

from domain.posix import (
    devices,
    sys_descriptor,
    sys_directory,
    sys_epoll,
    sys_event,
    sys_file,
    sys_message,
    sys_poll,
    sys_socket,
    sys_stat,
    sys_transfer,
)
from domain.posix.errors import Errno
from domain.posix.files import FileTable
from domain.posix.ramfs import Ramfs
from domain.posix.table import TABLE
from domain.posix.tty import Tty
from domain.posix.vfs import FsContext, Vfs

MODULES = (
    sys_descriptor, sys_directory, sys_epoll, sys_event, sys_file, sys_message, sys_poll, sys_socket, sys_stat, sys_transfer,
)  # fmt: skip
CALLS = {call.name: call.handler for call in TABLE.values() if any(call.handler.__module__ == m.__name__ for m in MODULES)}
SIZE = 4 << 20
FIRST = 0x10000  # addresses below fault


class Memory:
    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.top = FIRST

    def check(self, address: int, size: int) -> int:
        if not FIRST <= address <= address + size <= FIRST + SIZE:
            raise Errno(errno.EFAULT)
        return address - FIRST

    def copy_in(self, address: int, size: int) -> bytes:
        at = self.check(address, size)
        return bytes(self.data[at : at + size])

    def copy_out(self, address: int, data: bytes) -> None:
        at = self.check(address, len(data))
        self.data[at : at + len(data)] = data

    def string(self, address: int, limit: int = 4096) -> bytes:
        at = self.check(address, 1)
        end = self.data.find(b"\0", at, at + limit)
        if end < 0:
            raise Errno(errno.ENAMETOOLONG)
        return bytes(self.data[at:end])

    def room(self, size: int) -> int:
        if self.top + size > FIRST + SIZE:
            self.top = FIRST
        address, self.top = self.top, self.top + (size + 15 & ~15)
        return address

    def put(self, data: bytes) -> int:
        address = self.room(len(data))
        self.copy_out(address, data)
        return address


class Task:
    """`call` makes a system call: strings and bytes among its arguments become addresses. The result, or -errno, or the
    generator of a call that waits."""

    def __init__(self, **limits: int) -> None:
        self.clock = itertools.count(10**18, 1000)
        self.time = 0
        self.signals: list[int] = []
        self.output = bytearray()
        self.groups: list[tuple[int, int]] = []
        self.memory = Memory()
        self.files = FileTable()
        self.ramfs = Ramfs(lambda: next(self.clock), **limits)
        self.vfs = Vfs(lambda: next(self.clock), self.ramfs)
        self.fs = FsContext(self.vfs, self.vfs.root, self.vfs.root)
        self.tty = Tty(self.output.extend, lambda pgid, signo: self.groups.append((pgid, int(signo))))
        devices.install(self.vfs, self.tty)
        self.ignored: set[int] = set()
        self.process = SimpleNamespace(
            pid=7, pgid=7, sid=7, uid=0, gid=0, terminal=None, send_signal=self.signals.append,
            ignores=lambda signo: signo in self.ignored,
        )  # fmt: skip
        self.system = SimpleNamespace(now_ns=lambda: self.time)

    def blocks(self, signo: int) -> bool:
        return False

    def call(self, name: str, *arguments: Any) -> Any:
        words = [self.word(argument) & (1 << 64) - 1 for argument in arguments]
        words += [0] * (6 - len(words))
        handler = CALLS[name]
        count = next(call.arguments for call in TABLE.values() if call.handler is handler)
        try:
            return handler(self, *words[:count])
        except Errno as error:
            return -error.number

    def word(self, argument: Any) -> int:
        if isinstance(argument, str):
            argument = argument.encode()
        return self.memory.put(argument + b"\0") if isinstance(argument, bytes) else argument  # type: ignore[no-any-return]

    def read(self, fd: int, count: int) -> bytes | int:
        buffer = self.memory.room(count)
        done = self.call("read", fd, buffer, count)
        return self.memory.copy_in(buffer, done) if isinstance(done, int) and done >= 0 else done  # type: ignore[no-any-return]

    def pipe(self, flags: int = 0) -> tuple[int, int]:
        address = self.memory.room(8)
        assert self.call("pipe2", address, flags) == 0
        return struct.unpack("<ii", self.memory.copy_in(address, 8))  # type: ignore[return-value]


def finish(waiting: Generator[Any, Any, int], woken: Any = True) -> int | None:
    """Go on with a call that waits: its result, or None where it waits again."""
    try:
        waiting.send(woken)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    except Errno as error:
        return -error.number
    return None
