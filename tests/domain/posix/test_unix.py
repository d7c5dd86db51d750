"""Sockets of one machine: the same calls on ours and on the host's come to the same."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domain.posix import unix
from domain.posix.files import POLLHUP, POLLIN, POLLOUT, POLLRDHUP
from tests.domain.posix.stand_in import Task, finish

libc = ctypes.CDLL(None, use_errno=True)
ROUNDS = 300 if os.environ.get("RING1_NIGHTLY") else 30
KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET]
DONTWAIT, NOSIGNAL, PEEK, TRUNC = 0x40, 0x4000, 2, 0x20
POLLED = POLLIN | POLLRDHUP | POLLHUP  # when there is room to send is Linux's bookkeeping


def pair(task: Task, kind: int) -> tuple[int, int]:
    at = task.memory.room(8)
    assert task.call("socketpair", socket.AF_UNIX, kind, 0, at) == 0
    return struct.unpack("<ii", task.memory.copy_in(at, 8))  # type: ignore[return-value]


def received(task: Task, fd: int, count: int, flags: int) -> Any:
    buffer = task.memory.room(count)
    done = task.call("recvfrom", fd, buffer, count, flags)
    return done if done < 0 else (done, task.memory.copy_in(buffer, min(done, count)))


def theirs(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except OSError as error:
        return -(error.errno or 0)


def polled(sock: socket.socket) -> int:
    poll = select.poll()
    poll.register(sock, POLLED)
    return dict(poll.poll(0)).get(sock.fileno(), 0)


@contextlib.contextmanager
def host_pair(kind: socket.SocketKind) -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair(socket.AF_UNIX, kind)
    try:
        yield pair
    finally:
        for sock in pair:
            sock.close()


def host_receive(sock: socket.socket, count: int, flags: int) -> Any:
    """Without Python's recv, which makes no call for 0 bytes."""
    buffer = ctypes.create_string_buffer(count)
    done = libc.recv(sock.fileno(), buffer, count, flags)
    return (done, buffer.raw[: min(done, count)]) if done >= 0 else -ctypes.get_errno()


def compare(seed: int, kind: socket.SocketKind) -> None:
    rng = random.Random(seed)
    task = Task()
    with host_pair(kind) as hosts:
        ours = pair(task, kind)
        waiting = [0, 0]  # bytes: who has too many is not sent more, how many that is is Linux's bookkeeping
        for step in range(150):
            end = rng.randrange(2)
            size = rng.choice((0, 1, 5, 100, 1000, 5000))
            what = rng.choices(("send", "receive", "peek", "shut", "look"), (8, 8, 3, 0.2, 3))[0]
            if what == "send" and waiting[1 - end] < 20_000:
                data = rng.randbytes(size)
                want = theirs(hosts[end].send, data, DONTWAIT | NOSIGNAL)
                got = task.call("sendto", ours[end], task.memory.put(data), size, DONTWAIT | NOSIGNAL)
                waiting[1 - end] += max(got, 200)
            elif what in ("receive", "peek"):
                flags = DONTWAIT | (PEEK if what == "peek" else 0) | rng.choice((0, 0, TRUNC))
                flags &= ~TRUNC if kind == socket.SOCK_STREAM else -1
                want = host_receive(hosts[end], size, flags)
                got = received(task, ours[end], size, flags)
                waiting[end] = 0 if isinstance(got, int) else waiting[end]
            elif what == "shut":
                how = rng.randrange(3)
                want, got = theirs(hosts[end].shutdown, how), task.call("shutdown", ours[end], how)
                want = 0 if want is None else want
            else:
                want, got = polled(hosts[end]), task.files.get(ours[end]).poll_events() & POLLED
            assert got == want, f"seed {seed}, step {step}: {what} {size} bytes at {end}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_host_does_the_same(seed: int, kind: socket.SocketKind) -> None:
    compare(seed, kind)


