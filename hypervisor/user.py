"""Applications' address spaces: a process each, made by a zygote of one page of code, with a monitor of its own.

Birth and death are a domain's in small: order, first word, monitor locked, everything but the top 64 MB unmapped; kill, then
process and monitor reaped and the monitor's socket hung up, before anything it held falls. A process or a monitor that dies or
is silent costs its application: the kernel is told by a word in its cell, and gives the frames back by UserDestroy.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypervisor import budget, guest_access, space
from hypervisor._hv import lib
from hypervisor.dispatch import hypercall
from hypervisor.gate import policy
from hypervisor.gate._gate import ffi as gate_ffi
from hypervisor.gate._gate import lib as gate
from hypervisor.gate.monitor import (
    PROT_READ,
    PROT_WRITE,
    SYS_MUNMAP,
    Monitor,
    MonitorError,
    MonitorGone,
    stub_image,
)
from hypervisor.loop import Resume, Steps, Wait, run_task
from hypervisor.public import traps
from hypervisor.public import user as abi
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import Busy, Invalid, NoEntry, NoSpace
from hypervisor.public.layout import HYPERVISOR_VIRT_START, NR_WINDOWS, SPACE_BYTES
from hypervisor.public.mmu import PageType
from hypervisor.public.types import PAGE_SIZE
from hypervisor.public.user import CONTROL_PAGES, MAX_USERS, USER_CONTROL, USER_START

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor
    from hypervisor.domain import Domain, Process

TASK_END = (1 << 47) - PAGE_SIZE
BOOT_SECONDS = 5.0  # from fork to the first word, and from there until it is ready
BOOT_NS = int(BOOT_SECONDS * 1e9)


class User:
    """One process that shows a user root."""

    def __init__(self, hv: Hypervisor, domain: Domain, window: int, root: int, control: list[int]) -> None:
        self.domain, self.window, self.root, self.control = domain, window, root, control
        self._hv = hv
        self.monitor = Monitor(hv.loop, self.fail, 0)
        self.process: Process | None = None
        self.monitor_process: Process | None = None
        self.fault_socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fault_socket.setblocking(False)
        self.started = self.watched = self.faulting = False  # its faults: they may come; the loop watches; one is served
        self.changes = 0  # as Space.changes
        self.dying, self.why = False, ""
        self.is_gone = False
        self._waiting: list[Resume] = []
        self.on_fall: Callable[[], None] | None = None

    def fail(self, why: str) -> None:
        """Begin its end."""
        fall(self._hv, self, why)

    @property
    def fds(self) -> tuple[int, int]:
        """Its ends of the monitor's socket and of the one of faults."""
        return self.monitor.peer.fileno(), self._theirs.fileno()

    def handed_over(self) -> None:
        self.monitor.handed_over()
        self._theirs.close()

    def ready(self, resume: Resume) -> None:
        """A Wait: until its thread is locked in and has left its first stack, which may then be unmapped; or MonitorGone."""
        fd = self.fault_socket.fileno()

        def finish(value: object) -> None:
            timer.cancel()
            self._hv.loop.unwatch(fd)
            self.on_fall = None
            resume(value)

        def look() -> None:
            try:
                word = self.fault_socket.recv(traps.FAULT.size)
            except BlockingIOError:
                return
            except OSError:
                word = b""
            finish(None if word else MonitorGone("died before it was ready"))

        if self.dying:
            self._hv.loop.soon(lambda: resume(MonitorGone("died before it was ready")))
            return
        timer = self._hv.loop.at(time.monotonic_ns() + BOOT_NS, lambda: finish(MonitorGone("start-up timed out")))
        self.on_fall = lambda: finish(MonitorGone("died before it was ready"))
        self._hv.loop.watch(fd, look)

    def gone(self, resume: Resume) -> None:
        """A Wait: until nothing of it can touch a frame."""
        if self.is_gone:
            resume(None)
        else:
            self._waiting.append(resume)

    def went(self) -> None:
        self.is_gone = True
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            resume(None)


def processes(domain: Domain) -> list[Process]:
    """Of its applications, monitors too."""
    return [p for one in domain.users.values() for p in (one.process, one.monitor_process) if p is not None]


# ---- the zygote


