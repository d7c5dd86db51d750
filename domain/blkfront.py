"""A virtual disk: requests of up to 11 pages over a ring, many in flight, data in a pool granted once.

The backend is not trusted: an answer to what was not asked, twice, or an index that cannot be, breaks the device with a
reason; every waiter gets BlockError, nothing crashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from domain import memory
from domain.sched import Event, Queue, Task, gather
from domain.xenbus import FRONTEND, Device
from hypervisor.public.errors import XenError
from hypervisor.public.io.blkif import (
    HEAD,
    INFO_READONLY,
    MAX_SECTORS,
    MAX_SEGMENTS,
    REQUEST_BYTES,
    RESPONSE,
    RESPONSE_BYTES,
    SECTOR,
    SECTORS_PER_PAGE,
    SEGMENT,
    BlkOp,
    BlkStatus,
    vdev,
)
from hypervisor.public.io.xenbus import XenbusState
from hypervisor.public.types import PAGE_SIZE
from ringlib.ring import Broken, FrontRing

if TYPE_CHECKING:
    from domain.kernel import Kernel


class BlockError(Exception):
    """The request failed, or the device is gone."""


class _Slot:
    """One request's place: an id and its eleven pages of the pool."""

    def __init__(self, ident: int, address: int, grefs: list[int]) -> None:
        self.ident, self.address, self.grefs = ident, address, grefs
        self.op = BlkOp.READ
        self.status: int | None = None
        self.answered = Event()
        self.answered.set()