def test_the_comparison_finds_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: packets whose ends nobody sees."""
    monkeypatch.setattr(unix, "STREAM", unix.PACKETS)
    with pytest.raises(AssertionError):
        for seed in range(20):
            compare(seed, socket.SOCK_SEQPACKET)


def address(path: str) -> bytes:
    return struct.pack("<H", socket.AF_UNIX) + path.encode()


def named(task: Task, path: str) -> tuple[int, int]:
    raw = address(path)
    return task.memory.put(raw), len(raw)


def listening(task: Task, path: str, backlog: int = 5) -> int:
    fd: int = task.call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
    assert task.call("bind", fd, *named(task, path)) == 0
    assert task.call("listen", fd, backlog) == 0
    return fd


@pytest.mark.parametrize("path", ["/s", "\0abstract"])
def test_a_server_and_its_client(path: str) -> None:
    task = Task()
    server = listening(task, path)
    accepting = task.call("accept4", server, 0, 0, 0)
    next(accepting)
    client = task.call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
    assert task.call("connect", client, *named(task, path)) == 0
    assert task.call("connect", client, *named(task, path)) == -errno.EISCONN
    end = finish(accepting)
    assert isinstance(end, int)
    assert task.call("write", client, task.memory.put(b"hello"), 5) == 5 and task.read(end, 9) == b"hello"
    at, size = task.memory.room(110), task.memory.put(struct.pack("<i", 110))
    assert task.call("getpeername", client, at, size) == 0
    (length,) = struct.unpack("<i", task.memory.copy_in(size, 4))
    assert task.memory.copy_in(at, length).rstrip(b"\0") == address(path)
    task.call("close", end)
    assert task.read(client, 9) == b""
    assert task.call("write", client, task.memory.put(b"x"), 1) == -errno.EPIPE and task.signals == [signal.SIGPIPE]
    task.call("close", server)
    late = task.call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
    assert task.call("connect", late, *named(task, path)) == -errno.ECONNREFUSED
    again = task.call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
    assert task.call("bind", again, *named(task, path)) == (-errno.EADDRINUSE if path == "/s" else 0)


def test_who_is_not_accepted_is_reset_and_a_full_listener_makes_wait() -> None:
    task = Task()
    server = listening(task, "/s", 0)
    first, second = (task.call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0) for _ in range(2))
    assert task.call("connect", first, *named(task, "/s")) == 0
    connecting = task.call("connect", second, *named(task, "/s"))
    next(connecting)
    end = task.call("accept", server, 0, 0)
    assert finish(connecting) == 0
    task.call("write", end, task.memory.put(b"unread"), 6)
    task.call("close", server)
    assert task.read(second, 1) == -errno.ECONNRESET and task.read(second, 1) == b""
    task.call("close", first)
    assert task.read(end, 1) == -errno.ECONNRESET


def test_datagrams_find_their_way_by_name() -> None:
    task = Task()
    one, two = (task.call("socket", socket.AF_UNIX, socket.SOCK_DGRAM, 0) for _ in range(2))
    assert task.call("bind", one, *named(task, "/one")) == task.call("bind", two, *named(task, "/two")) == 0
    text = task.memory.put(b"text")
    assert task.call("sendto", one, text, 4, 0, *named(task, "/two")) == 4
    assert task.call("write", one, text, 4) == -errno.ENOTCONN
    at, size = task.memory.room(110), task.memory.put(struct.pack("<i", 110))
    assert task.call("recvfrom", two, task.memory.room(9), 9, 0, at, size) == 4
    assert task.memory.copy_in(at, 7) == address("/one\0")
    sent = 0
    while (result := task.call("sendto", one, text, 4, DONTWAIT, *named(task, "/two"))) == 4:
        sent += 1
    assert (sent, result) == (11, -errno.EAGAIN)
    waiting = task.call("sendto", one, text, 4, 0, *named(task, "/two"))
    assert task.files.get(two).drained in next(waiting)
    task.read(two, 9)
    assert finish(waiting) == 4
    task.call("close", two)
    assert task.call("sendto", one, text, 4, 0, *named(task, "/two")) == -errno.ECONNREFUSED


def message(task: Task, data: int, size: int, control: bytes) -> int:
    iov = task.memory.put(struct.pack("<QQ", data, size))
    return task.memory.put(struct.pack("<QI4xQQQQi4x", 0, 0, iov, 1, task.memory.put(control), len(control), 0))


def test_descriptors_go_along_and_none_is_lost() -> None:
    task = Task()
    left, right = pair(task, socket.SOCK_STREAM)
    reader, writer = task.pipe()
    pipe = task.files.get(reader)
    control = struct.pack("<QiiI4x", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, reader)
    for _ in range(2):
        assert task.call("sendmsg", left, message(task, task.memory.put(b"here"), 4, control), 0) == 4
    task.call("close", reader)
    assert pipe.references == 2
    room = message(task, task.memory.room(90), 90, bytes(24))
    assert task.call("recvmsg", right, room, 0) == 4  # not eight: the next brings descriptors of its own
    at = struct.unpack("<QI4xQQQQi4x", task.memory.copy_in(room, 56))[4]
    (fd,) = struct.unpack("<16xi", task.memory.copy_in(at, 20))
    assert task.files.get(fd) is pipe and pipe.references == 2
    task.call("write", writer, task.memory.put(b"x"), 1)
    assert task.read(fd, 1) == b"x"
    task.call("close", fd)
    assert task.read(right, 90) == b"here"  # read has no place for them
    assert pipe.references == 0
    assert task.call("write", writer, task.memory.put(b"x"), 1) == -errno.EPIPE
    assert task.call("sendmsg", left, message(task, task.memory.put(b"here"), 4, control), 0) == -errno.EBADF


def test_a_writer_waits_for_room(tmp_path: Path) -> None:
    task = Task()
    left, right = pair(task, socket.SOCK_STREAM)
    waiting = task.call("write", left, task.memory.put(bytes(300_000)), 300_000)
    next(waiting)
    assert not task.files.get(left).poll_events() & POLLOUT
    assert len(task.read(right, 300_000)) == unix.ROOM  # type: ignore[arg-type]
    assert finish(waiting) == 300_000


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((socket.AF_INET, socket.SOCK_STREAM, 0), errno.EAFNOSUPPORT),
        ((socket.AF_UNIX, 9, 0), errno.ESOCKTNOSUPPORT),
        ((socket.AF_UNIX, socket.SOCK_STREAM, 6), errno.EPROTONOSUPPORT),
        ((socket.AF_UNIX, socket.SOCK_STREAM | 0x40, 0), errno.EINVAL),
    ],
)
def test_there_are_no_others(arguments: tuple[int, int, int], error: int) -> None:
    assert Task().call("socket", *arguments) == -error
