"""yield, block, shutdown, and the one-shot timer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hypervisor import evtchn, lifecycle
from hypervisor._hv import lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.loop import Resume, Steps
from hypervisor.public import sched as abi
from hypervisor.public.errors import Invalid
from hypervisor.public.sched import ShutdownReason
from hypervisor.public.types import VIRQ_TIMER

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor


@hypercall(abi.SchedYield)
def yield_cpu(hv: Hypervisor, caller: Domain, call: abi.SchedYield) -> Steps:
    yield hv.loop.turn


@hypercall(abi.SchedBlock)
def block(hv: Hypervisor, caller: Domain, call: abi.SchedBlock) -> Steps:
    lib.upcall_unblock(caller.evt)

    def wait(resume: Resume) -> None:
        caller.blocked = resume  # before the look: an event in between finds it

    if not lib.upcall_is_pending(caller.evt):
        yield wait


@hypercall(abi.SchedShutdown)
def shutdown(hv: Hypervisor, caller: Domain, call: abi.SchedShutdown) -> None:
    if call.reason not in ShutdownReason.__members__.values():
        raise Invalid(f"no shutdown reason {call.reason}")

    reason = ShutdownReason(call.reason)
    caller.exit_code = call.code & 0xFF
    what = "crash" if reason == ShutdownReason.CRASH else reason.name.lower()
    why = "".join(c if c.isprintable() else " " for c in call.why)
    if caller.privileged:
        hv.stop(f"dom0: {what}")
    else:
        lifecycle.end(hv, caller, f"{what}: {why}" if why else what)


@hypercall(abi.SetTimer)
def set_timer(hv: Hypervisor, caller: Domain, call: abi.SetTimer) -> None:
    if caller.timer is not None:
        caller.timer.cancel()
        caller.timer = None
    if call.deadline_ns:
        deadline = min(hv.boot_ns + call.deadline_ns, time.monotonic_ns() + (1 << 50))
        caller.timer = hv.loop.at(deadline, lambda: evtchn.raise_virq(hv, caller, VIRQ_TIMER))
