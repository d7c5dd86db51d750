"""Birth and death of domains: one path up, one path down, both continuations that never block the loop.

    create: frames, queues, process (zygote or exec), its first message, monitor locked, shared_info mapped, waiting = "paused"
    end:    kill, wait for every process AND the hang-up of the monitor's socket, drop what it mapped, take back what
            others map of it (a zero page in its place), scrub, free

end is create read backwards and is also how a creation that failed half-way is undone.
"""

from __future__ import annotations

import array
import os
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING

import msgpack
import posix_ipc

from hypervisor import evtchn, fault, grant, memory, space, user, zygote
from hypervisor._hv import ffi, lib
from hypervisor.domain import DOM0, Domain, Process
from hypervisor.gate.boot import BootConfig
from hypervisor.gate.monitor import PROT_READ, PROT_WRITE, Monitor, MonitorError, MonitorGone
from hypervisor.loop import Steps
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.errors import NoSpace
from hypervisor.public.layout import GRANT_BASE, GRANT_FRAMES, GRANT_PFN, SHARED_INFO, SHARED_INFO_PFN
from hypervisor.public.mmu import ENTRIES, L3_SHIFT, PageType
from hypervisor.public.types import MESSAGE_BYTES, MESSAGES, VIRQ_DOM_EXC

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

BOOT_SECONDS = 20.0  # from fork to the first message; an exec'ed domain imports its program first
SCRUB_FRAMES = 1024  # 4 MiB a turn
LOOK_FRAMES = 1 << 18  # looked at in a turn, for who owns them


def create(hv: Hypervisor, domain: Domain, nr_frames: int, entry: str, descriptors: int = -1) -> Steps:
    """Steps: make `domain` ready to be built. Raises XenError, with everything undone."""
    domain.mfn_list = hv.frames.allocate(domain.domid, nr_frames)
    for pfn, mfn in enumerate(domain.mfn_list):
        hv.m2p.pfn[mfn] = pfn
    domain.max_frames = nr_frames
    hv.domains[domain.domid] = domain
    hv.children.expecting += 1
    try:
        yield from _start_process(hv, domain, entry, descriptors)
        yield from _share(hv, domain)
    except (MonitorGone, MonitorError, OSError, posix_ipc.Error, NoSpace) as error:
        why = str(error) or "died before it was ready"
        hv.log(f"{domain}: creation failed: {domain.reason or why}")
        end(hv, domain, f"creation failed: {why}")
        yield domain.dead
        del hv.domains[domain.domid]
        raise NoSpace(domain.reason) from None
    finally:
        hv.children.expecting -= 1
    domain.state = "paused"


