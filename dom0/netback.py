"""The network driver domain: `async def main(kernel)`. The switch in C moves frames; this connects vifs and sets rules.

A violated ring closes that vif and no other. Rules come from /local/domain/<me>/data/firewall as text, with names of vifs
resolved to slots; counters go back to data/firewall-hits when dom0 asks by writing data/firewall-ask.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from dom0 import firewall
from dom0._net import ffi, lib
from domain.backend import MAX_KEPT, Statistics, serve_nodes
from domain.grant import GrantError, Mapping
from domain.sched import Event
from domain.xenbus import BACKEND, Device, DeviceError
from hypervisor.public.errors import XenError
from hypervisor.public.io.stats import StatsKind
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

BATCH = 64  # frames of one vif before the others have their turn


class Switch:
    """The C switch, its slots, and the task that runs it."""

    def __init__(self, kernel: Kernel, stats: Statistics) -> None:
        self.kernel, self.stats = kernel, stats
        self.c: Any = ffi.new("struct nswitch *")
        self.backends: dict[int, NetBackend] = {}
        self.names: dict[str, int] = {}
        self.policy = firewall.Policy()
        self._missing: Any = ffi.new("uint32_t[]", lib.SWITCH_RING)
        self._work = Event()
        self._ready: set[int] = set()
        kernel.spawn(self._run(), name="switch")

    def take_slot(self, backend: NetBackend) -> int:
        for slot in range(lib.SWITCH_VIFS):
            if slot not in self.backends:
                self.backends[slot] = backend
                return slot
        raise DeviceError(f"the switch has {lib.SWITCH_VIFS} vifs")

    def drop_slot(self, slot: int) -> None:
        del self.backends[slot]
        ffi.buffer(ffi.cast("char *", self.vif(slot)), ffi.sizeof("struct vif"))[:] = bytes(ffi.sizeof("struct vif"))
        self.names = {name: s for name, s in self.names.items() if s != slot}
        self.apply()

    def vif(self, slot: int) -> Any:
        return ffi.addressof(self.c.vifs, slot)

    def apply(self) -> None:
        """Compile the rules against the vifs that are there; hits of unchanged rules go on counting."""
        hits = [self.c.rules[i].hits for i in range(self.c.nr_rules)]
        self.policy.compile(self.c, lambda name: self.names.get(name, -2))
        for i, count in enumerate(hits[: self.c.nr_rules]):
            self.c.rules[i].hits = count

    def set_policy(self, policy: firewall.Policy) -> None:
        self.c.nr_rules = 0
        self.policy = policy
        self.apply()

    def kick(self, slot: int) -> None:
        """This vif has something to send."""
        self._ready.add(slot)
        self._work.set()

    # ---- the data path

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            ready, self._ready = self._ready, set()
            for slot in sorted(ready):
                backend = self.backends.get(slot)
                if backend is None or not self.c.vifs[slot].connected:
                    continue
                try:
                    if self._turn(slot, backend):
                        self.kick(slot)
                except DeviceError as error:
                    self.kernel.spawn(backend.fail(str(error)))
            await self._publish()
            await self.kernel.sleep(0)

    def _turn(self, slot: int, backend: NetBackend) -> bool:
        """One batch of one vif; True if there may be more."""
        n = lib.vif_take(self.vif(slot), BATCH)
        if n < 0:
            raise DeviceError("the frontend's producer index cannot be")
        for other, peer in self.backends.items():  # buffers that receivers posted since
            vif = self.c.vifs[other]
            if other != slot and vif.connected and not vif.posted and lib.vif_take(self.vif(other), 0) < 0:
                self.kernel.spawn(peer.fail("the frontend's producer index cannot be"))
        for other, peer in list(self.backends.items()):
            if self.c.vifs[other].connected:
                peer.map_missing(self._missing)
        if n and lib.switch_run(self.c, slot) < 0:
            raise DeviceError("the frontend's ring cannot take its answers")
        return bool(n == BATCH or lib.vif_recheck(self.vif(slot)))

    async def _publish(self) -> None:
        for slot, backend in list(self.backends.items()):
            vif = self.vif(slot)
            if vif.connected and not vif.broken and (notify := lib.vif_publish(vif)):
                if notify < 0:
                    await backend.fail("the frontend's receive ring cannot be")
                else:
                    backend.notify()


class NetBackend(Device):
    """One VIF."""

    TABLE = BACKEND

    def __init__(self, switch: Switch, path: str, otherend: str, domid: int, handle: int) -> None:
        super().__init__(switch.kernel, path, otherend, domid)
        self._switch, self.handle = switch, handle
        self._mappings: list[Mapping] = []
        self._kept = 0  # grants of the pools that are mapped
        self._slot = self._row = -1
        self._port = 0
        self._task: Any = None

    # ---- the steps of the table

    async def announce(self) -> None:
        await self.publish_keys({"feature-rx-copy": 1})

    async def connect(self) -> None:
        grants, evtchn = self.kernel.grants, self.kernel.evtchn
        try:
            refs = [await self.other_number(key) for key in ("tx-ring-ref", "rx-ring-ref")]
            channel = await self.other_number("event-channel")
            mac = bytes.fromhex((await self.own("mac")).replace(":", ""))
            ip = await self.own("ip")
            number = int(ipaddress.IPv4Address(ip)) if ip else 0
            rings = [grants.map(self.otherend_id, [ref]) for ref in refs]
            self._mappings += rings
            self._port = evtchn.bind_interdomain(self.otherend_id, channel)
        except (ValueError, GrantError, XenError) as error:
            raise DeviceError(f"the frontend's rings or event channel cannot be used: {error}") from None
        self._slot = slot = self._switch.take_slot(self)
        vif = self._switch.vif(slot)
        lib.vif_attach(vif, ffi.cast("void *", rings[0].address), ffi.cast("void *", rings[1].address), PAGE_SIZE)
        self._row, counters = self._switch.stats.open(self.otherend_id, StatsKind.VIF, self.handle)
        vif.domid, vif.handle, vif.mac, vif.ip = self.otherend_id, self.handle, list(mac), number
        vif.stats = ffi.cast("uint64_t *", counters)
        vif.connected = 1
        self._switch.names[f"{await self.own('domain')}/{self.handle}"] = slot
        self._switch.apply()
        self._task = self.kernel.spawn(self._serve(), name=self.path)

    async def release(self) -> None:
        """Let go of everything before the state says so."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._slot >= 0:
            self._switch.drop_slot(self._slot)
            self._slot = -1
        if self._port:
            self.kernel.evtchn.close(self._port)
            self._port = 0
        for mapping in self._mappings:
            self.kernel.grants.unmap(mapping)
        self._mappings, self._kept = [], 0
        if self._row >= 0:
            self._switch.stats.close(self._row)
            self._row = -1

    async def _serve(self) -> None:
        while True:
            await self.kernel.evtchn.wait(self._port)
            self._switch.kick(self._slot)

    # ---- what the switch asks

    def notify(self) -> None:
        try:
            self.kernel.evtchn.send(self._port)
        except XenError:
            pass  # the frontend is gone; its state will say so

    def map_missing(self, scratch: Any) -> None:
        """Map grants that are named for the first time: frames to send read-only, buffers writable.

        A refused one stays refused, its frames fail; so do those past MAX_KEPT, as in blkback.
        """
        vif = self._switch.vif(self._slot)
        for buffers, table in ((0, vif.readable), (1, vif.writable)):
            n = lib.vif_missing(vif, buffers, scratch, lib.SWITCH_RING)
            grefs = [scratch[i] for i in range(min(n, MAX_KEPT - self._kept))]
            if grefs and not self._keep(table, grefs, readonly=not buffers):
                for gref in grefs:
                    self._keep(table, [gref], readonly=not buffers)

    def _keep(self, table: Any, grefs: list[int], readonly: bool) -> bool:
        try:
            mapping = self.kernel.grants.map(self.otherend_id, grefs, readonly)
        except (GrantError, XenError):
            return False
        self._mappings.append(mapping)
        self._kept += len(grefs)
        for i, gref in enumerate(grefs):
            table[gref] = mapping.address + i * PAGE_SIZE
        return True


