"""UDP over a virtual interface, as small as it can be: ARP, whole datagrams, checksums in C. No fragments, no ICMP.

    stack = Udp(kernel, await kernel.net("eth0"))
    sock = stack.bind(7000)
    await sock.send("10.0.0.2", 7000, [b"one", b"two"])
    for datagram in await sock.receive(): ...

A datagram may be lost, never altered: a receiver that does not take its datagrams loses what is past BACKLOG, counted.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, NamedTuple

from domain._net import ffi, lib
from domain.netfront import NetDevice, NetError
from domain.sched import Event, TimeoutExpired, timeout

if TYPE_CHECKING:
    from domain.kernel import Kernel

BACKLOG = 4096  # datagrams a socket keeps
ARP_SECONDS, ARP_TRIES = 0.2, 10
BROADCAST = b"\xff" * 6
ETHERTYPE_ARP, ETHERTYPE_IP = 0x0806, 0x0800
ETHERNET = struct.Struct("!6s6sH")
ARP = struct.Struct("!HHBBH6s4s6s4s")
IP_UDP = struct.Struct("!BBHHHBBH4s4sHHHH")


class Datagram(NamedTuple):
    """One that came."""

    source: str
    port: int
    data: bytes


class UdpSocket:
    """A port of an interface."""

    def __init__(self, stack: Udp, port: int) -> None:
        self._stack, self.port = stack, port
        self._queue: deque[Datagram] = deque()
        self._arrived = Event()
        self.dropped = 0

    async def send(self, address: str, port: int, payloads: Sequence[bytes]) -> None:
        """A datagram each, at most `mtu - 28` bytes. Raises NetError: nobody has that address, or the device is gone."""
        await self._stack.send(self.port, address, port, payloads)

    async def receive(self) -> list[Datagram]:
        """All that came, at least one."""
        while not self._queue:
            if self._stack.device.error:
                raise NetError(self._stack.device.error)
            self._arrived.clear()
            await self._arrived.wait()
        out = list(self._queue)
        self._queue.clear()
        return out

    def put(self, datagram: Datagram) -> None:
        if len(self._queue) >= BACKLOG:
            self.dropped += 1
            return
        self._queue.append(datagram)
        self._arrived.set()

    def wake(self) -> None:
        self._arrived.set()

    def close(self) -> None:
        self._stack.sockets.pop(self.port, None)


class Udp:
    """The stack of one interface: a task that takes its frames, the sockets they go to, the addresses it learnt."""

    def __init__(self, kernel: Kernel, device: NetDevice) -> None:
        self.device = device
        self.sockets: dict[int, UdpSocket] = {}
        self._ip = IPv4Address(device.ip).packed
        self._neighbours: dict[bytes, bytes] = {}
        self._learnt = Event()
        self._offset: Any = ffi.new("uint32_t *")
        kernel.spawn(self._run(), name=f"udp {device.name}")

    def bind(self, port: int) -> UdpSocket:
        """Raises NetError where the port is taken."""
        if port in self.sockets:
            raise NetError(f"udp port {port} is bound")
        self.sockets[port] = UdpSocket(self, port)
        return self.sockets[port]

    async def send(self, source_port: int, address: str, port: int, payloads: Sequence[bytes]) -> None:
        target = IPv4Address(address).packed
        mac = await self._resolve(target)
        ethernet = ETHERNET.pack(mac, self.device.mac, ETHERTYPE_IP)
        header = IP_UDP.pack(0x45, 0, 0, 0, 0x4000, 64, 17, 0, self._ip, target, source_port, port, 0, 0)
        await self.device.send(payloads, ethernet + header)

    async def _resolve(self, target: bytes) -> bytes:
        """The MAC of an address, asked for by ARP."""
        for _ in range(ARP_TRIES):
            if target in self._neighbours:
                return self._neighbours[target]
            self._learnt.clear()
            await self.device.send([self._arp(1, BROADCAST, bytes(6), target)])
            try:
                await timeout(ARP_SECONDS, self._learnt.wait())
            except TimeoutExpired:
                pass
        if target not in self._neighbours:
            raise NetError(f"nobody answers for {IPv4Address(target)} on {self.device.name}")
        return self._neighbours[target]

    def _arp(self, operation: int, to: bytes, target_mac: bytes, target: bytes) -> bytes:
        ethernet = ETHERNET.pack(to, self.device.mac, ETHERTYPE_ARP)
        return ethernet + ARP.pack(1, ETHERTYPE_IP, 6, 4, operation, self.device.mac, self._ip, target_mac, target)

    async def _run(self) -> None:
        try:
            while True:
                for frame in await self.device.receive():
                    await self._take(frame)
        except NetError:
            for sock in self.sockets.values():
                sock.wake()

    async def _take(self, frame: bytes) -> None:
        if frame[12:14] == b"\x08\x06":
            await self._take_arp(frame[14:])
            return
        size = lib.udp_payload(frame, len(frame), self._offset)
        if size < 0 or frame[30:34] != self._ip:
            return
        at = self._offset[0]
        source_port, port = struct.unpack_from("!HH", frame, at - 8)
        sock = self.sockets.get(port)
        if sock is not None:
            sock.put(Datagram(str(IPv4Address(frame[26:30])), source_port, frame[at : at + size]))

    async def _take_arp(self, message: bytes) -> None:
        if len(message) < ARP.size:
            return
        _, _, _, _, operation, mac, ip, _, target = ARP.unpack_from(message)
        if target != self._ip:
            return
        if ip in self._neighbours or len(self._neighbours) < 1024:
            self._neighbours[ip] = mac
        self._learnt.set()
        if operation == 1:
            await self.device.send([self._arp(2, mac, mac, ip)])
