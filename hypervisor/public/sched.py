"""Scheduling operations and the one-shot timer. Source: xen/include/public/sched.h, vcpu.h."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

from hypervisor.public.hypercall import OP_SCHED, OP_SET_TIMER, Hypercall
from hypervisor.public.types import CONSOLE_BYTES, U32, U64, Text


class ShutdownReason(IntEnum):
    """Why a domain ends (SHUTDOWN_*)."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4


class SchedYield(Hypercall[None]):
    """Give up the CPU for now."""

    OP, CMD = OP_SCHED, 0


class SchedBlock(Hypercall[None]):
    """Unmask upcalls and wait until one is pending; the reply comes then. With one pending it comes at once."""

    OP, CMD = OP_SCHED, 1


class SchedShutdown(Hypercall[None]):
    """End this domain. `code` is the guest's exit code (0..255), `why` one sentence kept for CRASH. No reply follows.

    Raises Invalid (unknown reason).
    """

    OP, CMD = OP_SCHED, 2
    reason: U32
    code: U32
    why: Annotated[str, Text(CONSOLE_BYTES)]


class SchedPoll(Hypercall[None]):
    """Wait until one of the `count` ports listed at `address` (u32 each) is pending, masked or not, or until system time
    `timeout_ns` (0: for ever). Upcalls are neither needed nor unmasked.

    Raises BadAddress, Invalid (a port that is closed), TooBig (more than 128).
    """

    OP, CMD = OP_SCHED, 3
    address: U64
    count: U32
    timeout_ns: U64


class SetTimer(Hypercall[None]):
    """VIRQ_TIMER at system time `deadline_ns` (ns since the hypervisor booted); 0 cancels; the past fires at once."""

    OP = OP_SET_TIMER
    deadline_ns: U64
