"""Where one end of a SharedRing waits in asyncio: a socket at which its peer knocks.

An event loop waits for descriptors, a ring sleeps on a futex; something must turn the one into the other. A thread that
sleeps for the loop is one for every end, cannot be cancelled, and costs a wake-up more. An eventfd has no name by which the
peer could come by it; a FIFO has one, that stays behind when its owner is killed. So it is a datagram socket, bound to an
abstract address that the kernel makes up (unix(7), autobind) and that ends with its descriptor. The address is a number of
20 bits, and stands in the control page while somebody waits. A datagram says nothing but "look", so one that comes from
elsewhere costs a look. Rows a6 of scripts/bench rings have all this measured.

Where a knock does not reach (the ends live in different network namespaces) the timer does, every LOOK_SECONDS.

Before it waits, an end spins as it would without a loop, while that proves worth it (spin.h): two that answer each other
promptly are some seven times as fast as by sleeping, and who waits for longer holds up its loop for those 20 us hardly ever.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from ringlib._ring import lib


class Door:
    """Of one end, in the loop that runs now; made when that end first waits there. state: the end's, of shared.c."""

    def __init__(self, state: Any) -> None:
        self._loop, self._state, self._ask = asyncio.get_running_loop(), state, lib.shared_ask
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind("")
        self._number = int(self._socket.getsockname()[1:], 16) + 1  # 0 says: nobody waits
        self._loop.add_reader(self._socket, self._knocked)
        self._waiting: dict[asyncio.Future[int], int] = {}

    def here(self) -> bool:
        """Whether it is the running loop's."""
        return self._loop is asyncio.get_running_loop()

    async def wait(self, want: int, seconds: float, spin_ns: int) -> int:
        """For the `want`th record from here: 1: look, something happened; 0: the time is over; or an error of shared_ask.

        Several may wait at once, a getter and a putter: the peer is asked for what comes first, and all of them look.
        """
        waiter: asyncio.Future[int] = self._loop.create_future()
        self._waiting[waiter] = want
        timer = self._loop.call_later(seconds, _end, waiter, 0)
        try:
            if result := self._ask(self._state, min(self._waiting.values()), self._number, spin_ns):
                await asyncio.sleep(0)  # else two that never wait for long would keep the loop to themselves
                return result
            return await waiter
        finally:
            timer.cancel()
            del self._waiting[waiter]
            if not self._waiting:
                self._ask(self._state, 0, 0, 0)

    def close(self, ours: bool) -> None:
        """Everybody looks. ours: not in a forked child, whose loop is a copy that would act on its parent's epoll."""
        if ours and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
            self._wake()
        self._socket.close()

    def _knocked(self) -> None:
        try:
            self._socket.recv(1)
        except BlockingIOError:
            pass
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            _end(waiter, 1)


def _end(waiter: asyncio.Future[int], result: int) -> None:
    if not waiter.done():
        waiter.set_result(result)
