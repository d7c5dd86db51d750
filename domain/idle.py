"""The idle loop, SCHEDOP_block in the guest: hand out what happened, and sleep where that is nothing. The waiting is guest.c's.

Upcalls are masked while a kernel is awake: it looks by itself, and nobody spends a signal on it. They are unmasked for the
sleep alone, and unmasking looks once more.
"""

from __future__ import annotations

from typing import Any

from domain._guest import ffi, lib
from domain.evtchn import EventChannels
from domain.sched import Event

READABLE, WRITABLE = 1, 4  # POLLIN and POLLOUT of poll(2)


class Idle:
    """One a kernel. A call of it is a look, or a sleep."""

    def __init__(self, evtchn: EventChannels, upcall_fd: int) -> None:
        self._evtchn, self._look = evtchn, lib.idle
        self._waiting: list[Event] = []  # for fds[1], fds[2] ...
        self._fds: Any = ffi.new("struct wanted[]", [(upcall_fd, READABLE, 0)])
        self._state: Any = ffi.new("struct idle *", {"shared_info": evtchn.shared_info, "fds": self._fds, "nr_fds": 1})

    def __call__(self, sleep: bool) -> bool:
        """Hand out what there is. sleep: where nothing is, until something is. False: nothing was handed out."""
        state = self._state
        self._look(state, sleep)
        if ports := state.nr_ports:
            self._evtchn.hand_out(ffi.unpack(state.ports, ports))
        if ready := state.nr_ready:
            fds = self._fds
            for i, event in enumerate(self._waiting, 1):
                if fds[i].revents:
                    event.set()
        return bool(ports or ready)

    async def ready(self, fd: int, events: int) -> None:
        """Until `fd` can be read or written: for dom0 and driver domains, which have descriptors."""
        assert all(self._fds[1 + i].fd != fd for i in range(len(self._waiting))), f"two tasks wait for descriptor {fd}"
        event = Event()
        self._want([*self._wanted(), (fd, events, 0)], [*self._waiting, event])
        try:
            await event.wait()
        finally:
            at = self._waiting.index(event)
            wanted = self._wanted()
            self._want(wanted[: at + 1] + wanted[at + 2 :], self._waiting[:at] + self._waiting[at + 1 :])

    def _wanted(self) -> list[tuple[int, int, int]]:
        return [(one.fd, one.events, 0) for one in self._fds]

    def _want(self, fds: list[tuple[int, int, int]], waiting: list[Event]) -> None:
        """All anew: dom0 waits for a few descriptors, and far more often than it begins to."""
        self._fds, self._waiting = ffi.new("struct wanted[]", fds), waiting
        self._state.fds, self._state.nr_fds = self._fds, len(fds)
