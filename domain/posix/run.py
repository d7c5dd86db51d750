"""The POSIX kernel at work: pick a task, let its program run for a slice, serve what it traps with.

One virtual CPU: while a program runs the kernel does not, and the other way round. The loop is one task of the domain's
scheduler, to which it yields whenever something else is due, so that console, disks and network go on.
"""

from __future__ import annotations

import errno
import signal
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from domain import sched
from domain.posix import calls, signals, traps
from domain.posix import registers as r
from domain.posix.errors import Errno, Interrupted
from domain.posix.frames import Frames, PageCache
from domain.posix.futex import Futexes
from domain.posix.memory import Memory
from domain.posix.signals import Info
from domain.posix.sites import FILE_CALLS, Sites
from domain.posix.space import DEAD, EXCEPTION, FAULT, SYSCALL, Space
from domain.posix.spaces import Program, Spaces
from domain.posix.task import Process, Task
from domain.posix.wait import parts

if TYPE_CHECKING:
    from domain.kernel import Kernel
    from domain.posix.vdso import Vdso

SLICE_NS = 10_000_000


class System:
    """What all processes have in common."""

    def __init__(self, kernel: Kernel, frames: Frames, new_space: Callable[[], Space], fast: bool = False) -> None:
        """`fast`: programs' call sites are patched (sites.py)."""
        self.kernel, self.frames, self.cache = kernel, frames, PageCache(frames)
        self.now_ns, self.wall_ns = kernel.now_ns, kernel.wall_ns
        self.spaces = Spaces(frames, new_space)
        frames.shrink = lambda: self.spaces.shrink() + self.cache.shrink()
        self.sites = Sites(frames, self.cache) if fast else None
        if self.sites is not None:
            self.sites.spaces = lambda: {task.memory for task in self.tasks.values()}
        self.processes: dict[int, Process] = {}
        self.tasks: dict[int, Task] = {}
        self.futexes = Futexes()
        self.runnable: deque[Task] = deque()
        self.current: Task | None = None
        self.init: Process | None = None
        self.init_is_mortal = True  # `ring1 run -- PROGRAM`: pid 1 is an ordinary program
        self.root: Any = None
        self.console: Any = None
        self.vdso: Vdso | None = None
        self.hostname = kernel.name.encode() if kernel.name else b"ring1"
        self.stopping: Callable[[], bool] = lambda: False
        self.yielding = False  # sched_yield was called
        self._last_pid = 0
        self._work = sched.Event()
        self.counters = dict.fromkeys(("syscalls", "faults", "preemptions", "switches"), 0)
        self.unknown: dict[int, int] = {}  # system calls asked for that there are not

    # ---- time and numbers

    def at(self, deadline_ns: int, call: Callable[[], None]) -> Any:
        return self.kernel.scheduler.at(deadline_ns, call)

    def new_pid(self) -> int:
        while True:
            self._last_pid = self._last_pid % 32767 + 1
            if self._last_pid not in self.tasks and self._last_pid not in self.processes:
                return self._last_pid

    def kill_group(self, pgid: int, signo: int, info: Info | None = None) -> int:
        """Send to all of a group; how many there are."""
        members = [process for process in self.processes.values() if process.pgid == pgid and process.exit_status is None]
        for process in members:
            process.send_signal(signo, info)
        return len(members)

    def memory_pages(self) -> tuple[int, int]:
        """Pages that programs may have in all, and how many of them are free."""
        return self.frames.used + self.frames.free, self.frames.free

    def say(self, text: str) -> None:
        """A line of the kernel's on its console."""
        self.kernel.console.write(text + "\n")

    # ---- address spaces

    def new_memory(self) -> Memory:
        """An empty address space in a process of its own. Raises Errno(ENOMEM, EAGAIN)."""
        return self._memory(*self.spaces.take((0, False)))

    def _memory(self, space: Any, left: dict[int, int]) -> Memory:
        return Memory(self.frames, self.cache, space, left, self.sites)

    def fork_memory(self, memory: Memory) -> Memory:
        """A copy in a process of its own. Raises Errno(ENOMEM, EAGAIN)."""
        space, left = self.spaces.take((memory.program[0], True))
        try:
            return memory.fork(space, left)
        except Errno:
            self.spaces.put(Memory(self.frames, self.cache, space))
            raise

    def leave_memory(self, memory: Memory) -> None:
        """A task that ran in it does so no more."""
        memory.users -= 1
        if not memory.users:
            self.spaces.put(memory)

    def become(self, task: Task, program: Program) -> None:
        """What execve begins with: one thread, an empty space that is its own, handlers forgotten. Raises Errno(ENOMEM,
        EAGAIN), with nothing changed, where others share its memory and it can have no other."""
        process, old = task.process, task.memory
        others = [other for other in process.tasks if other is not task]
        found = self.spaces.find(program)
        if found is None and old.users > 1 + len(others):
            found = self.spaces.take(program)
        for other in others:
            other.end()
        if found is not None:
            self.unload(task)
            task.memory = self._memory(*found)
            self.leave_memory(old)
        else:
            task.memory = self._memory(old.table, old.leave())
        task.memory.program = program
        task.clear_tid = task.robust_list = 0
        task.altstack = (0, 0)
        ignored, default = signals.Action(signals.SIG_IGN), signals.Action()
        process.actions = [ignored if action.handler == signals.SIG_IGN else default for action in process.actions]
        if task.files.users > 1:
            files = task.files.fork()
            task.files.release()
            task.files = files
        task.files.close_on_exec()
        process.vfork_done.wake()

    def load(self, task: Task) -> None:
        """Its registers are to be the ones that its space goes on with, and are not."""
        space: Any = task.memory.table
        if space.task is not None:
            self.unload(space.task)
        space.show(task)
        self.told(task)
        self.counters["switches"] += 1

    def told(self, task: Task) -> None:
        """The program may read who it is: a thread that it goes on with, or whose family has changed."""
        low, space = task.memory.low, task.memory.table
        if low is not None and space.task is task:  # type: ignore[attr-defined]
            low.shown(task)

    def unload(self, task: Task) -> None:
        """Its registers are its own again."""
        space: Any = task.memory.table
        if space.task is task:
            space.hide(task)

    def fpu_state(self, task: Task) -> bytes:
        space: Any = task.memory.table
        return space.fpu if space.task is task else task.fpu

    def set_fpu_state(self, task: Task, state: bytes) -> None:
        space: Any = task.memory.table
        if space.task is task:
            space.fpu = state
        else:
            task.fpu = state

    # ---- lives

    def ended(self, task: Task) -> None:
        """A task is gone: it is nowhere waited for."""
        self.unload(task)
        task.files.release()

    def exited(self, process: Process) -> None:
        """A process is a zombie."""
        if process is self.init:
            for other in list(self.processes.values()):
                other.exit(int(signal.SIGKILL))
        self._work.set()

    def ready(self, task: Task) -> None:
        """It wants the processor. Idempotent."""
        if not task.queued and not task.dead:
            task.queued = True
            self.runnable.append(task)
            self._work.set()

    # ---- the loop

    async def run(self, init: Process) -> int:
        """Until `init` ends; its wait status."""
        self.init = init
        while init.exit_status is None:
            if self.stopping():
                init.exit(int(signal.SIGTERM))
            elif self.runnable:
                task = self.runnable.popleft()
                task.queued = False
                if task.process.stopped:
                    task.held = True
                elif not task.dead:
                    self._turn(task)
                if self.due():
                    await _again()
            else:
                self.spaces.settle()
                self._work.clear()
                await self._work.wait()
        return init.exit_status

    def due(self) -> bool:
        """Whether the rest of this domain has something to do: another task, a timer, an event."""
        scheduler = self.kernel.scheduler
        return bool(scheduler.ready) or scheduler.overdue() or self.kernel.evtchn.pending()

    def _turn(self, task: Task) -> None:
        """One turn of one task."""
        self.current = task
        begun = self.now_ns()
        if task.generator is not None:
            self._go_on(task)
        if not task.waiting():
            self._user(task, begun + SLICE_NS)
        task.process.cpu_ns += self.now_ns() - begun
        self.current = None

    def _user(self, task: Task, end: int) -> None:
        """Its program runs until it blocks, its slice is over, or somebody else is due."""
        process, scheduler = task.process, self.kernel.scheduler
        while not task.dead:
            pending = (task.pending.bits | process.pending.bits) & ~task.blocked  # task.signal_pending(), without the call
            if pending or task.interrupted >= 0 or task.saved_blocked is not None:
                signals.deliver(task)
                if not task.alive:
                    return
            if process.stopped:
                task.held = True
                return
            space: Any = task.memory.table
            if space.task is not task:
                self.load(task)
            if space.stale and not self._flush(task):
                return
            now, due = self.now_ns(), scheduler.next_timer()
            if now >= end or now >= due or scheduler.ready:  # an event ends the run at once
                self.ready(task)
                return
            kind = space.run(end - now if self.runnable else min(end, due) - now)
            if kind == SYSCALL:
                if self.sites is not None and (not space.direct[0] or space.number in FILE_CALLS):
                    traps.came(self.sites, task, space)
                self.syscall(task, space.number, space.arguments, space.native)
            elif kind == FAULT:
                traps.fault(self, task, space)
            elif kind == EXCEPTION:
                traps.exception(self, task, space)
            elif kind == DEAD:
                self.say(f"{process.name.decode(errors='replace')}[{process.pid}]: its address space was lost")
                process.exit(int(signal.SIGKILL))
            else:
                traps.preempted(self, task, kind)
                return
            if task.generator is not None:
                return
            if self.yielding:
                self.yielding = False
                self.ready(task)
                return

    def _flush(self, task: Task) -> bool:
        """What its memory is is in force; False: there is no page for a table, not even one that an idle space has."""
        for _ in range(2):
            with suppress(MemoryError):
                task.memory.flush()
                return True
            self.spaces.shrink()
        traps.out_of_memory(self, task)
        return False

    # ---- system calls

    def syscall(self, task: Task, number: int, arguments: Any, native: bool = True) -> None:
        self.counters["syscalls"] += 1
        task.call = number
        call = calls.TABLE.get(number) if native else None
        if call is None:
            self.unknown[number] = self.unknown.get(number, 0) + 1
            task.registers[r.RAX] = -errno.ENOSYS & r.WORD
            return
        try:
            result = call.handler(task, *call.words(arguments))
        except Errno as error:
            result = -error.number
        except MemoryError:
            result = -errno.ENOMEM
        except Interrupted:  # it stopped itself, as a background reader of the terminal does
            task.interrupted, result = number, None
        if result.__class__ is int:
            if not task.dead:
                task.registers[r.RAX] = result & r.WORD
        elif isinstance(result, Generator) and not task.dead:
            task.generator = result
            self._go_on(task)

    def _go_on(self, task: Task) -> None:
        """Let a system call that was waiting go on, to its end or its next wait."""
        generator = task.generator
        assert generator is not None
        woken, task.woken_by = task.woken_by, None
        interrupting, task.interrupting = task.interrupting, False
        try:
            if interrupting and task.signal_pending():
                wait = generator.throw(Interrupted())
            else:
                wait = generator.send(woken)
            if task.dead:
                generator.close()
                return
            queues, deadline = parts(wait)
            if task.signal_pending() and not task.awaited:  # it came before the wait
                task.interrupting = True
                self.ready(task)
            else:
                task.wait(queues, deadline)
            return
        except StopIteration as stop:
            result = stop.value
        except Errno as error:
            result = -error.number
        except MemoryError:
            result = -errno.ENOMEM
        except Interrupted:
            task.interrupted, result = task.call, None
        task.generator = None
        if result is not None and not task.dead:
            task.registers[r.RAX] = result & r.WORD


async def _again() -> None:
    """Let the other tasks of this domain run, then go on."""
    event = sched.Event()
    sched.current_scheduler().at(0, event.set)
    await event.wait()
