"""What dom0 may do to a domain. Every call is PRIVILEGED. Source: xen/include/public/domctl.h.

    dom0                                      hypervisor
    CreateDomain ---------------------------> frames, queues, process, monitor, boot mapping; replies when all are there
    MapForeign .. write image .. UnmapForeign
    LaunchInfo (native kernels)
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
    """Where a NATIVE domain is entered (guest-virtual) and which of its frames are executable, read-only from then on.

    Raises NoSuchDomain, NotPermitted (already unpaused), Invalid (outside the reservation; entry not executable).
    """

    OP, CMD, PRIVILEGED = OP_DOMCTL, 1002, True
    domid: U16
    entry: U64
    text_pfn: U32
    text_count: U32
