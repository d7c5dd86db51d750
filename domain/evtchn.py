"""Event channels as a guest uses them: ports to wait on. The signal stays blocked for good and is only ever a descriptor
that becomes readable; what happened stands in the bitmaps, drained in C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from domain._guest import ffi, lib
from domain.sched import Event
from hypervisor.public.evtchn import AllocUnbound, BindInterdomain, BindIpi, BindVirq, EvtchnClose, EvtchnSend, EvtchnUnmask
from hypervisor.public.types import DOMID_SELF

if TYPE_CHECKING:
    from domain.kernel import Kernel

DRAIN = 256


class EventChannels:
    """Ports of this domain."""

    def __init__(self, kernel: Kernel, shared_info: int) -> None:
        self._call = kernel.hypercall
        self._shared: Any = ffi.cast("void *", shared_info)
        self._ports: Any = ffi.new("uint32_t[]", DRAIN)
        self._events: dict[int, Event] = {}
        self.received = self.sent = 0
        self.mask_upcalls()

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
        return self._bound(self._call(BindVirq(virq)))

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
        event = self._events.pop(port, None)
        if event:
            event.set()

    # ---- events

    def send(self, port: int) -> None:
        """One hypercall; an event that is pending already costs the hypervisor one atomic and no signal."""
        self.sent += 1
        self._call(EvtchnSend(port))

    def unmask(self, port: int) -> None:
        self._call(EvtchnUnmask(port))

    async def wait(self, port: int) -> None:
        """Until an event arrived since the last wait on this port; events merge."""
        event = self._events[port]
        await event.wait()
        event.clear()

    def mask_upcalls(self) -> None:
        """Interrupts off: a store, no call."""
        lib.upcall_mask(self._shared)

    def unmask_upcalls(self) -> bool:
        """Interrupts on. True: something came meanwhile, and no signal will say so."""
        return lib.upcall_unmask(self._shared) != 0

    def drain(self) -> int:
        """Hand pending ports to their waiters; returns how many."""
        total = 0
        while True:
            n = lib.upcall_drain(self._shared, self._ports, DRAIN)
            for i in range(n):
                event = self._events.get(self._ports[i])
                if event is not None:
                    event.set()
            total += n
            if n < DRAIN:
                self.received += total
                return total
