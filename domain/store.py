"""The store as a guest uses it: small values in a tree, watches, transactions. All calls are coroutines.

`StoreClient` is everything but the transport; `Store` speaks xs_wire over this domain's ring, and dom0 has one that calls
its own tree. Errors: StoreError carries the errno's name ("ENOENT"); StoreConflict is a transaction to be tried again.
"""

from __future__ import annotations

import itertools
import re
import zlib
from types import TracebackType
from typing import TYPE_CHECKING

from domain.sched import Event, Queue
from hypervisor.public.io import xs_wire
from hypervisor.public.io.xs_wire import HEADER, PAYLOAD_MAX, XsType
from hypervisor.public.layout import STORE_PFN, virt
from ringlib.bytering import ByteRing
from ringlib.ring import Broken

if TYPE_CHECKING:
    from domain.kernel import Kernel


PIECE = 500  # characters of a long text in one value: at most 2000 bytes


class StoreError(Exception):
    """The store refused; `name` is the errno's."""

    def __init__(self, name: str, path: str = "") -> None:
        super().__init__(f"{name}: {path}" if path else name)
        self.name = name


class StoreConflict(StoreError):
    """What the transaction read has changed since: begin again."""


class Watch:
    """Changes at and below a path, in order, repeats merged."""

    def __init__(self, client: StoreClient, path: str, token: str) -> None:
        self._client, self.path, self.token = client, path, token
        self.events: Queue[str] = Queue()
        self._pending: set[str] = set()

    def put(self, path: str) -> None:
        if path not in self._pending:
            self._pending.add(path)
            self.events.put(path)

    async def next(self) -> str:
        """The next path that changed; the first comes at once."""
        path = await self.events.get()
        self._pending.discard(path)
        return path

    async def close(self) -> None:
        await self._client.unwatch(self)


class StoreClient:
    """The operations, over `_request`."""

    def __init__(self) -> None:
        self._watches: dict[str, Watch] = {}
        self._tokens = itertools.count(1)

    async def _request(self, kind: XsType, payload: bytes, tx: int = 0) -> bytes:
        raise NotImplementedError

    async def read(self, path: str, tx: int = 0) -> str:
        """The value; bytes that are not UTF-8, which any writer may choose, become U+FFFD. Raises StoreError."""
        return (await self._request(XsType.READ, _z(path), tx)).decode(errors="replace")

    async def get(self, path: str, default: str = "", tx: int = 0) -> str:
        """The value, or `default` where there is no such node."""
        try:
            return await self.read(path, tx)
        except StoreError as error:
            if error.name != "ENOENT":
                raise
            return default

    async def write(self, path: str, value: str | int, tx: int = 0) -> None:
        """Make or change a node, with its missing parents."""
        await self._request(XsType.WRITE, _z(path) + str(value).encode(), tx)

    async def mkdir(self, path: str, tx: int = 0) -> None:
        await self._request(XsType.MKDIR, _z(path), tx)

    async def rm(self, path: str, tx: int = 0) -> None:
        """Remove a node and all below it; a missing one, or one whose parent is missing too, is no error."""
        try:
            await self._request(XsType.RM, _z(path), tx)
        except StoreError as error:
            if error.name != "ENOENT":
                raise

    async def ls(self, path: str, tx: int = 0) -> list[str]:
        """Names below a node; [] where there is none."""
        try:
            return [n.decode() for n in (await self._request(XsType.DIRECTORY, _z(path), tx)).split(b"\0") if n]
        except StoreError as error:
            if error.name != "ENOENT":
                raise
            return []

    async def write_long(self, path: str, text: str) -> None:
        """A text of any length: in nodes beside `path`, which itself is written last and says how many, and the sum."""
        pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        _, before = _head(await self.get(path))
        for i, piece in enumerate(pieces):
            await self.write(f"{path}.{i}", piece)
        for i in range(len(pieces), before):
            await self.rm(f"{path}.{i}")
        await self.write(path, f"{zlib.crc32(text.encode())} {len(pieces)}")

    async def read_long(self, path: str) -> str | None:
        """What write_long wrote, "" where nothing is; None where another text is just being written, and a watch will tell."""
        total, count = _head(await self.get(path))
        text = "".join([await self.get(f"{path}.{i}") for i in range(count)])
        return text if zlib.crc32(text.encode()) == total else None

    async def set_perms(self, path: str, perms: list[str], tx: int = 0) -> None:
        """For example ["n5", "r0"]: owner 5, nothing for others, read for dom0."""
        await self._request(XsType.SET_PERMS, _z(path) + b"".join(_z(p) for p in perms), tx)

    async def watch(self, path: str) -> Watch:
        token = str(next(self._tokens))
        watch = self._watches[token] = Watch(self, path, token)
        await self._request(XsType.WATCH, _z(path) + _z(token))
        return watch

    async def unwatch(self, watch: Watch) -> None:
        if self._watches.pop(watch.token, None):
            await self._request(XsType.UNWATCH, _z(watch.path) + _z(watch.token))

    def transaction(self) -> StoreTransaction:
        """`async with store.transaction() as tx: await store.write(path, value, tx)`; raises StoreConflict at its end."""
        return StoreTransaction(self)

    def _event(self, path: str, token: str) -> None:
        watch = self._watches.get(token)
        if watch is not None:
            watch.put(path)


