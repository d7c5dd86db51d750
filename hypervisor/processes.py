"""Children of the hypervisor: every process is its own, is reaped here, and dies with it.

A pid is told to us by a child's message; it cannot be recycled before we reap it, and only `_reap` reaps. A child that
died before we were told of it waits in `_strangers` while a creation is under way.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from hypervisor.domain import Process
from hypervisor.gate._gate import lib
from hypervisor.loop import Loop


class Children:
    def __init__(self, loop: Loop) -> None:
        self._on_exit: dict[int, tuple[Process, Callable[[], None]]] = {}
        self._strangers: dict[int, tuple[int, bool]] = {}
        self.expecting = 0  # creations under way, whose pids we may not know yet
        self._signalfd = lib.open_signalfd(signal.SIGCHLD, -1)
        assert self._signalfd >= 0
        os.set_inheritable(self._signalfd, False)
        loop.watch(self._signalfd, self._reap)

    def adopt(self, pid: int, on_exit: Callable[[], None]) -> Process:
        """Our unreaped child `pid`; `on_exit` is called once, from the loop, when it is gone."""
        if pid in self._strangers:
            status, by_signal = self._strangers.pop(pid)
            process = Process(pid, -1, True, status, by_signal)
            on_exit()
            return process
        process = Process(pid, os.pidfd_open(pid))
        self._on_exit[pid] = process, on_exit
        return process

    def live(self) -> list[int]:
        return sorted(self._on_exit)

    def _reap(self) -> None:
        try:
            os.read(self._signalfd, 128)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            by_signal = os.WIFSIGNALED(status)
            status = os.WTERMSIG(status) if by_signal else os.waitstatus_to_exitcode(status)
            if pid not in self._on_exit:
                if self.expecting:
                    self._strangers[pid] = status, by_signal
                continue
            process, on_exit = self._on_exit.pop(pid)
            process.ended, process.status, process.by_signal = True, status, by_signal
            process.cpu_ns = int((usage.ru_utime + usage.ru_stime) * 1e9)
            on_exit()
            for resume in process.waiting:
                resume(None)
        if not self.expecting:
            self._strangers.clear()
