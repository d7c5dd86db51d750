"""The toolstack: domains from their configuration to their end, seen from dom0.

A domain's end is told by VIRQ_DOM_EXC; what dom0 held for it (store connection, console, devices, the hypervisor's record)
is taken away then, whoever ended it and why. The last ones that ended stay in the list, with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from dom0 import builder, cpus
from dom0.builder import BuildError, Built, Image
from dom0.config import DomainConfig
from dom0.consoles import ConsoleServer
from dom0.devices import Device, DeviceRefused, Devices
from dom0.drivers import Drivers
from dom0.store import Store
from dom0.storeserver import LocalStore, StoreServer
from domain import memory
from domain.sched import Event, TimeoutExpired, timeout
from hypervisor.public.console import ConsoleWrite
from hypervisor.public.domctl import (
    CreateFlags,
    DestroyDomain,
    DomainInfo,
    PauseDomain,
    UnpauseDomain,
)
from hypervisor.public.errors import NoSuchDomain, XenError
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.sysctl import GetDomainInfoList, PhysInfo
from hypervisor.public.types import CONSOLE_BYTES, PAGE_SIZE, VIRQ_DOM_EXC

if TYPE_CHECKING:
    from domain.kernel import Kernel

KEEP_ENDED = 32  # domains that ended stay listed, this many
ANSWER_PAGES = 64  # room for the answer of a sysctl
ENDED = ("dead",)


class ToolstackError(Exception):
    """What was asked cannot be done: one sentence. `exit_code` is the command's."""

    def __init__(self, why: str, exit_code: int = 1) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class Guest:
    """A domain as dom0 knows it; `info` is the hypervisor's last word on it."""

    def __init__(self, name: str, built: Built, config: DomainConfig | None, static_max: int) -> None:
        self.name, self.domid, self.built, self.config = name, built.domid, built, config
        self.static_max = static_max  # frames that its page tables have room for
        self.store: StoreServer
        self.console: ConsoleServer
        self.info: DomainInfo | None = None
        self.trouble = ""  # the first device or connection of it that was closed, and why
        self.ended = Event()  # it runs no more
        self.buried = Event()  # and nothing of it is left: its disks can be attached again


