"""Event channels: ports, bindings, delivery. Rules in hypervisor/public/evtchn.py.

A channel's two ends name each other; closing one leaves the other UNBOUND for the same domain. Delivery sets bits in the
receiver's shared_info and signals only on the edge (evtchn.c); the hypervisor never reads anything else there.

An end may cost the other PACE signals a second, and EVT_BURST more at once, unless the other answers: what is over that is
held back until it is paid for. It is late then, together with whatever else comes meanwhile, and never lost.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from hypervisor._hv import ffi, lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import DOM0, Domain
from hypervisor.loop import Resume
from hypervisor.public import evtchn as abi
from hypervisor.public.errors import Exists, Invalid, NoSpace, NotPermitted
from hypervisor.public.evtchn import State
from hypervisor.public.types import DOMID_SELF, MAX_PORTS, VIRQ_CONSOLE, VIRQ_DEBUG, VIRQ_DOM_EXC, VIRQ_TIMER

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

OWN_VIRQS = {VIRQ_TIMER, VIRQ_DEBUG}
DOM0_VIRQS = {VIRQ_CONSOLE, VIRQ_DOM_EXC}


# ---- delivery


def notify(hv: Hypervisor, domain: Domain, port: int) -> None:
    """Set a port pending; one signal, and only on the edge."""
    if domain.alive and lib.evtchn_notify(domain.evt, port):
        kick(domain)


def kick(domain: Domain) -> None:
    """The upcall: a signal that says "look", and the reply of a call that blocks or polls."""
    if domain.on_wake is not None:
        domain.on_wake()
    if domain.polled is not None and any(lib.evtchn_is_pending(domain.evt, port) for port in domain.polled[1]):
        poll_ends(domain)
    if domain.blocked is not None:
        resume, domain.blocked = domain.blocked, None
        resume(None)
    if domain.launched and domain.process is not None:
        domain.process.signal(signal.SIGUSR2)


def deliver(hv: Hypervisor, sender: Domain, signal: int) -> None:
    """What evtchn_send of `sender` asked for: a signal now, or one at the time that stands in the receiver's `late`."""
    domain = hv.domains[signal & ~lib.EVT_LATE]
    domain.woken_by = sender
    if signal & lib.EVT_LATE:
        hv.loop.at(domain.evt.late, lambda: release(domain))
    else:
        kick(domain)


def release(domain: Domain) -> None:
    """The signal that was held back, unless the domain has looked by itself."""
    if domain.alive and lib.evtchn_release(domain.evt):
        kick(domain)


def poll_begins(domain: Domain, resume: Resume, ports: tuple[int, ...]) -> None:
    """From here on every event of its is looked at; what is pending already was looked at by the caller."""
    domain.polled, domain.evt.polling = (resume, ports), 1


def poll_ends(domain: Domain) -> None:
    """By an event, or by time. Idempotent."""
    if domain.polled is not None:
        resume, _ = domain.polled
        domain.polled, domain.evt.polling = None, 0
        resume(None)


def raise_virq(hv: Hypervisor, domain: Domain, virq: int) -> None:
    """Nothing where the domain has not bound it."""
    port = domain.virqs.get(virq)
    if port is not None:
        notify(hv, domain, port)


# ---- ports


def _free_port(domain: Domain) -> int:
    if len(domain.ports) >= MAX_PORTS:
        raise NoSpace(f"{MAX_PORTS} ports are bound")
    return next(port for port in range(1, MAX_PORTS + 2) if port not in domain.ports)


def _open(domain: Domain, port: int, state: State, remote_domid: int = 0, remote_port: int = 0, virq: int = 0) -> int:
    """Fill the port where the C kernel reads it; returns it."""
    channel = domain.evt.ports[port]
    channel.remote_domid, channel.remote_port, channel.virq = remote_domid, remote_port, virq
    channel.state = int(state)
    domain.ports[port] = channel
    return port


def _channel(domain: Domain, port: int) -> Any:
    channel = domain.ports.get(port)
    if channel is None:
        raise Invalid(f"port {port} is closed")
    return channel


def _close(hv: Hypervisor, domain: Domain, port: int) -> None:
    channel = domain.ports.pop(port)
    if channel.state == State.VIRQ:
        del domain.virqs[channel.virq]
    elif channel.state == State.INTERDOMAIN:
        remote = hv.domains.get(channel.remote_domid)
        other = remote.ports.get(channel.remote_port) if remote else None
        if other is not None:
            other.state, other.remote_domid, other.remote_port = int(State.UNBOUND), domain.domid, 0
    channel.state = int(State.CLOSED)
    if domain.evt.shared_info:
        lib.evtchn_clear(domain.evt, port)


