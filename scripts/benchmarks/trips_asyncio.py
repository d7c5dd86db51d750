"""Round trips of one record between two event loops, in microseconds: a SharedRing's, and other ways to the same."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable

from ringlib import SharedRing, shared
from scripts.benchmarks.channels import new_name
from scripts.benchmarks.harness import Meet, pair
from scripts.benchmarks.limits import ATTACH, RECORD
from scripts.benchmarks.trips import median_us

END = 1 << 20  # what an eventfd is told at the end

Put = Callable[[bytes], Awaitable[object]]
Get = Callable[[], Awaitable[bytes]]  # b"" at the end


async def trips(put: Put, get: Get, seconds: float) -> list[int]:
    """After one that waits for the other side to be there."""
    record, ns, clock = bytes(RECORD), list[int](), time.monotonic_ns
    await put(record)
    await get()
    now = clock()
    end = now + int(seconds * 1e9)
    while now < end:
        before = now
        await put(record)
        await get()
        now = clock()
        ns.append(now - before)
    return ns


async def echo(put: Put, get: Get) -> None:
    while data := await get():
        await put(data)


def async_ring_trip(seconds: float, asleep: bool = False) -> float:
    """asleep: nobody spins first."""
    return _ring_trip(seconds, lambda ring: (ring.aput, ring.aget), asleep)


def threaded_ring_trip(seconds: float, asleep: bool = False) -> float:
    """As one would without aget: a thread sleeps for the loop. There is room whenever we put: that takes no thread."""

    def ends(ring: SharedRing) -> tuple[Put, Get]:
        async def put(data: bytes) -> None:
            ring.publish(data)

        return put, lambda: asyncio.to_thread(ring.get)

    return _ring_trip(seconds, ends, asleep)


def _ring_trip(seconds: float, ends: Callable[[SharedRing], tuple[Put, Get]], asleep: bool) -> float:
    name = new_name()

    def begin() -> None:
        if asleep:
            shared.SPIN_NS = 0

    def serve(meet: Meet) -> None:
        begin()
        meet()
        with SharedRing.attach(name, ATTACH) as ring:
            asyncio.run(echo(*ends(ring)))

    def ask(meet: Meet) -> list[int]:
        begin()
        with SharedRing.create(name, RECORD, RECORD) as ring:
            meet()
            return asyncio.run(trips(*ends(ring), seconds))

    return median_us(pair(serve, ask)[1])


def stream_trip(seconds: float) -> float:
    """asyncio's own streams over two Unix sockets."""
    sockets = socket.socketpair()

    async def ends(mine: int) -> tuple[Put, Get]:
        sockets[1 - mine].close()
        reader, writer = await asyncio.open_connection(sock=sockets[mine])

        async def put(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        async def get() -> bytes:
            try:
                return await reader.readexactly(RECORD)
            except asyncio.IncompleteReadError:
                return b""

        return put, get

    async def serving() -> None:
        await echo(*await ends(0))

    async def asking() -> list[int]:
        return await trips(*await ends(1), seconds)

    def serve(meet: Meet) -> None:
        meet()
        asyncio.run(serving())

    def ask(meet: Meet) -> list[int]:
        meet()
        return asyncio.run(asking())

    def forget() -> None:
        for each in sockets:
            each.close()

    return median_us(pair(serve, ask, forget=forget)[1])


def loop_trip(seconds: float) -> float:
    """The limit: two event loops that wake each other, an eventfd each, and hand nothing over."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]

    def ends(mine: int) -> tuple[Put, Get]:
        loop, told, woken = asyncio.get_running_loop(), list[int](), asyncio.Event()

        def readable() -> None:
            told.append(os.eventfd_read(fds[mine]))
            woken.set()

        async def put(data: bytes) -> None:
            os.eventfd_write(fds[1 - mine], 1)

        async def get() -> bytes:
            await woken.wait()
            woken.clear()
            return b"" if told.pop() >= END else b"woken"

        loop.add_reader(fds[mine], readable)
        return put, get

    async def serving() -> None:
        await echo(*ends(0))

    async def asking() -> list[int]:
        ns = await trips(*ends(1), seconds)
        os.eventfd_write(fds[0], END)
        return ns

    def serve(meet: Meet) -> None:
        meet()
        asyncio.run(serving())

    def ask(meet: Meet) -> list[int]:
        meet()
        return asyncio.run(asking())

    def forget() -> None:
        for fd in fds:
            os.close(fd)

    return median_us(pair(serve, ask, forget=forget)[1])