def _start_process(hv: Hypervisor, domain: Domain, entry: str, descriptors: int) -> Steps:
    domain.fail = lambda why: end(hv, domain, why)
    domain.monitor = monitor = Monitor(hv.loop, domain.fail)
    names = [f"/{hv.instance}-{secrets.token_hex(8)}" for _ in range(2)]
    try:
        domain.queues = _make_queues(hv, names)
        config = BootConfig(
            domain.domid, domain.name, os.getpid(), hv.uid_of(domain), int(domain.flags), entry, names[0], names[1],
            0 if domain.privileged else hv.landlock, not domain.privileged, hv.m2p.size,
        )  # fmt: skip
        with fault.door(domain) as theirs:
            fds = [hv.machine.rw, hv.machine.ro, hv.code_fd, monitor.command_fd, hv.m2p.ro, theirs.fileno()]
            monitor.sock.sendmsg([b"boot"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        if domain.privileged or domain.flags & CreateFlags.DRIVER:
            fds = [monitor.peer.fileno()] + ([descriptors] if descriptors >= 0 else [])
            pid = zygote.spawn(
                "from hypervisor.gate.boot import BootConfig, boot; "
                f"boot(BootConfig.unpack(bytes.fromhex('{config.pack().hex()}')), {fds[0]}, {(*fds, -1)[1]})",
                fds,
            )
        else:
            pid = yield hv.zygote.fork(config, monitor.peer)
        if not pid:
            raise NoSpace("the zygote died")
        domain.process = hv.children.adopt(pid, lambda: _process_gone(hv, domain))
        monitor.handed_over()
        message, fds = yield monitor.first_word(BOOT_SECONDS)
    finally:
        monitor.handed_over()
        for name in names[: 2 if domain.queues else 0]:
            posix_ipc.unlink_message_queue(name)  # both ends are open, or the domain failed
    kind, value = msgpack.unpackb(message)
    if kind != "monitor":
        domain.reason = str(value)
        raise NoSpace(f"start-up failed: {value}")
    domain.smaps_fd = fds[0]
    domain.monitor_process = hv.children.adopt(value, lambda: end(hv, domain, "monitor died"))
    monitor.listen()
    yield from monitor.lock(f"{domain.name}/monitor")


def _make_queues(hv: Hypervisor, names: list[str]) -> tuple[posix_ipc.MessageQueue, posix_ipc.MessageQueue]:
    """Request and reply queue; O_NONBLOCK on our descriptions only."""
    made = []
    try:
        for name, (read, write) in zip(names, ((True, False), (False, True)), strict=True):
            hv.journal(f"queue {name}")
            queue = posix_ipc.MessageQueue(
                name, posix_ipc.O_CREX, 0o600, MESSAGES, MESSAGE_BYTES, read=read, write=write
            )
            made.append(queue)
            queue.block = False
            os.set_inheritable(queue.mqd, False)
    except BaseException as error:
        for name, queue in zip(names, made, strict=False):
            queue.close()
            posix_ipc.unlink_message_queue(name)
        if isinstance(error, (OSError, posix_ipc.Error)):
            raise NoSpace(f"POSIX message queues: {error} (the limits are fs.mqueue.queues_max and RLIMIT_MSGQUEUE)") from None
        raise
    return made[0], made[1]


def _share(hv: Hypervisor, domain: Domain) -> Steps:
    """What the hypervisor and the guest both write: shared_info, mapped on top, and the grant table."""
    domain.grant_frames = domain.mfn_list[GRANT_PFN : GRANT_PFN + GRANT_FRAMES]
    shared_info = domain.mfn_list[SHARED_INFO_PFN]
    for mfn in (shared_info, *domain.grant_frames):
        hv.hold(domain, mfn)
    _show_to_kernels(hv, domain)
    space.tell_window(domain)
    hv.clock.tell(domain)
    assert domain.monitor is not None
    yield from domain.monitor.map([(SHARED_INFO, shared_info, PROT_READ | PROT_WRITE)])


def may_start_with(hv: Hypervisor, domain: Domain, root: int) -> bool:
    """A pinned root of its own, whose half from GRANT_BASE on is empty."""
    if root >= hv.frames.nr_frames:
        return False
    frame = hv.frames.frame[root]
    return (
        frame.owner == domain.domid
        and frame.type == PageType.L3
        and bool(frame.pinned)
        and lib.mmu_next(hv.frames.mmu, root, GRANT_BASE >> L3_SHIFT) == ENTRIES
    )


def start_with(hv: Hypervisor, domain: Domain, root: int) -> Steps:
    """Steps: show its first root in window 0, for good, and map what it says."""
    yield from space.get_table(hv, domain, root, PageType.L3)
    hv.frames.frame[root].window = 1
    domain.space.windows[0] = root
    yield from space.show_all(hv, domain, root)


def _show_to_kernels(hv: Hypervisor, domain: Domain) -> None:
    """From here on the C kernels find this domain's shared_info and grant table."""
    domain.evt.shared_info = hv.machine.pointer(domain.mfn_list[SHARED_INFO_PFN])
    for i, mfn in enumerate(domain.grant_frames):
        domain.gnt.table[i] = hv.machine.pointer(mfn)
    domain.gnt.domid, domain.gnt.alive = domain.domid, 1
    hv.ends[domain.domid], hv.gnts[domain.domid] = domain.evt, domain.gnt


def _hide_from_kernels(hv: Hypervisor, domain: Domain) -> None:
    hv.ends[domain.domid] = hv.gnts[domain.domid] = ffi.NULL
    domain.evt.shared_info = ffi.NULL
    domain.gnt.alive = 0


def launch(hv: Hypervisor, domain: Domain) -> None:
    """ "go": the guest's first instruction. Its queue is read from now on."""
    assert domain.queues is not None
    domain.state, domain.launched, domain.launched_ns = "running", True, time.monotonic_ns()
    hv.listen(domain)
    hv.scheduler.enter(domain)
    domain.queues[1].send(msgpack.packb([0, 0, domain.entry]))


# ---- the end


def _process_gone(hv: Hypervisor, domain: Domain) -> None:
    process = domain.process
    assert process is None or process.ended
    end(hv, domain, _obituary(process) if process else "died at birth")


def _obituary(process: Process) -> str:
    if not process.by_signal:
        return f"exited with status {process.status}"
    name = signal.Signals(process.status).name
    known = {"SIGSYS": "a forbidden system call", "SIGSEGV": "a forbidden memory access", "SIGKILL": "killed from outside"}
    return f"{name}: {known.get(name, 'killed by a signal')}"


def end(hv: Hypervisor, domain: Domain, why: str) -> None:
    """Begin the end of a domain; idempotent, the first reason is kept. `domain.dead` waits for its end."""
    if domain.state in ("dying", "dead"):
        return
    domain.state, domain.reason = "dying", domain.reason or why
    if domain.domid == DOM0:
        hv.panic(f"dom0 ended: {domain.reason}")
        return
    hv.log(f"{domain}: {domain.reason}")
    hv.scheduler.leave(domain)
    for name in list(domain.timers):
        domain.stop_timer(name)
    hv.listen(domain)
    fault.hang_up(hv, domain)
    domain.blocked = domain.polled = None
    evtchn.close_all(hv, domain)
    _hide_from_kernels(hv, domain)
    for process in (domain.process, domain.monitor_process):
        if process is not None:
            process.signal(signal.SIGKILL)
    if domain.monitor is not None:
        domain.monitor.fail_all()
    for one in domain.users.values():
        user.fall(hv, one, "its domain ended")
    hv.start(_bury(hv, domain))


def _bury(hv: Hypervisor, domain: Domain) -> Steps:
    if domain.monitor is not None:
        domain.monitor.handed_over()
        yield domain.monitor.hang_up()
    for process in (domain.process, domain.monitor_process):
        if process is not None:
            yield process.exited
    for one in domain.users.values():
        yield one.gone
    domain.cpu_ns = max(domain.cpu_ns, hv.cpu_ns(domain))
    domain.users = {}
    grant.drop_all(hv, domain)
    yield from grant.take_back(hv, domain)
    domain.mfn_list, domain.held, domain.gdt = [], [], []
    for first in range(0, hv.frames.nr_frames, LOOK_FRAMES):
        owned = hv.frames.of(domain.domid, range(first, min(first + LOOK_FRAMES, hv.frames.nr_frames)))
        for at in range(0, len(owned), SCRUB_FRAMES):
            part = owned[at : at + SCRUB_FRAMES]
            hv.frames.reset(part)
            for mfn in part:
                memory.discard(hv, mfn)
            yield hv.loop.turn
    for queue in domain.queues or ():
        queue.close()
    domain.queues = None
    if domain.smaps_fd >= 0:
        os.close(domain.smaps_fd)
        domain.smaps_fd = -1
    for process in (domain.process, domain.monitor_process):
        if process is not None:
            process.close()
    domain.died()
    evtchn.raise_virq(hv, hv.domains[DOM0], VIRQ_DOM_EXC)
