"""Sockets of one machine: AF_UNIX, streams, datagrams and sequenced packets (net/unix/af_unix.c).

What is sent lies in the receiver's queue, message by message, with the descriptors that go along; a stream's reader does not
see where one ends, unless the next brings descriptors. Like every open file a socket never blocks: EAGAIN, and the queues.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from domain.posix.errors import Errno
from domain.posix.files import POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, POLLRDNORM, POLLWRNORM, File
from domain.posix.inode import Inode, Socket
from domain.posix.termios import FIONREAD
from domain.posix.wait import WaitQueue

STREAM, DATAGRAM, PACKETS = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM), int(socket.SOCK_SEQPACKET)
ROOM = 212_992  # bytes that wait for a receiver: net.core.wmem_default
LARGEST = ROOM - 32  # of one message
MOST_DATAGRAMS = 10  # that wait for a receiver who is not the sender's partner: net.unix.max_dgram_qlen
SOMAXCONN = 4096
Credentials = tuple[int, int, int]  # pid, uid, gid
NOBODY: Credentials = (0, 65534, 65534)


@dataclass(slots=True)
class Message:
    data: memoryview
    sender: bytes  # name
    credentials: Credentials
    files: list[File] = field(default_factory=list)  # each holds a reference

    def drop(self) -> None:
        for file in self.files:
            let_go(file)
        self.files = []


def let_go(file: File) -> None:
    """A reference that was in flight."""
    file.references -= 1
    if not file.references:
        file.released()


class UnixSocket(File):
    """`name`: the address after its family, b"" without one. `peer`: to whom it is connected."""

    def __init__(self, inode: Inode, flags: int, kind: int, maker: Credentials) -> None:
        super().__init__(inode, flags)
        self.kind, self.name = kind, b""
        self.bound: Socket | dict[bytes, object] | None = None  # the file, or the table of abstract names
        self.owner, self.partner = maker, NOBODY  # SO_PEERCRED of the other and of this one
        self.peer: UnixSocket | None = None
        self.gone_name = b""  # of a peer that has closed
        self.connected = False  # once; its peer may have gone
        self.messages: deque[Message] = deque()
        self.waiting = 0  # bytes of them
        self.backlog: deque[UnixSocket] | None = None  # of a listener
        self.longest = 0
        self.deaf = self.mute = False  # shut down for reading, for writing
        self.closed = self.reset = False  # reset: it was never accepted
        self.error = 0
        self.credentials_wanted = False
        self.arrived, self.drained = WaitQueue(), WaitQueue()

    # ---- connections

    def join(self, other: UnixSocket) -> None:
        """The two are each other's."""
        self.peer, other.peer = other, self
        self.connected = other.connected = True
        self.partner, other.partner = other.owner, self.owner

    @property
    def peer_name(self) -> bytes:
        return self.peer.name if self.peer else self.gone_name

    def listen(self, longest: int) -> None:
        if self.kind == DATAGRAM:
            raise Errno(errno.EOPNOTSUPP)
        if not self.name or self.connected:
            raise Errno(errno.EINVAL)

        self.longest = min(longest, SOMAXCONN)
        if self.backlog is None:
            self.backlog = deque()

    def connect(self, other: UnixSocket, made: UnixSocket | None) -> None:
        """To a listener: `made` is its end. Errors: EAGAIN while it has enough to accept."""
        if other.kind != self.kind:
            raise Errno(errno.EPROTOTYPE)
        if made is None:
            self.peer, self.connected = other, True
            return
        if self.connected:
            raise Errno(errno.EISCONN)
        if other.backlog is None or other.closed:
            raise Errno(errno.ECONNREFUSED)
        if len(other.backlog) > other.longest:
            raise Errno(errno.EAGAIN)

        made.name, made.owner = other.name, other.owner
        self.join(made)
        other.backlog.append(made)
        other.arrived.wake()

    def accept(self) -> UnixSocket:
        if self.kind == DATAGRAM:
            raise Errno(errno.EOPNOTSUPP)
        if self.backlog is None:
            raise Errno(errno.EINVAL)
        if not self.backlog:
            raise Errno(errno.EAGAIN)

        made = self.backlog.popleft()
        self.drained.wake()
        return made

    def shut(self, reading: bool, writing: bool) -> None:
        if self.kind != DATAGRAM and not self.connected:
            raise Errno(errno.ENOTCONN)

        self.deaf, self.mute = self.deaf or reading, self.mute or writing
        if self.peer is not None and self.kind != DATAGRAM:
            self.peer.deaf, self.peer.mute = self.peer.deaf or writing, self.peer.mute or reading
            self.peer.announce()
        self.announce()

    def announce(self) -> None:
        self.arrived.wake()
        self.drained.wake()

    def released(self) -> None:
        super().released()
        self.closed = True
        if isinstance(self.bound, dict):
            self.bound.pop(self.name, None)
        elif self.bound is not None:
            self.bound.listener = None
        for made in self.backlog or ():
            made.reset = True
            made.released()
        peer = self.peer
        if peer is not None and self.kind != DATAGRAM:
            peer.deaf = peer.mute = True
            if self.messages or self.reset:
                peer.error = errno.ECONNRESET
            peer.peer, peer.gone_name = None, self.name
        for message in self.messages:
            message.drop()
        self.messages.clear()
        self.waiting = 0
        self.announce()
        if peer is not None:
            peer.announce()

    # ---- messages

    def take_error(self) -> int:
        error, self.error = self.error, 0
        return error

    def full(self, sender: UnixSocket) -> bool:
        others = self.kind == DATAGRAM and self.peer is not sender and len(self.messages) > MOST_DATAGRAMS
        return self.waiting >= ROOM or others

    def send(self, task: Any, data: bytes, to: UnixSocket | None, files: list[File], quiet: bool = False) -> int:
        """How many bytes it took: of a message, all. Errors: EAGAIN, EPIPE, ENOTCONN, ECONNREFUSED, ECONNRESET, EMSGSIZE."""
        if error := self.take_error():
            raise Errno(error)
        if to is None and not self.connected:
            raise Errno(errno.ENOTCONN)
        target = to or self.peer
        if self.mute or (target is not None and target.deaf) or (target is None and self.kind != DATAGRAM):
            if not quiet:
                task.process.send_signal(signal.SIGPIPE)
            raise Errno(errno.EPIPE)
        if target is None or target.closed:
            raise Errno(errno.ECONNREFUSED)
        if self.kind != STREAM and len(data) > LARGEST:
            raise Errno(errno.EMSGSIZE)
        if target.full(self):
            raise Errno(errno.EAGAIN)
        if self.kind == STREAM:
            data = data[: ROOM - target.waiting]
            if not data:
                return 0

        for file in files:
            file.references += 1
        process = task.process
        credentials = (process.pid, process.uid, process.gid)
        target.messages.append(Message(memoryview(bytes(data)), self.name, credentials, list(files)))
        target.waiting += len(data)
        target.arrived.wake()
        return len(data)

    def receive(self, count: int, waits: bool, peek: bool = False) -> tuple[bytes, Message | None, int]:
        """Bytes, the first message they came with, and how long that was. None: there is nothing more to come. The files of
        that message are the caller's to drop. Errors: EAGAIN, ECONNRESET; EINVAL, ENOTCONN where there is no connection."""
        if self.backlog is not None or (self.kind == STREAM and not self.connected):
            raise Errno(errno.EINVAL)
        if self.kind == PACKETS and not self.connected:
            raise Errno(errno.ENOTCONN)
        if not self.messages:
            if error := self.take_error():
                raise Errno(error)
            if self.deaf and (self.kind != DATAGRAM or waits):  # as it is there: one that does not wait is never told
                return b"", None, 0
            raise Errno(errno.EAGAIN)

        first = self.messages[0]
        whole = len(first.data)
        if self.kind != STREAM:
            data = bytes(first.data[:count])
            if not peek:
                self.messages.popleft()
                self.took(whole)
            return data, first, whole
        return self.stream(count, peek), first, whole

    def stream(self, count: int, peek: bool) -> bytes:
        """Of messages that follow each other, as far as no other descriptors and, where they are told, senders come along."""
        parts: list[memoryview] = []
        first = self.messages[0]
        for message in list(self.messages):
            other = self.credentials_wanted and message.credentials != first.credentials
            if parts and (message.files or other):
                break
            part = message.data[:count]
            parts.append(part)
            count -= len(part)
            if not peek:
                message.data = message.data[len(part) :]
                if not message.data:
                    self.messages.popleft()
            if not count or message.files:
                break
        if not peek:
            self.took(sum(map(len, parts)))
        return b"".join(parts)

    def took(self, count: int) -> None:
        self.waiting -= count
        self.drained.wake()
        if self.peer is not None:
            self.peer.drained.wake()

    # ---- as a file

    def read(self, task: Any, count: int) -> bytes:
        data, message, _ = self.receive(count, not self.flags & os.O_NONBLOCK)
        if message is not None:
            message.drop()
        return data

    def put_back(self, data: bytes) -> None:
        self.messages.appendleft(Message(memoryview(data), b"", NOBODY))
        self.waiting += len(data)

    def write(self, task: Any, data: bytes) -> int:
        return self.send(task, data, None, [])

    def poll_events(self) -> int:
        events = POLLIN | POLLRDNORM if self.messages or self.backlog or self.deaf else 0
        if self.deaf:
            events |= POLLRDHUP
        if (self.deaf and self.mute) or (self.kind != DATAGRAM and not self.connected and self.backlog is None):
            events |= POLLHUP
        if self.error:
            events |= POLLERR
        target = self.peer
        if self.backlog is None and not (target is not None and target.full(self)):
            events |= POLLOUT | POLLWRNORM
        return events

    def queues(self) -> tuple[WaitQueue, ...]:
        if self.kind == DATAGRAM and self.peer is not None and self.peer is not self:
            return self.arrived, self.drained, self.peer.drained
        return self.arrived, self.drained

    def ioctl(self, task: Any, request: int, argument: int) -> int:
        if request != FIONREAD:
            return super().ioctl(task, request, argument)
        waiting = self.waiting if self.kind == STREAM else len(self.messages[0].data) if self.messages else 0
        task.memory.copy_out(argument, waiting.to_bytes(4, "little"))
        return 0


def bound_to(inode: Inode) -> UnixSocket:
    """Whose name that file is."""
    if not isinstance(inode, Socket) or not isinstance(inode.listener, UnixSocket):
        raise Errno(errno.ECONNREFUSED)

    return inode.listener
