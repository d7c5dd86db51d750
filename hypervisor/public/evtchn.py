"""Event channels: 2-level ABI, bitmaps in shared_info, the signal is only the doorbell.

Numbers, order of steps and states are Xen's (xen/include/public/event_channel.h). A guest's port 0 is never valid.

    sender                        hypervisor                         receiver
    EvtchnSend(port) ---------->  pending bit of the peer's port
                                  bit was clear and unmasked:
                                  selector bit, upcall_pending
                                  the edge only: SIGUSR2 ----------> clear upcall_pending, take the selector,
                                                                     for each word take pending & ~mask, handle
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from hypervisor.public.hypercall import OP_EVENT_CHANNEL, Hypercall
from hypervisor.public.types import U16, U32


class State(IntEnum):
    """What a port is bound to, as EvtchnStatus answers it (EVTCHNSTAT_*; 3, a physical interrupt, does not exist here)."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    VIRQ = 4
    IPI = 5


class EvtchnStatusReply(NamedTuple):
    """One port; a field that its state has no use for is 0."""

    state: int
    remote_domid: int  # UNBOUND: who may bind; INTERDOMAIN: the other end
    remote_port: int  # INTERDOMAIN only
    virq: int  # VIRQ only


class BindInterdomain(Hypercall[int]):
    """Join a new local port to `remote_port` of `remote_domid` (or SELF), which must be UNBOUND and name the caller.

    Any domain. Returns the local port, which is set pending once: early events may have been lost.
    Raises NoSuchDomain, Invalid (port not unbound for us), NoSpace.
    """

    OP, CMD = OP_EVENT_CHANNEL, 0
    remote_domid: U16
    remote_port: U32


class BindVirq(Hypercall[int]):
    """A local port for a virtual interrupt (VIRQ_TIMER, DEBUG; CONSOLE and DOM_EXC for dom0 only).

    Raises Invalid (no such virq), Exists (bound already), NotPermitted, NoSpace.
    """

    OP, CMD = OP_EVENT_CHANNEL, 1
    virq: U32


class EvtchnClose(Hypercall[None]):
    """Close a port; the other end drops to UNBOUND and may be bound again. Raises Invalid."""

    OP, CMD = OP_EVENT_CHANNEL, 3
    port: U32


class EvtchnSend(Hypercall[None]):
    """Set the other end pending. An UNBOUND port drops it silently and succeeds. Raises Invalid."""

    OP, CMD = OP_EVENT_CHANNEL, 4
    port: U32


class EvtchnStatus(Hypercall[EvtchnStatusReply]):
    """State of a port of `domid` (another's: dom0 only). Raises NoSuchDomain, NotPermitted, Invalid."""

    OP, CMD = OP_EVENT_CHANNEL, 5
    domid: U16
    port: U32

    @classmethod
    def result(cls, values: list[Any]) -> EvtchnStatusReply:
        return EvtchnStatusReply(*values)


class AllocUnbound(Hypercall[int]):
    """A new port of `domid` (SELF; another's: dom0 only) that `remote_domid` may bind.

    Raises NoSuchDomain, NotPermitted, NoSpace.
    """

    OP, CMD = OP_EVENT_CHANNEL, 6
    domid: U16
    remote_domid: U16


class BindIpi(Hypercall[int]):
    """A port that the caller sends to itself. Raises NoSpace."""

    OP, CMD = OP_EVENT_CHANNEL, 7


class EvtchnUnmask(Hypercall[None]):
    """Clear the port's mask bit; if it is pending, deliver it now. Raises Invalid."""

    OP, CMD = OP_EVENT_CHANNEL, 9
    port: U32


class EvtchnReset(Hypercall[None]):
    """Close every port of the caller, its timer and console included."""

    OP, CMD = OP_EVENT_CHANNEL, 10
