"""Page faults: from the message of a domain's entry code to the verdict that it waits for.

What the guest's tables allow is mapped and the access runs again; the rest is the guest's own, and its handler is entered,
on a stack that was made ready for the frame. One fault of a domain at a time, on the same bill as its hypercalls; but a fault
may strike while a hypercall of the domain runs (its process touches what that call is mapping), and does not wait for it.

A message may also be forged by the guest, in the entry code's place: it gets what the tables allow anyway.
"""

from __future__ import annotations

import signal
import socket
import time
from typing import TYPE_CHECKING, Any

from hypervisor import budget, mmu, space
from hypervisor._hv import ffi
from hypervisor.domain import Domain
from hypervisor.frames import NO_MFN
from hypervisor.gate.monitor import MonitorError, MonitorGone
from hypervisor.loop import Steps, run_task
from hypervisor.public import traps as abi
from hypervisor.public.errors import XenError
from hypervisor.public.layout import KERNEL_WINDOW, in_windows
from hypervisor.public.start_info import SHARED_CR2
from hypervisor.public.traps import Vector
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

KINDS = abi.PF_PRESENT | abi.PF_WRITE | abi.PF_USER | abi.PF_FETCH  # of the error code; the others are the host's business
FRAME_ROOM = 64  # what a frame takes below the red zone at most: FRAME_BYTES, and 15 to align it


def door(domain: Domain) -> socket.socket:
    """A new pair of sockets; ours becomes the domain's, the other one is returned and does wait."""
    domain.fault_socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    domain.fault_socket.setblocking(False)
    return theirs


def listen(hv: Hypervisor, domain: Domain) -> None:
    """Watch its socket, or stop watching it, as its state asks; while a fault is served, until a second one is there."""
    wanted = domain.launched and domain.alive and not domain.parked and (domain.faults_watched or not domain.faulting)
    if wanted == domain.faults_watched or domain.fault_socket is None:
        return
    domain.faults_watched = wanted
    if wanted:
        hv.loop.watch(domain.fault_socket.fileno(), lambda: serve(hv, domain))
    else:
        hv.loop.unwatch(domain.fault_socket.fileno())


def hang_up(hv: Hypervisor, domain: Domain) -> None:
    """No more faults of it are served; entry code that waits for a verdict dies. Idempotent."""
    if domain.fault_socket is not None:
        hv.loop.unwatch(domain.fault_socket.fileno())
        domain.fault_socket.close()
        domain.fault_socket, domain.faults_watched = None, False


def serve(hv: Hypervisor, domain: Domain) -> None:
    """One message. It came on the domain's socket: that is whose fault it is."""
    if domain.parked or domain.fault_socket is None:
        return
    if domain.faulting:
        hv.loop.unwatch(domain.fault_socket.fileno())
        domain.faults_watched = False
        return
    begin = time.monotonic_ns()
    try:
        message = domain.fault_socket.recv(abi.FAULT.size + 1)
    except BlockingIOError:
        return
    except OSError:
        message = b""
    if not message:  # its process ended, or shut its end: how the process ends says the rest
        hang_up(hv, domain)
    elif len(message) != abi.FAULT.size:
        domain.fail(f"a page fault told in {len(message)} bytes, not {abi.FAULT.size}")
    else:
        _run(hv, domain, message, begin)


def _run(hv: Hypervisor, domain: Domain, message: bytes, begin: int) -> None:
    address, error, rip, rsp, value = abi.FAULT.unpack(message)
    if error & abi.PF_UNHANDLED:
        domain.fail(_last_words(address, error, rip, rsp, value))
        return
    store = value if error & abi.PF_STORE else None
    double = _double(rsp, rip, value) if error & abi.PF_DELIVERY else ""
    error &= KINDS
    domain.faults += 1
    if not in_windows(address):
        domain.fail(f"a page fault outside the windows, at {address:#x}")
        return

    def ended(verdict: Any, error: BaseException | None) -> None:
        domain.faulting = False
        if isinstance(error, MonitorError):
            domain.fail(f"page fault: {error}")
        elif error is not None and not isinstance(error, MonitorGone):
            hv.bug(error)
        elif error is None and verdict:
            _reply(domain, verdict)
        listen(hv, domain)

    domain.faulting = True
    run_task(budget.charged(hv, domain, _verdict(hv, domain, address - KERNEL_WINDOW, error, rsp, store, double), begin), ended)


