"""Runs a program in the POSIX kernel over the stand-in: its output and its wait status."""

from __future__ import annotations

import io
import select
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dom0 import ramdisk
from domain import sched
from domain.posix import boot
from domain.posix.frames import Frames
from domain.posix.run import System
from domain.posix.vdso import Vdso
from hypervisor._hv import ffi as hv
from hypervisor.clock import LEAST_BASELINE_NS, Clock
from hypervisor.domain import Domain
from hypervisor.loop import Loop
from hypervisor.public.domctl import CreateFlags
from tests.domain.posix.traced import Machine, Traced

BUSYBOX = "/bin/busybox"


def archive(folder: Path | None = None) -> bytes:
    """busybox and its applets, and what is in `folder`."""
    out = io.BytesIO()
    ramdisk.build(out, folder, Path(BUSYBOX))
    return out.getvalue()


def _idle(timeout: float) -> None:
    """Nothing comes from outside: only timers wake a scheduler here."""
    select.select([], [], [], timeout if timeout > 0 else 0.01)


class Result(SimpleNamespace):
    output: bytes
    status: int
    system: Any


def time_record(address: int) -> None:
    """As the hypervisor writes it: CLOCK_MONOTONIC is system time here."""
    domain = Domain(1, "guest", CreateFlags.NONE)
    domain.evt.shared_info = hv.cast("void *", address)
    clock = Clock(Loop(), 0)
    end = time.monotonic_ns() + LEAST_BASELINE_NS
    while time.monotonic_ns() < end:
        pass
    clock.tell(domain)


def run(
    arguments: list[str], disk: bytes, pages: int = 16384, seconds: float = 20.0, keys: bytes = b"", clock: bool = False,
    fast: bool = False,
) -> Result:  # fmt: skip
    """`clock`: programs have the vDSO. `fast`: their system calls are patched."""
    machine = Machine(pages)
    spaces: list[Traced] = []
    output = bytearray()

    def new_space() -> Traced:
        spaces.append(Traced(machine))
        return spaces[-1]

    scheduler = sched.Scheduler(time.monotonic_ns, lambda timeout: None if timeout == 0 else _idle(timeout))
    sched.install(scheduler)
    kernel: Any = SimpleNamespace(
        now_ns=time.monotonic_ns, wall_ns=time.time_ns, scheduler=scheduler, name="guest",
        evtchn=SimpleNamespace(pending=lambda: False), console=SimpleNamespace(write=lambda text: output.extend(text.encode())),
    )  # fmt: skip
    try:
        system = System(kernel, Frames(machine, machine.base), new_space, fast)
        if clock:
            record = machine.alloc()
            time_record(record.address)
            system.vdso = Vdso(system.cache, record.pfn)
        context = boot.mount(system, disk)
        tty = boot.attach(system, context, output.extend)
        init = boot.first(system, context, [argument.encode() for argument in arguments])
        if keys:
            tty.input(keys)
        status = scheduler.run(scheduler.spawn(sched.timeout(seconds, system.run(init))))
    finally:
        sched._schedulers.remove(scheduler)
        for space in spaces:
            space.destroy()
    return Result(output=bytes(output), status=status, system=system)
