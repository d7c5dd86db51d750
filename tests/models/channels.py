"""Event channels in a few words, and a long game in which the hypervisor's and these must agree."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from domain import _guest
from hypervisor.domain import Domain
from hypervisor.public.errors import Invalid
from hypervisor.public.evtchn import AllocUnbound, BindInterdomain, BindIpi, EvtchnClose, EvtchnSend, EvtchnUnmask, State
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.start_info import SHARED_PENDING, SHARED_UPCALL_MASK, SHARED_UPCALL_PENDING
from hypervisor.public.types import DOMID_SELF
from tests.models.stand_in import StandIn

NR_PORTS = 8  # of each domain, so that they meet
CLOSED = ("closed", 0, 0)
STATES = {"unbound": State.UNBOUND, "interdomain": State.INTERDOMAIN, "ipi": State.IPI}


# ---- a guest's side of its own page


def pending(domain: Domain) -> set[int]:
    """Ports whose pending bit is set."""
    words = _guest.ffi.cast("uint64_t *", domain.shared_info + SHARED_PENDING)
    return {64 * i + b for i in range(64) if words[i] for b in range(64) if words[i] >> b & 1}


def mask(domain: Domain, port: int) -> None:
    _guest.lib.event_mask(domain.shared_info, port)


def drain(domain: Domain, most: int = 256) -> list[int]:
    """What the upcall hands out, in its order."""
    ports = _guest.ffi.new("uint32_t[]", most)
    return [ports[i] for i in range(_guest.lib.upcall_drain(domain.shared_info, ports, most))]


def upcalls_masked(domain: Domain, masked: bool) -> None:
    domain.shared_info[SHARED_UPCALL_MASK] = bytes([masked])


class Model:
    """A dictionary of ports for each domain, and its page: what is pending, what is masked, whether it was told."""

    def __init__(self, hv: StandIn) -> None:
        self.hv = hv
        self.ports: dict[int, dict[int, tuple[str, int, int]]] = {d: {} for d in hv.domains}
        self.pending: dict[int, set[int]] = {d: set() for d in hv.domains}
        self.masked: dict[int, set[int]] = {d: set() for d in hv.domains}
        self.told = dict.fromkeys(hv.domains, False)  # signalled, and not drained since
        self.deaf = dict.fromkeys(hv.domains, False)  # its upcalls are masked
        self.signals = {d: domain.evt.delivered for d, domain in hv.domains.items()}

    def event(self, domid: int, port: int) -> None:
        if port not in self.pending[domid]:
            self.pending[domid].add(port)
            if port not in self.masked[domid]:
                self.tell(domid)

    def tell(self, domid: int) -> None:
        """One signal, on the edge."""
        if not self.told[domid]:
            self.told[domid] = True
            self.signals[domid] += not self.deaf[domid]

    def compare(self) -> None:
        for domid, domain in self.hv.domains.items():
            wanted = {port: (STATES[kind], remote, other) for port, (kind, remote, other) in self.ports[domid].items()}
            found = {port: (c.state, c.remote_domid, c.remote_port) for port, c in domain.ports.items()}
            assert found == wanted, f"{domain}: ports"
            assert pending(domain) == self.pending[domid], f"{domain}: pending"
            assert domain.evt.delivered == self.signals[domid], f"{domain}: signals"
            if self.pending[domid] - self.masked[domid]:
                assert domain.shared_info[SHARED_UPCALL_PENDING] != b"\0", f"{domain}: an event is lost"


class Players:
    """Three domains that make every call which changes a channel, and mask, unmask and drain; the model follows."""

    def __init__(self, hv: StandIn) -> None:
        self.hv, self.model, self.rng = hv, Model(hv), random.Random(8)
        for domain in hv.domains.values():
            domain.evt.pace_ns = 0  # the model has no clock
        self.moves: list[Callable[[int, int, int], None]] = [
            self.alloc, self.ipi, self.bind, self.send, self.send, self.send, self.send, self.close, self.mask, self.unmask,
            self.drain, self.deafen,
        ]  # fmt: skip

    def play(self, steps: int) -> None:
        for step in range(steps):
            domid, other = self.rng.sample(range(1, 4), 2)
            self.rng.choice(self.moves)(domid, other, self.rng.randrange(1, NR_PORTS + 1))
            if step % 10 == 0:
                self.model.compare()
        self.model.compare()

    def ask(self, domid: int, request: Hypercall[Any]) -> Any:
        return self.hv.ask(self.hv.domains[domid], request)[0]

    def refused(self, domid: int, request: Hypercall[Any]) -> None:
        with pytest.raises(Invalid):
            self.ask(domid, request)

    def free(self, domid: int) -> int:
        """The lowest port that is free; 0 for "enough"."""
        mine = self.model.ports[domid]
        return next(p for p in range(1, NR_PORTS + 2) if p not in mine) if len(mine) < NR_PORTS else 0

    # ---- moves: (who, another, a port)

    def alloc(self, domid: int, other: int, _: int) -> None:
        if free := self.free(domid):
            assert self.ask(domid, AllocUnbound(DOMID_SELF, other)) == free
            self.model.ports[domid][free] = ("unbound", other, 0)

    def ipi(self, domid: int, _: int, __: int) -> None:
        if free := self.free(domid):
            assert self.ask(domid, BindIpi()) == free
            self.model.ports[domid][free] = ("ipi", 0, 0)

    def bind(self, domid: int, other: int, port: int) -> None:
        ports = self.model.ports
        if ports[other].get(port, CLOSED)[:2] != ("unbound", domid):
            self.refused(domid, BindInterdomain(other, port))
        elif free := self.free(domid):
            assert self.ask(domid, BindInterdomain(other, port)) == free
            ports[domid][free], ports[other][port] = ("interdomain", other, port), ("interdomain", domid, free)
            self.model.event(domid, free)

    def send(self, domid: int, _: int, port: int) -> None:
        kind, remote, remote_port = self.model.ports[domid].get(port, CLOSED)
        if kind == "closed":
            self.refused(domid, EvtchnSend(port))
            return
        self.ask(domid, EvtchnSend(port))
        if kind == "interdomain":
            self.model.event(remote, remote_port)
        elif kind == "ipi":
            self.model.event(domid, port)

    def close(self, domid: int, _: int, port: int) -> None:
        kind, remote, remote_port = self.model.ports[domid].pop(port, CLOSED)
        if kind == "closed":
            self.refused(domid, EvtchnClose(port))
            return
        self.ask(domid, EvtchnClose(port))
        if kind == "interdomain":
            self.model.ports[remote][remote_port] = ("unbound", domid, 0)
        self.model.pending[domid].discard(port)

    def mask(self, domid: int, _: int, port: int) -> None:
        mask(self.hv.domains[domid], port)
        self.model.masked[domid].add(port)

    def unmask(self, domid: int, _: int, port: int) -> None:
        if port not in self.model.ports[domid]:
            self.refused(domid, EvtchnUnmask(port))
            return
        self.ask(domid, EvtchnUnmask(port))
        if port in self.model.masked[domid]:
            self.model.masked[domid].remove(port)
            if port in self.model.pending[domid]:
                self.model.tell(domid)

    def drain(self, domid: int, _: int, __: int) -> None:
        """Everything that is pending and not masked, once."""
        wanted = self.model.pending[domid] - self.model.masked[domid]
        assert set(drain(self.hv.domains[domid])) == wanted, "a drain handed out something else"
        self.model.pending[domid] -= wanted
        self.model.told[domid] = False

    def deafen(self, domid: int, _: int, __: int) -> None:
        """Upcalls masked, or unmasked with the look that belongs to it."""
        deaf = self.model.deaf[domid] = not self.model.deaf[domid]
        domain = self.hv.domains[domid]
        if deaf:
            _guest.lib.upcall_mask(domain.shared_info)
        elif _guest.lib.upcall_unmask(domain.shared_info):
            self.drain(domid, 0, 0)
