"""The kernel of a domain whose image is a ramdisk: `main` is what domain/kernel.py runs.

    cmdline      the first program and its arguments, quoted as a shell would have them
    fast-syscalls in the store: call sites are patched (sites.py)
    mod_start    the archive, in frames that the programs get once it is unpacked
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

from domain._guest import ffi
from domain.memory import Pages
from domain.posix import boot
from domain.posix.frames import Frames
from domain.posix.run import System
from domain.posix.termios import ECHO, OPOST
from domain.posix.tty import Tty
from domain.posix.userspace import UserSpace
from domain.posix.vdso import Vdso
from hypervisor.public.layout import KERNEL_PFN, KERNEL_WINDOW, SHARED_INFO_PFN, VIRT_BASE
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

SIGNALLED = 128
HIGH_WATER = 16 << 10  # bytes that wait for whoever reads the console, before programs wait too


async def main(kernel: Kernel) -> int:
    """Boot, run the first program; its exit code, 128 + N for one that signal N ended."""
    fast = bool(await kernel.store.get("fast-syscalls"))
    system = System(kernel, Frames(kernel.memory, KERNEL_WINDOW + VIRT_BASE), lambda: UserSpace(kernel), fast)
    system.vdso = Vdso(system.cache, SHARED_INFO_PFN)
    try:
        arguments = [os.fsencode(word) for word in shlex.split(kernel.cmdline)] or [b"/bin/sh"]
        context = boot.mount(system, _archive(kernel))
        _release_archive(kernel)
        console = Output(kernel, system, context)
        init = boot.first(system, context, arguments)
    except (boot.BootError, ValueError, MemoryError) as error:
        kernel.console.write(f"ring1: {error}\n")
        return SIGNALLED - 1
    kernel.spawn(_type(kernel, console.tty), name="typing")
    status = await system.run(init)
    await kernel.console.drained()
    return SIGNALLED + (status & 0x7F) if status & 0x7F else status >> 8


def _archive(kernel: Kernel) -> memoryview:
    start = kernel.start
    return memoryview(ffi.buffer(ffi.cast("char *", start.window + start.mod_start), start.mod_len)).toreadonly()


def _release_archive(kernel: Kernel) -> None:
    """Its pages are free: every byte of it has been copied."""
    pages = -(-kernel.start.mod_len // PAGE_SIZE)
    kernel.memory.free(Pages(KERNEL_PFN, pages, KERNEL_WINDOW + VIRT_BASE + KERNEL_PFN * PAGE_SIZE))


class Output:
    """The console as a terminal. Lines are edited and ended by the terminal outside, so this one does neither; and programs
    write no faster than somebody reads."""

    def __init__(self, kernel: Kernel, system: System, context: Any) -> None:
        self._kernel, self._waiting, self._held = kernel, 0, False
        self.tty: Tty = boot.attach(system, context, self.write)
        self.tty.termios.lflag &= ~ECHO
        self.tty.termios.oflag &= ~OPOST

    def write(self, data: bytes) -> None:
        console = self._kernel.console
        console.write(bytes(data))
        if console.waiting > HIGH_WATER and not self._held:
            self._held = self.tty.stopped = True
            self._kernel.spawn(self._drain(), name="console drain")

    async def _drain(self) -> None:
        await self._kernel.console.drained()
        self._held = False
        self.tty.go_on()


async def _type(kernel: Kernel, tty: Tty) -> None:
    """What is typed goes to the programs."""
    while True:
        tty.input(await kernel.console.read())
