"""A virtual interface: Ethernet frames over a transmit and a receive ring, data in two pools granted once.

Frames move in C, a batch a call (net.c); one event channel serves both rings. The backend is not trusted: an answer to
what was not asked, or a length that cannot be, breaks the device with a reason; every waiter gets NetError.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from domain._net import ffi, lib
from domain.memory import Pages
from domain.sched import Event, Task
from domain.xenbus import FRONTEND, Device
from hypervisor.public.errors import XenError
from hypervisor.public.io.netif import MTU
from hypervisor.public.io.xenbus import XenbusState
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

RECEIVE = 128  # frames taken in one call


class NetError(Exception):
    """The device is gone, or what is to be sent is no frame."""


class NetDevice(Device):
    """The frontend. `mac` six bytes, `ip` dotted or "" for any, `mtu` bytes of payload of a frame."""

    TABLE = FRONTEND

    @classmethod
    async def open(cls, kernel: Kernel, name: str) -> NetDevice:
        """Connect the interface `name`. Raises NetError where the toolstack gave us none, or it cannot be connected."""
        if not (name.startswith("eth") and name[3:].isdigit()):
            raise NetError(f"{name}: a virtual interface is called eth0, eth1, ...")
        path = f"/local/domain/{kernel.domid}/device/vif/{int(name[3:])}"
        otherend = await kernel.store.get(f"{path}/backend")
        if not otherend:
            raise NetError(f"{kernel.name} has no interface {name}")
        device = cls(kernel, path, otherend, int(await kernel.store.read(f"{path}/backend-id")))
        device.name = name
        device._runner = kernel.spawn(device.run(), name=f"netfront {name}")
        await device._settled.wait()
        if device.state != XenbusState.CONNECTED:
            raise NetError(await device.other("error") or device.error or f"{name}: the backend closed")
        return device

    def __init__(self, kernel: Kernel, path: str, otherend: str, otherend_id: int) -> None:
        super().__init__(kernel, path, otherend, otherend_id)
        self.name = ""
        self.mac, self.ip, self.mtu = bytes(6), "", MTU
        self.notifies = 0
        self._net: Any = ffi.new("struct netfront *")
        self._settled, self._room, self._frames = Event(), Event(), Event()
        self._buffer: Any = ffi.new("char[]", RECEIVE * lib.NET_FRAME)
        self._lengths: Any = ffi.new("uint32_t[]", RECEIVE)
        self._count: Any = ffi.new("uint32_t *")
        self._pages: list[Pages] = []
        self._refs: list[int] = []
        self._runner: Task[None]
        self._interrupts: Task[None] | None = None

    @property
    def stats(self) -> dict[str, int]:
        """Frames and bytes each way, frames the backend dropped, hypercalls that notified it."""
        names = ("tx_frames", "tx_bytes", "tx_dropped", "rx_frames", "rx_bytes", "rx_errors")
        return {name: getattr(self._net, name) for name in names} | {"notifies": self.notifies}

    # ---- the steps of the table

    async def publish(self) -> None:
        """Allocate the rings and the pools, grant all of it for good, post every buffer, tell the backend."""
        kernel, n = self.kernel, self._net
        self.mac = bytes.fromhex((await self.own("mac")).replace(":", ""))
        self.ip = await self.own("ip")
        tx_ring, rx_ring = kernel.memory.alloc(1), kernel.memory.alloc(1)
        tx_pool, rx_pool = kernel.memory.alloc(lib.NET_RING), kernel.memory.alloc(lib.NET_RING)
        self._pages = [tx_ring, rx_ring, tx_pool, rx_pool]
        n.tx_pool, n.rx_pool = tx_pool.address, rx_pool.address
        lib.net_open(n, ffi.cast("void *", tx_ring.address), ffi.cast("void *", rx_ring.address), PAGE_SIZE)
        tx_ref, rx_ref = (kernel.grants.give(self.otherend_id, ring.pfn) for ring in (tx_ring, rx_ring))
        n.tx_refs = kernel.grants.give_pages(self.otherend_id, tx_pool, readonly=True)
        n.rx_refs = kernel.grants.give_pages(self.otherend_id, rx_pool)
        self._refs = [tx_ref, rx_ref, *n.tx_refs, *n.rx_refs]
        lib.net_post(n)
        self._port = kernel.evtchn.alloc_unbound(self.otherend_id)
        keys = {"tx-ring-ref": tx_ref, "rx-ring-ref": rx_ref, "event-channel": self._port, "request-rx-copy": 1}
        await self.publish_keys(keys)

    async def connect(self) -> None:
        self._interrupts = self.kernel.spawn(self._interrupt(), name=f"netfront {self.name}")

    async def switch(self, state: XenbusState) -> None:
        await super().switch(state)
        if state >= XenbusState.CONNECTED:
            self._settled.set()

    async def stop(self) -> None:
        """The backend goes: whoever waits is told."""
        self.error = self.error or "the backend closed"
        self._room.set()
        self._frames.set()

    async def release(self) -> None:
        """The backend has let go: the pools are ours again."""
        if self._interrupts is not None:
            self._interrupts.cancel()
        self.kernel.evtchn.close(self._port)
        try:
            for ref in self._refs:
                self.kernel.grants.end(ref)
        except XenError:
            return  # it lied: the pages stay granted and are never used again
        for pages in self._pages:
            self.kernel.memory.free(pages)

    async def close(self) -> None:
        """Disconnect; frames under way are lost, as on a wire."""
        if self.state == XenbusState.CONNECTED:
            await self.switch(XenbusState.CLOSING)
            await self._runner

    # ---- frames

    async def send(self, payloads: Sequence[bytes], head: bytes = b"") -> None:
        """Send each of `payloads` as a frame; with `head`, a UDP header of 42 bytes whose lengths and checksums are
        filled in here, in front of each. Waits for room. Raises NetError."""
        data, lengths = b"".join(payloads), array("I", map(len, payloads))
        sizes: Any = ffi.cast("uint32_t *", ffi.from_buffer(lengths))
        source: Any = ffi.from_buffer(data)
        at = done = 0
        while done < len(lengths):
            left = len(lengths) - done
            notify = lib.net_send(self._net, head, len(head), source + at, sizes + done, left, self._count)
            self._check(notify)
            sent = self._count[0]
            at += sum(lengths[done : done + sent])
            done += sent
            self._notify(notify)
            if not sent and not lib.net_recheck_tx(self._net):
                self._room.clear()
                await self._room.wait()

    async def receive(self) -> list[bytes]:
        """Frames that came, at least one, in order. Raises NetError."""
        while True:
            notify = lib.net_recv(self._net, self._buffer, self._lengths, RECEIVE, self._count)
            self._check(notify)
            self._notify(notify)
            if self._count[0]:
                return list(self._split(self._count[0]))
            if not lib.net_recheck_rx(self._net):
                self._frames.clear()
                await self._frames.wait()

    def _split(self, count: int) -> Iterator[bytes]:
        lengths = list(self._lengths[0:count])
        data = memoryview(ffi.buffer(self._buffer, sum(lengths)))
        at = 0
        for length in lengths:
            yield bytes(data[at : at + length])
            at += length

    def _notify(self, asked: int) -> None:
        if asked == 1:
            self.notifies += 1
            self.kernel.evtchn.send(self._port)

    def _check(self, result: int) -> None:
        """Raises NetError; a violated ring closes the device first."""
        if result == -errno.EINVAL:
            raise NetError(f"a frame is 14 to {lib.NET_FRAME} bytes, a header in front of it 42")
        if result < 0 and not self.error:
            self.error = "the network backend violated its ring"
            self.kernel.spawn(self.fail(self.error), name=f"netfront {self.name}")
        if self.error:
            raise NetError(self.error)

    async def _interrupt(self) -> None:
        while True:
            await self.kernel.evtchn.wait(self._port)
            self._room.set()
            self._frames.set()
