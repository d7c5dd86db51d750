"""The driver domains: made by dom0 when the host starts, made again when one dies.

A driver domain that dies takes its devices with it: their frontends see them closed, other domains go on, and new devices
are served by its successor.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from dom0.builder import BuildError, Image
from domain import memory
from domain.grant import GrantError, Mapping
from domain.sched import Task
from hypervisor.public.domctl import CreateFlags, UnpauseDomain
from hypervisor.public.io import stats
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from dom0.toolstack import Guest, Toolstack

KINDS = {"blkback": 512, "netback": 512}  # module of dom0 and domain name; frames
RETRY_SECONDS = 1.0
ERROR_CHARS = 120  # of what a driver domain says of a device
MAX_DEATHS = 5  # a driver domain that died so often in a row, without having been ready, is given up


class DriverDomain:
    """One, alive: its guest record, the socket its images go over, its statistics page."""

    def __init__(self, guest: Guest, descriptors: socket.socket) -> None:
        self.guest, self.domid, self.descriptors = guest, guest.domid, descriptors
        self.stats: Mapping | None = None
        self.watcher: Task[None] | None = None


class Drivers:
    def __init__(self, toolstack: Toolstack) -> None:
        self._toolstack, self._kernel = toolstack, toolstack.kernel
        self._live: dict[str, DriverDomain] = {}
        self._deaths = dict.fromkeys(KINDS, 0)
        self.firewall = "default accept\n"  # the rules, as text; a new netback gets them too
        self.stopping = False

    def __getitem__(self, name: str) -> DriverDomain:
        return self._live[name]

    async def start(self) -> None:
        for name in KINDS:
            await self._start(name)
        for driver in list(self._live.values()):
            await self._ready(driver)

    async def _start(self, name: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            image = Image(entry=f"dom0.{name}")
            guest = await self._toolstack.introduce(
                name, image, KINDS[name], "", CreateFlags.DRIVER, descriptor=theirs.fileno()
            )
        self._live[name] = driver = DriverDomain(guest, ours)
        driver.watcher = self._kernel.spawn(self._watch_errors(driver), name=f"{name} errors")
        if name == "netback":
            await self._kernel.store.write_long(f"/local/domain/{guest.domid}/data/firewall", self.firewall)
        self._kernel.call(UnpauseDomain(guest.domid))

    async def _ready(self, driver: DriverDomain) -> None:
        """Until it serves; then its statistics are ours to read."""
        store, data = self._kernel.store, f"/local/domain/{driver.domid}/data"
        watch = await store.watch(data)
        try:
            while not await store.get(f"{data}/ready") and not driver.guest.ended.is_set:
                await watch.next()
        finally:
            await watch.close()
        if driver.guest.ended.is_set:
            return
        self._deaths[driver.guest.name] = 0
        try:
            driver.stats = self._kernel.grants.map(driver.domid, [int(await store.get(f"{data}/stats-ref"))], readonly=True)
        except (GrantError, ValueError, struct.error) as error:
            self._toolstack.log(f"{driver.guest.name} has no statistics: {error}")  # or it died this very moment

    async def _watch_errors(self, driver: DriverDomain) -> None:
        """A device that its backend closed says why in its node: the owner of the device is told in the list."""
        store, base = self._kernel.store, f"/local/domain/{driver.domid}/backend"
        watch = await store.watch(base)
        try:
            while True:
                path = await watch.next()
                if path.endswith("/error") and (why := await store.get(path)):
                    for device in self._toolstack.devices.of(driver.domid):
                        if path == f"{device.backend_path}/error" and device.domid in self._toolstack.guests:
                            self._toolstack.report(self._toolstack.guests[device.domid], f"{device.name}: {why[:ERROR_CHARS]}")
        finally:
            await watch.close()

    async def ended(self, guest: Guest) -> None:
        """A domain ended; if it was one of ours, make another."""
        driver = self._live.get(guest.name)
        if driver is None or driver.guest is not guest:
            return
        driver.descriptors.close()
        if driver.watcher is not None:
            driver.watcher.cancel()
        if driver.stats is not None:
            self._kernel.grants.unmap(driver.stats)
        self._deaths[guest.name] += 1
        if self.stopping:
            return
        if self._deaths[guest.name] >= MAX_DEATHS:
            self._toolstack.log(f"{guest.name} died {MAX_DEATHS} times in a row; it is not started again")
            return
        self._toolstack.log(f"{guest.name} ended; starting another")
        self._kernel.spawn(self._restart(guest.name), name=guest.name)

    async def _restart(self, name: str) -> None:
        """Until there is one: somebody may have taken the memory meanwhile."""
        while not self.stopping:
            try:
                await self._start(name)
            except BuildError as error:
                self._toolstack.log(f"{name} cannot be started: {error}")
                await self._kernel.sleep(RETRY_SECONDS)
            else:
                await self._ready(self._live[name])
                return

    def statistics(self) -> list[dict[str, int]]:
        """Counters of every connected VBD and VIF (hypervisor/public/io/stats.py)."""
        rows = []
        for driver in self._live.values():
            if driver.stats is not None and not driver.guest.ended.is_set:
                rows += stats.rows(memory.read(driver.stats.address, PAGE_SIZE))
        return rows

    async def set_firewall(self, text: str) -> str:
        """Rules for the switch from now on; returns what is wrong with them, "" for nothing."""
        store, data = self._kernel.store, f"/local/domain/{self['netback'].domid}/data"
        await store.rm(f"{data}/firewall-error")
        watch = await store.watch(f"{data}/firewall-error")
        try:
            await store.write_long(f"{data}/firewall", text)
            while "firewall-error" not in await store.ls(data):
                await watch.next()
            error = await store.get(f"{data}/firewall-error")
        finally:
            await watch.close()
        if not error:
            self.firewall = text
        return error

    async def firewall_hits(self) -> dict[str, Any]:
        """Packets that met each rule, and the ones that met none."""
        store, data = self._kernel.store, f"/local/domain/{self['netback'].domid}/data"
        serial = str(int(await store.get(f"{data}/firewall-ask", "0")) + 1)
        watch = await store.watch(f"{data}/firewall-hits")
        try:
            await store.write(f"{data}/firewall-ask", serial)
            while True:
                asked, *counts = (await store.read_long(f"{data}/firewall-hits") or "0").split()
                if int(asked) >= int(serial):
                    break
                await watch.next()
        finally:
            await watch.close()
        names = ("default", "spoofed", "unknown_destination", "no_buffer", "malformed")
        numbers = [int(count) for count in counts]
        return {**dict(zip(names, numbers, strict=False)), "rules": numbers[len(names) :]}
