"""System calls that send and receive messages: with addresses, with descriptors (net/socket.c, net/core/scm.c)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from domain.posix.errors import Errno, Interrupted
from domain.posix.files import File
from domain.posix.sys_file import Blocking, Pieces, Result, gather, piece, vector
from domain.posix.sys_socket import AF_UNIX, SOL_SOCKET, address_in, address_out, called, find, patient
from domain.posix.table import signed32, syscall
from domain.posix.unix import DATAGRAM, NOBODY, STREAM, Credentials, UnixSocket

if TYPE_CHECKING:
    from domain.posix.task import Task

MSG_PEEK, MSG_CTRUNC, MSG_TRUNC, MSG_DONTWAIT, MSG_WAITALL = 0x2, 0x8, 0x20, 0x40, 0x100
MSG_OOB, MSG_NOSIGNAL, MSG_CMSG_CLOEXEC = 0x1, 0x4000, 0x4000_0000
SCM_RIGHTS, SCM_CREDENTIALS, SCM_MAX_FD = 1, 2, 253
MSGHDR = struct.Struct("<QI4xQQQQi4x")  # name, its size, iov, count, control, its size, flags
CMSGHDR = struct.Struct("<Qii")  # size with the header, level, type
MAX_CONTROL = 1 << 16
Rest = Callable[[bytes, Credentials, list[File], int], None]


def send(task: Task, file: UnixSocket, pieces: Pieces, flags: int, name: bytes, files: list[File]) -> Result:
    """A stream takes all of it, however long that takes; after a signal or an error it is what went until then."""
    if flags & MSG_OOB:
        raise Errno(errno.EOPNOTSUPP)
    if name and file.kind != DATAGRAM:
        raise Errno(errno.EISCONN if file.connected else errno.EOPNOTSUPP)
    target = called(task, name) if name else None
    if target is not None and target.kind != DATAGRAM:
        raise Errno(errno.EPROTOTYPE)
    total, done = sum(size for _, size in pieces), 0

    def attempt() -> int:
        nonlocal done
        while True:
            data = gather(task, pieces, done) if total else b""
            try:
                done += file.send(task, data, target, [] if done else files, bool(flags & MSG_NOSIGNAL) or done > 0)
            except Errno as error:
                if done and (error.number != errno.EAGAIN or flags & MSG_DONTWAIT or file.flags & os.O_NONBLOCK):
                    return done
                raise
            if done >= total or file.kind != STREAM:
                return done

    result = patient(file, attempt, target.queues() if target else (), bool(flags & MSG_DONTWAIT))
    return result if isinstance(result, int) else kept(result, lambda: done)


def kept(wait: Blocking, done: Callable[[], int]) -> Blocking:
    try:
        return (yield from wait)
    except (Errno, Interrupted):
        if not done():
            raise
        return done()


@syscall(44)
def sys_sendto(task: Task, fd: int, buffer: int, size: int, flags: int, address: int, length: int) -> Result:
    name = address_in(task, address, length) if address else b""
    return send(task, find(task, fd), piece(buffer, size), signed32(flags), name, [])


@syscall(46, "partial", "descriptors go along, credentials are the sender's own")
def sys_sendmsg(task: Task, fd: int, message: int, flags: int) -> Result:
    file = find(task, fd)
    address, length, iov, count, control, control_size, _ = MSGHDR.unpack(task.memory.copy_in(message, MSGHDR.size))
    name = address_in(task, address, length) if address and length else b""
    return send(task, file, vector(task, iov, count), signed32(flags), name, rights(task, control, control_size))


def rights(task: Task, address: int, size: int) -> list[File]:
    """The open files that go along. Errors: EINVAL, EBADF."""
    if size > MAX_CONTROL:
        raise Errno(errno.ENOBUFS)
    raw = task.memory.copy_in(address, size) if size else b""
    files: list[File] = []
    at = 0
    while at + CMSGHDR.size <= len(raw):
        length, level, kind = CMSGHDR.unpack_from(raw, at)
        if not CMSGHDR.size <= length <= len(raw) - at:
            raise Errno(errno.EINVAL)
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            count = (length - CMSGHDR.size) // 4
            files += [task.files.named(fd) for fd in struct.unpack_from(f"<{count}i", raw, at + CMSGHDR.size)]
        elif level == SOL_SOCKET and kind != SCM_CREDENTIALS:
            raise Errno(errno.EINVAL)
        at += length + 7 & ~7
    if len(files) > SCM_MAX_FD:
        raise Errno(errno.EINVAL)
    return files


@syscall(45)
def sys_recvfrom(task: Task, fd: int, buffer: int, size: int, flags: int, address: int, length: int) -> Result:
    def name(sender: bytes) -> None:
        if address:
            address_out(task, sender, address, length)

    return receive(task, find(task, fd), piece(buffer, size), signed32(flags), lambda sender, *_: name(sender))


@syscall(47)
def sys_recvmsg(task: Task, fd: int, message: int, flags: int) -> Result:
    flags, file, memory = signed32(flags), find(task, fd), task.memory
    address, length, iov, count, control, room, _ = MSGHDR.unpack(memory.copy_in(message, MSGHDR.size))

    def rest(sender: bytes, credentials: Credentials, files: list[File], truncated: int) -> None:
        if address:
            raw = AF_UNIX.to_bytes(2, "little") + sender + (b"\0" if sender and sender[0] else b"")
            memory.copy_out(address, raw[:length])
            memory.copy_out(message + 8, (len(raw) if sender else 0).to_bytes(4, "little"))
        raw, lost = control_out(task, file, credentials, files, room, bool(flags & MSG_CMSG_CLOEXEC))
        memory.copy_out(control, raw)
        memory.copy_out(message + 40, len(raw).to_bytes(8, "little"))
        memory.copy_out(message + 48, (truncated | lost | flags & MSG_CMSG_CLOEXEC).to_bytes(4, "little"))

    return receive(task, file, vector(task, iov, count), flags, rest)


def control_out(
    task: Task, file: UnixSocket, credentials: Credentials, files: list[File], room: int, cloexec: bool
) -> tuple[bytes, int]:
    """Control messages, as far as there is room, and MSG_CTRUNC where there is not."""
    raw, lost = b"", 0
    if file.credentials_wanted:
        entry = CMSGHDR.pack(CMSGHDR.size + 12, SOL_SOCKET, SCM_CREDENTIALS) + struct.pack("<iII", *credentials)
        if len(entry) <= room:
            raw += entry.ljust(-(-len(entry) // 8) * 8, b"\0")[:room]
        else:
            lost = MSG_CTRUNC
    fits = max(0, room - len(raw) - CMSGHDR.size) // 4
    numbers: list[int] = []
    for other in files[:fits]:
        try:
            numbers.append(task.files.install(other, cloexec))
        except Errno:
            break
    if len(numbers) < len(files):
        lost = MSG_CTRUNC
    if numbers:
        entry = CMSGHDR.pack(CMSGHDR.size + 4 * len(numbers), SOL_SOCKET, SCM_RIGHTS)
        entry += struct.pack(f"<{len(numbers)}i", *numbers)
        raw += entry.ljust(-(-len(entry) // 8) * 8, b"\0")[: room - len(raw)]
    return raw, lost


def receive(task: Task, file: UnixSocket, pieces: Pieces, flags: int, rest: Rest) -> Result:
    """Into the pieces; `rest` tells who sent it, with what, and whether some of it is lost. MSG_WAITALL waits for all."""
    if flags & MSG_OOB:
        raise Errno(errno.EOPNOTSUPP if file.kind != STREAM else errno.EINVAL)
    total, done = sum(size for _, size in pieces), 0
    peek = bool(flags & MSG_PEEK)
    never = bool(flags & MSG_DONTWAIT or file.flags & os.O_NONBLOCK)
    patience = flags & MSG_WAITALL and file.kind == STREAM and not peek and not never

    def attempt() -> int:
        nonlocal done
        data, message, whole = file.receive(total - done, not never, peek)
        sender, credentials = (message.sender, message.credentials) if message else (b"", NOBODY)
        try:
            scatter(task, pieces, done, data)
            lost = MSG_TRUNC if whole > total and file.kind != STREAM else 0
            rest(sender, credentials, message.files if message else [], lost)
        finally:
            if message and not peek:
                message.drop()
        done += len(data)
        if patience and data and done < total:
            raise Errno(errno.EAGAIN)
        return whole if flags & MSG_TRUNC and file.kind != STREAM else done

    result = patient(file, attempt, never=never)
    return result if isinstance(result, int) else kept(result, lambda: done)


def scatter(task: Task, pieces: Pieces, skip: int, data: bytes) -> None:
    for address, size in pieces:
        if skip >= size:
            skip -= size
            continue
        part, data = data[: size - skip], data[size - skip :]
        task.memory.copy_out(address + skip, part)
        skip = 0