class Zygote:
    """The hypervisor's end: started when it is first needed, and again when the old one is gone."""

    def __init__(self, hv: Hypervisor) -> None:
        self._hv, self._image = hv, -1
        self._sock: socket.socket | None = None
        self._waiting: deque[Resume] = deque()
        self._process: Process | None = None

    def fork(self, order: bytes, fds: list[int]) -> Wait:
        """A Wait for the pid of a new process, our child; 0 or less where there is none."""

        def wait(resume: Resume) -> None:
            if self._sock is None:
                self.start()
            assert self._sock is not None
            self._waiting.append(resume)
            try:
                self._sock.sendmsg([order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            except OSError:
                self._waiting.pop()
                self._hv.loop.soon(lambda: resume(0))

        return wait

    def start(self) -> None:
        """Costs a millisecond. Whoever drops privileges does so first: it keeps what it is born with."""
        if self._image < 0:
            self._image = stub_image()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        null = os.devnull
        actions = [(os.POSIX_SPAWN_OPEN, fd, null, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pid = os.posix_spawn(
            f"/proc/self/fd/{self._image}", ["ring1/spaces"], {},
            file_actions=[*actions, (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)],
        )  # fmt: skip
        theirs.close()
        self._process = self._hv.children.adopt(pid, self._died)
        self._hv.loop.watch(self._sock.fileno(), self._answered)

    def _answered(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if len(data) != 8:
            self._hv.loop.unwatch(self._sock.fileno())
        elif self._waiting:
            self._waiting.popleft()(int.from_bytes(data, "little", signed=True))

    def _died(self) -> None:
        assert self._sock is not None
        self._hv.loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._sock = None
        if self._process is not None:
            self._process.close()
        waiting, self._waiting = self._waiting, deque()
        for resume in waiting:
            resume(0)


def _order(hv: Hypervisor, domain: Domain) -> bytes:
    """struct space_order of gate.h."""
    unfiltered = domain.flags & CreateFlags.UNFILTERED
    program = b"" if unfiltered else policy.application()
    order = gate_ffi.new("struct space_order *", {"parent": os.getpid(), "uid": hv.uid_of(domain)})
    order.name = f"{domain.name}/app".encode()[:15]
    if hv.landlock and not unfiltered:
        order.landlock_bytes = gate.landlock_rules(hv.landlock, order.landlock)
    order.nr_filter = len(program) // 8
    assert order.nr_filter <= gate.SPACE_FILTER
    gate_ffi.memmove(order.filter, program, len(program))
    return bytes(gate_ffi.buffer(order))


# ---- birth


def create(hv: Hypervisor, domain: Domain, root: int, address: int) -> Steps:
    """Steps: show `root` in a new process; `address` of the mfns of its control region. Raises XenError, all undone."""
    if traps.Vector.SYSTEM_CALL not in domain.traps:
        raise NoEntry("vector 0x80 has no fast handler: an application's system calls would have nowhere to go")
    control = list(struct.unpack(f"<{CONTROL_PAGES}Q", guest_access.copy_in(hv, domain, address, 8 * CONTROL_PAGES)))
    if hv.frames.frame[root].window:
        raise Busy("the root is shown already")
    if len(domain.users) == MAX_USERS:
        raise NoSpace(f"{MAX_USERS} applications")
    if len(set(control)) != CONTROL_PAGES or not all(hv.frames.owned_by(mfn, domain.domid) for mfn in control):
        raise Invalid("the control region is not made of frames of the domain's")
    yield from space.get_table(hv, domain, root, PageType.L3)
    for i, mfn in enumerate(control):
        if not hv.frames.get(mfn, True):
            for held in control[:i]:
                hv.frames.put(held, True)
            yield from space.put_table(hv, domain, root, False)
            raise Invalid(f"frame {mfn:#x} of the control region is a table")
    domain.held += control
    window = next(w for w in range(NR_WINDOWS, NR_WINDOWS + MAX_USERS) if w not in domain.users)
    user = domain.users[window] = User(hv, domain, window, root, control)
    hv.frames.frame[root].window = window + 1
    hv.children.expecting += 1
    try:
        yield from _start(hv, domain, user)
    except (MonitorGone, MonitorError, OSError) as error:
        if not domain.alive:
            raise MonitorGone from None
        yield from destroy(hv, user)
        raise NoSpace(f"no process for an application: {error}") from None
    finally:
        hv.children.expecting -= 1


def _start(hv: Hypervisor, domain: Domain, user: User) -> Steps:
    monitor = user.monitor
    try:
        peer, faults = user.fds
        pid = yield hv.users.fork(_order(hv, domain), [peer, hv.machine.rw, hv.machine.ro, monitor.command_fd, faults])
    finally:
        user.handed_over()
    if pid <= 0:
        raise OSError(-pid, "the zygote of applications cannot fork")
    user.process = hv.children.adopt(pid, lambda: fall(hv, user, "ended"))
    hv.scheduler.house(domain, pid, hv.domains.values())
    message, _ = yield monitor.first_word(BOOT_SECONDS)
    if user.dying or not domain.alive:
        fall(hv, user, "its domain ended")
        raise MonitorGone("died before it was ready")
    user.monitor_process = hv.children.adopt(int.from_bytes(message[:8], "little"), lambda: fall(hv, user, "monitor died"))
    monitor.listen()
    yield from monitor.lock(f"{domain.name}/monitor")
    yield user.ready
    yield monitor.batch([
        (SYS_MUNMAP, 0, HYPERVISOR_VIRT_START),
        (SYS_MUNMAP, SPACE_BYTES, TASK_END - SPACE_BYTES),
    ])  # fmt: skip
    rw = PROT_READ | PROT_WRITE
    yield from monitor.map([(USER_CONTROL + i * PAGE_SIZE, mfn, rw) for i, mfn in enumerate(user.control)])
    user.started = True
    _listen(hv, user)
    if domain.stopped_ns or domain.paused_ns:  # since it asked
        user.process.signal(signal.SIGSTOP)
    user.fault_socket.send(b"go")


# ---- faults


def listen(hv: Hypervisor, domain: Domain) -> None:
    """Watch the faults of its applications, or stop watching, as its state asks."""
    for user in domain.users.values():
        _listen(hv, user)


def _listen(hv: Hypervisor, user: User) -> None:
    """While one is served, until a second one is there."""
    domain = user.domain
    wanted = user.started and not user.dying and domain.alive and not domain.parked and (user.watched or not user.faulting)
    if wanted and not user.watched:
        hv.loop.watch(user.fault_socket.fileno(), lambda: _serve(hv, user))
    elif user.watched and not wanted:
        hv.loop.unwatch(user.fault_socket.fileno())
    user.watched = wanted


def _serve(hv: Hypervisor, user: User) -> None:
    """One message of its gate, or of the program in its place: what the tables allow is mapped, else the kernel has it."""
    begin = time.monotonic_ns()
    if user.dying or user.domain.parked:
        return
    if user.faulting:
        hv.loop.unwatch(user.fault_socket.fileno())
        user.watched = False
        return
    try:
        message = user.fault_socket.recv(traps.FAULT.size + 1)
    except BlockingIOError:
        return
    except OSError:
        message = b""
    if len(message) != traps.FAULT.size:  # it ended, or is not the gate's
        fall(hv, user, f"a page fault told in {len(message)} bytes")
        return

    def ended(verdict: Any, error: BaseException | None) -> None:
        user.faulting = False
        if error is not None and not isinstance(error, (MonitorError, MonitorGone)):
            hv.bug(error)
        if error is None and not user.dying:
            try:
                user.fault_socket.send(verdict)
            except OSError:
                pass  # who lets verdicts pile up loses them
            _listen(hv, user)

    user.faulting = True
    address, error_code, *_ = traps.FAULT.unpack(message)
    run_task(budget.charged(hv, user.domain, _verdict(hv, user, address, error_code), begin), ended)


def _verdict(hv: Hypervisor, user: User, address: int, error: int) -> Steps:
    domain = user.domain
    domain.faults += 1
    kinds = error & (traps.PF_WRITE | traps.PF_FETCH)
    if USER_START <= address < HYPERVISOR_VIRT_START:
        if (yield from space.fill(hv, domain, user.window * SPACE_BYTES + address, kinds)):
            domain.fills += 1
            return traps.VERDICT.pack(traps.RETRY, 0, 0)
        present = traps.PF_PRESENT if lib.mmu_allows(hv.frames.mmu, user.root, address, 0) else 0
    else:
        present = 0
    domain.bounces += 1
    return traps.VERDICT.pack(traps.BOUNCE, kinds | traps.PF_USER | present, 0)


# ---- death


def fall(hv: Hypervisor, user: User, why: str) -> None:
    """Begin the end of a process; idempotent. `user.gone` waits for it."""
    if user.dying:
        return
    user.dying, user.why = True, why
    if user.on_fall is not None:
        user.on_fall()
    for process in (user.process, user.monitor_process):
        if process is not None:
            process.signal(signal.SIGKILL)
    _listen(hv, user)
    user.fault_socket.close()
    user.monitor.fail_all()
    hv.start(_bury(hv, user))


def _bury(hv: Hypervisor, user: User) -> Steps:
    user.handed_over()
    yield user.monitor.hang_up()
    for process in (user.process, user.monitor_process):
        if process is not None:
            yield process.exited
            user.domain.users_cpu_ns += process.cpu_ns
            process.close()
    user.process = user.monitor_process = None
    if user.domain.alive:
        lib.cell_dead(hv.machine.pointer(user.control[0]))
    user.went()


def destroy(hv: Hypervisor, user: User) -> Steps:
    """Steps: end it, and let go of its frames. Runs in a hypercall of its domain's."""
    domain = user.domain
    fall(hv, user, "destroyed")
    yield user.gone
    if not domain.alive:
        raise MonitorGone
    space.unmark_all(hv, user.root)
    hv.frames.frame[user.root].window = 0
    del domain.users[user.window]
    for mfn in user.control:
        domain.held.remove(mfn)
        hv.frames.put(mfn, True)
    yield from space.put_table(hv, domain, user.root, False)


# ---- hypercalls


def _find(caller: Domain, root: int) -> User:
    for user in caller.users.values():
        if user.root == root:
            return user
    raise NoEntry(f"no application has the root {root:#x}")


@hypercall(abi.UserInterrupt)
def interrupt(hv: Hypervisor, caller: Domain, call: abi.UserInterrupt) -> None:
    user = _find(caller, call.root)
    if user.process is not None:
        user.process.signal(signal.SIGUSR1)


@hypercall(abi.UserDestroy)
def user_destroy(hv: Hypervisor, caller: Domain, call: abi.UserDestroy) -> Steps:
    yield from destroy(hv, _find(caller, call.root))
