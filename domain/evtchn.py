"""Event channels as a guest uses them: ports to wait on. The signal stays blocked for good and is only ever waited for
(idle.py); what happened stands in the bitmaps, drained in C."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from domain._guest import ffi, lib
from domain.sched import Event
from hypervisor.public.evtchn import AllocUnbound, BindInterdomain, BindIpi, BindVirq, EvtchnClose, EvtchnSend, EvtchnUnmask
from hypervisor.public.types import DOMID_SELF

if TYPE_CHECKING:
    from domain.kernel import Kernel


class EventChannels:
    """Ports of this domain."""

    def __init__(self, kernel: Kernel, shared_info: int) -> None:
        self._call, self._post = kernel.hypercall, kernel.hypercall.post
        self.shared_info: Any = ffi.cast("void *", shared_info)
        self._events: dict[int, Event] = {}
        self._virqs: set[int] = set()  # the ports of ours that cannot send
        self.received = self.sent = 0
        self._upcall_pending: Any = ffi.cast("volatile uint8_t *", shared_info)  # vcpu_info begins with it
        lib.upcall_mask(self.shared_info)  # interrupts off, but while we sleep

    # ---- ports

    def alloc_unbound(self, remote: int, dom: int = DOMID_SELF) -> int:
        """A port that domain `remote` may bind (of domain `dom`, for dom0)."""
        port = self._call(AllocUnbound(dom, remote))
        if dom == DOMID_SELF:
            self._events[port] = Event()
        return port

    def bind_interdomain(self, remote: int, remote_port: int) -> int:
        """Join `remote_port` of domain `remote`; an event is pending at once, as early ones may have been lost."""
        return self._bound(self._call(BindInterdomain(remote, remote_port)))

    def bind_virq(self, virq: int) -> int:
        port = self._call(BindVirq(virq))
        self._virqs.add(port)
        return self._bound(port)

    def bind_ipi(self) -> int:
        return self._bound(self._call(BindIpi()))

    def adopt(self, port: int) -> int:
        """A port that the builder made for us."""
        return self._bound(port)

    def _bound(self, port: int) -> int:
        self._events.setdefault(port, Event())
        return port

    def close(self, port: int) -> None:
        """Close it; whoever waits on it wakes once."""
        self._call(EvtchnClose(port))
        self._virqs.discard(port)
        event = self._events.pop(port, None)
        if event:
            event.set()

    # ---- events

    def send(self, port: int) -> None:
        """One hypercall, whose answer nobody waits for; an event that is pending already costs the hypervisor one atomic and
        no signal. Raises Invalid for a port that cannot send."""
        self.sent += 1
        if port in self._events and port not in self._virqs:
            self._post(EvtchnSend(port))
        else:
            self._call(EvtchnSend(port))

    def unmask(self, port: int) -> None:
        self._call(EvtchnUnmask(port))

    async def wait(self, port: int) -> None:
        """Until an event arrived since the last wait on this port; events merge."""
        event = self._events[port]
        if not event.is_set:
            await event.wait()
        event.is_set = False

    def pending(self) -> bool:
        """Whether an event waits to be handed out: for who works long without looking."""
        return bool(self._upcall_pending[0])

    def hand_out(self, ports: Iterable[int]) -> None:
        """To their waiters: these were pending."""
        events = self._events
        for port in ports:
            self.received += 1
            event = events.get(port)
            if event is not None:
                event.set()
