"""The CPU scheduler's parameters. Source: xen/include/public/domctl.h (scheduler_op); SOSP'03 section 3.3.1 (BVT).

What they mean is in hypervisor/bvt.py: a weight beside those of the others, a cap in percent of one CPU, and how far a domain
that was woken is preferred (warp), for how long at most, and how long it must then wait for the next time.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from hypervisor.public.hypercall import OP_DOMCTL, Hypercall
from hypervisor.public.types import U16, U32

MAX_WEIGHT = 65_535
MAX_CAP = 100
MAX_WARP_US = 1_000_000


class SchedulerCommand(IntEnum):
    """XEN_DOMCTL_SCHEDOP_*."""

    PUTINFO = 0
    GETINFO = 1


class SchedulerParams(NamedTuple):
    """Times in microseconds."""

    weight: int  # 256 at start
    cap: int  # percent of one CPU; 0: none
    warp_us: int
    warp_limit_us: int  # 0: none
    unwarp_us: int


class SchedulerOp(Hypercall[SchedulerParams]):
    """Set (PUTINFO) or ask for (GETINFO: the fields behind `cmd` are not looked at) a domain's parameters; returns what holds.

    dom0 and driver domains are scheduled while they have a cap. Raises NoSuchDomain, Invalid (dead; command; weight 0 or above
    MAX_WEIGHT, cap above MAX_CAP, a time above MAX_WARP_US).
    """

    OP, CMD, PRIVILEGED = OP_DOMCTL, 16, True
    domid: U16
    cmd: U32
    weight: U32
    cap: U32
    warp_us: U32
    warp_limit_us: U32
    unwarp_us: U32

    @classmethod
    def result(cls, values: list[Any]) -> SchedulerParams:
        return SchedulerParams(*values)
