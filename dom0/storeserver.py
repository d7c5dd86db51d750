"""The store's two kinds of client: a domain over its ring, and dom0 in its own process.

A message that cannot be, or a violated ring, closes that domain's connection with a reason; the tree and everybody else go
on. Watch events to a domain that does not read are bounded: past MAX_EVENTS its connection is closed.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from dom0.store import Connection, Store, StoreRefusal
from domain.store import StoreClient, StoreConflict, StoreError
from hypervisor.public.io import xs_wire
from hypervisor.public.io.xs_wire import HEADER, PAYLOAD_MAX, XsType
from ringlib.bytering import ByteRing
from ringlib.ring import Broken

if TYPE_CHECKING:
    from collections.abc import Callable

    from domain.kernel import Kernel

MAX_EVENTS = 1024
MAX_UNSENT = 64 << 10


class LocalStore(StoreClient):
    """dom0's own access: the same requests, no ring."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._connection = Connection(store, 0, self._event)

    async def _request(self, kind: XsType, payload: bytes, tx: int = 0) -> bytes:
        try:
            return self._connection.request(kind, tx, payload)
        except StoreRefusal as refusal:
            path = payload.split(b"\0", 1)[0].decode(errors="replace")
            raise (StoreConflict if refusal.name == "EAGAIN" else StoreError)(refusal.name, path) from None


class StoreServer:
    """Serves one domain over its xenstore page, mapped at host address `page`; `port` is ours."""

    def __init__(self, kernel: Kernel, store: Store, domid: int, page: int, port: int, report: Callable[[str], None]) -> None:
        self._kernel, self._port, self._report = kernel, port, report
        self._in = ByteRing(page + xs_wire.REQ, page + xs_wire.REQ_CONS, page + xs_wire.REQ_PROD, xs_wire.RING_BYTES)
        self._out = ByteRing(page + xs_wire.RSP, page + xs_wire.RSP_CONS, page + xs_wire.RSP_PROD, xs_wire.RING_BYTES)
        self._connection = Connection(store, domid, self._watch_event)
        self._buffer = b""
        self._unsent = b""
        self._events: deque[tuple[str, str]] = deque()
        self._task = kernel.spawn(self._serve(), name=f"store/{domid}")
        self.closed = False

    def close(self, why: str = "") -> None:
        """End the connection. Idempotent."""
        if not self.closed:
            self.closed = True
            self._connection.close()
            self._task.cancel()
            if why:
                self._report(why)

    def _watch_event(self, path: str, token: str) -> None:
        if (path, token) not in self._events:  # repeats merge
            self._events.append((path, token))
        if len(self._events) > MAX_EVENTS:
            self.close(f"{MAX_EVENTS} watch events unread")
        elif self._kernel.scheduler.current is not self._task:
            self._flush()

    async def _serve(self) -> None:
        while True:
            await self._kernel.evtchn.wait(self._port)
            try:
                while self._turn():
                    await self._kernel.sleep(0)  # the others' turn: a guest can fill its ring as fast as we empty it
            except Broken as error:
                self.close(f"store ring violated: {error}")
                return

    def _turn(self) -> bool:
        """What is there now, a ring's fill at most; True if there may be more. Replies that are not taken stop us."""
        self._flush()
        if len(self._unsent) >= MAX_UNSENT or not (data := self._in.read()):
            return False
        self._buffer += data
        self._kernel.evtchn.send(self._port)  # there is room again
        while len(self._buffer) >= HEADER.size and not self.closed:
            kind, req_id, tx_id, length = HEADER.unpack_from(self._buffer)
            if length > PAYLOAD_MAX:
                raise Broken(f"a message of {length} bytes")
            if len(self._buffer) < HEADER.size + length:
                break
            payload = self._buffer[HEADER.size : HEADER.size + length]
            self._buffer = self._buffer[HEADER.size + length :]
            self._answer(kind, req_id, tx_id, payload)
        self._flush()
        return not self.closed

    def _answer(self, kind: int, req_id: int, tx_id: int, payload: bytes) -> None:
        try:
            reply = self._connection.request(kind, tx_id, payload)
        except StoreRefusal as refusal:
            kind, reply = XsType.ERROR, refusal.name.encode() + b"\0"
        if len(reply) > PAYLOAD_MAX:
            kind, reply = XsType.ERROR, b"E2BIG\0"
        self._unsent += HEADER.pack(kind, req_id, tx_id, len(reply)) + reply

    def _flush(self) -> None:
        """Send what fits; whole watch events only after every reply before them."""
        try:
            while True:
                while self._events and len(self._unsent) < xs_wire.RING_BYTES:
                    path, token = self._events.popleft()
                    data = f"{path}\0{token}\0".encode()
                    self._unsent += HEADER.pack(XsType.WATCH_EVENT, 0, 0, len(data)) + data
                n = self._out.write(self._unsent) if self._unsent else 0
                self._unsent = self._unsent[n:]
                if not n:
                    return
                self._kernel.evtchn.send(self._port)
        except Broken as error:
            self.close(f"store ring violated: {error}")
