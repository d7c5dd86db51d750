"""System calls on sockets (net/socket.c): those of one machine. There is no network, and other families say so."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from domain.posix import namespace
from domain.posix.errors import Errno
from domain.posix.inode import Socket
from domain.posix.sys_file import Blocking, Result
from domain.posix.table import signed32, syscall
from domain.posix.unix import DATAGRAM, NOBODY, PACKETS, ROOM, STREAM, UnixSocket, bound_to
from domain.posix.vfs import existing, walk
from domain.posix.wait import WaitQueue

if TYPE_CHECKING:
    from domain.posix.task import Task

AF_UNIX, PATH_BYTES = 1, 108
SOCK_TYPE, SOCK_RAW = 0xF, 3
SOL_SOCKET = 1
SO_PASSCRED, SO_PEERCRED, SO_PROTOCOL, SO_DOMAIN = 16, 17, 38, 39
SET_IN_VAIN = {  # options that change nothing here
    socket.SO_REUSEADDR, socket.SO_KEEPALIVE, socket.SO_SNDBUF, socket.SO_RCVBUF, socket.SO_LINGER, socket.SO_BROADCAST,
    socket.SO_PRIORITY, socket.SO_DONTROUTE, socket.SO_OOBINLINE, socket.SO_REUSEPORT,
}  # fmt: skip


def find(task: Task, fd: int) -> UnixSocket:
    file = task.files.get(signed32(fd))
    if not isinstance(file, UnixSocket):
        raise Errno(errno.ENOTSOCK)
    return file


def new(task: Task, kind: int, flags: int) -> UnixSocket:
    inode = Socket(task.fs.vfs.sockets, stat.S_IFSOCK | 0o777)
    process = task.process
    return UnixSocket(inode, os.O_RDWR | (flags & os.O_NONBLOCK), kind, (process.pid, process.uid, process.gid))


def wanted(family: int, kind: int, protocol: int) -> tuple[int, int]:
    """The type and the flags. Errors: EAFNOSUPPORT, ESOCKTNOSUPPORT, EPROTONOSUPPORT, EINVAL."""
    family, kind, protocol = signed32(family), signed32(kind), signed32(protocol)
    if kind & ~(SOCK_TYPE | os.O_CLOEXEC | os.O_NONBLOCK):
        raise Errno(errno.EINVAL)
    if family != AF_UNIX:
        raise Errno(errno.EAFNOSUPPORT)
    if protocol not in (0, AF_UNIX):
        raise Errno(errno.EPROTONOSUPPORT)
    plain = DATAGRAM if kind & SOCK_TYPE == SOCK_RAW else kind & SOCK_TYPE
    if plain not in (STREAM, DATAGRAM, PACKETS):
        raise Errno(errno.ESOCKTNOSUPPORT)
    return plain, kind & ~SOCK_TYPE


@syscall(41, "partial", "AF_UNIX; every other family is unknown, which programs take for a machine without a network")
def sys_socket(task: Task, family: int, kind: int, protocol: int) -> int:
    plain, flags = wanted(family, kind, protocol)
    return task.files.install(new(task, plain, flags), bool(flags & os.O_CLOEXEC))


@syscall(53, "partial", "as socket")
def sys_socketpair(task: Task, family: int, kind: int, protocol: int, pair: int) -> int:
    plain, flags = wanted(family, kind, protocol)
    ends = [new(task, plain, flags), new(task, plain, flags)]
    ends[0].join(ends[1])
    made: list[int] = []
    try:
        made += [task.files.install(end, bool(flags & os.O_CLOEXEC)) for end in ends[:1]]
        made += [task.files.install(end, bool(flags & os.O_CLOEXEC)) for end in ends[1:]]
        task.memory.copy_out(pair, struct.pack("<ii", *made))
    except Errno:
        for fd in made:
            task.files.close(fd)
        raise
    return 0


# ---- addresses


def address_in(task: Task, address: int, size: int) -> bytes:
    """What follows the family: a path without its end, or a zero and an abstract name. Errors: EINVAL."""
    size = signed32(size)
    if not 2 < size <= 2 + PATH_BYTES:
        raise Errno(errno.EINVAL)
    raw = task.memory.copy_in(address, size)
    if int.from_bytes(raw[:2], "little") != AF_UNIX:
        raise Errno(errno.EINVAL)
    return raw[2:] if raw[2] == 0 else raw[2:].partition(b"\0")[0]


def address_out(task: Task, name: bytes, address: int, size_at: int) -> None:
    """As much of it as there is room for, and its whole size."""
    if not size_at:
        return
    room = int.from_bytes(task.memory.copy_in(size_at, 4), "little", signed=True)
    if room < 0:
        raise Errno(errno.EINVAL)
    raw = AF_UNIX.to_bytes(2, "little") + name + (b"\0" if name and name[0] else b"")
    if address:
        task.memory.copy_out(address, raw[:room])
    task.memory.copy_out(size_at, len(raw).to_bytes(4, "little"))


def called(task: Task, name: bytes) -> UnixSocket:
    """Who has that name. Errors: ECONNREFUSED, and those of a path."""
    if name[:1] == b"\0":
        found = task.fs.vfs.sockets.names.get(name)
        if not isinstance(found, UnixSocket):
            raise Errno(errno.ECONNREFUSED)
        return found
    return bound_to(existing(task, task.fs, task.fs.cwd, name))


@syscall(49)
def sys_bind(task: Task, fd: int, address: int, size: int) -> int:
    file, names = find(task, fd), task.fs.vfs.sockets.names
    if signed32(size) == 2 and task.memory.copy_in(address, 2) == b"\1\0":  # any name
        number = 0
        while (name := b"\0%05x" % number) in names:
            number += 1
    else:
        name = address_in(task, address, size)
    if file.name:
        raise Errno(errno.EINVAL)
    if name[0] == 0:
        if name in names:
            raise Errno(errno.EADDRINUSE)
        names[name] = file
        file.bound = names
    else:
        found = walk(task, task.fs, task.fs.cwd, name, follow=False)
        if found.inode is not None:
            raise Errno(errno.EADDRINUSE)
        inode = namespace.create(found, stat.S_IFSOCK | 0o777 & ~task.fs.umask)
        assert isinstance(inode, Socket), "a file system made what it was asked for"
        inode.listener = file
        file.bound = inode
    file.name = name
    return 0


@syscall(51)
def sys_getsockname(task: Task, fd: int, address: int, size: int) -> int:
    address_out(task, find(task, fd).name, address, size)
    return 0


@syscall(52)
def sys_getpeername(task: Task, fd: int, address: int, size: int) -> int:
    file = find(task, fd)
    if not file.connected or (file.peer is None and file.kind == DATAGRAM):
        raise Errno(errno.ENOTCONN)
    address_out(task, file.peer_name, address, size)
    return 0


# ---- connections


@syscall(50)
def sys_listen(task: Task, fd: int, backlog: int) -> int:
    find(task, fd).listen(backlog & 0xFFFF_FFFF)
    return 0


def patient(file: UnixSocket, attempt: Callable[[], int], others: tuple[WaitQueue, ...] = (), never: bool = False) -> Result:
    """As sys_file.blocking: also at others' queues, and `never` for MSG_DONTWAIT."""
    try:
        return attempt()
    except Errno as error:
        if error.number != errno.EAGAIN or never or file.flags & os.O_NONBLOCK:
            raise
    return until_done(file, attempt, others)


