"""What dom0 says of the CPUs: who gets how much of them (`ring1 sched`), and where each domain is (`ring1 vcpu-list`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypervisor.public.clock import RunState
from hypervisor.public.domctl import GetVcpuInfo
from hypervisor.public.errors import Invalid
from hypervisor.public.scheduler import SchedulerCommand, SchedulerOp, SchedulerParams

if TYPE_CHECKING:
    from domain.kernel import Kernel

MAX_U32 = (1 << 32) - 1


def params(kernel: Kernel, domid: int) -> SchedulerParams:
    """What holds for a domain. Raises XenError (it is ending)."""
    return kernel.call(SchedulerOp(domid, int(SchedulerCommand.GETINFO), 0, 0, 0, 0, 0))


def set_params(kernel: Kernel, domid: int, changes: dict[str, int]) -> SchedulerParams:
    """Set those that are named, and leave the others. Raises XenError (Invalid: one is out of its range)."""
    if set(changes) - set(SchedulerParams._fields) or any(not 0 <= value <= MAX_U32 for value in changes.values()):
        raise Invalid("no such parameter, or no such value")
    wanted = params(kernel, domid)._replace(**changes)
    return kernel.call(SchedulerOp(domid, int(SchedulerCommand.PUTINFO), *wanted))


def vcpu(kernel: Kernel, domid: int) -> dict[str, Any]:
    """A domain's one virtual CPU; times in seconds. Raises XenError (it is ending)."""
    info = kernel.call(GetVcpuInfo(domid))
    times = {f"{name}_s": round(getattr(info, name) / 1e9, 3) for name in ("running", "runnable", "blocked", "offline")}
    return {
        "vcpu": 0, "cpu": info.cpu, "state": RunState(info.state).name.lower(), "scheduled": info.scheduled,
        "affinity": "all" if info.pinned < 0 else str(info.pinned), **times,
    }  # fmt: skip
