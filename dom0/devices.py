"""Attaching and detaching VBDs and VIFs: the two nodes of a split driver, made and taken away in the order that both
ends can follow (domain/xenbus.py has their tables).

dom0 alone opens images. The same sectors are never attached twice where one of the two writes.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack

from dom0.config import Disk, Vif
from dom0.vbd import Extent, parse_extents
from domain.sched import TimeoutExpired, timeout
from domain.store import Watch
from hypervisor.public.io.blkif import SECTOR, XVDA, vdev
from hypervisor.public.io.xenbus import XenbusState

if TYPE_CHECKING:
    from domain.kernel import Kernel

Keys = dict[str, str | int]
DETACH_SECONDS = 5.0  # a backend that has not let go by then is not waited for


class DeviceRefused(Exception):
    """It cannot be attached: one sentence."""


@dataclass(frozen=True)
class Device:
    """An attached device: `kind` is vbd or vif, `handle` its number."""

    domid: int
    kind: str
    handle: int
    backend: int  # domid

    @property
    def name(self) -> str:
        """As its domain calls it."""
        return f"eth{self.handle}" if self.kind == "vif" else f"xvd{chr(ord('a') + (self.handle - XVDA) // 16)}"

    @property
    def frontend_path(self) -> str:
        return f"/local/domain/{self.domid}/device/{self.kind}/{self.handle}"

    @property
    def backend_path(self) -> str:
        return f"/local/domain/{self.backend}/backend/{self.kind}/{self.domid}/{self.handle}"


@dataclass(frozen=True)
class _Claim:
    """Sectors of an image that a VBD uses."""

    device: Device
    image: tuple[int, int]  # device and inode
    extents: tuple[Extent, ...]
    writes: bool

    def conflicts(self, other: _Claim) -> bool:
        if self.image != other.image or not (self.writes or other.writes):
            return False
        return any(a.first < b.first + b.count and b.first < a.first + a.count for a in self.extents for b in other.extents)


class Devices:
    """Every device of every domain."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._claims: list[_Claim] = []
        self.attached: set[Device] = set()

    # ---- attaching

    async def attach_vbd(self, domid: int, disk: Disk, backend: int, descriptors: socket.socket) -> Device:
        """Give `domid` the disk; its image goes to the backend over `descriptors`. Raises DeviceRefused."""
        device = Device(domid, "vbd", vdev(disk.name), backend)
        if device in self.attached:
            raise DeviceRefused(f"disk {disk.name}: attached already")
        fd = _open_image(disk)
        try:
            claim = self._claim(device, disk, fd)
            message = msgpack.packb({"domid": domid, "vdev": device.handle})
            socket.send_fds(descriptors, [message], [fd])
        except OSError:
            raise DeviceRefused(f"disk {disk.name}: the block driver domain has ended; another is being started") from None
        finally:
            os.close(fd)
        self._claims.append(claim)
        front: Keys = {"virtual-device": device.handle, "device-type": "disk"}
        extents = ";".join(f"{e.first}:{e.count}" for e in claim.extents)
        back: Keys = {"mode": disk.mode, "params": disk.image, "extents": extents, "dev": disk.name}
        await self._publish(device, front, back)
        return device

    async def attach_vif(self, domid: int, name: str, index: int, vif: Vif, backend: int) -> Device:
        """Give the domain called `name` its interface `index`. Raises DeviceRefused."""
        device = Device(domid, "vif", index, backend)
        if device in self.attached:
            raise DeviceRefused(f"vif {index}: attached already")
        mac = vif.mac or f"00:16:3e:{domid >> 8 & 0x7F:02x}:{domid & 0xFF:02x}:{index:02x}"
        keys: Keys = {"handle": index, "mac": mac, "ip": vif.ip}
        await self._publish(device, keys, {**keys, "domain": name})
        return device

    def _claim(self, device: Device, disk: Disk, fd: int) -> _Claim:
        info = os.fstat(fd)
        size = info.st_size if stat.S_ISREG(info.st_mode) else os.lseek(fd, 0, os.SEEK_END)
        try:
            extents = parse_extents(disk.extents, size // SECTOR)
        except ValueError as error:
            raise DeviceRefused(f"disk {disk.name}: {error}") from None
        identity = (info.st_dev, info.st_ino) if stat.S_ISREG(info.st_mode) else (info.st_rdev, -1)
        claim = _Claim(device, identity, extents, disk.mode == "w")
        for other in self._claims:
            if claim.conflicts(other):
                other_one = f"sectors of {disk.image} are attached to domain {other.device.domid}"
                raise DeviceRefused(f"disk {disk.name}: {other_one}, and one of the two writes")
        return claim

    async def _publish(self, device: Device, front: Keys, back: Keys) -> None:
        """Both nodes, so that neither end finds the other's missing: the backend's, the frontend's, and `frontend` last of
        all, where the backend begins."""
        store = self._kernel.store
        f, b = device.frontend_path, device.backend_path
        pairs: list[tuple[str, int, int, Keys]] = [
            (b, device.backend, device.domid, {**back, "frontend-id": device.domid, "online": 1}),
            (f, device.domid, device.backend, {**front, "backend-id": device.backend, "backend": b}),
        ]
        for path, owner, reader, keys in pairs:
            await store.mkdir(path)
            await store.set_perms(path, [f"n{owner}", f"r{reader}"])
            for key, value in keys.items():
                await store.write(f"{path}/{key}", value)
            await store.write(f"{path}/state", int(XenbusState.INITIALISING))
        await store.write(f"{b}/frontend", f)
        self.attached.add(device)

    # ---- detaching

    async def detach(self, device: Device) -> None:
        """Close the frontend's node for it, wait until the backend has let go, take both nodes away."""
        store, state = self._kernel.store, f"{device.frontend_path}/state"
        self.attached.discard(device)
        await store.write(state, int(XenbusState.CLOSED))
        await store.set_perms(state, [f"n{device.domid}", f"r{device.backend}"])  # it may have hidden it from the backend
        watch = await store.watch(f"{device.backend_path}/state")
        try:
            await timeout(DETACH_SECONDS, self._closed(device, watch))
        except TimeoutExpired:
            pass  # it hangs, or never began: its own end will release what it holds
        finally:
            await watch.close()
        await store.rm(device.frontend_path)
        await self.forget(device)

    async def _closed(self, device: Device, watch: Watch) -> None:
        while await self._kernel.store.get(f"{device.backend_path}/state", "6") != str(int(XenbusState.CLOSED)):
            await watch.next()

    async def forget(self, device: Device) -> None:
        """Its backend has let go, or its backend's domain is gone: nobody is left to wait for."""
        store, peers = self._kernel.store, device.backend_path.rpartition("/")[0]
        self.attached.discard(device)
        self._claims = [claim for claim in self._claims if claim.device != device]
        await store.rm(device.backend_path)
        if not await store.ls(peers):
            await store.rm(peers)  # the last device of its domain: the backend would look there for ever

    def of(self, domid: int) -> list[Device]:
        return [device for device in self.attached if domid in (device.domid, device.backend)]


def _open_image(disk: Disk) -> int:
    """Read-write only where the disk is; a regular file or a block device, nothing else. Raises DeviceRefused."""
    flags = (os.O_RDWR if disk.mode == "w" else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(disk.image, flags)
    except OSError as error:
        raise DeviceRefused(f"disk {disk.name}: {disk.image}: {error.strerror}") from None
    if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
        os.close(fd)
        raise DeviceRefused(f"disk {disk.name}: {disk.image} is neither a file nor a block device")
    return fd