def _last_words(address: int, error: int, rip: int, rsp: int, value: int) -> str:
    """Why a domain ends whose entry code could not go on."""
    code = error & (1 << 32) - 1
    if error & abi.PF_DELIVERY:
        return _double(rsp, rip, value)
    if value >= abi.SENT:
        return f"{_signal(value - abi.SENT)}, which it sent itself"
    if value == Vector.PAGE_FAULT:
        where = "that nobody can fill" if in_windows(address) else "outside the windows"
        return f"page fault {where}, at {address:#x}, error code {code:#x}, instruction {rip:#x}"
    return f"no handler for {_name(value)} at {rip:#x}, error code {code:#x}"


def _double(rsp: int, rip: int, value: int) -> str:
    return f"double fault: no stack at {rsp:#x} for {_name(value)} at {rip:#x}"


def _name(value: int) -> str:
    """Of what is delivered. Any number may have been sent."""
    callback = {abi.EVENT: "the event callback", abi.FAILSAFE: "the failsafe callback"}.get(value)
    known = {vector.value: f" ({vector.name.lower().replace('_', ' ')})" for vector in Vector}
    return callback or f"vector {value}{known.get(value, '')}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _reply(domain: Domain, verdict: bytes) -> None:
    """Never waits: who lets verdicts pile up loses them."""
    if domain.fault_socket is not None:
        try:
            domain.fault_socket.send(verdict)
        except OSError:
            pass


def _verdict(hv: Hypervisor, domain: Domain, offset: int, error: int, rsp: int, store: int | None, double: str) -> Steps:
    """The bytes to answer with; none where the domain has ended by it. `store`: what a plain store would have written.
    `double`: why the domain ends if the page is not its to write."""
    if (yield from space.fill(hv, domain, offset, error)):
        domain.fills += 1
        return abi.VERDICT.pack(abi.RETRY, 0, 0)
    if double:
        domain.fail(double)
        return b""
    if store is not None and domain.writable_tables and error & abi.PF_WRITE:
        what = yield from _update_table(hv, domain, offset, store)
        if what != abi.BOUNCE:
            return abi.VERDICT.pack(what, 0, 0)
    trap = domain.traps.get(Vector.PAGE_FAULT)
    if trap is None:
        what = "execute" if error & abi.PF_FETCH else "write" if error & abi.PF_WRITE else "read"
        domain.fail(f"page fault at guest address {offset:#x} ({what}): not mapped, and no handler")
        return b""
    if not (yield from _make_stack_ready(hv, domain, rsp)):
        domain.fail(f"double fault: no stack at {rsp - KERNEL_WINDOW:#x} for the page fault at guest address {offset:#x}")
        return b""
    if not domain.alive:
        return b""
    domain.bounces += 1
    ffi.cast("uint64_t *", domain.shared_info + SHARED_CR2)[0] = offset
    return abi.VERDICT.pack(abi.BOUNCE, _error_code(hv, domain, offset, error), trap.word)


def _update_table(hv: Hypervisor, domain: Domain, offset: int, value: int) -> Steps:
    """Steps: do what a store to a page table asks for, as a hypercall of the domain's would; the verdict. Never beside one of
    its calls, which may be half way through the same table: then the store is made again."""
    table = space.table_at(hv, domain, offset)
    if table == NO_MFN or offset % 8:
        return abi.BOUNCE
    if domain.busy:
        return abi.RETRY

    domain.busy = True
    try:
        yield from mmu.update_entry(hv, domain, table, offset % PAGE_SIZE // 8, value)
    except XenError:
        return abi.BOUNCE
    finally:
        domain.busy = False
        hv.busy_rings.catch_up(domain)
        hv.listen(domain)
    return abi.SKIP


def _make_stack_ready(hv: Hypervisor, domain: Domain, rsp: int) -> Steps:
    """Map the pages that a frame below `rsp` will be pushed on; False where the tables do not let it be written there.

    A stack outside the windows is private memory of the process: if it is not there, the host kernel ends the process.
    """
    bottom = rsp - abi.RED_ZONE - FRAME_ROOM
    if not in_windows(bottom) and not in_windows(rsp - 1):
        return True
    low, size = bottom - KERNEL_WINDOW, rsp - bottom
    if not in_windows(bottom) or not space.reachable(hv, domain, low, size, abi.PF_WRITE):
        return False
    for page in range(low - low % PAGE_SIZE, low + size, PAGE_SIZE):
        yield from space.fill(hv, domain, max(page, low), abi.PF_WRITE | abi.PF_USER)
    return True


def _error_code(hv: Hypervisor, domain: Domain, offset: int, error: int) -> int:
    """As the guest's tables have it: what the host's had mapped is not the guest's to know."""
    present = abi.PF_PRESENT if space.reachable(hv, domain, offset, 1, 0) else 0
    return error & ~abi.PF_PRESENT | present