def close_all(hv: Hypervisor, domain: Domain) -> None:
    """Every port of a domain that resets or ends. The other ends are told: their peer is gone."""
    for port in list(domain.ports):
        channel = domain.ports[port]
        peer = (channel.remote_domid, channel.remote_port) if channel.state == State.INTERDOMAIN else None
        _close(hv, domain, port)
        if peer and peer[0] in hv.domains:
            notify(hv, hv.domains[peer[0]], peer[1])


# ---- hypercalls


@hypercall(abi.AllocUnbound)
def alloc_unbound(hv: Hypervisor, caller: Domain, call: abi.AllocUnbound) -> int:
    domain = hv.target(caller, call.domid)
    remote = caller.domid if call.remote_domid == DOMID_SELF else hv.lookup(call.remote_domid).domid
    port = _free_port(domain)

    return _open(domain, port, State.UNBOUND, remote)


@hypercall(abi.BindInterdomain)
def bind_interdomain(hv: Hypervisor, caller: Domain, call: abi.BindInterdomain) -> int:
    remote = caller if call.remote_domid == DOMID_SELF else hv.lookup(call.remote_domid)
    other = _channel(remote, call.remote_port)
    if other.state != State.UNBOUND or other.remote_domid != caller.domid:
        raise Invalid(f"port {call.remote_port} of domain {remote.domid} does not wait for domain {caller.domid}")
    port = _free_port(caller)

    _open(caller, port, State.INTERDOMAIN, remote.domid, call.remote_port)
    other.state, other.remote_port = int(State.INTERDOMAIN), port
    notify(hv, caller, port)  # events sent before the binding may have been lost
    return port


@hypercall(abi.BindVirq)
def bind_virq(hv: Hypervisor, caller: Domain, call: abi.BindVirq) -> int:
    if call.virq not in OWN_VIRQS | DOM0_VIRQS:
        raise Invalid(f"no virq {call.virq}")
    if call.virq in DOM0_VIRQS and caller.domid != DOM0:
        raise NotPermitted(f"virq {call.virq} is dom0's")
    if call.virq in caller.virqs:
        raise Exists(f"virq {call.virq} is bound to port {caller.virqs[call.virq]}")
    port = _free_port(caller)

    caller.virqs[call.virq] = port
    return _open(caller, port, State.VIRQ, virq=call.virq)


@hypercall(abi.BindIpi)
def bind_ipi(hv: Hypervisor, caller: Domain, call: abi.BindIpi) -> int:
    port = _free_port(caller)

    return _open(caller, port, State.IPI)


@hypercall(abi.EvtchnSend)
def send(hv: Hypervisor, caller: Domain, call: abi.EvtchnSend) -> None:
    if lib.evtchn_send(hv.ends, caller.domid, call.port, _signal):
        raise Invalid(f"port {call.port} cannot send")

    if _signal[0] != NO_DOMAIN:
        deliver(hv, caller, _signal[0])


_signal = ffi.new("uint16_t *")  # who is to be signalled: the C kernel's second result
NO_DOMAIN = lib.NO_DOMAIN


@hypercall(abi.EvtchnClose)
def close(hv: Hypervisor, caller: Domain, call: abi.EvtchnClose) -> None:
    _channel(caller, call.port)

    _close(hv, caller, call.port)


@hypercall(abi.EvtchnStatus)
def status(hv: Hypervisor, caller: Domain, call: abi.EvtchnStatus) -> tuple[int, int, int, int]:
    channel = hv.target(caller, call.domid).ports.get(call.port)
    if channel is None:
        return int(State.CLOSED), 0, 0, 0
    return int(channel.state), channel.remote_domid, channel.remote_port, channel.virq


@hypercall(abi.EvtchnUnmask)
def unmask(hv: Hypervisor, caller: Domain, call: abi.EvtchnUnmask) -> None:
    _channel(caller, call.port)

    if lib.evtchn_unmask(caller.evt, call.port):
        caller.evt.delivered += 1
        kick(caller)


@hypercall(abi.EvtchnReset)
def reset(hv: Hypervisor, caller: Domain, call: abi.EvtchnReset) -> None:
    close_all(hv, caller)
