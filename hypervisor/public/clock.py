"""Time. Source: xen/include/public/xen.h (vcpu_time_info), vcpu.h, platform.h; SOSP'03 section 3.3.2.

A domain has real time (system time: ns since the hypervisor booted), virtual time (ns that it has run) and wall-clock time
(an offset on real time: changing it never moves real time).

    vcpu_time_info   shared_info + 32:   u32 version, u64 @8 tsc_timestamp, u64 @16 system_time, u32 @24 mul, s8 @28 shift,
                                         u8 @29 flags (1: the record holds on every CPU)
    wall clock       shared_info + 3072: u32 version, u32 sec, u32 nsec, u32 sec_hi: Unix time of system time 0

A version is odd while its record is written: a reader takes the version, the fields, the version again, and begins anew if
they differ or are odd. system time = system_time + ((((tsc - tsc_timestamp) << shift) * mul) >> 32); a negative shift goes
to the right. The record is written again twice a second. Where flag 1 is not set, the cycle counter is no clock on this host:
CLOCK_MONOTONIC, less start_info's boot_ns, is system time.

Timers fire as VIRQ_TIMER, never early. Virtual time is the CPU clock of the domain's process (CLOCK_PROCESS_CPUTIME_ID in it).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from hypervisor.public.hypercall import OP_PLATFORM, OP_VCPU, Hypercall
from hypervisor.public.types import U32, U64

TIME_STABLE = 1
MIN_PERIOD_NS = 1_000_000


class RunState(IntEnum):
    """What a domain is at (RUNSTATE_*)."""

    RUNNING = 0
    RUNNABLE = 1  # it wants to run and somebody else does: stolen time
    BLOCKED = 2
    OFFLINE = 3  # paused, or not launched yet


class RunStateInfo(NamedTuple):
    """Where the time of a domain went, in ns; the four add up to system time since its launch."""

    state: int  # RunState now
    running: int
    runnable: int
    blocked: int
    offline: int


class GetRunState(Hypercall[RunStateInfo]):
    """VCPUOP_get_runstate_info of the caller. Costs some 15 us: the host's own accounts are asked."""

    OP, CMD = OP_VCPU, 4

    @classmethod
    def result(cls, values: list[Any]) -> RunStateInfo:
        return RunStateInfo(*values)


class SetPeriodicTimer(Hypercall[None]):
    """VIRQ_TIMER every `period_ns` from now on, beside the one-shot timer. Raises Invalid (below 1 ms)."""

    OP, CMD = OP_VCPU, 6
    period_ns: U64


class StopPeriodicTimer(Hypercall[None]):
    """Whether there was one or not."""

    OP, CMD = OP_VCPU, 7


class SetVirtualTimer(Hypercall[None]):
    """VIRQ_TIMER when the caller's virtual time reaches `deadline_ns`; 0 cancels; the past fires at once. Late by at most 1 ms
    of its running."""

    OP, CMD = OP_VCPU, 1000
    deadline_ns: U64


class SetTime(Hypercall[None]):
    """XENPF_settime64: Unix time `sec`.`nsec` is that of system time `system_time`; every domain's wall clock follows.

    Raises Invalid (nsec is no part of a second; a time before system time 0).
    """

    OP, CMD, PRIVILEGED = OP_PLATFORM, 62, True
    sec: U64
    nsec: U32
    system_time: U64