async def _follow_rules(kernel: Kernel, switch: Switch) -> None:
    """The firewall as dom0 writes it; text that is no policy leaves the old one and says so."""
    base = f"/local/domain/{kernel.domid}/data"
    watch = await kernel.store.watch(f"{base}/firewall")
    while True:
        await watch.next()
        text = await kernel.store.read_long(f"{base}/firewall")
        if text is None:
            continue
        try:
            switch.set_policy(firewall.parse(text, lib.SWITCH_RULES))
            await kernel.store.write(f"{base}/firewall-error", "")
        except firewall.RuleError as error:
            await kernel.store.write(f"{base}/firewall-error", str(error))


async def _report_hits(kernel: Kernel, switch: Switch) -> None:
    """One line of counters, when dom0 asks."""
    base = f"/local/domain/{kernel.domid}/data"
    watch = await kernel.store.watch(f"{base}/firewall-ask")
    while True:
        await watch.next()
        ask = await kernel.store.get(f"{base}/firewall-ask", "0")  # before what it is answered with
        c = switch.c
        counts = [c.rules[i].hits for i in range(c.nr_rules)]
        rest = [c.default_hits, c.spoofed, c.unknown_destination, c.no_buffer, c.malformed]
        await kernel.store.write_long(f"{base}/firewall-hits", " ".join(map(str, [ask, *rest, *counts])))


async def main(kernel: Kernel) -> None:
    """Serve every VIF that dom0 makes, for ever."""
    stats = await Statistics.publish(kernel)
    switch = Switch(kernel, stats)

    async def begin(path: str, frontend: str, domid: int, handle: int) -> None:
        await NetBackend(switch, path, frontend, domid, handle).run()

    kernel.spawn(_follow_rules(kernel, switch), name="firewall")
    kernel.spawn(_report_hits(kernel, switch), name="firewall hits")
    await kernel.store.write(f"/local/domain/{kernel.domid}/data/ready", 1)
    await serve_nodes(kernel, "vif", begin)