def until_done(file: UnixSocket, attempt: Callable[[], int], others: tuple[WaitQueue, ...]) -> Blocking:
    while True:
        yield (*file.queues(), *others)
        try:
            return attempt()
        except Errno as error:
            if error.number != errno.EAGAIN:
                raise


@syscall(42)
def sys_connect(task: Task, fd: int, address: int, size: int) -> Result:
    file = find(task, fd)
    if file.kind == DATAGRAM and signed32(size) >= 2 and task.memory.copy_in(address, 2) == b"\0\0":
        file.peer, file.connected = None, False
        return 0
    name = address_in(task, address, size)
    other = called(task, name)

    def attempt() -> int:
        file.connect(other, None if file.kind == DATAGRAM else new(task, file.kind, 0))
        return 0

    return patient(file, attempt, other.queues())


@syscall(43)
def sys_accept(task: Task, fd: int, address: int, size: int) -> Result:
    return sys_accept4(task, fd, address, size, 0)


@syscall(288)
def sys_accept4(task: Task, fd: int, address: int, size: int, flags: int) -> Result:
    flags, file = signed32(flags), find(task, fd)
    if flags & ~(os.O_CLOEXEC | os.O_NONBLOCK):
        raise Errno(errno.EINVAL)

    def attempt() -> int:
        task.files.free()  # EMFILE before anybody is accepted
        made = file.accept()
        made.flags |= flags & os.O_NONBLOCK
        number = task.files.install(made, bool(flags & os.O_CLOEXEC))
        try:
            if address:
                address_out(task, made.peer_name, address, size)
        except Errno:
            task.files.close(number)
            raise
        return number

    return patient(file, attempt)


