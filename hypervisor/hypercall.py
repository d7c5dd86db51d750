"""Serving hypercalls: from a message on a domain's queue, or entries of its ring, to the reply.

One call of a domain at a time, as on one virtual CPU: while a continuation of its runs, its queue is not read; nor while it
has overdrawn its budget and somebody else wants the hypervisor. A guest that does not read its replies loses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import posix_ipc

from hypervisor import budget, callring, dispatch
from hypervisor.domain import Domain
from hypervisor.gate.monitor import MonitorGone
from hypervisor.loop import Steps, run_task
from hypervisor.public.errors import NoSuchDomain, XenError
from hypervisor.public.hypercall import decode_message, encode_items
from hypervisor.public.types import MESSAGE_BYTES

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

Done = Callable[[Any, BaseException | None], None]


def listen(hv: Hypervisor, domain: Domain) -> None:
    """Watch its queue, or stop watching it, as its state asks. While a call of its runs the queue stays watched until a second
    message is there (`serve`): who waits for each answer costs no change of what is watched, 2 us a call."""
    wanted = domain.launched and domain.alive and not domain.parked and (domain.watched or not domain.busy)
    if wanted == domain.watched or domain.queues is None:
        return
    domain.watched = wanted
    if wanted:
        hv.loop.watch(domain.queues[0].mqd, lambda: serve(hv, domain))
    else:
        hv.loop.unwatch(domain.queues[0].mqd)


def serve(hv: Hypervisor, caller: Domain) -> None:
    """One message. It is the caller's queue: that is who calls."""
    if caller.queues is None or caller.parked:
        return
    if caller.busy:
        hv.loop.unwatch(caller.queues[0].mqd)
        caller.watched = False
        return
    begin = time.monotonic_ns()
    try:
        message, _ = caller.queues[0].receive()
    except (posix_ipc.BusyError, posix_ipc.SignalError):
        return
    caller.hypercalls += 1
    sequence = 0
    try:
        op, sequence, arguments = decode_message(message)
        outcome = dispatch.call(hv, caller, op, arguments)
    except XenError as error:
        budget.charge(hv, caller, begin)
        _reply(caller, [sequence, error.errno])
        return
    if type(outcome) is GeneratorType:
        _run(hv, caller, outcome, lambda value, error: _completed(caller, sequence, value, error), begin)
    else:
        budget.charge(hv, caller, begin)
        _reply(caller, [sequence, 0, *_values(outcome)])


def look_at_rings(hv: Hypervisor) -> bool:
    """Before the loop sleeps: serve a ring that is owed a look. True: there was one, do not sleep yet."""
    if not hv.busy_rings.owed:
        return False
    domain = hv.busy_rings.look()
    if domain is None:
        return False
    _run(hv, domain, callring.drain(hv, domain, callring.SPIN_NS), lambda value, error: None, time.monotonic_ns())
    return True


def _run(hv: Hypervisor, caller: Domain, steps: Steps, done: Done, begin: int) -> None:
    """Drive a continuation of `caller`'s, whose queue is not read meanwhile; its steps are charged as they run, the first
    from `begin` on."""

    def ended(value: Any, error: BaseException | None) -> None:
        caller.busy = False
        if isinstance(error, MonitorGone):
            error = NoSuchDomain("it ended meanwhile")
        if error is not None and not isinstance(error, XenError):
            hv.bug(error)
        done(value, error)
        hv.busy_rings.catch_up(caller)
        listen(hv, caller)

    caller.busy = True
    run_task(budget.charged(hv, caller, steps, begin), ended)


def _completed(caller: Domain, sequence: int, value: Any, error: BaseException | None) -> None:
    _reply(caller, [sequence, error.errno] if isinstance(error, XenError) else [sequence, 0, *_values(value)])


def _reply(caller: Domain, items: list[Any]) -> None:
    """Never waits: who lets its replies pile up loses them."""
    if caller.queues is None or not caller.alive:
        return
    message = encode_items(items)
    assert len(message) <= MESSAGE_BYTES, f"reply of {len(message)} bytes"
    with suppress(posix_ipc.BusyError):
        caller.queues[1].send(message)


def _values(outcome: Any) -> list[Any]:
    if outcome is None:
        return []
    return list(outcome) if isinstance(outcome, tuple) else [outcome]
