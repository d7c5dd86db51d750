"""The receiver of the demonstration: from his interface to his disk, in order, then flushed.

cmdline: "size=BYTES".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from domain.sched import Task
from domain.udp import Udp

if TYPE_CHECKING:
    from domain.blkfront import BlockDevice
    from domain.kernel import Kernel

PORT = 7000
SEQ = struct.Struct("!II")
ACK = struct.Struct("!II?")
BLOCK = 8 * 32 * 1408  # bytes written at once: whole sectors


class Sink:
    """Bytes in order to the disk, whole sectors, one write under way while the next is gathered."""

    def __init__(self, kernel: Kernel, disk: BlockDevice) -> None:
        self._kernel, self._disk = kernel, disk
        self._parts: list[bytes] = []
        self._gathered = self._sector = 0
        self._writing: Task[None] | None = None

    async def put(self, data: bytes) -> None:
        self._parts.append(data)
        self._gathered += len(data)
        if self._gathered >= BLOCK:
            await self._write()

    async def close(self) -> None:
        """All of it on stable storage."""
        await self._write()
        if self._writing is not None:
            await self._writing
        await self._disk.flush()

    async def _write(self) -> None:
        if self._writing is not None:
            await self._writing
        data = b"".join(self._parts)
        data += bytes(-len(data) % self._disk.sector_size)
        self._parts, self._gathered = [], 0
        self._writing = self._kernel.spawn(self._disk.write(self._sector, data), name="write")
        self._sector += len(data) // self._disk.sector_size


async def main(kernel: Kernel) -> int:
    disk = await kernel.block("xvda")
    sock = Udp(kernel, await kernel.net("eth0")).bind(PORT)
    sink, have, total = Sink(kernel, disk), 0, -1
    durable = False
    while True:
        source = ""
        for datagram in await sock.receive():
            number, total = SEQ.unpack_from(datagram.data)
            source, port = datagram.source, datagram.port
            if number == have < total:
                await sink.put(datagram.data[SEQ.size :])
                have += 1
        if have == total and not durable:
            await sink.close()
            durable = True
            await kernel.store.write("data/result", f"datagrams={have}")
        await sock.send(source, port, [ACK.pack(have, total, durable)])