@syscall(48)
def sys_shutdown(task: Task, fd: int, how: int) -> int:
    file, how = find(task, fd), signed32(how)
    if not 0 <= how <= 2:
        raise Errno(errno.EINVAL)
    file.shut(how != 1, how != 0)
    return 0


# ---- options


@syscall(54, "partial", "SO_PASSCRED; sizes of buffers and the like are accepted")
def sys_setsockopt(task: Task, fd: int, level: int, option: int, value: int, size: int) -> int:
    file, option = find(task, fd), signed32(option)
    if signed32(level) != SOL_SOCKET:
        raise Errno(errno.EOPNOTSUPP)
    if signed32(size) < 4:
        raise Errno(errno.EINVAL)
    word = int.from_bytes(task.memory.copy_in(value, 4), "little")
    if option == SO_PASSCRED:
        file.credentials_wanted = bool(word)
    elif option not in SET_IN_VAIN:
        raise Errno(errno.ENOPROTOOPT)
    return 0


@syscall(55, "partial", "what sockets of one machine are asked: type, error, peer, sizes")
def sys_getsockopt(task: Task, fd: int, level: int, option: int, value: int, size_at: int) -> int:
    file = find(task, fd)
    if signed32(level) != SOL_SOCKET:
        raise Errno(errno.EOPNOTSUPP)
    room = int.from_bytes(task.memory.copy_in(size_at, 4), "little", signed=True)
    if room < 0:
        raise Errno(errno.EINVAL)
    words: dict[int, Callable[[], int]] = {
        socket.SO_TYPE: lambda: file.kind, socket.SO_ERROR: file.take_error, SO_PASSCRED: lambda: file.credentials_wanted,
        socket.SO_ACCEPTCONN: lambda: file.backlog is not None, SO_DOMAIN: lambda: AF_UNIX, SO_PROTOCOL: lambda: 0,
        socket.SO_SNDBUF: lambda: ROOM, socket.SO_RCVBUF: lambda: ROOM,
    }  # fmt: skip
    option = signed32(option)
    if option == SO_PEERCRED:
        raw = struct.pack("<iII", *(file.partner if file.connected or file.backlog is not None else NOBODY))
    elif option in words:
        raw = struct.pack("<i", words[option]())
    elif option in SET_IN_VAIN:
        raw = bytes(8 if option == socket.SO_LINGER else 4)
    else:
        raise Errno(errno.ENOPROTOOPT)
    task.memory.copy_out(value, raw[:room])
    task.memory.copy_out(size_at, min(room, len(raw)).to_bytes(4, "little"))
    return 0
