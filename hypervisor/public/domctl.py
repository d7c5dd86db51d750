"""What dom0 may do to a domain. Every call is PRIVILEGED. Source: xen/include/public/domctl.h.

    dom0                                      hypervisor
    CreateDomain ---------------------------> frames, queues, process, monitor; replies when all are there
    GetMemList                                which frames
    MapForeign .. write image and tables .. UnmapForeign
    MmuextOp PIN_L3, for the domain --------> validates them
    LaunchInfo -----------------------------> loads the root into window 0
    UnpauseDomain --------------------------> "go": from here on dom0 can map nothing of it
"""

from __future__ import annotations

from enum import IntFlag
from typing import Annotated, Any, NamedTuple

from hypervisor.public.hypercall import OP_DOMCTL, Hypercall
from hypervisor.public.types import NAME_BYTES, U16, U32, U64, Text


class CreateFlags(IntFlag):
    """What a domain is created as."""

    NONE = 0
    NATIVE = 1  # a freestanding kernel: entered by a jump
    DRIVER = 2  # exec'ed, not forked; receives descriptors from dom0; file I/O in its filter
    DEBUG = 4  # inspectable: dumpable, shown as "not isolated"
    UNFILTERED = 8  # a seeded hole for the self-test: no system-call filter


class DomainInfo(NamedTuple):
    """Getdomaininfo. Times in ns, memory in frames."""

    domid: int
    name: str
    state: str  # building, paused, running, dying, dead
    reason: str
    exit_code: int  # -1 until it has ended
    pid: int
    monitor_pid: int
    frames: int
    max_frames: int
    shared: int  # frames of it mapped by others
    cpu_ns: int
    hypercalls: int
    events_sent: int
    events_delivered: int  # signals
    events_elided: int  # sends that needed no signal
    flags: int


class CreateDomain(Hypercall[int]):
    """Make a domain, paused; returns its domid.

    nr_frames: its reservation, static and scattered. nr_descriptors: descriptors (0 or 1) for FD_DESCRIPTORS, sent
    beforehand over the caller's own FD_DESCRIPTORS. entry: the module a DRIVER runs, in dotted form, or "".
    Raises Invalid, Exists (the name), NoMemory, NoSpace (queues or processes; the reason is in the log).
    """

    OP, CMD, PRIVILEGED = OP_DOMCTL, 1, True
    name: Annotated[str, Text(NAME_BYTES)]
    nr_frames: U32
    flags: U32
    nr_descriptors: U32
    entry: Annotated[str, Text(64)]


class DestroyDomain(Hypercall[None]):
    """Kill it and wait until its frames, ports and grants are back. A dead domain's record goes too. Raises NoSuchDomain."""

    OP, CMD, PRIVILEGED = OP_DOMCTL, 2, True
    domid: U16


class PauseDomain(Hypercall[None]):
    """Stop it; its monitor works on. Raises NoSuchDomain, Invalid (not running, or dom0)."""

    OP, CMD, PRIVILEGED = OP_DOMCTL, 3, True
    domid: U16


class UnpauseDomain(Hypercall[None]):
    """Let it run; the first time this is "go". Raises NoSuchDomain, Invalid, Busy (the builder still maps frames of it)."""

    OP, CMD, PRIVILEGED = OP_DOMCTL, 4, True
    domid: U16


class GetDomainInfo(Hypercall[DomainInfo]):
    """State and counters. Raises NoSuchDomain."""

    OP, CMD, PRIVILEGED = OP_DOMCTL, 5, True
    domid: U16

    @classmethod
    def result(cls, values: list[Any]) -> DomainInfo:
        return DomainInfo(*values)


class VcpuInfo(NamedTuple):
    """Getvcpuinfo: where a domain's one virtual CPU is, and where its time went since its launch, in ns."""

    state: int  # RunState
    scheduled: str  # on, off (stopped: others' turn), idle; -: never stopped
    cpu: int  # of the host, where it ran last; -1: it is gone
    pinned: int  # where the scheduler has it now; -1: nowhere
    running: int
    runnable: int
    blocked: int
    offline: int


class GetVcpuInfo(Hypercall[VcpuInfo]):
    """Costs some 30 us: the host's own accounts are asked. Raises NoSuchDomain."""

    OP, CMD, PRIVILEGED = OP_DOMCTL, 14, True
    domid: U16

    @classmethod
    def result(cls, values: list[Any]) -> VcpuInfo:
        return VcpuInfo(*values)


class SetMaxMem(Hypercall[None]):
    """Let it own at most `max_frames` from now on; what it has above, it keeps. Raises NoSuchDomain, Invalid (dead)."""

    OP, CMD, PRIVILEGED = OP_DOMCTL, 11, True
    domid: U16
    max_frames: U32


class GetMemList(Hypercall[int]):
    """Write the u64 mfns of `count` frames (at most MAX_BATCH) of a domain being built, from the `first` on, at `address`.

    Their order is that of its pfns. Returns how many. Raises NoSuchDomain, NotPermitted (already unpaused), BadAddress.
    """

    OP, CMD, PRIVILEGED = OP_DOMCTL, 6, True
    domid: U16
    first: U32
    count: U32
    address: U64


class MapForeign(Hypercall[None]):
    """Map `count` frames (at most MAX_BATCH) of a domain being built, from `pfn` on, at the caller's `address`, read-write.

    Only until the domain's first unpause (EPERM afterwards). Raises NoSuchDomain, Invalid (range, address), TooBig.
    """

    OP, CMD, PRIVILEGED = OP_DOMCTL, 1000, True
    domid: U16
    pfn: U32
    count: U32
    address: U64


class UnmapForeign(Hypercall[None]):
    """Undo MapForeign for `count` pages at `address`. Raises Invalid (not such a mapping)."""

    OP, CMD, PRIVILEGED = OP_DOMCTL, 1001, True
    address: U64
    count: U32


class LaunchInfo(Hypercall[None]):
    """Load the root that a domain being built starts with, which is pinned (frame `root`), into window 0; a NATIVE one is
    entered at `entry`, guest-virtual, which its tables must let it execute (0: any other).

    Raises NoSuchDomain, NotPermitted (already unpaused), Exists (given before), Invalid (no pinned root of its own; entry).
    """

    OP, CMD, PRIVILEGED = OP_DOMCTL, 1002, True
    domid: U16
    root: U64
    entry: U64
