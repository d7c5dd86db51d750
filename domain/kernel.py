"""A guest kernel: boot on one screen, then programs written as `async def main(kernel)`."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Coroutine
from functools import cached_property, partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from domain import memory, sched
from domain._guest import ffi, lib
from domain.balloon import Balloon
from domain.console import Console
from domain.evtchn import EventChannels
from domain.grant import Grants
from domain.hypercall import Trap
from domain.idle import READABLE, WRITABLE, Idle
from domain.memory import Memory
from domain.sched import Scheduler, Task
from domain.store import Store, StoreClient
from hypervisor.public.boot_tables import boot_tables
from hypervisor.public.console import ConsoleWrite
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.sched import SchedShutdown, SetTimer, ShutdownReason
from hypervisor.public.start_info import StartInfo
from hypervisor.public.types import CONSOLE_BYTES, PAGE_SIZE, VIRQ_TIMER

if TYPE_CHECKING:
    from domain.blkfront import BlockDevice
    from domain.netfront import NetDevice
    from domain.paging import AddressSpace

ARCHIVE = b"07070"  # how a cpio archive begins: an image that is a ramdisk
R = TypeVar("R")
T = TypeVar("T")


def start(address: int) -> NoReturn:
    """The first instruction of a Python guest: boot, run the program, shut down."""
    kernel = Kernel(StartInfo.unpack(memory.read(address, PAGE_SIZE)))
    try:
        kernel.boot()
        main = kernel.load()
    except Exception as error:
        kernel.crash("the kernel cannot start", error)
    kernel.run(main)


class Kernel:
    """What a program gets: this domain's memory, events, grants, devices and time."""

    store: StoreClient
    console: Console

    def __init__(self, info: StartInfo) -> None:
        self.start, self.domid, self.name, self.cmdline = info, info.domid, info.name, info.cmdline
        self._shared_info: Any = ffi.cast("void *", info.window + info.shared_info)
        #: System time: ns since the hypervisor booted. No call: the cycle counter and a record in shared_info. It never falls.
        self.now_ns: Callable[[], int] = partial(lib.system_time, self._shared_info, info.boot_ns, ffi.new("uint64_t *"))
        self.hypercall = Trap(info.request_mqd, info.reply_mqd)
        self.evtchn = EventChannels(self, info.window + info.shared_info)
        p2m = array("Q", memory.read(info.window + info.mfn_list, 8 * info.max_pages))
        tables = boot_tables((info.mfn_list - info.virt_base) // PAGE_SIZE, info.max_pages)
        self.memory = Memory(self.hypercall, info.nr_pages, p2m, tables)
        self.grants = Grants(self, info.window + info.grant_table, info.nr_grant_entries)
        self.scheduler = Scheduler(self.now_ns, self._idle)
        self._look = Idle(self.evtchn, info.upcall_fd)
        self._timer_set = 0

    # ---- boot

    def boot(self) -> None:
        """In the order a kernel needs them."""
        sched.install(self.scheduler)
        self.scheduler.on_error = self._task_failed
        self.evtchn.bind_virq(VIRQ_TIMER)  # time
        if self.start.store_evtchn:
            self.evtchn.adopt(self.start.store_evtchn)
            self.evtchn.adopt(self.start.console_evtchn)
            self._connect()
            self.spawn(self._obey(), name="control")
            if not self.start.entry:  # a driver domain has what its rings and tables need
                self.spawn(Balloon(self).run(), name="balloon")
        sys.meta_path.insert(0, _NotPreloaded())  # no file can be opened any more

    def _connect(self) -> None:
        """The two rings that the builder set up: store and console."""
        self.store = Store(self)
        self.console = Console(self)
        sys.stdout = sys.stderr = self.console.stream()

    async def _obey(self) -> None:
        """The toolstack asks this domain to end by writing control/shutdown."""
        watch = await self.store.watch("control/shutdown")
        while not await self.store.get("control/shutdown"):
            await watch.next()
        raise SystemExit(0)

    def load(self) -> Any:
        """The program's main: of the driver domain's module, of the delivered image, or, for a ramdisk, the POSIX kernel's."""
        if self.start.entry:
            return importlib.import_module(self.start.entry).main
        source = memory.read(self.start.window + self.start.mod_start, self.start.mod_len)
        if source.startswith(ARCHIVE):
            return importlib.import_module("domain.posix.main").main
        module = ModuleType("__guest__")
        sys.modules["__guest__"] = module
        try:
            exec(compile(source, f"<{self.name}>", "exec"), module.__dict__)
            return module.main
        except BaseException as error:
            self.crash("the kernel image cannot be started", error)

    def run(self, main: Any) -> NoReturn:
        """The program's life: its value is the exit code."""
        task = self.spawn(main(self), name="main")
        try:
            value = self.scheduler.run(task)
        except SystemExit as stop:
            self.scheduler.current = None
            value = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException as error:
            self.crash("main failed", error)
        self.shutdown(ShutdownReason.POWEROFF, value if isinstance(value, int) else 0)

    def shutdown(self, reason: ShutdownReason = ShutdownReason.POWEROFF, code: int = 0, why: str = "") -> NoReturn:
        """End this domain; what the console has not taken yet is given up to 2 s."""
        self._flush_console()
        self.hypercall(SchedShutdown(int(reason), code & 0xFF, why.encode()[:CONSOLE_BYTES].decode(errors="ignore")))
        raise AssertionError("shutdown returned")

    def _flush_console(self) -> None:
        if getattr(self, "console", None) is None or self.scheduler.current is not None:
            return
        try:
            self.scheduler.run(self.spawn(sched.timeout(2.0, self.console.drained())))
        except Exception:
            pass  # whoever reads it is gone: the end goes on

    def crash(self, what: str, error: BaseException) -> NoReturn:
        text = "".join(traceback.format_exception(error))
        for line in text.splitlines()[-8:]:
            self.hypercall(ConsoleWrite(line.encode()[:CONSOLE_BYTES]))
        if getattr(self, "console", None) is not None:
            self.console.write(text)
        self.scheduler.current = None
        self.shutdown(ShutdownReason.CRASH, 1, f"{what}: {type(error).__name__}: {error}")

    def _task_failed(self, task: Task[Any], error: BaseException) -> None:
        if task.name != "main":
            self.crash(f"task {task.name} failed", error)

    # ---- what programs use

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str = "") -> Task[T]:
        """A kernel thread."""
        return self.scheduler.spawn(coroutine, name)

    def call(self, request: Hypercall[R]) -> R:
        """A hypercall, for what the library does not cover."""
        return self.hypercall(request)

    def wall_ns(self) -> int:
        """Wall-clock time: Unix time in ns, as dom0 set it."""
        return int(lib.wall_base(self._shared_info)) + self.now_ns()

    def virtual_ns(self) -> int:
        """Virtual time: ns that this domain has run."""
        return time.clock_gettime_ns(time.CLOCK_PROCESS_CPUTIME_ID)

    async def sleep(self, seconds: float) -> None:
        await sched.sleep(seconds)

    @cached_property
    def space(self) -> AddressSpace:
        """The address space that it runs in. Who asks for it first also registers the handler of page faults."""
        from domain.paging import Paging

        return Paging(self).boot

    async def block(self, name: str = "xvda") -> BlockDevice:
        """The virtual disk of that name, connected."""
        from domain.blkfront import BlockDevice

        return await BlockDevice.open(self, name)

    async def net(self, name: str = "eth0") -> NetDevice:
        """The virtual interface of that name, connected."""
        from domain.netfront import NetDevice

        return await NetDevice.open(self, name)

    async def readable(self, fd: int) -> None:
        """Until `fd` can be read: for dom0 and driver domains, which have descriptors."""
        await self._look.ready(fd, READABLE)

    async def writable(self, fd: int) -> None:
        await self._look.ready(fd, WRITABLE)

    # ---- idle: SCHEDOP_block

    def _idle(self, timeout: float) -> None:
        """Look, then sleep until an upcall, a descriptor or the timer. `timeout` in seconds, -1 for ever."""
        if timeout > 0:
            if self._look(False):
                return
            self._arm(timeout)
        self._look(timeout != 0)

    def _arm(self, timeout: float) -> None:
        """One hypercall, unless the timer is set to fire by then."""
        now = self.now_ns()
        deadline = now + int(timeout * 1e9)
        if not now < self._timer_set <= deadline:
            self._timer_set = deadline
            self.hypercall(SetTimer(deadline))


class _NotPreloaded:
    """The last word on imports in a locked domain."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        raise ImportError(f"{name} is not preloaded, and a locked domain opens no file (the list: hypervisor/zygote.py)")