class BlockDevice(Device):
    """The frontend. `sectors` of SECTOR bytes; read, write and flush are coroutines and may run side by side."""

    TABLE = FRONTEND
    sector_size = SECTOR

    @classmethod
    async def open(cls, kernel: Kernel, name: str) -> BlockDevice:
        """Connect the disk `name`. Raises BlockError where the toolstack gave us none, or it cannot be connected."""
        path = f"/local/domain/{kernel.domid}/device/vbd/{vdev(name)}"
        otherend = await kernel.store.get(f"{path}/backend")
        if not otherend:
            raise BlockError(f"{kernel.name} has no disk {name}")
        device = cls(kernel, path, otherend, int(await kernel.store.read(f"{path}/backend-id")))
        device.handle = vdev(name)
        device._runner = kernel.spawn(device.run(), name=f"blkfront {name}")
        await device._settled.wait()
        if device.state != XenbusState.CONNECTED:
            raise BlockError(await device.other("error") or device.error or f"{name}: the backend closed")
        return device

    def __init__(self, kernel: Kernel, path: str, otherend: str, otherend_id: int) -> None:
        super().__init__(kernel, path, otherend, otherend_id)
        self.handle = self.sectors = 0
        self.readonly = False
        self.stats = {"requests": 0, "notifies": 0, "bytes": 0}
        self._settled = Event()
        self._free: Queue[_Slot] = Queue()
        self._slots: list[_Slot] = []
        self._runner: Task[None]
        self._receiver: Task[None] | None = None

    # ---- the steps of the table

    async def publish(self) -> None:
        """Allocate the ring and the pool, grant both for good, tell the backend."""
        kernel = self.kernel
        self._page = kernel.memory.alloc(1)
        self._ring = FrontRing(self._page.address, PAGE_SIZE, REQUEST_BYTES, RESPONSE_BYTES)
        self._pool = kernel.memory.alloc(self._ring.nr_ents * MAX_SEGMENTS)
        self._ring_ref = kernel.grants.give(self.otherend_id, self._page.pfn)
        grefs = kernel.grants.give_pages(self.otherend_id, self._pool)
        for i in range(self._ring.nr_ents):
            address = self._pool.address + i * MAX_SEGMENTS * PAGE_SIZE
            slot = _Slot(i, address, grefs[i * MAX_SEGMENTS : (i + 1) * MAX_SEGMENTS])
            self._slots.append(slot)
            self._free.put(slot)
        self._port = kernel.evtchn.alloc_unbound(self.otherend_id)
        await self.publish_keys({"ring-ref": self._ring_ref, "event-channel": self._port, "feature-persistent": 1})

    async def connect(self) -> None:
        self.sectors = await self.other_number("sectors", bits=64)
        self.readonly = bool(await self.other_number("info") & INFO_READONLY)
        self._receiver = self.kernel.spawn(self._receive(), name="blkfront")

    async def switch(self, state: XenbusState) -> None:
        await super().switch(state)
        if state >= XenbusState.CONNECTED:
            self._settled.set()

    async def stop(self) -> None:
        """The backend goes: whoever waits is told."""
        self._break(self.error or "the backend closed")

    async def release(self) -> None:
        """The backend has let go: the pool is ours again."""
        if self._receiver is not None:
            self._receiver.cancel()
        self.kernel.evtchn.close(self._port)
        try:
            for ref in [self._ring_ref, *(ref for slot in self._slots for ref in slot.grefs)]:
                self.kernel.grants.end(ref)
        except XenError:
            return  # it lied: the pages stay granted and are never used again
        self.kernel.memory.free(self._pool)
        self.kernel.memory.free(self._page)

    async def close(self) -> None:
        """Disconnect, once nothing is in flight."""
        if self.state == XenbusState.CONNECTED:
            await self.switch(XenbusState.CLOSING)
            await self._runner

    # ---- requests

    async def read(self, sector: int, count: int) -> bytes:
        """`count` sectors from `sector`. Raises BlockError."""
        return b"".join(await gather(self._read(at, n) for at, n in _pieces(sector, count)))

    async def write(self, sector: int, data: bytes) -> None:
        """Whole sectors. Returned: acknowledged, not yet durable (flush). Raises BlockError, ValueError."""
        if len(data) % SECTOR:
            raise ValueError(f"{len(data)} bytes are not whole sectors")
        pieces = _pieces(sector, len(data) // SECTOR)
        view = memoryview(data)
        await gather(self._write(at, view[(at - sector) * SECTOR : (at - sector + n) * SECTOR]) for at, n in pieces)

    async def flush(self) -> None:
        """Every write acknowledged before is on stable storage. Raises BlockError."""
        slot = await self._take()
        await self._perform(slot, BlkOp.FLUSH, 0, 0)
        self._free.put(slot)

    async def _read(self, sector: int, count: int) -> bytes:
        slot = await self._take()
        await self._perform(slot, BlkOp.READ, sector, count)
        data = memory.read(slot.address, count * SECTOR)
        self._free.put(slot)
        return data

    async def _write(self, sector: int, data: memoryview) -> None:
        slot = await self._take()
        memory.write(slot.address, data)
        await self._perform(slot, BlkOp.WRITE, sector, len(data) // SECTOR)
        self._free.put(slot)

    async def _take(self) -> _Slot:
        if self.error:
            raise BlockError(self.error)
        return await self._free.get()

    async def _perform(self, slot: _Slot, op: BlkOp, sector: int, count: int) -> None:
        """One request and its answer; the slot is given back here only if it failed."""
        if self.error:
            self._free.put(slot)
            raise BlockError(self.error)
        slot.op, slot.status = op, None
        slot.answered.clear()
        segments = [min(count - at, SECTORS_PER_PAGE) for at in range(0, count, SECTORS_PER_PAGE)]
        request = HEAD.pack(op, len(segments), self.handle, slot.ident, sector) + b"".join(
            SEGMENT.pack(gref, 0, n - 1) for gref, n in zip(slot.grefs, segments, strict=False)
        )
        self.stats["requests"] += 1
        self.stats["bytes"] += count * SECTOR
        if self._ring.publish(request.ljust(REQUEST_BYTES, b"\0")):
            self.stats["notifies"] += 1
            self.kernel.evtchn.send(self._port)
        await slot.answered.wait()
        if slot.status != BlkStatus.OKAY:
            self._free.put(slot)
            raise self._failure(f"{op.name.lower()} of {count} sectors at {sector}: status {slot.status}")

    def _failure(self, what: str) -> BlockError:
        """Of the device, where that is broken; else of the one request."""
        return BlockError(self.error or what)

    # ---- answers

    async def _receive(self) -> None:
        while not self.error:
            try:
                answers = self._ring.take()
                for ident, op, status in RESPONSE.iter_unpack(answers):
                    self._answer(ident, op, status)
                if not answers and not self._ring.recheck():
                    await self.kernel.evtchn.wait(self._port)
            except Broken as error:
                await self.fail(f"the block backend violated its ring: {error}")

    def _answer(self, ident: int, op: int, status: int) -> None:
        slot = self._slots[ident] if ident < len(self._slots) else None
        if slot is None or slot.answered.is_set or slot.op != op:
            raise Broken(f"an answer to what was not asked (id {ident})")
        slot.status = status
        slot.answered.set()

    def _break(self, why: str) -> None:
        self.error = self.error or why
        for slot in self._slots:
            if not slot.answered.is_set:
                slot.status = BlkStatus.ERROR
                slot.answered.set()


def _pieces(sector: int, count: int) -> Iterator[tuple[int, int]]:
    """(first, sectors) of requests no larger than a ring entry carries."""
    for at in range(0, count, MAX_SECTORS):
        yield sector + at, min(MAX_SECTORS, count - at)
