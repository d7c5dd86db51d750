"""The block driver domain: `async def main(kernel)`. It owns no guest; it is given open images by dom0 and frames by guests.

One VBD is one xenbus backend. Its data path makes no hypercall but the event: grants are mapped once and kept.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import msgpack

from dom0 import vbd as table
from dom0._blk import ffi, lib
from domain.backend import MAX_KEPT, Statistics, serve_nodes
from domain.grant import GrantError, Mapping
from domain.sched import Event
from domain.xenbus import BACKEND, Device, DeviceError
from hypervisor.public.errors import XenError
from hypervisor.public.io.blkif import INFO_READONLY, SECTOR
from hypervisor.public.io.stats import StatsKind
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

TURN = 4  # batches of one VBD before the others have theirs


class Images:
    """Open descriptors as dom0 hands them over: one message, one descriptor."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, kernel.start.descriptors_fd)  # asks nothing
        self._held: dict[tuple[int, int], int] = {}
        self._arrived = Event()
        kernel.spawn(self._receive(), name="images")

    async def take(self, domid: int, vdev: int) -> int:
        """The image of that VBD; waits until it came."""
        while (domid, vdev) not in self._held:
            self._arrived.clear()
            await self._arrived.wait()
        return self._held.pop((domid, vdev))

    async def _receive(self) -> None:
        while True:
            await self._kernel.readable(self._sock.fileno())
            data, fds, _, _ = socket.recv_fds(self._sock, 512, 1)
            if not data:
                return
            message = msgpack.unpackb(data)
            old = self._held.pop((message["domid"], message["vdev"]), -1)
            if old >= 0:
                os.close(old)
            self._held[message["domid"], message["vdev"]] = fds[0]
            self._arrived.set()


class BlockBackend(Device):
    """One VBD."""

    TABLE = BACKEND

    def __init__(self, kernel: Kernel, path: str, otherend: str, domid: int, vdev: int, fd: int, stats: Statistics) -> None:
        super().__init__(kernel, path, otherend, domid)
        self._stats, self._row = stats, -1
        self._vbd: Any = ffi.new("struct blk_vbd *")
        self._vbd.fd, self._vbd.handle = fd, vdev & 0xFFFF
        self._missing: Any = ffi.new("uint32_t[]", 32 * 11)
        self._mappings: list[Mapping] = []
        self._kept = 0  # grants of the pool that are mapped
        self._port = 0
        self._task: Any = None

    # ---- the steps of the table

    async def announce(self) -> None:
        size = os.lseek(self._vbd.fd, 0, os.SEEK_END)  # of a file and of a block device; the movers name their offsets
        try:
            extents = table.parse_extents(await self.own("extents"), size // SECTOR)
        except ValueError as error:
            raise DeviceError(str(error)) from None
        table.fill(self._vbd, extents)
        self._vbd.writable = await self.own("mode") == "w"
        await self.publish_keys({"feature-flush-cache": 1, "feature-persistent": 1})

    async def connect(self) -> None:
        try:
            ref, port = await self.other_number("ring-ref"), await self.other_number("event-channel")
            ring = self.kernel.grants.map(self.otherend_id, [ref])
            self._mappings.append(ring)
            self._port = self.kernel.evtchn.bind_interdomain(self.otherend_id, port)
        except (GrantError, XenError) as error:
            raise DeviceError(f"the frontend's ring or event channel cannot be used: {error}") from None
        lib.blk_attach(self._vbd, ffi.cast("void *", ring.address), PAGE_SIZE)
        self._row, counters = self._stats.open(self.otherend_id, StatsKind.VBD, self._vbd.handle)
        self._vbd.stats = ffi.cast("uint64_t *", counters)
        info = 0 if self._vbd.writable else INFO_READONLY
        await self.publish_keys({"sectors": self._vbd.sectors, "sector-size": SECTOR, "info": info})
        self._task = self.kernel.spawn(self._serve(), name=self.path)

    async def release(self) -> None:
        """Let go of everything before the state says so."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._port:
            self.kernel.evtchn.close(self._port)
            self._port = 0
        for mapping in self._mappings:
            self.kernel.grants.unmap(mapping)
        self._mappings, self._kept = [], 0
        if self._row >= 0:
            self._vbd.stats = ffi.NULL
            self._stats.close(self._row)
            self._row = -1
        if self._vbd.fd >= 0:
            os.close(self._vbd.fd)
            self._vbd.fd = -1

    # ---- the data path

    async def _serve(self) -> None:
        while True:
            await self.kernel.evtchn.wait(self._port)
            while True:
                try:
                    again = self._turn()
                except DeviceError as error:
                    self._task = None
                    await self.fail(str(error))
                    return
                if not again and not lib.blk_recheck(self._vbd):
                    break
                await self.kernel.sleep(0)  # the other VBDs' turn

    def _turn(self) -> bool:
        """At most TURN batches; True if there may be more."""
        for _ in range(TURN):
            n = lib.blk_take(self._vbd)
            if n < 0:
                raise DeviceError("the frontend's request index cannot be")
            if n == 0:
                return False
            self._map_missing()
            if lib.blk_run(self._vbd) == 1:
                self._notify()
        return True

    def _notify(self) -> None:
        try:
            self.kernel.evtchn.send(self._port)
        except XenError:
            pass  # the frontend is gone; its state will say so

    def _map_missing(self) -> None:
        """Map the grants that this batch names for the first time; a refused one stays refused, its requests fail.

        So do those past MAX_KEPT: what is mapped for one is not there for others.
        """
        n = lib.blk_missing(self._vbd, self._missing, 32 * 11)
        grefs = [self._missing[i] for i in range(min(n, MAX_KEPT - self._kept))]
        if not grefs:
            return
        try:
            self._keep(grefs)
        except (GrantError, XenError):
            for gref in grefs:
                try:
                    self._keep([gref])
                except (GrantError, XenError):
                    pass

    def _keep(self, grefs: list[int]) -> None:
        mapping = self.kernel.grants.map(self.otherend_id, grefs)
        self._mappings.append(mapping)
        self._kept += len(grefs)
        for i, gref in enumerate(grefs):
            self._vbd.address[gref] = mapping.address + i * PAGE_SIZE


async def main(kernel: Kernel) -> None:
    """Serve every VBD that dom0 makes, for ever."""
    stats = await Statistics.publish(kernel)
    images = Images(kernel)

    async def begin(path: str, frontend: str, domid: int, vdev: int) -> None:
        fd = await images.take(domid, vdev)
        await BlockBackend(kernel, path, frontend, domid, vdev, fd, stats).run()

    await kernel.store.write(f"/local/domain/{kernel.domid}/data/ready", 1)
    await serve_nodes(kernel, "vbd", begin)