class Toolstack:
    def __init__(self, kernel: Kernel, state: Path) -> None:
        self.kernel, self.state = kernel, state
        self.tree = Store()
        kernel.store = LocalStore(self.tree)
        self.devices = Devices(kernel)
        self.guests: dict[int, Guest] = {}  # by domid, the ended ones too, in order of creation
        self.drivers = Drivers(self)
        self._answer = kernel.memory.alloc(ANSWER_PAGES)
        (state / "console").mkdir(mode=0o700, exist_ok=True)

    async def start(self) -> None:
        """Driver domains up, deaths watched."""
        port = self.kernel.evtchn.bind_virq(VIRQ_DOM_EXC)
        self.kernel.spawn(self._watch_deaths(port), name="deaths")
        await self.kernel.store.write("/local/domain/0/name", "Domain-0")
        await self.drivers.start()

    # ---- asking the hypervisor

    def ask(self, call: type[Hypercall[int]]) -> Any:
        """A sysctl that answers msgpack into memory."""
        length = self.kernel.call(call(self._answer.va, ANSWER_PAGES * PAGE_SIZE))
        return msgpack.unpackb(memory.read(self._answer.address, length))

    def ask_text(self, call: type[Hypercall[int]]) -> str:
        length = self.kernel.call(call(self._answer.va, ANSWER_PAGES * PAGE_SIZE))
        return memory.read(self._answer.address, length).decode()

    def infos(self) -> list[DomainInfo]:
        """Every domain the hypervisor has a record of."""
        return [DomainInfo(*row) for row in self.ask(GetDomainInfoList)]

    def log(self, line: str) -> None:
        """Into the hypervisor's log, `ring1 dmesg`."""
        self.kernel.call(ConsoleWrite(line.encode()[:CONSOLE_BYTES]))

    def report(self, guest: Guest, why: str) -> None:
        """What was closed on a domain: in the list, and in the log."""
        guest.trouble = guest.trouble or why
        self.log(f"{guest.name}: {why}")

    # ---- finding

    def find(self, name: str, alive: bool = True) -> Guest:
        """By name or number. Raises ToolstackError with exit code 4."""
        for guest in reversed(self.guests.values()):
            if name in (guest.name, str(guest.domid)) and not (alive and guest.ended.is_set):
                return guest
        known = ", ".join(g.name for g in self.guests.values() if not g.ended.is_set)
        raise ToolstackError(f"no domain {name}; there are: {known or 'none'}", exit_code=4)

    def rows(self) -> list[dict[str, Any]]:
        """What `list` shows, the ended ones last."""
        living = {info.domid: info for info in self.infos()}
        rows = []
        for domid, info in living.items():
            guest = self.guests.get(domid)
            if guest is None or not guest.ended.is_set:
                rows.append(row(info, guest.trouble if guest else ""))
        for guest in self.guests.values():
            if guest.ended.is_set and guest.info is not None:
                rows.append(row(guest.info, guest.trouble))
        return rows

    # ---- creating

    async def create(self, config: DomainConfig, paused: bool = False, flags: CreateFlags = CreateFlags.NONE) -> Guest:
        """Build, connect, attach, let run. Raises ToolstackError, with nothing of it left."""
        if any(g.name == config.name and not g.ended.is_set for g in self.guests.values()):
            raise ToolstackError(f"a domain named {config.name} runs already")
        for predecessor in [g for g in self.guests.values() if g.name == config.name]:
            await predecessor.buried.wait()
        flags |= CreateFlags.DEBUG if config.debug else CreateFlags.NONE
        try:
            image = builder.read_image(Path(config.kernel))
            frames, most = ((mib << 20) // PAGE_SIZE for mib in (config.memory, config.maxmem or config.memory))
            if most > frames and most > (total := self.ask(PhysInfo)["frames_total"]):
                raise BuildError(f"{config.name}: {most} frames at most, and the whole machine has {total}; lower `maxmem`")
            guest = await self.introduce(config.name, image, frames, config.cmdline, flags, config=config, max_frames=most)
        except BuildError as error:
            raise ToolstackError(str(error)) from None
        try:
            block, network = self.drivers["blkback"], self.drivers["netback"]
            for disk in config.disk:
                await self.devices.attach_vbd(guest.domid, disk, block.domid, block.descriptors)
            for index, vif in enumerate(config.vif):
                await self.devices.attach_vif(guest.domid, config.name, index, vif, network.domid)
            cpus.set_params(self.kernel, guest.domid, {"weight": config.weight, "cap": config.cap})
            if not paused:
                self.kernel.call(UnpauseDomain(guest.domid))
        except Exception as error:
            await self.destroy(guest)
            if isinstance(error, (DeviceRefused, XenError)):
                raise ToolstackError(f"{config.name}: {error}") from None
            raise
        return guest

    async def introduce(
        self, name: str, image: Image, frames: int, cmdline: str = "", flags: CreateFlags = CreateFlags.NONE,
        descriptor: int = -1, config: DomainConfig | None = None, max_frames: int = 0,
    ) -> Guest:  # fmt: skip
        """Build a domain and connect it to the store and its console; paused. Raises BuildError."""
        kernel = self.kernel
        built = builder.build(kernel, name, image, frames, cmdline, flags, descriptor, max_frames)
        guest = Guest(name, built, config, max(frames, max_frames))

        def report(why: str) -> None:
            self.report(guest, why)

        self.guests.pop(built.domid, None)
        self.guests[built.domid] = guest
        await self._make_home(guest, frames)
        console_page, store_page = built.pages.address, built.pages.address + PAGE_SIZE
        log = self.state / "console" / f"{name}.log"
        guest.console = ConsoleServer(kernel, console_page, built.console_port, log, report)
        guest.store = StoreServer(kernel, self.tree, built.domid, store_page, built.store_port, report)
        self._forget_ended()
        return guest

    async def _make_home(self, guest: Guest, frames: int) -> None:
        """/local/domain/N: the domain reads it, and writes below data, control and its devices, and memory/current."""
        store, domid, home = self.kernel.store, guest.domid, f"/local/domain/{guest.domid}"
        await store.mkdir(home)
        await store.set_perms(home, ["n0", f"r{domid}"])
        await store.write(f"{home}/name", guest.name)
        await store.write(f"{home}/domid", domid)
        for below in ("data", "control", "backend"):
            await store.mkdir(f"{home}/{below}")
            await store.set_perms(f"{home}/{below}", [f"n{domid}"])
        for key, pages in (("static-max", guest.static_max), ("target", frames), ("current", frames)):
            await store.write(f"{home}/memory/{key}", pages * PAGE_SIZE >> 10)
        await store.set_perms(f"{home}/memory/current", [f"n{domid}"])
        if guest.config and guest.config.fast_syscalls:
            await store.write(f"{home}/fast-syscalls", 1)

    def _forget_ended(self) -> None:
        ended = [domid for domid, guest in self.guests.items() if guest.ended.is_set]
        for domid in ended[:-KEEP_ENDED]:
            del self.guests[domid]

    # ---- stopping

    async def shutdown(self, guest: Guest, seconds: float) -> None:
        """Ask it to end, and wait. Raises ToolstackError where it does not."""
        await self.kernel.store.write(f"/local/domain/{guest.domid}/control/shutdown", "poweroff")
        try:
            await timeout(seconds, guest.ended.wait())
        except TimeoutExpired:
            raise ToolstackError(f"{guest.name} did not shut down within {seconds:g} s; destroy ends it") from None
        await guest.buried.wait()

    async def destroy(self, guest: Guest) -> None:
        """End it now; returns when nothing of it is left."""
        if not guest.ended.is_set:
            try:
                self.kernel.call(DestroyDomain(guest.domid))
            except NoSuchDomain:
                pass
            await self._bury(guest, None)
        await guest.buried.wait()

    def pause(self, guest: Guest) -> None:
        """Raises ToolstackError."""
        self._state_call(guest, PauseDomain(guest.domid))

    def unpause(self, guest: Guest) -> None:
        """Raises ToolstackError."""
        self._state_call(guest, UnpauseDomain(guest.domid))

    def _state_call(self, guest: Guest, call: Hypercall[None]) -> None:
        try:
            self.kernel.call(call)
        except XenError:
            state = next((info.state for info in self.infos() if info.domid == guest.domid), "dead")
            raise ToolstackError(f"{guest.name} is {state}") from None

    # ---- ends

    async def _watch_deaths(self, port: int) -> None:
        while True:
            await self.kernel.evtchn.wait(port)
            for info in self.infos():
                guest = self.guests.get(info.domid)
                if info.state in ENDED and guest is not None and not guest.ended.is_set:
                    self.kernel.spawn(self._bury(guest, info), name=f"burial of {guest.name}")  # none waits for another

    async def _bury(self, guest: Guest, info: DomainInfo | None) -> None:
        """Take back what dom0 held for it. `info`: None where it was destroyed by us, its record gone."""
        if guest.ended.is_set:
            return
        last = guest.info
        if info is None:
            info = last._replace(state="dead", reason="destroyed", pid=0, monitor_pid=0, frames=0) if last else None
            info = info or DomainInfo(guest.domid, guest.name, "dead", "destroyed", -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        guest.info = info
        guest.console.close()
        guest.store.close()
        guest.ended.set()
        kernel = self.kernel
        kernel.evtchn.close(guest.built.console_port)
        kernel.evtchn.close(guest.built.store_port)
        kernel.grants.unmap(guest.built.pages)
        for task in [kernel.spawn(self._take_away(guest, device)) for device in self.devices.of(guest.domid)]:
            await task
        await kernel.store.rm(f"/local/domain/{guest.domid}")
        try:
            kernel.call(DestroyDomain(guest.domid))
        except NoSuchDomain:
            pass
        await self.drivers.ended(guest)
        guest.buried.set()

    async def _take_away(self, guest: Guest, device: Device) -> None:
        """A device of a domain that ended; where that was the backend's, there is nobody to wait for."""
        if device.backend == guest.domid:
            await self.devices.forget(device)
        else:
            await self.devices.detach(device)


def row(info: DomainInfo, trouble: str) -> dict[str, Any]:
    """One domain as `list --json` gives it."""
    return {
        "name": info.name,
        "domid": info.domid,
        "state": info.state,
        "memory_kib": info.frames * PAGE_SIZE >> 10,
        "maxmem_kib": info.max_frames * PAGE_SIZE >> 10,
        "cpu_s": round(info.cpu_ns / 1e9, 3),
        "pid": info.pid,
        "reason": info.reason or trouble,
        "isolated": not info.flags & (CreateFlags.DEBUG | CreateFlags.UNFILTERED),
    }
