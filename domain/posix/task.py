"""Processes and their threads.

A Task is a thread: registers, a signal mask, and, while it is blocked in a system call, the generator that is its kernel stack.
A Process is what its threads share: number, family, signals, exit status.
Memory, files and directory are a task's, since clone
may share each of them or not. Source: kernel/fork.c, kernel/exit.c.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Generator, MutableSequence
from typing import TYPE_CHECKING, Any

from domain.posix import registers as r
from domain.posix import signals
from domain.posix.errors import Errno, Killed
from domain.posix.signals import Action, Info, Pending
from domain.posix.wait import Wait, Waiter, WaitQueue

if TYPE_CHECKING:
    from domain.posix.files import FileTable
    from domain.posix.memory import Memory
    from domain.posix.run import System
    from domain.posix.vfs import FsContext

Blocked = Generator[Wait, Any, int | None]
DEFAULT = Action()


class Process:
    """One process, until its parent has waited for it."""

    def __init__(self, system: System, parent: Process | None) -> None:
        self.system, self.parent = system, parent
        self.pid = system.new_pid()
        self.pgid: int = parent.pgid if parent else self.pid
        self.sid: int = parent.sid if parent else self.pid
        self.name: bytes = parent.name if parent else b""
        self.executable: bytes = parent.executable if parent else b""
        self.terminal: Any = parent.terminal if parent else None
        self.uid = self.gid = 0
        self.groups: tuple[int, ...] = parent.groups if parent else ()
        self.tasks: list[Task] = []
        self.children: list[Process] = []
        self.actions: list[Action] = [DEFAULT] * (signals.NSIG + 1)
        self.pending = Pending()
        self.exit_signal = int(signal.SIGCHLD)
        self.death_signal = 0  # for it, when its parent ends
        self.exit_status: int | None = None  # as wait4 tells it
        self.stopped = 0  # the signal that stopped it
        self.stop_news = self.continue_news = False  # not waited for yet
        self.child_events = WaitQueue()
        self.vfork_done = WaitQueue()
        self.limits: dict[int, tuple[int, int]] = dict(parent.limits) if parent else {}
        self.timers: dict[int, Any] = {}
        self.cpu_ns = self.children_cpu_ns = 0
        self.started_ns = system.now_ns()
        self.nice: int = parent.nice if parent else 0
        self.command_line: bytes = parent.command_line if parent else b""
        self.environment: bytes = parent.environment if parent else b""
        self.has_execed = False
        system.processes[self.pid] = self
        if parent:
            parent.children.append(self)

    @property
    def ppid(self) -> int:
        return self.parent.pid if self.parent else 0

    # ---- signals

    def send_signal(self, signo: int, info: Info | None = None) -> None:
        if signo:
            signals.send(self, info or Info(int(signo)))

    def ignores(self, signo: int) -> bool:
        return self.actions[signo].handler == signals.SIG_IGN

    def drop_pending(self, which: frozenset[Any] | set[int]) -> None:
        for pending in (self.pending, *(task.pending for task in self.tasks)):
            pending.drop(frozenset(int(signo) for signo in which))

    def stop(self, signo: int) -> None:
        """Nothing of it runs until SIGCONT. What its tasks wait for goes on being waited for."""
        if not self.stopped:
            self.stopped, self.stop_news, self.continue_news = int(signo), True, False
            if self.parent and not self.parent.actions[signal.SIGCHLD].flags & signals.SA_NOCLDSTOP:
                self._tell_parent(signals.CLD_STOPPED, int(signo))
            elif self.parent:
                self.parent.child_events.wake()

    def resume(self) -> None:
        if self.stopped:
            self.stopped, self.stop_news, self.continue_news = 0, False, True
            for task in self.tasks:
                if task.held:
                    task.held = False
                    self.system.ready(task)
            self._tell_parent(signals.CLD_CONTINUED, int(signal.SIGCONT))

    def _tell_parent(self, code: int, status: int) -> None:
        if self.parent is None:
            return
        rest = self.pid.to_bytes(4, "little") + self.uid.to_bytes(4, "little") + status.to_bytes(4, "little")
        if self.exit_signal:
            self.parent.send_signal(self.exit_signal, Info(self.exit_signal, code, rest))
        self.parent.child_events.wake()

    # ---- the end

    def exit(self, status: int) -> None:
        """All of its threads end, whatever they do; `status` as wait4 tells it. Idempotent."""
        if self.exit_status is not None:
            return
        self.exit_status = status
        for timer in self.timers.values():
            timer.cancel()
        for task in list(self.tasks):
            task.end()
        self.vfork_done.wake()
        self._orphan()
        self._lead_no_more()
        self.system.exited(self)
        if status & 0x7F:
            self._tell_parent(signals.CLD_KILLED, status & 0x7F)
        else:
            self._tell_parent(signals.CLD_EXITED, status >> 8)
        action = self.parent.actions[signal.SIGCHLD] if self.parent else None
        if action and (action.handler == signals.SIG_IGN or action.flags & signals.SA_NOCLDWAIT):
            self.reap()

    def _orphan(self) -> None:
        """Children become init's. Stopped ones that nobody can continue any more are hung up (kill_orphaned_pgrp)."""
        init = self.system.init
        for child in self.children:
            child.parent = init if init is not self else None
            for task in child.tasks:
                self.system.told(task)
            if init and init is not self:
                init.children.append(child)
                if child.exit_status is not None:
                    init.child_events.wake()
            child.send_signal(child.death_signal)
            if child.stopped and child.exit_status is None:
                child.send_signal(signal.SIGHUP)
                child.send_signal(signal.SIGCONT)
        self.children = []

    def _lead_no_more(self) -> None:
        """A session whose leader ends loses its terminal; who is in the foreground is hung up."""
        if self.pid == self.sid and self.terminal is not None and self.pid != 1:
            foreground = getattr(self.terminal, "foreground", 0)
            if foreground:
                self.system.kill_group(foreground, signal.SIGHUP)
            for other in self.system.processes.values():
                if other.sid == self.sid:
                    other.terminal = None

    def reap(self) -> None:
        """It was waited for: nothing of it is left."""
        self.system.processes.pop(self.pid, None)
        if self.parent:
            if self in self.parent.children:
                self.parent.children.remove(self)
            self.parent.children_cpu_ns += self.cpu_ns + self.children_cpu_ns