class StoreTransaction:
    """Committed at the end of the block, given up if the block raises."""

    def __init__(self, client: StoreClient) -> None:
        self._client, self._id = client, 0

    async def __aenter__(self) -> int:
        reply = await self._client._request(XsType.TRANSACTION_START, b"\0")
        self._id = int(reply.rstrip(b"\0"))
        return self._id

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client._request(XsType.TRANSACTION_END, b"F\0" if kind else b"T\0", self._id)


class Store(StoreClient):
    """Over this domain's store ring."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        page = kernel.start.window + virt(STORE_PFN)
        self._kernel, self._port = kernel, kernel.start.store_evtchn
        self._out = ByteRing(page + xs_wire.REQ, page + xs_wire.REQ_CONS, page + xs_wire.REQ_PROD, xs_wire.RING_BYTES)
        self._in = ByteRing(page + xs_wire.RSP, page + xs_wire.RSP_CONS, page + xs_wire.RSP_PROD, xs_wire.RING_BYTES)
        self._ids = itertools.count(1)
        self._replies: dict[int, Queue[tuple[int, bytes]]] = {}
        self._room = Event()
        self._sending = False
        self._buffer = b""
        self._broken = ""
        kernel.spawn(self._receive(), name="store")

    async def _request(self, kind: XsType, payload: bytes, tx: int = 0) -> bytes:
        if self._broken:
            raise StoreError("EIO", self._broken)
        if len(payload) > PAYLOAD_MAX:
            raise StoreError("E2BIG")
        req_id = next(self._ids) & 0xFFFFFFFF
        queue = self._replies[req_id] = Queue()
        await self._send(HEADER.pack(kind, req_id, tx, len(payload)) + payload)
        got, data = await queue.get()
        del self._replies[req_id]
        if got == XsType.ERROR:
            name = data.rstrip(b"\0").decode("ascii", "replace")
            raise (StoreConflict if name == "EAGAIN" else StoreError)(name, payload.split(b"\0", 1)[0].decode(errors="replace"))
        return data

    async def _send(self, message: bytes) -> None:
        """Whole messages, one sender at a time."""
        while self._sending:
            self._room.clear()
            await self._room.wait()
        self._sending = True
        try:
            while message:
                self._room.clear()
                n = self._out.write(message)
                message = message[n:]
                if n:
                    self._kernel.evtchn.send(self._port)
                if message:
                    await self._room.wait()
        finally:
            self._sending = False
            self._room.set()

    async def _receive(self) -> None:
        while True:
            await self._kernel.evtchn.wait(self._port)
            self._room.set()
            try:
                while data := self._in.read():
                    self._kernel.evtchn.send(self._port)  # there is room again
                    self._buffer += data
                    self._parse()
            except Broken as error:
                self._broken = str(error)
                for queue in self._replies.values():
                    queue.put((XsType.ERROR, b"EIO\0"))
                return

    def _parse(self) -> None:
        while len(self._buffer) >= HEADER.size:
            kind, req_id, _, length = HEADER.unpack_from(self._buffer)
            if length > PAYLOAD_MAX:
                raise Broken("a store message is too long")
            if len(self._buffer) < HEADER.size + length:
                return
            payload = self._buffer[HEADER.size : HEADER.size + length]
            self._buffer = self._buffer[HEADER.size + length :]
            if kind == XsType.WATCH_EVENT:
                path, token, *_ = [*payload.split(b"\0"), b"", b""]
                self._event(path.decode("ascii", "replace"), token.decode("ascii", "replace"))
            elif req_id in self._replies:
                self._replies[req_id].put((kind, payload))


def _head(text: str) -> tuple[int, int]:
    """(sum, pieces) of a long text's own node."""
    match = re.fullmatch(r"([0-9]{1,10}) ([0-9]{1,5})", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _z(text: str) -> bytes:
    return text.encode() + b"\0"
