"""How a frontend and a backend find and connect each other: two tables that face each other, and the one driver of both.

    frontend                                        backend
    1 Initialising  (the toolstack made both nodes) 1 Initialising
                                                    publish features
                                                    2 InitWait
    allocate ring, grant it, bind a port,
    publish ring-ref, event-channel
    3 Initialised
                                                    map the ring, bind the port,
                                                    publish sectors, ...
                                                    4 Connected
    read what it published
    4 Connected
    close: 5 Closing ->                             let go of everything, 6 Closed
    6 Closed when the backend is  <-
                                                    close: 5 Closing -> frontend closes, backend follows

A table says {(mine, theirs): step}; a step does the work and the table's next state is published after it. Watches merge
and states may be skipped, so every pair that can be seen is here; a missing pair means "nothing to do yet". The toolstack
makes both nodes before either end looks: one that is not there was taken away, and counts as Closed, as does one that
cannot be read or says nothing known. What the other end wrote is never believed to be more than text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from domain.store import StoreClient, StoreError
from hypervisor.public.io.xenbus import XenbusState

if TYPE_CHECKING:
    from domain.kernel import Kernel

_, INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = XenbusState
STATES = {str(int(state)): state for state in XenbusState if state != XenbusState.UNKNOWN}

Table = Mapping[tuple[XenbusState, XenbusState], tuple[str, XenbusState]]

#            (frontend's, backend's)      step, then the frontend is
FRONTEND: Table = {
    (INITIALISING, INIT_WAIT): ("publish", INITIALISED),
    (INITIALISING, INITIALISED): ("publish", INITIALISED),
    (INITIALISED, CONNECTED): ("connect", CONNECTED),
    (INITIALISING, CLOSED): ("stop", CLOSED),
    (INITIALISED, CLOSING): ("stop", CLOSING),
    (INITIALISED, CLOSED): ("stop", CLOSING),
    (CONNECTED, CLOSING): ("stop", CLOSING),
    (CONNECTED, CLOSED): ("stop", CLOSING),
    (CLOSING, CLOSED): ("release", CLOSED),
}

#            (backend's, frontend's)      step, then the backend is
BACKEND: Table = {
    (INITIALISING, INITIALISING): ("announce", INIT_WAIT),
    (INITIALISING, INITIALISED): ("announce", INIT_WAIT),
    (INIT_WAIT, INITIALISED): ("connect", CONNECTED),
    (INIT_WAIT, CONNECTED): ("connect", CONNECTED),
    (INITIALISING, CLOSED): ("release", CLOSED),
    (INIT_WAIT, CLOSING): ("release", CLOSED),
    (INIT_WAIT, CLOSED): ("release", CLOSED),
    (CONNECTED, CLOSING): ("release", CLOSED),
    (CONNECTED, CLOSED): ("release", CLOSED),
    (CLOSING, CLOSING): ("release", CLOSED),
    (CLOSING, CLOSED): ("release", CLOSED),
}


class Device:
    """One end of a split driver: its node in the store, and the other end's.

    A driver subclasses it and supplies the steps its table names, as coroutines without arguments.
    """

    TABLE: Table

    def __init__(self, kernel: Kernel, path: str, otherend: str, otherend_id: int) -> None:
        self.kernel, self.path, self.otherend, self.otherend_id = kernel, path, otherend, otherend_id
        self.store: StoreClient = kernel.store
        self.state = XenbusState.INITIALISING
        self.error = ""

    async def own(self, key: str, default: str = "") -> str:
        """A key of our own node."""
        return await self.store.get(f"{self.path}/{key}", default)

    async def other(self, key: str, default: str = "") -> str:
        """A key of the other end's node; one that it does not let us read counts as missing."""
        try:
            return await self.store.get(f"{self.otherend}/{key}", default)
        except StoreError:
            return default

    async def other_number(self, key: str, bits: int = 32) -> int:
        """A number of the other end's. Raises DeviceError: that end may have written anything there."""
        text = await self.other(key)
        if text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 1 << bits:
            return int(text)
        raise DeviceError(f"{key} is no number of {bits} bits: {text[:30]!a}")

    async def publish_keys(self, keys: Mapping[str, str | int]) -> None:
        for key, value in keys.items():
            await self.store.write(f"{self.path}/{key}", value)

    async def switch(self, state: XenbusState) -> None:
        """Tell the other end."""
        self.state = state
        await self._say("state", int(state))

    async def _say(self, key: str, value: str | int) -> None:
        """Unless our node was taken away: the toolstack has the last word, and writing would make it again."""
        try:
            await self.store.read(f"{self.path}/state")
            await self.store.write(f"{self.path}/{key}", value)
        except StoreError:
            pass

    async def fail(self, why: str) -> None:
        """Close this device, and only this one, with a sentence for the user.

        A frontend that has published waits, Closing, until the backend has let go of what it was given.
        """
        self.error = self.error or why
        await self._say("error", why)
        if self.state == CLOSED:
            return
        waits = self.TABLE is FRONTEND and self.state != INITIALISING
        step = "stop" if self.TABLE is FRONTEND else "release"
        await getattr(self, step)()
        await self.switch(CLOSING if waits else CLOSED)

    async def run(self) -> None:
        """Follow the other end until both are closed. The one driver of both tables."""
        watch = await self.store.watch(f"{self.otherend}/state")
        try:
            while self.state != CLOSED:
                await watch.next()
                await self.follow(STATES.get(await self.other("state"), CLOSED))
        finally:
            await watch.close()

    async def follow(self, theirs: XenbusState) -> None:
        """Take every step that the pair of states asks for."""
        while (entry := self.TABLE.get((self.state, theirs))) is not None:
            step, after = entry
            work: Callable[[], Awaitable[None]] = getattr(self, step)
            try:
                await work()
            except (DeviceError, StoreError) as error:
                await self.fail(str(error))
            else:
                await self.switch(after)


class DeviceError(Exception):
    """The other end cannot be worked with: one sentence; its device is closed, nothing else."""