class Task:
    """One thread of a process."""

    def __init__(self, process: Process, memory: Memory, files: FileTable, fs: FsContext) -> None:
        self.process, self.system = process, process.system
        self.memory, self.files, self.fs = memory, files, fs
        self.tid = process.pid if not process.tasks else self.system.new_pid()
        self.registers: MutableSequence[int] = [0] * r.COUNT
        self.fpu = b""  # of a task that is not loaded in its space
        self.blocked = 0
        self.saved_blocked: int | None = None  # what sigsuspend and its like replaced
        self.awaited = 0  # signals that sigtimedwait waits for
        self.signal_arrived = WaitQueue()
        self.pending = Pending()
        self.altstack = (0, 0)
        self.fault = (0, 0)  # of the last: error code, vector
        self.fault_address = 0
        self.clear_tid = self.robust_list = 0
        self.generator: Blocked | None = None
        self.waiter: Waiter | None = None
        self.timer: Any = None
        self.woken_by: WaitQueue | None = None
        self.interrupting = self.queued = self.held = self.dead = False
        self.call = -1  # the system call it is in
        self.interrupted = -1  # the system call that a signal ended, not decided yet whether it is restarted
        process.tasks.append(self)
        self.system.tasks[self.tid] = self

    @property
    def alive(self) -> bool:
        return not self.dead

    # ---- signals

    def send_signal(self, signo: int, info: Info | None = None) -> None:
        if signo:
            signals.send(self.process, info or Info(int(signo), signals.SI_KERNEL), self)

    def signal_pending(self) -> bool:
        """Whether one is to be delivered before this task's program goes on."""
        return bool((self.pending.bits | self.process.pending.bits) & ~self.blocked)

    def blocks(self, signo: int) -> bool:
        return bool(self.blocked >> signo - 1 & 1)

    def interrupt(self) -> None:
        """A signal with a handler has come: a wait ends with Interrupted."""
        if self.generator is not None and self.waiter is not None:
            self.interrupting = True
            self.wake(None)

    def end_interrupted(self, restart: bool) -> None:
        """Decide what the call that was interrupted comes to: once more, or EINTR."""
        call, self.interrupted = self.interrupted, -1
        if call < 0:
            return
        if restart:
            self.registers[r.RAX] = call
            self.registers[r.RIP] -= 2  # the instruction `syscall`
            if self.memory.low is not None:
                self.memory.low.place(self.registers)
        else:
            self.registers[r.RAX] = -errno.EINTR & r.WORD

    # ---- waiting

    def waiting(self) -> bool:
        """Whether it is in a system call that is not over."""
        return self.generator is not None

    def wait(self, queues: list[WaitQueue], deadline: int | None) -> None:
        """Blocked from here on: until a queue is woken, or system time `deadline`."""
        self.waiter = Waiter(queues, self.wake)
        if deadline is not None:
            self.timer = self.system.at(deadline, lambda: self.wake(None))

    def wake(self, queue: WaitQueue | None) -> None:
        """It waits no more, and will run. Idempotent."""
        if self.waiter is None:
            return
        self.waiter.leave()
        self.waiter = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.woken_by = queue
        self.system.ready(self)

    # ---- FPU

    def fpu_state(self) -> bytes:
        """As a signal frame has it: an xsave area with Linux's software bytes."""
        return self.system.fpu_state(self)

    def set_fpu_state(self, state: bytes) -> None:
        self.system.set_fpu_state(self, state)

    # ---- the end

    def exit(self, code: int) -> None:
        """This thread ends; with the last one its process does."""
        if len(self.process.tasks) == 1:
            self.process.exit((code & 0xFF) << 8)
        else:
            self.end()

    def end(self) -> None:
        """It holds nothing any more."""
        self.dead = True
        if self.waiter is not None:
            self.waiter.leave()
            self.waiter = None
        if self.timer is not None:
            self.timer.cancel()
        if self.generator is not None:
            generator, self.generator = self.generator, None
            try:
                generator.throw(Killed())
            except (Killed, StopIteration, Errno, ValueError):
                pass  # ValueError: it is the one that is running, and ends by itself
        self.process.tasks.remove(self)
        self.system.tasks.pop(self.tid, None)
        self.system.ended(self)
        if self.robust_list:
            self.system.futexes.bury(self.memory, self.robust_list, self.tid)
        if self.process.exit_status is None and self.clear_tid:
            try:
                self.memory.copy_out(self.clear_tid, bytes(4))
            except Errno:
                pass
            self.system.futexes.wake(self.memory, self.clear_tid, 1)
        self.system.leave_memory(self.memory)
