"""What the hypervisor knows of a domain, grouped by who uses it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import posix_ipc

from hypervisor._hv import ffi, lib
from hypervisor.budget import Budget
from hypervisor.bvt import Share
from hypervisor.gate.monitor import Monitor
from hypervisor.loop import Resume, Timer
from hypervisor.public.clock import RunState
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.traps import TI_FAST, TI_SHIFT
from hypervisor.space import Space

if TYPE_CHECKING:
    from hypervisor.grant import GrantMapping
    from hypervisor.user import User

DOM0 = 0
PACE = 1000  # signals a second that one end of a channel may cost the other, beyond EVT_BURST and those that are answered


@dataclass
class Process:
    """A child of the hypervisor. `pid` may be reused once `ended`; `pidfd` may not."""

    pid: int
    pidfd: int
    ended: bool = False
    status: int = 0  # exit code or signal
    by_signal: bool = False
    cpu_ns: int = 0  # once it ended
    waiting: list[Resume] = field(default_factory=list)

    def exited(self, resume: Resume) -> None:
        """A Wait for its end."""
        if self.ended:
            resume(None)
        else:
            self.waiting.append(resume)

    def signal(self, number: int) -> None:
        """Send, or do nothing where there is nobody left."""
        if not self.ended:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass

    def cpu(self) -> int:
        """The CPU it ran on last (proc(5), stat); -1 where it is gone. Costs some 10 us."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return int(file.read().rpartition(b")")[2].split()[36])
        except (OSError, ValueError, IndexError):
            return -1

    def waited_ns(self) -> int:
        """How long it was ready to run and did not (proc(5), schedstat); 0 where the host keeps no account, or it is gone."""
        try:
            with open(f"/proc/{self.pid}/schedstat", "rb") as file:
                return int(file.read().split()[1])
        except (OSError, ValueError, IndexError):
            return 0

    def run_state(self) -> RunState:
        """Running or ready, or asleep (proc(5), stat); the host does not tell running from ready."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0]
        except (OSError, IndexError):
            return RunState.OFFLINE
        return RunState.RUNNABLE if state in (b"R", b"T") else RunState.BLOCKED

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Trap(NamedTuple):
    """A handler that the guest kernel registered."""

    address: int  # in its process
    flags: int  # TI_*

    @property
    def word(self) -> int:
        """As it stands in the page of its entry code, by which system calls of applications do not come."""
        return 0 if self.flags & TI_FAST else self.address | self.flags << TI_SHIFT


class Domain:
    """One domain, from its creation to the day dom0 forgets its record."""

    def __init__(self, domid: int, name: str, flags: CreateFlags) -> None:
        # identity
        self.domid, self.name, self.flags = domid, name, flags
        self.privileged = domid == DOM0
        # life: building -> paused <-> running -> dying -> dead
        self.state = "building"
        self.launched = False
        self.launched_ns = self.paused_ns = self.offline_ns = 0  # CLOCK_MONOTONIC; since when it is paused; paused in all
        self.share = Share()  # of the CPUs
        self.home, self.cpus = -1, frozenset[int]()  # the CPU that it and its applications share; those it may be moved to
        self.stolen_ns = self.stopped_ns = 0  # how long the scheduler had it stopped, in all; since when it has
        self.on_wake: Callable[[], None] | None = None  # it sleeps, and the scheduler wants to be told when an event wakes it
        self.reason = ""
        self.exit_code = -1
        self.process: Process | None = None
        self.monitor_process: Process | None = None
        self.smaps_fd = -1
        self.fail: Callable[[str], None] = lambda why: None  # begin its end, with a reason
        self._when_dead: list[Callable[[], None]] = []
        # memory
        self.mfn_list: list[int] = []  # the frames it was built of, in the order of its pfns; it may have given some away
        self.max_frames = 0
        self.grant_frames: list[int] = []  # of its table
        self.held: list[int] = []  # frames of it that the hypervisor writes: they cannot become tables, nor leave
        self.space = Space()
        self.users: dict[int, User] = {}  # applications' processes, by the window that each one is
        self.gdt: list[int] = []  # frames of its descriptor table
        self.monitor: Monitor | None = None
        self.entry = 0
        # hypercalls
        self.queues: tuple[posix_ipc.MessageQueue, posix_ipc.MessageQueue] | None = None
        self.busy = False  # a continuation of its runs: its queue is not read
        self.parked = False  # it has overdrawn its budget: likewise
        self.held_up: list[Resume] = []  # what of it goes on when it is not parked any more
        self.watched = False  # the loop watches its queue
        self.budget = Budget(self._is_near)
        self.woken_by: Domain | None = None  # whose event it was signalled for, until it asks for something
        self.callring: Any = None
        # page faults
        self.fault_socket: socket.socket | None = None  # the hypervisor's end of FD_FAULT
        self.faulting = False  # one is being served: the socket is not read
        self.faults_watched = False  # the loop watches it
        self.traps: dict[int, Trap] = {}  # by vector
        self.writable_tables = False  # a store to one is a request to update it (vm_assist)
        # events
        trusted = self.privileged or bool(flags & CreateFlags.DRIVER)  # to talk to many, with whom others agreed
        self.evt: Any = ffi.new("struct evt_end *", {"pace_ns": 0 if trusted else 1_000_000_000 // PACE})
        self.ports: dict[int, Any] = {}  # the open ones: port -> struct evt_port of `evt`
        self.virqs: dict[int, int] = {}
        self.timers: dict[str, Timer] = {}  # "once", "periodic", "virtual"
        self.time: Any = ffi.new("struct clock_line *")  # what its time record says, where it cannot write it
        self.blocked: Resume | None = None
        self.polled: tuple[Resume, tuple[int, ...]] | None = None
        # grants: what it maps of others, what others map of it
        self.gnt: Any = ffi.new("struct gnt_domain *")
        self.maptrack: dict[int, GrantMapping] = {}
        self.active: dict[int, list[GrantMapping]] = {}
        self.reserved_vas: set[int] = set()
        self.next_handle = 1
        # counters
        self.hypercalls = 0
        self.faults = self.fills = self.bounces = 0  # page faults told of; answered with a mapping, or by the handler
        self.cpu_ns = 0
        self.users_cpu_ns = 0  # of applications' processes that are gone

    def __repr__(self) -> str:
        return f"{self.name}({self.domid})"

    @property
    def alive(self) -> bool:
        return self.state in ("building", "paused", "running")

    @property
    def programs(self) -> list[Process]:
        """The processes of its applications."""
        return [user.process for user in self.users.values() if user.process is not None]

    def signal(self, number: int) -> None:
        """To all of its processes; its monitors go on."""
        for process in (self.process, *self.programs):
            if process is not None:
                process.signal(number)

    @property
    def shared_info(self) -> Any:
        """char * to its shared_info page; a null pointer where it has none."""
        return ffi.cast("char *", self.evt.shared_info)

    @property
    def may_call(self) -> bool:
        """Its next call may be served now: one at a time, and within its budget."""
        return self.state == "running" and not self.busy and not self.parked

    def stop_timer(self, name: str) -> None:
        """Cancel it, if there is one."""
        timer = self.timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _is_near(self) -> bool:
        """It runs on our CPU."""
        return self.process is not None and self.process.cpu() == lib.current_cpu()

    def dead(self, resume: Resume) -> None:
        """A Wait: until nothing of this domain can touch a frame."""
        if self.state == "dead":
            resume(None)
        else:
            self._when_dead.append(lambda: resume(None))

    def died(self) -> None:
        """Its teardown is complete."""
        self.state = "dead"
        waiting, self._when_dead = self._when_dead, []
        for call in waiting:
            call()
