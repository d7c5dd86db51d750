"""The sender of the demonstration: her read-only disk, over her interface, to bob. And a second interface that is refused.

A window of datagrams is under way; bob acknowledges how many he has in order; what is not acknowledged in time is sent again.
cmdline: "size=BYTES to=ADDRESS".
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING

from domain.sched import Event, Task, TimeoutExpired, timeout
from domain.udp import Udp, UdpSocket

if TYPE_CHECKING:
    from domain.blkfront import BlockDevice
    from domain.kernel import Kernel

PORT = 7000
DATAGRAM = 1408  # bytes of data in each; 32 of them are what a request of 88 sectors carries
BLOCK = 8 * 32 * DATAGRAM  # read at once; the next one is under way meanwhile
WINDOW = 128  # datagrams sent and not acknowledged
PATIENCE = 0.1  # seconds without progress after which the window is sent again
SEQ = struct.Struct("!II")  # number of the datagram, of all
ACK = struct.Struct("!II?")  # datagrams there in order, of all, and whether all are on stable storage
REFUSED = 20  # datagrams tried over the second interface


class Source:
    """The file as datagrams, in order, read ahead by one block."""

    def __init__(self, kernel: Kernel, disk: BlockDevice, size: int) -> None:
        self._kernel, self._disk, self._size = kernel, disk, size
        self._at = 0
        self._ready: deque[bytes] = deque()
        self._next: Task[bytes] | None = None
        self._ahead()

    def _ahead(self) -> None:
        count = min(BLOCK, self._size - self._at)
        self._next = None
        if count > 0:
            sectors = -(-count // self._disk.sector_size)
            self._next = self._kernel.spawn(self._disk.read(self._at // self._disk.sector_size, sectors))

    async def take(self, most: int) -> list[bytes]:
        """At most `most` datagrams, at least one unless the file is at its end."""
        if not self._ready and self._next is not None:
            data = (await self._next)[: self._size - self._at]
            self._at += len(data)
            self._ready.extend(data[i : i + DATAGRAM] for i in range(0, len(data), DATAGRAM))
            self._ahead()
        return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]


class Sender:
    """Go-back-n."""

    def __init__(self, sock: UdpSocket, to: str, total: int) -> None:
        self._sock, self._to, self._total = sock, to, total
        self._flight: deque[bytes] = deque()
        self._first = 0  # number of the first datagram under way
        self._progress = Event()
        self.done = False
        self.repeated = 0

    async def listen(self) -> None:
        while not self.done:
            for datagram in await self._sock.receive():
                have, total, self.done = ACK.unpack(datagram.data)
                if total != self._total or not self._first <= have <= self._first + len(self._flight):
                    continue
                for _ in range(have - self._first):
                    self._flight.popleft()
                self._first = have
                self._progress.set()

    async def run(self, source: Source) -> None:
        while not self.done:
            fresh = await source.take(WINDOW - len(self._flight))
            if fresh:
                start = self._first + len(self._flight)
                packets = [SEQ.pack(start + i, self._total) + data for i, data in enumerate(fresh)]
                self._flight.extend(packets)
                await self._sock.send(self._to, PORT, packets)
                if len(self._flight) < WINDOW:
                    continue
            try:
                await timeout(PATIENCE, self._progress.wait())
                self._progress.clear()
            except TimeoutExpired:
                self.repeated += len(self._flight)
                await self._sock.send(self._to, PORT, list(self._flight) or [SEQ.pack(self._total, self._total)])


async def try_the_refused_way(kernel: Kernel, to: str) -> None:
    """Nothing of this reaches bob: the switch drops it, and counts."""
    sock = Udp(kernel, await kernel.net("eth1")).bind(PORT)
    await sock.send(to, PORT, [SEQ.pack(0, 1) + b"must not arrive"] * REFUSED)


async def main(kernel: Kernel) -> int:
    options = dict(word.split("=", 1) for word in kernel.cmdline.split())
    size, to = int(options["size"]), options["to"]
    disk = await kernel.block("xvda")
    sock = Udp(kernel, await kernel.net("eth0")).bind(PORT)
    await try_the_refused_way(kernel, to)

    sender = Sender(sock, to, -(-size // DATAGRAM))
    kernel.spawn(sender.listen(), name="acknowledgements")
    begin = kernel.now_ns()
    await sender.run(Source(kernel, disk, size))
    seconds = (kernel.now_ns() - begin) / 1e9

    await kernel.store.write("data/result", f"seconds={seconds:.3f} repeated={sender.repeated}")
    await Event().wait()  # until the toolstack says that it has seen everything
    return 0
