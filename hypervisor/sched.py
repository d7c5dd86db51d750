"""yield, block, shutdown, and the one-shot timer."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypervisor import console, evtchn, guest_access, lifecycle
from hypervisor._hv import lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.loop import Resume, Steps, Timer
from hypervisor.public import sched as abi
from hypervisor.public.errors import Invalid, TooBig
from hypervisor.public.sched import ShutdownReason
from hypervisor.public.types import VIRQ_TIMER

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

MAX_POLL = 128  # ports that one poll waits for


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


@hypercall(abi.SchedPoll)
def poll(hv: Hypervisor, caller: Domain, call: abi.SchedPoll) -> Steps:
    if call.count > MAX_POLL:
        raise TooBig(f"{call.count} ports, at most {MAX_POLL}")
    ports = struct.unpack(f"<{call.count}I", guest_access.copy_in(hv, caller, call.address, 4 * call.count))
    if not all(port in caller.ports for port in ports):
        raise Invalid("a closed port")

    timer: Timer | None = None

    def wait(resume: Resume) -> None:
        nonlocal timer
        evtchn.poll_begins(caller, resume, ports)
        if call.timeout_ns:
            timer = hv.loop.at(hv.boot_ns + call.timeout_ns, lambda: evtchn.poll_ends(caller))

    if not any(lib.evtchn_is_pending(caller.evt, port) for port in ports):
        yield wait
    if timer is not None:
        timer.cancel()


@hypercall(abi.SchedShutdown)
def shutdown(hv: Hypervisor, caller: Domain, call: abi.SchedShutdown) -> None:
    if call.reason not in ShutdownReason.__members__.values():
        raise Invalid(f"no shutdown reason {call.reason}")

    reason = ShutdownReason(call.reason)
    caller.exit_code = call.code & 0xFF
    what = "crash" if reason == ShutdownReason.CRASH else reason.name.lower()
    why = console.escape(call.why.encode())
    if caller.privileged:
        hv.stop(f"dom0: {what}")
    else:
        lifecycle.end(hv, caller, f"{what}: {why}" if why else what)


@hypercall(abi.SetTimer)
def set_timer(hv: Hypervisor, caller: Domain, call: abi.SetTimer) -> None:
    caller.stop_timer("once")
    if call.deadline_ns:
        due = hv.boot_ns + call.deadline_ns
        caller.timers["once"] = hv.loop.at(due, lambda: evtchn.raise_virq(hv, caller, VIRQ_TIMER))
